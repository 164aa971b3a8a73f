"""An identity through which tensors reach a computation, so that each gets a gradient, used or not.

What many processes reduce together must be there on every one of them, in one order. A tensor that went through a gate
and was then left alone has a gradient of exact zeros: its numbers are never read, so none of them can be a NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients  # torch fills in zeros for what nothing used


def gate(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors as they are. If a gradient reaches any of them, one reaches all, of zeros where unused."""
    gated: tuple[Tensor, ...] = _Gate.apply(x, *others)  # type: ignore[no-untyped-call]
    return gated
