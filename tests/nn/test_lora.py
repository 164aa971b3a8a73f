"""Routed Linears: LoRA's algebra, and that an idle adapter touches nothing."""

from __future__ import annotations

import pytest
import torch

from modalora.contracts import Route
from modalora.errors import ConfigError
from modalora.nn.lora import LoraConfig, Made, RoutedLinear

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


def by_autograd(layer: RoutedLinear, x: torch.Tensor, names: tuple[str | None, ...]) -> torch.Tensor:
    """The rows one by one, from plain operations."""
    rows = []
    for row, name in zip(x, names, strict=True):
        y = torch.nn.functional.linear(row, layer.weight, layer.bias)
        if name is not None:
            y = y + layer.adapters[name].scaling * row @ layer.lora_A[name].T @ layer.lora_B[name].T
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("names", [("a", "a", "a"), ("a", None, "b"), ("b", "a", "b"), (None, None, None)])
@pytest.mark.parametrize("end_to_end", [False, True])
def test_every_gradient_is_that_of_plain_operations(names: tuple[str | None, ...], end_to_end: bool) -> None:
    torch.manual_seed(0)
    layer = RoutedLinear(16, 12, bias=True)
    for name, rank in (("a", 4), ("b", 2)):
        layer.add_adapter(name, LoraConfig(r=rank, lora_alpha=8))
        torch.nn.init.normal_(layer.lora_B[name])
    layer = layer.double()
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    shape, route = ((1, 15, 16), Route(names, (5, 5, 5))) if end_to_end else ((3, 5, 16), Route(names))
    y = layer(x.view(shape), route).view(3, 5, 12)
    told = by_autograd(layer, x, names)
    upstream = torch.randn_like(y)
    wanted = [x, *layer.parameters()]
    found, expected = (torch.autograd.grad(out, wanted, upstream, allow_unused=True) for out in (y, told))
    torch.testing.assert_close(y, told, atol=1e-12, rtol=1e-12)  # float64 rounding
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def saved(layer: RoutedLinear, x: torch.Tensor, *given: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a call returns, and what it keeps for a backward pass."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return layer(x, *given), kept


def test_a_frozen_linear_keeps_no_input_and_a_trained_adapter_keeps_it_once() -> None:
    layer = linear().requires_grad_(False)
    x = torch.randn(1, 6, 16, requires_grad=True)
    _, kept = saved(layer, x, Route(("a",)))
    own = {id(parameter) for parameter in layer.parameters()}
    assert [tensor.shape for tensor in kept if id(tensor) not in own] == [(6, 4)]  # what lies between A and B
    for matrix in (layer.lora_A["a"], layer.lora_B["a"]):
        matrix.requires_grad_(True)
    y, kept = saved(layer, x, Route(("a",)))
    assert [tensor.shape for tensor in kept if id(tensor) not in own] == [(1, 6, 16), (6, 4)]
    y.sum().backward()
    assert layer.weight.grad is None


def test_an_input_that_can_be_made_again_is_not_kept() -> None:
    layer = linear().requires_grad_(False)
    layer.lora_A["a"].requires_grad_(True)
    source = torch.randn(1, 6, 16, requires_grad=True)
    grads = []
    for made in (None, Made(source, torch.sigmoid)):
        x = torch.sigmoid(source)
        y, kept = saved(layer, x, Route(("a",)), made)
        held = {tensor.data_ptr() for tensor in kept}
        assert (x.data_ptr() in held, source.data_ptr() in held) == (made is None, made is not None)
        grads.append(torch.autograd.grad(y.square().sum(), (source, layer.lora_A["a"])))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("route", [Route(("a", "a")), Route(("a", None)), Route(("a", None), (4, 4))])
def test_what_dropout_keeps_is_scaled_up(route: Route) -> None:
    layer = linear(dropout=0.25).double().train()
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    rows = x[:1] if None in route.adapters else x
    torch.manual_seed(7)
    kept = torch.empty(rows.shape, dtype=torch.bool).bernoulli_(0.75)
    told = x @ layer.weight.T
    told[: len(rows)] += 2.0 * (rows * kept / 0.75) @ layer.lora_A["a"].T @ layer.lora_B["a"].T  # alpha / r is 2
    torch.manual_seed(7)
    found = layer(x.view(1, 8, 16) if route.spans else x, route).view(told.shape)
    torch.testing.assert_close(found, told, atol=1e-12, rtol=1e-12)  # float64 rounding


def test_dropout_meets_the_same_entries_forward_and_backward() -> None:
    layer = linear(dropout=0.5).double().train()
    x = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        out: torch.Tensor = layer(x, Route(("a",)))
        return out

    assert torch.autograd.gradcheck(run, (x, layer.lora_A["a"], layer.lora_B["a"]))


@pytest.mark.parametrize("fields", [{"r": 0}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}])
def test_sizes_outside_their_bounds_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        LoraConfig(**{"r": 4, "lora_alpha": 8, **fields})


def test_names_of_modules_are_met_whole_from_their_end() -> None:
    name = "model.layers.0.mlp.gate_up_proj"
    for end, is_met in (("up_proj", False), ("gate_up_proj", True), ("mlp.gate_up_proj", True), (name, True)):
        assert LoraConfig(r=4, lora_alpha=8, target_modules=(end,)).targets(name) is is_met
        config = LoraConfig(r=4, lora_alpha=8, rank_pattern={end: 2}, alpha_pattern={end: 3})
        assert (config.at(name).r, config.at(name).lora_alpha) == ((2, 3) if is_met else (4, 8))


def test_a_quantised_linear_still_gives_the_rows_that_tell_matrices_apart() -> None:
    layer = linear()
    told = layer.some_rows()
    assert told.shape == (4, 16)
    layer.quantize(8)
    assert torch.equal(layer.some_rows(), told)
