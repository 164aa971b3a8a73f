"""The one attention function, over interchangeable backends.

q is (batch, time, heads, head_dim); k and v are (batch, keys, kv_heads, head_dim) with heads a multiple of kv_heads:
query head h reads key head h // (heads / kv_heads). Or all three have one more axis, rows, behind batch: rows of an
alignment or of a pair representation (Evoformer), which share a pair bias.

Two biases are added to the logits. `pair_bias`, (1 or batch, heads, time, keys), has no axis of rows and is never
expanded over them. `key_bias` is (1 or batch, keys), or (1 or batch, 1 or rows, keys). A query that sees no key, be it
for the mask or for biases of -inf, gets zeros, and gradients of zero.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional

from modalora.errors import ConfigError, ShapeError
from modalora.nn import blockwise, short
from modalora.nn.call import Call, Found
from modalora.nn.mask import Mask
from modalora.nn.products import has_tiles


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    key_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor:
    """Return the output alone."""


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    key_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    key_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax(q k' * scale + key_bias + pair_bias) v, of q's shape.

    mask: its tensors have an entry for each row: (batch,), or (batch, rows). scale: None means head_dim ** -0.5.
    return_lse: also return the log of each query's sum of exponentials, q's shape without head_dim, float32 or float64;
    -inf where it sees no key. It is what `merge` takes. backend: a name of BACKENDS; None takes the fastest that can.
    Differentiable, once, in q, k, v, both biases, and through what is returned. torch.func.grad takes it too, but for
    the kernels of short.py and fused.py; in place of torch.func.vmap give a longer batch.
    Raises ShapeError when shapes do not fit, ConfigError when the named backend is unknown or cannot do the call.
    """
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    _check(q, k, v, key_bias, pair_bias)
    if key_bias is not None:
        key_bias = key_bias.expand(*q.shape[:-3], k.shape[-3]).reshape(-1, k.shape[-3])
    if q.dim() == 5:
        offsets, lengths, padded = (x if x is None else x.flatten() for x in (mask.offsets, mask.lengths, mask.padded))
        mask = replace(mask, offsets=offsets, lengths=lengths, padded=padded)
    call = Call(
        q=q.flatten(0, -4),
        k=k.flatten(0, -4),
        v=v.flatten(0, -4),
        mask=mask,
        key_bias=key_bias,
        pair_bias=pair_bias,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        wants_lse=return_lse,
    )
    out, lse = _attend(call, backend)
    return out.view(q.shape) if lse is None else (out.view(q.shape), lse.view(q.shape[:-1]))


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return attention over two sets of keys, out of what `attend(..., return_lse=True)` gave for each.

    Online softmax, arXiv:1805.02867: log-sum-exps weigh the outputs. Differentiable.
    """
    top = torch.maximum(one[1], other[1]).detach()
    dead = top == -torch.inf  # a query that sees no key in either; no gradient of it may be NaN
    shares = [(lse - top.masked_fill(dead, 0.0)).exp() for lse in (one[1], other[1])]
    total = (shares[0] + shares[1]).masked_fill(dead, 1.0)
    out = (shares[0] / total)[..., None] * one[0] + (shares[1] / total)[..., None] * other[0]
    return out.to(one[0].dtype), (top + total.log())


def choose(call: Call) -> str:
    """Return the backend for a call that names none.

    On a CPU PyTorch's kernel is slow in bf16. Forward, 2,048 tokens of 24 heads of 128 take it 357 ms, and 105 in
    tiles of plain matrix products; with the gradient 909 and 434. What is one tile at most is taken by `eager`: with
    the gradient, 20 crops of 144 patches and 5 heads of 32 take it 10 ms, and 17 in tiles. AMX turns the forward pass
    over, 164 ms and 276, where the kernel needs no mask or is given a bias; not the gradient.
    """
    q, size = call.q, call.q[..., 0].numel() * call.k.shape[1] * call.q.element_size()  # bytes of logits
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        few = q.shape[1] * call.group <= blockwise.TILE if call.is_trained else q.shape[1] <= FEW
        suits = not call.is_trained and has_tiles() and (call.pair_bias is not None or _mask_bytes(call) == 0)
        if suits and not few and BACKENDS["sdpa"].lacks(call) is None and _mask_bytes(call) <= MASK_BYTES:
            return "sdpa"
        return "eager" if few else "blockwise"
    # with a trained bias that many rows share, PyTorch's kernels keep all logits
    shares = call.pair_bias is not None and call.pair_bias.requires_grad and call.share > 1 and size > blockwise.BYTES
    if BACKENDS["sdpa"].lacks(call) is None and not (shares and call.is_trained) and _mask_bytes(call) <= MASK_BYTES:
        return "sdpa"
    if q.device.type == "cuda" and BACKENDS["fused"].lacks(call) is None:
        return "fused"
    return "eager" if size <= blockwise.BYTES else "blockwise"


def _mask_bytes(call: Call) -> int:
    """Return the size of a row's mask for PyTorch's kernels: a row's, so that a batch chooses as the row alone does."""
    time, keys = call.q.shape[1], call.k.shape[1]
    is_known = call.mask.is_plain_causal and time == keys and call.key_bias is None and call.pair_bias is None
    return 0 if is_known or call.mask.sees_all else time * keys * call.q.element_size()


