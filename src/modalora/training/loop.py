"""The training loop: micro-batches to one update, with metrics, a loss curve, checkpoints and exact resume.

Every label of a step counts alike, over micro-batches and processes: the loss is the sum of all single losses over
their number. A state holds all that the next step depends on, so a resumed run repeats, bit for bit, what an
uninterrupted one would have done.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from modalora.checkpoint.files import read_json, write_json
from modalora.checkpoint.resume import STATE, begin, commit, draft_of, locked, newest, retire
from modalora.config import RunConfig, dump, parse
from modalora.contracts import Batch, Batches
from modalora.errors import CheckpointError, ConfigError, TrainingError
from modalora.models.multimodal import Multimodal, part_of
from modalora.parallel.engine import Engine, Single
from modalora.parallel.files import read, write_whole
from modalora.training.journal import Journal
from modalora.training.objectives import OBJECTIVES, Losses, Objective
from modalora.training.optimizer import Optimizer, freeze
from modalora.training.randomness import random_state, seed_all, seed_dropout, set_random_state
from modalora.training.report import plot_losses
from modalora.training.signals import Asked, Interrupted, Stop

Metrics = dict[str, Any]
Say = Callable[[str], None]

# settings that may differ between a run and its resumption
FREE = {"steps", "log_every", "save_every", "keep", "threads", "device", "output", "cache", "data"}


@dataclass
class Progress:
    """How far a run is, and what its next metrics need; part of every state.

    recent: [sum, count] of each figure since the last logged step, as one step's loss says little.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)

    def note(self, figures: Mapping[str, float]) -> None:
        """Take in the figures of a step."""
        for name, value in figures.items():
            held = self.recent.setdefault(name, [0.0, 0])
            held[0] += value
            held[1] += 1


@dataclass(frozen=True)
class _Moment:
    """What a state needs besides weights, as it was at one moment: random generators and the place in the data."""

    randomness: dict[str, Tensor]
    data: dict[str, Any]


@dataclass(frozen=True)
class _Setup:
    """The things of a run that stay the same."""

    run: RunConfig
    folder: Path
    engine: Engine
    model: Multimodal
    objective: Objective
    trained: dict[str, nn.Parameter]
    optimizer: Optimizer
    batches: Batches
    say: Say

    def moment(self) -> _Moment:
        return _Moment(random_state(), dict(self.batches.state()))


def train(
    run: RunConfig,
    model: Multimodal,
    batches: Batches,
    report: Callable[[Metrics], None] = lambda metrics: None,
    *,
    engine: Engine | None = None,
    say: Say = lambda line: None,
) -> Metrics:
    """Train the parts that `run` names and return the last metrics; the model is changed in place.

    report: called with the metrics of every logged step. engine: the processes that train together, by default this
    one alone. say: told in words what a user should know. Resumes from run.output/resume when it holds a state. Raises
    TrainingError when the loss is not finite, Interrupted when stopped by SIGINT or SIGTERM; both leave a state that
    training can go on from.
    """
    engine = engine or Single()
    folder = Path(run.output)
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        if engine.rank == 0:
            stack.enter_context(locked(folder))
        engine.barrier()
        if run.threads:
            torch.set_num_threads(run.threads)
        seed_all(run.seed)  # every process starts with the same weights
        objective = OBJECTIVES[run.objective](model)
        freeze(model, run.train)
        engine.shard(model, objective)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        trained |= {f"objective.{name}": parameter for name, parameter in objective.named_parameters()}
        optimizer = Optimizer(trained, run.optim, run.steps)
        engine.wrap(optimizer)
        setup = _Setup(run, folder, engine, model, objective, trained, optimizer, batches, say)
        progress = _resume(setup)
        if engine.rank == 0:
            (folder / "run.yaml").write_text(dump(run), encoding="utf-8")
        model.train()
        log = stack.enter_context(Journal(folder / "metrics.jsonl", progress.step)) if engine.rank == 0 else None
        metrics = _go_on(setup, progress, stop, log, report)
    if engine.rank == 0:
        plot_losses(folder / "metrics.jsonl", folder / "loss.png")
    model.eval()
    return metrics


