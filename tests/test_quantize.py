"""Adapters that train on a decoder in few bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import modalora
from modalora.checkpoint.write import save_model
from modalora.contracts import Batch, Route
from modalora.errors import ConfigError
from modalora.models.multimodal import Multimodal, part_of
from modalora.models.sizes import tiny
from modalora.nn.quantised import KINDS
from modalora.quantize import quantize, restore


def nano() -> modalora.Assistant:
    return modalora.load("nano", dtype="float32")


def batch(assistant: modalora.Assistant) -> Batch:
    said = [{"role": "user", "content": "What is the sky?"}, {"role": "assistant", "content": "It is blue."}]
    row = assistant.processor.row(said, answer=False)
    made = assistant.processor.collate([row])
    return Batch(made.input_ids, made.lengths, Route(("vision",)), labels=made.input_ids)


def gradients(model: Multimodal, given: Batch, *, autocast: bool = False) -> dict[str, torch.Tensor]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) == "adapter.vision")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values, _ = model.loss(given)
    values.mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_a_model_stored_as_int8_computes_the_same_bits_in_int8() -> None:
    assistant = nano()
    given = batch(assistant)
    before, grads = assistant.model(given).detach(), gradients(assistant.model, given)
    assistant.model.zero_grad(set_to_none=True)
    quantize(assistant.model, 8)
    assert torch.equal(assistant.model(given).detach(), before)
    others = gradients(assistant.model, given)
    assert grads.keys() == others.keys()
    assert all(torch.equal(grad, others[name]) for name, grad in grads.items())


def test_a_model_is_quantised_once_and_whole_or_not_at_all() -> None:
    model = nano().model
    quantize(model, 8)
    for bits in (8, 4):
        with pytest.raises(ConfigError, match="quantised already"):
            quantize(model, bits)
    narrow = Multimodal(tiny())  # rows of 96 numbers: no multiple of 64
    with pytest.raises(ConfigError, match=r"4 bits take rows of a multiple of 64 numbers; this matrix is \(64, 96\)"):
        quantize(narrow, 4)
    assert not narrow.decoder.is_quantised


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_logits_and_gradients_are_those_of_the_expanded_matrices(bits: int) -> None:
    found = []
    for expanded in (False, True):
        assistant = nano()
        given = batch(assistant)
        if expanded:
            for linear in assistant.model.decoder.routed().values():
                linear.weight.data = KINDS[bits](linear.weight).expand(torch.float32)
        else:
            quantize(assistant.model, bits)
        found.append((assistant.model(given).detach(), gradients(assistant.model, given)))
    (logits, grads), (told, others) = found
    assert torch.equal(logits, told)
    assert len(grads) > 0
    assert all(torch.equal(grad, others[name]) for name, grad in grads.items())


def test_sixteen_bits_change_no_bit_of_a_bf16_step() -> None:
    found = []
    for bits in (None, 16):
        assistant = nano()
        given = batch(assistant)
        if bits is not None:
            quantize(assistant.model, bits)
        with torch.autocast("cpu", torch.bfloat16):
            values, _ = assistant.model.loss(given)
        found.append((values.detach(), gradients(assistant.model, given, autocast=True)))
    (values, grads), (others, other_grads) = found
    assert torch.equal(values, others)
    assert all(torch.equal(grad, other_grads[name]) for name, grad in grads.items())


def test_four_bits_stay_near_the_whole_model() -> None:
    assistant = nano()
    given = batch(assistant)
    with torch.no_grad():
        told = assistant.model(given).log_softmax(-1)
        quantize(assistant.model, 4)
        found = assistant.model(given).log_softmax(-1)
    away = (told.exp() * (told - found)).sum(-1).mean()
    assert 1e-4 < float(away) < 0.2  # nats per token; seen 0.05


def test_memory_of_the_linears_falls_and_restoring_brings_every_bit_back(tmp_path: Path) -> None:
    assistant, whole = nano(), nano()
    given = batch(assistant)
    before = {name: tensor.clone() for name, tensor in assistant.model.state_dict().items()}
    quantize(assistant.model, 4)
    held = sum(
        linear.weight.untyped_storage().nbytes() + sum(buffer.nbytes for buffer in linear.buffers())
        for linear in assistant.model.decoder.routed().values()
    )
    plain = sum(linear.weight.nbytes for linear in whole.model.decoder.routed().values())
    assert held < plain * 4.3 / 32
    with pytest.raises(ConfigError, match="quantised"):
        save_model(assistant.model, assistant.processor.tokenizer, tmp_path / "m")
    restore(assistant.model, whole.model)
    after = assistant.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(assistant.model(given), whole.model(given))


def test_other_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits=3 must be 16, 8 or 4"):
        quantize(nano().model, 3)


def test_no_quantised_matrix_asks_for_a_gradient() -> None:
    model = Multimodal(tiny())
    assert all(linear.weight.requires_grad for linear in model.decoder.routed().values())
    quantize(model, 8)
    assert not any(linear.weight.requires_grad for linear in model.decoder.routed().values())
