"""Weighted mixtures of sources: which rows make up which step, and who prepares them.

One plan, the same for any number of processes and workers: rows are drawn by name (a source by weight, then its next
number), measured, and put into micro-batches of so many rows, or of as many as fill a budget of tokens. A process makes
only its own micro-batches. The plan's state is small: counters, and the names of rows drawn and not yet used.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context, parent_process
from typing import Any, Literal, cast

import numpy as np
import torch

from modalora import modality
from modalora.config import SourceConfig
from modalora.contracts import BLANK, IGNORED, Batch
from modalora.data.corpus import Passages, open_corpus, open_documents
from modalora.data.packing import fill
from modalora.data.quarantine import Quarantine
from modalora.data.sources import SOURCES, WINDOWED, Bad, Context, Drawn, Key, Source, bad_row
from modalora.errors import ConfigError, DataError, InputError, TrainingError
from modalora.processing.processor import Row
from modalora.processing.tokenizer import END_OF_TEXT

Name = tuple[int, int]  # place of the source in the mixture, number of the row in the source
Made = Row | Bad

POOL = 64  # rows that a packed micro-batch is chosen from, at least
MEASURED = 64  # rows of a source that tell how long its rows are
AHEAD = 2  # steps that workers are ahead


def make_source(context: Context, config: SourceConfig, key: Key = (0, 0)) -> Source:
    """Return the source that a recipe names. Raises ConfigError for an unknown name or option, DataError."""
    if config.window:
        if config.window > context.processor.window:
            raise ConfigError(
                f"window={config.window} of source {config.name or config.source!r}: the model reads at most "
                f"{context.processor.window} tokens; lower it, or give the run a rope with a longer window"
            )
        context = replace(context, window=config.window)
    try:
        if config.source == "files":
            return _windowed(config, open_corpus(context, key, **config.options))
        if config.source == "documents":
            return open_documents(context, key, **config.options)
        maker = SOURCES.get(config.source) or modality.source(config.source)
        if maker is None:
            known = ", ".join(sorted(("documents", "files", *SOURCES)))
            raise ConfigError(f"unknown source {config.source!r}; known are {known}, and MODALITY.SOURCE")
        if config.window and config.source not in WINDOWED:
            raise _no_window(config)
        return Drawn(maker(context, **config.options), key)
    except TypeError as error:
        raise ConfigError(f"source {config.source!r} does not take these options: {error}") from None


def _windowed(config: SourceConfig, source: Source) -> Source:
    if config.window and not isinstance(source, Passages):
        raise _no_window(config)
    return source


def _no_window(config: SourceConfig) -> ConfigError:
    return ConfigError(
        f"window={config.window} of source {config.source!r}: its rows are as long as what is in them; leave it out"
    )


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """Return what each source is called in the names of samples: its own name, numbered where that is not unique."""
    names = [source.name or source.source for source in sources]
    return [name if names.count(name) == 1 else f"{name}.{place}" for place, name in enumerate(names)]


@dataclass
class Reader:
    """The open sources of a mixture. Rows that cannot be used come back as what is wrong with them."""

    sources: list[Source]
    names: list[str]
    routes: list[str | None]  # that the rows of each source ask for; None: by their media
    most: int  # tokens of a row, 0: whatever the model reads

    def sample(self, name: Name) -> str:
        """Return what a row is called: SOURCE:NUMBER."""
        return f"{self.names[name[0]]}:{name[1]}"

    def look(self, name: Name) -> int | Made:
        """Return the tokens of a row, or the row itself where that is how they become known."""
        source, number = self.sources[name[0]], name[1]
        try:
            tokens = source.measure(number)
        except InputError as error:
            return bad_row(error, self.sample(name), source, number)
        return self.make(name) if tokens is None else tokens

    def make(self, name: Name) -> Made:
        """Return a row."""
        source, number = self.sources[name[0]], name[1]
        try:
            row = source.row(number)
        except InputError as error:
            return bad_row(error, self.sample(name), source, number)
        if self.most and len(row.ids) > self.most:
            told = DataError(f"it is {len(row.ids)} tokens and tokens={self.most}; raise tokens, or shorten the row")
            return bad_row(told, self.sample(name), source, number)
        row.sample, row.route = self.sample(name), self.routes[name[0]]
        return row


def open_reader(context: Context, sources: Sequence[SourceConfig], seed: int, most: int = 0) -> Reader:
    """Open every source. Raises ConfigError, DataError."""
    context = replace(context, most=most)
    opened = [make_source(context, source, (seed, place)) for place, source in enumerate(sources)]
    return Reader(opened, source_names(sources), [source.route for source in sources], most)


def _mean_tokens(reader: Reader, place: int) -> float:
    """Return the mean tokens of the first rows of a source. Raises DataError when none of them is good."""
    rows = reader.sources[place].rows
    seen = [reader.look((place, number)) for number in range(min(MEASURED, rows or MEASURED))]
    sizes = [len(one.ids) if isinstance(one, Row) else one for one in seen if not isinstance(one, Bad)]
    if not sizes:
        raise DataError(f"none of the first {len(seen)} rows of {reader.names[place]!r} can be used; see `data check`")
    return float(np.mean(sizes))


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
    ) -> None:
        """rows: of a micro-batch, or tokens: the budget that its rows fill. accumulate: micro-batches of a step, over
        all `world` processes, of which this is number `rank`. steps: of the run, for weights that change on the way.
        weigh: what the weights of sources are shares of; for tokens the first rows of each source are measured.
        workers: processes that prepare rows ahead; 0: none, rows are made when they are asked for.
        Raises ConfigError, DataError.
        """
        if accumulate % world:
            raise ConfigError(
                f"accumulate={accumulate} micro-batches cannot be shared by {world} processes; make it a multiple of it"
            )
        self.configs, self.processor = list(sources), context.processor
        self.rows, self.tokens, self.accumulate = rows, tokens, accumulate
        self.seed, self.steps, self.rank, self.world = seed, steps, rank, world
        self.quarantine = quarantine or Quarantine()
        self.reader = open_reader(context, sources, seed, tokens)
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
            self._sizes = [_mean_tokens(self.reader, place) for place in range(len(self.configs))]
        self._position = Position(numbers=[0] * len(self.configs))
        self._taken = deepcopy(self._position)
        self._lengths: dict[Name, int] = {}
        self._rows: dict[Name, Row] = {}  # made already, as measuring needed them
        self._ahead: deque[Future[Planned]] = deque()
        self._pool = _start_workers(context, sources, seed, tokens, workers) if workers else None
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
            raise _WORKER_ENDED from None

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
            pool[:] = [name for place, name in enumerate(pool) if place not in set(places)]
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
        return [_landed(seen) for seen in self._pool.map(_look, names, chunksize=max(1, len(names) // 16))]

    def _getter(self, name: Name) -> Callable[[], Made]:
        if name in self._rows:
            row = self._rows[name]
            return lambda: row
        if self._pool is None:
            return lambda: self.reader.make(name)
        future = self._pool.submit(_make, name)

        def arrived() -> Made:
            try:
                return cast(Made, _landed(future.result()))
            except BrokenProcessPool:
                raise _WORKER_ENDED from None

        return arrived

    def _nothing(self) -> Row:
        """Return a row that trains nothing, for a micro-batch whose rows all turned out bad."""
        return Row(ids=[self.processor.tokenizer.control(END_OF_TEXT)], labels=[IGNORED], sample=BLANK)

    def _put_aside(self, bad: Bad, step: int, drawn: int, written: bool = True) -> None:
        self.quarantine.add(bad, step, written)
        self.quarantine.check(drawn, bad)


# --------------------------------------------------------------------------------------------------- workers

_WORKER_ENDED = TrainingError(
    "a worker that prepares rows ended by itself, most likely for want of memory; set fewer workers, or smaller media"
)
_READER: list[Reader] = []  # of a worker process


def _start_workers(
    context: Context, sources: Sequence[SourceConfig], seed: int, tokens: int, workers: int
) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),  # a fork would inherit torch's threads in an unknown state
        initializer=_begin,
        initargs=(context, tuple(sources), seed, tokens),
    )


def _begin(context: Context, sources: Sequence[SourceConfig], seed: int, tokens: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _READER.append(open_reader(context, sources, seed, tokens))


def _leave_with_parent() -> None:
    """End this worker when the main process was killed and cannot tell it to."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGKILL)


def _look(name: Name) -> Any:
    return _shipped(_READER[0].look(name))


def _make(name: Name) -> Any:
    return _shipped(_READER[0].make(name))


def _shipped(made: int | Made) -> Any:
    """Turn tensors into arrays: between processes torch would send tensors as open files, of which there are few."""
    if isinstance(made, Row):
        made.media = [
            (kind, cast(Any, {name: value.numpy() for name, value in features.items()}), start, tokens)
            for kind, features, start, tokens in made.media
        ]
    return made


def _landed(made: Any) -> int | Made:
    if isinstance(made, Row):
        made.media = [
            (kind, {name: torch.from_numpy(np.asarray(value)) for name, value in features.items()}, start, tokens)
            for kind, features, start, tokens in made.media
        ]
    return made
