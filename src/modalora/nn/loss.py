"""Cross-entropy and the output projection as one function, which never holds the logits of all tokens and words.

loss_t = log sum_v exp(h_t w_v) - h_t w_y. Words are read in blocks, with a running maximum and sum, as attention reads
keys; the gradient of the states is softmax(h W') W - w_y, an attention whose keys and values are the words, so one pass
gives both (online softmax: arXiv:1805.02867; cut cross-entropy: arXiv:2411.09009). Sums and exponentials run in
float32, or in float64 for such inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from modalora.errors import ShapeError
from modalora.nn.shown import pieces

BUDGET, GPU_BUDGET = 2**22, 2**29  # bytes of a block of logits: a CPU wants it in its cache, a GPU large products
EVEN = 8  # rows of a product on a CPU: 511 take a third longer than 512
CACHED = 2**18  # numbers that stay in the cache of one core
TOKENS = 1024  # at most so many at a time: more gain nothing, and the blocks of words would grow narrow
WORDS = 1024  # at least so many at a time: each block costs a pass over the gradient of the states


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0, unsaid: Sequence[int] = ()
) -> Tensor:
    """Return the loss of each token, (tokens,) float32 (float64 for float64 states).

    hidden: (tokens, width). weight: (vocab, width). targets: (tokens,) ids. scale: what logits are multiplied by.
    unsaid: ids whose logits are -inf. Products run in the dtype of `hidden`, or autocast's. Differentiable in hidden
    and weight, for any gradient per token. Raises ShapeError when the three do not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or targets.shape != hidden.shape[:1] or hidden.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"cross_entropy takes hidden (tokens, width), weight (vocab, width) and targets (tokens,); given "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    losses: Tensor = _CrossEntropy.apply(hidden, weight, targets, scale, tuple(unsaid), dtype)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, unsaid: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        exact = torch.promote_types(dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        sums = torch.empty_like(losses)  # log of the sum over words
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _token_chunks(hidden):
            states, own = _even(hidden[rows].to(dtype)), _even(targets[rows, None])
            top = losses.new_full(own.shape, torch.finfo(exact).min / 2)  # finite: a block may hold unsaid words only
            total, said, shrink = (torch.zeros_like(top) for _ in range(3))
            mean = torch.zeros_like(states, dtype=exact)  # of the words, weighed by exp(logit - top)
            for words in _word_blocks(weight, states):
                part = weight[words].to(dtype)
                logits = _logits(states, part, words, unsaid)
                at, here = _places(own, words)
                said = torch.where(here, logits.gather(1, at).to(exact) * scale, said)
                for few in _in_cache(logits):
                    wide = logits[few].to(exact)
                    wide = wide.mul_(scale) if scale != 1.0 else wide
                    higher = torch.maximum(top[few], wide.amax(-1, keepdim=True))
                    shrink[few] = (top[few] - higher).exp_()
                    top[few] = higher
                    wide = wide.sub_(higher).exp_()
                    total[few] = torch.addcmul(wide.sum(-1, keepdim=True), total[few], shrink[few])
                    logits[few] = wide
                if grad is not None:
                    mean.mul_(shrink).add_(logits @ part)
            real = rows.stop - rows.start
            sums[rows] = (top + total.log()).squeeze(1)[:real]
            losses[rows] = sums[rows] - said.squeeze(1)[:real]
            if grad is not None:
                # an unsaid target has no gradient, and its loss is infinite
                right = weight[own.squeeze(1)].to(exact).masked_fill_(said.isinf(), 0.0)
                grad[rows] = mean.div_(total).sub_(right).mul_(scale)[:real]
        kept = (hidden, targets, sums) if ctx.needs_input_grad[1] else (None, None, None)
        ctx.save_for_backward(grad, weight if ctx.needs_input_grad[1] else None, *kept)
        ctx.settings = scale, unsaid, dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight, hidden, targets, sums = ctx.saved_tensors
        (upstream,) = given
        to_hidden = None if grad is None else (grad * upstream[:, None]).to(grad.dtype)
        to_weight = None if weight is None else _to_weight(hidden, weight, targets, sums, upstream, *ctx.settings)
        return to_hidden, to_weight, None, None, None, None


def _to_weight(
    hidden: Tensor, weight: Tensor, targets: Tensor, sums: Tensor, upstream: Tensor, scale: float,
    unsaid: tuple[int, ...], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return (softmax - one-hot)' hidden, (vocab, width), from logits that are computed again."""
    grad = torch.zeros_like(weight)
    for rows in _token_chunks(hidden):
        states, own = _even(hidden[rows].to(dtype)), _even(targets[rows, None])
        shift, factor = _even(sums[rows, None]), _even(upstream[rows, None] * scale)
        for words in _word_blocks(weight, states):
            logits = _logits(states, weight[words].to(dtype), words, unsaid)
            at, here = _places(own, words)
            right = -(here & logits.gather(1, at).isfinite()).to(sums.dtype)
            for few in _in_cache(logits):
                wide = logits[few].to(sums.dtype)
                wide = wide.mul_(scale) if scale != 1.0 else wide
                wide = wide.sub_(shift[few]).exp_()
                logits[few] = wide.scatter_add_(1, at[few], right[few]).mul_(factor[few])
            grad[words] += logits.T @ states
    return grad


def _logits(states: Tensor, part: Tensor, words: slice, unsaid: Sequence[int]) -> Tensor:
    logits = states @ part.T
    if here := [word - words.start for word in unsaid if words.start <= word < words.stop]:
        logits[:, here] = -torch.inf
    return logits


def _places(own: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Return where each target lies in a block of words and whether it does, both (tokens, 1)."""
    at = own - words.start
    return at.clamp(0, words.stop - words.start - 1), (own >= words.start) & (own < words.stop)


def _even(rows: Tensor) -> Tensor:
    """Append zeros up to a multiple of EVEN rows."""
    return functional.pad(rows, (0, 0, 0, -len(rows) % EVEN))


def _token_chunks(hidden: Tensor) -> Iterator[slice]:
    return _slices(hidden, len(hidden), TOKENS)


def _word_blocks(weight: Tensor, states: Tensor) -> Iterator[slice]:
    budget = BUDGET if weight.device.type == "cpu" else GPU_BUDGET
    count = max(WORDS, budget // (len(states) * states.dtype.itemsize) // WORDS * WORDS)
    return _slices(states, len(weight), count)


def _in_cache(logits: Tensor) -> Iterator[slice]:
    """Give rows of a block, so few on a CPU that all that is done to their float32 copy finds it in the cache."""
    count = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return _slices(logits, len(logits), count)


def _slices(of: Tensor, length: int, count: int) -> Iterator[slice]:
    parts = (slice(start, min(start + count, length)) for start in range(0, length, count))
    return pieces(of, parts, lambda part: part.stop - part.start)
