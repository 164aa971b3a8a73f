"""The drop-in has OpenFold's numbers, in the layout of DeepSpeed's kernel, and none of its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modalora.errors import ShapeError
from modalora.science.evoformer_attention import DS4Sci_EvoformerAttention


def openfold(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor | None]) -> Tensor:
    """OpenFold's own attention core, in DeepSpeed's layout."""
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    for bias in biases:
        logits = logits if bias is None else logits + bias
    return (logits.softmax(-1) @ v).transpose(-2, -3)


@pytest.mark.parametrize("length", [1, 5, 37])  # DeepSpeed's needs more than 16
@pytest.mark.parametrize("head_dim", [7, 32, 80])  # and multiples of 8 up to 64
@pytest.mark.parametrize("lead", [(), (2,), (2, 2)])  # and one batch axis
def test_outputs_and_gradients_are_those_of_openfold(length: int, head_dim: int, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*lead, 3, length, 2, head_dim, dtype=torch.float64, requires_grad=True) for _ in range(3))
    first = 1e9 * (torch.rand(*lead, 3, 1, 1, length, dtype=torch.float64) > 0.3).double() - 1e9
    first[..., 0] = 0.0
    second = torch.randn(*lead, 1, 2, length, length, dtype=torch.float64, requires_grad=True)
    given, weight = [first, second], torch.randn(*lead, 3, length, 2, head_dim, dtype=torch.float64)
    found, told = (f(q, k, v, given) for f in (DS4Sci_EvoformerAttention, openfold))
    torch.testing.assert_close(found, told, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v, second)) for out in (found, told)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_a_list_of_biases_may_be_short_or_hold_none_and_stays_as_it_is() -> None:
    q = torch.randn(1, 3, 5, 2, 8)
    second = torch.randn(1, 1, 2, 5, 5)
    for biases in ([], [None], [torch.zeros(1, 3, 1, 1, 5)], [None, second]):
        before = list(biases)
        found = DS4Sci_EvoformerAttention(q, q, q, biases)
        assert len(biases) == len(before)
        assert all(one is other for one, other in zip(biases, before, strict=True))
        torch.testing.assert_close(found, openfold(q, q, q, biases), atol=1e-5, rtol=1e-5)


def test_biases_of_another_shape_are_refused() -> None:
    q = torch.randn(1, 3, 5, 2, 8)
    with pytest.raises(ShapeError, match=r"second bias \(1, 3, 2, 5, 5\) must be \(1, 1, 2, 5, 5\)"):
        DS4Sci_EvoformerAttention(q, q, q, [None, torch.randn(1, 1, 2, 5, 5).expand(1, 3, 2, 5, 5)])
    with pytest.raises(ShapeError, match=r"first bias \(1, 5, 1, 1, 3\) must be \(1, 3, 1, 1, 5\)"):
        DS4Sci_EvoformerAttention(q, q, q, [torch.randn(1, 5, 1, 1, 3)])
    for shape in ((5, 2, 8), (1, 3, 0, 2, 8), (1, 0, 5, 2, 8), (0, 3, 5, 2, 8)):
        with pytest.raises(
            ShapeError, match="must be \\(..., rows, length, heads, head_dim\\), with at least one of each"
        ):
            DS4Sci_EvoformerAttention(*[torch.randn(shape)] * 3, [])
    with pytest.raises(ShapeError, match="two at most"):
        DS4Sci_EvoformerAttention(q, q, q, [None, None, None])


def test_column_attention_is_row_attention_of_the_transposed_alignment() -> None:
    m = torch.randn(2, 4, 6, 2, 8)
    across = m.transpose(1, 2)
    found = DS4Sci_EvoformerAttention(across, across, across, []).transpose(1, 2)
    for column in range(6):
        own = m[:, None, :, column]
        torch.testing.assert_close(found[:, None, :, column], DS4Sci_EvoformerAttention(own, own, own, []))
