"""Processes that found each other: starting, summing figures, waiting."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from threading import current_thread, main_thread
from typing import Any

import torch
import torch.distributed as dist

from modalora.errors import ConfigError, ShapeError, TrainingError
from modalora.parallel.stops import STORE

NOTHING_TO_OFFLOAD = "offload moves what a GPU holds to the CPU; with device=cpu it is there: leave offload out"


def join(device: str, patience_seconds: int) -> torch.device:
    """Join the processes that a launcher started; return the device of this one.

    On one machine, processes of `modalora train --gpus` listen on loopback alone; between machines torchrun's
    addresses are used. A collective that waits longer than patience_seconds for a rank fails.
    Raises ConfigError when the machine has too few GPUs.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kind = torch.device(device).type
    found = torch.device(kind)
    if kind == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ConfigError(f"--gpus: process {index} has no GPU of its own; there are {torch.cuda.device_count()}")
        found = torch.device("cuda", index)
        torch.cuda.set_device(found)
    if dist.is_initialized():  # by the launcher, as Ray does
        return found
    store = os.environ.get(STORE)
    with _at_once():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            init_method=f"file://{store}" if store else "env://",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=patience_seconds),
        )
    return found


@contextmanager
def _at_once() -> Iterator[None]:
    """Let signals end the process while it waits inside a library, where Python would hear them after the wait."""
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM) if current_thread() is main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # else one of C's, which Python cannot set
                signal.signal(number, handler)


@contextmanager
def explained() -> Iterator[None]:
    """Turn what a collective meets when another process hangs or has died into a TrainingError."""
    try:
        yield
    except (RuntimeError, ShapeError) as error:  # what gloo and NCCL raise, and what an encoder makes of it
        told = str(error).splitlines()[0]
        if any(words in told for words in ("Timed out", "timed out", "timeout")):
            raise TrainingError(
                f"process {os.environ.get('RANK')} waited for another, which does not answer: it hangs, or its step "
                f"takes longer than patience_seconds ({told:.200})"
            ) from error
        if any(words in told for words in ("closed by peer", "reset by peer", "remote process exited")):
            raise TrainingError(
                f"process {os.environ.get('RANK')} waited for another, which has ended ({told:.200})"
            ) from error
        raise


@contextmanager
def joined() -> Iterator[None]:
    """Explain what goes wrong between processes, and leave a group that was joined inside."""
    before = dist.is_initialized()
    try:
        with explained():
            yield
    finally:
        if dist.is_initialized() and not before:
            dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Return the number of this process and how many there are in its process group; without one, 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Tell whether this process is the first of its process group, or in none; before there is one, stops.is_first."""
    return place()[0] == 0


def _summed(told: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sum over the ranks by key; every rank adds up in the same order, so all get the same bits."""
    found: dict[str, float] = defaultdict(float)
    for own in told:
        for key, value in own.items():
            found[key] += value
    return dict(found)


def gathered(value: Any) -> list[Any]:
    """Return what every rank gives, in the order of ranks, one alone its own. Values travel as JSON, not as pickles."""
    if not dist.is_initialized():
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    world = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(own)]))
    longest = max(int(size) for size in sizes)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world)]
    dist.all_gather(texts, torch.nn.functional.pad(own, (0, longest - len(own))))
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]


def shared_totals(
    values: Mapping[str, float], parts: Mapping[str, float], *, copies: int, tellers: int
) -> dict[str, float]:
    """Return the sum over the shares of the data by key.

    values: what all of the `copies` processes of a share tell alike. parts: what each has its part of, but for as many
    as `tellers` that tell the same part. No key is in both.
    """
    told = gathered([dict(values), dict(parts)])
    found = {key: value / copies for key, value in _summed(own for own, _ in told).items()}  # sums of counts are whole
    return found | {key: value / tellers for key, value in _summed(own for _, own in told).items()}
