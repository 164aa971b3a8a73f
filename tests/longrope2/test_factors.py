"""Bounds of the divisors, against the paper's numbers and published models; the file that holds them."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil, e, log, pi, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as some

from modalora.errors import ConfigError
from modalora.longrope2.factors import (
    Factors,
    Provenance,
    Stretch,
    below,
    read_factors,
    temperature_scale,
    write_factors,
)
from modalora.longrope2.methods import other_methods
from modalora.models.sizes import phi4_mini, tiny, window_study
from modalora.nn.rope import LongRope, Plain, Rope, Yarn

# The published LLaMA3-8B factors, 8,192 to 131,072 tokens, anchor 33 (nnScaler's example config).
LLAMA3 = (
    1, 1.097906416, 1.205398499, 1.323414747, 1.452985542, 1.595242149, 1.751426591, 1.922902493, 2.111166985,
    2.317863779, 2.544797515, 2.79394952, 3.067495105, 3.367822558, 3.697553996, 4.059568257, 4.457026037, 4.893397485,
    5.372492496, 5.898493984, 6.475994392, 7.110035795, 7.806153921, 8.570426477, 9.40952622, 10.33077921, 11.34222878,
    12.45270576, 13.67190555, 15.01047283, 16.48009443, 18.09360142, 19.8650811, 21.81, 21.87, 21.88, 22.23, 22.28,
    22.53, 22.65, 22.73, 22.89, 22.92, 23.18, 23.23, 23.36, 23.42, 23.47, 23.51, 23.52, 23.75, 23.82, 23.89, 24.06,
    24.13, 24.14, 24.30, 24.53, 24.67, 24.75, 24.97, 25.49, 26.01, 26.05,
)  # fmt: skip
EIGHT_B = Stretch(theta=5e5, pairs=64, window=8192, target=131_072)
FOUND = Factors.meeting(Stretch(theta=1000.0, pairs=32, window=128, target=1024), 12, [8.5 + i / 10 for i in range(20)])


def period(stretch: Stretch, pair: int) -> float:
    """Tokens of a full turn of a pair."""
    return 2 * pi * stretch.theta ** (pair / stretch.pairs)


@pytest.mark.parametrize(
    ("theta", "pairs", "window", "critical", "ten_turns"),
    [  # Phi3-mini, LLaMA3-8B, Phi-4-mini, LLaMA2-7B, and bases of small studies
        (1e4, 48, 2048, 31, 19),
        (5e5, 64, 8192, 35, 24),
        (1e4, 48, 4096, 34, 22),
        (1e4, 64, 4096, 46, 30),
        (1e4, 32, 128, 11, 3),
        (1e4, 32, 256, 13, 5),
        (1e3, 32, 256, 18, 7),
        (500.0, 32, 256, 20, 8),
    ],
)
def test_the_critical_pairs_are_those_of_the_paper(
    theta: float, pairs: int, window: int, critical: int, ten_turns: int
) -> None:
    stretch = Stretch(theta=theta, pairs=pairs, window=window, target=2 * window)
    assert (stretch.critical, stretch.ten_turns) == (critical, ten_turns)


@given(some.floats(50, 1e7), some.integers(4, 256), some.integers(64, 1_000_000))
def test_the_critical_pair_is_the_first_whose_period_the_window_does_not_hold(
    theta: float, pairs: int, window: int
) -> None:
    stretch = Stretch(theta=theta, pairs=pairs, window=window, target=window + 1)
    raw = pairs * log(window / (2 * pi)) / log(theta)
    assume(abs(raw - round(raw)) > 1e-9)  # where a period equals the window, rounding decides
    assert period(stretch, stretch.critical - 1) < window <= period(stretch, stretch.critical)
    assert 0 <= stretch.ten_turns <= stretch.critical
    assert 10 * period(stretch, stretch.ten_turns) >= window


def test_the_last_pair_of_phi3_mini_turns_once_in_51_862_tokens() -> None:
    assert period(Stretch(theta=1e4, pairs=48, window=2048, target=131_072), 47) == pytest.approx(51_862, abs=1)


def test_pairs_below_the_anchor_of_phi4_mini_are_published_so() -> None:
    rope = phi4_mini().decoder.rope
    assert isinstance(rope, LongRope)
    ours = Factors.meeting(Stretch.of(rope, 128, 131_072), 31, rope.long_factor[31:]).long
    # ten significant digits are printed, of numbers up to 29
    assert max(abs(one - other) for one, other in zip(ours, rope.long_factor, strict=True)) <= 5e-9


def test_pairs_below_the_anchor_of_llama3_8b_are_published_so() -> None:
    ours = Factors.meeting(EIGHT_B, 33, LLAMA3[33:]).long
    assert len(ours) == len(LLAMA3) == 64
    # ten significant digits are printed, of numbers up to 26
    assert max(abs(one - other) for one, other in zip(ours, LLAMA3, strict=True)) <= 5e-9


def test_below_the_anchor_stands_an_ntk_base() -> None:
    found = Factors.meeting(EIGHT_B, 33, LLAMA3[33:])
    for pair in range(33):  # an NTK base: theta' = theta * 21.81 ^ (pairs / anchor), compared as periods
        base = 5e5 * 21.81 ** (64 / 33)
        assert found.long[pair] * period(EIGHT_B, pair) == pytest.approx(2 * pi * base ** (pair / 64), rel=5e-9)


def test_both_meanings_of_the_real_critical_dimension_differ_for_llama3_8b() -> None:
    found = Factors.meeting(EIGHT_B, 33, LLAMA3[33:])
    assert (found.anchor, found.first_stretched) == (33, 30)  # the paper names 30
    rope = phi4_mini().decoder.rope
    assert isinstance(rope, LongRope)
    assert Factors.meeting(Stretch.of(rope, 128, 131_072), 31, rope.long_factor[31:]).first_stretched == 31
    assert replace(found, long=(1.0,) * 64).first_stretched is None


@given(some.integers(1, 60), some.floats(1, 64))
def test_below_the_anchor_divisors_grow_by_one_ratio_from_one(anchor: int, value: float) -> None:
    found = (*below(anchor, value), value)
    assert found[0] == 1.0
    for one, other in zip(found, found[1:], strict=False):
        assert other / one == pytest.approx(value ** (1 / anchor), rel=1e-12)


def test_temperatures_are_the_published_ones() -> None:
    assert temperature_scale("su", 16, 8192) == pytest.approx(1.14354, abs=5e-6)
    assert temperature_scale("yarn", 16, 8192) == pytest.approx(1.27726, abs=5e-6)
    assert temperature_scale("su", 8, 128) ** 2 == pytest.approx(log(1024) / log(128))
    assert {temperature_scale(policy, 1.0, 128) for policy in ("su", "yarn", "none")} == {1.0}
    assert temperature_scale("none", 16, 8192) == 1.0


def test_factors_become_a_config_that_divides_the_frequencies() -> None:
    base = window_study().decoder.rope
    rope = FOUND.rope(base)
    plain = Plain(theta=1000.0, window=128).frequencies(64).double()
    torch.testing.assert_close(
        plain / rope.frequencies(64, long=True).double(), torch.tensor(FOUND.long).double(), atol=0, rtol=1e-6
    )
    assert torch.equal(rope.frequencies(64), Plain(theta=1000.0, window=128).frequencies(64))
    assert (rope.window, rope.original_window, rope.switch) == (1024, 128, 128)
    assert rope.attention_factor(long=True) == pytest.approx(sqrt(log(1024) / log(128)))
    assert rope.attention_factor() == 1.0  # short rows stay as they were trained


def test_one_temperature_for_both_is_written_as_other_libraries_read_it() -> None:
    rope = replace(FOUND, short_scale=sqrt(1 + log(8) / log(128))).rope(window_study().decoder.rope)
    assert rope.mscale is None
    assert rope.attention_factor() == rope.attention_factor(long=True) == pytest.approx(1.1952, abs=5e-5)


def test_phi4_mini_keeps_the_attention_factor_of_its_short_rows() -> None:
    base = phi4_mini().decoder.rope
    assert isinstance(base, LongRope)
    same = Stretch.of(base, 128, 131_072)
    rope = Factors.meeting(same, 31, base.long_factor[31:]).rope(base)
    assert rope.mscale is None  # to the window that it has: the one factor of its file
    rope = Factors.meeting(replace(same, target=262_144), 31, [64.0] * 17).rope(base)
    assert rope.attention_factor() == base.attention_factor() == pytest.approx(1.1902, abs=5e-5)
    assert rope.attention_factor(long=True) == pytest.approx(1.2247, abs=5e-5)  # sqrt(18 / 12)


@pytest.mark.parametrize("short", [(1.0,) * 6, (1.1, 1.05, 1.2, 1.3, 1.5, 2.0)])
@pytest.mark.parametrize("own", [{}, {"mscale": (1.07, 1.2)}, {"temperature": "yarn"}, {"regime": "short"}])
def test_short_rows_keep_the_table_that_a_model_came_with(short: tuple[float, ...], own: dict[str, Any]) -> None:
    base = LongRope(short_factor=short, long_factor=(2.0,) * 6, window=512, original_window=128, **own)
    stretch = Stretch.of(base, 12, 1024)
    found = [Factors.meeting(stretch, 2, [8.0] * 4), *other_methods(stretch).values()]
    for rope in [factors.rope(base) for factors in found]:
        assert torch.equal(rope.frequencies(12), base.frequencies(12))
        assert rope.attention_factor() == base.attention_factor()
        assert rope.switch == 128


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (Yarn(factor=4.0, window=512, original_window=128), "kind 'yarn' was extended already, and tells no window"),
        (
            LongRope(short_factor=(1.0,) * 6, long_factor=(2.0,) * 6, window=512, original_window=128, regime="long"),
            "regime='long' reads short rows by its long table",
        ),
    ],
)
def test_a_model_whose_short_rows_cannot_be_kept_is_refused(base: Rope, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Stretch.of(base, 12, 1024)


def test_factors_are_refused_by_a_model_of_another_window() -> None:
    with pytest.raises(ConfigError, match="stretch a window of 128 tokens, and the model's is 256"):
        FOUND.rope(tiny().decoder.rope)


def test_a_file_gives_back_the_same_bits(tmp_path: Path) -> None:
    told = Provenance(
        model="ab", documents=("cd", "ef"), seed=3, settings={"population": 64}, loss=0.1 + 0.2, evaluations=9
    )
    uneven = replace(FOUND, long=tuple(value + 1e-15 * 2**pair for pair, value in enumerate(FOUND.long)))
    write_factors(tmp_path / "deep" / "factors.json", uneven, told)
    assert read_factors(tmp_path / "deep" / "factors.json") == (uneven, told)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["factors.json"]


def broken(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "factors.json"
    write_factors(path, FOUND, Provenance())
    fields = json.loads(path.read_text())
    fields["factors"] |= changes
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"long": [1.0, 2.0]}, "short has 32 factors for 2 pairs"),
        ({"long": [2.0] + [1.0] * 31}, "long must not decrease"),
        ({"long": [0.0] * 32}, "long holds 0.0; a factor divides"),
        ({"short_scale": 0}, "short_scale=0.0 must be above 0"),
        ({"long": [float("inf")] * 32}, "factors.long.0=inf: Input should be a finite number"),
        ({"long": "8"}, "factors.long='8'"),
        ({"anchor": 32}, "anchor=32 must be one of the pairs 0 .. 31"),
        ({"target": 128}, "window=128 must be 8 tokens or more, and less than target=128"),
        ({"temperature": "hot"}, "factors.temperature='hot'"),
        ({"tail": []}, "unknown key 'factors.tail'"),
    ],
)
def test_a_malformed_file_is_refused_by_name_and_rule(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = broken(tmp_path, **changes)
    with pytest.raises(ConfigError) as refused:
        read_factors(path)
    assert told in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "is missing"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "no factors file of format 2"),
    ],
)
def test_what_is_no_factors_file_is_refused(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "factors.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_factors(path)


@pytest.mark.parametrize(
    ("fields", "told"),
    [({"target": 128}, "target=128 must be longer"), ({"theta": 1.0}, "theta=1.0"), ({"pairs": 1}, "pairs=1")],
)
def test_a_stretch_that_is_none_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Stretch(**({"theta": e**5, "pairs": ceil(31.5), "window": 128, "target": 1024} | fields))
