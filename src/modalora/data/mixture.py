"""Weighted mixtures of sources: which rows make up which step, and who prepares them.

One plan, the same for any number of processes and workers: rows are drawn by name (a source by weight, then its next
number), measured, and put into micro-batches of so many rows, or of as many as fill a budget of tokens. A process makes
only its own micro-batches. The plan's state is small: counters, and the names of rows drawn and not yet used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np

from modalora.config import SourceConfig
from modalora.contracts import BLANK, IGNORED, Batch
from modalora.data.packing import fill
from modalora.data.quarantine import Quarantine
from modalora.data.reader import Made, Name, mean_tokens, open_reader
from modalora.data.sources import Bad, Context
from modalora.data.workers import WORKER_ENDED, landed, look_there, make_there, start_workers
from modalora.errors import ConfigError, DataError
from modalora.processing.processor import Row
from modalora.processing.tokenizer import END_OF_TEXT

POOL = 64  # rows that a packed micro-batch is chosen from, at least
AHEAD = 2  # steps that workers are ahead


@dataclass
class Position:
    """Where a plan stands, behind a step."""

    step: int = 0
    drawn: int = 0  # rows drawn from all sources
    numbers: list[int] = field(default_factory=list)  # the next row of each source
    pool: list[Name] = field(default_factory=list)  # drawn and not yet used, oldest first


@dataclass(frozen=True)
class Planned:
    """A step on its way: how to get each row of this process's micro-batches, what was bad, and where the plan
    stands."""

    micro: list[list[tuple[int, Callable[[], Made]]]]  # tokens, and the row
    bad: list[Bad]
    position: Position


class Mixture:
    """Steps of batches for one process, drawn from weighted sources."""

    def __init__(
        self,
        context: Context,
        sources: Sequence[SourceConfig],
        *,
        rows: int = 16,
        tokens: int = 0,
        accumulate: int = 1,
        seed: int = 0,
        steps: int = 1,
        weigh: Literal["rows", "tokens"] = "rows",
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        quarantine: Quarantine | None = None,
        scored: int = 0,
    ) -> None:
        """rows: of a micro-batch, or tokens: the budget that its rows fill. accumulate: micro-batches of a step, over
        all `world` processes, of which this is number `rank`. steps: of the run, for weights that change on the way.
        weigh: what the weights of sources are shares of; for tokens the first rows of each source are measured.
        workers: processes that prepare rows ahead; 0: none, rows are made when they are asked for.
        scored: how many rows of each source are taken at most, each once; 0: what weights and epochs say.
        Raises ConfigError, DataError.
        """
        if accumulate % world:
            raise ConfigError(
                f"accumulate={accumulate} micro-batches cannot be shared by {world} processes; make it a multiple of it"
            )
        self.configs, self.processor = list(sources), context.processor
        self.rows, self.tokens, self.accumulate = rows, tokens, accumulate
        self.seed, self.steps, self.rank, self.world, self.scored = seed, steps, rank, world, scored
        self.quarantine = quarantine or Quarantine()
        context = replace(context, most=tokens)
        self.reader = open_reader(context, sources, seed)
        for config, source in zip(sources, self.reader.sources, strict=True):
            if config.epochs is not None and source.rows is None:
                raise ConfigError(
                    f"source {config.source!r} has no end, so epochs={config.epochs} says nothing; drop it"
                )
        for share in {start for one in sources if isinstance(one.weight, dict) for start in one.weight}:
            if not any(one.weight_at(share) for one in sources):
                raise ConfigError(f"from {share:.0%} of the run on no source has a weight; give one a weight above 0")
        self._sizes = [1.0] * len(self.configs)  # what a row of each source counts for
        if weigh == "tokens":
            self._sizes = [mean_tokens(self.reader, place) for place in range(len(self.configs))]
        self._position = Position(numbers=[0] * len(self.configs))
        self._taken = deepcopy(self._position)
        self._lengths: dict[Name, int] = {}
        self._rows: dict[Name, Row] = {}  # made already, as measuring needed them
        self._ahead: deque[Future[Planned]] = deque()
        self._pool = start_workers(context, sources, seed, workers) if workers else None
        self._planner = ThreadPoolExecutor(1, "plan") if workers else None

    def take(self) -> list[Batch]:
        """Return this process's micro-batches of the next step; none when every source has ended.

        Raises TrainingError when too many rows are bad.
        """
        planned = self._next()
        step = self._taken.step + 1
        if step == 1:
            self.quarantine.rewind(0, 0)  # of an earlier start that was never saved
        for bad in planned.bad:
            self._put_aside(bad, step, planned.position.drawn, written=self.rank == 0)
        batches: list[Batch] = []
        for micro in planned.micro:
            rows: list[Row] = []
            for tokens, get in micro:
                made = get()
                if isinstance(made, Bad):
                    self._put_aside(made, step, planned.position.drawn)
                    continue
                if len(made.ids) != tokens:
                    raise DataError(
                        f"row {made.sample} was {tokens} tokens when it was measured and is {len(made.ids)}: its file "
                        "or media changed; remove the cache and start anew"
                    )
                rows.append(made)
            batches.append(self.processor.collate(rows or [self._nothing()]))
        self._taken = planned.position
        return batches

    def lasts(self) -> int | None:
        """Return about how many steps the data last for, by the first rows of each source.

        None: without end, or by weights that change, which may leave rows behind.
        """
        if any(isinstance(source.weight, dict) for source in self.configs):
            return None
        rows = [
            (source.epochs or 0) * (own.rows or 0)
            for source, own in zip(self.configs, self.reader.sources, strict=True)
        ]
        if not all(rows):
            return None
        if not self.tokens:
            return -(-sum(rows) // (self.rows * self.accumulate))
        tokens = sum(count * mean_tokens(self.reader, place) for place, count in enumerate(rows))
        return max(1, round(tokens / (self.tokens * self.accumulate)))

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on behind the last step taken, as JSON holds it."""
        return {
            **asdict(self._taken),
            "pool": [list(name) for name in self._taken.pool],
            "rows": [source.rows for source in self.reader.sources],
            "quarantined": self.quarantine.count,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind the step that a state was taken at, in any number of processes.

        Raises DataError when the files hold other numbers of rows than they did.
        """
        now = [source.rows for source in self.reader.sources]
        if state["rows"] != now:
            raise DataError(
                f"the sources held {state['rows']} rows and now hold {now}; give the same files, or start anew"
            )
        self._forget_ahead()
        pool = [(int(place), int(number)) for place, number in state["pool"]]
        self._position = Position(int(state["step"]), int(state["drawn"]), list(state["numbers"]), pool)
        self._taken = deepcopy(self._position)
        self._lengths, self._rows = {}, {}
        for name, seen in zip(pool, self._look(pool), strict=True):
            if self._note(name, seen) is not None:
                raise DataError(
                    f"row {self.reader.sample(name)} can no longer be read; give the same files, or start anew"
                )
        self.quarantine.rewind(self._position.step, int(state["quarantined"]))

    def close(self) -> None:
        """Stop the workers."""
        self._forget_ahead()
        if self._planner is not None:
            self._planner.shutdown()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    # -------------------------------------------------------------------------------------------- the plan

    def _next(self) -> Planned:
        if self._planner is None:
            return self._plan()
        while len(self._ahead) <= AHEAD:
            self._ahead.append(self._planner.submit(self._plan))
        try:
            return self._ahead.popleft().result()
        except BrokenProcessPool:
            raise WORKER_ENDED from None

    def _forget_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        for future in self._ahead:
            if not future.cancelled():
                future.exception()  # waits
        self._ahead.clear()

    def _plan(self) -> Planned:
        bad: list[Bad] = []
        micro = self._packed(bad) if self.tokens else self._sorted(bad)
        if any(micro):
            self._position.step += 1
        own = micro[self.rank :: self.world] if any(micro) else []
        planned = [[(self._lengths[name], self._getter(name)) for name in names] for names in own]
        for names in micro:
            for name in names:
                del self._lengths[name]
                self._rows.pop(name, None)
        return Planned(planned, bad, deepcopy(self._position))

    def _sorted(self, bad: list[Bad]) -> list[list[Name]]:
        """Draw a step's rows and put those of like length together, so that little is padding."""
        count = self.rows * self.accumulate
        names = sorted(self._draw(count, bad), key=self._lengths.__getitem__)
        cuts = [len(names) * place // self.accumulate for place in range(self.accumulate + 1)]
        return [names[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)]

    def _packed(self, bad: list[Bad]) -> list[list[Name]]:
        """Fill each micro-batch's budget from the pool of rows drawn before."""
        pool, made = self._position.pool, list[list[Name]]()
        for _ in range(self.accumulate):
            while len(pool) < POOL or sum(self._lengths[name] for name in pool) < 2 * self.tokens:
                if not (more := self._draw(POOL, bad)):
                    break
                pool += more
            places = fill([self._lengths[name] for name in pool], self.tokens) if pool else []
            made.append([pool[place] for place in places])
            taken = set(places)
            pool[:] = [name for place, name in enumerate(pool) if place not in taken]
        return made

    def _draw(self, count: int, bad: list[Bad]) -> list[Name]:
        """Return the next good rows, fewer when every source has ended or too many rows are bad; they are measured."""
        good: list[Name] = []
        while len(good) < count and not self.quarantine.is_too_much(len(bad), self._position.drawn):
            names: list[Name] = []
            while len(names) < count - len(good) and (name := self._draw_name()) is not None:
                names.append(name)
            if not names:
                break
            for name, seen in zip(names, self._look(names), strict=True):
                problem = self._note(name, seen)
                if problem is None:
                    good.append(name)
                else:
                    bad.append(problem)
        return good

    def _draw_name(self) -> Name | None:
        at, share = self._position, min(1.0, self._position.step / self.steps)
        weights = np.array(
            [
                0.0 if self._has_ended(place) else config.weight_at(share) / self._sizes[place]
                for place, config in enumerate(self.configs)
            ]
        )
        if not weights.any():
            if all(self._has_ended(place) for place in range(len(weights))):
                return None
            raise ConfigError(
                f"at {share:.0%} of the run every source that has a weight then has ended; give it more epochs, or "
                "another source a weight"
            )
        point = np.random.default_rng((self.seed, 1, at.drawn)).random() * weights.sum()
        place = min(int(np.searchsorted(weights.cumsum(), point, side="right")), int(np.flatnonzero(weights)[-1]))
        name = (place, at.numbers[place])
        at.numbers[place] += 1
        at.drawn += 1
        return name

    def _has_ended(self, place: int) -> bool:
        epochs, rows = self.configs[place].epochs, self.reader.sources[place].rows
        if self.scored:
            return self._position.numbers[place] >= min(self.scored, rows or self.scored)
        return epochs is not None and rows is not None and self._position.numbers[place] >= epochs * rows

    def _note(self, name: Name, seen: int | Made) -> Bad | None:
        """Remember what was seen of a row; return what is wrong with it, if anything is."""
        if isinstance(seen, Bad):
            return seen
        if isinstance(seen, Row):
            self._rows[name] = seen
        self._lengths[name] = len(seen.ids) if isinstance(seen, Row) else seen
        return None

    # --------------------------------------------------------------------------------------------- the rows

    def _look(self, names: Sequence[Name]) -> list[int | Made]:
        if self._pool is None:
            return [self.reader.look(name) for name in names]
        try:
            return [landed(seen) for seen in self._pool.map(look_there, names, chunksize=max(1, len(names) // 16))]
        except BrokenProcessPool:
            raise WORKER_ENDED from None

    def _getter(self, name: Name) -> Callable[[], Made]:
        if name in self._rows:
            row = self._rows[name]
            return lambda: row
        if self._pool is None:
            return lambda: self.reader.make(name)
        future = self._pool.submit(make_there, name)

        def arrived() -> Made:
            try:
                return cast(Made, landed(future.result()))
            except BrokenProcessPool:
                raise WORKER_ENDED from None

        return arrived

    def _nothing(self) -> Row:
        """Return a row that trains nothing, for a micro-batch whose rows all turned out bad."""
        return Row(ids=[self.processor.tokenizer.control(END_OF_TEXT)], labels=[IGNORED], sample=BLANK)

    def _put_aside(self, bad: Bad, step: int, drawn: int, written: bool = True) -> None:
        self.quarantine.add(bad, step, written)
        self.quarantine.check(drawn, bad)
