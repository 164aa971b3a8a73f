"""Divisors of rotary frequencies for a longer window: what bounds them, and the file that holds them.

Source: LongRoPE2, arXiv:2502.20082, sections 3.1 and 3.2; paper symbols in [ ]. Pairs count from 0, the fastest, and a
divisor [λ] above 1 stretches the period of its pair. Windows and periods are tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, inf, isfinite, log, pi
from pathlib import Path
from typing import Any, Literal

from modalora.config import parse
from modalora.disk import read_json, write_json
from modalora.errors import CheckpointError, ConfigError
from modalora.nn.rope import LongRope, Plain, Rope, su_temperature, yarn_temperature

FORMAT = 2
Temperature = Literal["su", "yarn", "none"]


def temperature_scale(policy: Temperature, stretch: float, window: int) -> float:
    """Return what cos and sin are multiplied by, so that attention stays as sharp over more keys.

    su: sqrt(1 + ln s / ln L), of every LongRoPE config; yarn: 0.1 ln s + 1 (arXiv:2309.00071, section 3.4); none: 1.
    All are 1 for a stretch of 1 or less.
    """
    if policy == "none":
        return 1.0
    return su_temperature(stretch, window) if policy == "su" else yarn_temperature(stretch)


def trained_window(rope: Rope) -> int:
    """Return the window that a model had before LongRoPE's factors.

    Raises ConfigError for a model that was rescaled otherwise, and for one that reads no row by its short table.
    """
    if isinstance(rope, Plain):
        return rope.window
    if not isinstance(rope, LongRope):
        raise ConfigError(
            f"a model with rotary positions of kind {rope.kind!r} was extended already, and tells no window that it "
            "was first trained on; start from the model before that"
        )
    if rope.regime == "long":
        raise ConfigError(
            "a model with regime='long' reads short rows by its long table, so an extension cannot keep them; start "
            "from the model before that"
        )
    return rope.original_window


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """The rotary positions of a trained model, and the window that it is to reach.

    short, short_scale: of rows within the trained window, divisors and what cos and sin are multiplied by. They differ
    from 1 in a model that was extended before; what is searched divides plain frequencies all the same, which such a
    model was trained with first.
    """

    theta: float  # base of the frequencies [θ]
    pairs: int  # that turn, of a head [d / 2]
    window: int  # trained [L]
    target: int  # wanted [L']
    short: tuple[float, ...] = ()  # (): all 1
    short_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.theta <= 1 or self.pairs < 2 or self.window < 8:
            raise ConfigError(
                f"theta={self.theta}, pairs={self.pairs}, window={self.window}: a base above 1, two pairs and a window "
                "of 8 tokens are the least; Phi-4-Mini has 10000, 48 and 4096"
            )
        if self.target <= self.window:
            raise ConfigError(f"target={self.target} must be longer than the trained window of {self.window} tokens")

    @classmethod
    def of(cls, rope: Rope, head_dim: int, target: int) -> Stretch:
        """Return the stretch of a model to a target window.

        Raises ConfigError where its window is as long already, or unknown.
        """
        found = cls(theta=rope.theta, pairs=len(rope.frequencies(head_dim)), window=trained_window(rope), target=target)
        if not isinstance(rope, LongRope):
            return found
        return replace(found, short=rope.short_factor, short_scale=rope.attention_factor())

    @property
    def ratio(self) -> float:
        """How many times longer the target is [s]."""
        return self.target / self.window

    @property
    def critical(self) -> int:
        """The first pair that completes no full turn in the trained window [d_tcd / 2]; `pairs` or more: all do."""
        return _first_beyond(self, turns=1)

    @property
    def ten_turns(self) -> int:
        """The first pair that completes fewer than ten turns: the lowest anchor that a search tries."""
        return _first_beyond(self, turns=10)


def _first_beyond(stretch: Stretch, turns: int) -> int:
    raw = stretch.pairs * log(stretch.window / (2 * pi * turns)) / log(stretch.theta)
    return max(0, ceil(raw))


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """A divisor for each rotated pair: beyond the trained window, and within it.

    anchor: the pair from which on they are chosen one by one; below it they are an NTK base that meets the anchor's,
    so pair i has long[anchor] ^ (i / anchor). 0: all are chosen.
    temperature: of rows beyond the trained window. short, short_scale: as in Stretch.
    """

    anchor: int
    window: int
    target: int
    long: tuple[float, ...]
    short: tuple[float, ...] = ()  # (): all 1
    temperature: Temperature = "su"
    short_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "short", self.short or (1.0,) * len(self.long))
        for name, values in (("long", self.long), ("short", self.short)):
            if len(values) != len(self.long) or not values:
                raise ConfigError(f"{name} has {len(values)} factors for {len(self.long)} pairs; give one per pair")
            if bad := [value for value in values if not 0 < value < inf]:
                raise ConfigError(f"{name} holds {bad[0]}; a factor divides a frequency and must be above 0")
        if any(one > other for one, other in zip(self.long, self.long[1:], strict=False)):
            raise ConfigError("long must not decrease from pair to pair: slow pairs are stretched the most")
        if not 0 < self.short_scale < inf:
            raise ConfigError(f"short_scale={self.short_scale} must be above 0; 1 leaves cos and sin as they are")
        if not 0 <= self.anchor < len(self.long):
            raise ConfigError(f"anchor={self.anchor} must be one of the pairs 0 .. {len(self.long) - 1}")
        if not 8 <= self.window < self.target:
            raise ConfigError(f"window={self.window} must be 8 tokens or more, and less than target={self.target}")

    @classmethod
    def meeting(cls, stretch: Stretch, anchor: int, tail: Sequence[float], temperature: Temperature = "su") -> Factors:
        """Return the factors whose pairs from the anchor on have the values of the tail."""
        long = (*below(anchor, tail[0]), *tail)
        return cls(
            anchor=anchor, window=stretch.window, target=stretch.target, long=long, short=stretch.short,
            temperature=temperature, short_scale=stretch.short_scale,
        )  # fmt: skip

    @property
    def tail(self) -> tuple[float, ...]:
        """The factors that were chosen one by one."""
        return self.long[self.anchor :]

    @property
    def first_stretched(self) -> int | None:
        """The first pair that is stretched by s or more; None: none is.

        Besides the anchor this is what "the real critical dimension" may mean: of the published LLaMA3-8B factors the
        anchor is 33, and the pair that the paper names, 30, is the first of 16 or more.
        """
        ratio = self.target / self.window
        return next((pair for pair, value in enumerate(self.long) if value >= ratio), None)

    def rope(self, base: Rope) -> LongRope:
        """Return a model's rotary positions with these factors, up to the target window.

        Raises ConfigError for a model of another window or number of pairs.
        """
        window = trained_window(base)
        if window != self.window:
            raise ConfigError(f"these factors stretch a window of {self.window} tokens, and the model's is {window}")
        scale = temperature_scale(self.temperature, self.target / self.window, self.window)
        is_one = self.temperature == "su" and self.short_scale == scale
        return LongRope(
            short_factor=self.short,
            long_factor=self.long,
            theta=base.theta,
            rotated=base.rotated,
            window=self.target,
            original_window=self.window,
            mscale=None if is_one else (self.short_scale, scale),  # None is what other libraries can read
        )


def below(anchor: int, value: float) -> tuple[float, ...]:
    """Return the factors of the pairs below the anchor: the NTK base that gives the anchor its value."""
    return tuple(value ** (pair / anchor) for pair in range(anchor))


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where factors come from.

    model: SHA-256 of the weights. documents: of each document that guided the search. settings: of the search, and
    what else makes it repeatable. loss: mean nats of the documents' answers.
    """

    model: str = ""
    documents: tuple[str, ...] = ()
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    loss: float | None = None
    evaluations: int = 0

    def __post_init__(self) -> None:
        if self.loss is not None and not isfinite(self.loss):
            raise ConfigError(f"loss={self.loss} must be a finite number of nats")


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    format: int
    factors: Factors
    provenance: Provenance


def write_factors(path: Path, factors: Factors, provenance: Provenance) -> None:
    """Write a factors file: JSON, whole or not at all."""
    write_json(path, {"format": FORMAT, "factors": asdict(factors), "provenance": asdict(provenance)})


def read_factors(path: Path) -> tuple[Factors, Provenance]:
    """Return what a factors file holds. Raises ConfigError naming the file, the key and the rule it breaks."""
    try:
        fields = read_json(path)
    except CheckpointError as error:
        raise ConfigError(f"factors file {error}") from None
    if fields.get("format") != FORMAT:
        raise ConfigError(f"{path} is no factors file of format {FORMAT}; `format` is {fields.get('format')!r:.40}")
    try:
        found = parse(_File, fields, str(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return found.factors, found.provenance
