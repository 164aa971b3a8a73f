"""What a search for rotary divisors may try, and how one candidate becomes another (LongRoPE2, arXiv:2502.20082, 3.2).

Divisors lie on a grid of 0.01 and are whole numbers of hundredths here, so that equal candidates are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor

import numpy as np
from numpy.random import Generator

from modalora.config import SearchConfig
from modalora.errors import ConfigError
from modalora.longrope2.factors import Factors, Stretch, Temperature


@dataclass(frozen=True, slots=True)
class Genome:
    """What of a candidate is searched: its anchor, and the divisor of each pair from there on in hundredths."""

    anchor: int
    tail: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """All candidates: an anchor out of some, and behind it divisors between two bounds that never decrease.

    lowest, highest: bounds in hundredths. seeds: candidates of every first population.
    """

    stretch: Stretch
    anchors: tuple[int, ...]
    lowest: int
    highest: int
    seeds: tuple[Genome, ...] = ()
    temperature: Temperature = "su"

    @property
    def reach(self) -> int:
        """How far beyond its neighbours a divisor may move in one mutation, in hundredths.

        Without it a vector of equal divisors is frozen: between equal neighbours there is nowhere to go.
        """
        return max(1, (self.highest - self.lowest) // 20)

    def check(self, count: int) -> None:
        """Refuse a population that does not hold the first candidates: seeds, or one of each anchor."""
        if (given := len(self.seeds or self.anchors)) > count:
            raise ConfigError(f"population={count} does not hold the {given} first candidates; raise it, or set anchor")

    def factors(self, genome: Genome) -> Factors:
        """Return the divisors of all pairs."""
        tail = [value / 100 for value in genome.tail]
        return Factors.meeting(self.stretch, genome.anchor, tail, self.temperature)

    def flat(self, anchor: int, rng: Generator) -> Genome:
        """Return one divisor for all pairs from the anchor on: the paper's first candidates."""
        value = int(rng.integers(self.lowest, self.highest + 1))
        return Genome(anchor, (value,) * (self.stretch.pairs - anchor))

    def sample(self, rng: Generator) -> Genome:
        """Return a candidate made from none other: a random anchor, and a slope between two random divisors, moved."""
        anchor = int(rng.choice(self.anchors))
        first, last = sorted(rng.integers(self.lowest, self.highest + 1, size=2).tolist())
        slope = np.linspace(first, last, self.stretch.pairs - anchor).round().astype(int)
        return Genome(anchor, self._moved(slope.tolist(), rng, 1.0))

    def mutate(self, parent: Genome, rng: Generator, probability: float) -> Genome:
        """Return a child: each divisor is drawn anew with the probability, near its neighbours, and so is the anchor.

        Every other child has a run of neighbouring divisors shifted by one amount instead, as single ones alone would
        take long to move a slope. A lower anchor adds pairs with divisors between the lowest and the first; a higher
        one takes pairs away.
        """
        anchor, tail = parent.anchor, list(parent.tail)
        if len(self.anchors) > 1 and rng.random() < probability:
            near = [other for other in self.anchors if other != anchor and abs(other - anchor) <= 2]
            anchor = int(rng.choice(near))
            added = max(0, parent.anchor - anchor)
            tail = [*sorted(rng.integers(self.lowest, tail[0] + 1, size=added).tolist()), *tail]
            tail = tail[max(0, anchor - parent.anchor) :]
        change = self._moved(tail, rng, probability) if rng.random() < 0.5 else self._shifted(tail, rng)
        return Genome(anchor, change)

    def cross(self, one: Genome, other: Genome, rng: Generator) -> Genome:
        """Return a child that has the anchor of one of two parents, and each divisor of either."""
        anchor = int(rng.choice((one.anchor, other.anchor)))
        tail = []
        for pair in range(anchor, self.stretch.pairs):
            owners = [parent for parent in (one, other) if pair >= parent.anchor]
            owner = owners[int(rng.integers(len(owners)))]
            tail.append(owner.tail[pair - owner.anchor])
        return Genome(anchor, tuple(sorted(tail)))

    def first(self, rng: Generator, count: int, probability: float) -> list[Genome]:
        """Return a first population: the seeds, every anchor once, then random slopes and mutants by turns.

        Raises ConfigError where so many do not hold seeds and anchors.
        """
        self.check(count)
        found = dict.fromkeys([*self.seeds, *(self.flat(anchor, rng) for anchor in self.anchors if not self.seeds)])
        for _ in range(100 * count):
            if len(found) == count:
                break
            parent = [*found][int(rng.integers(len(found)))]
            child = self.mutate(parent, rng, probability)
            found[self.sample(rng) if len(found) % 2 and not self.seeds else child] = None
        return [*found]

    def _shifted(self, tail: list[int], rng: Generator) -> tuple[int, ...]:
        first, last = sorted(rng.integers(0, len(tail), size=2).tolist())
        by = int(rng.integers(1, 4 * self.reach + 1)) * int(rng.choice((-1, 1)))
        moved = [value + by if first <= at <= last else value for at, value in enumerate(tail)]
        return tuple(sorted(min(max(value, self.lowest), self.highest) for value in moved))

    def _moved(self, tail: list[int], rng: Generator, probability: float) -> tuple[int, ...]:
        chosen = rng.random(len(tail)) < probability
        chosen[int(rng.integers(len(tail)))] = True  # at least one
        bounds = [self.lowest, *tail, self.highest]
        for at in np.flatnonzero(chosen):
            low = max(self.lowest, bounds[at] - self.reach)
            high = min(self.highest, bounds[at + 2] + self.reach)
            tail[at] = int(rng.integers(low, high + 1))
        return tuple(sorted(tail))


def space_of(stretch: Stretch, config: SearchConfig) -> Space:
    """Return the space that settings name.

    longrope2: anchors from the first pair of fewer than ten turns to the first of fewer than one, or the one that is
    set; divisors from s to 2 s behind it. longrope: all pairs, from 1 to 1.25 s, starting from position interpolation
    and the NTK base.
    Raises ConfigError for an anchor that is no pair, and for a window in which every pair turns.
    So it does for a population of fewer than the anchors.
    """
    ratio, pairs = stretch.ratio, stretch.pairs
    temperature: Temperature = config.temperature
    if config.space == "longrope":
        whole = Space(stretch=stretch, anchors=(0,), lowest=100, highest=floor(125 * ratio), temperature=temperature)
        known = [[ratio] * pairs, [ratio ** (pair / (pairs - 1)) for pair in range(pairs)]]
        return replace(whole, seeds=tuple(dict.fromkeys(_on_grid(whole, values) for values in known)))
    if config.anchor is not None and config.anchor >= pairs:
        raise ConfigError(f"anchor={config.anchor} must be one of the pairs 1 .. {pairs - 1}")
    if config.anchor is None and stretch.critical >= pairs:
        raise ConfigError(
            f"all {pairs} pairs complete a turn within {stretch.window} tokens, so no anchor follows from the window; "
            "set anchor, or search every pair with space=longrope"
        )
    anchors = range(max(1, stretch.ten_turns), stretch.critical + 1) if config.anchor is None else (config.anchor,)
    space = Space(
        stretch=stretch, anchors=tuple(anchors), lowest=ceil(round(100 * ratio, 6)), highest=floor(200 * ratio),
        temperature=temperature,
    )  # fmt: skip
    space.check(config.population)
    return space


def _on_grid(space: Space, values: Sequence[float]) -> Genome:
    whole = np.clip(np.round(np.array(values) * 100).astype(int), space.lowest, space.highest)
    return Genome(0, tuple(np.maximum.accumulate(whole).tolist()))
