"""The turn itself: positions to cos and sin by the tables of rope.py, and channels turned by them.

Angles are radians in float32 whatever the model's dtype; x is (batch, time, heads, head_dim).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modalora.contracts import Rotations
from modalora.errors import ConfigError
from modalora.nn.rope import DynamicNtk, Rope, is_long, table_number


def tables(rope: Rope, head_dim: int, lengths: Sequence[int], device: torch.device | str = "cpu") -> Rotations:
    """Return the table of each row, from the length that decides it."""
    numbers = [table_number(rope, length) for length in lengths]
    each = {
        number: _table(rope, head_dim, length) for number, length in dict(zip(numbers, lengths, strict=True)).items()
    }
    return Rotations(
        frequencies=torch.stack([each[number][0] for number in numbers]).to(device),
        scale=torch.tensor([each[number][1] for number in numbers], device=device),
    )


def _table(rope: Rope, head_dim: int, length: int) -> tuple[Tensor, float]:
    if isinstance(rope, DynamicNtk):
        rope = rope.at(length)
    long = is_long(rope, [length])[0]
    return rope.frequencies(head_dim, long=long), rope.attention_factor(long=long)


def rotation(rope: Rope, head_dim: int, positions: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (batch, time, pairs) float32.

    positions: (batch, time). long: bool that says which use the long table, (batch, 1) or (batch, time).
    """
    if isinstance(rope, DynamicNtk):
        raise ConfigError("dynamic_ntk has a table for every length: give each row its own (Step.rotations)")
    table, factor = rope.frequencies(head_dim).to(positions.device), torch.tensor(rope.attention_factor())
    if rope.switch is not None and bool(long.any()):
        rows = long[..., None]
        table = torch.where(rows, rope.frequencies(head_dim, long=True).to(positions.device), table)
        factor = torch.where(rows, rope.attention_factor(long=True), rope.attention_factor())
    return turned(positions, table, factor)


def turned(positions: Tensor, frequencies: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (batch, time, pairs) float32, times scale.

    positions: (batch, time). frequencies: radians per token, (pairs,) or (batch, 1 or time, pairs). scale: one number,
    or (batch, 1 or time, 1).
    """
    angles = positions[..., None].float() * frequencies
    return angles.cos() * scale.to(angles), angles.sin() * scale.to(angles)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 * pairs channels of each head; channel i pairs with channel i + pairs, the rest passes through.

    x: (batch, time, heads, head_dim); cos, sin: (batch, time, pairs).
    """
    turned: Tensor = _Rotate.apply(x, cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype))  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing is kept but the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(given[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1)