MASK_BYTES = 2**24  # of 2,048 x 2,048 pairs in float32; what is longer, such as a window in a long row, goes in tiles
FEW = 16  # queries, of a decoding step; tiles would be smaller than what it takes to start them


def _check(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, pair_bias: Tensor | None) -> None:
    """Refuse shapes and dtypes that do not belong together."""
    if q.dim() not in (4, 5) or k.shape != v.shape or q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: q is (batch, time, heads, "
            "head_dim), k and v are (batch, keys, kv_heads, head_dim); or all have an axis of rows behind batch"
        )
    (*lead, time, heads, _), (keys, kv_heads) = q.shape, k.shape[-3:-1]
    if heads % kv_heads:
        raise ShapeError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; make them one dtype")
    if key_bias is not None:
        leads = [{1, size} for size in lead]
        if (
            key_bias.dim() != len(lead) + 1
            or key_bias.shape[-1] != keys
            or any(size not in allowed for size, allowed in zip(key_bias.shape, leads, strict=False))
        ):
            raise ShapeError(
                f"key_bias {tuple(key_bias.shape)} does not fit {keys} keys: it is "
                + ("(1 or batch, keys)" if len(lead) == 1 else "(1 or batch, 1 or rows, keys)")
            )
    if pair_bias is not None:
        if pair_bias.dim() != 4 or pair_bias.shape[0] not in (1, lead[0]) or pair_bias.shape[1:] != (heads, time, keys):
            raise ShapeError(
                f"pair_bias {tuple(pair_bias.shape)} does not fit: it is (1 or batch, heads, time, keys), here "
                f"(1 or {lead[0]}, {heads}, {time}, {keys}), with no axis of rows: the rows of a batch entry share it"
            )
        if pair_bias.shape[0] > 1 and pair_bias.stride(0) == 0:
            raise ShapeError("pair_bias is expanded over batch; give it once, (1, heads, time, keys)")


def _attend(call: Call, backend: str | None) -> Found:
    mask = call.mask
    if mask.spans is not None:
        return _end_to_end(call, backend)
    if mask.padded is not None:
        if call.q.dtype == torch.float32 and call.q.device.type == "cpu":
            return _row_by_row(call, backend)
        # no real query of a causal row sees its padding: then there is nothing to mask
        call = replace(call, mask=replace(mask, padded=None, lengths=None if mask.causal else mask.padded))
    name = choose(call) if backend is None else backend
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; known are {', '.join(BACKENDS)}")
    if (reason := BACKENDS[name].lacks(call)) is not None:
        able = [other for other in BACKENDS if BACKENDS[other].lacks(call) is None]
        raise ConfigError(f"attention backend {name!r} cannot do {reason}; these can: {', '.join(able) or 'none'}")
    return BACKENDS[name].run(call)


