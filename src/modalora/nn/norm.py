"""Root-mean-square normalisation, in the order of operations that bf16 checkpoints were trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale per channel.

    The division runs in float32 and is cast back before the weight is applied: the order decides the last bf16 bit.
    Source: arXiv:1910.07467, as in Phi-3.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) of any float dtype; the result has the same shape and dtype."""
        normal: Tensor = _Normalise.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normal


class _Normalise(torch.autograd.Function):
    """Keeps its input and one number per row; autograd would keep three float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = _exact(x)
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (exact * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = given
        x, weight, scale = ctx.saved_tensors
        normal = _exact(x) * scale
        to_x = to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (upstream * normal.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            change = _exact(upstream * weight)
            along = (change * normal).mean(-1, keepdim=True)
            to_x = change.addcmul_(normal, along, value=-1).mul_(scale).to(x.dtype)
        return to_x, to_weight, None


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
