"""Keys and values of tokens already read, each row with its own length.

A right-padded call writes padding behind a row's real keys; the next call overwrites it, and no query sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SPARE = 64  # tokens of room behind a prompt, so that the first decoded token does not copy it


class KVCache:
    """One growing key and value tensor per layer, (batch, kv_heads, capacity, head_dim).

    So the keys of one head lie together, as the products of a decoding step read them; no step copies them.
    """

    def __init__(self, layers: int, batch: int, device: torch.device | str = "cpu") -> None:
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self._counts: list[int] | None = [0] * batch  # None: to be asked for, once for all layers

    @property
    def lengths(self) -> Tensor:
        """Tokens held per row, (batch,)."""
        return self._lengths

    @property
    def counts(self) -> list[int]:
        """Tokens held per row, as plain numbers."""
        if self._counts is None:
            self._counts = self._lengths.tolist()
        return self._counts

    @property
    def is_even(self) -> bool:
        """Whether every row holds as many tokens as the others."""
        return len(set(self.counts)) <= 1

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (batch, time, kv_heads, head_dim) behind each row's length; return all held, padding included."""
        time = keys.shape[1]
        end = max(self.counts) + time
        self._keys[layer] = held_keys = self._reserve(self._keys[layer], keys, end)
        self._values[layer] = held_values = self._reserve(self._values[layer], values, end)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if self.is_even:
            held_keys[:, :, end - time : end] = keys
            held_values[:, :, end - time : end] = values
        else:
            rows = torch.arange(len(self._lengths), device=keys.device)[:, None, None]
            heads = torch.arange(keys.shape[1], device=keys.device)[:, None]
            slots = (self._lengths[:, None] + torch.arange(time, device=keys.device))[:, None]
            held_keys[rows, heads, slots] = keys
            held_values[rows, heads, slots] = values
        return held_keys[:, :, :end].transpose(1, 2), held_values[:, :, :end].transpose(1, 2)

    def advance(self, lengths: Tensor) -> None:
        """Count this call's real tokens, (batch,)."""
        self._lengths, self._counts = self._lengths + lengths, None

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(list(rows), device=self._lengths.device)
        self._lengths, self._counts = self._lengths[index], [self.counts[row] for row in rows]
        self._keys = [None if x is None else x[index] for x in self._keys]
        self._values = [None if x is None else x[index] for x in self._values]

    def put(self, rows: Sequence[int], other: KVCache) -> None:
        """Let these rows hold what the rows of another cache hold, in order, instead of what they did."""
        index, end = torch.tensor(list(rows), device=self._lengths.device), max(other.counts)
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for layer, (own, new) in enumerate(zip(mine, theirs, strict=True)):
                if own is not None and new is not None:
                    mine[layer] = own = self._reserve(own, own.transpose(1, 2), end)
                    own[index, :, :end] = new[:, :, :end]
        self._lengths, self._counts = self._lengths.index_copy(0, index, other._lengths), None

    @staticmethod
    def _reserve(held: Tensor | None, new: Tensor, end: int) -> Tensor:
        if held is not None and held.shape[2] >= end:
            return held
        capacity = end + _SPARE if held is None else max(end, 2 * held.shape[2])
        grown = new.new_zeros(new.shape[0], new.shape[2], capacity, new.shape[3])
        if held is not None:
            grown[:, :, : held.shape[2]] = held
        return grown
