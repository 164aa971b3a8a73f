"""Attention of rows so short that the weights of all pairs are kept for the backward pass: one node of the graph.

In a training of short rows most of attention's time goes into starting operations and walking over logits. Here the
mask is what the product of queries and keys is added to, and their scale is part of that product. So a hidden pair
weighs nothing as long as its logit is finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modalora.nn.call import Call, softmax_backward


def suits(call: Call) -> bool:
    """Tell whether nothing but causality hides keys, nothing is added to logits, and the output alone is wanted.

    Not of one query: keys and values of a cache would be laid out anew for it.
    """
    is_known = call.mask.sees_all or (call.mask.is_plain_causal and call.q.shape[1] == call.k.shape[1])
    return is_known and call.q.shape[1] > 1 and call.key_bias is None and call.pair_bias is None and not call.wants_lse


def run(call: Call) -> Tensor:
    """Return the output, (rows, time, heads, head_dim)."""
    out: Tensor = _Short.apply(call.q, call.k, call.v, call.mask.causal, call.scale)  # type: ignore[no-untyped-call]
    return out


class _Short(torch.autograd.Function):
    """The query heads of one key head are rows of one product: keys and values are not repeated."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        time, heads, keys, kv_heads = *q.shape[1:3], *k.shape[1:3]
        q, k, v = (_by_key_head(x, kv_heads) for x in (q, k, v))
        unseen = q.new_zeros(())
        if causal:
            unseen = q.new_full((time, keys), -torch.inf).triu_(1).repeat(heads // kv_heads, 1)
        weights = torch.softmax(torch.baddbmm(unseen, q, k.transpose(1, 2), beta=int(causal), alpha=scale), -1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.call = heads, kv_heads, scale
        return _by_token(torch.bmm(weights, v), heads, kv_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        heads, kv_heads, scale = ctx.call
        given = _by_key_head(upstream[0], kv_heads)
        to_v = torch.bmm(weights.transpose(1, 2), given)
        change = torch.bmm(given, v.transpose(1, 2))
        softmax_backward(change, weights)
        to_q, to_k = torch.bmm(change, k).mul_(scale), torch.bmm(change.transpose(1, 2), q).mul_(scale)
        of_keys = (_by_token(x, kv_heads, kv_heads) for x in (to_k, to_v))
        return _by_token(to_q, heads, kv_heads), *of_keys, None, None


def _by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """Return (rows x kv_heads, heads of each x time, head_dim) of (rows, time, heads, head_dim)."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(len(x) * kv_heads, -1, x.shape[-1])


def _by_token(x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Return (rows, time, heads, head_dim) of (rows x kv_heads, heads of each x time, head_dim)."""
    shape = (len(x) // kv_heads, kv_heads, heads // kv_heads, -1, x.shape[-1])
    return x.view(shape).permute(0, 3, 1, 2, 4).flatten(2, 3)
