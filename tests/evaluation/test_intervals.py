"""Intervals against what they promise: how often the truth lies within them."""

from __future__ import annotations

import numpy as np
import pytest

from modalora.evaluation.intervals import mean_interval, t_quantile


@pytest.mark.parametrize("count", [2, 3, 4, 10])
def test_a_mean_lies_in_its_interval_19_times_of_20(count: int) -> None:
    drawn = np.random.default_rng(count).normal(7.0, 2.0, (4000, count))
    held = [low <= 7.0 <= high for low, high in map(mean_interval, drawn.tolist())]
    # 4,000 draws: three standard errors are 1.0 %; 1.96 in place of Student's t has 70 % of 2 and 92 % of 10
    assert np.mean(held) == pytest.approx(0.95, abs=0.0104)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("error", [0.2, 0.05, 0.01, 0.001])
def test_quantiles_are_students(freedom: int, error: float) -> None:
    found = t_quantile(1 - error, freedom)
    # the density, integrated in float64 by steps of 1e-4 of the angle (t = tan): off by 1e-7
    angle = np.linspace(0, np.arctan(found / np.sqrt(freedom)), 20_001)
    share = np.trapezoid(np.cos(angle) ** (freedom - 1), angle)
    whole = np.trapezoid(np.cos(full := np.linspace(0, np.pi / 2, 20_001)) ** (freedom - 1), full)
    assert 0.5 - share / whole / 2 == pytest.approx(error, abs=1e-6)
