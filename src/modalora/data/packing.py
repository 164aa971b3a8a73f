"""Which rows fill a budget of tokens together.

The oldest row always goes, so none waits for ever; with it goes the subset of the others that leaves the least of the
budget empty, found exactly: the sums that subsets reach are the bits of one whole number.
"""

from __future__ import annotations

from collections.abc import Sequence

from modalora.errors import DataError


def fill(lengths: Sequence[int], budget: int) -> list[int]:
    """Return the places, in order, of the rows to take: the first, and others up to the budget.

    lengths: tokens per row, oldest first. Of equally full choices the one with older rows is taken. Raises DataError
    when the first alone exceeds the budget.
    """
    if not lengths or lengths[0] > budget:
        raise DataError(f"lengths={list(lengths[:1])} must begin with a row of at most {budget} tokens")
    room = budget - lengths[0]
    within = (1 << (room + 1)) - 1
    reached = [1]  # bit n: some of the newest rows have n tokens together
    for length in reversed(lengths[1:]):
        reached.append((reached[-1] | reached[-1] << length) & within)
    left = reached[-1].bit_length() - 1
    taken = [0]
    for place, before in zip(range(1, len(lengths)), reversed(reached[:-1]), strict=True):
        if lengths[place] <= left and before >> (left - lengths[place]) & 1:
            taken.append(place)
            left -= lengths[place]
    return taken
