"""What of a multimodal model is computed again in the backward pass (nn/recompute.py)."""

from __future__ import annotations

from torch import nn

from modalora.models.decoder import DecoderLayer
from modalora.models.speech import ConformerBlock
from modalora.models.vision import VisionLayer
from modalora.nn import recompute as general

LAYERS = (DecoderLayer, VisionLayer, ConformerBlock)


def recompute(model: nn.Module, *, offload: bool = False) -> None:
    """Let each decoder layer and encoder block of a model run again instead of keeping what it computes.

    offload: keep its input in the memory of the CPU meanwhile.
    """
    general.recompute(model, LAYERS, offload=offload)
