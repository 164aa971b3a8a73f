"""What a training run saves and how it goes on from it: weights, moments, random generators, place in the data.

Every file of a state says which run and step it is of, so that a part from elsewhere is noticed, and every part is
compared with what the run expects, so that a missing one is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from modalora.checkpoint.resume import STATE, begin, commit, draft_of, newest, retire, states
from modalora.config import RunConfig, parse
from modalora.contracts import Batches
from modalora.disk import read_json, write_json
from modalora.errors import CheckpointError, ConfigError, TrainingError, WorkError
from modalora.parallel.engine import Engine, Snapshot
from modalora.parallel.files import read, write_whole
from modalora.training.optimizer import Optimizer
from modalora.training.randomness import random_state, seed_all, set_random_state
from modalora.training.start import changed_data

# settings that may differ between a run and its resumption
FREE = {
    "steps", "log_every", "save_every", "keep", "threads", "device", "output", "cache", "data", "nonfinite",
    "nonfinite_most", "workers", "quarantine_most", "ledger", "trackers", "peak_tflops", "engine", "mesh", "offload",
    "patience_seconds", "save_in_background", "modality_files", "eval_mixture", "eval_every", "eval_rows",
}  # fmt: skip
_PARTS = ("run", "step", "world", "settings", "frozen", "rate", "progress", "data")


@dataclass
class Progress:
    """How far a run is, and what its next metrics need.

    recent: [sum, count] of each figure since the last logged step, as one step's loss says little; count is of steps,
    or of losses. judged, rows: what the audit has seen.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)
    judged: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)

    def note(self, figures: Mapping[str, float]) -> None:
        """Take in the figures of a step."""
        self.add({name: (value, 1) for name, value in figures.items()})

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Take in sums of a step, each with the number of what it is the sum of."""
        for name, (value, count) in sums.items():
            held = self.recent.setdefault(name, [0.0, 0])
            held[0] += value
            held[1] += count


@dataclass(frozen=True)
class Moment:
    """What a state holds besides weights, as it was between two steps."""

    randomness: dict[str, Tensor]
    data: dict[str, Any]

    @classmethod
    def now(cls, batches: Batches) -> Moment:
        """Return this moment."""
        return cls(random_state(), dict(batches.state()))


class _Errand:
    """A call that runs in a thread of its own."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self.thread = Thread(target=self._run, args=(call,), name="saving")
        self.thread.start()

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        """Wait for its end. Raises what it raised."""
        self.thread.join()
        if self.error:
            raise self.error


