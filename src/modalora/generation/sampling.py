"""From logits to the next token: greedy, or sampled with temperature, top-k, top-p, min-p and a repetition penalty."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from math import inf
from numbers import Integral, Real

import torch
from torch import Tensor

from modalora.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen (names as in vLLM and OpenAI). temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # keep the likeliest that together reach p; nucleus sampling, arXiv:1904.09751
    min_p: float = 0.0  # keep those at least min_p times as likely as the likeliest; arXiv:2407.01082
    repetition_penalty: float = 1.0  # divides (multiplies, if negative) logits of tokens seen; CTRL, arXiv:1909.05858
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), field.name in ("top_k", "seed")
            if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
                raise ConfigError(f"{field.name}={value!r:.40} must be a {'whole ' * whole}number")
        rules = (
            ("temperature", 0 <= self.temperature < inf, "at least 0; 0 is greedy"),
            ("seed", -(2**63) <= self.seed < 2**63, "a whole number of 64 bits"),
            ("top_k", self.top_k >= 0, "at least 0; 0 keeps all"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 keeps all"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]; 0 keeps all"),
            ("repetition_penalty", 0 < self.repetition_penalty < inf, "above 0; 1 is none"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ConfigError(f"{name}={getattr(self, name)} must be {rule}")
        for field in fields(self):  # torch takes no fractions, and of numpy's numbers not all
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, int(value) if field.name in ("top_k", "seed") else float(value))
            except OverflowError:
                raise ConfigError(f"{field.name}={value!r:.40} is more than a float holds; 1 works") from None
        for name, none in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            if self.temperature == 0 and getattr(self, name) != none:
                raise ConfigError(
                    f"{name}={getattr(self, name)} has no effect at temperature=0, which is greedy; give a temperature "
                    "above 0, such as 1, or leave it out"
                )


NONE = -1  # in place of a token where there is none to choose
_COLDEST = 1e-6  # below it no logit but the largest is ever drawn, and float32 divides by 0
_FINITE = (torch.finfo(torch.float32).min / 2, torch.finfo(torch.float32).max / 2)


def sample(
    logits: Tensor, seen: Sequence[Collection[int]], sampling: Sampling, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return one token per row, (batch,), for logits (batch, vocab); NONE where the highest logit is not finite.

    seen: the ids that each row holds, prompt included. generators: one per row, which draws what it draws alone.
    """
    logits = logits.float()
    broken = ~logits.amax(-1).isfinite()  # NaN wins every comparison; not asked for here, which would wait for a GPU
    if sampling.repetition_penalty != 1.0:
        logits = logits.clone()
        for row, ids in enumerate(seen):
            index = torch.tensor(list(ids), dtype=torch.long, device=logits.device)
            own = logits[row, index]
            logits[row, index] = torch.where(
                own > 0, own / sampling.repetition_penalty, own * sampling.repetition_penalty
            )
        logits = logits.clamp(*_FINITE)  # a penalty near 0 makes them infinite
    if sampling.temperature < _COLDEST:
        return logits.argmax(-1).masked_fill(broken, NONE)
    logits = logits.masked_fill(broken[:, None], 0.0)
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature makes them infinite
    shares = torch.softmax(_filtered(logits / sampling.temperature, sampling), dim=-1).cpu()
    drawn = [torch.multinomial(own, 1, generator=generator) for own, generator in zip(shares, generators, strict=True)]
    return torch.cat(drawn).to(logits.device).masked_fill(broken, NONE)


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        shares = torch.softmax(ordered, dim=-1)
        beyond = shares.cumsum(-1) - shares >= sampling.top_p  # the token that reaches p is kept
        beyond[:, 0] = False  # as it is where p is less than float32 can tell from 0
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    if sampling.min_p > 0:
        shares = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(shares < sampling.min_p * shares.amax(-1, keepdim=True), -torch.inf)
    return logits
