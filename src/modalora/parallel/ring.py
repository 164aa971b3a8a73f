"""Ring attention: every process keeps its queries, and keys and values go from one to the next until all saw them.

Liu et al., arXiv:2310.01889. What the rounds give is merged by log-sum-exp. Backward, keys and values go round again,
and their gradients with them. A round then knows the log-sum-exp over all keys and delta, the sum of output times its
gradient, so that its softmax is the whole one: with w = exp(lse_round - lse), a round's output has the gradient w g,
and its log-sum-exp w (g out_round - delta). Nothing of a round is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from modalora.nn.attend import attend, merge
from modalora.nn.mask import Mask

Places = Sequence[Sequence[range]]  # tokens at each place of the ring, in their order there


def attend_in_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    places: Places,
    group: dist.ProcessGroup,
    mask: Mask,
    key_bias: Tensor | None,
    pair_bias: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    """Return attention of this process's queries to the keys of all places.

    q, k, v: what this place holds. mask: of the whole sequence, without offsets and blocks. key_bias: (..., tokens) of
    all keys. pair_bias: (1 or batch, heads, time, tokens), rows of this place, columns of all keys.
    """
    call = _Call(places=places, group=group, mask=mask, scale=scale, backend=backend)
    out: Tensor = _Ring.apply(q, k, v, key_bias, pair_bias, call)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What a call needs that has no gradient."""

    places: Places
    group: dist.ProcessGroup
    mask: Mask
    scale: float
    backend: str | None

    def pieces(self, owner: int) -> Iterator[_Piece]:
        """Give the parts of a round, whose keys are those of a place."""
        for queries, query_shift in _shifted(self.places[self.group.rank()]):
            for keys, key_shift in _shifted(self.places[owner]):
                for document in self._documents():
                    own, seen = _common(queries, document), _common(keys, document)
                    if self.mask.causal:
                        seen = _common(seen, range(own.stop))
                    if self.mask.window is not None:
                        seen = _common(seen, range(own.start - self.mask.window + 1, document.stop))
                    if own and seen:
                        yield _Piece(own, seen, query_shift, key_shift)

    def _documents(self) -> Iterator[range]:
        start = 0
        for length in self.mask.spans or (sum(len(own) for place in self.places for own in place),):
            yield range(start, start := start + length)

    def seen(self, piece: _Piece, like: Tensor) -> Mask:
        """Return the mask of a piece."""
        mask, first = self.mask, piece.keys.start
        rows = like.shape[:-3]
        causal = mask.causal and piece.keys.stop > piece.queries.start + 1
        offset = piece.queries.start - first
        lengths = mask.lengths if mask.padded is None else mask.padded
        return Mask(
            causal=causal,
            offsets=torch.full(rows, offset, device=like.device) if offset and (causal or mask.window) else None,
            lengths=None if lengths is None else (lengths - first).clamp(0, len(piece.keys)),
            window=mask.window,
        )

    def run(
        self, piece: _Piece, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, pair_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of the queries and keys of a piece."""
        return attend(
            q, k, v, mask=self.seen(piece, q), key_bias=key_bias, pair_bias=pair_bias, scale=self.scale,
            return_lse=True, backend=self.backend,
        )  # fmt: skip

    def tokens(self, place: int) -> int:
        """Return how many tokens a place holds; places go round."""
        return sum(map(len, self.places[place % len(self.places)]))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring queries and keys of one document. shifts: from a token's number to its place in this process."""

    queries: range
    keys: range
    query_shift: int
    key_shift: int

    def of_queries(self, x: Tensor, dim: int = -3) -> Tensor:
        return x.narrow(dim, self.queries.start + self.query_shift, len(self.queries))

    def of_keys(self, x: Tensor) -> Tensor:
        return x.narrow(-3, self.keys.start + self.key_shift, len(self.keys))

    def of_biases(self, key_bias: Tensor | None, pair_bias: Tensor | None) -> list[Tensor | None]:
        if key_bias is not None:
            key_bias = key_bias.narrow(-1, self.keys.start, len(self.keys))
        if pair_bias is not None:
            pair_bias = self.of_queries(pair_bias, -2).narrow(-1, self.keys.start, len(self.keys))
        return [key_bias, pair_bias]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, pair_bias: Tensor | None, call: _Call
    ) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(q.shape, dtype=exact)
        lse = q.new_full(q.shape[:-1], -torch.inf, dtype=exact)
        for owner, keys, values in _rounds(k, v, call):
            for piece in call.pieces(owner):
                own = (piece.of_queries(out), piece.of_queries(lse, -2))
                biases = piece.of_biases(key_bias, pair_bias)
                found = call.run(piece, piece.of_queries(q), piece.of_keys(keys), piece.of_keys(values), *biases)
                for kept, merged in zip(own, merge(own, found), strict=True):
                    kept.copy_(merged)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, key_bias, pair_bias, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_bias, pair_bias, out, lse = ctx.saved_tensors
        call, given = ctx.call, upstream[0]
        delta = (given.to(lse.dtype) * out).sum(-1)
        to_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        to_key, to_pair = (
            torch.zeros(x.shape, dtype=lse.dtype, device=q.device) if needed else None
            for x, needed in zip((key_bias, pair_bias), ctx.needs_input_grad[3:5], strict=True)
        )
        travelling = torch.zeros((2, *k.shape), dtype=lse.dtype, device=k.device)  # gradients of keys and values
        for owner, keys, values in _rounds(k, v, call):
            for piece in call.pieces(owner):
                sums = [piece.of_queries(to_q), *map(piece.of_keys, travelling), *piece.of_biases(to_key, to_pair)]
                inputs = [piece.of_queries(q), piece.of_keys(keys), piece.of_keys(values)]
                inputs = [
                    x if x is None else x.detach().requires_grad_(total is not None)
                    for x, total in zip((*inputs, *piece.of_biases(key_bias, pair_bias)), sums, strict=True)
                ]
                with torch.enable_grad():
                    own, own_lse = call.run(piece, *inputs)
                gradient = piece.of_queries(given).to(lse.dtype)
                share = (own_lse.detach() - piece.of_queries(lse, -2)).exp()
                share = share.masked_fill(own_lse.detach() == -torch.inf, 0.0)  # it saw nothing, here or anywhere
                to_lse = share * ((gradient * own.detach()).sum(-1) - piece.of_queries(delta, -2))
                wanted = [x for x in inputs if x is not None and x.requires_grad]
                found = torch.autograd.grad(
                    (own, own_lse), wanted, ((share[..., None] * gradient).to(own.dtype), to_lse)
                )
                for total, change in zip((x for x in sums if x is not None), found, strict=True):
                    total += change
            travelling = _pass_on(
                travelling, call.tokens(owner - 1), call.group
            )()  # at last to where the keys came from
        biases = (to if to is None else to.to(x.dtype) for to, x in ((to_key, key_bias), (to_pair, pair_bias)))
        return to_q.to(q.dtype), *travelling.to(k.dtype), *biases, None


