"""Attention in tiles of logits that stay in the cache of a core; memory grows with time + keys, not with their product.

Forward, a tile is some queries of some heads, over the keys that they may see. Backward, its weights are computed
again: queries, keys, values and biases are all that is kept. Sums over tiles and rows run in float32 or better, in one
order, so that two runs have the same bits. Mathematics: FlashAttention, arXiv:2205.14135, B.4, with whole rows of keys
in a tile, where a plain softmax does and nothing is rescaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modalora.errors import ConfigError
from modalora.nn.call import Call, Found, softmax_backward
from modalora.nn.mask import Mask
from modalora.nn.shown import pieces

TILE = 576  # queries of the heads that share a key head: the logits of a tile stay in the cache of a core
BYTES = 3 * 2**19  # of logits in a tile; more key heads and rows go together where there are fewer
MOST = 4 * BYTES  # of logits of one key head in a tile; many keys leave fewer queries, and no fewer than
FEWEST = 16


def run(call: Call) -> Found:
    """Return what `attend` returns, in memory linear in the length, forward and backward."""
    tensors = (call.q, call.k, call.v, call.key_bias, call.pair_bias)
    out, lse = _Blockwise.apply(*tensors, call.mask, call.scale, call.wants_lse)  # type: ignore[no-untyped-call]
    return out, lse


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None,
        pair_bias: Tensor | None,
        mask: Mask,
        scale: float,
        wants_lse: bool,
    ) -> Found:
        out = q.new_zeros(q.shape)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=_exact(q)) if wants_lse else None
        for part in pieces(q, _parts(q, k, pair_bias, mask), _Part.work):
            keys, values = part.of_keys(k), part.of_keys(v)
            for tile in pieces(q, part.tiles, _Tile.pairs):
                logits = _logits(part.of_queries(q, tile) * scale, keys, part, tile, mask, key_bias, pair_bias)
                weights = _softmax(logits, key_bias is not None or pair_bias is not None or not tile.is_whole)
                found = torch.bmm(weights, values[:, tile.keys])
                out[part.rows, tile.queries, part.heads] = part.by_head(found, tile).transpose(1, 2)
                if lse is not None:
                    top = part.by_head(logits.to(lse.dtype), tile).logsumexp(-1)
                    lse[part.rows, tile.queries, part.heads] = top.transpose(1, 2)
                del logits, weights  # before the next tile's
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Found) -> None:  # apart, for torch.func.grad
        ctx.save_for_backward(*inputs[:5])
        ctx.call = inputs[5:7]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        to_out, to_lse = upstream
        assert to_out is not None  # autograd gives zeros for what nobody used
        with torch.no_grad():
            found = _Blockwise._gradients(ctx, to_out, to_lse)
        if torch.is_grad_enabled():  # torch's once_differentiable lets gradients that are used again count as constants
            found = [x if x is None else _Once.apply(x, *ctx.saved_tensors) for x in found]  # type: ignore[no-untyped-call]
        return *found, None, None, None

    @staticmethod
    def _gradients(ctx: Any, to_out: Tensor, to_lse: Tensor | None) -> list[Tensor | None]:
        q, k, v, key_bias, pair_bias = ctx.saved_tensors
        mask, scale = ctx.call
        exact, (wants_key, wants_pair) = _exact(q), ctx.needs_input_grad[3:5]
        to_q, to_k, to_v = q.new_zeros(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        to_key = key_bias.new_zeros(key_bias.shape, dtype=exact) if wants_key else None
        to_pair = pair_bias.new_zeros(pair_bias.shape, dtype=exact) if wants_pair else None
        for part in pieces(q, _parts(q, k, pair_bias, mask), _Part.work):
            keys, values = part.of_keys(k), part.of_keys(v)
            sums = keys.new_zeros((2, *keys.shape), dtype=exact)  # of tiles, for keys and values
            for tile in pieces(q, part.tiles, _Tile.pairs):
                own = part.of_queries(q, tile) * scale
                logits = _logits(own, keys, part, tile, mask, key_bias, pair_bias)
                weights = _softmax(logits, key_bias is not None or pair_bias is not None or not tile.is_whole)
                del logits
                given = part.of_queries(to_out, tile)
                sums[1, :, tile.keys] += torch.bmm(weights.transpose(1, 2), given)
                change = torch.bmm(given, values[:, tile.keys].transpose(1, 2))
                softmax_backward(change, weights)
                if to_lse is not None:
                    change += weights * part.of_queries(to_lse[..., None], tile).to(weights.dtype)
                sums[0, :, tile.keys] += torch.bmm(change.transpose(1, 2), own)
                found = torch.bmm(change, keys[:, tile.keys]).mul_(scale)
                to_q[part.rows, tile.queries, part.heads] = part.by_head(found, tile).transpose(1, 2)
                if to_key is not None:
                    to_key[part.rows, tile.keys] += part.by_head(change, tile).sum((1, 2), dtype=exact)
                if to_pair is not None:
                    found = part.by_head(change, tile)
                    found = found[0] if len(found) == 1 else found.sum(0, dtype=exact)
                    to_pair[part.pair, part.heads, tile.queries, tile.keys] += found
                del weights, change, found
            for all_of, found in ((to_k, sums[0]), (to_v, sums[1])):
                all_of[part.rows, :, part.groups] = found.unflatten(0, (part.count, -1)).transpose(1, 2)
        biases = (None if to is None else to.to(like.dtype) for to, like in ((to_key, key_bias), (to_pair, pair_bias)))
        return [to_q, to_k, to_v, *biases]


class _Once(torch.autograd.Function):
    """Hands on a gradient that depends on what follows, and refuses that gradient's own."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        raise ConfigError(
            "a gradient of attention in tiles was differentiated again, and attend is differentiable once; ask for "
            "first derivatives alone"
        )


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some queries, the keys that they see, and those among the last of these that not every query sees."""

    queries: slice
    keys: slice
    partial: slice

    @property
    def is_whole(self) -> bool:
        return self.partial.start == self.partial.stop

    def pairs(self) -> int:
        """Logits of one head."""
        return int((self.queries.stop - self.queries.start) * (self.keys.stop - self.keys.start))


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of one pair bias, some key heads, the query heads that read them, and the tiles of these."""

    rows: slice
    pair: int
    groups: slice
    heads: slice
    of: int  # heads in all
    tiles: list[_Tile]

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start

    def work(self) -> int:
        """Logits of the part."""
        return self.count * (self.heads.stop - self.heads.start) * sum(tile.pairs() for tile in self.tiles)

    def of_keys(self, x: Tensor) -> Tensor:
        """Return (rows x key heads, keys, head_dim) of (rows, keys, kv_heads, head_dim)."""
        return x[self.rows, :, self.groups].transpose(1, 2).flatten(0, 1).contiguous()

    def of_queries(self, x: Tensor, tile: _Tile) -> Tensor:
        """Return (rows x key heads, group x queries, head_dim) of (rows, time, heads, head_dim)."""
        own = x[self.rows, tile.queries, self.heads].transpose(1, 2)
        return own.reshape(self.count * (self.groups.stop - self.groups.start), -1, x.shape[-1])

    def by_head(self, x: Tensor, tile: _Tile) -> Tensor:
        """Return (rows, heads, queries, any) of (rows x key heads, group x queries, any)."""
        return x.view(self.count, self.heads.stop - self.heads.start, tile.queries.stop - tile.queries.start, -1)


