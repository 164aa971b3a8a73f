"""The generation loop: read the prompts once, then one token per row and step, until every row has stopped.

Rows that stop leave the batch. Cached keys were turned by the rotary table of their time: a row whose table changes as
it grows is read again from its start, unless its table was chosen for the planned length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

from modalora.contracts import Batch, Route
from modalora.errors import ConfigError, WorkError
from modalora.generation.sampling import NONE, Sampling, sample
from modalora.generation.windows import Switch
from modalora.nn.cache import KVCache


class Reader(Protocol):
    """What generation needs of a model."""

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache for this many rows."""
        ...

    def read(self, batch: Batch, cache: KVCache, reach: Sequence[int] | None = None) -> Tensor:
        """Read whole prompts into an empty cache; return logits of each row's last token, (batch, vocab).

        reach: the length of each row that decides its rotary table; None: the row's own.
        """
        ...

    def read_next(self, ids: Tensor, route: Route, cache: KVCache, reach: Sequence[int] | None = None) -> Tensor:
        """Read one more token per row, ids (batch,); return logits, (batch, vocab)."""
        ...

    def table_number(self, length: int) -> int:
        """Which of the model's rotary tables a row of this length uses."""
        ...


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. finish: None, "stop" (a stop id, not part of the answer, or the caller's rule) or
    "length"."""

    row: int
    id: int
    finish: str | None = None


def check_max_tokens(max_tokens: object) -> None:
    """Refuse what is no number of tokens. Raises ConfigError."""
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, Integral):
        raise ConfigError(f"max_tokens={max_tokens!r:.40} must be a whole number, such as 128")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens} must be at least 1; 128 works")


def generate(
    model: Reader,
    batch: Batch,
    *,
    sampling: Sampling,
    max_tokens: int,
    stop_ids: Collection[int],
    stops: Callable[[int, list[int]], bool] | None = None,
    switch: Switch = "crossing",
    seeds: Sequence[int] | None = None,
) -> Iterator[Token]:
    """Yield the tokens of every row, step by step, each row ending with a token that has a finish.

    max_tokens: most tokens per row. stops: asked after each token with the row and its new ids; true ends the row.
    switch: when a row's rotary table changes. seeds: of each row, in place of the sampling's.
    Raises WorkError where a row's logits are not finite.
    """
    check_max_tokens(max_tokens)
    steps = _steps(model, batch, sampling, max_tokens, stop_ids, stops, switch, seeds)
    while True:
        with torch.inference_mode():  # entered anew for each step: a generator may be left in its middle, for ever
            token = next(steps, None)
        if token is None:
            return
        yield token


def _steps(
    model: Reader,
    batch: Batch,
    sampling: Sampling,
    max_tokens: int,
    stop_ids: Collection[int],
    stops: Callable[[int, list[int]], bool] | None,
    switch: Switch,
    seeds: Sequence[int] | None,
) -> Iterator[Token]:
    rows = list(range(len(batch.input_ids)))
    new: list[list[int]] = [[] for _ in rows]
    prompts = [batch.input_ids[row, : int(batch.lengths[row])].tolist() for row in rows]
    seen = [set(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [sampling.seed] * len(rows)]
    reach = [len(prompt) + max_tokens for prompt in prompts] if switch == "planned" else None
    cache, route = model.new_cache(len(rows)), batch.route
    logits = model.read(batch, cache, reach)
    while True:
        chosen = sample(logits, [seen[row] for row in rows], sampling, [generators[row] for row in rows])
        going: list[int] = []
        for place, (row, index) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if index == NONE:
                raise WorkError(
                    f"row {row + 1} has logits that are NaN or infinite at token {len(new[row]) + 1} of its answer; "
                    "the weights are damaged, or too large for their precision: try dtype='float32'"
                )
            new[row].append(index)
            seen[row].add(index)
            finish = None
            if index in stop_ids or (stops and stops(row, new[row])):
                finish = "stop"
            elif len(new[row]) == max_tokens:
                finish = "length"
            else:
                going.append(place)
            yield Token(row, index, finish)
        if not going:
            return
        if len(going) < len(rows):
            cache.select(going)
            rows = [rows[place] for place in going]
            route, chosen = batch.route.select(rows), chosen[going]
        planned = None if reach is None else [reach[row] for row in rows]
        logits = model.read_next(chosen, route, cache, planned)
        lengths = [len(prompts[row]) + len(new[row]) for row in rows]
        crossing = [] if planned else [place for place, length in enumerate(lengths) if _outgrows(model, length)]
        if crossing:  # what was just computed for these rows is replaced
            own = [rows[place] for place in crossing]
            again = model.new_cache(len(own))
            logits[crossing] = model.read(_extended(batch.select(own), [prompts[row] + new[row] for row in own]), again)
            cache.put(crossing, again)


def _outgrows(model: Reader, length: int) -> bool:
    return model.table_number(length) != model.table_number(length - 1)


def _extended(batch: Batch, rows: list[list[int]]) -> Batch:
    lengths = torch.tensor([len(ids) for ids in rows], device=batch.lengths.device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True)
    return replace(batch, input_ids=padded.to(batch.input_ids.device), lengths=lengths, labels=None)
