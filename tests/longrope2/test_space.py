"""Candidates and what becomes of them: bounds, order, and nothing that is frozen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from modalora.config import SearchConfig
from modalora.errors import ConfigError
from modalora.longrope2.factors import Stretch
from modalora.longrope2.space import Genome, Space, space_of

STUDY = Stretch(theta=1000.0, pairs=32, window=128, target=1024)
SPACES = {
    "found anchor": space_of(STUDY, SearchConfig()),
    "fixed anchor": space_of(STUDY, SearchConfig(anchor=11)),
    "all pairs": space_of(STUDY, SearchConfig(space="longrope")),
    "phi4-mini": space_of(Stretch(theta=1e4, pairs=48, window=4096, target=131_072), SearchConfig()),
}
a_space = some.sampled_from(sorted(SPACES)).map(SPACES.__getitem__)


def keeps_the_rules(space: Space, genome: Genome) -> bool:
    """Written from the paper, not from the code: bounds above the anchor, never decreasing, the NTK rule below."""
    long, ratio = space.factors(genome).long, space.stretch.ratio
    low, high = (1.0, 1.25 * ratio) if space.anchors == (0,) else (ratio, 2 * ratio)
    tail = long[genome.anchor :]
    lower = all(long[pair] == tail[0] ** (pair / genome.anchor) for pair in range(genome.anchor))
    rises = all(one <= other for one, other in zip(long, long[1:], strict=False))
    grid = all(abs(100 * value - round(100 * value)) < 1e-9 for value in tail)
    bounds = low <= tail[0] and tail[-1] <= high
    return genome.anchor in space.anchors and len(long) == space.stretch.pairs and lower and rises and grid and bounds


@given(a_space, some.integers(0, 2**32), some.floats(0.01, 1.0))
def test_every_candidate_keeps_the_rules(space: Space, seed: int, probability: float) -> None:
    rng = np.random.default_rng(seed)
    one, other = space.sample(rng), space.flat(space.anchors[-1], rng)
    for _ in range(5):
        child = space.mutate(one, rng, probability)
        mixed = space.cross(child, other, rng)
        for genome in (one, other, child, mixed):
            assert keeps_the_rules(space, genome)
        assert mixed.anchor in (child.anchor, other.anchor)
        one, other = child, mixed


@given(a_space, some.integers(0, 2**32))
def test_a_child_of_two_has_each_divisor_of_a_parent_s_same_pair(space: Space, seed: int) -> None:
    pairs, lowest = space.stretch.pairs, space.lowest
    rng = np.random.default_rng(seed)
    # divisors that tell pair and parent, and rise with the pair whoever they are of
    one, other = (
        Genome(anchor, tuple(lowest + 2 * pair + parent for pair in range(anchor, pairs)))
        for parent, anchor in enumerate((space.anchors[0], space.anchors[-1]))
    )
    child = space.cross(one, other, rng)
    assert child.anchor in (one.anchor, other.anchor)
    for pair in range(child.anchor, pairs):
        parent = (child.tail[pair - child.anchor] - lowest) - 2 * pair
        assert parent in (0, 1)
        assert pair >= (one, other)[parent].anchor


@pytest.mark.parametrize("probability", [0.1, 0.3, 1.0])
def test_a_mutant_is_rarely_its_parent(probability: float) -> None:
    # it may be: a divisor drawn anew can come out as it was, and a shift can end at a bound
    space, rng = SPACES["found anchor"], np.random.default_rng(0)
    parents = [space.sample(rng) for _ in range(500)]
    assert sum(space.mutate(parent, rng, probability) != parent for parent in parents) > 475


@given(a_space, some.integers(0, 2**32))
def test_one_seed_gives_one_candidate(space: Space, seed: int) -> None:
    def line(rng: np.random.Generator) -> list[Genome]:
        first = space.first(rng, 20, 0.3)
        return [*first, space.mutate(first[0], rng, 0.3), space.cross(first[1], first[-1], rng)]

    assert line(np.random.default_rng(seed)) == line(np.random.default_rng(seed))


@pytest.mark.parametrize("name", ["found anchor", "phi4-mini"])
@pytest.mark.parametrize("seed", range(5))
def test_the_first_population_tries_every_anchor_and_repeats_nothing(name: str, seed: int) -> None:
    space = SPACES[name]
    first = space.first(np.random.default_rng(seed), 64, 0.3)
    assert len(set(first)) == 64
    assert {genome.anchor for genome in first} == set(space.anchors)
    assert all(keeps_the_rules(space, genome) for genome in first)


def test_anchors_are_those_between_ten_turns_and_one() -> None:
    assert SPACES["found anchor"].anchors == tuple(range(STUDY.ten_turns, STUDY.critical + 1))
    assert SPACES["phi4-mini"].anchors == tuple(range(22, 35))
    assert SPACES["fixed anchor"].anchors == (11,)


def test_no_genome_is_frozen() -> None:
    """The paper's flat candidates, moved only between their neighbours, keep all but their ends for ever."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        space = SPACES["fixed anchor"]
        start = genome = space.flat(11, rng)
        for _ in range(8):
            genome = space.mutate(genome, rng, 0.3)
        changed = sum(one != other for one, other in zip(start.tail, genome.tail, strict=True))
        assert changed > len(start.tail) / 2


def test_the_anchor_moves_both_ways() -> None:
    rng = np.random.default_rng(0)
    space = SPACES["found anchor"]
    middle = space.flat(9, rng)
    found = {space.mutate(middle, rng, 0.3).anchor for _ in range(100)}
    assert found == {7, 8, 9, 10, 11}


def test_a_search_of_all_pairs_starts_from_interpolation_and_the_ntk_base() -> None:
    space = space_of(STUDY, SearchConfig(space="longrope"))
    first = [space.factors(genome).long for genome in space.first(np.random.default_rng(0), 16, 0.3)]
    assert first[0] == (8.0,) * 32
    assert first[1] == pytest.approx([8 ** (pair / 31) for pair in range(32)], abs=0.005)
    assert len(first) == 16


def test_bounds_of_an_uneven_stretch_lie_inside_it() -> None:
    space = space_of(Stretch(theta=1000.0, pairs=32, window=300, target=1001), SearchConfig())
    assert (space.lowest, space.highest) == (334, 667)  # s = 3.3367


@pytest.mark.parametrize(
    ("stretch", "fields", "told"),
    [
        (STUDY, {"anchor": 32}, "anchor=32 must be one of the pairs 1 .. 31"),
        (Stretch(theta=20.0, pairs=8, window=4096, target=8192), {}, "all 8 pairs complete a turn within 4096"),
    ],
)
def test_a_space_that_is_none_is_refused(stretch: Stretch, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        space_of(stretch, SearchConfig(**fields))


def test_a_population_smaller_than_the_anchors_is_refused() -> None:
    with pytest.raises(ConfigError, match="population=8 does not hold the 11 first candidates"):
        SPACES["found anchor"].first(np.random.default_rng(0), 8, 0.3)
    with pytest.raises(ConfigError, match="population=8 does not hold the 11 first candidates"):
        space_of(STUDY, SearchConfig(population=8))


def test_an_anchor_belongs_to_no_search_of_all_pairs() -> None:
    with pytest.raises(ConfigError, match="searches every pair"):
        SearchConfig(space="longrope", anchor=3)
