"""Rotary positions: goldens of the published tables, and what a rotation must leave alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalora.errors import ConfigError, ShapeError
from modalora.models.sizes import phi4_mini
from modalora.nn.rope import LongRope, Plain, is_long, rotate, rotation, tables

PHI = phi4_mini().decoder.rope


def table(position: int, *, long: bool) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotation(PHI, 128, torch.tensor([[position]]), torch.tensor([long]))
    return cos[0, 0], sin[0, 0]


def at(positions: list[int], rope: Plain | LongRope, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rotation(rope, head_dim, torch.tensor([positions]), torch.tensor([False]))


def test_frequencies_are_the_published_ones() -> None:
    short, long = PHI.frequencies(128), PHI.frequencies(128, long=True)
    assert short.shape == long.shape == (48,)
    index = torch.tensor([0, 1, 10, 24, 47])
    # goldens have ten digits, float32 has seven
    told = torch.tensor([1, 0.8254041853, 0.1467799268, 0.01, 1.2115276587e-4])
    torch.testing.assert_close(short[index], told, rtol=3e-7, atol=0)
    told = torch.tensor([1, 0.7380746918, 0.0479736915, 6.8297927948e-4, 2.5361684292e-6])
    torch.testing.assert_close(long[index], told, rtol=3e-7, atol=0)


def test_attention_factor_is_the_root_of_17_over_12_in_both_tables() -> None:
    assert PHI.attention_factor() == pytest.approx(1.1902380714, abs=5e-11)
    for long in (False, True):
        cos, sin = table(0, long=long)
        assert torch.equal(cos, torch.full((48,), PHI.attention_factor(long=long)))
        assert not sin.any()


@pytest.mark.parametrize(
    ("position", "long", "told"),
    [
        (1, False, ((0.643088, 1.001551), (1.177440, 0.174076), (1.190238, 0.000144))),
        (1, True, ((0.643088, 1.001551), (1.188869, 0.057078), (1.190238, 0.000003))),
        (4095, False, ((-0.078527, -1.187645), (-0.623332, -1.013964), (1.046738, 0.566574))),
        (4095, True, ((-0.078527, -1.187645), (-0.122053, 1.183964), (1.190174, 0.012361))),
        (131071, True, ((-0.973595, -0.684675), (0.073775, -1.187949), (1.125080, 0.388410))),
    ],
)
def test_cos_and_sin_are_the_published_ones(position: int, long: bool, told: tuple[tuple[float, float], ...]) -> None:
    cos, sin = table(position, long=long)
    for pair, (c, s) in zip((0, 10, 47), told, strict=True):
        # printed to six digits from float64; the model, as the published one, has frequencies in float32 (1.2e-7)
        near = 1e-6 + 1.2e-7 * position * float(PHI.frequencies(128, long=long)[pair])
        assert float(cos[pair]) == pytest.approx(c, abs=near)
        assert float(sin[pair]) == pytest.approx(s, abs=near)


def test_the_table_switches_above_the_original_window_and_per_row() -> None:
    assert is_long(PHI, [1, 4096, 4097]) == [False, False, True]
    assert is_long(Plain(), [1, 10**6]) == [False, False]
    positions = torch.arange(5).repeat(2, 1)
    cos, _ = rotation(PHI, 128, positions, torch.tensor([[True], [False]]))
    assert torch.equal(cos[0, 3], table(3, long=True)[0])
    assert torch.equal(cos[1, 3], table(3, long=False)[0])


def test_each_table_has_its_own_attention_factor() -> None:
    rope = LongRope(short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, window=64, original_window=16, mscale=(1.0, 1.2))
    long = torch.tensor([[False], [True]])
    cos, _ = rotation(rope, 8, torch.zeros(2, 1, dtype=torch.long), long)
    told = torch.tensor([1.0, 1.2])
    assert torch.equal(cos[:, 0], told[:, None].expand(2, 4))
    assert torch.equal(tables(rope, 8, [16, 17]).scale, told)


@settings(deadline=None, max_examples=40)
@given(q=st.integers(0, 300), k=st.integers(0, 300), shift=st.integers(0, 1000), seed=st.integers(0, 99))
def test_scores_do_not_change_when_all_positions_shift(q: int, k: int, shift: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    rope = Plain(rotated=0.75)
    here = (rotate(x, *at([q], rope, 32)) * rotate(y, *at([k], rope, 32))).sum()
    there = (rotate(x, *at([q + shift], rope, 32)) * rotate(y, *at([k + shift], rope, 32))).sum()
    # angles near 1300 rad carry 6e-5 of float32 rounding each, times a score of a few units
    torch.testing.assert_close(here, there, atol=2e-3, rtol=0)


def test_channels_beyond_the_rotated_share_pass_through() -> None:
    x = torch.randn(2, 6, 3, 128)
    turned = rotate(x, *(t.expand(2, -1, -1) for t in at(list(range(6)), PHI, 128)))
    assert torch.equal(turned[..., 96:], x[..., 96:])
    # rotation keeps the norm and the factor scales it; float32 sums of 96 squares
    torch.testing.assert_close(
        turned[..., :96].norm(dim=-1), x[..., :96].norm(dim=-1) * 1.1902380714, rtol=1e-5, atol=0
    )


def test_channel_i_pairs_with_channel_i_plus_half_of_the_rotated_ones() -> None:
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    rope = Plain(rotated=0.75)
    turned = rotate(x, *at([5], rope, 8))[0, 0, 0]
    for pair, frequency in enumerate(rope.frequencies(8).tolist()):
        number = complex(x[0, 0, 0, pair], x[0, 0, 0, pair + 3]) * torch.exp(torch.tensor(5j * frequency)).item()
        # cos and sin are made in float32
        assert complex(turned[pair], turned[pair + 3]) == pytest.approx(number, abs=1e-6)


def test_first_pair_turns_one_radian_per_token() -> None:
    assert float(Plain().frequencies(8)[0]) == 1.0


def test_a_wrong_number_of_factors_is_named() -> None:
    rope = LongRope(short_factor=(1.0,) * 5, long_factor=(2.0,) * 5)
    with pytest.raises(ShapeError, match=r"5 rope factors for 4 rotated pairs"):
        rope.frequencies(8)
    with pytest.raises(ConfigError, match=r"2 entries and long_factor 1"):
        LongRope(short_factor=(1.0, 1.0), long_factor=(1.0,))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"theta": 1.0}, "theta=1.0"),
        ({"rotated": 0.0}, "rotated=0.0"),
        ({"rotated": 1.5}, "rotated=1.5"),
        ({"window": 0}, "window=0"),
    ],
)
def test_a_base_outside_its_bounds_is_refused(fields: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Plain(**fields)


@pytest.mark.parametrize("factors", [(), (0.0,), (-1.0,), (1.0, 0.0)])
def test_factors_must_be_positive_and_present(factors: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError):
        LongRope(short_factor=factors, long_factor=factors)


def test_one_factor_is_enough_for_one_pair() -> None:
    rope = LongRope(short_factor=(1.0,), long_factor=(4.0,))
    assert rope.frequencies(2, long=True).tolist() == [0.25]


def test_an_odd_number_of_rotated_channels_is_refused() -> None:
    with pytest.raises(ShapeError, match="even whole number"):
        Plain(rotated=0.75).frequencies(12)


@pytest.mark.parametrize("original", [1, 0, 200_000])
def test_the_original_window_must_fit_the_window(original: int) -> None:
    with pytest.raises(ConfigError, match="original_window"):
        LongRope(short_factor=(1.0,), long_factor=(1.0,), original_window=original)


def test_the_gradient_of_a_turn_is_the_turn_back() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (f(torch.rand(2, 3, 3, dtype=torch.float64)) for f in (torch.cos, torch.sin))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))
