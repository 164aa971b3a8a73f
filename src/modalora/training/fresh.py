"""What fresh parts take from the first rows, before a run trains them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modalora.contracts import IGNORED, Batches
from modalora.errors import ConfigError
from modalora.models.multimodal import Multimodal, matches
from modalora.models.speech import SpeechEncoder
from modalora.nn.mlp import Projector

FIRST = 20  # steps of a run that statistics are taken from


def set_mel_statistics(model: Multimodal, batches: Batches) -> None:
    """Give a fresh sound encoder the mean and inverse deviation of each mel channel, from the first batches with
    sound."""
    if "audio" not in model.encoders:
        return
    encoder = model.encoders["audio"]
    assert isinstance(encoder, SpeechEncoder)
    if not torch.equal(encoder.global_mean, torch.zeros_like(encoder.global_mean)):
        return
    media = [item for _ in range(FIRST) for batch in batches.take() for item in batch.media if item.modality == "audio"]
    if media:
        mel = torch.cat([item.features["mel"] for item in media])
        encoder.global_mean.copy_(mel.mean(0))
        encoder.global_invstd.copy_(1 / mel.std(0).clamp(min=1.0))


def count_said(batches: Batches, vocab_size: int, steps: int = FIRST) -> Tensor:
    """Return how often the answers of the first batches hold each token, (vocab,)."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    labels = [batch.labels for _ in range(steps) for batch in batches.take() if batch.labels is not None]
    for row in (row for own in labels for row in own):
        counts += torch.bincount(row[row != IGNORED][:-1], minlength=vocab_size)  # without the end tag
    return counts


@torch.no_grad()
def whiten_projectors(
    model: Multimodal,
    modality: str,
    patterns: Sequence[str],
    batches: Batches,
    device: str | torch.device = "cpu",
) -> None:
    """Let the trained projectors of a modality start on features of mean 0 and deviation 1, at the scale of embeddings.

    An encoder's features share a large mean, which leaves all media tokens nearly parallel: the decoder then sees
    their average only. The statistics go into the first layer, so the projector stays what it was. device: where the
    encoder runs.
    """
    if modality not in model.encoders:
        raise ConfigError(f"whiten: this model has no {modality!r} encoder; it has {', '.join(model.encoders)}")
    steps = 8  # of the run, the first
    media = [
        item for _ in range(steps) for batch in batches.take() for item in batch.media if item.modality == modality
    ]
    chosen = [
        projector
        for branch, projector in model.projectors.get_submodule(modality).named_children()
        if matches(f"{modality}.projector.{branch}", *patterns)
    ]
    if not chosen or not media:
        raise ConfigError(
            f"whiten: {modality!r} needs a projector that trains, and rows with {modality}; "
            + ("train: names none of its projectors" if not chosen else f"the first {steps} steps have none")
            + ", so add it there, or leave it out of whiten:"
        )
    encoder = model.encoders[modality].to(device)  # and no more: the decoder may be too large before it is quantised
    given_features = [{name: value.to(device) for name, value in item.features.items()} for item in media]
    trains = encoder.training
    encoder.eval()
    features = torch.cat(model.encode(modality, given_features))
    encoder.train(trains)
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-3)
    for projector in chosen:
        assert isinstance(projector, Projector)
        projector.to(device)
        projector.up.weight.div_(deviation)
        projector.up.bias.copy_(-projector.up.weight @ mean)
        given = projector(features)
        size = model.decoder.embed_tokens.weight.square().mean().sqrt()
        projector.down.weight.mul_(4 * size / given.std())
        projector.down.bias.sub_(projector(features).mean(0))
