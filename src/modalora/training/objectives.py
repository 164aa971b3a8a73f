"""What a run minimises. An objective may have a head of its own, which trains along and is not part of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from modalora.contracts import IGNORED, Batch
from modalora.models.multimodal import Multimodal


@dataclass(frozen=True, slots=True)
class Losses:
    """Single losses and the row of the batch that each belongs to, both (count,)."""

    values: Tensor
    rows: Tensor


class NextToken(nn.Module):
    """Cross-entropy of the labelled tokens."""

    def __init__(self, model: Multimodal) -> None:
        super().__init__()

    def forward(self, model: Multimodal, batch: Batch) -> Losses:
        """Return one loss per labelled token."""
        return Losses(*model.loss(batch))


class Ctc(nn.Module):
    """Connectionist temporal classification of the answer's tokens on the sound encoder alone.

    Gives a fresh encoder the start that Phi-4-Multimodal's takes from a speech recogniser (arXiv:2503.01743, section
    3.2);
    CTC: Graves et al. 2006.
    """

    def __init__(self, model: Multimodal) -> None:
        super().__init__()
        config = model.config
        assert config.speech is not None
        self.blank = config.decoder.vocab_size
        self.head = nn.Linear(config.speech.hidden_size, self.blank + 1)

    def forward(self, model: Multimodal, batch: Batch) -> Losses:
        """Return one loss per row, divided by its target length. Each row holds one sound and one answer."""
        assert batch.labels is not None
        encoded = model.encoders["audio"]([dict(item.features) for item in batch.media])
        rows = torch.tensor([item.row for item in batch.media])
        lengths = torch.tensor([len(features) for features in encoded])
        logits = self.head(nn.utils.rnn.pad_sequence(encoded)).float()
        targets = [row[row != IGNORED][:-1] for row in batch.labels[rows]]  # without the end tag
        sizes = torch.tensor([len(target) for target in targets])
        values = functional.ctc_loss(
            logits.log_softmax(-1), torch.cat(targets), lengths, sizes, self.blank, reduction="none", zero_infinity=True
        )
        return Losses(values / sizes.clamp(min=1), rows)


class Cells(nn.Module):
    """Kind, colour and size of the shape centred in each cell that an image token covers, from the picture encoder
    alone.

    Stands in for the pretrained tower that Phi-4-Multimodal starts from. Media carry "cells", (tokens, 3), IGNORED =
    separator,
    0 = empty.
    """

    CLASSES = 24

    def __init__(self, model: Multimodal) -> None:
        super().__init__()
        assert model.config.vision is not None
        self.head = nn.Linear(model.config.vision.hidden_size, 3 * self.CLASSES)

    def forward(self, model: Multimodal, batch: Batch) -> Losses:
        """Return one loss per image token and attribute."""
        encoded = model.encoders["image"]([dict(item.features) for item in batch.media])
        logits = self.head(torch.cat(encoded)).float().unflatten(-1, (3, self.CLASSES))
        targets = torch.cat([item.features["cells"] for item in batch.media])
        rows = torch.cat([torch.full((item.tokens,), item.row) for item in batch.media])
        chosen = targets[:, 0] != IGNORED
        values = functional.cross_entropy(logits[chosen].flatten(0, 1), targets[chosen].flatten(), reduction="none")
        return Losses(values, rows[chosen].repeat_interleave(3))


OBJECTIVES: dict[str, type[NextToken] | type[Ctc] | type[Cells]] = {
    "next_token": NextToken,
    "ctc": Ctc,
    "cells": Cells,
}
