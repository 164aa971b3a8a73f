"""Rescaled rotary tables that follow from a formula, and what all methods share. rope.py is their face.

Sources: RoFormer, arXiv:2104.09864; YaRN, arXiv:2309.00071, which tells of the NTK methods too; each method's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, floor, inf, log, pi
from typing import Any, Literal

import torch
from torch import Tensor

from modalora.errors import ConfigError, ShapeError

# How a transformers config.json tells it: since version 5, and before.
Form = Literal["rope_parameters", "rope_scaling"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """What every method has."""

    theta: float = 10_000.0  # base of the frequencies [b]
    rotated: float = 1.0  # share of each head that turns, (0, 1]
    window: int = 4096  # tokens that the model may read [L']

    def periods(self, head_dim: int, theta: float | None = None) -> Tensor:
        """Return tokens per radian of each unscaled pair, (pairs,) float32. theta: a base in place of its own.

        Raises ShapeError when the share that turns is no whole number of pairs.
        """
        turning = head_dim * self.rotated
        if turning % 2:
            raise ShapeError(
                f"head_dim={head_dim} x rotated={self.rotated} is {turning}; it must be an even whole number"
            )
        exponents = torch.arange(0, int(turning), 2, dtype=torch.float32) / int(turning)
        return (self.theta if theta is None else theta) ** exponents


@dataclass(frozen=True, kw_only=True, slots=True)
class _OneTable(Base):
    """One table for rows of every length."""

    @property
    def switch(self) -> int | None:
        """Length in tokens beyond which the long table applies; None: never."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unscaled(_OneTable):
    """One table, whose cos and sin keep their size."""

    def attention_factor(self, *, long: bool = False) -> float:
        """What cos and sin are multiplied by."""
        return 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain(_Unscaled):
    """Unscaled rotary positions."""

    kind: Literal["plain"] = field(default="plain", repr=False)

    def __post_init__(self) -> None:
        check(self)

    def frequencies(self, head_dim: int, *, long: bool = False) -> Tensor:
        """Return radians per token of each rotated pair, fastest first, (pairs,) float32."""
        return 1.0 / self.periods(head_dim)

    def to_hf(self, form: Form = "rope_parameters") -> dict[str, Any]:
        """Return the rotary keys of a transformers config.json."""
        return hf_form(self, form, "default")


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(_Unscaled):
    """Position interpolation: every frequency divided by the factor, as if positions were (arXiv:2306.15595)."""

    factor: float  # [s]
    kind: Literal["linear"] = field(default="linear", repr=False)

    def __post_init__(self) -> None:
        check(self, factor=self.factor)

    def frequencies(self, head_dim: int, *, long: bool = False) -> Tensor:
        """Return radians per token of each rotated pair, fastest first, (pairs,) float32."""
        return 1.0 / self.periods(head_dim) / self.factor

    def to_hf(self, form: Form = "rope_parameters") -> dict[str, Any]:
        """Return the rotary keys of a transformers config.json."""
        return hf_form(self, form, "linear", factor=self.factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ntk(_Unscaled):
    """NTK-aware scaling: a larger base, such that the slowest pair alone is divided by the whole factor."""

    factor: float  # [s]
    kind: Literal["ntk"] = field(default="ntk", repr=False)

    def __post_init__(self) -> None:
        check(self, factor=self.factor)

    def base(self, head_dim: int) -> float:
        """Return the larger base, b s^(d / (d - 2)). Raises ShapeError for a single pair, which is the fastest."""
        turning = 2 * len(self.periods(head_dim))
        if turning == 2:
            raise ShapeError(f"head_dim={head_dim} x rotated={self.rotated} is one pair; NTK-aware scaling needs two")
        return self.theta * self.factor ** (turning / (turning - 2))

    def frequencies(self, head_dim: int, *, long: bool = False) -> Tensor:
        """Return radians per token of each rotated pair, fastest first, (pairs,) float32."""
        return 1.0 / self.periods(head_dim, self.base(head_dim))

    def to_hf(self, form: Form = "rope_parameters") -> dict[str, Any]:
        """Refuse: transformers has no such type."""
        raise ConfigError(
            "transformers has no type for a fixed NTK-aware base; a model that is Plain(theta=rope.base(head_dim)) is "
            "the same and has one"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicNtk(_OneTable):
    """NTK-aware scaling whose factor grows with the row: each length beyond the original window has its own table.

    `at` gives a row's. The two that `frequencies` knows are those of a row up to the original window, and of one that
    fills the window.
    """

    factor: float
    original_window: int  # [L]
    kind: Literal["dynamic_ntk"] = field(default="dynamic_ntk", repr=False)

    def __post_init__(self) -> None:
        check(self, factor=self.factor, original_window=self.original_window)

    def at(self, length: int) -> Ntk:
        """Return the method of a row of this many tokens."""
        grown = max(length, self.original_window) / self.original_window
        stretch = 1 + self.factor * (grown - 1)
        return Ntk(theta=self.theta, rotated=self.rotated, window=self.window, factor=stretch)

    def attention_factor(self, *, long: bool = False) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    def frequencies(self, head_dim: int, *, long: bool = False) -> Tensor:
        """Return radians per token of each rotated pair, fastest first, (pairs,) float32."""
        return self.at(self.window if long else self.original_window).frequencies(head_dim)

    def to_hf(self, form: Form = "rope_parameters") -> dict[str, Any]:
        """Return the rotary keys of a transformers config.json, where the window is the original one."""
        return {**hf_form(self, form, "dynamic", factor=self.factor), "max_position_embeddings": self.original_window}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingLawNtk(_Unscaled):
    """A larger base by the law of arXiv:2310.05209, which LongRoPE2's paper calls NTK.

    The factor is exactly window / original window at the pair whose period is the original window, and larger beyond.
    """

    original_window: int  # [L]
    kind: Literal["scaling_law_ntk"] = field(default="scaling_law_ntk", repr=False)

    def __post_init__(self) -> None:
        check(self, original_window=self.original_window)
        if self.original_window < 7:
            raise ConfigError(f"original_window={self.original_window} must be above 2 pi: at least 7 tokens")
        if self._exponent * log(self.theta) > log(3e38):  # float32
            raise ConfigError(
                f"window={self.window} and original_window={self.original_window} raise the base {self.theta} to the "
                f"power {self._exponent:.3g}, which no float32 holds; the law is for windows of hundreds of tokens"
            )

    @property
    def _exponent(self) -> float:
        return log(self.window / (2 * pi)) / log(self.original_window / (2 * pi))

    @property
    def base(self) -> float:
        """The larger base, b^(ln(L' / 2 pi) / ln(L / 2 pi))."""
        return self.theta**self._exponent

    def frequencies(self, head_dim: int, *, long: bool = False) -> Tensor:
        """Return radians per token of each rotated pair, fastest first, (pairs,) float32."""
        return 1.0 / self.periods(head_dim, self.base)

    def to_hf(self, form: Form = "rope_parameters") -> dict[str, Any]:
        """Return the rotary keys of a transformers config.json, which is that of a plain one with the larger base."""
        return Plain(theta=self.base, rotated=self.rotated, window=self.window).to_hf(form)


@dataclass(frozen=True, kw_only=True, slots=True)
class _ByParts(_OneTable):
    """Frequencies divided by the factor where a period is rare in the original window, and kept where it is common.

    Source: arXiv:2309.00071, section 3.2.
    """

    factor: float  # [s]
    original_window: int  # [L]
    beta_fast: float = 32.0  # periods in the original window from which on a pair is kept
    beta_slow: float = 1.0  # periods up to which it is divided
    truncate: bool = True  # the two ends of the ramp are whole pairs

    def ramp(self, head_dim: int) -> tuple[float, float]:
        """Return the last pair that is kept and the first that is divided by the whole factor."""
        pairs = len(self.periods(head_dim))
        low, high = (
            pairs * log(self.original_window / (2 * pi * beta)) / log(self.theta)
            for beta in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = floor(low), ceil(high)
        return max(low, 0), min(high, 2 * pairs - 1)

    def frequencies(self, head_dim: int, *, long: bool = False) -> Tensor:
        """Return radians per token of each rotated pair, fastest first, (pairs,) float32."""
        plain = 1.0 / self.periods(head_dim)
        low, high = self.ramp(head_dim)
        pairs = torch.arange(len(plain), dtype=torch.float32)
        divided = (pairs - low) / (high - low if high != low else 0.001)
        return _blend(plain, 1 - divided.clamp(0, 1), self.factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class NtkByParts(_ByParts):
    """The frequencies of YaRN without its attention factor."""

    kind: Literal["ntk_by_parts"] = field(default="ntk_by_parts", repr=False)

    def __post_init__(self) -> None:
        check(self, factor=self.factor, original_window=self.original_window, betas=(self.beta_slow, self.beta_fast))

    def attention_factor(self, *, long: bool = False) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    def to_hf(self, form: Form = "rope_parameters") -> dict[str, Any]:
        """Return the rotary keys of a transformers config.json, which is that of a Yarn whose attention is 1."""
        return _yarn_form(self, form, attention_factor=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Yarn(_ByParts):
    """Frequencies by parts, and an attention factor (arXiv:2309.00071)."""

    mscale: float | None = None  # with mscale_all_dim: the attention factor is the ratio of the two temperatures
    mscale_all_dim: float | None = None
    attention: float | None = None  # attention factor in place of what the factor gives
    kind: Literal["yarn"] = field(default="yarn", repr=False)

    def __post_init__(self) -> None:
        check(self, factor=self.factor, original_window=self.original_window, betas=(self.beta_slow, self.beta_fast))
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ConfigError("mscale and mscale_all_dim change nothing one without the other; give both, or none")
        if self.attention is not None and not 0 < self.attention < inf:
            raise ConfigError(f"attention={self.attention} must be above 0; 1 leaves cos and sin as they are")
        if self.attention is not None and self.mscale is not None:
            raise ConfigError("attention and mscale both set the attention factor; leave one out")

    def attention_factor(self, *, long: bool = False) -> float:
        """0.1 ln s + 1, or what its own settings say."""
        if self.attention is not None:
            return self.attention
        if self.mscale is not None and self.mscale_all_dim is not None:
            return yarn_temperature(self.factor, self.mscale) / yarn_temperature(self.factor, self.mscale_all_dim)
        return yarn_temperature(self.factor)

    def to_hf(self, form: Form = "rope_parameters") -> dict[str, Any]:
        """Return the rotary keys of a transformers config.json."""
        own = {"mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim, "attention_factor": self.attention}
        return _yarn_form(self, form, **{key: value for key, value in own.items() if value is not None})


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3(_Unscaled):
    """Frequencies by parts as Llama 3.1 has them: the ramp is linear in the periods that the original window holds."""

    factor: float  # [s]
    original_window: int  # [L]
    low_freq_factor: float = 1.0  # periods up to which a pair is divided by the whole factor
    high_freq_factor: float = 4.0  # periods from which on it is kept
    kind: Literal["llama3"] = field(default="llama3", repr=False)

    def __post_init__(self) -> None:
        ends = (self.low_freq_factor, self.high_freq_factor)
        check(self, factor=self.factor, original_window=self.original_window, betas=ends)

    def frequencies(self, head_dim: int, *, long: bool = False) -> Tensor:
        """Return radians per token of each rotated pair, fastest first, (pairs,) float32."""
        plain = 1.0 / self.periods(head_dim)
        held = self.original_window / (2 * pi / plain)
        kept = (held - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _blend(plain, kept.clamp(0, 1), self.factor)

    def to_hf(self, form: Form = "rope_parameters") -> dict[str, Any]:
        """Return the rotary keys of a transformers config.json."""
        return hf_form(
            self, form, "llama3", factor=self.factor, original_max_position_embeddings=self.original_window,
            low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor,
        )  # fmt: skip


def yarn_temperature(stretch: float, mscale: float = 1.0) -> float:
    """Return 0.1 mscale ln s + 1 (arXiv:2309.00071, section 3.4)."""
    return 0.1 * mscale * log(stretch) + 1.0 if stretch > 1 else 1.0


def _blend(plain: Tensor, kept: Tensor, factor: float) -> Tensor:
    """Return frequencies of which a share, (pairs,), is kept and the rest divided by the factor.

    The shares are rounded to float32 as in published code: where little is kept, the bits of 1 - kept matter.
    """
    divided = 1 - kept
    return plain * (divided.double() / factor + kept.double()).float()


def check(
    rope: Base,
    *,
    factor: float = 1.0,
    original_window: int | None = None,
    betas: tuple[float, float] | None = None,
) -> None:
    """Refuse numbers outside their bounds. betas: two numbers of periods, ascending. Raises ConfigError."""
    if not 1 < rope.theta < inf:
        raise ConfigError(f"theta={rope.theta} must be above 1 and finite; Phi-4-Mini uses 10000")
    if not 0 < rope.rotated <= 1:
        raise ConfigError(f"rotated={rope.rotated} must lie in (0, 1]; Phi-4-Mini uses 0.75")
    if rope.window < 1:
        raise ConfigError(f"window={rope.window} must be at least 1 token; Phi-4-Mini uses 131072")
    if not 1 <= factor <= 1e6:
        raise ConfigError(f"factor={factor} must lie in [1, 1e6]; a window four times as long needs 4")
    if original_window is not None and not 1 < original_window <= rope.window:
        raise ConfigError(f"original_window={original_window} must lie in (1, window={rope.window}]")
    if betas is not None and not 0 < betas[0] < betas[1]:
        raise ConfigError(
            f"{betas[0]} and {betas[1]} periods: a pair is divided up to the first number and kept from the second on, "
            "so both must be positive and the first the smaller one"
        )


def hf_form(rope: Base, form: Form, kind: str, **inner: Any) -> dict[str, Any]:
    """Return the keys of a config.json: the base within the rotary object since version 5, and beside it before."""
    window, base = {"max_position_embeddings": rope.window}, {
        "rope_theta": rope.theta, "partial_rotary_factor": rope.rotated,
    }  # fmt: skip
    if form == "rope_parameters":
        return {**window, form: {"rope_type": kind, **base, **inner}}
    tag = "type" if kind in ("linear", "dynamic", "longrope") else "rope_type"  # what readers of their time know
    return {**window, **base, form: {tag: kind, **inner} if inner else None}


def _yarn_form(rope: _ByParts, form: Form, **own: float) -> dict[str, Any]:
    return hf_form(
        rope, form, "yarn", factor=rope.factor, original_max_position_embeddings=rope.original_window,
        beta_fast=rope.beta_fast, beta_slow=rope.beta_slow, truncate=rope.truncate, **own,
    )  # fmt: skip