def _parts(q: Tensor, k: Tensor, pair_bias: Tensor | None, mask: Mask) -> Iterator[_Part]:
    """Give the work in parts whose tiles have about BYTES of logits: the small ones of several heads and rows."""
    (rows, time, heads, _), (_, keys, groups, _) = q.shape, k.shape
    pairs = 1 if pair_bias is None else len(pair_bias)
    share, group = rows // pairs, heads // groups
    line = q.element_size() * group * max(1, keys)  # bytes of a query's logits
    length = max(1, min(TILE // group, max(FEWEST, MOST // line)))
    together = max(1, BYTES // (line * min(length, time)))
    # rows that see different keys are not computed together
    at_once = max(1, together // groups) if mask.offsets is None and mask.lengths is None else 1
    for start in range(0, rows, share):
        for row in range(start, start + share, at_once):
            tiles = _tiles(mask, row, length, q, keys)
            for first in range(0, groups, together):
                last = min(first + together, groups)
                own = slice(row, min(row + at_once, start + share))
                yield _Part(own, start // share, slice(first, last), slice(first * group, last * group), heads, tiles)


def _tiles(mask: Mask, row: int, length: int, q: Tensor, keys: int) -> list[_Tile]:
    tiles, time = [], q.shape[1]
    for start in range(0, time, length):
        stop = min(start + length, time)
        first, common, last = mask.tile(row, start, stop, keys)
        if last > first:
            tiles.append(_Tile(slice(start, stop), slice(first, last), slice(common, last)))
    return tiles


def _logits(
    q: Tensor, keys: Tensor, part: _Part, tile: _Tile, mask: Mask, key_bias: Tensor | None, pair_bias: Tensor | None
) -> Tensor:
    """Return the logits of one tile, (rows x key heads, group x queries, keys)."""
    logits = torch.bmm(q, keys[:, tile.keys].transpose(1, 2))
    pairs = part.by_head(logits, tile)
    if pair_bias is not None:
        pairs += pair_bias[part.pair, part.heads, tile.queries, tile.keys]
    if key_bias is not None:
        pairs += key_bias[part.rows, None, None, tile.keys]
    if not tile.is_whole:
        # made where it is used: the pairs of all tiles together would grow with the square of the length
        seen = mask.pairs(part.rows.start, tile.queries, tile.partial, part.of, q.device)
        assert seen is not None
        partial = pairs[..., tile.partial.start - tile.keys.start :]
        partial.masked_fill_(~(seen if seen.shape[1] == 1 else seen[:, part.heads]), -torch.inf)
    return logits


def _softmax(logits: Tensor, may_be_dead: bool) -> Tensor:
    """Return the weights; zeros for a query that sees no key, whether a mask or a bias of -inf hides them."""
    weights = torch.softmax(logits, dim=-1)
    if may_be_dead and not is_clean(weights):
        weights.masked_fill_(logits.amax(-1, keepdim=True) == -torch.inf, 0.0)
    return weights


def may_be_dead(call: Call) -> bool:
    """Tell whether some query may see no key at all."""
    mask = call.mask
    rules = (mask.offsets, mask.lengths, mask.window, mask.blocks, call.key_bias, call.pair_bias)
    return any(rule is not None for rule in rules)


def is_clean(weights: Tensor) -> bool:
    """Tell whether no query's softmax is NaN, as it is where it sees nothing; where asking would cost time, no."""
    if weights.device.type != "cpu" or type(weights) is not Tensor or torch.compiler.is_compiling():
        return False  # a fake tensor, of a plan or a compiler, has no numbers to ask for
    return not bool(weights[..., 0].isnan().any())
