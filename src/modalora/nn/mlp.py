"""The two-layer perceptron that carries an encoder's features into the decoder's width."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Projector(nn.Module):
    """Linear, exact GELU, Linear (Phi-4-Multimodal's projector for pictures and for sound)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.up = nn.Linear(width_in, width_out)
        self.down = nn.Linear(width_out, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width_in) -> (..., width_out)."""
        out: Tensor = self.down(functional.gelu(self.up(x)))
        return out
