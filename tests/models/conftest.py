"""What tests of the networks build: a small model without a zero in it, and batches of any mix of media."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from modalora.contracts import IGNORED, Batch, Media, Route, image_tokens, subsampled
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.router import route
from modalora.models.sizes import tiny


@pytest.fixture
def make_model() -> Callable[..., Multimodal]:
    """Return a maker of small models: everything that starts at one value is moved, so that nothing agrees by
    chance."""

    def make(config: ModelConfig | None = None, seed: int = 0) -> Multimodal:
        torch.manual_seed(seed)
        model = Multimodal(config or tiny())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if bool((parameter == parameter.flatten()[0]).all()):
                    parameter.add_((0.05 if "lora_B" in name else 0.1) * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Return a maker of labelled batches; kinds are "text", "image", "speech" and "image + speech", one per row."""

    def make(kinds: Sequence[str], seed: int = 0, words: int = 9) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        media: list[Media] = []
        adapters: list[str | None] = []
        for number, kind in enumerate(kinds):
            held = {"text": (), "image": ("image",), "speech": ("audio",), "image + speech": ("image", "audio")}[kind]
            rule = route(held, adapters=("vision", "speech"))
            adapters.append(rule.adapter)
            at = 2
            for modality in held:
                features, tokens = _picture(generator) if modality == "image" else _sound(generator)
                media.append(Media(modality, features, number, at, tokens, rule.branches[modality]))
                at += tokens
            ids = torch.randint(0, 320, (at + words - 2 * (number % 3),), generator=generator)
            rows.append(ids)
            labels.append(torch.where(torch.arange(len(ids)) < at, IGNORED, ids))
        pad = torch.nn.utils.rnn.pad_sequence
        return Batch(
            input_ids=pad(rows, batch_first=True, padding_value=7),
            lengths=torch.tensor([len(row) for row in rows]),
            route=Route(tuple(adapters)),
            media=tuple(media),
            labels=pad(labels, batch_first=True, padding_value=IGNORED),
        )

    return make


def _picture(generator: torch.Generator) -> tuple[dict[str, Tensor], int]:
    """Two crops of 56 pixels, one above the other; the last row of patches is padding."""
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[2, 3:] = False
    pixels = torch.randn(3, 3, 56, 56, generator=generator)
    return {"pixels": pixels, "mask": mask, "grid": torch.tensor([2, 1])}, image_tokens(7, 4, 4)


def _sound(generator: torch.Generator) -> tuple[dict[str, Tensor], int]:
    frames = int(torch.randint(20, 90, (), generator=generator))
    return {"mel": torch.randn(frames, 80, generator=generator)}, subsampled(frames)
