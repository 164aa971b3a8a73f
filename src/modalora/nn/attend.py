"""The one attention function, over interchangeable backends.

q is (batch, time, heads, head_dim); k and v are (batch, keys, kv_heads, head_dim) with heads a multiple of kv_heads:
query head h reads key head h // (heads / kv_heads). `pair_bias`, (1 or batch, heads, time, keys), is added to the
logits. A query that sees no key gets zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from modalora.errors import ConfigError, ShapeError
from modalora.nn.mask import Mask

Run = Callable[[Tensor, Tensor, Tensor, Mask, Tensor | None, float], Tensor]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    pair_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return softmax(q k' * scale + pair_bias) v, (batch, time, heads, head_dim).

    scale: None means head_dim ** -0.5. backend: a name of BACKENDS; None takes the fastest that can do the call.
    Raises ShapeError when heads do not divide, ConfigError when the named backend is unknown.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ShapeError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask.spans is not None:
        return _end_to_end(q, k, v, mask, scale, backend)
    name = choose(q, k) if backend is None else backend
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; known are {', '.join(BACKENDS)}")
    run = BACKENDS[name].run
    if mask.padded is not None:
        if q.dtype == torch.float32 and q.device.type == "cpu":
            return _row_by_row(run, q, k, v, mask, pair_bias, scale)
        # no real query of a causal row sees its padding: then there is nothing to mask
        mask = replace(mask, padded=None, lengths=None if mask.causal else mask.padded)
    return run(q, k, v, mask, pair_bias, scale)


def _end_to_end(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, backend: str | None) -> Tensor:
    """Compute each row of a sequence of rows alone: what a block-diagonal mask would tell, without its pairs."""
    assert mask.spans is not None
    alone = replace(mask, spans=None)
    rows = zip(*(x.split(mask.spans, dim=1) for x in (q, k, v)), strict=True)
    found = [attend(*row, mask=alone, scale=scale, backend=backend) for row in rows]
    return torch.cat(found, dim=1)


def _row_by_row(
    run: Run, q: Tensor, k: Tensor, v: Tensor, mask: Mask, pair_bias: Tensor | None, scale: float
) -> Tensor:
    """Compute each row of a padded batch at its own length.

    On a CPU every other operation of a network gives a row the same float32 bits in a batch as alone; sums over padded
    keys do not.
    """
    assert mask.padded is not None
    rows = []
    for row, length in enumerate(mask.padded.tolist()):
        bias = None if pair_bias is None else pair_bias[row % len(pair_bias), None, :, :length, :length]
        own_q, own_k, own_v = (x[row : row + 1, :length] for x in (q, k, v))
        out = run(own_q, own_k, own_v, replace(mask, padded=None), bias, scale)
        rows.append(functional.pad(out, (0, 0, 0, 0, 0, q.shape[1] - length)))
    return torch.cat(rows)


def choose(q: Tensor, k: Tensor) -> str:
    """Return the backend for a call that names none.

    On a CPU the fused kernel is slow in bf16. Forward, 2,048 tokens of 24 heads of 128 take it 357 ms, and 105 in
    tiles of plain matrix products; with the gradient 909 and 434. What is one tile at most is taken by `eager`: with
    the gradient, 20 crops of 144 patches and 5 heads of 32 take it 10 ms, and 17 in tiles.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return "sdpa"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "eager" if q.shape[1] * (q.shape[2] // k.shape[2]) <= TILE else "tiled"
    return "eager" if q.shape[1] <= FEW else "tiled"


FEW = 16  # queries, of a decoding step; tiles would be smaller than what it takes to start them
TILE = 768  # queries of the heads that share a key head: the logits of a tile stay in the cache of a core
KEYS = 1024  # of them; more key heads go together where there are fewer


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask, pair_bias: Tensor | None, scale: float) -> Tensor:
    (batch, time, heads, _), kv_heads = q.shape, k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # the query heads of one key head are rows of one product: keys and values are not repeated
    logits = (q * scale).reshape(batch, kv_heads, -1, q.shape[-1]) @ k.transpose(-1, -2)
    logits = logits.view(batch, heads, time, -1)
    if pair_bias is not None:
        logits = logits + pair_bias
    seen = mask.dense(time, k.shape[2], q.device, heads)
    if seen is not None:
        logits = logits.masked_fill_(~seen, -torch.inf)
    weights = torch.softmax(logits, dim=-1)  # sums in float32 whatever the dtype
    if seen is not None and mask.lengths is not None:  # a row may see nothing: -inf throughout is NaN after softmax
        weights = weights.masked_fill(~seen, 0.0)
    out = weights.to(q.dtype).view(batch, kv_heads, -1, k.shape[2]) @ v
    return out.view(batch, heads, time, -1).transpose(1, 2)


