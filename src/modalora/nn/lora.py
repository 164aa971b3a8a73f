"""Linear layers that hold several LoRA adapters and apply to each row the one that its route names.

y = W x + (alpha / rank) B A dropout(x), LoRA: arXiv:2106.09685. An adapter is computed for the rows routed to it and
for no other: skipped, never multiplied by zero, so not even a NaN in an idle adapter reaches a row.

Training keeps per Linear its input once, or what that is made of (`Made`), and the few numbers between A and B. No
gradient of a frozen matrix is computed, and products contract the rank first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modalora.contracts import Route
from modalora.errors import ConfigError
from modalora.nn import packed, products
from modalora.nn.quantised import KINDS, Kept, check_bits

_MOST_ALPHA, _MOST_PATTERNS = 1e6, 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Size of one adapter, and which Linears it changes (names and rules as in PEFT).

    target_modules: ends of module names; empty: every routed Linear. rank_pattern, alpha_pattern: another r or
    lora_alpha for modules whose name ends in what the key matches.
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False  # alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732)
    target_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r={self.r} must be at least 1; Phi-4-Multimodal uses 256 and 320")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not abs(alpha) <= _MOST_ALPHA:
                raise ConfigError(
                    f"lora_alpha={alpha} must lie within {-_MOST_ALPHA:,.0f} and {_MOST_ALPHA:,.0f}; Phi-4-Multimodal "
                    "uses 512 and 640"
                )
        if any(r < 1 for r in self.rank_pattern.values()):
            raise ConfigError(f"rank_pattern={dict(self.rank_pattern)!r:.80} must give ranks of at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout} must lie in [0, 1); Phi-4-Multimodal uses 0 and 0.01")
        for patterns in (self.rank_pattern, self.alpha_pattern):
            if len(patterns) > _MOST_PATTERNS:  # each is tried on the name of every Linear
                raise ConfigError(
                    f"an adapter has {len(patterns):,} patterns of ranks or alphas; at most {_MOST_PATTERNS:,} are read"
                )
            for key in patterns:
                check_pattern(key)

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by."""
        return self.lora_alpha / (sqrt(self.r) if self.use_rslora else self.r)

    def targets(self, name: str) -> bool:
        """Tell whether the adapter changes the module of this name."""
        return not self.target_modules or any(f".{name}".endswith(f".{end}") for end in self.target_modules)

    def at(self, name: str) -> LoraConfig:
        """Return the adapter's size in the module of this name."""
        r = _pattern(self.rank_pattern, name, self.r)
        alpha = _pattern(self.alpha_pattern, name, self.lora_alpha)
        return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=self.lora_dropout, use_rslora=self.use_rslora)


def check_name(name: str) -> None:
    """Refuse what cannot name an adapter. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,99}", name, re.ASCII) or hasattr(nn.ParameterDict(), name):
        raise ConfigError(
            f"{name!r:.120} cannot name an adapter; use letters, digits, - and _, such as 'my-style', and no name that "
            "torch's ParameterDict has for itself, such as 'keys'"
        )
    if name in ("auto", "none"):
        raise ConfigError(f"the adapter name {name!r} is taken; choose another")


_REPEAT = r"(?:[*+]|\{\d*,\d*\}|\{\d+\})"  # of what stands before it
_REPEATS = 5  # of a pattern: names have some 40 letters, and each repeat multiplies the tries by nearly as much


def check_pattern(text: str) -> None:
    """Refuse what is no regular expression, or one that could take for ever to match a name. Raises ConfigError."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"the pattern {text!r:.80} of an adapter is no regular expression: {error}") from None
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", text)  # escapes and sets, each one letter
    while (inner := re.sub(rf"\((?:\?[:=!]|\?<[=!]|\?P<\w+>)?([^()]*)\)(?!{_REPEAT})", r"\1", bare)) != bare:
        bare = inner  # groups that are not repeated
    repeated = re.search(rf"\([^()]*(?:{_REPEAT}|[?|])[^()]*\){_REPEAT}|\([^()]*\(", bare)
    repeats, options = len(re.findall(_REPEAT, bare)), len(re.findall(r"(?<![*+?}(|])\?", bare))
    if len(text) > 4000 or repeated or repeats > _REPEATS or options > 2 * _REPEATS:
        raise ConfigError(
            f"the pattern {text!r:.80} of an adapter repeats what repeats or branches, or has more than {_REPEATS} "
            f"repeats or {2 * _REPEATS} options, which could take for ever to match; name the modules one by one"
        )


def _pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if _ends(key).match(name)), default)


