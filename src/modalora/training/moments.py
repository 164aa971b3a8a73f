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
from torch.nn import functional

BLOCK = 256  # numbers under one scale
PIECE = 2**16  # numbers, a multiple of BLOCK, that a CPU's cache holds
GPU_PIECE = 2**22  # which a GPU starts at once
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
        """Go through a parameter in pieces: what is wide for a moment stays in the cache and weighs nothing."""
        if not state:
            self.begin(parameter, state)
        state["step"] += 1
        first, second = group["betas"]
        rate = group["lr"] / (1 - first ** float(state["step"]))
        root = (1 - second ** float(state["step"])) ** 0.5
        assert parameter.grad is not None
        flat, grads = parameter.view(-1), parameter.grad.reshape(-1)
        size = PIECE if flat.device.type == "cpu" else GPU_PIECE
        for start in range(0, len(flat), size):
            piece = slice(start, min(start + size, len(flat)))
            grad = grads[piece].float()
            mean = _read(state, "exp_avg", piece).lerp_(grad, 1 - first)
            square = _read(state, "exp_avg_sq", piece).mul_(second).addcmul_(grad, grad, value=1 - second)
            _write(state, "exp_avg", piece, mean)
            _write(state, "exp_avg_sq", piece, square)
            exact = flat[piece].float().mul_(1 - group["lr"] * group["weight_decay"])
            flat[piece] = exact.addcdiv_(mean, square.sqrt_().div_(root).add_(group["eps"]), value=-rate)

    def begin(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Fill a parameter's state with moments of zero."""
        state["step"] = torch.tensor(0.0)
        bits = 32 if parameter.numel() < TINY else self.bits
        for name in ("exp_avg", "exp_avg_sq"):
            if bits == 8:
                zero = int((table(name == "exp_avg") == 0).nonzero())
                blocks = -(-parameter.numel() // BLOCK)
                state[name] = torch.full((blocks, BLOCK), zero, dtype=torch.uint8, device=parameter.device)
                state[f"{name}_scale"] = torch.zeros(blocks, 1, device=parameter.device)
            else:
                dtype = torch.bfloat16 if bits == 16 else torch.float32
                state[name] = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)


def _read(state: dict[str, Any], name: str, piece: slice) -> Tensor:
    """Return a piece of a moment, float32 numbers that may be written over."""
    if f"{name}_scale" not in state:
        return state[name][piece].to(torch.float32, copy=True)
    blocks = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
    codes = state[name][blocks]
    numbers = _brought(table, name == "exp_avg", codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
    return numbers.mul_(state[f"{name}_scale"][blocks]).flatten()[: piece.stop - piece.start]


def _write(state: dict[str, Any], name: str, piece: slice, moment: Tensor) -> None:
    if f"{name}_scale" not in state:
        state[name][piece] = moment
        return
    blocks = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
    state[name][blocks], state[f"{name}_scale"][blocks] = to_codes(moment, signed=name == "exp_avg")


def to_codes(moment: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return uint8 codes of `table`, (blocks, 256), and float32 scales, (blocks, 1).

    The code is the nearest to the number rounded to bf16: looking up its 16 bits takes a tenth of a search.
    """
    blocks = functional.pad(moment, (0, -len(moment) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    bits = (blocks / scale).bfloat16().view(torch.int16).int().bitwise_and_(0xFFFF)
    return _brought(_nearest, signed, moment.device).index_select(0, bits.flatten()).view(bits.shape), scale


@cache
def _brought(make: Callable[[bool], Tensor], signed: bool, device: torch.device) -> Tensor:
    return make(signed).to(device)


@cache
def _nearest(signed: bool) -> Tensor:
    """Return the code of every bf16 number, by its bits; what is above 0 never gets the code of 0, unless signed."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float().roll(2**15)
    numbers = table(signed)
    codes = torch.bucketize(every, (numbers[1:] + numbers[:-1]) / 2)
    return (codes if signed else codes.clamp(min=(every > 0).int())).to(torch.uint8)


@cache
def table(signed: bool) -> Tensor:
    """Return 256 numbers up to 1, seven decades with ever more of them (dynamic tree, arXiv:2110.02861, section 2)."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        means = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        found += means + ([-mean for mean in means] if signed else [])
    return torch.tensor(sorted(found), dtype=torch.float32)
