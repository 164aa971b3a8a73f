"""The training loop: micro-batches to one update, with metrics, a loss curve, checkpoints and exact resume.

Every label of a step counts alike, over micro-batches and processes: the loss is the sum of all single losses over
their number. A state holds all that the next step depends on, so a resumed run repeats, bit for bit, what an
uninterrupted one would have done.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from modalora.checkpoint.preserve import differences, preservation
from modalora.checkpoint.resume import locked
from modalora.config import RunConfig, dump
from modalora.contracts import BLANK, Batch, Batches
from modalora.disk import write_json
from modalora.errors import InputError, ShapeError, TrainingError
from modalora.models.multimodal import Multimodal, start_training
from modalora.nn.products import wide_products
from modalora.parallel.engine import Engine, Single
from modalora.parallel.stops import tell_stopped, tell_training
from modalora.training.audit import Audit, check_preserved, check_settings, check_trained, parts_reached
from modalora.training.dropout import add_dropout
from modalora.training.flops import StepFlops
from modalora.training.held_out import HeldOut
from modalora.training.log import Log, asked_of, under
from modalora.training.nonfinite import Fault, guilty_rows, not_finite, row_name
from modalora.training.objectives import OBJECTIVES, Ctc, Losses, trained_part
from modalora.training.optimizer import Optimizer, freeze
from modalora.training.randomness import seed_all, seed_dropout
from modalora.training.report import what_trains
from modalora.training.rows import TABLES, check_spans, rope_tables, row_kinds, row_tables
from modalora.training.signals import Asked, Interrupted, Stop
from modalora.training.start import digest_of_start
from modalora.training.states import Moment, States

STOPPED_AT_ONCE = "stopped before the first step; nothing is lost"
Metrics = dict[str, Any]
Say = Callable[[str], None]


def train(
    run: RunConfig,
    model: Multimodal,
    batches: Batches,
    report: Callable[[Metrics], None] = lambda metrics: None,
    *,
    engine: Engine | None = None,
    say: Say = lambda line: None,
    said: Tensor | None = None,
    held_out: Batches | None = None,
) -> Metrics:
    """Train the parts that `run` names and return the last metrics; the model is changed in place.

    report: called with the metrics of every logged step. engine: the processes that train together, by default this
    one alone. say: told in words what a user should know. said: how often answers hold each token, from which CTC
    starts. held_out: rows that are scored every run.eval_every steps, from the first to the last of them. Resumes from
    run.output/resume when it holds a state.

    Raises ConfigError for settings under which nothing is learnt; TrainingError when a loss or gradient is not finite,
    when something does not learn that should or moves that should not, or when the disk is full; Interrupted when
    stopped by SIGINT or SIGTERM. Behind the first step all leave a state that training can go on from.
    """
    check_settings(run)
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        stack.enter_context(wide_products())
        try:
            with stop.breaking():
                loop = _Loop(run, model, batches, engine or Single(), report, say, stop, stack, said, held_out)
        except Asked:
            raise Interrupted(STOPPED_AT_ONCE, stop.asked) from None
        tell_training()
        loop.run_all()
        tell_stopped()
    return loop.log.metrics


@dataclass(frozen=True)
class _Outcome:
    """What the micro-batches of a step came to, over all ranks.

    by_route, by_media: sum and number of its losses, by adapter and by what rows hold. by_table: the same, and the
    tokens, of the rows that use a rotary table.
    """

    loss: float
    labels: float
    tokens: float
    by_route: dict[str, tuple[float, float]]
    by_media: dict[str, tuple[float, float]]
    by_table: dict[str, tuple[float, float, float]]
    reached: set[str]
    bad_rows: tuple[str, ...]
    asked: int


@dataclass(frozen=True)
class _Norms:
    """Gradient norms of a step: of all on the device, the same as a number, and of each part."""

    whole: Tensor
    norm: float
    parts: dict[str, float]


class _Loop:
    def __init__(
        self,
        run: RunConfig,
        model: Multimodal,
        batches: Batches,
        engine: Engine,
        report: Callable[[Metrics], None],
        say: Say,
        stop: Stop,
        stack: ExitStack,
        said: Tensor | None,
        held_out: Batches | None,
    ) -> None:
        self.run, self.model, self.batches, self.engine = run, model, batches, engine
        self.say, self.stop = say, stop
        folder = Path(run.output)
        if engine.rank == 0:
            stack.enter_context(locked(folder))
        engine.barrier()
        if run.threads:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(run.threads)
        seed_all(run.seed)
        self.objective = OBJECTIVES[run.objective](model)  # its head begins alike on every rank
        if said is not None and isinstance(self.objective, Ctc):
            self.objective.start_from(said)
        declared = freeze(model, run.train)
        check_preserved(model, run)
        for handle in add_dropout(model, run.dropout):
            stack.callback(handle.remove)
        self.preserved = preservation(model, declared)
        engine.shard(model, self.objective)
        self.trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
        check_trained(declared, self.trained, run)
        self.trained |= {f"objective.{name}": own for name, own in self.objective.named_parameters()}
        self.parts: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter in self.trained.items():
            self.parts[trained_part(name)][name] = parameter
        self.optimizer = Optimizer(self.trained, run.optim, run.steps)
        self.flops = StepFlops(model, self.parts, decodes=run.objective == "next_token") if run.peak_tflops else None
        for line in what_trains(model, self.trained, self.optimizer):
            say(line)
        self.states = States(
            run, engine, self.trained, self.optimizer, self.preserved.fingerprint, digest_of_start(run)
        )
        stack.callback(self.states.finish)
        self.progress = self.states.resume(batches, say)
        engine.wrap(self.optimizer)
        self.saved = self.progress.step  # 0: nothing was learnt that a state would keep
        seen = self.progress
        self.audit = Audit(model, self.trained, self.objective.idle, engine, say, seen.judged, seen.rows)
        step = self.progress.step
        self.log = Log(run, engine, report, stack, step)
        self.held_out = None if held_out is None else HeldOut(run, held_out, model, self.objective, engine)
        if self.held_out and engine.totals({"scored": float(self.log.has_scores(step))})["scored"]:
            self.held_out.scored = step
        if engine.rank == 0:
            (folder / "run.yaml").write_text(dump(run), encoding="utf-8")
            if tables := rope_tables(model):
                write_json(folder / "rope.json", tables)

    def run_all(self) -> None:
        run, progress = self.run, self.progress
        start_training(self.model)
        first, started = progress.step, time.perf_counter()
        since = started
        moment = Moment.now(self.batches)
        while progress.step < run.steps:
            since += self._score(moment)
            asked, micro, outcome = self._try(moment)
            if outcome is None:  # the step was broken off, as if it had not begun, or there are no data for it
                self.engine.clear(self.trained)
                if not asked:
                    self._end_early(moment)
                    break
            else:
                norms = self._norms()
                fault = self._fault(micro, outcome, norms.norm)
                if fault:
                    self._refuse(fault, moment)
                else:
                    self._update(outcome, norms)
                    if self.flops:  # of this process, where several have the same rows
                        part = self.engine.share[1] / self.engine.world
                        progress.note({"flops": self.flops.of(micro) * part})
                progress.step += 1
                if self.log.ledger:
                    told = [name for batch in micro for name in batch.samples]
                    tables = [table for batch in micro for table in row_tables(self.model, batch)]
                    self.log.ledger.write(
                        {"step": progress.step, "samples": told}
                        | ({"tables": tables} if tables else {})
                        | ({"skipped": True} if fault else {})
                    )
                now = time.perf_counter()
                progress.note({"seconds": now - since})
                since = now
                if progress.step % run.log_every == 0 or progress.step == run.steps:
                    self.log.tell(
                        progress,
                        self.optimizer.rate(progress.step - 1),
                        (now - started) / (progress.step - first),
                    )
                moment = Moment.now(self.batches)
            if progress.step % run.save_every == 0 or progress.step == run.steps:
                self._save(moment)
            if self.engine.world == 1:
                asked = self.stop.asked  # not only while the gradients were made
            if asked and progress.step < run.steps:
                self._break_off(moment, asked)
        self._score(moment, last=True)
        self.audit.finish(progress.step)
        self._check_preserved()
        self.model.eval()

    def _score(self, moment: Moment, *, last: bool = False) -> float:
        """Score the held-out rows if they are due; return the seconds that it took.

        Comes behind the state of a step, so that a run which is stopped meanwhile scores once it goes on. Raises
        Interrupted when it is.
        """
        begun, step, asked = time.perf_counter(), self.progress.step, 0
        if self.held_out is None or not self.held_out.is_due(step, last=last):
            return 0.0
        try:
            with self.stop.breaking(self.engine.world == 1):
                take = partial(self._take, moment)
                asked, scores = self.held_out.score(self._forward, take, self.stop, step)
        except Asked:
            asked = self.stop.asked
        if asked:
            self._break_off(moment, asked)
        if wrong := [name for name, value in scores.items() if not isfinite(value)]:
            self.say(f"behind step {step}, of the rows that are not trained on: {', '.join(wrong)} is not finite")
        if told := {name: own for name, own in scores.items() if name not in wrong}:
            self.log.tell_scores(step, told)
        return time.perf_counter() - begun

    def _break_off(self, moment: Moment, asked: int) -> NoReturn:
        """Save and end, as a signal asked for."""
        if not self.progress.step:
            raise Interrupted(STOPPED_AT_ONCE, asked)
        self._save(moment)
        raise Interrupted(f"stopped after step {self.progress.step}; the same command goes on from there", asked)

    def _try(self, moment: Moment) -> tuple[int, list[Batch], _Outcome | None]:
        """Return the signal that came, the micro-batches of a step and what they came to: None, if it was not made."""
        try:
            with self.stop.breaking(self.engine.world == 1):  # one rank alone must not leave the others waiting
                micro = self._take(moment, self.batches)
                outcome = self._gradients(micro) if micro else None
        except Asked:
            return self.stop.asked, [], None
        return outcome.asked if outcome else 0, micro, outcome

    def _take(self, moment: Moment, batches: Batches) -> list[Batch]:
        """Return the micro-batches of a step; where the data are at fault, what was learnt before is saved."""
        try:
            return batches.take()
        except (InputError, TrainingError):
            self.stop.breakable = False
            if self.engine.world == 1 and self.progress.step:  # others would wait for a state that they do not write
                self._save(moment)
            raise

    def _end_early(self, moment: Moment) -> None:
        """End a run whose data have ended before its steps have. Raises TrainingError when there never were any."""
        if not self.progress.step:
            raise TrainingError("the data hold no row to train on; `modalora data check` tells why")
        if self.progress.recent:
            self.log.tell(self.progress, self.optimizer.rate(self.progress.step - 1), seconds_per_step=0)
        self.say(f"the data have ended after step {self.progress.step} of {self.run.steps}")
        self._save(moment)

    def _losses(self, batch: Batch, labels: float, number: int, last: bool) -> Losses:
        """Add the gradients of a micro-batch of a step with so many labels; return its losses.

        number: of this process's micro-batches, from 0. last: whether it is the last of them.
        """
        # dropout follows from the micro-batch, whichever process has it
        first, shares = self.engine.share
        seed_dropout(self.run.seed, self.progress.step, first + number * shares)
        losses = self._forward(batch)
        self.engine.backward(losses.values.sum() / labels, last=last)
        return losses

    def _forward(self, batch: Batch) -> Losses:
        device = torch.device(self.run.device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
            losses: Losses = self.engine.losses(batch.to(device))
        return losses

    def _gradients(self, micro: list[Batch]) -> _Outcome:
        blanks = sum(set(batch.samples) == {BLANK} for batch in micro)
        count = sum(self.objective.count(batch) for batch in micro)
        totals = self.engine.totals({"labels": count, "blanks": blanks})
        labels = totals["labels"]
        if not labels and totals["blanks"]:
            labels = 1.0  # the rows were bad, and blank ones without a label stand in
        elif not labels:
            raise TrainingError(
                f"step {self.progress.step + 1} has no labelled token; the mixture's conversations need an assistant's "
                "turn, and it must not be masked"
            )
        found: dict[str, float] = defaultdict(float)  # of whole micro-batches
        own: dict[str, float] = defaultdict(float)  # of the losses that this process has of them
        for number, batch in enumerate(micro):
            check_spans(batch, number)
        levelled = self.engine.level(micro)
        told: list[Tensor] = []  # asked for once all gradients are on their way
        for number, batch in enumerate(levelled):
            try:
                losses = self._losses(batch, labels, number, last=number + 1 == len(levelled))
            except ShapeError as error:
                rows = ", ".join(row_name(batch, number, row) for row in range(len(batch.lengths)))
                raise ShapeError(
                    f"step {self.progress.step + 1}, one of the rows {rows:.300}: {error}"
                ) from error.__cause__
            told.append(losses.by_row(len(batch.lengths)))
        for number, (batch, shares) in enumerate(zip(levelled, told, strict=True)):
            self._note(batch, number, shares, found, own)
        if self.stop.asked:
            found[f"asked {self.stop.asked}"] = 1
        found = self.engine.totals(found, own)

        def sums(of: str) -> dict[str, tuple[float, float]]:
            return {name: (found[f"{of}sum {name}"], found[f"{of}count {name}"]) for name in under(f"{of}sum ", found)}

        by_route = sums("")
        return _Outcome(
            loss=sum(total for total, _ in by_route.values()),
            labels=labels,
            tokens=found["tokens"],
            by_route=by_route,
            by_media=sums("media "),
            by_table={
                name: (found[f"table sum {name}"], found[f"table count {name}"], tokens)
                for name in under("table tokens ", found)
                if (tokens := found[f"table tokens {name}"])
            },
            reached=set(under("part ", found)),
            bad_rows=tuple(under("bad ", found)),
            asked=asked_of(found),
        )

    def _note(self, batch: Batch, number: int, shares: Tensor, found: dict[str, float], own: dict[str, float]) -> None:
        """Add a micro-batch of a step to the figures of whole ones and to those of this process's losses.

        shares: the sum and the number of the losses of each row, (2, rows).
        """
        sums, counts = shares.tolist()
        found["tokens"] += int(batch.lengths.sum())
        for row, table in enumerate(row_tables(self.model, batch)):
            own[f"table sum {table}"] += sums[row]
            own[f"table count {table}"] += counts[row]
            found[f"table tokens {table}"] += int(batch.lengths[row])
        kinds = row_kinds(self.model, batch)
        for row, adapter in enumerate(batch.route.adapters):
            if counts[row]:
                own[f"sum {adapter or 'text'}"] += sums[row]
                own[f"count {adapter or 'text'}"] += counts[row]
                own[f"media sum {kinds[row]}"] += sums[row]
                own[f"media count {kinds[row]}"] += counts[row]
            if not isfinite(sums[row]):
                own[f"bad {row_name(batch, number, row)}"] += 1
        if self.audit.watches:
            for part in parts_reached(batch, [row for row, count in enumerate(counts) if count]):
                own[f"part {part}"] += 1

    def _norms(self) -> _Norms:
        found = torch.stack([self.engine.norm(own) for own in self.parts.values()])
        whole = torch.linalg.vector_norm(found)
        norm, *norms = torch.cat((whole[None], found)).tolist()
        return _Norms(whole, norm, dict(zip(self.parts, norms, strict=True)))

    def _fault(self, micro: list[Batch], outcome: _Outcome, norm: float) -> Fault | None:
        """Return what is wrong with a step's loss or gradient, if it is not finite."""
        if isfinite(outcome.loss) and isfinite(norm):
            return None
        weights = self._not_finite(self.model.state_dict(keep_vars=True), self.engine.local)
        gradients = self._not_finite(self.trained, self.engine.gradient)
        rows = outcome.bad_rows or None
        if not rows and self.engine.world == 1:
            rows = guilty_rows(micro, self.trained, lambda batch: self._again(batch, outcome.labels))
        what, value = ("gradient", norm) if isfinite(outcome.loss) else ("loss", outcome.loss)
        return Fault(what, value, weights, gradients, rows)

    def _not_finite(self, held: Mapping[str, Any], numbers: Callable[[Any], Tensor | None]) -> tuple[str, ...]:
        """Return the names of those of which any process has a NaN or an infinity."""
        own = not_finite((name, numbers(tensor)) for name, tensor in held.items())
        anywhere = self.engine.totals(dict.fromkeys(own, 1.0))
        return tuple(name for name in held if name in anywhere)

    def _again(self, batch: Batch, labels: float) -> None:
        if self.objective.count(batch):
            self._losses(batch, labels, 0, last=True)

    def _refuse(self, fault: Fault, moment: Moment) -> None:
        """Leave the weights as they are; stop, or count the step as skipped."""
        run, progress = self.run, self.progress
        self.engine.clear(self.trained)
        told = f"step {progress.step + 1}: {fault}; weights are as before it"
        skips = run.nonfinite == "skip" and progress.skipped_in_row + 1 < run.nonfinite_most
        if self.log.events:
            event = {"step": progress.step + 1, "event": "skipped" if skips else "stopped", "what": fault.what}
            lists = {"weights": fault.weights[:8], "gradients": fault.gradients[:8], "rows": fault.rows or ()}
            self.log.events.write({**event, **{key: list(names) for key, names in lists.items()}})
        if skips:
            progress.skipped += 1
            progress.skipped_in_row += 1
            self.say(f"{told}; it is skipped")
            return
        self._save(moment)
        if run.nonfinite == "skip":
            raise TrainingError(
                f"{told}; {run.nonfinite_most} steps in a row were so, and nonfinite_most allows no more"
            )
        ways = "lower optim.lr or mend the data"  # ZeRO drops no step
        if run.engine == "fsdp":
            ways = "lower optim.lr, mend the data, or go on with nonfinite=skip"
        raise TrainingError(f"{told}; {ways}")

    def _update(self, outcome: _Outcome, norms: _Norms) -> None:
        """Change the weights, and note the figures of the step."""
        run, progress = self.run, self.progress
        watching = self.audit.watches
        if watching:
            self.audit.before(outcome.reached)
        self.engine.clip(self.trained, norms.whole, run.optim.clip_norm)
        self.optimizer.set_rate(progress.step)
        self.engine.step()
        if watching:
            self.audit.after(warming=progress.step + 1 < run.optim.warmup_steps)
            progress.judged, progress.rows = self.audit.judged, dict(self.audit.rows)
        progress.skipped_in_row = 0
        progress.tokens += int(outcome.tokens)
        by_part = {f"grad_norm_{part}": own for part, own in norms.parts.items()}
        figures = {"loss": outcome.loss / outcome.labels, "grad_norm": norms.norm}
        progress.add({f"route {name}": own for name, own in outcome.by_route.items()})
        progress.add({f"media {kinds}": own for kinds, own in outcome.by_media.items()})
        if self.model.config.decoder.rope.switch is not None:
            progress.add({f"loss_{table}_rows": own[:2] for table, own in outcome.by_table.items() if own[1]})
            figures |= {f"tokens_{table}_rows": outcome.by_table.get(table, (0, 0, 0))[2] for table in TABLES}
        figures |= by_part if len(by_part) > 1 else {}
        progress.note({**figures, "tokens": outcome.tokens, "labels": outcome.labels})

    def _save(self, moment: Moment) -> None:
        if self.saved == self.progress.step:
            return
        self.log.sync()
        self.states.save(self.progress, moment)
        self.saved = self.progress.step

    def _check_preserved(self) -> None:
        """Compare everything frozen with what it was at the start. Raises TrainingError naming what moved."""
        whole = self.engine.whole()
        moved = differences(self.preserved, preservation(whole, self.trained)) if whole else []
        if moved:
            raise TrainingError(f"what is frozen has moved while training: {'; '.join(moved[:4])}; the run is no good")