@lru_cache(maxsize=2 * _MOST_PATTERNS)
def _ends(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


@dataclass(frozen=True, slots=True)
class Made:
    """What an input was made from, by a function cheap enough to be called again."""

    source: Tensor
    make: Callable[[Tensor], Tensor]


class RoutedLinear(nn.Module):
    """A Linear with any number of named adapters; a route's adapter that it does not have changes nothing."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.adapters: dict[str, LoraConfig] = {}
        self._some = torch.empty(0)
        self.quantised: Kept | None = None
        self._packed: dict[str, Tensor] = {}  # "", "A.name", "B.name": what `pack` made of the matrices
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Add an adapter that starts as no change: A is Kaiming-uniform, B is zero, as in PEFT."""
        out_features, in_features = self.weight.shape
        down = torch.empty(config.r, in_features, device=self.weight.device)
        nn.init.kaiming_uniform_(down, a=sqrt(5))
        self.lora_A[name] = nn.Parameter(down)
        self.lora_B[name] = nn.Parameter(torch.zeros(out_features, config.r, device=self.weight.device))
        self.adapters[name] = config

    def drop_adapter(self, name: str) -> None:
        """Remove an adapter."""
        del self.lora_A[name], self.lora_B[name], self.adapters[name]

    def forward(self, x: Tensor, route: Route, made: Made | None = None) -> Tensor:
        """x: (batch, time, in_features) -> (batch, time, out_features).

        made: how x was made, where a backward pass should make it again instead of keeping it.
        """
        groups = [group for group in route.groups_on(x.device) if group[0] in self.adapters]
        if torch.is_grad_enabled() and not self.is_packed:
            return self._differentiable(x, groups, made)
        with torch.no_grad():  # what is packed has no gradient, and an adapter loaded later would ask for one
            return self._read(x, groups)

    def _read(self, x: Tensor, groups: list[tuple[str, float, Tensor | slice | None]]) -> Tensor:
        y = self._product(x, "", self._matrix(self.weight, x.dtype), self.bias)
        for name, weight, where in groups:
            inner = self._product(_pick(x, where), f"A.{name}", self.lora_A[name])
            inner = inner * (weight * self.adapters[name].scaling)
            _add(y, where, self._product(inner, f"B.{name}", self.lora_B[name]))
        return y

    def _matrix(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype) if self.quantised is None else self.quantised.expand(dtype)

    def _differentiable(
        self, x: Tensor, groups: list[tuple[str, float, Tensor | slice | None]], made: Made | None
    ) -> Tensor:
        terms, factors = [], []
        for name, weight, where in groups:
            config = self.adapters[name]
            dropout = config.lora_dropout if self.training else 0.0
            terms.append(_Term(scale=weight * config.scaling, where=where, dropout=dropout))
            factors += [self.lora_A[name], self.lora_B[name]]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        matrix = partial(self._matrix, self.weight)  # this call's: what shares the weight out puts pieces in its place
        call = _Call(matrix=matrix, terms=tuple(terms), dtype=dtype, make=None if made is None else made.make)
        source = None if made is None else made.source.detach()
        trained = self.weight if self.weight.requires_grad else None
        y: Tensor = _Product.apply(x, source, trained, self.bias, call, *factors)  # type: ignore[no-untyped-call]
        return y

    @property
    def is_packed(self) -> bool:
        """Whether the weights were packed, for reading alone."""
        return bool(self._packed)

    def some_rows(self) -> Tensor:
        """Return four rows of the weight, (4, in_features), by which matrices can be told apart."""
        if self.is_packed or self.quantised is not None:
            return self._some
        return self.weight.detach()[:: max(1, len(self.weight) // 4)][:4].clone()

    def pack(self, done: Callable[[Tensor], None]) -> None:
        """Keep every matrix in oneDNN's order only (nn/packed.py); `done` is called with each plain one."""
        self._some = self.some_rows()
        plain = {"": self.weight}
        plain |= {f"A.{name}": self.lora_A[name] for name in self.adapters}
        plain |= {f"B.{name}": self.lora_B[name] for name in self.adapters}
        for key, weight in plain.items():
            self._packed[key] = packed.pack(weight)
            done(weight.data)
            packed.empty(weight)

    def quantize(self, bits: int) -> None:
        """Keep the matrix in 16, 8 or 4 bits only; adapters stay as they are. Raises ConfigError for other bits."""
        check_bits(bits, self.weight.shape)
        if self.quantised is not None:
            raise ConfigError("this matrix is quantised already; restore it first")
        self._some = self.some_rows()
        self.quantised = KINDS[bits](self.weight)
        self.weight.requires_grad_(False)
        packed.empty(self.weight)

    def restore(self, weight: Tensor) -> None:
        """Take back the plain matrix that `quantize` gave up."""
        self.quantised = None
        self.weight.data = weight

    def _product(self, x: Tensor, key: str, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if key in self._packed:
            return packed.linear(x, self._packed[key], bias)
        return products.linear(x, weight.to(x.dtype), bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Term:
    """One adapter on some rows: its factor, its place, its dropout."""

    scale: float
    where: Tensor | slice | None
    dropout: float

    @property
    def kept_scale(self) -> float:
        """The factor of what dropout keeps."""
        return self.scale / (1 - self.dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What a product needs that has no gradient."""

    matrix: Callable[[torch.dtype], Tensor]
    terms: tuple[_Term, ...]
    dtype: torch.dtype
    make: Callable[[Tensor], Tensor] | None


class _Product(torch.autograd.Function):
    """y = W x + b + sum over terms of scale B A dropout(x); factors are A, B of each term in turn.

    What a term reads and changes is a matrix, (tokens, width): many small products with an axis of rows are slow.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, source: Tensor | None, weight: Tensor | None, bias: Tensor | None, call: _Call,
        *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        x = x.to(call.dtype)
        y = products.linear(x, call.matrix(call.dtype), None if bias is None else bias.to(call.dtype))
        inners, masks = [], []
        for term, down, up in zip(call.terms, factors[::2], factors[1::2], strict=True):
            own = _flat(_pick(x, term.where))
            mask = torch.empty_like(own, dtype=torch.bool).bernoulli_(1 - term.dropout) if term.dropout else None
            inner = products.linear(_drop(own, mask), down.to(call.dtype)).mul_(term.kept_scale)
            _add_product(y, term.where, inner, up.to(call.dtype).T)
            inners.append(inner)
            masks.append(mask)
        ctx.call = call
        needs_x = any(ctx.needs_input_grad[place] for place in (2, *range(5, 5 + len(factors))))
        kept = (source if call.make else x) if needs_x else None
        ctx.save_for_backward(kept, weight, bias, *factors, *inners, *masks)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        call, needed = ctx.call, ctx.needs_input_grad
        kept, weight, bias, *rest = ctx.saved_tensors
        count = len(call.terms)
        factors, inners, masks = rest[: 2 * count], rest[2 * count : 3 * count], rest[3 * count :]
        upstream = given[0].to(call.dtype)
        x = None if kept is None else (call.make(kept) if call.make else kept).to(call.dtype)
        to_x = upstream @ call.matrix(call.dtype) if needed[0] else None
        to_weight = to_bias = None
        if needed[2]:
            assert x is not None
            assert weight is not None
            to_weight = (_flat(upstream).T @ _flat(x)).to(weight.dtype)
        if needed[3]:
            to_bias = _flat(upstream).sum(0).to(bias.dtype)
        to_factors: list[Tensor | None] = []
        for place, (term, inner, mask) in enumerate(zip(call.terms, inners, masks, strict=True)):
            down, up = factors[2 * place : 2 * place + 2]
            own = _flat(_pick(upstream, term.where))
            to_down = to_up = None
            if needed[6 + 2 * place]:
                to_up = (own.T @ inner).to(up.dtype)
            to_inner = (own @ up.to(call.dtype)).mul_(term.kept_scale)
            if needed[5 + 2 * place]:
                assert x is not None
                to_down = (to_inner.T @ _drop(_flat(_pick(x, term.where)), mask)).to(down.dtype)
            if to_x is not None:
                _add_product(to_x, term.where, to_inner, down.to(call.dtype), mask)
            to_factors += [to_down, to_up]
        return to_x, None, to_weight, to_bias, None, *to_factors


def _pick(x: Tensor, where: Tensor | slice | None) -> Tensor:
    if where is None:
        return x
    return x[:, where] if isinstance(where, slice) else x.index_select(0, where)


def _add(y: Tensor, where: Tensor | slice | None, change: Tensor) -> None:
    if isinstance(where, Tensor):
        y.index_add_(0, where, change)
    else:
        _pick(y, where).add_(change)


def _add_product(
    y: Tensor, where: Tensor | slice | None, left: Tensor, right: Tensor, mask: Tensor | None = None
) -> None:
    """Add left @ right, as far as the mask keeps it, to the rows or tokens of y."""
    if mask is None and not isinstance(where, Tensor):
        own = _pick(y, where).view(-1, y.shape[-1])
        torch.addmm(own, left, right, out=own)  # rounded once; torch's counters do not know addmm_
        return
    rows = len(where) if isinstance(where, Tensor) else len(y)
    _add(y, where, _drop(left @ right, mask).view(rows, -1, y.shape[-1]))


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
