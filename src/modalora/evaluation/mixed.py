"""Does a row of a mixed batch compute what it computes alone?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modalora.assistant import Assistant
from modalora.contracts import Batch, Message
from modalora.models.multimodal import part_of


def worst_differences(assistant: Assistant, conversations: Sequence[Sequence[Message]]) -> tuple[float, float]:
    """Return the largest absolute differences between one mixed batch and its rows alone: of logits, and of the
    gradients of adapters, projectors and encoders (of the mean loss over all labelled tokens).
    """
    processor, model = assistant.processor, assistant.model
    batch = processor.collate([processor.row(messages, answer=False) for messages in conversations])
    batch = batch.to(assistant.device)
    rows = [batch.select([row]) for row in range(len(batch.input_ids))]
    trained = {name: parameter for name, parameter in model.named_parameters() if part_of(name) != "decoder"}
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        with torch.no_grad():
            mixed = model(batch)
            logits = max(
                float((mixed[row, : int(alone.lengths[0])] - model(alone)[0]).abs().max())
                for row, alone in enumerate(rows)
            )
        together, apart = _gradients(assistant, [batch], trained), _gradients(assistant, rows, trained)
        gradients = max(float((together[name] - apart[name]).abs().max()) for name in trained)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
    return logits, gradients


def _gradients(
    assistant: Assistant, batches: Sequence[Batch], trained: dict[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    model = assistant.model
    model.zero_grad(set_to_none=True)
    losses = [model.loss(batch)[0] for batch in batches]
    mean = torch.stack([values.sum() for values in losses]).sum() / sum(len(values) for values in losses)
    if mean.requires_grad:  # text rows alone reach no adapter
        mean.backward()
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in trained.items()
    }
    model.zero_grad(set_to_none=True)
    return found
