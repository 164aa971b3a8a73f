"""Cross-entropy without logits: torch's values and gradients, whatever the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from modalora.errors import ShapeError
from modalora.nn import loss
from modalora.nn.loss import cross_entropy


def told(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0, unsaid: tuple[int, ...] = ()) -> Tensor:
    """The same through logits of all tokens and words."""
    logits = functional.linear(hidden, weight) * scale
    mask = torch.zeros(len(weight), dtype=torch.bool)
    mask[list(unsaid)] = True
    return functional.cross_entropy(logits.masked_fill(mask, -torch.inf), targets, reduction="none")


def given(
    tokens: int = 11, width: int = 8, vocab: int = 50, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocab, (tokens,))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 tokens and blocks of 7 words: neither divides what the tests use."""
    monkeypatch.setattr(loss, "TOKENS", 4)
    monkeypatch.setattr(loss, "WORDS", 7)
    monkeypatch.setattr(loss, "BUDGET", 1)


@pytest.mark.parametrize(("scale", "unsaid"), [(1.0, ()), (0.125, ()), (1.5, (0, 1, 2, 3, 4, 5, 6, 20))])
def test_values_and_gradients_are_those_through_logits(
    small_blocks: None, scale: float, unsaid: tuple[int, ...]
) -> None:
    hidden, weight, targets = given()
    targets = targets.clamp(min=30)
    upstream = torch.randn(len(targets), dtype=torch.float64)
    found, expected = (
        (values, *torch.autograd.grad(values, (hidden, weight), upstream))
        for values in (
            cross_entropy(hidden, weight, targets, scale=scale, unsaid=unsaid),
            told(hidden, weight, targets, scale, unsaid),
        )
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)  # float64 rounding


def test_gradients_are_the_slopes_of_the_values(small_blocks: None) -> None:
    hidden, weight, targets = given(tokens=5, width=3, vocab=16)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, targets, scale=0.7), (hidden, weight))


def test_a_frozen_projection_gets_no_gradient_and_the_states_get_the_same(small_blocks: None) -> None:
    hidden, weight, targets = given()
    (both, _) = torch.autograd.grad(cross_entropy(hidden, weight, targets).sum(), (hidden, weight))
    (alone,) = torch.autograd.grad(cross_entropy(hidden, weight.detach(), targets).sum(), hidden)
    assert torch.equal(both, alone)
    states = hidden.detach()
    (only,) = torch.autograd.grad(cross_entropy(states, weight, targets).sum(), weight)
    expected = torch.autograd.grad(told(states, weight, targets).sum(), weight)[0]
    torch.testing.assert_close(only, expected, atol=1e-12, rtol=1e-12)
    assert not cross_entropy(states, weight.detach(), targets).requires_grad


def test_logits_far_from_zero_do_not_overflow(small_blocks: None) -> None:
    hidden, weight, targets = given(dtype=torch.float32)
    values = cross_entropy(300 * hidden, weight, targets)
    assert float(values.detach().max()) > 500  # exp of it is beyond float32
    # logits up to 3,000 in float32 steps of 2e-4
    torch.testing.assert_close(values, told(300 * hidden, weight, targets), atol=2e-3, rtol=0)


def test_bf16_inputs_are_summed_in_float32() -> None:
    hidden, weight, targets = given(tokens=64, width=64, vocab=9000, dtype=torch.float32)
    small = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    values = cross_entropy(*small, targets)
    exact = told(*(x.detach().float() for x in small), targets)
    assert values.dtype == torch.float32
    # one rounding of each logit to bf16 (2^-9 of up to 40) and none of the sums; bf16 sums are off by 2^-9 of their 35
    away = (values - exact).detach()
    assert float(away.abs().max()) < 0.1
    assert float(away.mean().abs()) < 0.01
    grads = torch.autograd.grad(values.sum(), small)
    precise = [x.detach().float().requires_grad_() for x in small]
    expected = torch.autograd.grad(told(*precise, targets).sum(), precise)
    for one, other in zip(grads, expected, strict=True):
        assert one.dtype == torch.bfloat16
        # seen 0.006 of the norm, 2^-8 being one rounding
        assert float((one.float() - other).norm() / other.norm()) < 0.012


def test_autocast_decides_the_dtype_of_the_products() -> None:
    hidden, weight, targets = given(tokens=16, width=32, vocab=200, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values = cross_entropy(hidden, weight, targets)
    assert torch.equal(values, cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets))
    grads = torch.autograd.grad(values.sum(), (hidden, weight))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_no_tokens_have_no_losses() -> None:
    hidden, weight, _ = given(tokens=0)
    values = cross_entropy(hidden, weight, torch.empty(0, dtype=torch.long))
    grads = torch.autograd.grad(values.sum(), (hidden, weight))
    assert [tuple(x.shape) for x in (values, *grads)] == [(0,), (0, 8), (50, 8)]
    assert not grads[1].any()


def test_an_unsaid_target_is_infinitely_unlikely_and_teaches_nothing(small_blocks: None) -> None:
    hidden, weight, _ = given(tokens=3)
    targets = torch.tensor([4, 20, 4])
    values = cross_entropy(hidden, weight, targets, unsaid=(4,))
    assert values.isinf().tolist() == [True, False, True]
    grads = torch.autograd.grad(values.sum(), (hidden, weight))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[1][4].any()


def test_no_tensor_of_tokens_times_words_is_made() -> None:
    """The largest tensor that any operation returns, forward and backward, against the logits of all tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(x))
            return out

    hidden, weight, targets = given(tokens=1500, width=8, vocab=60_000, dtype=torch.float32)
    with Watch():
        cross_entropy(hidden, weight.detach(), targets).sum().backward()
    largest = max(size for size in sizes if size != weight.numel())
    assert largest * 4 <= loss.BUDGET
    assert largest < hidden.shape[0] * weight.shape[0] / 20


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, targets = given()
    with pytest.raises(ShapeError, match=r"\(11, 8\), \(50, 7\) and \(11,\)"):
        cross_entropy(hidden, weight[:, :7], targets)
    with pytest.raises(ShapeError, match="targets"):
        cross_entropy(hidden, weight, targets[:5])
