"""float32 products through oneDNN: as exact as before, only where they should be, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from modalora.contracts import Batch, Route
from modalora.models.multimodal import FEW, ModelConfig, Multimodal
from modalora.models.sizes import nano
from modalora.nn import products
from modalora.nn.products import EXACT, SETTING, gains, wide_products

AMD = {"cpu_name": "AMD EPYC", "amx_tile": False}


def setting() -> str:
    return str(SETTING.fp32_precision)


@pytest.fixture
def fresh() -> Iterator[None]:
    gains.cache_clear()
    yield
    gains.cache_clear()


@pytest.fixture
def amd(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gains, whatever this one is."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products, "_is_exact", lambda: True)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="a rule of MKL's kernels")
def test_row_has_the_same_bits_in_few_rows_as_in_many() -> None:
    numbers, threads = torch.Generator().manual_seed(2), torch.get_num_threads()
    torch.set_num_threads(1)  # two threads may share out a taller product by its columns
    try:
        for inner, columns in ((256, 512), (256, 1536), (768, 256), (256, 4096), (144, 432), (256, 16), (16, 768)):
            x, weight = (torch.randn(rows, inner, generator=numbers) for rows in (64, columns))
            bias = torch.randn(columns, generator=numbers)
            whole = products.linear(x, weight, bias)
            assert torch.equal(whole, functional.linear(x, weight, bias))
            for rows in range(2, products.HEIGHT):
                few = products.linear(x[20 : 20 + rows], weight, bias)
                assert torch.equal(few, whole[20 : 20 + rows]), (inner, columns, rows)
                assert torch.equal(products.linear(x[None, 20 : 20 + rows], weight, bias)[0], few)
    finally:
        torch.set_num_threads(threads)


def test_single_tokens_and_other_types_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "pad", lambda *_: pytest.fail("a decoding step would cost 16 rows"))
    weight = torch.eye(8)
    for x in (torch.ones(5, 1, 8), torch.ones(8), torch.ones(1, 5, 8, dtype=torch.bfloat16), torch.ones(2, 8, 8)):
        assert torch.equal(products.linear(x, weight.to(x.dtype)), x)


def test_products_inside_are_as_near_to_float64_as_float32_is() -> None:
    numbers = torch.Generator().manual_seed(1)
    for rows, inner, columns in ((1, 256, 768), (3, 37, 100), (777, 768, 256), (2048, 64, 64)):
        x = torch.randn(rows, inner, generator=numbers, requires_grad=True)
        y = torch.randn(inner, columns, generator=numbers, requires_grad=True)
        upstream = torch.randn(rows, columns, generator=numbers)
        with wide_products():
            found = x @ y
            to_x, to_y = torch.autograd.grad(found, (x, y), upstream)
        wanted: tuple[Tensor, ...] = (
            x.double() @ y.double(), upstream.double() @ y.double().T, x.double().T @ upstream.double()
        )  # fmt: skip
        for ours, exact in zip((found, to_x, to_y), wanted, strict=True):
            assert (ours - exact).norm() <= EXACT * exact.norm()


def test_setting_is_there_inside_and_gone_behind_even_after_an_error(amd: None) -> None:
    assert setting() == "none"

    @wide_products()
    def fails() -> None:
        assert setting() == "bf16"
        with wide_products():  # the inner one neither sets nor takes away
            assert setting() == "bf16"
        assert setting() == "bf16"
        raise RuntimeError("within")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="within"):
            fails()
    assert setting() == "none"
    assert torch.get_float32_matmul_precision() == "highest"  # torch refuses to tell while it is set


def test_a_callers_own_setting_stands(amd: None) -> None:
    SETTING.fp32_precision = "ieee"
    try:
        with wide_products():
            assert setting() == "ieee"
        assert setting() == "ieee"
    finally:
        SETTING.fp32_precision = "none"


@pytest.mark.parametrize(
    "told", [{}, AMD | {"amx_tile": True}, AMD | {"cpu_name": "Intel(R) Xeon(R)"}, {"cpu_name": "AMD EPYC"}]
)
def test_other_machines_are_left_alone(amd: None, monkeypatch: pytest.MonkeyPatch, told: dict[str, object]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    with wide_products():
        assert setting() == "none"


def test_not_beside_a_gpu_nor_without_avx512(amd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gains()
    for module, name, value in (
        (torch.cuda, "is_available", True), (torch.backends.cpu, "get_cpu_capability", "AVX2"),
        (torch.backends.mkldnn, "is_available", False),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda value=value: value)
            gains.cache_clear()
            assert not gains(), name


def test_a_machine_whose_products_round_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.bmm

    def rounded(x: Tensor, y: Tensor) -> Tensor:
        return product(x.bfloat16().float(), y.bfloat16().float())

    assert products._is_exact()
    monkeypatch.setattr(torch, "bmm", rounded)
    assert not products._is_exact()


@pytest.mark.parametrize(("tokens", "expected"), [(FEW - 1, "none"), (FEW, "bf16")])
def test_only_prompts_long_enough_are_read_so(amd: None, tokens: int, expected: str) -> None:
    model = Multimodal(ModelConfig(decoder=nano().decoder))
    seen: list[str] = []
    model.decoder.register_forward_hook(lambda *_: seen.append(setting()))
    with torch.no_grad():
        model.read(
            Batch(torch.zeros(1, tokens, dtype=torch.long), torch.tensor([tokens]), Route((None,))), model.new_cache(1)
        )
    assert seen == [expected]
    assert setting() == "none"
