"""What LongRoPE2 is compared with: other ways to rescale rotary frequencies, as divisors of one form.

Each method becomes one divisor per rotated pair beyond the trained window, under the temperature that all of them
share: a comparison in which only some have one would measure the temperature. Sources: nn/rope.py.
"""

from __future__ import annotations

from modalora.errors import ConfigError
from modalora.longrope2.factors import Factors, Stretch, Temperature
from modalora.nn.rope import Linear, LongRope, Ntk, Plain, Rope, ScalingLawNtk, Yarn, divisors

TITLES = {
    "none": "no rescaling",
    "linear": "PI",
    "ntk": "NTK-aware",
    "scaling_law_ntk": "NTK, scaling law",
    "yarn": "YaRN",
    "longrope2": "LongRoPE2",
}


def unscaled(base: Rope) -> Plain:
    """Return the rotary positions that a model was trained with up to its original window.

    Raises ConfigError for a model that was rescaled by other means than LongRoPE's.
    """
    if isinstance(base, LongRope):
        return Plain(theta=base.theta, rotated=base.rotated, window=base.original_window)
    if not isinstance(base, Plain):
        raise ConfigError(
            f"a model with rotary positions of kind {base.kind!r} was extended already, and tells no window that it "
            "was first trained on; start from the model before that"
        )
    return base


def other_methods(base: Rope, head_dim: int, target: int, temperature: Temperature = "su") -> dict[str, Factors]:
    """Return the divisors of every method but LongRoPE2, by name. head_dim: channels of a head."""
    plain = unscaled(base)
    stretch = Stretch.of(plain, head_dim, target)
    theta, rotated, window, ratio = plain.theta, plain.rotated, stretch.window, stretch.ratio
    ropes: dict[str, Rope] = {
        "none": plain,
        "linear": Linear(theta=theta, rotated=rotated, window=target, factor=ratio),
        "ntk": Ntk(theta=theta, rotated=rotated, window=target, factor=ratio),
        "scaling_law_ntk": ScalingLawNtk(theta=theta, rotated=rotated, window=target, original_window=window),
        "yarn": Yarn(theta=theta, rotated=rotated, window=target, factor=ratio, original_window=window),
    }
    found = {}
    for name, rope in ropes.items():
        long = divisors(rope, head_dim, long=True).cummax(0).values  # float32 rounds equal ones apart
        found[name] = Factors(
            anchor=0, window=window, target=target, long=tuple(long.tolist()), temperature=temperature
        )
    return found