def _end_to_end(call: Call, backend: str | None) -> Found:
    """Compute each row of a sequence of rows alone: what a block-diagonal mask would tell, without its pairs.

    Neighbours of one length go together, as rows of a batch do.
    """
    assert call.mask.spans is not None
    has_bias = call.key_bias is not None or call.pair_bias is not None
    runs = [(length, len([*same])) for length, same in groupby(call.mask.spans)]
    runs = [(length, 1) for length in call.mask.spans] if has_bias else runs
    sizes = [length * count for length, count in runs]
    found, start = [], 0
    # split: the gradient of each slice would be as large as the whole
    for (length, count), *own in zip(runs, *(x.split(sizes, dim=1) for x in (call.q, call.k, call.v)), strict=True):
        time = slice(start, start + length)
        q, k, v = (x.unflatten(1, (count, length)).flatten(0, 1) for x in own)
        piece = replace(
            call, q=q, k=k, v=v, mask=replace(call.mask, spans=None, padded=None),
            key_bias=None if call.key_bias is None else call.key_bias[:, time],
            pair_bias=None if call.pair_bias is None else call.pair_bias[:, :, time, time],
        )  # fmt: skip
        out, lse = _attend(piece, backend)
        whole = None if lse is None else lse.unflatten(0, (-1, count)).flatten(1, 2)
        found.append((out.unflatten(0, (-1, count)).flatten(1, 2), whole))
        start += length * count
    return _joined(found, dim=1)


def _row_by_row(call: Call, backend: str | None) -> Found:
    """Compute each row of a padded batch at its own length.

    On a CPU every other operation of a network can give a row the same float32 bits in a batch as alone (products
    take care in nn/products.py); sums over padded keys do not.
    """
    assert call.mask.padded is not None
    found = []
    rows = zip(call.mask.padded.tolist(), *(x.split(1) for x in (call.q, call.k, call.v)), strict=True)
    for row, (length, q, k, v) in enumerate(rows):
        time, pair = slice(0, length), call.pair_bias
        piece = replace(
            call, q=q[:, time], k=k[:, time], v=v[:, time], mask=replace(call.mask, spans=None, padded=None),
            key_bias=None if call.key_bias is None else call.key_bias[row, None, time],
            pair_bias=None if pair is None else pair[row // call.share, None, :, time, time],
        )  # fmt: skip
        out, lse = _attend(piece, backend)
        rest = call.q.shape[1] - length
        out = functional.pad(out, (0, 0, 0, 0, 0, rest))
        found.append((out, None if lse is None else functional.pad(lse, (0, 0, 0, rest), value=-torch.inf)))
    return _joined(found, dim=0)


def _joined(found: list[Found], dim: int) -> Found:
    lses = [lse for _, lse in found if lse is not None]
    return torch.cat([out for out, _ in found], dim), torch.cat(lses, dim) if lses else None


def _eager(call: Call) -> Found:
    if short.suits(call):
        return short.run(call), None
    (rows, time, heads, _), keys, kv_heads, mask = call.q.shape, call.k.shape[1], call.k.shape[2], call.mask
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    # the query heads of one key head are rows of one product: keys and values are not repeated
    logits = (q * call.scale).reshape(rows, kv_heads, -1, q.shape[-1]) @ k.transpose(-1, -2)
    logits = logits.view(rows, heads, time, -1)
    if call.pair_bias is not None:
        logits = (logits.unflatten(0, (-1, call.share)) + call.pair_bias[:, None]).flatten(0, 1)
    if call.key_bias is not None:
        logits = logits + call.key_bias[:, None, None]
    seen = mask.dense(time, keys, q.device, heads)
    if seen is not None:
        logits = logits.masked_fill_(~seen, -torch.inf)
    weights, dead = torch.softmax(logits, dim=-1), None  # sums in float32 whatever the dtype
    if blockwise.may_be_dead(call) and not blockwise.is_clean(weights):
        dead = logits.detach().amax(-1, keepdim=True) == -torch.inf
        logits = logits.masked_fill(dead, 0.0)  # so that no gradient is NaN
        weights = torch.softmax(logits, dim=-1).masked_fill(dead, 0.0)
    out = (weights.to(q.dtype).view(rows, kv_heads, -1, keys) @ v).view(rows, heads, time, -1)
    lse = None
    if call.wants_lse:
        lse = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1)
        lse = lse if dead is None else lse.masked_fill(dead[..., 0], -torch.inf)
        lse = lse.transpose(1, 2)
    return out.transpose(1, 2), lse


