"""AdamW whose two moments are kept in 16 or 8 bits (arXiv:1711.05101; 8 bits: arXiv:2110.02861).

Each step reads a parameter's moments into float32, updates, and writes them back. 16 bits are bf16. 8 bits are codes of
a table that is fine near zero, one scale per 256 numbers; a second moment that is not zero is never written as zero, or
the division by its root would run away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # numbers under one scale
TINY = 2**14  # parameters of fewer numbers keep float32: they weigh nothing, and norms and biases are among them


class SmallAdamW(torch.optim.Optimizer):
    """AdamW with moments of few bits; its state holds plain tensors alone."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, bits: int
    ) -> None:
        self.bits = bits
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state[parameter], group)

    def _update(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (first, second), grad = group["betas"], parameter.grad.float()  # type: ignore[union-attr]
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        count = float(state["step"])
        mean = self._read(state, "exp_avg", grad).lerp_(grad, 1 - first)
        square = self._read(state, "exp_avg_sq", grad).mul_(second).addcmul_(grad, grad, value=1 - second)
        self._write(state, "exp_avg", mean)
        self._write(state, "exp_avg_sq", square)
        exact = parameter.float()
        exact.mul_(1 - group["lr"] * group["weight_decay"])
        spread = square.sqrt_().div_((1 - second**count) ** 0.5).add_(group["eps"])
        exact.addcdiv_(mean, spread, value=-group["lr"] / (1 - first**count))
        parameter.copy_(exact)

    def _read(self, state: dict[str, Any], name: str, like: Tensor) -> Tensor:
        if name not in state:
            return torch.zeros_like(like)
        if f"{name}_scale" not in state:
            return state[name].to(torch.float32, copy=True)
        numbers = table(name == "exp_avg").to(like.device)[state[name].int()] * state[f"{name}_scale"]
        return numbers.flatten()[: like.numel()].view(like.shape)

    def _write(self, state: dict[str, Any], name: str, moment: Tensor) -> None:
        if moment.numel() < TINY or self.bits == 32:
            state[name] = moment.clone()
        elif self.bits == 16:
            state[name] = moment.bfloat16()
        else:
            state[name], state[f"{name}_scale"] = to_codes(moment, signed=name == "exp_avg")


def to_codes(moment: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return uint8 codes of `table`, (blocks, 256), and float32 scales, (blocks, 1). What is not 0 stays above it."""
    flat = moment.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    numbers = table(signed).to(moment.device)
    codes = torch.bucketize(blocks / scale, (numbers[1:] + numbers[:-1]) / 2)
    if not signed:
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8), scale


@cache
def table(signed: bool) -> Tensor:
    """Return 256 numbers up to 1, seven decades with ever more of them (dynamic tree, arXiv:2110.02861, section 2)."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        means = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        found += means + ([-mean for mean in means] if signed else [])
    return torch.tensor(sorted(found), dtype=torch.float32)
