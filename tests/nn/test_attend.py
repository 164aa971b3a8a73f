"""Attention: every backend equals the float64 reference, and nothing unseen has an influence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modalora.errors import ConfigError, ShapeError
from modalora.nn import short
from modalora.nn.attend import BACKENDS, attend
from modalora.nn.call import Call
from modalora.nn.mask import Mask

PLAIN = [name for name in BACKENDS if name != "fused"]  # which test_biases.py tests: its interpreter is slow

# worst seen in float32 7e-7, in gradients 3e-6; a bf16 slip (1e-2) must fail
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of one query at a time, as the definition says."""
    batch, time, heads, _ = q.shape
    repeat = heads // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for t in range(time):
            place = t + (int(mask.offsets[b]) if mask.offsets is not None else 0)
            real = int(mask.lengths[b]) if mask.lengths is not None else k.shape[1]
            seen = [j for j in range(k.shape[1]) if j < real and (not mask.causal or j <= place)]
            for h in range(heads if seen else 0):
                logits = torch.stack([(q[b, t, h] * k[b, j, h // repeat]).sum() * scale for j in seen])
                if bias is not None:
                    logits = logits + bias[b if len(bias) > 1 else 0, h, t, seen]
                out[b, t, h] = logits.softmax(0) @ v[b, seen, h // repeat]
    return out


Drawn = tuple[Tensor, Tensor, Tensor, dict[str, Any], Tensor | None]


@st.composite
def calls(draw: st.DrawFn) -> Drawn:
    batch, kv_heads, repeat = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    time, keys, head_dim = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.sampled_from([2, 8]))
    torch.manual_seed(draw(st.integers(0, 99)))
    q = torch.randn(batch, time, kv_heads * repeat, head_dim, dtype=torch.float64)
    k, v = (torch.randn(batch, keys, kv_heads, head_dim, dtype=torch.float64) for _ in range(2))
    numbers = st.lists(st.integers(0, keys), min_size=batch, max_size=batch)
    rules = {
        "causal": draw(st.booleans()),
        "offsets": torch.tensor(draw(numbers)) if draw(st.booleans()) else None,
        "lengths": torch.tensor(draw(numbers)) if draw(st.booleans()) else None,
    }
    bias = None
    if draw(st.booleans()):
        bias = torch.randn(draw(st.sampled_from([1, batch])), kv_heads * repeat, time, keys, dtype=torch.float64)
    return q, k, v, rules, bias


@settings(deadline=None, max_examples=150)
@given(calls())
def test_every_backend_equals_the_definition(call: Drawn) -> None:
    q, k, v, rules, bias = call
    mask = Mask(**rules)
    told = by_hand(q, k, v, mask, bias, q.shape[-1] ** -0.5)
    exact = attend(q, k, v, mask=mask, pair_bias=bias, backend="eager")
    torch.testing.assert_close(exact, told, atol=1e-12, rtol=1e-12)  # float64 rounding
    for backend in PLAIN:
        close = attend(
            q.float(),
            k.float(),
            v.float(),
            mask=mask,
            pair_bias=None if bias is None else bias.float(),
            backend=backend,
        )
        assert close.dtype == torch.float32
        torch.testing.assert_close(close.double(), told, **TOLERANCE)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("biased", [False, True])
def test_a_query_that_sees_no_key_gets_zeros_and_finite_gradients(backend: str, biased: bool) -> None:
    q = torch.randn(2, 3, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, 5, 2, 8, requires_grad=True) for _ in range(2))
    bias = torch.randn(2, 4, 3, 5, requires_grad=True) if biased else None
    out = attend(q, k, v, mask=Mask(lengths=torch.tensor([0, 4])), pair_bias=bias, backend=backend)
    out.square().sum().backward()
    assert not out[0].any()
    assert bool(out[1].all())
    assert q.grad is not None
    assert not q.grad[0].any()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v))


@pytest.mark.parametrize("backend", PLAIN)
def test_keys_behind_the_query_or_the_length_have_no_influence_on_any_bit(backend: str) -> None:
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    mask = Mask(causal=True, lengths=torch.tensor([5]))
    before = attend(q, k, v, mask=mask, backend=backend)
    k[:, 3:], v[:, 3:] = 1e4, -1e4
    after = attend(q, k, v, mask=mask, backend=backend)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3:], after[:, 3:])
    k[:, 5:], v[:, 5:] = -7.0, 3.0
    assert torch.equal(after, attend(q, k, v, mask=mask, backend=backend))


