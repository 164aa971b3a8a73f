"""Recompute: fewer tensors kept, the same bits."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from modalora.contracts import Batch
from modalora.models.multimodal import Multimodal, recompute

Model = Callable[..., Multimodal]
Rows = Callable[..., Batch]


def step(model: Multimodal, batch: Batch) -> tuple[list[torch.Tensor | None], int]:
    """All gradients of a batch, and the bytes that the forward pass kept for them beside the weights."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)  # dropout
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        values, _ = model.loss(batch)
    values.sum().backward()
    return [parameter.grad for parameter in model.parameters()], sum(kept.values())


def test_every_gradient_has_the_same_bits_and_less_is_kept(make_model: Model, make_batch: Rows) -> None:
    batch = make_batch(("text", "image + speech", "speech", "image"), words=40)
    found = []
    for again in (False, True):
        model = make_model().train()  # the speech adapter has dropout
        if again:
            recompute(model)
        found.append(step(model, batch))
    (grads, kept), (others, kept_again) = found
    for grad, other in zip(grads, others, strict=True):
        assert (grad is None) == (other is None)
        assert grad is None or (other is not None and torch.equal(grad, other))
    assert kept_again < 0.5 * kept


def test_offloaded_inputs_leave_the_device_and_come_back_with_the_same_bits(
    make_model: Model, make_batch: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(*, pin_memory: bool) -> saved_tensors_hooks:  # as from a GPU: tensors on a CPU are not copied
        return saved_tensors_hooks(lambda tensor: tensor.numpy(force=True).copy(), torch.from_numpy)

    monkeypatch.setattr("modalora.nn.recompute.save_on_cpu", elsewhere)
    batch = make_batch(("text", "image"), words=40)
    found, gone = [], []
    for offload in (False, True):
        model = make_model().train()
        recompute(model, offload=offload)
        inputs: list[weakref.ref[torch.Tensor]] = []
        model.decoder.layers[1].register_forward_pre_hook(
            lambda module, given, to=inputs: to.append(weakref.ref(given[0]))
        )
        values, _ = model.loss(batch)
        gone.append(inputs[0]() is None)
        values.sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert gone == [False, True]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_layer_runs_again_for_a_gradient_only(make_model: Model, make_batch: Rows) -> None:
    model, batch = make_model(), make_batch(["text"])
    names = list(model.state_dict())
    seen: list[int] = []
    recompute(model)
    for layer in model.decoder.layers:
        layer.mlp.register_forward_pre_hook(lambda module, given: seen.append(1))
    with torch.no_grad():
        model.loss(batch)
    assert len(seen) == 2
    model.loss(batch)[0].sum().backward()
    assert len(seen) == 2 + 4
    assert list(model.state_dict()) == names
