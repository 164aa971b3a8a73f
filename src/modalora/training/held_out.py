"""Rows that are never trained on, scored while a run trains: by their loss people see whether it learns or memorises.

Scoring changes nothing of the training: no gradient, no dropout, and every random generator is set back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from modalora.config import RunConfig
from modalora.contracts import Batch, Batches
from modalora.data.mixture import Mixture
from modalora.data.reader import check_apart
from modalora.data.sources import SCORED, Context
from modalora.errors import TrainingError
from modalora.models.multimodal import Multimodal, start_training
from modalora.parallel.engine import Engine
from modalora.training.log import asked_of, under
from modalora.training.objectives import Losses, Objective
from modalora.training.randomness import random_state, set_random_state
from modalora.training.signals import Stop
from modalora.training.start import open_quarantine


def open_held_out(run: RunConfig, context: Context, share: tuple[int, int] = (0, 1)) -> Mixture | None:
    """Return the rows that a run scores, each once and then no more; None where it scores none.

    share: which share of them, of how many; each process has one micro-batch at a time. Raises ConfigError, DataError.
    """
    if not run.scored:
        return None
    check_apart(run.mixture, run.scored)
    rank, world = share
    return Mixture(
        context, run.scored, rows=run.rows, tokens=run.tokens, accumulate=world, seed=SCORED, rank=rank, world=world,
        quarantine=open_quarantine(run, "quarantine-scored", rank), scored=run.eval_rows,
    )  # fmt: skip


class HeldOut:
    """Scores rows that are set back to the first before each time. Its methods are called by all ranks."""

    def __init__(
        self, run: RunConfig, batches: Batches, model: Multimodal, objective: Objective, engine: Engine
    ) -> None:
        """batches: the rows, until there are no more."""
        self.run, self.batches, self.model, self.objective, self.engine = run, batches, model, objective, engine
        self.first = dict(batches.state())
        self.scored = -1  # the step that was scored last

    def is_due(self, step: int, *, last: bool) -> bool:
        """Tell whether rows are to be scored behind a step, and were not yet."""
        return self.scored != step and (last or step % (self.run.eval_every or self.run.save_every) == 0)

    def score(
        self, losses: Callable[[Batch], Losses], take: Callable[[Batches], list[Batch]], stop: Stop, step: int
    ) -> tuple[int, dict[str, float]]:
        """Return the signal that broke the scoring off, or 0, and mean losses: of all labels, and of several sources.

        losses: what the objective makes of a batch. take: the next micro-batches of the rows. Raises TrainingError when
        there is no label.
        """
        found: dict[str, float] = defaultdict(float)
        self.batches.restore(self.first)
        with _undisturbed(self.model):
            while micro := take(self.batches):
                whole: dict[str, float] = {"labels": sum(self.objective.count(batch) for batch in micro)}
                if stop.asked:
                    whole[f"asked {stop.asked}"] = 1
                told = self.engine.totals(whole)
                if asked := asked_of(told):
                    return asked, {}
                if told["labels"]:  # else all rows were bad
                    for key, value in self._sums(micro, losses).items():
                        found[key] += value
        names = under("count ", found)
        labels = sum(found[f"count {name}"] for name in names)
        if not labels:
            raise TrainingError(
                "the held-out rows have no label to score; `modalora data check` tells why, or leave eval_mixture out"
            )
        self.scored = step
        means = {f"eval_loss/{name}": found[f"sum {name}"] / found[f"count {name}"] for name in names}
        mean = sum(found[f"sum {name}"] for name in names) / labels
        return 0, {"eval_loss": mean, **(means if len(names) > 1 else {})}

    def _sums(self, micro: list[Batch], losses: Callable[[Batch], Losses]) -> dict[str, float]:
        """Return the sum and the number of the losses by source, over all ranks."""
        own: dict[str, float] = defaultdict(float)
        for batch in self.engine.level(micro):
            sums, counts = losses(batch).by_row(len(batch.lengths)).tolist()
            for row, count in enumerate(counts):
                if count:
                    name = batch.samples[row].rpartition(":")[0] if batch.samples else ""
                    own[f"sum {name}"] += sums[row]
                    own[f"count {name}"] += count
        return self.engine.totals({}, own)


@contextmanager
def _undisturbed(model: Multimodal) -> Iterator[None]:
    """Run a model as it will be used, and leave what training goes on with."""
    randomness, training = random_state(), model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            start_training(model)
        set_random_state(randomness)
