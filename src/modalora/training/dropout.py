"""Dropout of encoders, which as published have none: what a recipe adds where few voices or pictures are at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from modalora.errors import ConfigError
from modalora.models.multimodal import Multimodal, matches, part_of


def add_dropout(model: Multimodal, rates: Mapping[str, float]) -> list[RemovableHandle]:
    """Let training drop a share of what each block of an encoder hands on; return what takes that away again.

    rates: pattern of parts -> share, such as {"audio.encoder": 0.2}. What is kept is scaled by 1 / (1 - share). Raises
    ConfigError for a pattern that matches no encoder that trains.
    """
    trained = {part_of(name) for name, own in model.named_parameters() if own.requires_grad}
    handles = []
    for pattern, rate in rates.items():
        chosen = [name for name in model.encoders if matches(f"{name}.encoder", pattern)]
        learning = [name for name in chosen if f"{name}.encoder" in trained]
        if not learning:
            told = "is not in train:" if chosen else "matches no encoder of this model"
            known = ", ".join(f"{name}.encoder" for name in model.encoders) or "none"
            raise ConfigError(f"dropout: {pattern!r} {told}; the model's encoders are {known}")
        for name in learning:
            for block in _blocks(model.encoders[name]):
                handles.append(block.register_forward_hook(partial(_drop, rate)))
    return handles


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of each list in a network, and what stands beside a list."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from _blocks(child)
        else:
            yield child


def _drop(rate: float, block: nn.Module, given: tuple[Any, ...], out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        raise ConfigError(
            f"dropout: a {type(block).__name__} of the encoder hands on a {type(out).__name__}, and only a tensor can "
            "be dropped from; put it into a module that returns its tensor, or leave dropout out"
        )
    return functional.dropout(out, rate, block.training)
