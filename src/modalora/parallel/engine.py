"""The few places where training in many processes differs from training in one.

The loop is written once, against `Engine`; `Single` is one process on one device. Every method is called by all ranks,
in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modalora.errors import CheckpointError


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

    def shard(self, model: nn.Module) -> None:
        """Spread a model over the processes, in place, once its parts are frozen and before an optimiser sees it."""
        ...

    def totals(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the sum over the ranks by key; a rank need not have every key."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch; together they are those of the sum over all ranks' losses."""
        ...

    def norm(self, trained: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of some parameters, over all ranks' parts of them, ()."""
        ...

    def clip(self, trained: Mapping[str, nn.Parameter], norm: Tensor, limit: float) -> None:
        """Scale gradients, whose norm is given, down to the limit."""
        ...

    def write(self, folder: Path, stem: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
        """Write tensors into a folder that all ranks see."""
        ...

    def read(self, folder: Path, stem: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
        """Fill the tensors from what `write` wrote, at any world size.

        Raises CheckpointError when a name is missing or left over, a shape or dtype differs, or the notes are others.
        """
        ...

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        ...


class Single:
    """One process on one device."""

    rank = 0
    world = 1

    def shard(self, model: nn.Module) -> None:
        """Leave the model whole."""

    def totals(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values."""
        return dict(values)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch; rows whose route reaches no trained part have none."""
        if loss.requires_grad:
            loss.backward()

    def norm(self, trained: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of some parameters, ()."""
        return nn.utils.get_total_norm([own.grad for own in trained.values() if own.grad is not None])

    def clip(self, trained: Mapping[str, nn.Parameter], norm: Tensor, limit: float) -> None:
        """Scale gradients, whose norm is given, down to the limit."""
        nn.utils.clip_grads_with_norm_(list(trained.values()), limit, norm)

    def write(self, folder: Path, stem: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
        """Write FOLDER/STEM.safetensors."""
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, folder / f"{stem}.safetensors", metadata=dict(notes))

    def read(self, folder: Path, stem: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
        """Fill the tensors from FOLDER/STEM.safetensors."""
        path = folder / f"{stem}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                _compare(path, dict(file.metadata() or {}), dict(notes))
                names = set(file.keys())
                if odd := sorted(names ^ set(tensors)):
                    how = "is left over" if odd[0] in names else "is missing"
                    raise CheckpointError(f"{path}: {odd[0]} {how} ({len(odd)} such); it is of another model or run")
                with torch.no_grad():
                    for name, tensor in tensors.items():
                        found = file.get_tensor(name)
                        if found.shape != tensor.shape or found.dtype != tensor.dtype:
                            told = f"{list(found.shape)} of {found.dtype}, not {list(tensor.shape)} of {tensor.dtype}"
                            raise CheckpointError(f"{path}: {name} is {told}")
                        tensor.copy_(found)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def barrier(self) -> None:
        """There is nobody to wait for."""


def _compare(path: Path, told: dict[str, str], expected: dict[str, str]) -> None:
    for key in sorted(set(told) | set(expected)):
        if told.get(key) != expected.get(key):
            raise CheckpointError(
                f"{path} is of {key} {told.get(key)!r}, the state it lies in of {expected.get(key)!r}; it was put "
                "there from elsewhere: remove the state's folder, the one before it is used then"
            )
