"""Attention in one kernel each for outputs, queries, keys and the pair bias: Triton, for GPUs.

Logits never leave the chip. Forward and backward as FlashAttention-2 (arXiv:2307.08691, 3), with two biases. The
gradient of a pair bias, a sum over the rows that share it, has a kernel of its own: a program owns a tile of the
bias and walks the rows, so that nothing is added by atomics and two runs have the same bits. Exponentials are of base
2, with log2(e) in the scale and in the biases. Only this module needs triton.

Sizes are padded to powers of two by masks, offsets are 64-bit, all strides are taken as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from modalora.errors import ConfigError
from modalora.nn.call import Call, Found
from modalora.nn.mask import Mask

# Kernels and their launches: arguments stand in lines.
# fmt: off

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PROGRAMS = 264  # of the pair bias' gradient, two for each of an H100's 132 multiprocessors; fewer tiles split the rows


@triton.jit
def _first_key(start, offset, window: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first block boundary of keys that the queries from start on may see."""
    if window > 0:
        return tl.maximum(0, (start + offset - window + 1) // BLOCK * BLOCK)
    return 0


@triton.jit
def _last_key(stop, offset, length, causal: tl.constexpr):
    """Return the end of the keys that the queries before stop may see."""
    if causal:
        return tl.minimum(length, stop + offset)
    return length


@triton.jit
def _logits(
    q, k, at_q, at_k, key_bias, pair_bias, stride_pq, stride_pk, stride_kk, offset, length, time, scale, HAS_KEY:
    tl.constexpr, HAS_PAIR: tl.constexpr, causal: tl.constexpr, window: tl.constexpr, PRECISION: tl.constexpr,
):
    """Return the logits in base 2 of a tile, (queries, keys), -inf for what is not seen."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    inside = (at_q < time)[:, None] & (at_k < length)[None, :]
    if HAS_KEY:
        bias = tl.load(key_bias + at_k.to(tl.int64) * stride_kk, mask=at_k < length, other=0.0)
        logits += bias.to(tl.float32)[None, :] * LOG2E
    if HAS_PAIR:
        place = at_q.to(tl.int64)[:, None] * stride_pq + at_k.to(tl.int64)[None, :] * stride_pk
        logits += tl.load(pair_bias + place, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if causal:
        inside = inside & (at_k[None, :] <= (at_q + offset)[:, None])
    if window > 0:
        inside = inside & (at_k[None, :] > (at_q + offset)[:, None] - window)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def _rows(x, at, stride_t, time, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load (places, BLOCK_D) from x, zeros outside."""
    depth = tl.arange(0, BLOCK_D)
    place = at.to(tl.int64)[:, None] * stride_t + depth[None, :]
    return tl.load(x + place, mask=(at < time)[:, None] & (depth < D)[None, :], other=0.0)


@triton.jit
def _write(x, found, at, stride_t, time, D: tl.constexpr, BLOCK_D: tl.constexpr):
    depth = tl.arange(0, BLOCK_D)
    place = at.to(tl.int64)[:, None] * stride_t + depth[None, :]
    tl.store(x + place, found.to(x.dtype.element_ty), mask=(at < time)[:, None] & (depth < D)[None, :])


@triton.jit
def forward_kernel(
    q, k, v, key_bias, pair_bias, out, lse, offsets, lengths, stride_qr, stride_qt, stride_qh, stride_kr, stride_kt,
    stride_kh, stride_vr, stride_vt, stride_vh, stride_br, stride_bk, stride_pp, stride_ph, stride_pq, stride_pk,
    stride_or, stride_ot, stride_oh, rows, share, time, keys, heads, group, scale, HAS_KEY: tl.constexpr, HAS_PAIR:
    tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_LENGTHS: tl.constexpr, causal: tl.constexpr, window: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A program: the outputs of a block of queries of one head of one row. Rows run fastest: they share a bias."""
    program = tl.program_id(0)
    row, head, block = program % rows, program // rows % heads, program // rows // heads
    row_, head_ = row.to(tl.int64), head.to(tl.int64)
    offset = tl.load(offsets + row).to(tl.int32) if HAS_OFFSETS else 0
    length = tl.minimum(keys, tl.load(lengths + row).to(tl.int32)) if HAS_LENGTHS else keys
    q += row_ * stride_qr + head_ * stride_qh
    k += row_ * stride_kr + head_ // group * stride_kh
    v += row_ * stride_vr + head_ // group * stride_vh
    key_bias += row_ * stride_br
    pair_bias += row_ // share * stride_pp + head_ * stride_ph
    start = block * BLOCK_Q
    at_q = start + tl.arange(0, BLOCK_Q)
    own = _rows(q, at_q, stride_qt, time, D, BLOCK_D)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    found = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    first = _first_key(start, offset, window, BLOCK_K)
    last = _last_key(tl.minimum(start + BLOCK_Q, time), offset, length, causal)
    for place in range(first, last, BLOCK_K):
        at_k = place + tl.arange(0, BLOCK_K)
        logits = _logits(
            own, _rows(k, at_k, stride_kt, length, D, BLOCK_D), at_q, at_k, key_bias, pair_bias, stride_pq, stride_pk,
            stride_bk, offset, length, time, scale, HAS_KEY, HAS_PAIR, causal, window, PRECISION,
        )
        new = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a query that has seen no key yet
        weights = tl.exp2(logits - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        values = _rows(v, at_k, stride_vt, length, D, BLOCK_D)
        found = found * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        top = new
    dead = total == 0.0
    found = found / tl.where(dead, 1.0, total)[:, None]
    sums = tl.where(dead, float("-inf"), (top + tl.log2(tl.where(dead, 1.0, total))) * LN2)
    _write(out + row_ * stride_or + head_ * stride_oh, found, at_q, stride_ot, time, D, BLOCK_D)
    tl.store(lse + (row_ * heads + head_) * time + at_q, sums, mask=at_q < time)


@triton.jit
def _weights(logits, lse):
    """Return exp of logits over their sum; zeros for a query that sees nothing, whose lse is -inf."""
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    return tl.exp2(logits - lse[:, None])


@triton.jit
def queries_kernel(
    q, k, v, key_bias, pair_bias, out, lse, offsets, lengths, to_out, to_lse, to_q, delta, stride_qr, stride_qt,
    stride_qh, stride_kr, stride_kt, stride_kh, stride_vr, stride_vt, stride_vh, stride_br, stride_bk, stride_pp,
    stride_ph, stride_pq, stride_pk, stride_or, stride_ot, stride_oh, stride_gr, stride_gt, stride_gh, rows, share,
    time, keys, heads, group, scale, natural, HAS_KEY: tl.constexpr, HAS_PAIR: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_LSE: tl.constexpr, causal: tl.constexpr, window: tl.constexpr, PRECISION:
    tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A program: the gradient of a block of queries, and delta = out . to_out - to_lse, which the others read."""
    program = tl.program_id(0)
    row, head, block = program % rows, program // rows % heads, program // rows // heads
    row_, head_ = row.to(tl.int64), head.to(tl.int64)
    offset = tl.load(offsets + row).to(tl.int32) if HAS_OFFSETS else 0
    length = tl.minimum(keys, tl.load(lengths + row).to(tl.int32)) if HAS_LENGTHS else keys
    k += row_ * stride_kr + head_ // group * stride_kh
    v += row_ * stride_vr + head_ // group * stride_vh
    key_bias += row_ * stride_br
    pair_bias += row_ // share * stride_pp + head_ * stride_ph
    start = block * BLOCK_Q
    at_q = start + tl.arange(0, BLOCK_Q)
    line = (row_ * heads + head_) * time + at_q
    own = _rows(q + row_ * stride_qr + head_ * stride_qh, at_q, stride_qt, time, D, BLOCK_D)
    given = _rows(to_out + row_ * stride_gr + head_ * stride_gh, at_q, stride_gt, time, D, BLOCK_D)
    told = _rows(out + row_ * stride_or + head_ * stride_oh, at_q, stride_ot, time, D, BLOCK_D)
    sums = tl.load(lse + line, mask=at_q < time, other=float("-inf"))
    shift = tl.sum(told.to(tl.float32) * given.to(tl.float32), 1)
    if HAS_LSE:
        shift -= tl.load(to_lse + line, mask=at_q < time, other=0.0)
    tl.store(delta + line, shift, mask=at_q < time)
    found = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    first = _first_key(start, offset, window, BLOCK_K)
    last = _last_key(tl.minimum(start + BLOCK_Q, time), offset, length, causal)
    for place in range(first, last, BLOCK_K):
        at_k = place + tl.arange(0, BLOCK_K)
        near = _rows(k, at_k, stride_kt, length, D, BLOCK_D)
        logits = _logits(
            own, near, at_q, at_k, key_bias, pair_bias, stride_pq, stride_pk, stride_bk, offset, length, time, scale,
            HAS_KEY, HAS_PAIR, causal, window, PRECISION,
        )
        values = _rows(v, at_k, stride_vt, length, D, BLOCK_D)
        change = tl.dot(given, tl.trans(values), input_precision=PRECISION)
        change = _weights(logits, sums) * (change - shift[:, None])
        found += tl.dot(change.to(near.dtype), near, input_precision=PRECISION)
    _write(to_q + ((row_ * time) * heads + head_) * D, found * natural, at_q, heads * D, time, D, BLOCK_D)


@triton.jit
def keys_kernel(
    q, k, v, key_bias, pair_bias, lse, delta, offsets, lengths, to_out, to_k, to_v, to_key, stride_qr, stride_qt,
    stride_qh, stride_kr, stride_kt, stride_kh, stride_vr, stride_vt, stride_vh, stride_br, stride_bk, stride_pp,
    stride_ph, stride_pq, stride_pk, stride_gr, stride_gt, stride_gh, rows, share, time, keys, heads, group, scale,
    natural, HAS_KEY: tl.constexpr, HAS_PAIR: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    TO_KEY: tl.constexpr, causal: tl.constexpr, window: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D:
    tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A program: the gradients of a block of keys and values of one key head, over all query heads that read it."""
    program = tl.program_id(0)
    kv_heads = heads // group
    row, kv_head, block = program % rows, program // rows % kv_heads, program // rows // kv_heads
    row_, kv_head_ = row.to(tl.int64), kv_head.to(tl.int64)
    offset = tl.load(offsets + row).to(tl.int32) if HAS_OFFSETS else 0
    length = tl.minimum(keys, tl.load(lengths + row).to(tl.int32)) if HAS_LENGTHS else keys
    key_bias += row_ * stride_br
    start = block * BLOCK_K
    at_k = start + tl.arange(0, BLOCK_K)
    near = _rows(k + row_ * stride_kr + kv_head_ * stride_kh, at_k, stride_kt, length, D, BLOCK_D)
    values = _rows(v + row_ * stride_vr + kv_head_ * stride_vh, at_k, stride_vt, length, D, BLOCK_D)
    found_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    found_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    found_bias = tl.zeros([BLOCK_K], tl.float32)
    first, last = 0, time
    if causal:
        first = tl.maximum(0, (start - offset) // BLOCK_Q * BLOCK_Q)
    if window > 0:
        last = tl.minimum(time, start + BLOCK_K - 1 + window - offset)
    if HAS_LENGTHS:
        last = tl.where(start < length, last, 0)
    for member in range(group):
        head_ = kv_head_ * group + member
        bias = pair_bias + row_ // share * stride_pp + head_ * stride_ph
        for place in range(first, last, BLOCK_Q):
            at_q = place + tl.arange(0, BLOCK_Q)
            line = (row_ * heads + head_) * time + at_q
            own = _rows(q + row_ * stride_qr + head_ * stride_qh, at_q, stride_qt, time, D, BLOCK_D)
            given = _rows(to_out + row_ * stride_gr + head_ * stride_gh, at_q, stride_gt, time, D, BLOCK_D)
            logits = _logits(
                own, near, at_q, at_k, key_bias, bias, stride_pq, stride_pk, stride_bk, offset, length, time, scale,
                HAS_KEY, HAS_PAIR, causal, window, PRECISION,
            )
            weights = _weights(logits, tl.load(lse + line, mask=at_q < time, other=float("-inf")))
            found_v += tl.dot(tl.trans(weights.to(given.dtype)), given, input_precision=PRECISION)
            change = tl.dot(given, tl.trans(values), input_precision=PRECISION)
            change = weights * (change - tl.load(delta + line, mask=at_q < time, other=0.0)[:, None])
            found_k += tl.dot(tl.trans(change.to(own.dtype)), own, input_precision=PRECISION)
            if TO_KEY:
                found_bias += tl.sum(change, 0)
    place = ((row_ * keys) * kv_heads + kv_head_) * D
    _write(to_k + place, found_k * natural, at_k, kv_heads * D, keys, D, BLOCK_D)
    _write(to_v + place, found_v, at_k, kv_heads * D, keys, D, BLOCK_D)
    if TO_KEY:
        tl.store(to_key + (row_ * kv_heads + kv_head_) * keys + at_k, found_bias, mask=at_k < keys)


@triton.jit
def pair_kernel(
    q, k, v, key_bias, pair_bias, lse, delta, offsets, lengths, to_out, to_pair, stride_qr, stride_qt, stride_qh,
    stride_kr, stride_kt, stride_kh, stride_vr, stride_vt, stride_vh, stride_br, stride_bk, stride_pp, stride_ph,
    stride_pq, stride_pk, stride_gr, stride_gt, stride_gh, pairs, share, splits, time, keys, heads, group, scale,
    HAS_KEY: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_LENGTHS: tl.constexpr, causal: tl.constexpr, window:
    tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K:
    tl.constexpr,
):
    """A program: the gradient of one tile of the pair bias, summed over a part of the rows that share it."""
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_K)
    block_k, rest = program % blocks, program // blocks
    block_q, rest = rest % tl.cdiv(time, BLOCK_Q), rest // tl.cdiv(time, BLOCK_Q)
    head, rest = rest % heads, rest // heads
    pair, split = rest % pairs, rest // pairs
    head_, pair_ = head.to(tl.int64), pair.to(tl.int64)
    at_q, at_k = block_q * BLOCK_Q + tl.arange(0, BLOCK_Q), block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    bias = pair_bias + pair_ * stride_pp + head_ * stride_ph
    each = tl.cdiv(share, splits)
    found = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for member in range(split * each, tl.minimum(share, (split + 1) * each)):
        row_ = pair_ * share + member
        offset = tl.load(offsets + row_).to(tl.int32) if HAS_OFFSETS else 0
        length = tl.minimum(keys, tl.load(lengths + row_).to(tl.int32)) if HAS_LENGTHS else keys
        line = (row_ * heads + head_) * time + at_q
        own = _rows(q + row_ * stride_qr + head_ * stride_qh, at_q, stride_qt, time, D, BLOCK_D)
        given = _rows(to_out + row_ * stride_gr + head_ * stride_gh, at_q, stride_gt, time, D, BLOCK_D)
        near = _rows(k + row_ * stride_kr + head_ // group * stride_kh, at_k, stride_kt, length, D, BLOCK_D)
        values = _rows(v + row_ * stride_vr + head_ // group * stride_vh, at_k, stride_vt, length, D, BLOCK_D)
        logits = _logits(
            own, near, at_q, at_k, key_bias + row_ * stride_br, bias, stride_pq, stride_pk, stride_bk, offset, length,
            time, scale, HAS_KEY, True, causal, window, PRECISION,
        )
        weights = _weights(logits, tl.load(lse + line, mask=at_q < time, other=float("-inf")))
        change = tl.dot(given, tl.trans(values), input_precision=PRECISION)
        found += weights * (change - tl.load(delta + line, mask=at_q < time, other=0.0)[:, None])
    to_pair += ((split.to(tl.int64) * pairs + pair_) * heads + head_) * time * keys
    place = at_q.to(tl.int64)[:, None] * keys + at_k[None, :]
    tl.store(to_pair + place, found, mask=(at_q < time)[:, None] & (at_k < keys)[None, :])


def run(call: Call) -> Found:
    """Return what `attend` returns, on a GPU, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1)."""
    if call.q.device.type == "cpu" and call.q.dtype == torch.bfloat16:
        raise ConfigError("Triton's interpreter multiplies bfloat16 as whole numbers; use float32 or float16 there")
    tensors = (call.q, call.k, call.v, call.key_bias, call.pair_bias)
    out, lse = _Fused.apply(*tensors, call.mask, call.scale)
    return out, lse.transpose(1, 2) if call.wants_lse else None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, pair_bias: Tensor | None, mask: Mask, scale:
        float,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_dense_heads(x) for x in (q, k, v))
        rows, time, heads, head_dim = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(rows, heads, time, dtype=torch.float32, device=q.device)
        options = blocks(head_dim, q.dtype)
        forward_kernel[(-(-time // options["BLOCK_Q"]) * heads * rows,)](
            q, k, v, *_biases(q, key_bias, pair_bias), out, lse, *_tensors(q, mask), *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], *_bias_strides(key_bias, pair_bias), *out.stride()[:3], *_sizes(q, k, pair_bias), scale *
            LOG2E.value, HAS_PAIR=pair_bias is not None, **_rules(q, key_bias, mask), **options,
        )
        ctx.save_for_backward(q, k, v, key_bias, pair_bias, out, lse)
        ctx.call = mask, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, key_bias, pair_bias, out, lse = ctx.saved_tensors
        mask, scale = ctx.call
        to_out, to_lse = upstream
        to_out = torch.zeros_like(out) if to_out is None else _dense_heads(to_out)
        to_lse = None if to_lse is None else to_lse.contiguous()
        rows, time, heads, head_dim = q.shape
        keys, kv_heads, group = k.shape[1], k.shape[2], heads // k.shape[2]
        wants_key, wants_pair = ctx.needs_input_grad[3:5]
        to_q, to_k, to_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = torch.empty_like(lse)
        options, rules, masks = blocks(head_dim, q.dtype), _rules(q, key_bias, mask), _tensors(q, mask)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_bias_strides(key_bias, pair_bias))
        biases, sizes = _biases(q, key_bias, pair_bias), _sizes(q, k, pair_bias)
        base, given = scale * LOG2E.value, to_out.stride()[:3]
        queries, near = -(-time // options["BLOCK_Q"]), -(-keys // options["BLOCK_K"])
        queries_kernel[(queries * heads * rows,)](
            q, k, v, *biases, out, lse, *masks, to_out, lse if to_lse is None else to_lse, to_q, delta, *strides,
            *out.stride()[:3], *given, *sizes, base, scale, HAS_PAIR=pair_bias is not None, HAS_LSE=to_lse is not None,
            **rules, **options,
        )
        to_key = torch.empty(rows, kv_heads, keys, dtype=torch.float32, device=q.device) if wants_key else None
        keys_kernel[(near * kv_heads * rows,)](
            q, k, v, *biases, lse, delta, *masks, to_out, to_k, to_v, lse if to_key is None else to_key, *strides,
            *given, *sizes, base, scale, HAS_PAIR=pair_bias is not None, TO_KEY=to_key is not None, **rules, **options,
        )
        to_pair = None
        if wants_pair:
            pairs = len(pair_bias)
            splits = max(1, min(rows // pairs, PROGRAMS // (queries * near * heads * pairs)))
            to_pair = torch.empty(splits, *pair_bias.shape, dtype=torch.float32, device=q.device)
            pair_kernel[(splits * pairs * heads * queries * near,)](
                q, k, v, *biases, lse, delta, *masks, to_out, to_pair, *strides, *given, pairs, rows // pairs, splits,
                time, keys, heads, group, base, **rules, **options,
            )
            to_pair = (to_pair[0] if splits == 1 else to_pair.sum(0)).to(pair_bias.dtype)
        to_key = None if to_key is None else to_key.sum(1).to(key_bias.dtype)
        return to_q, to_k, to_v, to_key, to_pair, None, None


# fmt: on


def blocks(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile sizes and launch options of the kernels."""
    depth = max(16, triton.next_power_of_2(head_dim))  # a product of tensor cores sums over at least 16
    queries, keys = (64, 64) if depth <= 64 else (64, 32)
    if dtype == torch.float32:  # exact products run on the ordinary units, whose registers hold less
        queries, keys = (32, 32) if depth <= 32 else (16, 16)
    return {"D": head_dim, "BLOCK_D": depth, "BLOCK_Q": queries, "BLOCK_K": keys, "num_warps": 4, "num_stages": 2}


def _dense_heads(x: Tensor) -> Tensor:
    """Return x with numbers of a head side by side, as it is where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _biases(q: Tensor, key_bias: Tensor | None, pair_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the biases; for one that is absent q, which is not read."""
    return q if key_bias is None else key_bias, q if pair_bias is None else pair_bias


def _bias_strides(key_bias: Tensor | None, pair_bias: Tensor | None) -> tuple[int, ...]:
    key = (0, 0) if key_bias is None else key_bias.stride()
    return *key, *((0,) * 4 if pair_bias is None else pair_bias.stride())


def _tensors(q: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Return offsets and lengths; for those that are absent q, which is not read."""
    return q if mask.offsets is None else mask.offsets, q if mask.lengths is None else mask.lengths


def _sizes(q: Tensor, k: Tensor, pair_bias: Tensor | None) -> tuple[int, ...]:
    """Return rows, share, time, keys, heads, group."""
    (rows, time, heads, _), keys = q.shape, k.shape[1]
    return rows, rows // (1 if pair_bias is None else len(pair_bias)), time, keys, heads, heads // k.shape[2]


def _rules(q: Tensor, key_bias: Tensor | None, mask: Mask) -> dict[str, Any]:
    """Return what each kernel is compiled for."""
    exact = q.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"
    return {
        "HAS_KEY": key_bias is not None,
        "HAS_OFFSETS": mask.offsets is not None,
        "HAS_LENGTHS": mask.lengths is not None,
        "causal": mask.causal,
        "window": 0 if mask.window is None else mask.window,
        "PRECISION": "ieee" if exact else "tf32",
    }
