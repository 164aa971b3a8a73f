"""A shuffle that needs no memory: the place of one row in an epoch's order, whatever the number of rows.

A Feistel network is a permutation of 2^k numbers; walking on until a number is below the number of rows makes it one of
that many (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

from modalora.errors import DataError

_ROUNDS = 8
_WORD = (1 << 64) - 1


def shuffled(place: int, rows: int, key: tuple[int, ...]) -> int:
    """Return which row stands at a place of the order that the key names; over all places, every row once."""
    if not 0 <= place < rows:
        raise DataError(f"place {place} is none of {rows} rows; places run from 0 to rows - 1")
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    seed = 0
    for part in key:
        seed = _mix(seed + part + 1)
    value = place
    while True:
        left, right = value >> half, value & mask
        for step in range(_ROUNDS):
            left, right = right, left ^ (_mix(seed + (step << 56) + right) & mask)
        value = left << half | right
        if value < rows:
            return value


def _mix(value: int) -> int:
    """splitmix64 (Steele, Lea and Flood 2014): 64 bits of which each depends on all of the input."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)
