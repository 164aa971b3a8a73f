"""The rotary tables: plain, or rescaled for windows longer than the one that a model was trained on.

A method is a small frozen dataclass with a tag `kind`. Each gives `frequencies(head_dim, long)`, radians per token of
each rotated pair, fastest first, `attention_factor(long)`, what cos and sin are multiplied by, and `to_hf(form)`. At a
factor of 1 each is `Plain` to the last bit. Windows are tokens; factors divide frequencies. Paper symbols in brackets.
x is (batch, time, heads, head_dim); angles are radians, in float32 whatever the model's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log, sqrt
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Tag
from torch import Tensor
from torch.autograd.function import once_differentiable

from modalora.config import parse
from modalora.contracts import Rotations
from modalora.errors import ConfigError, ShapeError
from modalora.nn.scaling import (
    Base,
    DynamicNtk,
    Form,
    Linear,
    Llama3,
    Ntk,
    NtkByParts,
    Plain,
    ScalingLawNtk,
    Yarn,
    check,
    hf_form,
    yarn_temperature,
)

__all__ = [
    "METHODS", "DynamicNtk", "Form", "Linear", "Llama3", "LongRope", "Ntk", "NtkByParts", "Plain", "Regime", "Rope",
    "ScalingLawNtk", "Yarn", "as_longrope", "divisors", "from_hf", "is_long", "read_rope", "rotate", "rotation",
    "su_temperature", "table_number", "tables", "turned", "yarn_temperature",
]  # fmt: skip

# When the long table applies. reference: to rows longer than the original window, as transformers' Phi3 has it; long,
# short: always or never, as engines do that fix the table when they start.
Regime = Literal["reference", "long", "short"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRope(Base):
    """One divisor per rotated pair, in two sets: up to the original window, and beyond it.

    Source: arXiv:2402.13753 and 2502.20082; served as in the Phi-4-Mini config ("longrope").
    """

    short_factor: tuple[float, ...]  # [λ]
    long_factor: tuple[float, ...]
    window: int = 131_072
    original_window: int = 4096  # [L]
    mscale: tuple[float, float] | None = None  # attention factors, short and long, where a model has its own
    temperature: Literal["su", "yarn"] = "su"  # of both tables, where it has none
    regime: Regime = "reference"
    kind: Literal["longrope"] = field(default="longrope", repr=False)

    def __post_init__(self) -> None:
        check(self, original_window=self.original_window)
        if len(self.short_factor) != len(self.long_factor):
            raise ConfigError(
                f"short_factor has {len(self.short_factor)} entries and long_factor {len(self.long_factor)}; "
                "both need one per rotated pair (Phi-4-Mini: 48)"
            )
        wrong = [one for one in (*self.short_factor, *self.long_factor) if not 1e-6 <= one <= 1e9]
        if wrong or not self.short_factor:
            told = f"; {wrong[0]:g} does not" if wrong else ""
            raise ConfigError(
                f"short_factor and long_factor must be given and lie in [1e-6, 1e9]{told}; 1.0 leaves a pair unscaled"
            )
        if self.mscale is not None and not all(1e-6 <= one <= 1e6 for one in self.mscale):
            raise ConfigError(f"mscale={self.mscale} must be two numbers in [1e-6, 1e6], for short and long rows")
        if self.mscale is not None and self.temperature != "su":
            raise ConfigError("mscale and temperature both set the attention factors; leave one out")

    @property
    def stretch(self) -> float:
        """How many times the original window the window is [s]."""
        return self.window / self.original_window

    def attention_factor(self, *, long: bool = False) -> float:
        """sqrt(1 + ln s / ln L), or 0.1 ln s + 1, for the short table as well; or the model's own two."""
        if self.mscale is not None:
            return self.mscale[long]
        if self.temperature == "yarn":
            return yarn_temperature(self.stretch)
        return su_temperature(self.stretch, self.original_window)

    @property
    def switch(self) -> int | None:
        """Length in tokens beyond which the long table applies to every position of a row; None: never."""
        return {"reference": self.original_window, "long": 0, "short": None}[self.regime]

    def frequencies(self, head_dim: int, *, long: bool = False) -> Tensor:
        """Return radians per token of each rotated pair, fastest first, (pairs,) float32.

        Raises ShapeError when the factor lists do not have one entry per rotated pair.
        """
        base = self.periods(head_dim)
        factors = self.long_factor if long else self.short_factor
        if len(factors) != len(base):
            raise ShapeError(
                f"{len(factors)} rope factors for {len(base)} rotated pairs (head_dim={head_dim}, rotated="
                f"{self.rotated}); give one factor per pair"
            )
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * base)  # in this order: the published bits

    def to_hf(self, form: Form = "rope_parameters") -> dict[str, Any]:
        """Return the rotary keys of a transformers config.json.

        Raises ConfigError for what transformers cannot be told: two attention factors, and a regime.
        """
        if self.regime != "reference":
            raise ConfigError(f"regime={self.regime!r} is a setting of this run; published configs have none")
        short, long = self.attention_factor(), self.attention_factor(long=True)
        if short != long:
            raise ConfigError(
                f"mscale={self.mscale}: transformers multiplies short and long rows by one attention factor; train "
                "with two equal ones (`modalora extend`: search.short_temperature=same), or stay with the layout "
                "'modalora'"
            )
        one = {} if self.mscale is None and self.temperature == "su" else {"attention_factor": short}
        lists = {"short_factor": list(self.short_factor), "long_factor": list(self.long_factor)}
        original = {"original_max_position_embeddings": self.original_window}
        inner = {**lists, **one, **(original if form == "rope_parameters" else {})}
        return {**hf_form(self, form, "longrope", **inner), **original}


