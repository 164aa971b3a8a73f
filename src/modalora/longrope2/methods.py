"""What LongRoPE2 is compared with: other ways to rescale rotary frequencies, as divisors of one form.

Each method becomes one divisor per rotated pair beyond the trained window, under the temperature that all of them
share: a comparison in which only some have one would measure the temperature. Sources: nn/rope.py.
"""

from __future__ import annotations

from modalora.longrope2.factors import Factors, Stretch, Temperature
from modalora.nn.rope import Linear, Ntk, Plain, Rope, ScalingLawNtk, Yarn, divisors

TITLES = {
    "none": "no rescaling",
    "linear": "PI",
    "ntk": "NTK-aware",
    "scaling_law_ntk": "NTK, scaling law",
    "yarn": "YaRN",
    "longrope2": "LongRoPE2",
}


def other_methods(stretch: Stretch, temperature: Temperature = "su") -> dict[str, Factors]:
    """Return the divisors of every method but LongRoPE2, by name."""
    theta, window, target, ratio = stretch.theta, stretch.window, stretch.target, stretch.ratio
    ropes: dict[str, Rope] = {
        "none": Plain(theta=theta, window=window),
        "linear": Linear(theta=theta, window=target, factor=ratio),
        "ntk": Ntk(theta=theta, window=target, factor=ratio),
        "scaling_law_ntk": ScalingLawNtk(theta=theta, window=target, original_window=window),
        "yarn": Yarn(theta=theta, window=target, factor=ratio, original_window=window),
    }
    found = {}
    for name, rope in ropes.items():
        long = divisors(rope, 2 * stretch.pairs, long=True).cummax(0).values  # float32 rounds equal ones apart
        found[name] = Factors(
            anchor=0, window=window, target=target, long=tuple(long.tolist()), short=stretch.short,
            temperature=temperature, short_scale=stretch.short_scale,
        )  # fmt: skip
    return found
