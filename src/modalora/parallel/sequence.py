"""Sequence parallelism: processes share the tokens of a sequence, and with them every activation of a layer.

Outside attention a layer goes token by token, so a process computes its own. For attention there are two ways, and
their product (USP, arXiv:2405.07719). Ulysses (arXiv:2309.14509): an all-to-all gives each process all tokens of some
heads, and another one its own tokens back. Ring (arXiv:2310.01889): queries stay, keys and values travel (ring.py).

x is (..., time, heads, head_dim), as in nn/attend.py. Each process adds up its own part of a loss: gradients of what
all hold are parts as well, whose sum over processes is that of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from modalora.errors import ConfigError, ShapeError
from modalora.models.decoder import Attention
from modalora.models.multimodal import Multimodal
from modalora.nn.attend import attend
from modalora.nn.mask import Mask
from modalora.parallel.ring import attend_in_ring


def split_tokens(model: Multimodal, ring: DeviceMesh, heads: DeviceMesh) -> Cut:
    """Let the processes of two mesh dimensions, ring x heads, share the tokens of each micro-batch, in place.

    A ring of one is Ulysses. Comes after tensor parallelism: its processes share the heads that one has of that.
    Returns the cut that the model has then. Raises ConfigError when the heads do not fit.
    """
    config = model.config.decoder
    if config.phi3_small is not None:
        raise ConfigError("mesh.sequence: Phi-3-small's heads attend in patterns of their own; use mesh.shard alone")
    own = model.decoder.layers[0].get_submodule("self_attn")
    assert isinstance(own, Attention)
    if reason := _misfit(own.heads, own.kv_heads, heads.size()):
        raise ConfigError(
            f"mesh.sequence / mesh.ring = {heads.size()}: {reason}; raise mesh.ring, whose processes share no heads"
        )
    cut = Cut(ring=ring.get_group(), heads=heads.get_group())
    model.cut = cut
    return cut


@dataclass(frozen=True)
class Cut:
    """How processes share the tokens of a sequence: a ring of groups, in each of which heads are shared.

    With a ring of R, the sequence is cut into 2 R chunks, of which place i has chunk i and chunk 2 R - 1 - i: so each
    has as many visible pairs under a causal mask. The tokens of a place are cut over its group.
    """

    ring: dist.ProcessGroup
    heads: dist.ProcessGroup

    @property
    def pieces(self) -> int:
        """Runs of neighbouring tokens that a sequence is cut into at most."""
        ring = self.ring.size()
        return self.heads.size() * (2 * ring if ring > 1 else 1)

    def held(self, tokens: int) -> tuple[range, ...]:
        """Return which of so many tokens this process holds, in their order here."""
        own = held_in_ring(tokens, self.ring.size())[self.ring.rank()]
        sizes, rank = shares(sum(map(len, own)), self.heads.size()), self.heads.rank()
        return _part(own, sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask,
        tokens: int | None = None,
        key_bias: Tensor | None = None,
        pair_bias: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Return what `nn.attend.attend` gives for the whole sequence, of this process's queries.

        q, k, v, key_bias: what this process holds of them. pair_bias: the rows of its queries, with the columns of all
        keys, in order. mask: of the whole sequence. tokens: its length; None: mask.spans tells.
        Raises ShapeError when heads or tokens do not fit, ConfigError for masks that cannot be cut.
        """
        if mask.offsets is not None or mask.blocks is not None:
            raise ConfigError("processes that share tokens take no cache and no block-sparse mask")
        if tokens is None:
            if mask.spans is None:
                raise ShapeError("attention over shared tokens needs the length of the sequence: give tokens=")
            tokens = sum(mask.spans)
        count, heads = self.heads.size(), q.shape[-2]
        places = held_in_ring(tokens, self.ring.size())
        whole = sum(map(len, places[self.ring.rank()]))  # tokens of this group
        time = shares(whole, count)
        if q.shape[-3] != time[self.heads.rank()] or k.shape[-3] != q.shape[-3]:
            raise ShapeError(
                f"this process holds {time[self.heads.rank()]} of {tokens} tokens; q has {q.shape[-3]}, k {k.shape[-3]}"
            )
        if reason := _misfit(heads, k.shape[-2], count):
            raise ShapeError(f"{count} processes share heads: {reason}")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        if count > 1:
            order, kept = _by_process(heads, k.shape[-2], count)
            packed = torch.cat((q, k, v), -2).index_select(-2, torch.tensor(order, device=q.device))
            packed = reshard(packed, -3, -2, sizes=time, group=self.heads)
            q, k, v = packed.split((heads // count, kept, kept), -2)
            if pair_bias is not None:
                pair_bias = reshard(pair_bias, -2, -3, sizes=time, group=self.heads)
            if key_bias is not None:
                key_bias = gather(key_bias, -1, sizes=time, group=self.heads)
        if len(places) == 1:
            out = attend(q, k, v, mask=mask, key_bias=key_bias, pair_bias=pair_bias, scale=scale, backend=backend)
        else:
            if key_bias is not None:
                sizes = [sum(map(len, own)) for own in places]
                back = torch.tensor([token for own in places for piece in own for token in piece]).argsort()
                key_bias = gather(key_bias, -1, sizes=sizes, group=self.ring)[..., back.to(q.device)]
            out = attend_in_ring(
                q, k, v, places=places, group=self.ring, mask=mask, key_bias=key_bias, pair_bias=pair_bias,
                scale=scale, backend=backend,
            )  # fmt: skip
        if count == 1:
            return out
        return reshard(out, -2, -3, sizes=[heads // count] * count, group=self.heads)


def reshard(x: Tensor, from_dim: int, to_dim: int, *, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Return a tensor that processes hold cut along from_dim, cut along to_dim instead: one all-to-all, differentiable.

    x: this process's piece, whole along to_dim. sizes: of every process's piece along from_dim. The pieces along to_dim
    are `shares` of its length. So rows become columns, or tokens become heads.
    Raises ShapeError when x is not of its size.
    """
    if len(sizes) != group.size() or x.shape[from_dim] != sizes[group.rank()]:
        raise ShapeError(
            f"reshard: {tuple(x.shape)} has {x.shape[from_dim]} along dimension {from_dim}; the sizes of "
            f"{group.size()} processes are {list(sizes)}, and this is number {group.rank()}"
        )
    if group.size() == 1:
        return x
    dims = from_dim % x.dim(), to_dim % x.dim()
    moved: Tensor = _Reshard.apply(x, *dims, tuple(sizes), tuple(shares(x.shape[to_dim], group.size())), group)  # type: ignore[no-untyped-call]
    return moved


class _Reshard(torch.autograd.Function):
    """The gradient goes the same way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, from_dim: int, to_dim: int, held: Sequence[int], wanted: Sequence[int], group: Any
    ) -> Tensor:
        ctx.way = to_dim, from_dim, wanted, held, group
        shape = list(x.shape)
        shape[to_dim] = wanted[group.rank()]
        across = x.numel() // max(1, x.shape[to_dim])  # numbers of one index along to_dim, here and received
        along = 1
        for dim, size in enumerate(shape):
            along *= 1 if dim == from_dim else size
        # laid flat by reshape: the memory of x, or of a gradient, may be in any order
        sent = torch.cat([piece.reshape(-1) for piece in x.split(list(wanted), to_dim)])
        received = sent.new_empty(along * sum(held))
        dist.all_to_all_single(
            received, sent, [along * size for size in held], [across * size for size in wanted], group=group
        )
        pieces = []
        for piece, size in zip(received.split([along * size for size in held]), held, strict=True):
            shape[from_dim] = size
            pieces.append(piece.view(shape))
        return torch.cat(pieces, from_dim)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _Reshard.apply(upstream[0], *ctx.way), None, None, None, None, None  # type: ignore[no-untyped-call]


def gather(x: Tensor, dim: int, *, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Return a tensor, cut over processes along a dimension, whole on each; its gradients are summed over them.

    sizes: of every process's piece. It is a reshard, of as many copies as there are processes.
    """
    copies = x[None].expand(group.size(), *x.shape)
    return reshard(copies, dim % x.dim() + 1, 0, sizes=sizes, group=group)[0]


def shares(count: int, parts: int) -> list[int]:
    """Return the sizes of so many parts, as even as they can be, the larger first."""
    return [count // parts + (part < count % parts) for part in range(parts)]


def held_in_ring(tokens: int, places: int) -> tuple[tuple[range, ...], ...]:
    """Return the tokens at each place of a ring: one chunk from the front, one from the back."""
    if places == 1:
        return ((range(tokens),),)
    sizes = shares(tokens, 2 * places)
    chunks = [range(sum(sizes[:at]), sum(sizes[: at + 1])) for at in range(2 * places)]
    return tuple((chunks[place], chunks[-1 - place]) for place in range(places))


def _part(ranges: Sequence[range], start: int, stop: int) -> tuple[range, ...]:
    """Return start .. stop of ranges laid end to end."""
    found, at = [], 0
    for own in ranges:
        piece = own[max(0, start - at) : max(0, stop - at)]
        if piece:
            found.append(piece)
        at += len(own)
    return tuple(found)


def _misfit(heads: int, kv_heads: int, count: int) -> str | None:
    """Return why so many processes cannot share heads, or None when they can."""
    if heads % count:
        return f"{heads} query heads do not divide by {count}"
    if kv_heads % count and count % kv_heads:
        return f"{kv_heads} key heads neither divide by {count} nor divide it, so that each process needs other ones"
    return None


def _by_process(heads: int, kv_heads: int, count: int) -> tuple[list[int], int]:
    """Return the heads of queries, keys and values laid end to end in the order in which processes need them, and how
    many key heads each has. What several need is there several times.
    """
    own, group = heads // count, heads // kv_heads
    order = []
    for first in range(0, heads, own):
        keys = range(first // group, (first + own - 1) // group + 1)
        order += [*range(first, first + own), *(heads + key for key in keys), *(heads + kv_heads + key for key in keys)]
    return order, max(1, kv_heads // count)
