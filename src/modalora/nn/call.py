"""One attention call, its leading axes laid flat: what backends of `attend` are given, and what two of them share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modalora.nn.mask import Mask

Found = tuple[Tensor, Tensor | None]  # (rows, time, heads, head_dim), and the log-sum-exp (rows, time, heads) if wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """softmax(q k' * scale + key_bias + pair_bias) v.

    q: (rows, time, heads, head_dim); k, v: (rows, keys, kv_heads, head_dim), heads a multiple of kv_heads.
    key_bias: (rows, keys). pair_bias: (pairs, heads, time, keys) with rows a multiple of pairs; row r reads
    pair r // share, so that rows share a pair bias without a copy of it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    key_bias: Tensor | None
    pair_bias: Tensor | None
    scale: float
    wants_lse: bool

    @property
    def share(self) -> int:
        """How many rows read one pair bias."""
        return len(self.q) // (1 if self.pair_bias is None else len(self.pair_bias))

    @property
    def group(self) -> int:
        """How many query heads read one key head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def is_trained(self) -> bool:
        """Whether a gradient will be asked for."""
        given = (self.q, self.k, self.v, self.key_bias, self.pair_bias)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def softmax_backward(change: Tensor, weights: Tensor) -> None:
    """Make the gradient of softmax's output, along the last axis, that of its input; weights: the output."""
    # in place: a row is summed before it is written
    torch.ops.aten._softmax_backward_data.out(change, weights, -1, weights.dtype, grad_input=change)
