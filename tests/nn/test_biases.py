"""Attention with a key bias and a pair bias shared over rows: exact in every backend, with all five gradients.

The fused kernels run in Triton's interpreter where there is no GPU: seconds for a small call, so that it is given few.
MODALORA_FUSED_CASES=200 gives it as many as blockwise has.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from modalora.errors import ConfigError, ShapeError
from modalora.nn import blockwise
from modalora.nn.attend import BACKENDS, attend, merge
from modalora.nn.mask import BlockSparse, Mask
from modalora.training.meter import Meter

TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = pytest.param("fused", marks=pytest.mark.skipif(not TRITON, reason="needs triton: pip install -e '.[fused]'"))
OWN = ("eager", "blockwise", FUSED)  # which have all of it
CASES = 200
FUSED_CASES = int(os.environ.get("MODALORA_FUSED_CASES", "8"))


@dataclass(frozen=True)
class Inputs:
    """q, k, v, key_bias, pair_bias and the gradients of output and log-sum-exp, in float64."""

    tensors: tuple[Tensor | None, ...]
    mask: Mask
    upstream: tuple[Tensor, Tensor]

    def results(self, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return what attend gives and all gradients; -inf of the log-sum-exp as 0, in float64."""
        device = "cpu" if backend != "fused" else DEVICE
        cast = [None if x is None else _same_strides(x, dtype, device).requires_grad_() for x in self.tensors]
        q, k, v, key_bias, pair_bias = cast
        assert q is not None
        assert k is not None
        assert v is not None
        out, lse = attend(
            q, k, v, mask=self.mask, key_bias=key_bias, pair_bias=pair_bias, return_lse=True, backend=backend
        )
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        given = (self.upstream[0].to(out), self.upstream[1].to(lse))
        names = ("q", "k", "v", "key_bias", "pair_bias")
        wanted = {name: x for name, x in zip(names, cast, strict=True) if x is not None}
        grads = torch.autograd.grad((out, lse), tuple(wanted.values()), given)
        found = {"out": out.detach(), "lse": lse.detach(), **dict(zip(wanted, grads, strict=True))}
        return {name: x.double().cpu() for name, x in found.items()}


def _same_strides(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)


def strided(shape: tuple[int, ...], rng: random.Random) -> Tensor:
    """Return random numbers whose axes but the last lie in memory in any order."""
    order = [*rng.sample(range(len(shape) - 1), len(shape) - 1), len(shape) - 1]
    x = torch.randn([shape[axis] for axis in order], dtype=torch.float64)
    return x.permute([order.index(axis) for axis in range(len(shape))])


