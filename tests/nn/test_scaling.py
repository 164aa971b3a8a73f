"""Rescaled rotary tables: what the formulas promise, the numbers that papers print, and that configs keep them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from math import log, pi, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalora.config import parse
from modalora.errors import ConfigError, ShapeError
from modalora.models.decoder import DecoderConfig
from modalora.nn.rope import (
    METHODS,
    DynamicNtk,
    Linear,
    Llama3,
    LongRope,
    Ntk,
    NtkByParts,
    Plain,
    Rope,
    ScalingLawNtk,
    Yarn,
    as_longrope,
    divisors,
    from_hf,
    is_long,
    read_rope,
    rotation,
    su_temperature,
    table_number,
    tables,
    yarn_temperature,
)

PHI3 = {"theta": 1e4, "window": 131_072, "original_window": 2048}  # Phi3-mini, head_dim 96
LLAMA3 = {"theta": 5e5, "window": 131_072, "original_window": 8192}  # LLaMA3-8B, head_dim 128


def every(window: int = 1024, original: int = 128, **base: Any) -> list[Rope]:
    """Return one of each method, all of them from the original window to the window."""
    factor, pairs = window / original, 32
    own = {"window": window, "factor": factor} | base
    both = own | {"original_window": original}
    plain = {key: value for key, value in both.items() if key != "factor"}
    return [
        Plain(window=window, **base),
        Linear(**own),
        Ntk(**own),
        DynamicNtk(**both),
        ScalingLawNtk(**plain),
        NtkByParts(**both),
        Yarn(**both),
        Llama3(**both),
        LongRope(short_factor=(1.0,) * pairs, long_factor=tuple(factor ** (i / pairs) for i in range(pairs)), **plain),
    ]


def test_every_method_is_here() -> None:
    assert [type(rope) for rope in every()] == list(METHODS.values())
    assert [rope.kind for rope in every()] == list(METHODS)


@pytest.mark.parametrize("place", range(len(METHODS)), ids=METHODS)
@settings(deadline=None, max_examples=20)
@given(theta=st.floats(2, 1e6), window=st.integers(7, 10**6))
def test_a_method_that_stretches_by_one_is_plain_to_the_last_bit(place: int, theta: float, window: int) -> None:
    rope, plain = every(window, window, theta=theta)[place], Plain(theta=theta, window=window)
    positions = torch.tensor([[0, 1, window, 131_071]])
    for long in (False, True):
        assert torch.equal(rope.frequencies(64, long=long), plain.frequencies(64))
        assert rope.attention_factor(long=long) == 1.0
        told = rotation(plain, 64, positions, torch.tensor([[long]]))
        if isinstance(rope, DynamicNtk):
            assert rope.at(window).factor == 1.0
        else:
            found = rotation(rope, 64, positions, torch.tensor([[long]]))
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, told, strict=True))


def test_a_yarn_temperature_of_a_longrope_that_stretches_by_one_is_one() -> None:
    rope = LongRope(short_factor=(1.0,), long_factor=(1.0,), window=512, original_window=512, temperature="yarn")
    assert rope.attention_factor() == rope.attention_factor(long=True) == 1.0


def test_interpolation_is_position_over_factor() -> None:
    positions, none = torch.arange(1024)[None], torch.tensor([[False]])
    stretched = rotation(Linear(factor=8.0), 64, positions, none)
    squeezed = rotation(Plain(), 64, positions / 8, none)
    for ours, theirs in zip(stretched, squeezed, strict=True):
        # dividing by 8 rounds nothing: positions and frequencies are multiplied to the same bits
        assert torch.equal(ours, theirs)


def test_ntk_leaves_the_fastest_pair_and_divides_the_slowest_by_the_factor() -> None:
    found = divisors(Ntk(factor=16.0, theta=5e5), 128)
    assert found[0] == 1
    assert float(found[-1]) == pytest.approx(16, rel=1e-5)  # a float32 power
    assert bool((found.diff() > 0).all())
    with pytest.raises(ShapeError, match="one pair"):
        Ntk(factor=2.0).frequencies(2)


@pytest.mark.parametrize(("fields", "pairs", "told"), [(PHI3, 48, 7_494_913), (LLAMA3, 64, 79_760_692)])
def test_the_scaling_law_has_the_bases_that_longrope2s_paper_compares_with(
    fields: dict[str, Any], pairs: int, told: int
) -> None:
    rope = ScalingLawNtk(**fields)
    assert round(rope.base) == told
    found = divisors(rope, 2 * pairs)
    assert bool((found.diff() > 0).all())
    critical = pairs * log(rope.original_window / (2 * pi)) / log(rope.theta)  # the pair whose period is the window
    # the stretch is reached there exactly: (b'/b)^(i/h)
    stretch = rope.window / rope.original_window
    assert (rope.base / rope.theta) ** (critical / pairs) == pytest.approx(stretch, rel=1e-12)
    low = int(critical)
    assert float(found[low]) < stretch < float(found[low + 1])


@pytest.mark.parametrize(("fields", "pairs", "ramp"), [(PHI3, 48, (12, 31)), (LLAMA3, 64, (18, 35))])
def test_yarn_keeps_what_turns_often_and_divides_what_turns_once(
    fields: dict[str, Any], pairs: int, ramp: tuple[int, int]
) -> None:
    stretch = fields["window"] / fields["original_window"]
    rope = Yarn(factor=stretch, **fields)
    low, high = ramp
    assert rope.ramp(2 * pairs) == ramp
    found = divisors(rope, 2 * pairs)
    assert bool((found[: low + 1] == 1).all())
    torch.testing.assert_close(found[high:], torch.full((pairs - high,), stretch), rtol=2e-7, atol=0)
    assert bool((found[low : high + 1].diff() > 0).all())
    assert torch.equal(rope.frequencies(2 * pairs), NtkByParts(factor=stretch, **fields).frequencies(2 * pairs))


def test_a_ramp_need_not_end_at_whole_pairs() -> None:
    rope = Yarn(factor=64.0, truncate=False, **PHI3)
    low, high = rope.ramp(96)
    assert 12 < low < 13
    assert 30 < high < 31


def test_llama3_keeps_periods_below_a_quarter_of_the_window_and_divides_those_beyond_it() -> None:
    rope = Llama3(factor=8.0, **LLAMA3)
    found, periods = divisors(rope, 128), 2 * pi * rope.periods(128)
    assert bool((found[periods < 8192 / 4] == 1).all())
    assert bool((found[periods > 8192] == 8).all())
    between = (periods > 8192 / 4) & (periods < 8192)
    assert int(between.sum()) > 5
    assert bool(((found[between] > 1) & (found[between] < 8)).all())


def test_temperatures() -> None:
    # fact sheet of arXiv:2502.20082's code; six digits are printed
    assert su_temperature(16, 8192) == pytest.approx(1.14354, abs=5e-6)
    assert su_temperature(16, 8192) ** 2 == pytest.approx(log(131_072) / log(8192), rel=1e-12)
    assert yarn_temperature(16) == pytest.approx(1.27726, abs=5e-6)
    assert Yarn(factor=16.0, **LLAMA3).attention_factor() == yarn_temperature(16)
    assert Yarn(factor=16.0, attention=1.5, **LLAMA3).attention_factor() == 1.5
    two = Yarn(factor=16.0, mscale=0.707, mscale_all_dim=1.0, **LLAMA3)
    assert two.attention_factor() == pytest.approx((0.0707 * log(16) + 1) / (0.1 * log(16) + 1), rel=1e-12)
    own = LongRope(short_factor=(1.0,), long_factor=(2.0,), temperature="yarn", **LLAMA3)
    assert own.attention_factor(long=True) == yarn_temperature(16)
    assert replace(own, temperature="su").attention_factor() == su_temperature(16, 8192)
    apart = replace(own, temperature="su", mscale=(1.0, 1.2))
    assert (apart.attention_factor(), apart.attention_factor(long=True)) == (1.0, 1.2)


def test_always_long_and_switched_agree_beyond_the_original_window() -> None:
    switched = LongRope(short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 3.0, 4.0), window=64, original_window=16)
    for length in (1, 16, 17, 64):
        mine, always = (tables(rope, 8, [length]) for rope in (switched, replace(switched, regime="long")))
        assert torch.equal(mine.frequencies, always.frequencies) == (length > 16)
    assert is_long(switched, [16, 17]) == [False, True]


# ------------------------------------------------------------------------------------------------------ rows of a batch


def test_dynamic_ntk_gives_each_row_the_table_of_its_length() -> None:
    rope = DynamicNtk(factor=2.0, window=512, original_window=128)
    found = tables(rope, 64, [5, 128, 129, 256, 512])
    plain = Plain().frequencies(64)
    assert torch.equal(found.frequencies[0], plain)
    assert torch.equal(found.frequencies[1], plain)
    # s = f n / L - (f - 1)
    for row, stretch in {2: 2 * 129 / 128 - 1, 3: 3.0, 4: 7.0}.items():
        assert torch.equal(found.frequencies[row], Ntk(factor=stretch).frequencies(64))
    assert torch.equal(rope.frequencies(64, long=True), found.frequencies[4])
    assert [table_number(rope, length) for length in (5, 128, 129, 512)] == [0, 0, 1, 384]
    assert found.scale.tolist() == [1.0] * 5
    with pytest.raises(ConfigError, match="a table for every length"):
        rotation(rope, 64, torch.arange(4)[None], torch.tensor([[False]]))


@pytest.mark.parametrize("rope", [rope for rope in every() if rope.kind != "dynamic_ntk"], ids=lambda rope: rope.kind)
def test_tables_of_rows_are_those_of_the_rotation(rope: Rope) -> None:
    lengths = [3, 128, 129, 1024]
    found = tables(rope, 64, lengths)
    for row, length in enumerate(lengths):
        long = is_long(rope, [length])[0]
        assert torch.equal(found.frequencies[row], rope.frequencies(64, long=long))
        assert float(found.scale[row]) == pytest.approx(rope.attention_factor(long=long), rel=1e-7)  # float32


@pytest.mark.parametrize(
    "rope", [rope for rope in every(131_072, 8192) if rope.kind != "dynamic_ntk"], ids=lambda rope: rope.kind
)
def test_angles_stay_in_float32_under_autocast(rope: Rope) -> None:
    at = torch.tensor([[131_071]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rotation(rope, 64, at, torch.tensor([[True]]))
    assert cos.dtype == sin.dtype == torch.float32
    frequencies = rope.frequencies(64, long=True).double()
    scale = rope.attention_factor(long=True)
    # an angle of up to 131,071 rad is rounded to half of 2^-7; bf16 angles would be off by hundreds of radians
    bound = 131_071 * frequencies * 2**-24 * scale + 1e-6
    assert bool(((cos[0, 0].double() - scale * (131_071 * frequencies).cos()).abs() <= bound).all())
    assert bool(((sin[0, 0].double() - scale * (131_071 * frequencies).sin()).abs() <= bound).all())


# ---------------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("rope", every(rotated=1.0, theta=1000.0), ids=METHODS)
def test_every_method_comes_back_from_a_config_file(rope: Rope) -> None:
    sizes = DecoderConfig(
        vocab_size=8, hidden_size=128, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, rope=rope,
    )  # fmt: skip
    fields = json.loads(json.dumps(asdict(sizes)))
    assert fields["rope"]["kind"] == rope.kind
    assert parse(DecoderConfig, fields, "config.json") == sizes
    assert read_rope(fields["rope"], "recipe") == rope


def test_configs_from_before_there_were_kinds_are_read() -> None:
    assert read_rope({"theta": 500.0, "window": 64}, "old") == Plain(theta=500.0, window=64)
    old = {"short_factor": [1.0], "long_factor": [2.0], "mscale": None, "regime": "reference"}
    assert read_rope(old, "old") == LongRope(short_factor=(1.0,), long_factor=(2.0,))


def test_a_kind_is_no_part_of_the_text_that_fingerprints_are_made_of() -> None:
    assert repr(Plain()) == "Plain(theta=10000.0, rotated=1.0, window=4096)"  # adapters of older versions must match


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kind": "xpos"}, "recipe: rope=.* a rope needs a kind: one of plain, linear, ntk, dynamic_ntk"),
        ({"kind": 3}, "a rope needs a kind"),
        ({"factor": 8.0}, "recipe: unknown key 'rope.factor'"),  # no kind: it is a plain one
        ({"kind": "linear"}, "recipe: rope.factor is missing"),
        ({"kind": "yarn", "factor": 8.0, "original_windo": 128}, "did you mean 'original_window'"),
    ],
)
def test_a_mapping_that_is_no_method_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_rope(fields, "recipe")


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", every(theta=1000.0), ids=METHODS)
def test_transformers_forms_come_back(rope: Rope, form: Any) -> None:
    if rope.kind == "ntk":
        with pytest.raises(ConfigError, match=r"no type for a fixed NTK-aware base; .* Plain\(theta=rope.base"):
            rope.to_hf(form)
        return
    back = from_hf(json.loads(json.dumps(rope.to_hf(form))))
    if rope.kind in ("scaling_law_ntk", "ntk_by_parts"):  # transformers calls them otherwise; they turn alike
        assert {"plain": "scaling_law_ntk", "yarn": "ntk_by_parts"}[back.kind] == rope.kind
        assert torch.equal(back.frequencies(64), rope.frequencies(64))
        assert back.attention_factor() == 1.0
    elif isinstance(rope, DynamicNtk):
        assert back == replace(rope, window=1024)  # transformers has no other bound than the factor
    else:
        assert back == rope


def test_a_longrope_that_transformers_cannot_be_told_is_refused() -> None:
    rope = LongRope(short_factor=(1.0,), long_factor=(2.0,), mscale=(1.0, 1.2))
    with pytest.raises(ConfigError, match=r"mscale=\(1.0, 1.2\): transformers multiplies .* by one attention factor"):
        rope.to_hf()
    with pytest.raises(ConfigError, match="regime='long' is a setting of this run"):
        replace(rope, mscale=None, regime="long").to_hf()
    assert replace(rope, mscale=(1.2, 1.2)).to_hf()["rope_parameters"]["attention_factor"] == 1.2


LONG = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
BESIDE = {"max_position_embeddings": 1024, "original_max_position_embeddings": 128}


def test_attention_factors_of_a_longrope_file() -> None:
    def read(**own: Any) -> LongRope:
        found = from_hf({**BESIDE, "rope_scaling": {**LONG, **own}})
        assert isinstance(found, LongRope)
        return found

    assert read().mscale is None
    assert read(factor=8.0).mscale is None
    assert read(factor=4.0).mscale == (sqrt(1 + log(4) / log(128)),) * 2  # transformers prefers it to the windows
    assert read(attention_factor=1.3).mscale == (1.3, 1.3)
    assert read(short_mscale=1.0, long_mscale=1.2).mscale == (1.0, 1.2)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rope_scaling": {"type": "xpos"}}, "rope_type='xpos' must be one of default, linear"),
        ({"rope_scaling": {"type": ["su"]}}, "rope_type="),
        (
            {"rope_scaling": {**LONG, "factr": 2}},
            "unknown key 'factr'; .* this type has short_factor, long_factor, attention_factor, factor, short_ms",
        ),
        ({"rope_scaling": {**LONG, "regime": "long"}}, "unknown key 'regime'"),  # a setting of ours
        ({"rope_scaling": {**LONG, "attention_factor": 0}}, r"attention_factor=0 must lie in \[1e-6, 1e6\]"),
        ({"rope_scaling": {**LONG, "attention_factor": "1.0"}}, "attention_factor='1.0' must be a number, without"),
        ({"rope_scaling": {**LONG, "long_factor": ["2.0"]}}, "long_factor='2.0' must be a number, without quotes"),
        ({"rope_scaling": {**LONG, "short_factor": 1.0}}, "short_factor=1.0 must be a list of numbers, one per"),
        ({"rope_theta": "10000"}, "rope_theta='10000' must be a number"),
        ({"rope_theta": 0.5}, "config.json: rope parameters: rope_theta=0.5 must be above 1"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor=2.0 must lie in"),
        (
            {"rope_scaling": LONG, "original_max_position_embeddings": 2048},
            r"original_max_position_embeddings=2048 must lie in \(1, max_position_embeddings=1024\]",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.0}}, " attention_factor=0.0 must"),
        ({"rope_scaling": {"rope_type": "yarn", "truncate": "maybe"}}, "truncate='maybe'"),
        ({"rope_scaling": {**LONG, "short_mscale": 1.0}}, "belong together"),
        ({"rope_scaling": {**LONG, "factor": "2"}}, "factor='2' must be a number"),
        ({"rope_scaling": {**LONG, "original_max_position_embeddings": 64}}, "is 64 within and 128 beside"),
        ({"rope_scaling": LONG, "rope_parameters": {"rope_type": "default"}}, "one of them is enough"),
        ({"rope_scaling": "longrope"}, "must be objects"),
        ({"max_position_embeddings": "many"}, "must be a whole number of tokens"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0}}, "give both, or none"),
    ],
)
def test_a_file_that_contradicts_itself_or_is_unknown_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        from_hf({**BESIDE, **fields})


@pytest.mark.parametrize("rope", every(theta=1000.0), ids=METHODS)
def test_a_method_with_one_table_is_also_one_divisor_per_pair(rope: Rope) -> None:
    if isinstance(rope, DynamicNtk):
        with pytest.raises(ConfigError, match="choose one first: rope.at"):
            as_longrope(rope, 64)
        rope = rope.at(1024)
    found = as_longrope(rope, 64)
    for long in (False, True):
        # three roundings of float32
        told = rope.frequencies(64, long=long and rope.kind == "longrope")
        torch.testing.assert_close(found.frequencies(64, long=long), told, rtol=2e-7, atol=0)
        assert found.attention_factor(long=long) == rope.attention_factor(long=long)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Linear(factor=0.5), r"factor=0.5 must lie in \[1, 1e6\]"),
        (lambda: Ntk(factor=float("nan")), "factor=nan"),
        (lambda: Linear(factor=float("inf")), "factor=inf"),
        (lambda: Plain(theta=float("nan")), "theta=nan must be above 1"),
        (lambda: ScalingLawNtk(window=10**6, original_window=7), "to the power 1.*, which no float32 holds"),
        (lambda: LongRope(short_factor=(1.0,), long_factor=(float("nan"),)), r"must be given and lie in \[1e-6, 1e9\]"),
        (lambda: Yarn(factor=2.0, original_window=32, attention=0.0), "attention=0.0 must be above 0"),
        (lambda: ScalingLawNtk(window=64, original_window=6), "above 2 pi"),
        (lambda: Yarn(factor=2.0, window=64, original_window=128), r"original_window=128 must lie in \(1, window=64"),
        (lambda: Yarn(factor=2.0, window=64, original_window=32, beta_fast=1.0, beta_slow=2.0), "2.0 and 1.0 periods"),
        (lambda: Llama3(factor=2.0, window=64, original_window=32, low_freq_factor=4.0), "4.0 and 4.0 periods"),
        (lambda: Yarn(factor=2.0, original_window=32, mscale=1.0), "give both, or none"),
        (
            lambda: Yarn(factor=2.0, original_window=32, mscale=1.0, mscale_all_dim=1.0, attention=1.0),
            "attention and mscale both set",
        ),
        (
            lambda: LongRope(short_factor=(1.0,), long_factor=(1.0,), mscale=(1.0, 1.0), temperature="yarn"),
            "mscale and temperature both set",
        ),
        (lambda: LongRope(short_factor=(1.0,), long_factor=(1.0,), mscale=(0.0, 1.0)), r"two numbers in \[1e-6, 1e6\]"),
    ],
)
def test_numbers_outside_their_bounds_are_refused(make: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()
