"""Loops over like pieces, of which a few stand for all where tensors have no numbers (training/plan.py).

What a loop over thousands of tiles takes in memory two of them show, and what it computes is theirs times a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Piece = TypeVar("Piece")
SHOWN = 2  # the second is made while the first still lives

_few = False
_factor = 1.0


@contextmanager
def few_stand_for_all() -> Iterator[None]:
    """Compute a few pieces of fake tensors for all; not always, as an export traces every piece with fake tensors."""
    global _few
    before, _few = _few, True
    try:
        yield
    finally:
        _few = before


def factor() -> float:
    """Return how many pieces the one at work stands for."""
    return _factor


def pieces(of: Tensor, all_of: Iterable[Piece], size: Callable[[Piece], float]) -> Iterator[Piece]:
    """Give all pieces of the work on a tensor; of a fake one the two largest, for the size of all."""
    global _factor
    if not (_few and isinstance(of, FakeTensor)):
        yield from all_of
        return
    told = sorted(all_of, key=size, reverse=True)
    shown, before = told[:SHOWN], _factor
    try:
        _factor = before * sum(map(size, told)) / max(1, sum(map(size, shown)))
        yield from shown
    finally:
        _factor = before
