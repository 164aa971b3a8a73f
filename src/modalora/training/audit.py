"""Does what was declared to train, train, and nothing else? Asked in the first steps, before hours are spent.

The faults it finds are those of public bug reports: adapters that were frozen on the way, rows that are never routed to
the adapter that trains, gradients that reach one layer only, a frozen decoder that moves. It knows what is no fault:
the gradient of a LoRA factor A is zero until B has moved, and an adapter without rows cannot be judged yet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modalora.config import RunConfig
from modalora.contracts import Batch, terms
from modalora.errors import ConfigError, TrainingError
from modalora.models.multimodal import matches, part_of
from modalora.parallel.engine import Engine
from modalora.training.objectives import trained_part

# Of a part's largest gradient: below it lies what rounding leaves of a zero, such as that of a bias of keys, which
# softmax does not see. AdamW's eps may be more, and then nothing moves.
NOISE = 1e-5
AUDITED = 4  # steps with rows for a part after which it is judged: the fault is told before the fifth


def parts_reached(batch: Batch, rows: Iterable[int]) -> set[str]:
    """Return the parts that some rows of a batch run through."""
    found = {"decoder", "objective"}
    chosen = set(rows)
    for row in chosen:
        if adapter := batch.route.adapters[row]:
            found |= {f"adapter.{name}" for name, _ in terms(adapter)}
    for item in batch.media:
        if item.row in chosen:
            found |= {f"{item.modality}.encoder", f"{item.modality}.projector.{item.branch}"}
    return found


def check_settings(run: RunConfig) -> None:
    """Refuse settings under which nothing is learnt. Raises ConfigError."""
    optim = run.optim
    if optim.warmup_steps >= run.steps > AUDITED:
        raise ConfigError(
            f"optim.warmup_steps={optim.warmup_steps} is not shorter than the run (steps={run.steps}), which never "
            f"reaches optim.lr={optim.lr:g}; a twentieth of the run is usual: optim.warmup_steps={run.steps // 20}"
        )
    if zero := [pattern for pattern, factor in optim.lr_scale.items() if factor == 0]:
        raise ConfigError(f"optim.lr_scale: {zero[0]!r} learns at a rate of 0; leave the part out of train: instead")


def check_preserved(model: nn.Module, run: RunConfig) -> None:
    """Refuse what is to be preserved and is no part of the model. Raises ConfigError."""
    parts = _parts(name for name, _ in model.named_parameters())
    for pattern in run.preserve:
        if not any(matches(part, pattern) for part in parts):
            raise ConfigError(f"preserve: {pattern!r} matches no part of this model; its parts are {', '.join(parts)}")


def check_trained(declared: Mapping[str, nn.Parameter], trained: Mapping[str, nn.Parameter], run: RunConfig) -> None:
    """Compare the parameters that a recipe names with those that training is left with.

    Raises TrainingError naming parts; ConfigError when the recipe preserves a part that trains, or scales the rate of
    one that does not.
    """
    for lost, told in (
        (set(declared) - set(trained), "was declared to train, but something froze it before training began"),
        (set(trained) - set(declared), "is not in train:, but something unfroze it before training began"),
    ):
        if lost:
            raise TrainingError(f"{', '.join(_parts(lost))} {told} ({len(lost)} tensors, such as {min(lost)})")
    parts = _parts(trained)
    for pattern in run.preserve:
        if wide := [part for part in parts if matches(part, pattern)]:
            raise ConfigError(
                f"preserve: {pattern!r} is to stay as it is, and train: {', '.join(run.train)} trains {wide[0]}; "
                "narrow train: to the parts that learn"
            )
    for pattern in run.optim.lr_scale:
        if not any(matches(part, pattern) for part in parts):
            raise ConfigError(f"optim.lr_scale: {pattern!r} matches no part that trains; these do: {', '.join(parts)}")


@dataclass(slots=True)
class _Watch:
    """One trained tensor. place, value: its number with the largest gradient, which an update must change.

    largest: the gradient there, on this rank. loud: the same of all ranks.
    """

    part: str
    graded: bool = False
    moved: bool = False
    place: int = -1
    value: float = 0.0
    largest: float = 0.0
    loud: float = 0.0


class Audit:
    """Watches the trained tensors until each is seen to learn, and the frozen ones for the first steps.

    judged, rows: of the time before the run was resumed: parts that were seen to learn, and the steps in which a part
    had rows with a label.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        idle: Sequence[str],
        engine: Engine,
        say: Callable[[str], None],
        judged: Sequence[str] = (),
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.model, self.trained, self.engine, self.say = model, trained, engine, say
        self.judged = list(judged)
        watched = {name: trained_part(name) for name in trained if name not in idle}
        self.watched = {name: _Watch(part) for name, part in watched.items() if part not in self.judged}
        self.steps = 0
        self.rows: dict[str, int] = defaultdict(int, rows or {})
        self.frozen = self._frozen_sums()

    @property
    def watches(self) -> bool:
        """Tell whether the next step is to be looked at."""
        return bool(self.watched) or self.steps < AUDITED

    @property
    def waits(self) -> list[str]:
        """Return the parts that are not judged yet."""
        return sorted({watch.part for watch in self.watched.values()})

    def before(self, reached: Iterable[str]) -> None:
        """Look at the gradients of a step, of which some rows with labels reached these parts."""
        self.steps += 1
        for part in reached:
            self.rows[part] += 1
        for name, own in self.model.named_parameters():
            if own.grad is not None and name not in self.trained:
                raise TrainingError(f"{name} is frozen and got a gradient in step {self.steps} of the audit")
        for name, watch in self.watched.items():
            own = self.trained[name]
            gradient = self.engine.gradient(own)
            if gradient is None or watch.moved or not gradient.numel():
                continue
            place = int(gradient.abs().argmax())
            if size := abs(float(gradient.flatten()[place])):
                watch.graded, watch.place, watch.largest = True, place, max(watch.largest, size)
                watch.value = float(self.engine.local(own).detach().flatten()[place])

    def after(self, warming: bool) -> None:
        """Look at the weights after the step's update. Raises TrainingError for what does not learn, or moved frozen.

        warming: whether the rate is still rising from nothing, so that an update may be too small to be seen.
        """
        for name, watch in self.watched.items():
            if watch.place >= 0 and not watch.moved:
                watch.moved = (
                    float(self.engine.local(self.trained[name]).detach().flatten()[watch.place]) != watch.value
                )
        self._share()
        if self.steps == AUDITED:
            self._check_frozen()
        for part in self.waits:
            own = {name: watch for name, watch in self.watched.items() if watch.part == part}
            if all(watch.moved for watch in own.values()):
                self._done(part)
            elif self.rows[part] >= AUDITED:
                self._judge(part, own, warming)
        if self.steps == AUDITED:
            self._first_words()

    def finish(self, steps: int) -> None:
        """At the end of a run of so many steps, refuse parts that no row reached. Raises TrainingError naming them."""
        idle = [part for part in self.waits if not self.rows[part]]
        if idle and steps > AUDITED:
            raise TrainingError(
                f"{', '.join(idle)} trains, and in {steps} steps no labelled row reached it: it is as it was; "
                "give the mixture rows that are routed to it, or leave it out of train:"
            )

    def _reached(self) -> list[str]:
        return sorted(part for part, steps in self.rows.items() if steps)

    def _frozen_sums(self) -> dict[str, int]:
        """Return the sum of what this rank holds of each frozen tensor.

        Twice in a run, as every number is read: 5.6 billion in bf16 take 0.5 s where a CPU reads 20 GB/s (measured).
        """
        named = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        names = (name for name in self.model.state_dict() if name not in self.trained)
        return {name: bit_sum(self.engine.local(named[name])) for name in names}

    def _check_frozen(self) -> None:
        now = self._frozen_sums()
        moved = self.engine.totals({name: 1.0 for name, before in self.frozen.items() if now[name] != before})
        if not moved:
            return
        name = min(moved)
        if part_of(name) in _parts(self.trained) and name in dict(self.model.named_buffers()):
            raise TrainingError(
                f"{name} moved in the first {AUDITED} steps without a gradient: running statistics (BatchNorm) are not "
                f"supported in what trains; use GroupNorm or LayerNorm, or leave {part_of(name)} out of train:"
            )
        raise TrainingError(f"{name} is frozen and moved in the first {AUDITED} steps; something else updates it")

    def _share(self) -> None:
        flags = {f"graded {name}": float(watch.graded) for name, watch in self.watched.items()}
        flags |= {f"moved {name}": float(watch.moved) for name, watch in self.watched.items()}
        flags |= {f"loud {name}": watch.largest for name, watch in self.watched.items()}
        if self.engine.world > 1 and flags:
            flags = self.engine.totals(flags)
        for name, watch in self.watched.items():
            watch.graded, watch.moved = flags[f"graded {name}"] > 0, flags[f"moved {name}"] > 0
            watch.loud = flags[f"loud {name}"]

    def _done(self, part: str) -> None:
        self.judged.append(part)
        self.watched = {name: watch for name, watch in self.watched.items() if watch.part != part}

    def _judge(self, part: str, own: Mapping[str, _Watch], warming: bool) -> None:
        lacking = sorted(name for name, watch in own.items() if not watch.graded)
        size = sum(trained_part(name) == part for name in self.trained)
        if lacking:
            raise TrainingError(
                f"{part} trains, and {len(lacking)} of its {size} tensors got no gradient in {AUDITED} steps with rows "
                f"for it, among them {lacking[0]}; something between it and the loss is detached, or it is not the "
                "tensor that the model runs"
            )
        loudest = max(watch.loud for watch in own.values())
        still = sorted(name for name, watch in own.items() if not watch.moved and watch.loud > NOISE * loudest)
        if not still:
            self._done(part)
        elif not warming:
            kind = str(self.trained[still[0]].dtype).removeprefix("torch.")
            raise TrainingError(
                f"{part} trains, and {len(still)} of its {size} tensors have gradients but did not move in {AUDITED} "
                f"steps, among them {still[0]}: updates are too small for {kind}, or no optimiser holds it; raise "
                "optim.lr, or keep the trained weights in float32"
            )

    def _first_words(self) -> None:
        if not self.judged and not any(watch.graded for watch in self.watched.values()):
            raise TrainingError(
                f"no labelled row of the first {AUDITED} steps reached anything that trains "
                f"({', '.join(self.waits)}); rows reached {', '.join(self._reached())}: give the "
                "mixture rows that are routed to what trains"
            )
        if not self.judged and not any(watch.moved for watch in self.watched.values()):
            raise TrainingError(
                f"nothing moved in the first {AUDITED} steps: the learning rate is too small to change a weight"
            )
        for part in self.waits:
            if not self.rows[part]:
                self.say(f"{part} trains, and no labelled row of the first {AUDITED} steps reached it: not judged yet")


def _parts(names: Iterable[str]) -> list[str]:
    return sorted({trained_part(name) for name in names})


def bit_sum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits, read as whole numbers: it changes with any one number.

    Numbers that change places keep it; the SHA-256 at the end of a run tells these.
    """
    own = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())  # one that stands for many
    flat = tensor.detach()[own].flatten()
    flat = flat.as_strided(flat.shape, (1,), flat.storage_offset())
    start = flat.storage_offset() * flat.element_size()
    widest = (torch.int64, torch.int32, torch.int16, torch.uint8)  # which sums without a wider copy come first
    kind = next(kind for kind in widest if flat.nbytes % kind.itemsize == start % kind.itemsize == 0)
    return int(flat.view(kind).sum())