def _sdpa(call: Call) -> Found:
    mask, bias = call.mask, call.pair_bias
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    repeat = q.shape[1] // k.shape[1]
    masked = _mask_bytes(call) > 0
    grouped = repeat > 1 and _shares_keys(call, masked)
    if repeat > 1 and not grouped:
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    sdpa = partial(functional.scaled_dot_product_attention, scale=call.scale, enable_gqa=grouped)
    if call.key_bias is not None:
        bias = call.key_bias[:, None, None]
    if mask.is_plain_causal and bias is None and q.shape[2] == k.shape[2]:
        return sdpa(q, k, v, is_causal=True).transpose(1, 2), None
    seen = mask.dense(q.shape[2], k.shape[2], q.device, q.shape[1])
    if bias is not None:
        bias = bias.to(q.dtype)
        if seen is not None:
            bias = bias.masked_fill(~seen, -torch.inf)
    return sdpa(q, k, v, attn_mask=seen if bias is None else bias).transpose(1, 2), None


def _shares_keys(call: Call, masked: bool) -> bool:
    """Tell whether PyTorch's kernel for this call reads the keys of a group of heads where they lie.

    On a CPU it does, and sums their gradients less exactly. On a GPU the kernels of half precision do, without a mask;
    others would write all logits.
    """
    if call.q.device.type == "cpu":
        return not call.is_trained
    return call.q.device.type == "cuda" and not masked and call.q.dtype in (torch.float16, torch.bfloat16)


def _fused(call: Call) -> Found:
    from modalora.nn import fused  # triton is imported by those who use it

    return fused.run(call)


REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A way to compute attention, and what it can do."""

    run: Callable[[Call], Found]
    dtypes: tuple[torch.dtype, ...] = REAL
    devices: tuple[str, ...] | None = None  # None: all
    head_dims: range | None = None
    both_biases: bool = True  # a key bias and a pair bias in one call
    groups_of_rows: bool = True  # pair biases that some rows share, and not all
    lse: bool = True
    block_sparse: bool = True
    needs: str | None = None  # a package
    linear_memory: bool  # in the length, with every gradient
    float64_reference: bool  # whether float64 has the error of float64

    def lacks(self, call: Call) -> str | None:
        """Return the first thing of a call that this backend cannot do, or None when it can do all."""
        q, biases = call.q, [x for x in (call.key_bias, call.pair_bias) if x is not None]
        pairs = 1 if call.pair_bias is None else len(call.pair_bias)
        lacking = (
            (self.needs is not None and importlib.util.find_spec(self.needs) is None, "anything without {needs}"),
            (self.devices is not None and q.device.type not in self.devices, "tensors on {device}"),
            (q.dtype not in self.dtypes, "{dtype}"),
            (self.head_dims is not None and q.shape[-1] not in self.head_dims, "head_dim {head_dim}"),
            (not self.both_biases and len(biases) > 1, "a key bias together with a pair bias"),
            (not self.groups_of_rows and 1 < pairs < len(q), "a pair bias for groups of rows"),
            (not self.lse and call.wants_lse, "the log-sum-exp"),
            (not self.block_sparse and call.mask.blocks is not None, "a block-sparse mask"),
        )
        reason = next((reason for is_lacking, reason in lacking if is_lacking), None)
        return reason and reason.format(needs=self.needs, device=q.device.type, dtype=q.dtype, head_dim=q.shape[-1])


BACKENDS = {
    "eager": Backend(run=_eager, linear_memory=False, float64_reference=True),
    "sdpa": Backend(
        run=_sdpa, both_biases=False, groups_of_rows=False, lse=False, linear_memory=False, float64_reference=False
    ),
    "blockwise": Backend(run=blockwise.run, linear_memory=True, float64_reference=True),
    "fused": Backend(
        run=_fused,
        dtypes=REAL[1:],
        # on a CPU the kernels run in Triton's interpreter, for tests
        devices=("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",),
        head_dims=range(1, 129),
        block_sparse=False,
        needs="triton",
        linear_memory=True,
        float64_reference=False,
    ),
}
