"""Products that take their activation along give what the two give apart, plain and packed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from modalora.nn.dense import FUNCTIONS, Dense, Pointwise1d, Pointwise2d
from modalora.nn.packed import Activation, can_pack

ACTIVATIONS: tuple[Activation, ...] = ("none", *FUNCTIONS)


def layer(activation: Activation, dtype: torch.dtype = torch.bfloat16) -> Dense:
    torch.manual_seed(0)
    return Dense(72, 50, activation=activation).to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_is_rounded_once(activation: Activation) -> None:
    x = 3 * torch.randn(2, 9, 72).bfloat16()
    exact = layer(activation).double()
    with torch.inference_mode():
        told, found = exact(x.double()), layer(activation)(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == (2, 9, 50)
    if can_pack(exact.weight.bfloat16()):
        # rounded to bf16 once: 2 ** -9 of the value at most; 1e-4 for float32 sums that end near zero
        torch.testing.assert_close(found.double(), told, atol=1e-4, rtol=2**-8)
    else:
        torch.testing.assert_close(found.double(), told, atol=0.03, rtol=2**-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_it_gives_the_same_bits_and_gives_up_the_matrix(activation: Activation) -> None:
    plain, packed = layer(activation), layer(activation)
    if not can_pack(plain.weight):
        pytest.skip("this CPU has no bf16 products")
    x = torch.randn(2, 9, 72).bfloat16()
    given: list[torch.Tensor] = []
    packed.pack(given.append)
    with torch.inference_mode():
        assert torch.equal(packed(x), plain(x))
    assert torch.equal(given[0], plain.weight)
    assert packed.weight.isnan().all()
    assert packed.weight.shape == plain.weight.shape


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_goes_through_both(activation: Activation) -> None:
    dense, x = layer(activation, torch.float64), torch.randn(3, 72, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dense, (x,))
    dense(x).sum().backward()
    assert dense.weight.grad is not None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_has_gradients_near_those_of_float32(activation: Activation) -> None:
    dense, exact = layer(activation), layer(activation).float()
    x = torch.randn(9, 72).bfloat16()
    found = torch.autograd.grad(
        dense(given := x.clone().requires_grad_()).float().square().sum(), (given, dense.weight)
    )
    told = torch.autograd.grad(exact(given := x.float().requires_grad_()).square().sum(), (given, exact.weight))
    for one, other in zip(found, told, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.float() - other).norm() / other.norm()) < 0.01  # some roundings of 2 ** -9: seen 0.004


def test_convolutions_are_products_of_channels_that_come_last() -> None:
    torch.manual_seed(0)
    one, two = Pointwise1d(6, 4, 1), Pointwise2d(2, 5, 3, 2, 1, activation="relu")
    x, image = torch.randn(2, 7, 6), torch.randn(1, 2, 9, 9)
    told = nn.Conv1d.forward(one, x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(one(x), told, atol=1e-6, rtol=1e-5)  # float32 sums of 6
    seen = functional.unfold(image, 3, padding=1, stride=2).transpose(1, 2)
    told = nn.Conv2d.forward(two, image).relu().flatten(2).transpose(1, 2)
    torch.testing.assert_close(two(seen), told, atol=1e-6, rtol=1e-5)
