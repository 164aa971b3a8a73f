"""What machines can do: those of a table by their makers' data sheets, this one by measuring it."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from modalora.errors import ConfigError
from modalora.nn.products import wide_products


class Machine(NamedTuple):
    """A GPU, as its maker's data sheet has it."""

    peak: float  # FLOP/s, dense bf16
    memory: float  # bytes
    bandwidth: float  # bytes/s
    exponentials: float  # a second: 16 a clock of each multiprocessor, at the highest clock


MACHINES = {
    "a100": Machine(312e12, 80e9, 2.04e12, 2.44e12),
    "a100-40gb": Machine(312e12, 40e9, 1.555e12, 2.44e12),
    "h100": Machine(989e12, 80e9, 3.35e12, 3.86e12),
    "h200": Machine(989e12, 141e9, 4.8e12, 3.86e12),
    "l40s": Machine(362e12, 48e9, 0.864e12, 5.73e12),
    "rtx4090": Machine(165e12, 24e9, 1.008e12, 5.16e12),
}


def machine_rate(machine: str, precision: str, share: float) -> float:
    """Return the FLOP/s of one machine, "this", which is measured, or a share of the peak of a name of MACHINES."""
    return measured_rate(precision) if machine == "this" else machine_of(machine).peak * share


def measured_rate(precision: str) -> float:
    """Return the FLOP/s of matrix products on this machine in "bf16" or "fp32", the best of three."""
    side = 1536
    x = torch.ones(side, side, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    with wide_products():  # as training multiplies
        return 2 * side**3 / _least_seconds(lambda: x @ x)


def measured_bandwidth() -> float:
    """Return the bytes that this machine reads in a second, the best of three."""
    x = torch.ones(2**25)
    return x.nbytes / _least_seconds(x.sum)


def _least_seconds(work: Callable[[], object]) -> float:
    """Return the shortest of three times that some work takes."""
    work()  # the first one starts threads
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def machine_of(name: str) -> Machine:
    """Return a machine of MACHINES. Raises ConfigError for another name."""
    if name not in MACHINES:
        raise ConfigError(f"machine {name!r} is unknown; use this, {', '.join(MACHINES)}")
    return MACHINES[name]


def own_memory() -> float:
    """Return the bytes of memory of this machine."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def resident() -> int:
    """Return the bytes that this process holds: torch and its imports, as a training process has them too."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
