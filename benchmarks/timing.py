"""Time and memory that benchmarks tell.

On a CPU: seconds of this process, what other work on the machine hardly moves, unlike wall time, and resident memory.
On another device: seconds from the first call to the end of all that was asked of it, and what its allocator holds.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from modalora.checkpoint.preserve import device_name

CPU = torch.device("cpu")


def where(threads: int = 1, device: torch.device = CPU) -> str:
    """Return day, processor, torch and threads, for the head of a table."""
    plural = "s" if threads > 1 else ""
    cores = f"{os.cpu_count()} cores, " if device == CPU else ""
    return f"{date.today()}, {device_name(device)}, {cores}torch {torch.__version__}, {threads} thread{plural}"


def best(work: Callable[[], Any], times: int = 3, device: torch.device = CPU) -> float:
    """Return the seconds of the quickest of several runs; elsewhere than on a CPU a run before them warms up."""
    if device != CPU:
        work()
    found = []
    for _ in range(times):
        started = _clock(device)
        work()
        found.append(_clock(device) - started)
    return min(found)


def in_turn(works: Mapping[str, Callable[[], Any]], times: int = 3, device: torch.device = CPU) -> dict[str, float]:
    """Return the seconds of the quickest of several runs of each, run in turn: a machine that is shared slows down
    and speeds up again within minutes."""
    found = [{name: best(work, 1, device) for name, work in works.items()} for _ in range(times)]
    return {name: min(one[name] for one in found) for name in works}


def _clock(device: torch.device) -> float:
    if device == CPU:
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


@dataclass
class Peak:
    """The most bytes that something needed above what was there before it."""

    bytes: int = 0


@contextmanager
def peak(device: torch.device = CPU) -> Iterator[Peak]:
    """Measure the body; what is found is there once it has ended. Needs Linux on a CPU."""
    gc.collect()
    found = Peak()
    if device == CPU:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most held starts anew
        before = _held("VmRSS")
        yield found
        found.bytes = _held("VmHWM") - before
    else:
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        yield found
        found.bytes = torch.accelerator.max_memory_allocated(device) - before


def _held(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
