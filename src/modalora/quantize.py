"""A finished model in, a smaller finished model out: the Linears of a frozen decoder in 16, 8 or 4 bits.

Adapters, embeddings, norms and encoders stay as they are, so adapters train on top (QLoRA, arXiv:2305.14314).
"""

from __future__ import annotations

from modalora.errors import ConfigError
from modalora.models.multimodal import Multimodal
from modalora.nn.quantised import check_bits


def quantize(model: Multimodal, bits: int) -> None:
    """Keep the decoder's Linears in 16, 8 or 4 bits, in place; such a model cannot be saved or train its decoder.

    Raises ConfigError for other bits, a packed or quantised model, or rows that 4 bits cannot be cut from; the model is
    then as before.
    """
    if model.decoder.is_packed:
        raise ConfigError("a packed model cannot be quantised; load it without pack")
    if model.decoder.is_quantised:
        raise ConfigError("this model is quantised already; load it anew for other bits")
    linears = model.decoder.routed().values()
    for linear in linears:
        check_bits(bits, linear.weight.shape)
    for linear in linears:
        linear.quantize(bits)


def restore(model: Multimodal, whole: Multimodal) -> None:
    """Give a quantised model the plain matrices of another copy of it."""
    for linear, other in zip(model.decoder.routed().values(), whole.decoder.routed().values(), strict=True):
        linear.restore(other.weight.detach())
