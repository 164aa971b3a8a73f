"""Frozen matrices in 16, 8 or 4 bits, expanded each time they are read.

int8: one scale per row. nf4: sixteen levels that cut a normal distribution into equal shares, one scale per 64 numbers
of a row (QLoRA, arXiv:2305.14314, section 3), 4.25 bits a number. A matrix is (rows, columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from modalora.errors import ConfigError

BLOCK = 64  # numbers under one scale of nf4

# arXiv:2305.14314, appendix E
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Int8(nn.Module):
    """A matrix as int8 with a scale per row."""

    values: Tensor
    scales: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        values, scales = to_int8(matrix)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scales", scales.bfloat16(), persistent=False)

    def expand(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix. Values have seven bits and scales eight, so bf16 is one rounding of the exact product."""
        return self.values.to(dtype).mul_(self.scales.to(dtype))


class Nf4(nn.Module):
    """A matrix as nf4, two numbers to a byte."""

    codes: Tensor
    scales: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        blocks = matrix.detach().float().reshape(-1, BLOCK)
        scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12).bfloat16()
        levels = torch.tensor(LEVELS, device=matrix.device)
        codes = torch.bucketize(blocks / scales.float(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        self.register_buffer("codes", codes[:, ::2] * 16 + codes[:, 1::2], persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.shape = matrix.shape

    def expand(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix. In bf16 level and product are rounded: 2 % of what four bits lost already."""
        numbers = _pairs(self.codes.device, dtype).index_select(0, self.codes.flatten().int()).view(-1, BLOCK)
        return numbers.mul_(self.scales.to(dtype)).view(self.shape)


@cache  # no product waits for them to be brought to a device
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return what each byte stands for, (256, 2)."""
    levels = torch.tensor(LEVELS, device=device, dtype=dtype)
    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)


class Half(nn.Module):
    """A matrix as bf16: products in bf16 lose nothing by it."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.detach().bfloat16(), persistent=False)

    def expand(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix."""
        return self.matrix.to(dtype)


Kept = Half | Int8 | Nf4
KINDS: dict[int, type[Kept]] = {16: Half, 8: Int8, 4: Nf4}


def check_bits(bits: int, shape: Sequence[int]) -> None:
    """Refuse a matrix that cannot be kept in so many bits. Raises ConfigError."""
    if bits not in KINDS:
        raise ConfigError(f"bits={bits} must be 16, 8 or 4")
    if bits == 4 and shape[1] % BLOCK:
        raise ConfigError(f"4 bits take rows of a multiple of {BLOCK} numbers; this matrix is {tuple(shape)}")


def to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values and one float32 scale per row (first axis), (rows, 1, ...); error is at most half a scale.

    Scales have bf16's eight bits: the largest value of a row is then 127 x scale without rounding, so storing an
    expanded matrix again gives the same bits.
    """
    flat = tensor.detach().float().flatten(1)
    scale = (flat.abs().amax(1).clamp(min=1e-12) / 127).bfloat16().float()
    values = (flat / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return values.view(tensor.shape), scale.view(-1, *[1] * (tensor.ndim - 1))
