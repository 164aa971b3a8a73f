"""Routed Linears: LoRA's algebra, and that an idle adapter touches nothing."""

from __future__ import annotations

import pytest
import torch

from modalora.contracts import Route
from modalora.errors import ConfigError
from modalora.nn.lora import LoraConfig, RoutedLinear

# float32 sums over 16 channels; worst seen 8e-7
TOLERANCE = {"atol": 3e-6, "rtol": 1e-5}


def linear(*, dropout: float = 0.0, moved: bool = True) -> RoutedLinear:
    torch.manual_seed(0)
    layer = RoutedLinear(16, 12)
    layer.add_adapter("a", LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout))
    layer.add_adapter("b", LoraConfig(r=2, lora_alpha=4))
    if moved:
        for up in layer.lora_B.values():
            torch.nn.init.normal_(up)
    return layer


def fill(layer: RoutedLinear, name: str, value: float) -> None:
    with torch.no_grad():
        layer.lora_A[name].fill_(value)
        layer.lora_B[name].fill_(value)


def test_a_fresh_adapter_changes_no_value() -> None:
    layer = linear(moved=False)
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer(x, Route(("a", "a"))), layer(x, Route((None, None))))
    assert float(layer.lora_A["a"].detach().abs().max()) <= 16**-0.5  # Kaiming-uniform with a = sqrt(5)


def test_an_adapter_equals_its_merged_weight() -> None:
    layer = linear()
    x = torch.randn(3, 5, 16)
    merged = layer.weight + 2.0 * layer.lora_B["a"] @ layer.lora_A["a"]
    torch.testing.assert_close(layer(x, Route(("a",) * 3)), x @ merged.T, **TOLERANCE)
    assert layer.adapters["a"].scaling == layer.adapters["b"].scaling == 2.0


def test_rows_of_a_mixed_batch_equal_rows_alone() -> None:
    layer, names = linear(), ("a", None, "b", "a", None)
    x = torch.randn(5, 3, 16)
    mixed = layer(x, Route(names))
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], layer(x[row : row + 1], Route((name,)))[0], **TOLERANCE)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_idle_adapters_change_no_bit_of_a_row(poison: float) -> None:
    layer = linear()
    x = torch.randn(3, 4, 16)
    for route in (Route(("a", None, "a")), Route((None, None, None)), Route(("a", "a", "a"))):
        clean = layer(x, route)
        kept = [tensor.detach().clone() for tensor in (layer.lora_A["b"], layer.lora_B["b"])]
        fill(layer, "b", poison)
        assert torch.equal(layer(x, route), clean)
        with torch.no_grad():
            layer.lora_A["b"].copy_(kept[0])
            layer.lora_B["b"].copy_(kept[1])


def test_rows_beside_a_poisoned_adapter_in_one_batch_keep_every_bit() -> None:
    layer, route = linear(), Route(("a", "b", None))
    x = torch.randn(3, 4, 16)
    clean = layer(x, route)
    fill(layer, "b", float("nan"))
    poisoned = layer(x, route)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])
    assert bool(poisoned[1].isnan().all())


def test_gradients_do_not_meet_an_idle_adapter() -> None:
    grads = []
    for poison in (0.5, float("nan")):
        layer = linear()
        fill(layer, "b", poison)
        torch.manual_seed(1)
        x = torch.randn(3, 4, 16, requires_grad=True)
        layer(x, Route(("a", None, "a"))).square().sum().backward()
        assert layer.lora_A["b"].grad is None
        assert layer.lora_B["b"].grad is None
        grads.append((x.grad, layer.weight.grad, layer.lora_A["a"].grad, layer.lora_B["a"].grad))
    for clean, poisoned in zip(*grads, strict=True):
        assert clean is not None
        assert torch.equal(clean, poisoned)


def test_dropout_acts_in_training_only_and_on_the_adapter_only() -> None:
    layer = linear(dropout=0.5)
    x = torch.ones(2, 4, 16)
    route = Route(("a", None))
    layer.eval()
    told = layer(x, route)
    assert torch.equal(layer(x, route), told)
    layer.train()
    dropped = layer(x, route)
    assert not torch.equal(dropped[0], told[0])
    assert torch.equal(dropped[1], told[1])


@pytest.mark.parametrize("fields", [{"r": 0}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}])
def test_sizes_outside_their_bounds_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        LoraConfig(**{"r": 4, "lora_alpha": 8, **fields})
