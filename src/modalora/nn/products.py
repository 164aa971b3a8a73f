"""float32 matrix products of a CPU: the same bits at every height, and through oneDNN where MKL is half as fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SETTING: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch makes it when asked
EXACT = 1e-6  # relative distance from float64: float32 sums of 3,072 terms are within 6e-7, through bf16 beyond 1e-3
HEIGHT = 16  # rows from which on MKL's kernels sum every row in the same order


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., time, columns) -> (..., time, rows): functional.linear, the same bits of a row however many there are.

    MKL's AVX-512 kernels sum a float32 product of 2 to 15 rows in another order than a taller one: a short text or
    sound got other last bits alone than in a batch, up to 1.4e-5 in the logits of nano. So zeros fill up such rows.
    Single tokens, time 1, stay as they are: decoding would pay for 16 rows at each.
    """
    rows = x.shape[:-1].numel()
    if x.dtype != torch.float32 or x.device.type != "cpu" or rows >= HEIGHT or x.ndim < 2 or x.shape[-2] < 2:
        return functional.linear(x, weight, bias)
    filled = functional.pad(x.flatten(0, -2), (0, 0, 0, HEIGHT - rows))
    return functional.linear(filled, weight, bias)[:rows].view(*x.shape[:-1], -1)


@contextmanager
def wide_products() -> Iterator[None]:
    """Let float32 products go through oneDNN inside, where that is faster and float32 still; also a decorator.

    MKL, torch's default, multiplies by AVX2 alone on a CPU of another maker: 93 GFLOP/s on a core of an EPYC where
    oneDNN's AVX-512 does 209. torch has no setting for oneDNN in float32 but the one that also allows it to round to
    bf16, which it does where there is AMX. So this asks for a CPU without, and compares with float64 before it trusts.
    A shape costs half a millisecond when first met: for training, searches, grids and prompts, not for single tokens.
    A setting of the caller's own stands. It is the whole process's: what another thread multiplies meanwhile may get
    other last bits, so inference is for one thread at a time where bits count.
    """
    if SETTING.fp32_precision != "none" or not gains():
        yield
        return
    SETTING.fp32_precision = "bf16"
    try:
        yield
    finally:
        SETTING.fp32_precision = "none"


@cache
def has_tiles() -> bool:
    """Tell whether this CPU multiplies bf16 by AMX, some eight times as fast as float32."""
    return _told().get("amx_bf16") is True


@cache
def gains() -> bool:
    """Tell whether oneDNN serves this machine better: AVX-512 of AMD's, no AMX, no GPU, and exact when tried."""
    told = _told()
    if (
        not torch.backends.mkldnn.is_available()
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
        or "AMD" not in told.get("cpu_name", "")
        or told.get("amx_tile") is not False
        or torch.cuda.is_available()  # whose products the setting should not touch
    ):
        return False
    SETTING.fp32_precision = "bf16"
    try:
        return _is_exact()
    finally:
        SETTING.fp32_precision = "none"


def _told() -> Mapping[str, Any]:
    """Return what torch knows of this CPU."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def _is_exact() -> bool:
    """Tell whether products of several forms are as near to float64 as float32 is."""
    numbers = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 64, 128), (48, 300, 64), (512, 256, 256)):
        x = torch.randn(2, rows, inner, generator=numbers)
        y = torch.randn(2, inner, columns, generator=numbers)
        wanted = x.double() @ y.double()
        for found in (torch.bmm(x, y), torch.stack([x[0] @ y[0], x[1] @ y[1]])):
            if (found - wanted).norm() > EXACT * wanted.norm():
                return False
    return True
