"""Matrices in the order that oneDNN reads them: bf16 products of few rows run at the speed of memory on a CPU.

One row times 16,384 x 3,072 takes 5.7 ms plain and 2.8 packed (one core; the bytes alone take 2.7); the results are the
same bits. A packed matrix is for reading: it has no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Activation = Literal["none", "relu", "silu", "gelu", "gelu_tanh"]
# oneDNN's name of an activation, and which of its formulas
_POINTWISE: dict[Activation, tuple[str, str]] = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


def can_pack(weight: Tensor) -> bool:
    """Tell whether this matrix gains from packing here: bf16 on a CPU with bf16 products."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: Tensor) -> Tensor:
    """Return a matrix, (rows, columns), in oneDNN's order."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """Return activation(x W' + bias), (..., rows), for x (..., columns) in bf16, rounded once.

    matrix: W, packed, or (rows, columns) as it is.
    """
    name, formula = _POINTWISE[activation]
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, name, [], formula)
    return y


def empty(weight: Tensor) -> None:
    """Leave a matrix its shape without memory; whatever reads it by mistake gets NaN."""
    weight.data = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)
