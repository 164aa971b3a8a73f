"""What a run minimises. An objective may have a head of its own, which trains along and is not part of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from modalora.contracts import BLANK, IGNORED, NOWHERE, Batch, Media
from modalora.data.rows import COUNTED, MOST_COUNTED
from modalora.data.sources import Held, any_media
from modalora.errors import ConfigError, DataError
from modalora.models.multimodal import Multimodal, part_of


@dataclass(frozen=True, slots=True)
class Losses:
    """Single losses and the row of the batch that each belongs to, both (count,)."""

    values: Tensor
    rows: Tensor

    def by_row(self, count: int) -> Tensor:
        """Return the sum and the number of the losses of each of so many rows, (2, count) on their device."""
        values = self.values.detach()
        values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)  # which Apple's GPUs lack
        found = torch.zeros(2, count, dtype=values.dtype, device=values.device)
        return found.index_add(1, self.rows.to(values.device), torch.stack((values, torch.ones_like(values))))


class NextToken(nn.Module):
    """Cross-entropy of the labelled tokens."""

    idle: tuple[str, ...] = ()  # parameters that no loss of the objective reaches
    check = staticmethod(any_media)

    def __init__(self, model: Multimodal) -> None:
        super().__init__()

    def count(self, batch: Batch) -> int:
        """Return how many losses a batch has."""
        return int(batch.labelled.sum())

    def forward(self, model: Multimodal, batch: Batch) -> Losses:
        """Return one loss per labelled token."""
        return Losses(*model.loss(batch))


UNSAID = 1e-3  # what a token that was not said counts


class Ctc(nn.Module):
    """Connectionist temporal classification of the answer's tokens on the sound encoder alone.

    Gives a fresh encoder the start that Phi-4-Multimodal's takes from a speech recogniser (arXiv:2503.01743, section
    3.2);
    CTC: Graves et al. 2006.
    """

    idle: tuple[str, ...] = ()

    def __init__(self, model: Multimodal) -> None:
        super().__init__()
        config = model.config
        if config.speech is None:
            raise ConfigError("objective=ctc trains a sound encoder, and this model has none; leave objective out")
        self.blank = config.decoder.vocab_size
        self.head = nn.Linear(config.speech.hidden_size, self.blank + 1)

    @torch.no_grad()
    def start_from(self, counts: Tensor) -> None:
        """Let the head begin with how often each token is said, counts (vocab,), and a blank as often as all of them.

        From even chances the first steps go into thousands of tokens that nobody says: on ten digits out of 4,096
        tokens the loss leaves its plateau after 240 steps, from these chances after 80 (docs/log.md).
        """
        shares = (counts + UNSAID) / (counts + UNSAID).sum()
        self.head.bias.copy_(torch.cat((shares, torch.ones(1))).log())

    @staticmethod
    def check(held: Held) -> None:
        """Refuse the media of a row that are not one sound. Raises DataError."""
        if [modality for modality, _ in held] != ["audio"]:
            raise DataError(
                "objective=ctc learns from one sound and what is said in it, and the row holds "
                f"{', '.join(modality for modality, _ in held) or 'text alone'}; give it other rows, or leave "
                "objective out"
            )

    def count(self, batch: Batch) -> int:
        """Return how many losses a batch has. Raises DataError for a row that does not hold one sound."""
        _check_rows(batch, self.check)
        return len(batch.media)

    def forward(self, model: Multimodal, batch: Batch) -> Losses:
        """Return one loss per row, divided by its target length. Each row holds one sound and one answer."""
        assert batch.labels is not None
        media, encoded = _encoded(model, batch, "audio")
        if not media:
            return _no_losses(self, encoded)
        rows = torch.tensor([item.row for item in media])
        lengths = torch.tensor([len(features) for features in encoded])
        logits = self.head(nn.utils.rnn.pad_sequence(encoded)).float()
        targets = [row[row != IGNORED][:-1] for row in batch.labels[rows]]  # without the end tag
        sizes = torch.tensor([len(target) for target in targets])
        values = functional.ctc_loss(
            logits.log_softmax(-1), torch.cat(targets), lengths, sizes, self.blank, reduction="none", zero_infinity=True
        )
        return Losses(values / sizes.clamp(min=1).to(values.device), rows)


class Cells(nn.Module):
    """What lies in the cell that each image token covers, and how many of each sort in its crop and in the picture.

    The picture encoder alone is trained: it stands in for the pretrained tower that Phi-4-Multimodal starts from.
    Media carry "cells" and "counts" (data/rows.py:cells); IGNORED targets, such as those of separators, are left out.
    """

    idle: tuple[str, ...] = ("encoders.image.line_end", "encoders.image.view_end")  # separators lie on no cell
    ATTRIBUTES, CLASSES = 3, 24  # kind, colour, size; 0 = empty cell
    COUNTS, LEVELS = 2 * COUNTED, 1 + MOST_COUNTED  # of two regions; 0 .. MOST_COUNTED

    def __init__(self, model: Multimodal) -> None:
        super().__init__()
        if model.config.vision is None:
            raise ConfigError("objective=cells trains a picture encoder, and this model has none; leave objective out")
        width = model.config.vision.hidden_size
        self.cells = nn.Linear(width, self.ATTRIBUTES * self.CLASSES)
        self.counts = nn.Linear(width, self.COUNTS * self.LEVELS)

    @staticmethod
    def check(held: Held) -> None:
        """Refuse the media of a row that tell no cells. Raises DataError."""
        if not held or not all("cells" in features for _, features in held):
            raise DataError(
                "objective=cells learns what lies in the cells of a picture, which rows of the source 'cells' tell "
                "alone; give it that source, or leave objective out"
            )

    def count(self, batch: Batch) -> int:
        """Return how many losses a batch has. Raises DataError for a row without cells."""
        _check_rows(batch, self.check)
        return 2 * sum(int((item.features["cells"][:, 0] != IGNORED).sum()) for item in batch.media)

    def forward(self, model: Multimodal, batch: Batch) -> Losses:
        """Return per image token the loss of its cell, summed over the attributes, and the mean loss of its counts.

        Few cells hold anything, and all else is read from them: they weigh more.
        """
        media, encoded = _encoded(model, batch, "image")
        if not media:
            return _no_losses(self, encoded)
        features = torch.cat(encoded)
        rows = torch.cat([torch.full((item.tokens,), item.row) for item in media])
        cells = torch.cat([item.features["cells"] for item in media])
        counts = torch.cat([item.features["counts"] for item in media]).flatten(1)
        real = (cells[:, 0] != IGNORED).nonzero().squeeze(1)  # places: a plan has no mask on tensors without values
        features = features[real]
        in_cell = _token_losses(self.cells(features).unflatten(-1, (self.ATTRIBUTES, self.CLASSES)), cells[real])
        in_cell = in_cell * self.ATTRIBUTES
        counted = _token_losses(self.counts(features).unflatten(-1, (self.COUNTS, self.LEVELS)), counts[real])
        return Losses(torch.cat((in_cell, counted)), rows[real.cpu()].repeat(2))


def trained_part(name: str) -> str:
    """Return the part of a trained parameter; an objective's head is one of its own."""
    return "objective" if name.startswith("objective.") else part_of(name)


