"""What a query may see, told by structure instead of a length-squared tensor.

Positions count from 0 in each row. The rules that a mask names hold together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mask:
    """Structure of one attention call.

    causal: query at position p sees keys at positions up to p.
    offsets: (batch,) position of each row's first query; None: 0, as in a call without a cache.
    lengths: (batch,) keys that are real; None: all.
    padded: (batch,) where each row ends, its queries and keys alike; what comes out behind means nothing.
    """

    causal: bool = False
    offsets: Tensor | None = None
    lengths: Tensor | None = None
    padded: Tensor | None = None

    def dense(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Return the visible pairs as bool, (batch or 1, 1, queries, keys), or None when every pair is."""
        seen: Tensor | None = None
        at = torch.arange(keys, device=device)
        if self.causal:
            position = torch.arange(queries, device=device)[None]
            if self.offsets is not None:
                position = position + self.offsets[:, None]
            seen = at[None, None] <= position[..., None]
        if self.lengths is not None:
            real = (at < self.lengths[:, None])[:, None]
            seen = real if seen is None else seen & real
        return None if seen is None else seen[:, None]
