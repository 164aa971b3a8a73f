"""What a query may see, told by structure instead of a length-squared tensor.

Positions count from 0 in each row. The rules that a mask names hold together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSparse:
    """Which blocks of keys a block of queries sees, another set for each head (Phi-3-small, arXiv:2404.14219, 2).

    The last `local` blocks, and of the older ones every stride-th: head h sees key block k where k + h * step + 1 is a
    multiple of stride. So any `stride` heads in a row see every block together.
    """

    block: int = 64  # tokens
    local: int = 16  # blocks
    stride: int = 8  # blocks

    def seen(self, queries: Tensor, keys: Tensor, heads: int) -> Tensor:
        """Return which keys are seen, (batch, heads, queries, keys), for positions (batch, queries) and (keys,)."""
        step = max(1, self.stride // heads)
        at, back = keys // self.block, queries[..., None] // self.block - keys // self.block
        head = torch.arange(heads, device=keys.device)[:, None] * step
        remote = (at + head + 1) % self.stride == 0
        return (back < self.local)[:, None] | remote[None, :, None]


@dataclass(frozen=True, slots=True)
class Mask:
    """Structure of one attention call.

    causal: query at position p sees keys at positions up to p.
    offsets: (batch,) position of each row's first query; None: 0, as in a call without a cache.
    lengths: (batch,) keys that are real; None: all.
    padded: (batch,) where each row ends, its queries and keys alike; what comes out behind means nothing.
    spans: tokens of each row where rows lie end to end in one sequence, queries and keys alike; none sees another row.
    window: keys that a query sees, itself counted; None: all.
    blocks: the blocks of keys that each head sees; None: all.
    """

    causal: bool = False
    offsets: Tensor | None = None
    lengths: Tensor | None = None
    padded: Tensor | None = None
    spans: tuple[int, ...] | None = None
    window: int | None = None
    blocks: BlockSparse | None = None

    @property
    def is_plain_causal(self) -> bool:
        """Whether nothing but causality restricts a call that has as many queries as keys."""
        others = (self.offsets, self.lengths, self.padded, self.spans, self.window, self.blocks)
        return self.causal and all(one is None for one in others)

    @property
    def sees_all(self) -> bool:
        """Whether every query sees every key, so that there is no `dense`."""
        return not self.causal and all(one is None for one in (self.lengths, self.window, self.blocks))

    def dense(self, queries: int, keys: int, device: torch.device, heads: int = 1) -> Tensor | None:
        """Return the visible pairs as bool, (batch or 1, 1 or heads, queries, keys), or None when every pair is."""
        position = torch.arange(queries, device=device)[None]
        if self.offsets is not None:
            position = position + self.offsets[:, None]
        return self._seen(position, torch.arange(keys, device=device), heads)

    def tile(self, row: int, start: int, stop: int, keys: int) -> tuple[int, int, int]:
        """Return which keys the queries start .. stop of a row may see: the first, from where on not every query sees
        every key, and the last + 1."""
        offset = 0 if self.offsets is None else int(self.offsets[row])
        last = keys if self.lengths is None else min(keys, int(self.lengths[row]))
        first, common = 0, last
        if self.causal:
            last = min(last, offset + stop)
            common = min(last, offset + start + 1)
        if self.window is not None:
            first = max(0, offset + start - self.window + 1)
            if first < offset + stop - self.window:
                common = first
        if self.blocks is not None:
            common = first
        return first, max(first, common), max(first, last)

    def pairs(self, row: int, queries: slice, keys: slice, heads: int, device: torch.device) -> Tensor | None:
        """Return the visible pairs of some queries and keys of a row as bool, (1, 1 or heads, queries, keys)."""
        offset = 0 if self.offsets is None else int(self.offsets[row])
        position = torch.arange(offset + queries.start, offset + queries.stop, device=device)
        at = torch.arange(keys.start, keys.stop, device=device)
        return Mask(causal=self.causal, window=self.window, blocks=self.blocks)._seen(position[None], at, heads)

    def _seen(self, position: Tensor, at: Tensor, heads: int) -> Tensor | None:
        seen: Tensor | None = None
        if self.causal:
            seen = at[None, None] <= position[..., None]
        if self.window is not None:
            near = at[None, None] > position[..., None] - self.window
            seen = near if seen is None else seen & near
        if self.lengths is not None:
            real = (at < self.lengths[:, None])[:, None]
            seen = real if seen is None else seen & real
        seen = None if seen is None else seen[:, None]
        if self.blocks is not None:
            own = self.blocks.seen(position, at, heads)
            seen = own if seen is None else seen & own
        return seen
