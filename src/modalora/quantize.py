"""A finished model in, a smaller finished model out: the Linears of a frozen decoder in 16, 8 or 4 bits.

Adapters, embeddings, norms and encoders stay as they are, so adapters train on top (QLoRA, arXiv:2305.14314).
"""

from __future__ import annotations

from modalora.errors import ConfigError
from modalora.models.multimodal import Multimodal


def quantize(model: Multimodal, bits: int) -> None:
    """Keep the decoder's Linears in 16, 8 or 4 bits, in place; such a model cannot be saved or train its decoder.

    Raises ConfigError for other bits, a packed model, or rows that 4 bits cannot be cut from.
    """
    if model.decoder.is_packed:
        raise ConfigError("a packed model cannot be quantised; load it without pack")
    for linear in model.decoder.routed().values():
        linear.quantize(bits)


def restore(model: Multimodal, whole: Multimodal) -> None:
    """Give a quantised model the plain matrices of another copy of it."""
    for linear, other in zip(model.decoder.routed().values(), whole.decoder.routed().values(), strict=True):
        linear.restore(other.weight.detach())
