"""Every rank runs the same collectives in the same order, whatever its rows hold.

A sharded part is gathered by all ranks together. A rank whose rows have no image, or leave an adapter idle, must still
take its turn: it encodes a smallest item whose features no row gets, and an idle adapter's gradient is zero. Both are
exact, since nothing is multiplied by zero (nn/gate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from modalora.contracts import Batch, Route, terms
from modalora.models.multimodal import Multimodal
from modalora.nn.gate import gate
from modalora.nn.lora import Made, RoutedLinear


def gate_adapters(model: nn.Module) -> None:
    """Give every trained adapter a gradient in every backward pass, of zeros where it was idle, in one order."""
    for module in model.modules():
        if isinstance(module, RoutedLinear) and module.adapters:
            module.forward = _gated(module)  # type: ignore[method-assign]


def _gated(linear: RoutedLinear) -> Callable[..., Tensor]:
    plain = linear.forward

    def forward(x: Tensor, route: Route, made: Made | None = None) -> Tensor:
        gated: dict[str, Tensor] = {}
        for name in linear.adapters:
            for key, matrix in ((f"lora_A.{name}", linear.lora_A[name]), (f"lora_B.{name}", linear.lora_B[name])):
                if matrix.requires_grad:
                    x, gated[key] = gate(x, matrix)  # one by one: backward meets them in this order, reversed
        with _reparametrize_module(linear, gated):
            return plain(x, route, made)

    return forward


class Presence:
    """What the micro-batches of one step hold on any rank: by it ranks agree on what all of them run.

    total: gives the sum of a tensor over ranks.
    """

    def __init__(self, model: Multimodal, batches: Sequence[Batch], total: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        held = [_held(batch) for batch in batches]
        columns = [*model.branches, *model.adapters]
        # (micro-batches of a rank, columns): how many ranks hold it
        counts = torch.tensor([[int(column in own) for column in columns] for own in held])
        rows = total(counts).tolist()
        self.anywhere = [{column for column, count in zip(columns, row, strict=True) if count} for row in rows]

    def level(self, batches: Sequence[Batch], always: Collection[tuple[str, str]] = ()) -> list[Batch]:
        """Return the micro-batches, each with a smallest item of every sort that only other ranks hold.

        always: media, with their projectors, that every micro-batch shall have.
        """
        found: list[Batch] = []
        for batch, anywhere in zip(batches, self.anywhere, strict=True):
            lacking = [place for place in self.model.branches if place in (anywhere | {*always}) - _held(batch)]
            blanks = tuple(self.model.smallest(*place) for place in lacking)
            found.append(replace(batch, media=(*batch.media, *blanks)) if blanks else batch)
        return found

    def is_idle(self, part: str) -> bool:
        """Tell whether no row of the step, on any rank, reaches this part (of `part_of`)."""
        kind, _, name = part.partition(".")
        used = set().union(*self.anywhere)
        if kind == "adapter":
            return name not in used
        if name == "encoder":
            return not any(place[0] == kind for place in used if isinstance(place, tuple))
        if name.startswith("projector."):
            return (kind, name.removeprefix("projector.")) not in used
        return False


def _held(batch: Batch) -> set[tuple[str, str] | str]:
    """Return the media with their projectors and the adapters that rows of a batch hold."""
    adapters = {name for own in batch.route.adapters if own is not None for name, _ in terms(own)}
    return adapters | {(item.modality, item.branch) for item in batch.media}