def _rounds(k: Tensor, v: Tensor, call: _Call) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Give the keys and values of every place, one's own first; the next travel while a round is computed."""
    held, rank, count = torch.stack((k, v)), call.group.rank(), call.group.size()
    for owner in (place % count for place in range(rank, rank - count, -1)):
        is_last = owner == (rank + 1) % count
        arrived = None if is_last else _pass_on(held, call.tokens(owner - 1), call.group)
        yield owner, held[0], held[1]
        if arrived is not None:
            held = arrived()


def _pass_on(x: Tensor, tokens: int, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Send a tensor, (..., time, heads, head_dim), to the next place; return what waits for that of the one before."""
    rank, count = group.rank(), group.size()
    coming = x.new_empty((*x.shape[:-3], tokens, *x.shape[-2:]))
    sending = dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % count)
    receiving = dist.P2POp(dist.irecv, coming, group=group, group_peer=(rank - 1) % count)
    pending = dist.batch_isend_irecv([sending, receiving])

    def arrived() -> Tensor:
        for one in pending:
            one.wait()
        return coming

    return arrived


def _shifted(ranges: Sequence[range]) -> Iterator[tuple[range, int]]:
    """Give each range of tokens with what leads from a token's number to its place."""
    at = 0
    for own in ranges:
        yield own, at - own.start
        at += len(own)


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