def _named(value: Any) -> str | None:
    """Return the class that a mapping or an object is of. Configs had no `kind` when there were two methods."""
    if not isinstance(value, Mapping):
        return type(value).__name__
    kind = value.get("kind", "longrope" if {"short_factor", "long_factor"} & set(value) else "plain")
    return METHODS[kind].__name__ if isinstance(kind, str) and kind in METHODS else None


METHODS = {
    "plain": Plain, "linear": Linear, "ntk": Ntk, "dynamic_ntk": DynamicNtk, "scaling_law_ntk": ScalingLawNtk,
    "ntk_by_parts": NtkByParts, "yarn": Yarn, "llama3": Llama3, "longrope": LongRope,
}  # fmt: skip
Rope = Annotated[
    Annotated[Plain, Tag("Plain")]
    | Annotated[Linear, Tag("Linear")]
    | Annotated[Ntk, Tag("Ntk")]
    | Annotated[DynamicNtk, Tag("DynamicNtk")]
    | Annotated[ScalingLawNtk, Tag("ScalingLawNtk")]
    | Annotated[NtkByParts, Tag("NtkByParts")]
    | Annotated[Yarn, Tag("Yarn")]
    | Annotated[Llama3, Tag("Llama3")]
    | Annotated[LongRope, Tag("LongRope")],
    Discriminator(
        _named, custom_error_type="rope", custom_error_message=f"a rope needs a kind: one of {', '.join(METHODS)}"
    ),
]


@dataclass(frozen=True)
class _Holder:
    rope: Rope


def read_rope(fields: Mapping[str, Any], where: str) -> Rope:
    """Return the method that a mapping of settings names by its `kind`. Raises ConfigError naming key and rule."""
    return parse(_Holder, {"rope": fields}, where).rope


def is_long(rope: Rope, lengths: Sequence[int]) -> list[bool]:
    """Tell for each row length whether the long table applies (Phi-3: length > original window)."""
    return [rope.switch is not None and length > rope.switch for length in lengths]


def su_temperature(stretch: float, original_window: int) -> float:
    """Return sqrt(1 + ln s / ln L), the attention factor of the Phi models: its square is ln L' / ln L."""
    return sqrt(1 + log(stretch) / log(original_window)) if stretch > 1 else 1.0


def table_number(rope: Rope, length: int) -> int:
    """Return which of its tables a method turns a row of this length by; a row whose number changes is read again."""
    if isinstance(rope, DynamicNtk):
        return max(0, length - rope.original_window)
    return int(is_long(rope, [length])[0])


def divisors(rope: Rope, head_dim: int, *, long: bool = False) -> Tensor:
    """Return what each pair's unscaled frequency is divided by, (pairs,) float32 [λ]."""
    return Plain(theta=rope.theta, rotated=rope.rotated).frequencies(head_dim) / rope.frequencies(head_dim, long=long)


