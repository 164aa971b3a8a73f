"""Rotary positions, plain or rescaled for long windows (RoFormer, arXiv:2104.09864; LongRoPE, arXiv:2402.13753).

Angles are radians, windows are tokens, x is (batch, time, heads, head_dim).
A scaling method is a small frozen dataclass; every one gives `frequencies(head_dim, long)` and `attention_factor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modalora.errors import ConfigError, ShapeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """Unscaled rotary positions. Paper symbols in brackets."""

    theta: float = 10_000.0  # base of the frequencies [θ]
    rotated: float = 1.0  # share of each head that turns, (0, 1]
    window: int = 4096  # tokens that the model may read

    def __post_init__(self) -> None:
        _check_base(self.theta, self.rotated, self.window)

    def attention_factor(self, *, long: bool = False) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    @property
    def switch(self) -> int | None:
        """Length in tokens beyond which the long table applies; None: there is one table."""
        return None

    def frequencies(self, head_dim: int, *, long: bool = False) -> Tensor:
        """Return radians per token of each rotated pair, fastest first, (pairs,) float32."""
        return 1.0 / _periods(self.theta, self.rotated, head_dim)


# When the long table applies. reference: to rows longer than the original window, as transformers' Phi3 has it; long,
# short: always or never, as engines do that fix the table when they start.
Regime = Literal["reference", "long", "short"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRope:
    """One divisor per rotated pair, in two sets: up to the original window, and beyond it.

    Source: arXiv:2402.13753 and 2502.20082; served as in the Phi-4-Mini config ("longrope").
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    theta: float = 10_000.0
    rotated: float = 1.0
    window: int = 131_072
    original_window: int = 4096
    mscale: tuple[float, float] | None = None  # attention factors, short and long, where a model has its own
    regime: Regime = "reference"

    def __post_init__(self) -> None:
        _check_base(self.theta, self.rotated, self.window)
        if len(self.short_factor) != len(self.long_factor):
            raise ConfigError(
                f"short_factor has {len(self.short_factor)} entries and long_factor {len(self.long_factor)}; "
                "both need one per rotated pair (Phi-4-Mini: 48)"
            )
        if min((*self.short_factor, *self.long_factor), default=0) <= 0:
            raise ConfigError("short_factor and long_factor must be given and positive; 1.0 leaves a pair unscaled")
        if not 1 < self.original_window <= self.window:
            raise ConfigError(f"original_window={self.original_window} must lie in (1, window={self.window}]")

    def attention_factor(self, *, long: bool = False) -> float:
        """sqrt(1 + ln(s) / ln(original window)), s = window / original window, for the short table as well."""
        if self.mscale is not None:
            return self.mscale[long]
        stretch = self.window / self.original_window
        return sqrt(1 + log(stretch) / log(self.original_window))

    @property
    def switch(self) -> int | None:
        """Length in tokens beyond which the long table applies to every position of a row; None: never."""
        return {"reference": self.original_window, "long": 0, "short": None}[self.regime]

    def frequencies(self, head_dim: int, *, long: bool = False) -> Tensor:
        """Return radians per token of each rotated pair, fastest first, (pairs,) float32.

        Raises ShapeError when the factor lists do not have one entry per rotated pair.
        """
        base = _periods(self.theta, self.rotated, head_dim)
        factors = self.long_factor if long else self.short_factor
        if len(factors) != len(base):
            raise ShapeError(
                f"{len(factors)} rope factors for {len(base)} rotated pairs (head_dim={head_dim}, rotated="
                f"{self.rotated}); give one factor per pair"
            )
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * base)


Rope = Plain | LongRope


def rotation(rope: Rope, head_dim: int, positions: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (batch, time, pairs) float32.

    positions: (batch, time). long: bool that says which use the long table, (batch, 1) or (batch, time).
    """
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


def is_long(rope: Rope, lengths: Sequence[int]) -> list[bool]:
    """Tell for each row length whether the long table applies (Phi-3: length > original window)."""
    return [rope.switch is not None and length > rope.switch for length in lengths]


def _periods(theta: float, rotated: float, head_dim: int) -> Tensor:
    """Tokens per radian of each pair: factors are multiplied before the one division, as published, to the last bit."""
    turning = head_dim * rotated
    if turning % 2:
        raise ShapeError(f"head_dim={head_dim} x rotated={rotated} is {turning}; it must be an even whole number")
    return theta ** (torch.arange(0, int(turning), 2, dtype=torch.float32) / int(turning))


def _check_base(theta: float, rotated: float, window: int) -> None:
    if theta <= 1:
        raise ConfigError(f"theta={theta} must be above 1; Phi-4-Mini uses 10000")
    if not 0 < rotated <= 1:
        raise ConfigError(f"rotated={rotated} must lie in (0, 1]; Phi-4-Mini uses 0.75")
    if window < 1:
        raise ConfigError(f"window={window} must be at least 1 token; Phi-4-Mini uses 131072")
