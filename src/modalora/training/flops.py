"""Floating-point operations that a training step needs, from sizes alone: for the share of a machine that is used.

A matrix of n numbers takes 2 n operations per position forward, as many for the gradient of its input where one is
needed, and as many again for its own where it trains. Recomputation counts as nothing: it is no progress. Norms,
rotations and softmaxes are left out (PaLM, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from modalora.contracts import Batch, terms
from modalora.models.multimodal import Multimodal
from modalora.models.speech import SpeechEncoder
from modalora.models.vision import ImageEmbedder


class StepFlops:
    """Counts the operations of batches for one model and one choice of trained parts.

    decodes: whether the objective runs the decoder at all.
    """

    def __init__(self, model: Multimodal, trained: Collection[str], *, decodes: bool) -> None:
        self.trained, self.decodes = set(trained), decodes
        linears = model.decoder.routed().values()
        self.decoder = sum(linear.weight.numel() for linear in linears)
        self.head = model.decoder.embed_tokens.weight.numel()
        size = model.config.decoder
        self.attention = 2 * size.num_hidden_layers * size.hidden_size  # per query and key
        self.adapters = {
            name: sum(
                linear.lora_A[name].numel() + linear.lora_B[name].numel()
                for linear in linears
                if name in linear.adapters
            )
            for name in model.adapters
        }
        self.encoders = {name: _per_token(encoder) for name, encoder in model.encoders.items()}
        self.projectors = {
            f"{name}.projector.{branch}": _matrices(projector)
            for name, branches in model.projectors.items()
            for branch, projector in branches.named_children()
        }

    def of(self, micro: Sequence[Batch]) -> float:
        """Return the operations of some micro-batches, forward and backward."""
        return sum(self._of(batch) for batch in micro)

    def _of(self, batch: Batch) -> float:
        total = 0.0
        learns = dict.fromkeys(range(len(batch.lengths)), "decoder" in self.trained)
        for item in batch.media:
            encoder, projector = f"{item.modality}.encoder", f"{item.modality}.projector.{item.branch}"
            own, after = encoder in self.trained, projector in self.trained
            first, others, squared = self.encoders[item.modality]
            positions = item.features["mask"].numel() if "mask" in item.features else item.tokens
            groups = len(item.features["mask"]) if "mask" in item.features else 1
            total += 2 * first * positions * (1 + own)  # pixels and frames need no gradient
            total += (2 * others * positions + squared * positions**2 / groups) * (1 + 2 * own)
            if self.decodes:
                total += 2 * self.projectors[projector] * item.tokens * (1 + max(own, 0.5 * after) + after)
                learns[item.row] |= own or after
        if not self.decodes:
            return total
        counts = zip(batch.lengths.tolist(), batch.route.adapters, batch.labelled.sum(1).tolist(), strict=True)
        for row, (length, adapter, labels) in enumerate(counts):
            names = [name for name, _ in terms(adapter)] if adapter else []
            back = learns[row] or any(f"adapter.{name}" in self.trained for name in names)
            wide = "decoder" in self.trained
            total += 2 * self.decoder * length * (1 + back + wide)
            total += self.attention * length**2 * (1 + 2 * back)  # the causal half of 4 per pair
            total += 2 * self.head * labels * (1 + back + wide)
            for name in names:
                total += 2 * self.adapters[name] * length * (1 + back + (f"adapter.{name}" in self.trained))
        return total


def _matrices(module: nn.Module) -> int:
    return sum(own.weight.numel() for own in module.modules() if isinstance(own, nn.Linear | nn.Conv1d | nn.Conv2d))


def _per_token(encoder: nn.Module) -> tuple[float, float, float]:
    """Return what each position of an encoder is multiplied with: numbers of the first layer and of all others, and
    operations per pair of positions.
    """
    if isinstance(encoder, ImageEmbedder):
        tower = encoder.tower
        layers = list(tower.layers)[:-1]  # the last one is not run
        width = tower.patch_embedding.out_channels
        return _matrices(tower.patch_embedding), sum(_matrices(layer) for layer in layers), 4.0 * len(layers) * width
    if isinstance(encoder, SpeechEncoder):
        # The subsampling's convolutions of 80 mels run at 4 x 40, 2 x 20 (twice) and 10 (twice) places per token.
        convolutions = [own for own in encoder.embed.conv if isinstance(own, nn.Conv2d)]
        first, *rest = (
            own.weight.numel() * places for own, places in zip(convolutions, (160, 40, 40, 10, 10), strict=True)
        )
        others = _matrices(encoder) - _matrices(encoder.embed.conv) + sum(rest)
        return first, others, 4.0 * encoder.config.num_blocks * encoder.config.hidden_size
    return 0.0, _matrices(encoder), 0.0
