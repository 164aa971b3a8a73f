"""Keys and values of tokens already read, each row with its own length.

A right-padded call writes padding behind a row's real keys; the next call overwrites it, and no query sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """One growing key and value tensor per layer, (batch, capacity, kv_heads, head_dim)."""

    def __init__(self, layers: int, batch: int, device: torch.device | str = "cpu") -> None:
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._lengths = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def lengths(self) -> Tensor:
        """Tokens held per row, (batch,)."""
        return self._lengths

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (batch, time, kv_heads, head_dim) behind each row's length; return all held, padding included."""
        time = keys.shape[1]
        end = int(self._lengths.max()) + time
        self._keys[layer] = held_keys = self._reserve(self._keys[layer], keys, end)
        self._values[layer] = held_values = self._reserve(self._values[layer], values, end)
        rows = torch.arange(len(self._lengths), device=keys.device)[:, None]
        slots = self._lengths[:, None] + torch.arange(time, device=keys.device)
        held_keys[rows, slots] = keys
        held_values[rows, slots] = values
        return held_keys[:, :end], held_values[:, :end]

    def advance(self, lengths: Tensor) -> None:
        """Count this call's real tokens, (batch,)."""
        self._lengths = self._lengths + lengths

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(list(rows), device=self._lengths.device)
        self._lengths = self._lengths[index]
        self._keys = [None if x is None else x[index] for x in self._keys]
        self._values = [None if x is None else x[index] for x in self._values]

    @staticmethod
    def _reserve(held: Tensor | None, new: Tensor, end: int) -> Tensor:
        if held is not None and held.shape[1] >= end:
            return held
        capacity = end if held is None else max(end, 2 * held.shape[1])
        grown = new.new_zeros(new.shape[0], capacity, *new.shape[2:])
        if held is not None:
            grown[:, : held.shape[1]] = held
        return grown
