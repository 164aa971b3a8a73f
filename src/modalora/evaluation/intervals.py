"""How sure a share is, and a mean."""

from __future__ import annotations

from collections.abc import Sequence
from math import atan2, cos, pi, sin, sqrt
from statistics import fmean, stdev


def wilson(right: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, right of count (Wilson 1927).

    right may be a sum of scores between 0 and 1: their variance is at most that of right and wrong answers with the
    same mean, so the interval is then too wide rather than too narrow. Of nothing: (0, 1).
    """
    if not count:
        return 0.0, 1.0
    share, z = right / count, 1.96
    middle = share + z * z / (2 * count)
    reach = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - reach) / (1 + z * z / count)), min(1.0, (middle + reach) / (1 + z * z / count))


def mean_interval(each: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of two numbers or more, from their spread: Student's, for normal ones."""
    middle, reach = fmean(each), t_quantile(0.975, len(each) - 1) * stdev(each) / sqrt(len(each))
    return middle - reach, middle + reach


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t for a probability above a half, by halving an interval of its distribution."""
    low, high = 0.0, 1.0
    while _t_share(high, freedom) < 2 * probability - 1:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_share(middle, freedom) < 2 * probability - 1 else (low, middle)
    return high


def _t_share(t: float, freedom: int) -> float:
    """Return how much of Student's distribution lies within -t .. t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = atan2(t, sqrt(freedom)), freedom % 2
    term = total = cos(angle) if odd else 1.0
    for power in range(2 + odd, freedom, 2):
        term *= cos(angle) ** 2 * (power - 1) / power
        total += term
    if freedom == 1:
        total = 0.0
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