@dataclass(frozen=True)
class States:
    """The states of one run."""

    run: RunConfig
    engine: Engine
    trained: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    frozen: str  # fingerprint of what does not train: a state fits no other base
    start: str | None  # what tells the weights that the run started from
    begun: list[_Errand] = field(default_factory=list)  # the state that is being written in the background

    @property
    def folder(self) -> Path:
        """Return the folder of the run."""
        return Path(self.run.output)

    def _notes(self, step: int) -> dict[str, str]:
        fixed = self.run.model_dump_json(exclude=FREE) + self.frozen
        return {"run": hashlib.sha256(fixed.encode()).hexdigest()[:16], "step": str(step)}

    def save(self, progress: Progress, moment: Moment) -> None:
        """Write a state, or begin to, where the run saves in the background; `finish` then ends it.

        Raises TrainingError when the disk does not take it, or did not take the one before that was begun; the last
        whole one is then still there.
        """
        self.finish()
        behind = self.run.save_in_background
        write = partial(self._write, deepcopy(progress), moment, self.engine.snapshot(self.trained, copied=behind))
        if behind:
            self.begun.append(_Errand(write))
        else:
            write()

    def finish(self) -> None:
        """Wait for a state that is being written. Raises TrainingError when it could not be."""
        while self.begun:
            self.begun.pop().wait()

    def _write(self, progress: Progress, moment: Moment, snapshot: Snapshot) -> None:
        engine, step = self.engine, progress.step
        draft, notes = draft_of(self.folder, step), self._notes(step)
        try:
            if engine.rank == 0:
                begin(draft)
            snapshot.barrier()
            snapshot.write(draft, notes)
            write_whole(draft / f"random-{engine.rank:05d}", moment.randomness, notes)
            snapshot.barrier()
            if engine.rank == 0:
                fields = {
                    **notes,
                    "world": engine.world,
                    "settings": self.run.model_dump(mode="json"),
                    "frozen": self.frozen,
                    "start": self.start,
                    "rate": self.optimizer.rate(step),
                    "progress": asdict(progress),
                    "data": {"step": step, "state": moment.data},
                }
                write_json(draft / STATE, fields)
                retire(commit(draft), self.run.keep)
            snapshot.barrier()
        except (OSError, SafetensorError, WorkError) as error:
            begins = (
                "goes on from the state before it" if states(self.folder) else "begins anew: no state was before it"
            )
            raise TrainingError(
                f"the state of step {step} could not be written to {draft.parent}: {error}; make room and run the same "
                f"command, which {begins}"
            ) from None
        finally:
            if engine.rank == 0 and draft.exists():
                begin(draft)
                draft.rmdir()

    def resume(self, batches: Batches, say: Callable[[str], None]) -> Progress:
        """Set everything back to the newest whole state, if there is one; return how far it is.

        Raises ConfigError when it is of other settings, CheckpointError when a part of it is missing or of elsewhere.
        """
        folder = newest(self.folder, say)
        if folder is None:
            return Progress()
        fields = read_json(folder / STATE)
        if missing := [key for key in _PARTS if key not in fields]:
            raise CheckpointError(f"{folder / STATE} lacks {', '.join(missing)}; it is no whole state of this version")
        self._compare(fields, folder)
        if set(fields["progress"]) != set(Progress.__dataclass_fields__):
            raise CheckpointError(f"{folder / STATE}: its progress is no whole one of this version")
        progress = parse(Progress, fields["progress"], str(folder / STATE))
        if progress.step > self.run.steps:
            raise ConfigError(
                f"{folder} is of step {progress.step}, beyond steps={self.run.steps}; raise steps, or give another "
                f"output, or remove {folder} to go on from an earlier state"
            )
        rate = self.optimizer.rate(progress.step)
        if fields["settings"]["steps"] == self.run.steps and fields["rate"] != rate:
            raise CheckpointError(
                f"{folder / STATE}: its rate is {fields['rate']}, and the schedule's at step {progress.step} is {rate}"
            )
        notes = self._notes(int(folder.name))
        told = {"run": fields["run"], "step": fields["step"]}
        if told != notes or progress.step != int(folder.name):
            raise CheckpointError(
                f"{folder / STATE} is of run {told['run']} and step {told['step']}, its folder of run {notes['run']} "
                f"and step {notes['step']}; remove {folder}, the state before it is used then"
            )
        engine = self.engine
        engine.load(folder, self.trained, self.optimizer, notes)
        if fields["world"] == engine.world:
            randomness = random_state()
            read(folder / f"random-{engine.rank:05d}", randomness, notes)
            set_random_state(randomness)
        else:
            seed_all(self.run.seed, engine.rank, progress.step)
            say(
                f"{fields['world']} processes saved this state and {engine.world} go on: data and dropout go on as "
                "they were"
            )
        if fields["data"].get("step") != progress.step:
            raise CheckpointError(
                f"{folder / STATE}: its place in the data is of step {fields['data'].get('step')}, not {progress.step}"
            )
        try:
            batches.restore(fields["data"]["state"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / STATE}: its place in the data is not whole: {error!r}") from None
        say(f"goes on after step {progress.step}, from {folder}")
        if changed := changed_data(self.run, folder / STATE):
            say(f"{changed:.200} has changed since that state; its rows are read as they are now")
        return progress

    def _compare(self, fields: Mapping[str, Any], folder: Path) -> None:
        before, now = fields["settings"], self.run.model_dump(mode="json")
        changed = sorted(key for key in now if key not in FREE and before.get(key) != now[key])
        if changed:
            raise ConfigError(
                f"{self.folder} was trained with other settings ({', '.join(changed)}); give another output, or remove "
                f"{self.folder}"
            )
        if fields["frozen"] != self.frozen:
            raise ConfigError(
                f"{folder} was trained on another base: what does not train has the fingerprint {self.frozen}, there "
                f"it had {fields['frozen']}; give another output, or the base as it was"
            )
        if None not in (told := fields.get("start"), self.start) and told != self.start:
            raise ConfigError(
                f"{folder} was trained from {' and '.join((self.run.init, *self.run.take.values()))} as it was, and "
                f"that has other weights now; give another output, or remove {self.folder} to train it anew"
            )