def _tiled(q: Tensor, k: Tensor, v: Tensor, mask: Mask, pair_bias: Tensor | None, scale: float) -> Tensor:
    """Compute a tile of queries of one key head at a time, over the keys that it may see.

    A backward pass computes the weights again, tile by tile: queries, keys and values are all that is kept.
    """
    if pair_bias is not None and pair_bias.requires_grad and torch.is_grad_enabled():
        return _eager(q, k, v, mask, pair_bias, scale)  # a trained bias needs all logits anyway
    out: Tensor = _Tiled.apply(q, k, v, mask, pair_bias, scale)  # type: ignore[no-untyped-call]
    return out


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, pair_bias: Tensor | None, scale: float
    ) -> Tensor:
        q, k, v = ((q * scale).transpose(1, 2).contiguous(), *(x.transpose(1, 2).contiguous() for x in (k, v)))
        out = torch.zeros_like(q)
        for row, groups, heads, tiles in _heads(q, k, mask):
            keys, values = k[row, groups], v[row, groups]
            for tile in tiles:
                own = q[row, heads, tile.queries]
                weights = _weights(own, keys[:, tile.keys], tile, heads, row, mask, pair_bias)
                out[row, heads, tile.queries] = torch.bmm(weights, values[:, tile.keys]).view(own.shape)
        ctx.save_for_backward(q, k, v, pair_bias)
        ctx.call = mask, scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pair_bias = ctx.saved_tensors
        mask, scale = ctx.call
        upstream = given[0].transpose(1, 2)
        exact = torch.promote_types(q.dtype, torch.float32)
        to_q, to_k, to_v = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        for row, groups, heads, tiles in _heads(q, k, mask):
            keys, values = k[row, groups], v[row, groups]
            sums = torch.zeros((2, *keys.shape), dtype=exact, device=q.device)  # of tiles, for keys and values
            for tile in tiles:
                own = q[row, heads, tile.queries]
                weights = _weights(own, keys[:, tile.keys], tile, heads, row, mask, pair_bias)
                change = upstream[row, heads, tile.queries].reshape(len(keys), -1, own.shape[-1])
                sums[1, :, tile.keys] += torch.bmm(weights.transpose(1, 2), change)
                change = torch.bmm(change, values[:, tile.keys].transpose(1, 2))
                change = torch.ops.aten._softmax_backward_data(change, weights, -1, weights.dtype)
                sums[0, :, tile.keys] += torch.bmm(change.transpose(1, 2), own.reshape(len(keys), -1, own.shape[-1]))
                to_q[row, heads, tile.queries] = torch.bmm(change, keys[:, tile.keys]).mul_(scale).view(own.shape)
            to_k[row, groups], to_v[row, groups] = sums[0], sums[1]
        return to_q.transpose(1, 2), to_k.transpose(1, 2), to_v.transpose(1, 2), None, None, None


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some queries, the keys that they see, and the visible pairs, (1, 1 or heads, queries, keys); None: all."""

    queries: slice
    keys: slice
    pairs: Tensor | None


def _heads(q: Tensor, k: Tensor, mask: Mask) -> Iterator[tuple[int, slice, slice, list[_Tile]]]:
    """Give each row, some key heads, their query heads, and their tiles. Key heads of small tiles go together."""
    (batch, heads, time, _), (_, groups, keys, _) = q.shape, k.shape
    share = heads // groups
    length = max(1, TILE // share)
    together = max(1, TILE * KEYS // (share * min(length, time) * keys))
    for row in range(batch):
        tiles = []
        for start in range(0, time, length):
            stop = min(start + length, time)
            first, last, pairs = mask.tile(row, start, stop, keys, heads)
            if last > first:
                tiles.append(_Tile(slice(start, stop), slice(first, last), pairs))
        for group in range(0, groups, together):
            stop = min(group + together, groups)
            yield row, slice(group, stop), slice(group * share, stop * share), tiles


def _weights(
    q: Tensor, keys: Tensor, tile: _Tile, heads: slice, row: int, mask: Mask, pair_bias: Tensor | None
) -> Tensor:
    """Return the softmax of one tile, (key heads, share x queries, keys), for q (heads, queries, head_dim)."""
    logits = torch.bmm(q.reshape(len(keys), -1, q.shape[-1]), keys.transpose(1, 2))
    pairs = logits.view(*q.shape[:2], -1)
    if pair_bias is not None:
        pairs += pair_bias[row % len(pair_bias), heads, tile.queries, tile.keys]
    if tile.pairs is None:
        return torch.softmax(logits, dim=-1)
    unseen = ~(tile.pairs[0] if tile.pairs.shape[1] == 1 else tile.pairs[0, heads])
    weights = torch.softmax(pairs.masked_fill_(unseen, -torch.inf), dim=-1)
    if mask.blocks is not None:  # a block-sparse query may see nothing
        weights.masked_fill_(unseen, 0.0)
    return weights.view(logits.shape)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, pair_bias: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) if repeat > 1 else x for x in (k, v))
    if mask.is_plain_causal and pair_bias is None and q.shape[2] == k.shape[2]:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2)
    seen = mask.dense(q.shape[2], k.shape[2], q.device, q.shape[1])
    bias = seen
    if pair_bias is not None:
        bias = pair_bias.to(q.dtype)
        if seen is not None:
            bias = bias.masked_fill(~seen, -torch.inf)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to compute attention and what it can do."""

    run: Run
    float64_reference: bool


BACKENDS = {
    "eager": Backend(run=_eager, float64_reference=True),
    "sdpa": Backend(run=_sdpa, float64_reference=False),
    "tiled": Backend(run=_tiled, float64_reference=True),
}
