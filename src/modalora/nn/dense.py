"""Products with an activation, for encoders: bf16 on a CPU takes it along instead of a pass of its own.

Over the 1,024 patches of a crop, 1,152 to 4,304 channels and a tanh-approximated GELU take 29 ms as two operations and
16 as one (one core with AMX); the sum is rounded to bf16 once, behind the activation. `pack` saves a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modalora.nn import packed, products
from modalora.nn.packed import Activation

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class Product(nn.Module):
    """activation(W x + b) for x (..., columns), where W is the weight with all but its first axis laid flat."""

    weight: Any
    bias: Any

    def __init__(self, *sizes: int, activation: Activation = "none") -> None:
        super().__init__(*sizes)
        self.activation: Activation = activation
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., columns) -> (..., rows)."""
        if self._packed is not None:
            return packed.linear(x, self._packed, self.bias, self.activation)
        weight = self.weight.flatten(1)
        if not torch.is_grad_enabled() and x.dtype == weight.dtype and packed.can_pack(weight):
            return packed.linear(x, weight, self.bias, self.activation)
        y = products.linear(x, weight, self.bias)
        return y if self.activation == "none" else FUNCTIONS[self.activation](y)

    def pack(self, done: Callable[[Tensor], None]) -> None:
        """Keep the matrix in oneDNN's order only; `done` is called with the plain one."""
        self._packed = packed.pack(self.weight.flatten(1))
        done(self.weight.data)
        packed.empty(self.weight)


class Dense(Product, nn.Linear):
    """Dense(columns, rows): a Linear."""


class Pointwise1d(Product, nn.Conv1d):
    """Pointwise1d(columns, rows, 1): a convolution over channels alone, of channels that come last."""


class Pointwise2d(Product, nn.Conv2d):
    """Pointwise2d(channels, rows, kernel): a convolution of places that were unfolded, channels x kernel last."""
