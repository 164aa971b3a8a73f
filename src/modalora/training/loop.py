"""The training loop: micro-batches to one update, with metrics, a loss curve, checkpoints and exact resume.

Everything random comes from (seed, step), so a resumed run repeats what an uninterrupted one would have done.
"""

from __future__ import annotations

import json
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from modalora.checkpoint.resume import load_state, save_state
from modalora.config import RunConfig, dump
from modalora.contracts import IGNORED, Batch, Batches
from modalora.errors import ConfigError, TrainingError
from modalora.models.multimodal import Multimodal
from modalora.training.objectives import OBJECTIVES, Losses
from modalora.training.optimizer import Optimizer, freeze
from modalora.training.report import plot_losses

Metrics = dict[str, Any]


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state."""


def train(
    run: RunConfig,
    model: Multimodal,
    batches: Batches,
    report: Callable[[Metrics], None] = lambda metrics: None,
) -> Metrics:
    """Train the parts that `run` names and return the last metrics; the model is changed in place.

    batches: the micro-batches of each step in turn. report: called with the metrics of every logged step.
    Resumes from run.output/resume when it holds a state. Raises TrainingError when the loss is not finite,
    Interrupted when stopped by SIGINT or SIGTERM; both leave a state that training can go on from.
    """
    folder = Path(run.output)
    folder.mkdir(parents=True, exist_ok=True)
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    objective = OBJECTIVES[run.objective](model)
    trained = freeze(model, run.train)
    trained |= {f"objective.{name}": parameter for name, parameter in objective.named_parameters()}
    optimizer = Optimizer(trained, run.optim, run.steps)
    first = _resume(run, folder, trained, optimizer, batches)
    (folder / "run.yaml").write_text(dump(run), encoding="utf-8")
    model.train()
    metrics: Metrics = {}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log, _stoppable() as stop:
        started, seen = time.perf_counter(), 0
        recent: dict[str, list[float]] = defaultdict(list)  # since the last logged step: one step's loss says little
        for step in range(first, run.steps):
            torch.manual_seed(hash((run.seed, step)) & 0x7FFFFFFF)  # dropout
            micro = batches.take()
            if not micro:  # the data have ended before the steps have
                break
            for name, value in _step(run, model, objective, trained, optimizer, micro, step).items():
                recent[name].append(value)
            seen += sum(int(batch.lengths.sum()) for batch in micro)
            done = step + 1
            if done % run.log_every == 0 or done == run.steps:
                spent = time.perf_counter() - started
                rate = seen / spent
                metrics = {
                    "step": done,
                    "steps": run.steps,
                    **{name: round(sum(values) / len(values), 4) for name, values in recent.items()},
                    "lr": optimizer.rate(step),
                    "tokens_per_second": round(rate),
                    "remaining_seconds": round(spent / (done - first) * (run.steps - done)),
                }
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                report(metrics)
                recent.clear()
            if done % run.save_every == 0 or done == run.steps or stop():
                state = {name: parameter.detach() for name, parameter in trained.items()} | optimizer.state()
                fields = {"run": run.model_dump(mode="json"), "data": batches.state()}
                save_state(folder, done, state, fields, run.keep)
            if stop() and done < run.steps:
                raise Interrupted(f"stopped after step {done}; the same command goes on from there")
    plot_losses(folder / "metrics.jsonl", folder / "loss.png")
    model.eval()
    return metrics


def _step(
    run: RunConfig,
    model: Multimodal,
    objective: nn.Module,
    trained: dict[str, nn.Parameter],
    optimizer: Optimizer,
    micro: list[Batch],
    step: int,
) -> dict[str, float]:
    total, count = 0.0, 0
    by_route: dict[str, list[float]] = defaultdict(list)
    targets = sum(_targets(batch) for batch in micro)
    if run.objective == "next_token" and not targets:
        raise TrainingError(
            f"step {step + 1} has no labelled token; the mixture's conversations need an assistant's turn"
        )
    for batch in micro:
        batch = batch.to(run.device)
        with torch.autocast(torch.device(run.device).type, torch.bfloat16, enabled=run.precision == "bf16"):
            losses: Losses = objective(model, batch)
        # Every target counts alike, however the step is cut into micro-batches.
        share = targets if run.objective == "next_token" else len(losses.values) * len(micro)
        mean = losses.values.sum() / share
        if mean.requires_grad:  # rows whose route reaches no trained part add nothing
            mean.backward()
        values = losses.values.detach()
        total, count = total + float(values.sum()), count + len(values)
        for row in losses.rows.unique().tolist():
            by_route[batch.route.adapters[row] or "text"].append(float(values[losses.rows == row].mean()))
    if not torch.isfinite(torch.tensor(total)):
        raise TrainingError(
            f"the loss of step {step + 1} is {total}; weights are as before it: lower optim.lr, check the data"
        )
    norm = nn.utils.clip_grad_norm_(list(trained.values()), run.optim.clip_norm)
    if not torch.isfinite(norm):
        raise TrainingError(f"the gradient of step {step + 1} is not finite; weights are as before it: lower optim.lr")
    optimizer.step(step)
    routes = {f"loss_{name}": sum(own) / len(own) for name, own in sorted(by_route.items())}
    return {"loss": total / max(1, count), **(routes if len(routes) > 1 else {}), "grad_norm": float(norm)}


def _targets(batch: Batch) -> int:
    return 0 if batch.labels is None else int((batch.labels[:, 1:] != IGNORED).sum())


def _resume(
    run: RunConfig, folder: Path, trained: dict[str, nn.Parameter], optimizer: Optimizer, batches: Batches
) -> int:
    found = load_state(folder)
    if found is None:
        return 0
    tensors, fields = found
    free = set("steps log_every save_every keep threads workers quarantine_most device output cache data".split())
    before, now = fields["run"], run.model_dump(mode="json")
    changed = sorted(key for key in now if key not in free and before.get(key) != now[key])
    if changed:
        raise ConfigError(
            f"{folder} was trained with other settings ({', '.join(changed)}); give another output, or remove {folder}"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    optimizer.load(tensors)
    batches.restore(fields["data"])
    return int(fields["step"])


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Give a question that turns true once SIGINT or SIGTERM arrived."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
