"""RMS normalisation, down to the order of its casts."""

from __future__ import annotations

import torch

from modalora.nn.norm import RMSNorm, _Normalise


def test_it_divides_by_the_root_mean_square() -> None:
    norm = RMSNorm(4, eps=0.0)
    out = norm(torch.tensor([3.0, -3.0, 3.0, -3.0]))
    torch.testing.assert_close(out, torch.tensor([1.0, -1.0, 1.0, -1.0]))


def test_bf16_is_divided_in_float32_and_cast_before_the_weight() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(64).bfloat16()
    norm.weight.data.normal_()
    x = torch.randn(8, 64).bfloat16()
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), norm.weight * exact.bfloat16())
    assert not torch.equal(norm(x), (norm.weight.float() * exact).bfloat16())


def test_float64_stays_exact() -> None:
    x = torch.randn(5, 16, dtype=torch.float64)
    told = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(RMSNorm(16).double()(x), told, atol=1e-14, rtol=1e-14)  # float64 rounding


def test_gradients_are_the_slopes_of_the_values() -> None:
    norm = RMSNorm(6).double()
    norm.weight.data.normal_()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: _Normalise.apply(x, weight, 1e-5), (x, norm.weight))


def test_bf16_gradients_are_those_of_plain_operations() -> None:
    torch.manual_seed(1)
    norm = RMSNorm(64).bfloat16()
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(8, 64).bfloat16()
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    told = torch.autograd.grad(norm.weight * exact.bfloat16(), (x, norm.weight), upstream)
    for one, other in zip(torch.autograd.grad(norm(x), (x, norm.weight), upstream), told, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.01)  # one rounding more or less
