"""The two-layer perceptron that carries an encoder's features into the decoder's width, and the decoder's gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from modalora.nn.dense import Dense


class Projector(nn.Module):
    """Linear, exact GELU, Linear (Phi-4-Multimodal's projector for pictures and for sound)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.up = Dense(width_in, width_out, activation="gelu")
        self.down = Dense(width_out, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width_in) -> (..., width_out)."""
        out: Tensor = self.down(self.up(x))
        return out


def swiglu(both: Tensor) -> Tensor:
    """Return up * silu(gate), (..., width), for (..., 2 width) that holds the gate, then up (arXiv:2002.05202)."""
    gated: Tensor = _Swiglu.apply(both)  # type: ignore[no-untyped-call]
    return gated


class _Swiglu(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> Tensor:
        (both,), (upstream,) = ctx.saved_tensors, given
        gate, up = both.chunk(2, dim=-1)
        change = torch.empty_like(both)
        to_gate, to_up = change.chunk(2, dim=-1)
        torch.mul(upstream, functional.silu(gate), out=to_up)
        to_gate.copy_(torch.ops.aten.silu_backward(upstream * up, gate))
        return change