def _check_rows(batch: Batch, check: Callable[[Held], None]) -> None:
    for row, sample in enumerate(batch.samples):
        if sample == BLANK:
            continue
        try:
            check([(item.modality, item.features) for item in batch.media if item.row == row])
        except DataError as error:
            raise DataError(f"row {sample}: {error}") from None


def _encoded(model: Multimodal, batch: Batch, modality: str) -> tuple[list[Media], list[Tensor]]:
    """Return the media of rows and what each becomes; where there are none, what other ranks wait for, if anything."""
    if not batch.media:
        return [], []
    encoded = model.encoders[modality]([dict(item.features) for item in batch.media])
    own = [place for place, item in enumerate(batch.media) if item.row != NOWHERE]
    return [batch.media[place] for place in own], [encoded[place] for place in own] or list(encoded)


def _no_losses(head: nn.Module, encoded: Sequence[Tensor]) -> Losses:
    """Return what is lost where a blank row stands in for bad ones: nothing, with gradients of zeros."""
    reached = torch.cat([own.flatten().float() for own in (*head.parameters(), *encoded)])
    return Losses(reached[:0], torch.zeros(0, dtype=torch.long))


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over the targets of each token that are not IGNORED, (tokens,)."""
    values = functional.cross_entropy(logits.float().movedim(-1, 1), targets, ignore_index=IGNORED, reduction="none")
    return values.sum(1) / (targets != IGNORED).sum(1)


Objective = NextToken | Ctc | Cells

OBJECTIVES: dict[str, type[NextToken] | type[Ctc] | type[Cells]] = {
    "next_token": NextToken,
    "ctc": Ctc,
    "cells": Cells,
}
