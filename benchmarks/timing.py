"""CPU seconds of this process, what other work on the machine hardly moves, unlike wall time; and its memory."""

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


def where(threads: int = 1) -> str:
    """Return day, processor, torch and threads, for the head of a table."""
    plural = "s" if threads > 1 else ""
    name = device_name(torch.device("cpu"))
    return f"{date.today()}, {name}, {os.cpu_count()} cores, torch {torch.__version__}, {threads} thread{plural}"


def best(work: Callable[[], Any], times: int = 3) -> float:
    """Return the CPU seconds of the quickest of several runs."""
    found = []
    for _ in range(times):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def in_turn(works: Mapping[str, Callable[[], Any]], times: int = 3) -> dict[str, float]:
    """Return the CPU seconds of the quickest of several runs of each, run in turn: a machine that is shared slows down
    and speeds up again within minutes."""
    found = [{name: best(work, 1) for name, work in works.items()} for _ in range(times)]
    return {name: min(one[name] for one in found) for name in works}


@dataclass
class Peak:
    """The most bytes of resident memory that something needed above what was there before it."""

    bytes: int = 0


@contextmanager
def peak() -> Iterator[Peak]:
    """Measure the body; what is found is there once it has ended. Needs Linux."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most held starts anew
    before, found = _held("VmRSS"), Peak()
    yield found
    found.bytes = _held("VmHWM") - before


def _held(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
