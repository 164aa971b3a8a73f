"""Root-mean-square normalisation, in the order of operations that bf16 checkpoints were trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale per channel.

    The division runs in float32 and is cast back before the weight is applied: the order decides the last bf16 bit.
    Source: arXiv:1910.07467, as in Phi-3.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) of any float dtype; the result has the same shape and dtype."""
        exact = x.float() if x.dtype != torch.float64 else x
        normal = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.to(x.dtype)
