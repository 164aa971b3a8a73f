"""What a run tells of itself: lines of metrics, events and samples, on disk, to trackers and to its caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from modalora.config import RunConfig
from modalora.disk import Journal
from modalora.parallel.engine import Engine
from modalora.training.machines import resident
from modalora.training.states import Progress
from modalora.training.trackers import open_trackers


class Log:
    """The journals of a run; of many processes the first one writes and tells, and each has a ledger of its own.

    metrics: what was told of the last logged step, its scores included. events, ledger: steps that were not finite, and
    the samples of every step.
    """

    def __init__(
        self, run: RunConfig, engine: Engine, report: Callable[[dict[str, Any]], None], stack: ExitStack, step: int
    ) -> None:
        """report: told the metrics, too. step: that the run goes on from; lines behind it are taken away."""
        self.run, self._report = run, report
        folder, first = Path(run.output), engine.rank == 0
        lines = step or -1  # a run that begins anew scores anew
        self._journal = stack.enter_context(Journal(folder / "metrics.jsonl", lines)) if first else None
        self.events = stack.enter_context(Journal(folder / "events.jsonl", step)) if first else None
        own = "ledger.jsonl" if engine.world == 1 else f"ledger-{engine.rank:05d}.jsonl"
        self.ledger = stack.enter_context(Journal(folder / own, step)) if run.ledger else None
        self._track = open_trackers(run, stack) if first else []
        self.metrics: dict[str, Any] = self._journal.last if self._journal else {}

    def has_scores(self, step: int) -> bool:
        """Tell whether scores behind a step were the last that was told."""
        return self.metrics.get("step") == step and any(name.startswith("eval_loss") for name in self.metrics)

    def tell(self, progress: Progress, rate: float, seconds_per_step: float) -> None:
        """Tell the means since the last logged step: over steps; losses of some rows, over all their labels.

        rate: of the step. seconds_per_step: from which follows how long the run will take.
        """
        run = self.run
        sums = {name: progress.recent.pop(name, [0.0, 0])[0] for name in ("seconds", "tokens", "labels", "flops")}
        means = {name: total / count for name, (total, count) in _told(progress.recent).items()}
        progress.recent.clear()
        self.metrics = {
            "step": progress.step,
            "steps": run.steps,
            **means,
            "lr": rate,
            "tokens_per_second": round(sums["tokens"] / sums["seconds"]),
            "labels_per_second": round(sums["labels"] / sums["seconds"]),
            "remaining_seconds": round(seconds_per_step * (run.steps - progress.step)),
            **({"mfu": sums["flops"] / sums["seconds"] / (run.peak_tflops * 1e12)} if run.peak_tflops else {}),
            **memory(torch.device(run.device)),
            **({"skipped": progress.skipped} if progress.skipped else {}),
        }
        self._write(self.metrics)

    def tell_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Tell the scores behind a step."""
        line = {"step": step, "steps": self.run.steps, **scores}
        self._write(line)
        self.metrics = {**(self.metrics if self.metrics.get("step") == step else {}), **line}

    def sync(self) -> None:
        """Wait until every line is on the disk, so that no saved state is ahead of them. Raises TrainingError."""
        for journal in (self._journal, self.events, self.ledger):
            if journal:
                journal.sync()

    def _write(self, metrics: dict[str, Any]) -> None:
        if self._journal:
            self._journal.write(metrics)
        for track in self._track:
            track(metrics)
        self._report(metrics)


def memory(device: torch.device) -> dict[str, int]:
    """Return the most memory held so far, in MB: of the process, and on a GPU."""
    found = {"memory_mb": resident() // 2**20}
    if device.type == "cuda":
        found["gpu_memory_mb"] = torch.cuda.max_memory_allocated(device) // 2**20
    return found


def under(prefix: str, found: Mapping[str, Any]) -> list[str]:
    """Return the names that follow a prefix, sorted."""
    return sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix))


def asked_of(found: Mapping[str, Any]) -> int:
    """Return the largest number N of the names "asked N", a signal that a rank told of, or 0."""
    return max((int(number) for number in under("asked ", found)), default=0)


def _told(recent: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Return noted figures by the names that they are told by, without those that say the same as another."""
    routes, media = ({name: recent[f"{of} {name}"] for name in under(f"{of} ", recent)} for of in ("route", "media"))
    return {
        **{name: own for name, own in recent.items() if not name.startswith(("route ", "media "))},
        **{f"loss_{name}": own for name, own in routes.items() if len(routes) > 1},
        **{f"loss_of_{kinds}": own for kinds, own in media.items() if own not in routes.values()},
    }