def test_backends_agree_in_gradients() -> None:
    grads = []
    for backend, dtype in (("eager", torch.float64), ("sdpa", torch.float32)):
        torch.manual_seed(0)
        q = torch.randn(2, 7, 4, 8).to(dtype).requires_grad_()
        k, v = (torch.randn(2, 7, 2, 8).to(dtype).requires_grad_() for _ in range(2))
        bias = torch.randn(1, 4, 7, 7).to(dtype).requires_grad_()
        mask = Mask(causal=True, lengths=torch.tensor([7, 4]))
        attend(q, k, v, mask=mask, pair_bias=bias, backend=backend).square().sum().backward()
        grads.append([q.grad, k.grad, v.grad, bias.grad])
    for exact, close in zip(*grads, strict=True):
        assert exact is not None
        assert close is not None
        torch.testing.assert_close(close.double(), exact, **TOLERANCE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("repeat", [1, 3])
def test_short_rows_have_the_gradients_of_the_definition(causal: bool, repeat: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 5, 2 * repeat, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 5 if causal else 7, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = Mask(causal=causal)
    assert short.suits(Call(q=q, k=k, v=v, mask=mask, key_bias=None, pair_bias=None, scale=0.3, wants_lse=False))
    found, told = attend(q, k, v, mask=mask, scale=0.3, backend="eager"), by_hand(q, k, v, mask, None, 0.3)
    upstream = torch.randn_like(q)
    for own, other in zip(*(torch.autograd.grad(out, (q, k, v), upstream) for out in (found, told)), strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=1e-12)  # float64 rounding


def test_short_rows_of_bf16_hide_what_comes_behind() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 4, 8).bfloat16().requires_grad_() for _ in range(3))
    before = attend(q, k, v, mask=Mask(causal=True))[:, :5]
    with torch.no_grad():
        k[:, 5:], v[:, 5:] = 1e30, -1e30
    after = attend(q, k, v, mask=Mask(causal=True))[:, :5]
    assert torch.equal(before, after)
    after.sum().backward()
    assert q.grad is not None
    assert not q.grad[:, 5:].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_padded_row_is_what_it_is_alone(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(3, 45, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    bias = torch.randn(1, 4, 45, 45, dtype=dtype)
    lengths = (45, 7, 20)
    both = attend(q, k, v, mask=Mask(causal=causal, padded=torch.tensor(lengths)), pair_bias=bias)
    for row, n in enumerate(lengths):
        own = (x[row : row + 1, :n] for x in (q, k, v))
        alone = attend(*own, mask=Mask(causal=causal), pair_bias=bias[:, :, :n, :n])
        if dtype == torch.float32:
            assert torch.equal(both[row, :n], alone[0])
        else:  # one step of bf16 at values up to 4; float64 rounding
            bound = 0.02 if dtype == torch.bfloat16 else 1e-12
            torch.testing.assert_close(both[row, :n], alone[0], atol=bound, rtol=0)


def test_a_padded_row_has_its_own_biases() -> None:
    q, k, v = (torch.randn(2, 2, 9, heads, 8) for heads in (4, 2, 2))
    key_bias, pair_bias = torch.randn(2, 2, 9), torch.randn(2, 4, 9, 9)
    lengths = torch.tensor([[9, 4], [6, 7]])
    both = attend(q, k, v, mask=Mask(padded=lengths), key_bias=key_bias, pair_bias=pair_bias)
    for entry, row in ((0, 0), (0, 1), (1, 0), (1, 1)):
        n = int(lengths[entry, row])
        own = (x[entry : entry + 1, row, :n] for x in (q, k, v))
        biases = {"key_bias": key_bias[entry, row, None, :n], "pair_bias": pair_bias[entry, None, :, :n, :n]}
        torch.testing.assert_close(both[entry, row, :n], attend(*own, mask=Mask(), **biases)[0], **TOLERANCE)


def test_offsets_place_the_queries_behind_what_a_cache_holds() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    whole = attend(q, k, v, mask=Mask(causal=True))
    last = attend(q[:, 4:], k, v, mask=Mask(causal=True, offsets=torch.tensor([4])))
    torch.testing.assert_close(last, whole[:, 4:], **TOLERANCE)


def test_heads_that_do_not_divide_and_unknown_backends_are_refused() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 2, 4)
    with pytest.raises(ShapeError, match="3 query heads are not a multiple of 2"):
        attend(q, k, k, mask=Mask())
    with pytest.raises(ConfigError, match="'flash' is unknown; known are eager, sdpa"):
        attend(k, k, k, mask=Mask(), backend="flash")


def test_sdpa_refuses_pair_biases_that_some_rows_share() -> None:
    q = torch.randn(2, 3, 4, 2, 8)
    with pytest.raises(ConfigError, match="'sdpa' cannot do a pair bias for groups of rows; these can: eager, block"):
        attend(q, q, q, mask=Mask(), pair_bias=torch.randn(2, 2, 4, 4), backend="sdpa")


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("spans", [(5, 1, 7), (4, 4, 4, 2, 2)])
def test_rows_end_to_end_see_themselves_alone(backend: str, window: int | None, spans: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, sum(spans), heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = attend(q, k, v, mask=Mask(causal=True, spans=spans, window=window), backend=backend)
    rows = zip(*(x.split(spans, dim=1) for x in (q, k, v)), strict=True)
    alone = [attend(*row, mask=Mask(causal=True, window=window), backend="eager") for row in rows]
    told = torch.cat(alone, dim=1)
    torch.testing.assert_close(out, told, **TOLERANCE)
    weight = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad(out, (q, k, v), weight), torch.autograd.grad(told, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_rows_end_to_end_cost_a_gradient_as_large_as_they_are() -> None:
    """Slices of the sequence would each have one as long as all rows together."""
    made = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            found = func(*args, **(kwargs or {}))
            made += func is torch.ops.aten.slice_backward.default
            return found

    for spans in ((5,) * 40, tuple(range(1, 21))):
        q, k, v = (torch.randn(1, sum(spans), heads, 8, requires_grad=True) for heads in (4, 2, 2))
        out = attend(q, k, v, mask=Mask(causal=True, spans=spans), backend="eager").sum()
        with Count():
            torch.autograd.grad(out, (q, k, v))
    assert made == 0


def test_tiles_keep_nothing_but_queries_keys_and_values() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    q, k, v = (torch.randn(1, 600, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(q, k, v, mask=Mask(causal=True), backend="blockwise")
    assert sorted(tensor.numel() for tensor in kept) == [600 * 2 * 8, 600 * 2 * 8, 600 * 4 * 8]


def test_tiles_of_bf16_have_the_gradients_of_float32() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 600, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    upstream = torch.randn_like(q)
    told = torch.autograd.grad(attend(q, k, v, mask=Mask(causal=True), backend="eager"), (q, k, v), upstream)
    small = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    out = attend(*small, mask=Mask(causal=True))
    found = torch.autograd.grad(out, small, upstream.bfloat16())
    for one, other in zip(found, told, strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 0.015  # a few roundings of 2^-9; seen 0.006


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_in_a_long_row_makes_no_mask_of_all_pairs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    seen = Mask._seen

    def counted(self: Mask, *given: Any) -> torch.Tensor | None:
        found = seen(self, *given)
        made.append(0 if found is None else found.numel())
        return found

    monkeypatch.setattr(Mask, "_seen", counted)
    q = torch.randn(1, 4096, 1, 8, dtype=dtype, requires_grad=True)
    attend(q, q, q, mask=Mask(causal=True, window=64)).sum().backward()
    assert made
    assert max(made) <= 4096 * 1024


def test_a_long_windowed_row_has_the_same_bits_in_a_batch_as_alone() -> None:
    lengths = [2100, 90]  # taken by different backends
    q, k, v = (torch.randn(2, max(lengths), 1, 8) for _ in range(3))
    told = attend(q, k, v, mask=Mask(causal=True, window=64, padded=torch.tensor(lengths)))
    for row, length in enumerate(lengths):
        alone = (x[row : row + 1, :length] for x in (q, k, v))
        assert torch.equal(told[row, :length], attend(*alone, mask=Mask(causal=True, window=64))[0])


def test_a_mask_knows_whether_all_is_seen() -> None:
    two = torch.tensor([3, 5])
    for mask in (
        Mask(), Mask(offsets=two), Mask(causal=True), Mask(window=2), Mask(causal=True, offsets=two), Mask(lengths=two)
    ):  # fmt: skip
        assert mask.sees_all == (mask.dense(4, 9, torch.device("cpu")) is None)
