"""Many processes against one: losses of every engine, and states written at one world size and read at another.

Everything runs on the CPU over gloo, in processes forked from this one, on a small model (two layers, width 64) whose
micro-batches mix text, pictures, speech and both, so that ranks hold different media in every step. Adapters, encoders,
projectors and the decoder train. Prints two tables.

    .venv/bin/python benchmarks/distributed.py [--steps 10] [--most 4]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modalora.config import MeshConfig, OptimConfig, RunConfig, SourceConfig
from modalora.contracts import Batch
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.nn.lora import LoraConfig
from modalora.parallel.engine import Engine, Single
from modalora.parallel.fsdp import Plan, Sharded
from modalora.parallel.zero import Zero
from modalora.training.loop import train

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parallel"))
from rows import row

SECONDS = 300
MICRO = 12  # micro-batches of a step: one to four processes share them evenly
KINDS = ("text", "image", "speech", "both")
ENGINES: dict[str, Callable[[], Engine]] = {
    "fsdp": lambda: Sharded(MeshConfig(), Plan(), torch.device("cpu")),
    "fsdp, 2 copies": lambda: Sharded(MeshConfig(replicate=2), Plan(), torch.device("cpu")),
    "fsdp, tensor 2": lambda: Sharded(MeshConfig(tensor=2), Plan(), torch.device("cpu")),
    "zero1": lambda: Zero(1, torch.device("cpu"), offload=False, clip_norm=0.5),
    "zero2": lambda: Zero(2, torch.device("cpu"), offload=False, clip_norm=0.5),
    "zero2, offload": lambda: Zero(2, torch.device("cpu"), offload=True, clip_norm=0.5),
    "zero3": lambda: third(offload=False),
    "zero3, offload": lambda: third(offload=True),
}


def third(*, offload: bool) -> Zero:
    """ZeRO-3 that cuts tensors as small as these too."""
    engine = Zero(3, torch.device("cpu"), offload=offload, clip_norm=0.5)
    engine.settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return engine


def fresh() -> Multimodal:
    """A model without dropout: tensor parallelism draws it for a rank's channels."""
    torch.manual_seed(0)
    model = Multimodal(
        replace(tiny(), adapters={name: LoraConfig(r=8, lora_alpha=16) for name in ("vision", "speech")})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


class Rows:
    """The micro-batches of a share."""

    def __init__(self, share: tuple[int, int]) -> None:
        self.share, self.taken = share, 0

    def take(self) -> list[Batch]:
        self.taken += 1
        kinds = [KINDS[(at + at // 4 + self.taken) % 4] for at in range(MICRO)]
        every = [row(kind, 100 * self.taken + at) for at, kind in enumerate(kinds)]
        return every[self.share[0] :: self.share[1]]

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.taken = int(state["taken"])


def losses(engine: Engine, output: Path, steps: int) -> list[float]:
    """Train up to a step, from the state that is there; return the losses of the steps taken."""
    run = RunConfig.model_validate(
        {
            "init": "tiny",
            "output": str(output),
            "train": ["decoder", "adapter.*", "image.*", "audio.*"],
            "mixture": [SourceConfig(source="books")],
            "steps": steps,
            "precision": "fp32",
            "log_every": 1,
            "save_every": 1000,
            "optim": OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant", clip_norm=0.5),
        }
    )
    seen: list[float] = []
    train(run, fresh(), Rows(engine.share), lambda told: seen.append(float(told["loss"])), engine=engine)
    return seen


def work(rank: int, world: int, store: Path, answers: Any, name: str, output: Path, steps: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        answers.send_bytes(pickle.dumps(losses(ENGINES[name](), output, steps)))
    except BaseException:
        answers.send_bytes(pickle.dumps(traceback.format_exc()))
    finally:
        os._exit(0)


def run(name: str, world: int, output: Path, steps: int) -> list[float]:
    """Return the losses of rank 0 of so many processes, each of which must tell the same."""
    if name == "one":
        return losses(Single(), output, steps)
    context = multiprocessing.get_context("fork")
    store = Path(tempfile.mkdtemp()) / "store"
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    workers = [
        context.Process(target=work, args=(rank, world, store, pipes[rank][1], name, output, steps))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    until, found = time.monotonic() + SECONDS, []
    for receiver, _ in pipes:
        if not receiver.poll(max(0.0, until - time.monotonic())):
            raise SystemExit(f"{name} on {world} processes hangs")
        found.append(pickle.loads(receiver.recv_bytes()))  # noqa: S301 - from this script's own children
        if isinstance(found[-1], str):
            raise SystemExit(found[-1])
    for worker in workers:
        worker.join()
    assert all(one == found[0] for one in found), "ranks tell different losses"
    return list(found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--most", type=int, default=4, help="processes")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), help="of the first table")
    parser.add_argument("--states", nargs="*", default=["fsdp", "zero2", "zero3"], help="engines of the other tables")
    given = parser.parse_args()
    if not find_spec("deepspeed"):
        without = [name for name in {*given.engines, *given.states} if name.startswith("zero")]
        print(f"left out, as DeepSpeed is not installed: {', '.join(sorted(without)) or 'nothing'}\n")
        for names in (given.engines, given.states):
            names[:] = [name for name in names if name not in without]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="distributed-"))
    told = run("one", 1, folder / "one", given.steps)
    print(f"one process: losses {told[0]:.6f} .. {told[-1]:.6f}\n")
    print(f"| engine | processes | worst loss difference over {given.steps} steps |\n|---|---|---|", flush=True)
    for name in given.engines:
        for world in range(2, given.most + 1):
            if world % 2 and "2" in name.partition(", ")[2]:
                continue
            found = run(name, world, folder / f"{name}-{world}", given.steps)
            worst = max(abs(one - other) for one, other in zip(told, found, strict=True))
            print(f"| {name} | {world} | {worst:.1e} |", flush=True)
    print("\nstates written after 2 steps and read at another world size: difference of the third loss")
    worlds = list(range(1, given.most + 1))
    three = run("one", 1, folder / "three", 3)
    for name in given.states:
        print(f"\n| {name}: saved on | " + " | ".join(f"read on {world}" for world in worlds) + " |")
        print("|---" * (len(worlds) + 1) + "|")
        for saved in worlds:
            cells = []
            for world in worlds:
                output = folder / f"{name}-{saved}-{world}"
                run(name if saved > 1 else "one", saved, output, 2)
                (last,) = run(name if world > 1 else "one", world, output, 3)
                cells.append(f"{abs(last - three[2]):.1e}")
            print(f"| {saved} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