def as_longrope(rope: Rope, head_dim: int) -> LongRope:
    """Return a method with one table as one divisor per pair, the form that every layout of a Phi model holds.

    The frequencies are the same but for three roundings of float32. Raises ConfigError for a table of every length.
    """
    if isinstance(rope, LongRope):
        return rope
    if isinstance(rope, DynamicNtk):
        raise ConfigError("dynamic_ntk has a table for every length; choose one first: rope.at(length)")
    both = tuple(divisors(rope, head_dim).tolist())
    factor = rope.attention_factor()
    return LongRope(
        short_factor=both, long_factor=both, theta=rope.theta, rotated=rope.rotated, window=rope.window,
        original_window=rope.window, mscale=None if factor == 1 else (factor, factor),
    )  # fmt: skip


def tables(rope: Rope, head_dim: int, lengths: Sequence[int], device: torch.device | str = "cpu") -> Rotations:
    """Return the table of each row, from the length that decides it."""
    numbers = [table_number(rope, length) for length in lengths]
    each = {
        number: _table(rope, head_dim, length) for number, length in dict(zip(numbers, lengths, strict=True)).items()
    }
    return Rotations(
        frequencies=torch.stack([each[number][0] for number in numbers]).to(device),
        scale=torch.tensor([each[number][1] for number in numbers], device=device),
    )


def _table(rope: Rope, head_dim: int, length: int) -> tuple[Tensor, float]:
    if isinstance(rope, DynamicNtk):
        rope = rope.at(length)
    long = is_long(rope, [length])[0]
    return rope.frequencies(head_dim, long=long), rope.attention_factor(long=long)


