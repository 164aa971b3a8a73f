"""How sure a share is."""

from __future__ import annotations

from math import sqrt


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
