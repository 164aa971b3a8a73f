"""Evolutionary search for rotary divisors, guided by a judge (LongRoPE2, arXiv:2502.20082, section 3.2, appendix B).

The judge gives the mean nats of a candidate on each document; the fitness is their mean over all documents. A search
depends on its settings and on what the judge said, and on nothing else: what was said is written to a log, call by
call, and a search that finds a log takes its answers from there before it asks the judge again. So one that was killed
goes on bit for bit, and so it does in another number of processes, which share the calls and see all answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from math import exp, isfinite, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from modalora.checkpoint.resume import locked
from modalora.config import SearchConfig
from modalora.disk import Journal, read_lines, step_of
from modalora.errors import ConfigError, WorkError
from modalora.evaluation.intervals import t_quantile
from modalora.longrope2.factors import Factors
from modalora.longrope2.space import Genome, Space
from modalora.parallel import ranks
from modalora.training.signals import Asked, Interrupted, Stop

LOG = "search.jsonl"


class Judge(Protocol):
    """Tells how well candidates read documents."""

    @property
    def documents(self) -> int:
        """How many documents there are."""
        ...

    def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
        """Return mean answer nats, (candidates, documents), on the documents of these numbers."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    best: the candidate of the lowest loss, mean nats over all documents. parents: the last ones and their losses, best
    first. evaluations: candidates judged, wholly or until they were dropped. passes: candidates times documents read.
    history: figures of each iteration, the first population's at 0.
    """

    best: Factors
    loss: float
    parents: tuple[tuple[Factors, float], ...]
    evaluations: int
    passes: int
    history: tuple[Mapping[str, Any], ...]


def search(
    space: Space,
    judge: Judge,
    config: SearchConfig,
    *,
    folder: Path | None = None,
    fingerprints: Mapping[str, Any] | None = None,
    surrogate: Judge | None = None,
    report: Callable[[Mapping[str, Any]], None] = lambda figures: None,
) -> Outcome:
    """Search a space and return the best candidate.

    folder: where the log is; a search that finds its own there goes on from it, also with more iterations than before.
    fingerprints: what tells model and documents apart, as JSON: a log of others is refused. surrogate: a cheaper judge
    that chooses which proposals are judged; the first candidate of each of its calls is the best so far, on which it
    may lean. report: called with figures after each round of calls. In a process group all ranks call this, and share
    the calls of each round.

    Raises ConfigError for settings that do not fit and for a log of another search, WorkError for a loss that is no
    finite number, Interrupted at SIGINT or SIGTERM: all that was judged is in the log.
    """
    if config.proposals > 1 and surrogate is None:
        raise ConfigError(f"proposals={config.proposals} are chosen among by a surrogate, and none was given")
    if config.proposals == 1 and surrogate is not None:
        raise ConfigError(
            "a surrogate was given, and proposals=1 leaves it nothing to choose; set proposals, such as 4"
        )
    told: dict[str, Any] = {"space": asdict(space), "settings": config.model_dump(exclude={"iterations"})}
    told |= {"documents": judge.documents, "fingerprints": dict(fingerprints or {})}
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        if folder is not None and ranks.is_first():
            stack.enter_context(locked(folder))
        log = stack.enter_context(_opened(None if folder is None else folder / LOG, told))
        return _Search(space, judge, surrogate, config, log, stop, report).run()


@dataclass(frozen=True, slots=True)
class _Call:
    """Candidates and documents that are judged together. cheap: by the surrogate."""

    genomes: tuple[Genome, ...]
    documents: tuple[int, ...]
    cheap: bool = False

    def told(self) -> dict[str, Any]:
        """Return the call as JSON."""
        genomes = [[genome.anchor, list(genome.tail)] for genome in self.genomes]
        return {"by": "surrogate" if self.cheap else "judge", "documents": list(self.documents), "candidates": genomes}


class _Log:
    """The calls of a search in order, and what was said to each: replayed as far as they go, then written."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], journal: Journal | None) -> None:
        self.lines, self.journal, self.step = lines, journal, 0

    def replay(self, call: _Call) -> list[list[float]] | None:
        """Return what was said to the next call, or None where the log ends. Raises ConfigError for another call."""
        if self.step >= len(self.lines):
            return None
        line = self.lines[self.step]
        self.step += 1
        if any(line.get(key) != value for key, value in call.told().items()):
            raise ConfigError(
                f"line {self.step + 1} of {LOG} is not what this search asks next: another version of modalora wrote "
                "it, or it was altered; give another folder"
            )
        return line["losses"]

    def write(self, call: _Call, losses: list[list[float]]) -> None:
        self.step += 1
        if self.journal:
            self.journal.write({"step": self.step, **call.told(), "losses": losses})

    def sync(self) -> None:
        if self.journal:
            self.journal.sync()