def _go_on(
    setup: _Setup, progress: Progress, stop: Stop, log: Journal | None, report: Callable[[Metrics], None]
) -> Metrics:
    run, engine = setup.run, setup.engine
    metrics: Metrics = {}
    saved = progress.step if progress.step else None
    first, started = progress.step, time.perf_counter()
    since = started
    while progress.step < run.steps:
        moment = setup.moment()
        figures: dict[str, float] | None = None
        asked = 0
        try:
            stop.breakable = engine.world == 1  # one rank alone must not leave the others waiting
            micro = setup.batches.take()
            gradient = _gradients(setup, micro, progress.step, stop)
            stop.breakable = False
            asked = gradient.asked
            figures = _update(setup, gradient, progress.step)
        except Asked:
            asked = stop.asked
        finally:
            stop.breakable = False
        if figures is None:  # the step was broken off: as if it had not begun
            for parameter in setup.trained.values():
                parameter.grad = None
        else:
            progress.step += 1
            progress.tokens += int(figures.pop("tokens"))
            progress.note(figures)
            moment = setup.moment()
            ended = progress.step == run.steps
            if progress.step % run.log_every == 0 or ended:
                now = time.perf_counter()
                progress.seconds += now - since
                since = now
                metrics = _metrics(setup, progress, (now - started) / (progress.step - first))
                if log:
                    log.write(metrics)
                report(metrics)
        due = progress.step % run.save_every == 0 or progress.step == run.steps or asked
        if due and saved != progress.step:
            if log:
                log.sync()
            _save(setup, progress, moment)
            saved = progress.step
        if asked and progress.step < run.steps:
            raise Interrupted(f"stopped after step {progress.step}; the same command goes on from there", asked)
    return metrics


def _metrics(setup: _Setup, progress: Progress, seconds_per_step: float) -> Metrics:
    run = setup.run
    means = {name: total / count for name, (total, count) in progress.recent.items()}
    progress.recent.clear()
    if progress.best_loss is None or means["loss"] < progress.best_loss:
        progress.best_loss, progress.best_step = means["loss"], progress.step
    return {
        "step": progress.step,
        "steps": run.steps,
        **means,
        "lr": setup.optimizer.rate(progress.step - 1),
        "tokens_per_second": round(progress.tokens / progress.seconds),
        "remaining_seconds": round(seconds_per_step * (run.steps - progress.step)),
    }


@dataclass(frozen=True)
class _Gradient:
    """What the micro-batches of a step came to. loss: the sum over all ranks; by_route: [sum, count]."""

    loss: float
    labels: float
    tokens: float
    by_route: dict[str, tuple[float, float]]
    asked: int


def _gradients(setup: _Setup, micro: list[Batch], step: int, stop: Stop) -> _Gradient:
    run, engine = setup.run, setup.engine
    labels = engine.totals({"labels": sum(setup.objective.count(batch) for batch in micro)})["labels"]
    if not labels:
        raise TrainingError(
            f"step {step + 1} has no labelled token; the mixture's conversations need an assistant's turn"
        )
    found: dict[str, float] = defaultdict(float)
    device = torch.device(run.device)
    for number, batch in enumerate(engine.level(micro), start=1):
        batch = batch.to(device)
        # dropout follows from the micro-batch, whichever process has it
        seed_dropout(run.seed, step, engine.share[0] + (number - 1) * engine.share[1])
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            losses: Losses = setup.objective(setup.model, batch)
        engine.backward(losses.values.sum() / labels, last=number == len(micro))
        found["tokens"] += int(batch.lengths.sum())
        for route, (total, count) in _by_route(batch, losses).items():
            found[f"sum {route}"] += total
            found[f"count {route}"] += count
    found = defaultdict(float, engine.totals({**found, "asked": stop.asked}))
    routes = sorted(name.removeprefix("sum ") for name in found if name.startswith("sum "))
    by_route = {route: (found[f"sum {route}"], found[f"count {route}"]) for route in routes}
    loss = sum(total for total, _ in by_route.values())
    return _Gradient(loss, labels, found["tokens"], by_route, stop.asked or int(found["asked"]))


def _by_route(batch: Batch, losses: Losses) -> dict[str, tuple[float, float]]:
    """Return the sum and the number of the losses of each route."""
    values, rows = losses.values.detach().double(), losses.rows.to(losses.values.device)
    size = len(batch.lengths)
    totals = torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, rows, values).tolist()
    counts = torch.bincount(rows, minlength=size).tolist()
    found: dict[str, tuple[float, float]] = {}
    for row, adapter in enumerate(batch.route.adapters):
        if counts[row]:
            total, count = found.get(adapter or "text", (0.0, 0.0))
            found[adapter or "text"] = (total + totals[row], count + counts[row])
    return found