def inputs(seed: int, longest: int) -> Inputs:
    """Return a random call: shapes, strides, biases, masks, some rows that see nothing, logits of any size."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, rows, kv_heads, group = (rng.choice(sizes) for sizes in ((1, 2), (1, 2, 3), (1, 2), (1, 1, 2)))
    head_dim, time = rng.choice((8, 8, 16, 20, 32, 64, 128)), rng.randint(1, longest)
    keys, heads = rng.choice((time, rng.randint(1, longest))), kv_heads * group
    q = strided((batch, rows, time, heads, head_dim), rng) * rng.choice((1.0, 3.0))
    k, v = (strided((batch, rows, keys, kv_heads, head_dim), rng) for _ in range(2))
    key_bias = strided((rng.choice((1, batch)), rng.choice((1, rows)), keys), rng) if rng.random() < 0.6 else None
    if key_bias is not None and rng.random() < 0.5:
        key_bias = key_bias.masked_fill(torch.rand(key_bias.shape) < 0.3, -torch.inf)
    pair_bias = strided((rng.choice((1, batch)), heads, time, keys), rng) if rng.random() < 0.7 else None
    lengths = torch.randint(0, keys + 1, (batch, rows)) if rng.random() < 0.4 else None
    offsets = torch.randint(-2, keys, (batch, rows)) if rng.random() < 0.3 else None
    window = rng.randint(1, keys) if rng.random() < 0.2 else None
    mask = Mask(causal=rng.random() < 0.4 or window is not None, offsets=offsets, lengths=lengths, window=window)
    upstream = (strided((*q.shape,), rng), torch.randn(q.shape[:-1], dtype=torch.float64))
    return Inputs((q, k, v, key_bias, pair_bias), mask, upstream)


def distance(found: Tensor, told: Tensor) -> float:
    return float((found - told).norm() / told.norm().clamp(min=1e-3))


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill memory that nobody has written yet with NaN."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(3).isnan().all())
    assert bool(torch.zeros(1).new_empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


# float32 sums of up to 200 terms: worst seen 2e-6; a bf16 slip (1e-2) or a wrong term must fail
BOUND = 1e-5


@pytest.mark.usefixtures("poison")
def test_blockwise_has_the_outputs_and_gradients_of_float64() -> None:
    for seed in range(CASES):
        case = inputs(seed, longest=70)
        told, found = case.results("eager", torch.float64), case.results("blockwise")
        assert told.keys() == found.keys()
        worst = {name: distance(found[name], told[name]) for name in told}
        assert max(worst.values()) < BOUND, (seed, worst)


@pytest.mark.usefixtures("poison")
@pytest.mark.skipif(not TRITON, reason="needs triton: pip install -e '.[fused]'")
def test_fused_has_the_outputs_and_gradients_of_float64() -> None:
    for seed in range(FUSED_CASES):
        case = inputs(seed, longest=70 if FUSED_CASES >= CASES else 20)
        told, found = case.results("eager", torch.float64), case.results("fused")
        assert told.keys() == found.keys()
        worst = {name: distance(found[name], told[name]) for name in told}
        assert max(worst.values()) < BOUND, (seed, worst)


@pytest.mark.skipif(not TRITON, reason="needs triton: pip install -e '.[fused]'")
def test_fused_in_fp16_errs_no_more_than_twice_what_eager_does() -> None:
    case = plain(length=19, head_dim=16)
    told = case.results("eager", torch.float64)
    eager, fused = case.results("eager", torch.float16), case.results("fused", torch.float16)
    for name, value in told.items():
        assert distance(fused[name], value) < 2 * distance(eager[name], value) + 1e-4, name


def plain(rows: int = 3, length: int = 13, heads: int = 2, head_dim: int = 8) -> Inputs:
    """Return a call with both biases, where every query sees every key."""
    torch.manual_seed(1)
    q, k, v, up = (torch.randn(1, rows, length, heads, head_dim, dtype=torch.float64) for _ in range(4))
    key_bias = torch.randn(1, rows, length, dtype=torch.float64)
    pair_bias = torch.randn(1, heads, length, length, dtype=torch.float64)
    return Inputs((q, k, v, key_bias, pair_bias), Mask(), (up, torch.zeros(q.shape[:-1], dtype=torch.float64)))


def changed(case: Inputs, **new: Tensor) -> Inputs:
    names = ("q", "k", "v", "key_bias", "pair_bias")
    return replace(case, tensors=tuple(new.get(name, x) for name, x in zip(names, case.tensors, strict=True)))


@pytest.mark.parametrize("backend", OWN)
def test_gradients_of_the_biases_sum_to_zero_over_keys(backend: str) -> None:
    found = plain().results(backend)
    for name in ("pair_bias", "key_bias"):
        assert float(found[name].sum(-1).abs().max()) < 1e-5  # float32 rounding of sums of terms near 1


@pytest.mark.parametrize("backend", OWN)
def test_a_constant_added_to_a_query_s_biases_moves_the_log_sum_exp_alone(backend: str) -> None:
    case = plain()
    before = case.results(backend)
    pair_bias = case.tensors[4]
    assert pair_bias is not None
    after = changed(case, pair_bias=pair_bias + 2.5).results(backend)
    torch.testing.assert_close(after.pop("lse"), before.pop("lse") + 2.5, atol=1e-5, rtol=0)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", OWN)
def test_rows_in_another_order_leave_the_pair_bias_its_gradient_and_parts_of_them_add_up(backend: str) -> None:
    case, order = plain(), torch.tensor([2, 0, 1])
    q, k, v, key_bias, pair_bias = case.tensors
    told = case.results(backend)

    def of(rows: Tensor) -> dict[str, Tensor]:
        own = tuple(None if x is None else x[:, rows] for x in (q, k, v, key_bias))
        upstream = (case.upstream[0][:, rows], case.upstream[1][:, rows])
        return Inputs((*own, pair_bias), case.mask, upstream).results(backend)

    moved = of(order)
    torch.testing.assert_close(moved["out"], told["out"][:, order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(moved["pair_bias"], told["pair_bias"], atol=1e-5, rtol=1e-5)
    parts = of(order[:1])["pair_bias"] + of(order[1:])["pair_bias"]
    torch.testing.assert_close(parts, told["pair_bias"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", OWN)
def test_keys_with_all_that_is_theirs_have_no_order(backend: str) -> None:
    case = plain()
    q, k, v, key_bias, pair_bias = case.tensors
    assert k is not None
    assert v is not None
    assert key_bias is not None
    assert pair_bias is not None
    order = torch.randperm(k.shape[2])
    moved = Inputs((q, k[:, :, order], v[:, :, order], key_bias[..., order], pair_bias[..., order]), *_rest(case))
    torch.testing.assert_close(moved.results(backend)["out"], case.results(backend)["out"], atol=2e-6, rtol=1e-5)


def _rest(case: Inputs) -> tuple[Mask, tuple[Tensor, Tensor]]:
    return case.mask, case.upstream


@pytest.mark.parametrize("backend", OWN)
def test_biases_of_zero_are_plain_attention(backend: str) -> None:
    case = plain()
    zeros = {name: torch.zeros_like(x) for name, x in zip(("key_bias", "pair_bias"), case.tensors[3:], strict=True)}
    q, k, v = (x[0].float().transpose(1, 2) for x in case.tensors[:3] if x is not None)
    told = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)[None]
    torch.testing.assert_close(changed(case, **zeros).results(backend)["out"], told.double(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", OWN)
def test_keys_that_a_bias_hides_change_nothing_and_get_no_gradient(backend: str) -> None:
    case = plain(length=9)
    told = case.results(backend)
    q, k, v, key_bias, pair_bias = (x for x in case.tensors if x is not None)
    more = [torch.cat([x, torch.full_like(x[:, :, :4], 7.0)], dim=2) for x in (k, v)]
    hidden = torch.cat([key_bias, torch.full_like(key_bias[..., :4], -torch.inf)], dim=-1)
    pair = torch.cat([pair_bias, torch.zeros_like(pair_bias[..., :4])], dim=-1)
    found = Inputs((q, *more, hidden, pair), *_rest(case)).results(backend)
    for name, value in told.items():
        own = {"k": found[name][:, :, :9], "v": found[name][:, :, :9]}.get(name, found[name][..., : value.shape[-1]])
        torch.testing.assert_close(own, value, atol=1e-5, rtol=1e-5)
    assert not found["k"][:, :, 9:].any()
    assert not found["v"][:, :, 9:].any()
    assert not found["pair_bias"][..., 9:].any()
    assert not found["key_bias"][..., 9:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", OWN)
def test_a_row_whose_every_key_is_hidden_is_zero_and_the_others_do_not_notice(backend: str, dtype: torch.dtype) -> None:
    case = plain()
    told = case.results(backend, dtype)
    key_bias = case.tensors[3]
    assert key_bias is not None
    key_bias = key_bias.clone()
    key_bias[0, 1] = -torch.inf
    found = changed(case, key_bias=key_bias).results(backend, dtype)
    assert all(bool(x.isfinite().all()) for x in found.values())
    for name in ("out", "q", "k", "v", "key_bias"):
        assert not found[name][0, 1].any(), name
        # another row's float16 sums may run in another order: one step at 1
        torch.testing.assert_close(
            found[name][0, ::2], told[name][0, ::2], atol=1e-3 if dtype == torch.float16 else 1e-6, rtol=0
        )


@pytest.mark.parametrize("backend", OWN)
def test_the_log_sum_exp_of_a_row_without_keys_is_minus_infinity(backend: str) -> None:
    q = torch.randn(2, 5, 2, 8, device=DEVICE if backend == "fused" else "cpu")
    mask = Mask(lengths=torch.tensor([0, 5], device=q.device))
    _, lse = attend(q, q, q, mask=mask, return_lse=True, backend=backend)
    assert bool((lse[0] == -torch.inf).all())
    assert bool(lse[1].isfinite().all())


@pytest.mark.parametrize("backend", ["eager", "blockwise"])
def test_the_log_sum_exp_of_bf16_is_float32(backend: str) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 50, 2, 16).bfloat16() for _ in range(2))
    _, lse = attend(q, k, k, mask=Mask(), scale=0.02, return_lse=True, backend=backend)
    assert lse.dtype == torch.float32
    told = 0.02 * torch.einsum("bthd,bkhd->bthk", q.double(), k.double())
    # logits near 0.1 are rounded to 2e-4, and 50 of them are averaged; a sum near 4 in bf16 would be off by 8e-3
    torch.testing.assert_close(lse.double(), told.logsumexp(-1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", OWN)
def test_values_that_are_all_the_same_come_out_and_stop_all_gradients_of_logits(backend: str) -> None:
    case = plain()
    v = case.tensors[2]
    assert v is not None
    found = changed(case, v=torch.full_like(v, 1.5)).results(backend)
    torch.testing.assert_close(found["out"], torch.full_like(found["out"], 1.5), atol=1e-6, rtol=0)
    for name in ("q", "k", "key_bias", "pair_bias"):
        assert float(found[name].abs().max()) < 1e-5, name


@pytest.mark.parametrize("backend", OWN)
def test_attention_over_two_halves_of_the_keys_merges_into_the_whole(backend: str) -> None:
    case = plain()
    q, k, v, key_bias, pair_bias = (_same_strides(x, torch.float32, "cpu") for x in case.tensors if x is not None)
    key_bias[0, 2, :6] = -torch.inf  # nothing of the first half is seen
    key_bias[0, 0] = -torch.inf  # nothing at all
    given = [x.to(DEVICE if backend == "fused" else "cpu").requires_grad_() for x in (q, k, v, key_bias, pair_bias)]
    q, k, v, key_bias, pair_bias = given

    def part(keys: slice) -> tuple[Tensor, Tensor]:
        biases = {"key_bias": key_bias[..., keys], "pair_bias": pair_bias[..., keys]}
        return attend(q, k[:, :, keys], v[:, :, keys], mask=Mask(), **biases, return_lse=True, backend=backend)

    halves, whole = merge(part(slice(0, 6)), part(slice(6, None))), part(slice(None))
    for found, told in zip(halves, whole, strict=True):
        torch.testing.assert_close(found, told, atol=1e-5, rtol=1e-5)
    weight = case.upstream[0].to(q)
    grads = [torch.autograd.grad((out * weight).sum(), given) for out, _ in (halves, whole)]
    for found, told in zip(*grads, strict=True):
        torch.testing.assert_close(found, told, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "blockwise"])
def test_numbers_nearby_confirm_the_gradients(backend: str) -> None:
    case = plain(rows=2, length=4, head_dim=2)
    given = [x.clone().requires_grad_() for x in case.tensors if x is not None]

    def both(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, pair_bias: Tensor) -> tuple[Tensor, Tensor]:
        return attend(
            q, k, v, mask=Mask(causal=True), key_bias=key_bias, pair_bias=pair_bias, return_lse=True, backend=backend
        )

    assert torch.autograd.gradcheck(both, given)


@pytest.mark.parametrize("backend", ["blockwise", FUSED])
def test_two_runs_have_the_same_bits(backend: str) -> None:
    case = plain(length=21)
    one, other = case.results(backend), case.results(backend)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(not TRITON, reason="needs triton: pip install -e '.[fused]'")
def test_a_gradient_of_the_fused_gradient_is_refused() -> None:
    q = torch.randn(1, 4, 2, 8, device=DEVICE, requires_grad=True)
    (once,) = torch.autograd.grad(attend(q, q, q, mask=Mask(), backend="fused").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


@pytest.mark.parametrize("power", [1, 2])  # a constant gradient of the output must not make those behind it constant
def test_a_gradient_of_the_gradient_in_tiles_is_refused(power: int) -> None:
    def loss(q: Tensor) -> Tensor:
        return (attend(q, q, q, mask=Mask(), backend="blockwise") ** power).sum()

    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    (once,) = torch.autograd.grad(loss(q), q, create_graph=True)
    with pytest.raises(ConfigError, match="attend is differentiable once"):
        (once.sum() + q.sum()).backward()
    with pytest.raises(ConfigError, match="attend is differentiable once"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q.detach())


@pytest.mark.parametrize("backend", ["eager", "blockwise"])
def test_func_grad_gives_the_bits_of_backward(backend: str) -> None:
    case = plain(length=21)
    given = tuple(x.requires_grad_() for x in case.tensors if x is not None)

    def loss(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, pair_bias: Tensor) -> Tensor:
        out = attend(q, k, v, mask=case.mask, key_bias=key_bias, pair_bias=pair_bias, backend=backend)
        return (out * case.upstream[0]).sum()

    told = torch.autograd.grad(loss(*given), given)
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*(x.detach() for x in given))
    for one, other in zip(found, told, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["eager", "blockwise", None])
def test_tensors_without_numbers_have_a_shape(backend: str | None) -> None:
    q, bias = torch.empty(1, 3, 700, 2, 8, device="meta"), torch.empty(1, 2, 700, 700, device="meta")
    assert attend(q, q, q, mask=Mask(), pair_bias=bias, backend=backend).shape == q.shape


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", OWN)
def test_recomputing_gives_the_same_bits(backend: str, reentrant: bool) -> None:
    q = torch.randn(1, 3, 7, 2, 8, device=DEVICE if backend == "fused" else "cpu", requires_grad=True)
    bias = torch.randn(1, 2, 7, 7, device=q.device, requires_grad=True)

    def call(q: Tensor, bias: Tensor) -> Tensor:
        return attend(q, q, q, mask=Mask(), pair_bias=bias, backend=backend)

    told = torch.autograd.grad(call(q, bias).square().sum(), (q, bias))
    checkpoint(call, q, bias, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(told[0], q.grad)  # type: ignore[arg-type]
    assert torch.equal(told[1], bias.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["eager", "blockwise", "sdpa"])
def test_autocast_decides_the_dtype_of_the_products(backend: str) -> None:
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, q, q.bfloat16(), mask=Mask(), pair_bias=torch.randn(1, 2, 5, 5), backend=backend)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_the_size_of_tiles_is_seen_in_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case = inputs(seed=5, longest=70)
    told = case.results("blockwise", torch.float64)
    for name, value in (("BYTES", 2**9), ("MOST", 2**11), ("FEWEST", 3), ("TILE", 14)):
        monkeypatch.setattr(blockwise, name, value)
    found = case.results("blockwise", torch.float64)
    assert max(distance(found[name], told[name]) for name in told) < 1e-13


@pytest.mark.parametrize(
    "mask",
    [Mask(), Mask(causal=True), Mask(causal=True, window=40), Mask(causal=True, blocks=BlockSparse(block=8, local=2))],
)
def test_blockwise_holds_no_scores_and_twice_the_length_is_twice_the_memory(
    mask: Mask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "BYTES", 2**13)  # at its 1.5 MB, lengths as small as these would be one tile
    monkeypatch.setattr(blockwise, "MOST", 2**15)
    peaks = []
    for length in (128, 256, 512):
        case = plain(rows=4, length=length, heads=2, head_dim=8)
        given = [x.float().requires_grad_() for x in case.tensors if x is not None]
        q, k, v, key_bias, pair_bias = given
        meter, upstream = Meter(FakeTensorMode()), case.upstream[0].float()
        for tensor in (*given, upstream):
            meter.hold(tensor)
        biases = 2 * 4 * pair_bias.numel()
        with meter:
            out = attend(q, k, v, mask=mask, key_bias=key_bias, pair_bias=pair_bias, backend="blockwise")
            torch.autograd.grad(out, given, upstream)
        peaks.append(meter.peak - biases)
    scores = 4 * 4 * 2 * 512**2
    assert peaks[2] < scores, "something of the size of the scores lives"
    assert all(after <= 2.1 * before for before, after in zip(peaks, peaks[1:], strict=False))


def test_blockwise_keeps_its_inputs_alone_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    given = [x.float().requires_grad_() for x in plain().tensors if x is not None]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        q, k, v, key_bias, pair_bias = given
        attend(q, k, v, mask=Mask(), key_bias=key_bias, pair_bias=pair_bias, backend="blockwise")
    assert {x.untyped_storage().data_ptr() for x in kept} <= {x.untyped_storage().data_ptr() for x in given}


def test_a_backend_that_cannot_do_a_call_names_those_that_can() -> None:
    q, bias = torch.randn(1, 2, 4, 2, 8), torch.randn(1, 2, 4, 4)
    with pytest.raises(
        ConfigError, match="'sdpa' cannot do a key bias together with a pair bias; these can: eager, bl"
    ):
        attend(q, q, q, mask=Mask(), key_bias=torch.randn(1, 2, 4), pair_bias=bias, backend="sdpa")
    with pytest.raises(ConfigError, match="'sdpa' cannot do the log-sum-exp; these can: eager, blockwise"):
        attend(q, q, q, mask=Mask(), return_lse=True, backend="sdpa")
    if TRITON:
        with pytest.raises(ConfigError, match="'fused' cannot do torch.float64; these can: eager, sdpa, blockwise"):
            attend(q.double(), q.double(), q.double(), mask=Mask(), backend="fused")
        with pytest.raises(ConfigError, match="'fused' cannot do a block-sparse mask"):
            attend(q, q, q, mask=Mask(causal=True, blocks=BlockSparse()), backend="fused")
        wide = torch.randn(1, 2, 2, 160)
        with pytest.raises(ConfigError, match="'fused' cannot do head_dim 160"):
            attend(wide, wide, wide, mask=Mask(), backend="fused")
    else:
        with pytest.raises(ConfigError, match="'fused' cannot do anything without triton"):
            attend(q, q, q, mask=Mask(), backend="fused")


def test_every_backend_has_a_record_and_eager_is_the_reference() -> None:
    assert {name for name, backend in BACKENDS.items() if backend.float64_reference} == {"eager", "blockwise"}
    assert {name for name, backend in BACKENDS.items() if backend.linear_memory} == {"blockwise", "fused"}


def test_biases_that_do_not_fit_are_refused() -> None:
    q = torch.randn(2, 3, 4, 2, 8)
    with pytest.raises(
        ShapeError, match=r"key_bias \(2, 4\) does not fit 4 keys: it is \(1 or batch, 1 or rows, keys\)"
    ):
        attend(q, q, q, mask=Mask(), key_bias=torch.randn(2, 4))
    with pytest.raises(ShapeError, match="with no axis of rows"):
        attend(q, q, q, mask=Mask(), pair_bias=torch.randn(2, 3, 2, 4, 4))
    with pytest.raises(ShapeError, match="expanded over batch"):
        attend(q, q, q, mask=Mask(), pair_bias=torch.randn(1, 2, 4, 4).expand(2, -1, -1, -1))
    with pytest.raises(ShapeError, match="make them one dtype"):
        attend(q, q, q.double(), mask=Mask())
    with pytest.raises(ShapeError, match="do not fit"):
        attend(q, q[:, :2], q, mask=Mask())


@pytest.mark.parametrize("backend", ["eager", "blockwise", "sdpa"])
def test_rows_end_to_end_and_padded_rows_have_their_parts_of_the_biases(backend: str) -> None:
    torch.manual_seed(2)
    q, bias, key_bias = torch.randn(1, 9, 2, 8), torch.randn(1, 2, 9, 9), torch.randn(1, 9)
    for biases in ({"pair_bias": bias}, {"key_bias": key_bias}):
        joined = attend(q, q, q, mask=Mask(spans=(4, 5)), **biases, backend=backend)
        for own in (slice(0, 4), slice(4, 9)):
            alone = {name: x[..., own, own] if name == "pair_bias" else x[..., own] for name, x in biases.items()}
            told = attend(q[:, own], q[:, own], q[:, own], mask=Mask(), **alone, backend="eager")
            torch.testing.assert_close(joined[:, own], told, atol=1e-5, rtol=1e-5)
    out, lse = attend(q, q, q, mask=Mask(padded=torch.tensor([6])), key_bias=key_bias, return_lse=True)
    own = q[:, :6]
    told, top = attend(own, own, own, mask=Mask(), key_bias=key_bias[:, :6], return_lse=True, backend="eager")
    torch.testing.assert_close(out[:, :6], told, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:, :6], top, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 300])
def test_what_tiles_of_a_causal_row_may_see_grows_with_its_length(window: int | None) -> None:
    peaks = []
    for length in (4096, 8192):
        given = [torch.randn(1, length, 1, 8, requires_grad=True) for _ in range(3)]
        with Meter(FakeTensorMode()) as meter:
            out = attend(*given, mask=Mask(causal=True, window=window), backend="blockwise")
            torch.autograd.grad(out, given, torch.ones_like(out))
        peaks.append(meter.peak)
    # tiles are of as many logits at both lengths; pairs of bool, kept for all of them, would be 8 and 32 MB
    assert peaks[1] - peaks[0] < 2**22