@contextmanager
def _opened(path: Path | None, told: Mapping[str, Any]) -> Iterator[_Log]:
    """Open the log that rank 0 sees. Raises ConfigError when it is of another search."""
    lines: list[dict[str, Any]] = []
    if path is not None and ranks.is_first():  # up to the first that is none, as a killed process may leave behind
        numbered = takewhile(lambda own: step_of(own[1]) == own[0], enumerate(read_lines(path)))
        lines = [json.loads(line) for _, line in numbered]
    lines = ranks.gathered(lines)[0]
    given = json.loads(json.dumps(told))
    if lines and (found := lines[0].get("search")) != given:
        found = found if isinstance(found, dict) else {}
        other = [key for key in given if found.get(key) != given[key]]
        raise ConfigError(
            f"{path} is the log of a search with other {' and '.join(other)}; give another folder, or what it had"
        )
    if path is None or not ranks.is_first():
        yield _Log(lines[1:], None)
        return
    with Journal(path, len(lines) - 1) as journal:
        if not lines:
            journal.write({"step": 0, "search": given})
        yield _Log(lines[1:], journal)


class _Search:
    def __init__(
        self,
        space: Space,
        judge: Judge,
        surrogate: Judge | None,
        config: SearchConfig,
        log: _Log,
        stop: Stop,
        report: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.space, self.judge, self.surrogate, self.config = space, judge, surrogate, config
        self.log, self.stop, self.report = log, stop, report
        self.rng = np.random.default_rng(config.seed)
        # in a random order, so that the first ones are a sample of all
        self.order = [int(number) for number in self.rng.permutation(judge.documents)]
        self.known: dict[Genome, list[float]] = {}  # losses on the first documents of the order
        self.parents: list[Genome] = []
        self.keep = config.population // 2
        self.planned = config.population + config.iterations * self.keep
        self.iteration = self.passes = 0
        self.history: list[dict[str, Any]] = []
        self.started, self.replayed = time.monotonic(), 0

    def run(self) -> Outcome:
        first = self.space.first(self.rng, self.config.population, self.config.mutation)
        if self.config.method == "random":
            first = self._distinct(self.config.population, lambda at: self.space.sample(self.rng))
        self._select(first, None)
        for number in range(self.config.iterations):
            self.iteration = number + 1
            self._iterate()
        best = self.parents[0]
        return Outcome(
            best=self.space.factors(best),
            loss=self._loss(best),
            parents=tuple((self.space.factors(own), self._loss(own)) for own in self.parents),
            evaluations=len(self.known),
            passes=self.passes,
            history=tuple(self.history),
        )

    def _iterate(self) -> None:
        """Make children; where a surrogate chooses among more, the best of those are judged."""
        children = self._distinct(self.keep * self.config.proposals, self._child)
        if self.surrogate is None:
            self._select(children, None)
            return
        guesses = self._screen(children)
        self._select(sorted(children, key=guesses.__getitem__)[: self.keep], guesses)

    def _child(self, number: int) -> Genome:
        """Return a child; the last of each half population have two parents."""
        if self.config.method == "random":
            return self.space.sample(self.rng)
        one, other = (self.parents[int(self.rng.integers(len(self.parents)))] for _ in range(2))
        if number % self.keep >= round(self.keep * (1 - self.config.crossover)):
            return self.space.cross(one, other, self.rng)
        return self.space.mutate(one, self.rng, self.config.mutation)

    def _distinct(self, count: int, make: Callable[[int], Genome]) -> list[Genome]:
        """Return candidates that were never judged, fewer where a small space has no more.

        One that came up before is moved on until it is new.
        """
        found: dict[Genome, None] = {}
        for at in range(count):
            child = make(at)
            for _ in range(100):
                if child not in found and child not in self.known:
                    found[child] = None
                    break
                child = self.space.mutate(child, self.rng, self.config.mutation)
        return [*found]

    def _screen(self, children: Sequence[Genome]) -> dict[Genome, float]:
        """Return what the surrogate makes of each child: mean nats."""
        assert self.surrogate is not None
        documents = tuple(range(self.surrogate.documents))
        calls = [_Call((self.parents[0], *few), documents, cheap=True) for few in self._groups(children)]
        found: dict[Genome, float] = {}
        for call, losses in zip(calls, self._answers(calls), strict=True):
            found |= {own: fmean(row) for own, row in zip(call.genomes[1:], losses[1:], strict=True)}
        return found

    def _select(self, children: Sequence[Genome], guesses: Mapping[Genome, float] | None) -> None:
        """Judge the children and make parents of the best of old parents and children; both must be known wholly."""
        total = len(self.order)
        alive, at, dropped = list(children), 0, 0
        agreement = None
        for stop in _looks(self.config, total):
            self._read(alive, at, stop)
            if guesses and agreement is None and len(alive) > 2:
                agreement = rank_correlation([guesses[own] for own in alive], [self._loss(own) for own in alive])
            if stop < total:
                staying = self._survivors(alive, stop)
                dropped, alive = dropped + len(alive) - len(staying), staying
            at = stop
        pool = [*self.parents, *alive]
        self.parents = sorted(pool, key=self._loss)[: self.keep]  # stable: of equals the older one
        self.log.sync()
        self.history.append(
            {
                "iteration": self.iteration,
                **self._figures(),
                "median_loss": float(np.median([self._loss(own) for own in self.parents])),
                "anchors": sorted(own.anchor for own in self.parents),
                "dropped": dropped,
                **({} if agreement is None else {"surrogate_correlation": agreement}),
            }
        )

    def _survivors(self, alive: Sequence[Genome], read: int) -> list[Genome]:
        """Return those that may still become parents, by the documents read so far."""
        pool = [*self.parents, *alive]
        if len(pool) <= self.keep:
            return list(alive)
        losses = {own: np.array(self.known[own][:read]) for own in pool}
        last = losses[sorted(pool, key=lambda own: float(losses[own].mean()))[self.keep - 1]]
        error, total = self.config.race_error, len(self.order)
        return [own for own in alive if not is_worse(losses[own] - last, total, error)]

    def _read(self, genomes: Sequence[Genome], start: int, stop: int) -> None:
        documents = tuple(self.order[start:stop])
        calls = [_Call(few, documents) for few in self._groups(genomes)]
        for call, losses in zip(calls, self._answers(calls), strict=True):
            for genome, row in zip(call.genomes, losses, strict=True):
                self.known.setdefault(genome, []).extend(row)
                self.passes += len(row)

    def _groups(self, genomes: Sequence[Genome]) -> list[tuple[Genome, ...]]:
        size = self.config.together
        return [tuple(genomes[at : at + size]) for at in range(0, len(genomes), size)]

    def _loss(self, genome: Genome) -> float:
        """Mean nats over the documents read; over all of them for a parent."""
        return fmean(self.known[genome])

    def _answers(self, calls: Sequence[_Call]) -> Iterator[list[list[float]]]:
        """Yield what is said to each call. Ranks take turns; the log is the same as one process would write."""
        at = 0
        while at < len(calls) and (known := self.log.replay(calls[at])) is not None:
            at, self.replayed = at + 1, self.replayed + 1
            yield known
        rank, world = ranks.place()
        while at < len(calls):
            turn = calls[at : at + world]
            own = self._ask(turn[rank], alone=world == 1) if rank < len(turn) else None
            with ranks.explained():
                told = ranks.gathered([own, self.stop.asked])
            for call, (said, _) in zip(turn, told, strict=False):
                self.log.write(call, said)
                yield said
            at += len(turn)
            if asked := max(number for _, number in told):
                raise self._interrupted(asked)
            told_so_far = {"iteration": self.iteration, "iterations": self.config.iterations, **self._figures()}
            self.report({**told_so_far, "planned": self.planned, "remaining_seconds": self._remaining()})

    def _ask(self, call: _Call, *, alone: bool) -> list[list[float]]:
        candidates = [self.space.factors(genome) for genome in call.genomes]
        judge = self.surrogate if call.cheap and self.surrogate else self.judge
        try:
            with self.stop.breaking(alone):  # what is being judged is thrown away; others would wait for this process
                if alone and self.stop.asked:
                    raise Asked
                losses: list[list[float]] = judge.losses(candidates, call.documents).tolist()
        except Asked:
            raise self._interrupted(self.stop.asked) from None
        for genome, row in zip(call.genomes, losses, strict=True):
            if not all(map(isfinite, row)):
                raise WorkError(
                    f"the loss of the candidate with anchor {genome.anchor} and divisors {genome.tail} / 100 is "
                    f"{next(value for value in row if not isfinite(value))}, which cannot be ranked; look at the model"
                )
        return losses

    def _interrupted(self, number: int) -> Interrupted:
        self.log.sync()
        kept = (
            "its log holds all of them, and the same search goes on from there" if self.log.journal else "none is kept"
        )
        return Interrupted(f"search stopped after {len(self.known)} of {self.planned} evaluations; {kept}", number)

    def _figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"evaluations": len(self.known), "passes": self.passes}
        if self.parents:
            best = self.space.factors(self.parents[0])
            loss = self._loss(self.parents[0])
            figures |= {"loss": loss, "perplexity": exp(min(loss, 700.0)), "anchor": best.anchor}
            figures |= {"first_stretched": best.first_stretched}
        return figures

    def _remaining(self) -> int:
        """Seconds left, at the speed of the calls that were not replayed."""
        done, fresh = max(1, len(self.known)), max(1, self.log.step - self.replayed)
        calls = self.log.step / done * max(0, self.planned - done)
        return round((time.monotonic() - self.started) / fresh * calls)


def _looks(config: SearchConfig, total: int) -> list[int]:
    """Return after how many documents candidates are compared: each time twice as many, in the end all."""
    looks = []
    if config.racing:
        at = config.race_from
        while at < total:
            looks.append(at)
            at *= 2
    return [*looks, total]


def is_worse(gaps: np.ndarray, total: int, error: float) -> bool:
    """Tell whether a candidate's mean loss over all documents lies above another's, from its gaps on some of them.

    A paired t test on a sample of a finite number of documents: true when the mean gap is above zero by more than
    t(1 - error, n - 1) sd sqrt((1 - n / total) / n). A candidate that is no worse is told to be with a chance of at
    most `error`, for gaps that are nearly normal; looks at twice as many documents each add at most their number times
    as much.
    """
    count = len(gaps)
    if count >= total:
        return bool(gaps.mean() > 0)
    spread = float(gaps.std(ddof=1)) * sqrt((1 - count / total) / count)
    return bool(gaps.mean() > t_quantile(1 - error, count - 1) * spread)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equals share their mean rank. 0 where one of the two is constant."""
    first, second = (_ranked(np.array(values, dtype=float)) for values in (one, other))
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _ranked(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
