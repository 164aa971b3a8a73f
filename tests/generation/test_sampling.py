"""Choosing the next token: what each setting keeps, and that a row draws what it draws alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from modalora.errors import ConfigError
from modalora.generation.sampling import NONE, Sampling, sample

SHARES = (0.5, 0.3, 0.15, 0.05)  # of four tokens, no two sums at a limit that the tests use


def logits_of(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows).log()


def drawn(shares: Sequence[float], count: int = 4000, seen: Sequence[int] = (), **settings: Any) -> Tensor:
    """How often each token is drawn, as shares of the draws of one generator after another."""
    sampling = Sampling(**{"temperature": 1.0, **settings})
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    chosen = sample(logits_of(shares).expand(count, -1), [list(seen)] * count, sampling, generators)
    return torch.bincount(chosen, minlength=len(shares)) / count


def kept(shares: Sequence[float], **settings: Any) -> list[int]:
    return drawn(shares, 800, **settings).nonzero().flatten().tolist()


def test_temperature_0_takes_the_likeliest_whatever_the_seed() -> None:
    logits = logits_of(SHARES, SHARES[::-1])
    for seed in range(5):
        sampling = Sampling(seed=seed)
        assert sample(logits, [[0], [0]], sampling, [torch.Generator()] * 2).tolist() == [0, 3]


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_what_has_no_effect_on_greedy_tokens_is_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"{name}={settings[name]} has no effect at temperature=0"):
        Sampling(**settings)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_tempered_softmax_says(temperature: float) -> None:
    told = torch.softmax(logits_of(SHARES)[0] / temperature, dim=-1)
    # 4000 draws: the standard deviation of a share is at most 0.008, four of them are allowed
    torch.testing.assert_close(drawn(SHARES, temperature=temperature), told, atol=0.032, rtol=0)


def test_a_very_low_temperature_is_greedy() -> None:
    assert kept(SHARES, temperature=0.01) == [0]
    for temperature in (1e-7, 1e-40, 1e-50, 5e-324):
        assert kept(SHARES, temperature=temperature) == [0]
    assert kept(SHARES, top_p=1e-320) == [0]
    pushed = Sampling(temperature=1.0, repetition_penalty=1e-40)  # 5 / 1e-40 is infinite in float32
    assert sample(torch.tensor([[1.0, 5.0, -5.0]]), [[1, 2]], pushed, [torch.Generator()]).tolist() == [1]


@pytest.mark.parametrize(("top_k", "places"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_keeps_the_k_likeliest(top_k: int, places: list[int]) -> None:
    assert kept(SHARES, top_k=top_k) == places


def test_top_k_0_keeps_all() -> None:
    assert kept(SHARES, top_k=0) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("top_p", "places"), [(0.01, [0]), (0.4, [0]), (0.6, [0, 1]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_likeliest_up_to_the_one_that_reaches_p(top_p: float, places: list[int]) -> None:
    assert kept(SHARES, top_p=top_p) == places


def test_top_p_finds_the_likeliest_wherever_they_stand() -> None:
    assert kept((0.05, 0.5, 0.15, 0.3), top_p=0.6) == [1, 3]


@pytest.mark.parametrize(("min_p", "places"), [(0.05, [0, 1, 2, 3]), (0.2, [0, 1, 2]), (0.5, [0, 1]), (1.0, [0])])
def test_min_p_keeps_tokens_that_are_at_least_so_likely_beside_the_likeliest(min_p: float, places: list[int]) -> None:
    assert kept(SHARES, min_p=min_p) == places


def test_what_is_kept_is_drawn_in_its_old_proportions() -> None:
    # as above: four standard deviations of a share of 4000 draws
    told = torch.tensor([0.625, 0.375, 0.0, 0.0])
    for settings in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}):
        torch.testing.assert_close(drawn(SHARES, **settings), told, atol=0.032, rtol=0)


def test_the_filters_see_the_tempered_shares() -> None:
    assert kept(SHARES, top_p=0.6, temperature=0.5) == [0]  # the first has 0.68 of the squared shares
    assert kept(SHARES, min_p=0.2, temperature=2.0) == [0, 1, 2, 3]


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_once_per_token() -> None:
    logits = torch.tensor([[2.0, 1.1, -1.0, -1.4]])
    sampling = Sampling(repetition_penalty=2.0)
    assert sample(logits, [[0, 0, 0]], sampling, [torch.Generator()]).tolist() == [1]  # 2 / 2 < 1.1
    assert sample(logits, [[1, 1]], sampling, [torch.Generator()]).tolist() == [0]
    below = torch.tensor([[-1.0, -1.4, -9.0, -9.0]])
    assert sample(below, [[0]], sampling, [torch.Generator()]).tolist() == [1]  # -1 * 2 < -1.4
    assert sample(below, [[0, 1]], sampling, [torch.Generator()]).tolist() == [0]  # each once: -2 and -2.8
    assert sample(below, [[]], sampling, [torch.Generator()]).tolist() == [0]


def test_the_repetition_penalty_divides_a_logit_below_1_too() -> None:
    sampling = Sampling(repetition_penalty=2.0)
    for other, chosen in ((0.3, 1), (0.2, 0)):  # the seen 0.5 becomes 0.25
        assert sample(torch.tensor([[0.5, other]]), [[0]], sampling, [torch.Generator()]).tolist() == [chosen]


def test_a_logit_that_the_repetition_penalty_makes_huge_is_drawn() -> None:
    sampling = Sampling(temperature=0.1, repetition_penalty=1e-40)
    assert sample(torch.tensor([[5.0, 9.0]]), [[0]], sampling, [torch.Generator()]).tolist() == [0]


def test_the_repetition_penalty_leaves_the_given_logits_alone() -> None:
    logits = torch.tensor([[2.0, 1.1]])
    sample(logits, [[0]], Sampling(repetition_penalty=2.0), [torch.Generator()])
    assert logits.tolist() == torch.tensor([[2.0, 1.1]]).tolist()


def test_the_same_seed_draws_the_same_and_another_seed_something_else() -> None:
    logits = torch.zeros(1, 1000)

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(sample(logits, [[]], Sampling(temperature=1.0), [generator])) for _ in range(5)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_a_row_draws_what_it_draws_alone() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    seen = [[1, 2], [3], [4, 4, 5]]

    def draws(rows: list[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(7) for _ in rows]
        steps = [sample(logits[rows], [seen[row] for row in rows], sampling, generators) for _ in range(6)]
        return torch.stack(steps, dim=1).tolist()

    assert draws([0, 1, 2]) == [draws([row])[0] for row in range(3)]
    assert draws([2, 0]) == [draws([2])[0], draws([0])[0]]


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("temperature", -0.1, "at least 0; 0 is greedy"),
        ("temperature", float("nan"), "at least 0"),
        ("temperature", float("inf"), "at least 0"),
        ("top_k", True, "a whole number"),
        ("seed", 2**64, "a whole number of 64 bits"),
        ("repetition_penalty", float("inf"), "above 0"),
        ("top_k", -1, "at least 0; 0 keeps all"),
        ("top_p", 0.0, r"in \(0, 1\]; 1 keeps all"),
        ("top_p", 1.01, r"in \(0, 1\]"),
        ("min_p", -0.01, r"in \[0, 1\]; 0 keeps all"),
        ("min_p", 1.5, r"in \[0, 1\]"),
        ("repetition_penalty", 0.0, "above 0; 1 is none"),
    ],
)
def test_a_bad_setting_is_refused_with_its_rule(setting: str, value: float, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting}={value} must be {rule}"):
        Sampling(**{setting: value})


def test_rows_without_a_finite_highest_logit_get_no_token() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], [-float("inf"), 1.0]])
    generators = [torch.Generator()] * 4
    for setting in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "repetition_penalty": 1.5}):
        chosen = sample(logits, [[0]] * 4, Sampling(**setting), generators).tolist()
        assert chosen[1:3] == [NONE, NONE]
        assert chosen[3] == 1
        assert chosen[0] in (0, 1)


def test_numbers_are_pythons_own_and_none_is_more_than_a_float_holds() -> None:
    assert type(Sampling(temperature=1).temperature) is float
    with pytest.raises(ConfigError, match="temperature=1000.* is more than a float holds"):
        Sampling(temperature=10**400)
