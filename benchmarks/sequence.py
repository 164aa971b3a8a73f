"""How much less does a process keep that shares tokens, and how long a sequence can be trained in 20 GiB?

The small decoder (nano's: 8 layers, width 256, 4,096 words), float32, every token labelled, forward and backward of
one row; processes over gloo. Two measures: bytes saved for the backward pass, counted by a hook (storages, without
parameters), and the peak of resident memory above what it was before the step.

`share` prints both at 1, 2 and 4 processes, and what the second half of the tokens adds to the peak; the limit is
1 / processes. `longest` measures some lengths, each in fresh processes, fits memory as a + b T (ours, with recompute)
or a + b T + c T^2 (naive: logits and score matrices of every layer are made and kept), and prints the length that fills
20 GiB of each process by that fit. `proof` is one real step of a length, with a window so that it ends: a window
changes the time, and of the memory one tile alone.

    python benchmarks/sequence.py share                               # minutes
    python benchmarks/sequence.py longest --tokens 4096               # 10 minutes
    python benchmarks/sequence.py proof --tokens 600000 --ranks 1     # half an hour, 20 GB
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

from modalora.contracts import Batch, Route
from modalora.models import decoder
from modalora.models.multimodal import ModelConfig, Multimodal, recompute
from modalora.models.sizes import nano
from modalora.parallel.sequence import split_tokens
from timing import peak

LIMIT = 20 * 2**30
Told = dict[str, float]


def small(window: int | None = None) -> Multimodal:
    """The decoder of nano, alone; four key heads, so that four processes share them without copies."""
    torch.manual_seed(0)
    sizes = {name: getattr(nano().decoder, name) for name in nano().decoder.__slots__}
    return Multimodal(
        ModelConfig(decoder=decoder.DecoderConfig(**{**sizes, "num_key_value_heads": 4, "sliding_window": window}))
    )


def row(tokens: int) -> Batch:
    ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(1))
    return Batch(input_ids=ids, lengths=torch.tensor([tokens]), route=Route((None,)), labels=ids)


def materialise(model: Multimodal) -> None:
    """Make and keep logits and score matrices, as a plain implementation does."""
    decoder.attend = partial(decoder.attend, backend="eager")  # type: ignore[assignment]

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model.decoder.head(hidden), targets, reduction="none")

    model.decoder.losses = losses  # type: ignore[method-assign]


def step(tokens: int, ring: int, heads: int, *, naive: bool, again: bool, window: int | None) -> Told:
    """Return what one step of so many tokens takes of this process."""
    torch.set_num_threads(1)
    model, batch = small(window), row(tokens)
    if ring * heads > 1:
        mesh = init_device_mesh("cpu", (ring, heads), mesh_dim_names=("ring", "heads"))
        split_tokens(model, mesh["ring"], mesh["heads"])
    if again:
        recompute(model)
    if naive:
        materialise(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # no activations
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    started = time.process_time()
    with peak() as held:
        with saved_tensors_hooks(keep, lambda x: x):
            loss = model.loss(batch)[0].sum() / tokens
        kept = sum(saved.values())
        loss.backward()
    return {
        "saved": kept,
        "peak": held.bytes,
        "seconds": time.process_time() - started,
        "loss": float(loss.detach()),
    }


def together(ring: int, heads: int, tokens: int, **how: Any) -> list[Told]:
    """Return what `step` tells in each of ring x heads fresh processes."""
    world = ring * heads
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()

        def work(rank: int) -> None:
            try:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                if world > 1:
                    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
                answers.put((rank, step(tokens, ring, heads, **how)))
            except BaseException:
                answers.put((rank, traceback.format_exc()))
            os._exit(0)

        workers = [context.Process(target=work, args=(rank,)) for rank in range(world)]
        for worker in workers:
            worker.start()
        found: dict[int, Any] = {}
        while len(found) < world:
            if not answers.empty():
                found |= [answers.get()]
            elif any(worker.exitcode not in (None, 0) for worker in workers):
                sys.exit(f"{tokens} tokens: a process was killed, for its memory perhaps; give fewer")
            else:
                time.sleep(0.05)
        for worker in workers:
            worker.join()
    if failed := [told for told in found.values() if isinstance(told, str)]:
        sys.exit(failed[0])
    return [found[rank] for rank in range(world)]


def most(told: list[Told], key: str) -> float:
    return max(one[key] for one in told)


def share(tokens: int) -> None:
    """Print what a process keeps at 1, 2 and 4 of them, and what each further token takes at the peak."""
    print(f"{tokens} tokens, MB of a process      saved   of one    peak   of one   further   of one   seconds   loss")
    for again in (False, True):
        firsts: list[float] = []
        for ring, heads in ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)):
            short, told = (
                together(ring, heads, size, naive=False, again=again, window=None) for size in (tokens // 2, tokens)
            )
            saved, peak = most(told, "saved"), most(told, "peak")
            figures = [saved / 2**20, peak / 2**20, (peak - most(short, "peak")) / 2**20]
            firsts = firsts or figures
            print(
                f"{f'ring {ring} x heads {heads}' + (', recompute' if again else ''):<30}"
                + "".join(f"{own:9.1f}{own / first:9.2f}" for own, first in zip(figures, firsts, strict=True))
                + f"{most(told, 'seconds'):9.1f}{sum(one['loss'] for one in told):9.5f}",
                flush=True,
            )


def fitted(lengths: list[int], peaks: list[float], degree: int) -> tuple[Callable[[float], float], float]:
    """Return the polynomial of least squares, and its worst relative error at what was measured."""
    powers = torch.tensor([[float(x) ** power for power in range(degree + 1)] for x in lengths], dtype=torch.float64)
    scale = powers.amax(0)
    wanted = torch.tensor(peaks, dtype=torch.float64)
    found = (torch.linalg.lstsq(powers / scale, wanted[:, None]).solution[:, 0] / scale).tolist()

    def at(x: float) -> float:
        return float(sum(factor * x**power for power, factor in enumerate(found)))

    return at, max(abs(at(x) / peak - 1) for x, peak in zip(lengths, peaks, strict=True))


def solve(at: Callable[[float], float], limit: float) -> int:
    low, high = 1.0, 2.0**30
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) < limit else (low, middle)
    return int(low)


def longest(tokens: int) -> None:
    """Print the tokens that fill 20 GiB of each process, from what up to 4 x tokens take (naive: tokens / 2)."""
    ours = [tokens, 2 * tokens, 3 * tokens, 4 * tokens]
    ways: dict[str, tuple[int, int, bool, list[int]]] = {
        "naive": (1, 1, True, [one // 8 for one in ours]),
        "ours, 1 process": (1, 1, False, ours),
        "ours, 2 processes": (1, 2, False, ours),
        "ours, a ring of 2": (2, 1, False, ours),
    }
    found: Told = {}
    print(f"{'':<20}{'tokens':>9}{'peak MB':>9}{'seconds':>9}")
    for name, (ring, heads, naive, lengths) in ways.items():
        peaks = []
        for tokens in lengths:
            told = together(ring, heads, tokens, naive=naive, again=not naive, window=None)
            peaks.append(most(told, "peak"))
            print(f"{name:<20}{tokens:9}{peaks[-1] / 2**20:9.1f}{most(told, 'seconds'):9.1f}", flush=True)
        at, error = fitted(lengths, peaks, 2 if naive else 1)
        found[name] = solve(at, LIMIT)
        bytes_each = (at(2 * lengths[-1]) - at(lengths[-1])) / lengths[-1]
        print(
            f"{name}: {found[name]:,} tokens in 20 GiB of each process, {found[name] / found['naive']:.1f} x naive "
            f"({bytes_each:,.0f} bytes per further token; the fit is off by {error:.1%} at most)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("share", "longest", "proof"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--window", type=int, default=1024)
    arguments = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # what is freed goes back: resident memory is memory in use
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if arguments.what == "share":
        share(arguments.tokens)
    elif arguments.what == "longest":
        longest(arguments.tokens)
    else:
        told = together(1, arguments.ranks, arguments.tokens, naive=False, again=True, window=arguments.window)
        for rank, one in enumerate(told):
            print(f"process {rank}: {one['peak'] / 2**30:.2f} GiB at the peak, {one['seconds']:.0f} s of CPU")
        print(f"loss {sum(one['loss'] for one in told):.5f} over {arguments.tokens:,} tokens")


if __name__ == "__main__":
    main()
