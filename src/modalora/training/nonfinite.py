"""A loss or gradient that is not finite: which tensors and which rows brought it about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modalora.contracts import Batch
from modalora.errors import listed
from modalora.parallel.engine import clear
from modalora.training.randomness import random_state, set_random_state

_MOST_ROWS = 512  # rows that are run once more, one by one


@dataclass(frozen=True)
class Fault:
    """What is known of a step that must not change the weights.

    what: "loss" or "gradient". weights: tensors of the model that hold a value that is not finite: the cause, if there
    are any. gradients: trained tensors whose gradient is not finite, in the order of the model. rows: the samples that
    bring it about, each on its own; none when only their sum does, None when it was not looked for.
    """

    what: str
    value: float
    weights: tuple[str, ...]
    gradients: tuple[str, ...]
    rows: tuple[str, ...] | None

    def __str__(self) -> str:
        told = [f"the {self.what} is {self.value}"]
        if self.weights:
            told.append(f"the model itself holds values that are not finite, first in {self.weights[0]}")
        if self.gradients:
            told.append(f"not finite is the gradient of {listed(self.gradients, 1)}")
        if self.rows:
            told.append(f"from the rows {listed(self.rows, between=', ')}")
        elif self.rows is not None:
            told.append("no single row brings it about")
        return "; ".join(told)


def row_name(batch: Batch, number: int, row: int) -> str:
    """Return where a row came from, or where it stands."""
    return batch.samples[row] if batch.samples else f"{row} of micro-batch {number}"


def not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> tuple[str, ...]:
    """Return the names of tensors that hold a NaN or an infinity."""
    return tuple(
        name
        for name, own in tensors
        if own is not None and own.is_floating_point() and not bool(torch.isfinite(own).all())
    )


def guilty_rows(
    micro: Sequence[Batch], trained: Mapping[str, nn.Parameter], backward: Callable[[Batch], None]
) -> tuple[str, ...]:
    """Run each row on its own and return those whose gradient is not finite; gradients are cleared."""
    before = random_state()
    found: list[str] = []
    rows = [(number, batch, row) for number, batch in enumerate(micro) for row in range(len(batch.lengths))]
    for number, batch, row in rows[:_MOST_ROWS]:
        clear(trained)
        backward(batch.select([row]))
        if not_finite((name, own.grad) for name, own in trained.items()):
            found.append(row_name(batch, number, row))
    clear(trained)
    set_random_state(before)
    return tuple(found)
