"""Linear layers that hold several LoRA adapters and apply to each row the one that its route names.

y = W x + (alpha / rank) B A dropout(x), LoRA: arXiv:2106.09685. An adapter is computed for the rows routed to it and
for no other: skipped, never multiplied by zero, so not even a NaN in an idle adapter reaches a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modalora.contracts import Route
from modalora.errors import ConfigError
from modalora.nn import packed


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
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout} must lie in [0, 1); Phi-4-Multimodal uses 0 and 0.01")
        for key in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(key)
            except re.error as error:
                raise ConfigError(f"the pattern {key!r} of an adapter is no regular expression: {error}") from None

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


def _pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


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

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """x: (batch, time, in_features) -> (batch, time, out_features)."""
        y = self._product(x, "", self.weight, self.bias)
        for name, weight, rows in route.groups:
            if name not in self.adapters:
                continue
            config = self.adapters[name]
            index = None if rows is None else rows.to(x.device)
            own = x if index is None else x.index_select(0, index)
            own = functional.dropout(own, config.lora_dropout, self.training) if config.lora_dropout else own
            inner = self._product(own, f"A.{name}", self.lora_A[name]) * (weight * config.scaling)
            change = self._product(inner, f"B.{name}", self.lora_B[name])
            y = y + change if index is None else y.index_add(0, index, change.to(y.dtype))
        return y

    @property
    def is_packed(self) -> bool:
        """Whether the weights were packed, for reading alone."""
        return bool(self._packed)

    def some_rows(self) -> Tensor:
        """Return four rows of the weight, (4, in_features), by which matrices can be told apart."""
        if self.is_packed:
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
            # its shape without memory; whatever reads it by mistake gets NaN
            weight.data = torch.full((), torch.nan, dtype=weight.dtype).expand(weight.shape)

    def _product(self, x: Tensor, key: str, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if key in self._packed:
            return packed.linear(x, self._packed[key], bias)
        return functional.linear(x, weight, bias)