def _update(setup: _Setup, gradient: _Gradient, step: int) -> dict[str, float]:
    """Change the weights; return the figures of the step."""
    if not isfinite(gradient.loss):
        raise TrainingError(
            f"the loss of step {step + 1} is {gradient.loss}; weights are as before it: lower optim.lr, check the data"
        )
    parts: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in setup.trained.items():
        parts[part_of(name)][name] = parameter
    norms = {part: setup.engine.norm(own) for part, own in parts.items()}
    norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    if not torch.isfinite(norm):
        raise TrainingError(f"the gradient of step {step + 1} is not finite; weights are as before it: lower optim.lr")
    setup.engine.clip(setup.trained, norm, setup.run.optim.clip_norm)
    setup.optimizer.set_rate(step)
    setup.engine.step()
    routes = {f"loss_{name}": total / count for name, (total, count) in gradient.by_route.items()}
    by_part = {f"grad_norm_{part}": float(own) for part, own in norms.items()}
    return {
        "loss": gradient.loss / gradient.labels,
        **(routes if len(routes) > 1 else {}),
        "grad_norm": float(norm),
        **(by_part if len(by_part) > 1 else {}),
        "tokens": gradient.tokens,
    }


def _notes(setup: _Setup, step: int) -> dict[str, str]:
    """What every file of a state says of itself, so that one of another run or step is noticed."""
    fixed = setup.run.model_dump_json(exclude=FREE)
    return {"run": hashlib.sha256(fixed.encode()).hexdigest()[:16], "step": str(step)}


def _save(setup: _Setup, progress: Progress, moment: _Moment) -> None:
    """Write a state. Raises TrainingError when the disk does not take it; the one before is then still there."""
    engine, step = setup.engine, progress.step
    draft, notes = draft_of(setup.folder, step), _notes(setup, step)
    try:
        if engine.rank == 0:
            begin(draft)
        engine.barrier()
        engine.save(draft, setup.trained, notes)
        write_whole(draft / f"random-{engine.rank:05d}", moment.randomness, notes)
        engine.barrier()
        if engine.rank == 0:
            write_json(
                draft / STATE,
                {
                    **notes,
                    "world": engine.world,
                    "settings": setup.run.model_dump(mode="json"),
                    "progress": asdict(progress),
                    "data": moment.data,
                },
            )
            retire(commit(draft), setup.run.keep)
        engine.barrier()
    except (OSError, SafetensorError) as error:
        if engine.rank == 0:
            begin(draft)
            draft.rmdir()
        raise TrainingError(
            f"the state of step {step} could not be written to {draft.parent}: {error}; make room there and run the "
            "same command, which goes on from the state before"
        ) from None


def _resume(setup: _Setup) -> Progress:
    """Set everything back to the newest whole state; return how far it is."""
    folder = newest(setup.folder, setup.say)
    if folder is None:
        return Progress()
    fields = read_json(folder / STATE)
    missing = [key for key in ("step", "run", "world", "settings", "progress", "data") if key not in fields]
    if missing:
        raise CheckpointError(f"{folder / STATE} lacks {', '.join(missing)}; it is not a state of this version")
    before, now = fields["settings"], setup.run.model_dump(mode="json")
    changed = sorted(key for key in now if key not in FREE and before.get(key) != now[key])
    if changed:
        raise ConfigError(
            f"{setup.folder} was trained with other settings ({', '.join(changed)}); give another output, or remove "
            f"{setup.folder}"
        )
    progress = parse(Progress, fields["progress"], str(folder / STATE))
    notes = _notes(setup, progress.step)
    setup.engine.load(folder, setup.trained, notes)
    if fields["world"] == setup.engine.world:
        randomness = random_state()
        read(folder / f"random-{setup.engine.rank:05d}", randomness, notes)
        set_random_state(randomness)
    else:
        seed_all(setup.run.seed, setup.engine.rank, progress.step)
        setup.say(
            f"resumed on {setup.engine.world} processes what {fields['world']} saved: dropout is drawn anew, the data "
            "goes on as it was"
        )
    setup.batches.restore(fields["data"])
    setup.say(f"goes on after step {progress.step}, from {folder}")
    return progress
