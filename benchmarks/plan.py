"""How near does `modalora plan` come to the memory and the time that a step takes?

Six runs, each in two processes of its own through the real training loop. Memory: the most that the process held beyond
what it held before the model was made (resident, as the system counts it), beside what the plan said without
allocating; freed memory goes back at once. Time: the quickest of the steps, buffers kept, beside what `estimate` says
of this machine's rates, measured before and after.

    python benchmarks/plan.py [memory|time NAME]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from modalora.config import RunConfig, parse
from modalora.models.multimodal import ModelConfig, Multimodal, recompute
from modalora.models.sizes import nano, phi4_multimodal
from modalora.nn.lora import LoraConfig
from modalora.training.estimate import estimate
from modalora.training.loop import train
from modalora.training.optimizer import freeze
from modalora.training.plan import plan_step, shaped_batch
from timing import peak, where

LAUNCH = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back at once, so that the system counts what is in use
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
TIMED = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",  # as `make nano` runs: what is freed is kept
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Case:
    """One run: a model, its dtype, settings, and the shapes of its rows."""

    config: Callable[[], ModelConfig]
    dtype: torch.dtype
    settings: dict[str, Any]
    shapes: list[str]
    route: str = "auto"


def wide() -> ModelConfig:
    """Four layers of Phi-4-Mini's width with one adapter."""
    decoder = replace(phi4_multimodal().decoder, num_hidden_layers=4)
    return ModelConfig(decoder=decoder, adapters={"vision": LoraConfig(r=320, lora_alpha=640)})


def seeing() -> ModelConfig:
    """A third of the picture tower at full width before a small decoder that reads a whole picture."""
    full, small = phi4_multimodal(), nano()
    decoder = replace(small.decoder, rope=replace(small.decoder.rope, window=4096))
    return replace(small, decoder=decoder, vision=replace(full.vision, num_hidden_layers=9), speech=None, adapters={
        "vision": LoraConfig(r=32, lora_alpha=64)})  # fmt: skip


def hearing() -> ModelConfig:
    """A third of the sound encoder at full width before a small decoder."""
    full = phi4_multimodal()
    return replace(nano(), vision=None, speech=replace(full.speech, num_blocks=8), adapters={
        "speech": LoraConfig(r=32, lora_alpha=64)})  # fmt: skip


SINGLE, HALF = torch.float32, torch.bfloat16
CASES = {
    "text, nano, all of the decoder": Case(nano, SINGLE, {"train": ["decoder"], "rows": 32}, ["text=256"]),
    "mixed rows, nano, adapters": Case(
        nano, SINGLE, {"train": ["adapter.*"], "rows": 12},
        ["text=150,image=400x100", "text=120,audio=4", "text=300", "text=80,image=300x300,audio=3"],
    ),
    "text, width 3072, rank 320": Case(wide, HALF, {"train": ["adapter.*"], "rows": 1}, ["text=1024"], "vision"),
    "the same, recomputed": Case(
        wide, HALF, {"train": ["adapter.*"], "rows": 1, "recompute": True}, ["text=2048"], "vision"
    ),
    "picture of 1344 x 1344, encoder": Case(
        seeing, SINGLE, {"train": ["image.*", "adapter.vision"], "rows": 1}, ["text=64,image=1344x1344"]
    ),
    "sound of 30 s, encoder": Case(
        hearing, SINGLE, {"train": ["audio.encoder", "audio.projector.speech"], "rows": 2}, ["text=64,audio=30"]
    ),
}  # fmt: skip


class Same:
    """The same micro-batch at every step."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def take(self) -> list[Any]:
        return [self.batch]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        del state


def measure(what: str, name: str) -> dict[str, float]:
    case = CASES[name]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fields = {
            "init": "x", "output": folder, "mixture": [{"source": "books"}], "steps": 3, "save_every": 1000,
            "log_every": 1, "optim": {"warmup_steps": 0}, **case.settings,
        }  # fmt: skip
        run = parse(RunConfig, fields, name)
        config = case.config()
        batch = shaped_batch(config, case.shapes, run.rows, routes=[case.route])
        plan = plan_step(config, run, [batch], case.dtype)
        torch.ones(64, 64) @ torch.ones(64, 64)
        torch.optim.AdamW([torch.zeros(1)])  # imports what it needs
        told = [estimate(plan, run, "this", 1, 1.0, 0).step_seconds] if what == "time" else []
        rates: list[float] = []
        with peak() as seen:
            torch.manual_seed(0)
            model = build(config, case.dtype)
            for parameter in freeze(model, run.train).values():
                parameter.data = parameter.data.float()
            if run.recompute:
                recompute(model)
            train(run, model, Same(batch), lambda metrics: rates.append(metrics["tokens_per_second"]))
        if what == "memory":
            return {"plan": plan.peak, "seen": seen.bytes}
        told.append(estimate(plan, run, "this", 1, 1.0, 0).step_seconds)
        return {"plan": sum(told) / 2, "seen": plan.tokens / max(rates)}


def build(config: ModelConfig, dtype: torch.dtype) -> Multimodal:
    """Make the weights in their dtype at once, so that nothing passes through a larger copy."""
    torch.set_default_dtype(dtype)
    model = Multimodal(config)
    torch.set_default_dtype(torch.float32)
    return model


def main() -> None:
    if len(sys.argv) > 2:
        print(json.dumps(measure(*sys.argv[1:3])))
        return
    print(where())
    for what, unit, size in (("memory", "MB", 1e6), ("time", "s", 1)):
        print(f"\n| run | plan {unit} | seen {unit} | plan / seen |\n|---|---|---|---|", flush=True)
        for name in CASES:
            command = [sys.executable, __file__, what, name]
            settings = os.environ | (LAUNCH if what == "memory" else TIMED)
            done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            told, seen = (json.loads(done.stdout.splitlines()[-1])[key] / size for key in ("plan", "seen"))
            digits = ",.0f" if what == "memory" else ".2f"
            print(f"| {name} | {told:{digits}} | {seen:{digits}} | {told / seen:.3f} |", flush=True)


if __name__ == "__main__":
    main()
