"""The projector is Linear, exact GELU, Linear."""

from __future__ import annotations

import torch

from modalora.nn.mlp import Projector, swiglu


def test_the_gelu_is_the_exact_one() -> None:
    projector = Projector(4, 6).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    inner = x @ projector.up.weight.T + projector.up.bias
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    told = inner @ projector.down.weight.T + projector.down.bias
    torch.testing.assert_close(projector(x), told, atol=1e-14, rtol=1e-12)  # float64 rounding


def test_the_gate_is_a_silu_and_its_gradient_the_slope() -> None:
    both = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(both), up * gate * torch.sigmoid(gate), atol=1e-14, rtol=1e-12)
    assert torch.autograd.gradcheck(swiglu, (both,))
