"""The few places where training in many processes differs from training in one.

The loop is written once, against `Engine`; `Single` is one process on one device. Every method is called by all ranks,
in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modalora.contracts import Batch
from modalora.models.multimodal import Multimodal
from modalora.parallel.files import read, write_whole

NONE: Mapping[str, float] = {}


class Updates(Protocol):
    """An optimiser with its schedule."""

    parts: list[torch.optim.Optimizer]

    def state(self) -> dict[str, Tensor]:
        """Return the moments, PARAMETER.KIND; filling them sets the optimiser back."""
        ...


class Snapshot(Protocol):
    """Weights and moments to be saved. Its methods are called by all ranks, in a line apart from the engine's."""

    def write(self, folder: Path, notes: Mapping[str, str]) -> None:
        """Write them into a folder that all ranks see. Raises OSError or WorkError."""
        ...

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        ...


class Engine(Protocol):
    """What the training loop asks of the processes that it runs in."""

    @property
    def rank(self) -> int:
        """Which of the processes this is; 0 writes logs and seals checkpoints."""
        ...

    @property
    def world(self) -> int:
        """How many processes there are."""
        ...

    @property
    def share(self) -> tuple[int, int]:
        """Which share of the data this process reads, of how many; tensor- and sequence-parallel ones read the same."""
        ...

    def shard(self, model: Multimodal, objective: nn.Module) -> None:
        """Spread a model over the processes, in place, once its parts are frozen and before an optimiser sees it."""
        ...

    def wrap(self, optimizer: Updates) -> None:
        """Take the optimiser that `step` will use, once weights and moments are as they should be."""
        ...

    def losses(self, batch: Batch) -> Any:
        """Return what the objective makes of a batch."""
        ...

    def level(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return this rank's micro-batches of a step, made such that every rank runs the same parts on them."""
        ...

    def totals(self, values: Mapping[str, float], parts: Mapping[str, float] = NONE) -> dict[str, float]:
        """Return the sum over the shares by key; a rank need not have every key.

        values: of whole micro-batches. parts: of this process's tokens, where several share a micro-batch's.
        """
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; together they are those of the sum over all ranks' losses."""
        ...

    def norm(self, trained: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of some parameters, over all ranks' parts of them, ()."""
        ...

    def clip(self, trained: Mapping[str, nn.Parameter], norm: Tensor, limit: float) -> None:
        """Scale gradients, whose norm is given, down to the limit."""
        ...

    def step(self) -> None:
        """Update every parameter and clear its gradient."""
        ...

    def clear(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Drop the gradients of a step that is not taken."""
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """Return the numbers of a parameter that this rank holds."""
        ...

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the numbers of a parameter's gradient that this rank holds, as `local` has them, if there is one."""
        ...

    def snapshot(self, trained: Mapping[str, nn.Parameter], *, copied: bool) -> Snapshot:
        """Return weights and moments to be saved. copied: training may go on while they are written."""
        ...

    def load(
        self, folder: Path, trained: Mapping[str, nn.Parameter], optimizer: Updates, notes: Mapping[str, str]
    ) -> None:
        """Set weights and moments back to what a snapshot of any engine wrote, at any world size.

        Comes before `wrap`.

        Raises CheckpointError when a name is missing or left over, a shape or dtype differs, or the notes are others.
        """
        ...

    def whole(self) -> Multimodal | None:
        """Return the model as one process has it, on rank 0; None on the others.

        A model that was spread is gathered on the CPU; one process has its own where it is.
        """
        ...

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        ...


class Single:
    """One process on one device."""

    rank = 0
    world = 1
    share = (0, 1)

    def shard(self, model: Multimodal, objective: nn.Module) -> None:
        """Leave the model whole; the objective's head goes where it is."""
        self.model, self.objective = model, objective.to(model.device)

    def wrap(self, optimizer: Updates) -> None:
        """Take the optimiser."""
        self.optimizer = optimizer

    def losses(self, batch: Batch) -> Any:
        """Return what the objective makes of a batch."""
        return self.objective(self.model, batch)

    def level(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the micro-batches, without their rows that train nothing, and behind them these, in few of their own.

        So no graph is made of them, and those of many micro-batches are read together, as many as the largest held.
        """
        if any(True for _ in self.objective.parameters()):
            return list(batches)
        learning, idle = [], []
        for batch in batches:
            rows = self.model.idle_rows(batch)
            if 0 < len(rows) < len(batch.lengths):
                idle.append(batch.select(rows))
                batch = batch.select([row for row in range(len(batch.lengths)) if row not in rows])
            learning.append(batch)
        most = max(int(batch.lengths.sum()) for batch in batches)
        return learning + [Batch.joined(own) for own in _filled(idle, most)]

    def totals(self, values: Mapping[str, float], parts: Mapping[str, float] = NONE) -> dict[str, float]:
        """Return the values."""
        return {**values, **parts}

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; rows whose route reaches no trained part have none."""
        if loss.requires_grad:
            loss.backward()

    def norm(self, trained: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of some parameters, ()."""
        found = [own.grad for own in trained.values() if own.grad is not None]
        none = torch.zeros((), device=next(iter(trained.values())).device)  # PyTorch's lies on the CPU
        return nn.utils.get_total_norm(found) if found else none

    def clip(self, trained: Mapping[str, nn.Parameter], norm: Tensor, limit: float) -> None:
        """Scale gradients, whose norm is given, down to the limit."""
        nn.utils.clip_grads_with_norm_(list(trained.values()), limit, norm)

    def step(self) -> None:
        """Update every parameter and clear its gradient."""
        step_and_clear(self.optimizer)

    def clear(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Drop the gradients."""
        clear(trained)

    def local(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the parameter's gradient."""
        return parameter.grad

    def snapshot(self, trained: Mapping[str, nn.Parameter], *, copied: bool) -> Snapshot:
        """Return weights and moments, each to become one file."""
        return Whole(kept(trained, copied), kept(self.optimizer.state(), copied))

    def load(
        self, folder: Path, trained: Mapping[str, nn.Parameter], optimizer: Updates, notes: Mapping[str, str]
    ) -> None:
        """Set weights and moments back."""
        read(folder / "weights", trained, notes)
        read(folder / "optimizer", optimizer.state(), notes)

    def whole(self) -> Multimodal:
        """Return the model."""
        return self.model

    def barrier(self) -> None:
        """There is nobody to wait for."""


def _filled(batches: Sequence[Batch], most: int) -> list[list[Batch]]:
    """Return the batches in lists of at most so many tokens."""
    found: list[list[Batch]] = []
    tokens = most
    for batch in batches:
        own = int(batch.lengths.sum())
        if tokens + own > most:
            found.append([])
            tokens = 0
        found[-1].append(batch)
        tokens += own
    return found


@dataclass(frozen=True)
class Whole:
    """Weights and moments of one process."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]

    def write(self, folder: Path, notes: Mapping[str, str]) -> None:
        """Write a file of weights and one of moments."""
        write_whole(folder / "weights", self.weights, notes)
        write_whole(folder / "optimizer", self.moments, notes)

    def barrier(self) -> None:
        """There is nobody to wait for."""


def kept(tensors: Mapping[str, Tensor], copied: bool) -> dict[str, Tensor]:
    """Return tensors as they are now, or copies of them."""
    return {name: own.detach().clone() if copied else own.detach() for name, own in tensors.items()}


def clear(trained: Mapping[str, nn.Parameter]) -> None:
    """Drop the gradients of some parameters."""
    for parameter in trained.values():
        parameter.grad = None


def step_and_clear(optimizer: Updates) -> None:
    """Update every parameter and clear its gradient."""
    for part in optimizer.parts:
        part.step()
        part.zero_grad(set_to_none=True)
