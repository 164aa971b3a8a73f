"""Rows of every kind, for models of `tiny()`'s sizes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from modalora.contracts import IGNORED, Batch, Media, Route, image_tokens, subsampled


def row(kind: str, seed: int) -> Batch:
    """One row: text, image, speech, or both; longer for a larger seed."""
    generator = torch.Generator().manual_seed(seed)
    time = 30 + seed % 5
    ids = torch.randint(0, 320, (1, time), generator=generator)
    labels = ids.clone()
    labels[:, : 8 + seed % 3] = IGNORED
    media: list[Media] = []
    if kind in ("image", "both"):
        pixels = torch.randn(2, 3, 56, 56, generator=generator)
        features = {"pixels": pixels, "mask": torch.ones(2, 4, 4, dtype=torch.bool), "grid": torch.tensor([1, 1])}
        media.append(Media("image", features, 0, 1, image_tokens(4, 4, 4), "vision"))
    if kind in ("speech", "both"):
        mel = torch.randn(37, 80, generator=generator)
        branch = "speech" if kind == "speech" else "vision"
        media.append(Media("audio", {"mel": mel}, 0, 15, subsampled(37), branch))
    # media in another order than the model runs them in
    adapter = {"text": None, "image": "vision", "speech": "speech", "both": "vision"}[kind]
    return Batch(
        input_ids=ids, lengths=torch.tensor([time]), route=Route((adapter,)), media=tuple(media[::-1]), labels=labels
    )


def stack(*rows: Batch) -> Batch:
    time = max(int(one.lengths[0]) for one in rows)

    def pad(ids: Tensor, value: int) -> Tensor:
        return nn.functional.pad(ids, (0, time - ids.shape[1]), value=value)

    return Batch(
        input_ids=torch.cat([pad(one.input_ids, 0) for one in rows]),
        lengths=torch.cat([one.lengths for one in rows]),
        route=Route(tuple(adapter for one in rows for adapter in one.route.adapters)),
        media=tuple(replace(item, row=at) for at, one in enumerate(rows) for item in one.media),
        labels=torch.cat([pad(one.labels, IGNORED) for one in rows if one.labels is not None]),
    )