def rotation(rope: Rope, head_dim: int, positions: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (batch, time, pairs) float32.

    positions: (batch, time). long: bool that says which use the long table, (batch, 1) or (batch, time).
    """
    if isinstance(rope, DynamicNtk):
        raise ConfigError("dynamic_ntk has a table for every length: give each row its own (Step.rotations)")
    table, factor = rope.frequencies(head_dim).to(positions.device), torch.tensor(rope.attention_factor())
    if rope.switch is not None and bool(long.any()):
        rows = long[..., None]
        table = torch.where(rows, rope.frequencies(head_dim, long=True).to(positions.device), table)
        factor = torch.where(rows, rope.attention_factor(long=True), rope.attention_factor())
    return turned(positions, table, factor)


def turned(positions: Tensor, frequencies: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (batch, time, pairs) float32, times scale.

    positions: (batch, time). frequencies: radians per token, (pairs,) or (batch, 1 or time, pairs). scale: one number,
    or (batch, 1 or time, 1).
    """
    angles = positions[..., None].float() * frequencies
    return angles.cos() * scale.to(angles), angles.sin() * scale.to(angles)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 * pairs channels of each head; channel i pairs with channel i + pairs, the rest passes through.

    x: (batch, time, heads, head_dim); cos, sin: (batch, time, pairs).
    """
    turned: Tensor = _Rotate.apply(x, cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype))  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing is kept but the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(given[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1)


_TYPES: dict[str, Any] = {  # rope_type of transformers
    "default": Plain, "linear": Linear, "dynamic": DynamicNtk, "yarn": Yarn, "llama3": Llama3, "longrope": LongRope,
}  # fmt: skip
_KEYS = {  # of each type, in its rotary object alone
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor", "attention_factor", "factor", "short_mscale", "long_mscale"),
}
_FILE = {  # what a file calls otherwise
    "theta": "rope_theta", "rotated": "partial_rotary_factor", "window": "max_position_embeddings",
    "original_window": "original_max_position_embeddings", "attention": "attention_factor",
}  # fmt: skip


def from_hf(fields: Mapping[str, Any], where: str = "config.json") -> Rope:
    """Return the method that the rotary keys of a transformers config.json tell, in either form.

    Other keys are not looked at. Raises ConfigError for a type or a key within the rotary object that is unknown, and
    for values that contradict each other.
    """
    forms = [fields[form] for form in ("rope_parameters", "rope_scaling") if fields.get(form)]
    place = f"{where}: rope parameters"
    if not all(isinstance(form, Mapping) for form in forms) or len(forms) == 2 and forms[0] != forms[1]:
        raise ConfigError(f"{place}: rope_parameters and rope_scaling must be objects, and one of them is enough")
    inner = {key: value for key, value in (forms[0] if forms else {}).items() if value is not None}

    def taken(key: str, default: Any) -> Any:
        found = [value for value in (inner.pop(key, None), fields.get(key)) if value is not None]
        if found[1:] and found[0] != found[1]:
            raise ConfigError(f"{place}: {key} is {found[0]} within and {found[1]} beside; leave the wrong one out")
        return found[0] if found else default

    window = _whole(fields.get("max_position_embeddings", 4096), "max_position_embeddings", place)
    theta, rotated = (
        _number(key, taken(key, default), place)
        for key, default in (("rope_theta", 10_000.0), ("partial_rotary_factor", 1.0))
    )
    base = {"theta": theta, "rotated": rotated, "window": window}
    original = _whole(taken("original_max_position_embeddings", window), "original_max_position_embeddings", place)
    kind = inner.pop("rope_type", inner.get("type", "default"))
    inner.pop("type", None)
    if kind == "su" or (kind == "yarn" and "short_factor" in inner):
        kind = "longrope"  # older names, which transformers reads alike
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ConfigError(f"{place}: rope_type={kind!r:.60} must be one of {', '.join(_TYPES)}")
    for key, value in inner.items():
        _check(key, value, _KEYS[kind], place)
    if kind in ("yarn", "llama3", "longrope"):
        base["original_window"] = original
    if kind == "dynamic":
        base["original_window"] = window
    if kind == "yarn":
        inner = {"factor": window / original, **inner}
        inner["attention"] = inner.pop("attention_factor", None)
    if kind == "longrope":
        base["mscale"] = _mscale(inner, window, original, place)
    try:
        found: Rope = parse(_TYPES[kind], {**base, **inner}, place)
    except ConfigError as error:  # told in the words of the file
        told = re.sub(r"\b\w+(?==)", lambda key: _FILE.get(key[0], key[0]), str(error).removeprefix(place))
        raise ConfigError(place + told) from None
    return replace(found, window=int(found.factor * window)) if isinstance(found, DynamicNtk) else found


def _check(key: str, value: Any, known: Sequence[str], place: str) -> None:
    """Refuse a key of a rotary object that its type does not have, and a value of another type than transformers'."""
    if key not in known:
        raise ConfigError(
            f"{place}: unknown key {key!r}; beside rope_type, rope_theta, partial_rotary_factor and "
            f"original_max_position_embeddings this type has {', '.join(known) or 'none'}"
        )
    if key in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{place}: {key}={_short(value)} must be a list of numbers, one per rotated pair")
        for one in value:
            _number(key, one, place)
    elif key != "truncate":
        _number(key, value, place)


def _number(key: str, value: Any, place: str) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{place}: {key}={_short(value)} must be a number, without quotes")
    return value


def _whole(value: Any, key: str, place: str) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise ConfigError(f"{place}: {key}={_short(value)} must be a whole number of tokens, at least 1 and below 2^31")
    return value


def _short(value: Any) -> str:
    """Return a value as in messages; Python refuses to write whole numbers of 4,300 digits."""
    return "a number of many digits" if type(value) is int and value.bit_length() > 100 else f"{value!r:.40}"


def _mscale(inner: dict[str, Any], window: int, original: int, place: str) -> tuple[Any, Any] | None:
    """Take the attention factors out of a longrope object, or a stretch of its own; None: as the windows give."""
    scales = {key: inner.pop(key) for key in ("attention_factor", "short_mscale", "long_mscale") if key in inner}
    stretch = inner.pop("factor", None)
    for key, value in (scales | ({} if stretch is None else {"factor": stretch})).items():
        if not 1e-6 <= value <= 1e6:
            raise ConfigError(f"{place}: {key}={_short(value)} must lie in [1e-6, 1e6]")
    if "attention_factor" in scales:
        return (scales["attention_factor"],) * 2
    if len(scales) == 1:
        raise ConfigError(f"{place}: short_mscale and long_mscale belong together; give both, or none")
    if scales:
        return scales["short_mscale"], scales["long_mscale"]
    if stretch is None or stretch == window / original:
        return None
    return (su_temperature(stretch, original),) * 2
