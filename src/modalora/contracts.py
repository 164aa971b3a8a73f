"""The nouns that rooms exchange, and the token arithmetic that both sides of a placeholder share.

Axes: batch = rows, time = tokens, frames = 10 ms log-mel steps, crops = square tiles of one image.
Rows are padded on the right: a causal decoder never sees padding, so a row's numbers do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby
from math import ceil, isfinite
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from modalora.errors import RouteError

MOST_WEIGHT = 10_000.0  # of an adapter in a sum
IGNORED = -100  # label of a token that is not trained on, as torch's cross_entropy has it
BLANK = "(blank)"  # sample of a row that stands in where all rows of a micro-batch turned out bad
NOWHERE = -1  # row of a medium that belongs to none: it is encoded, since other ranks encode theirs, and dropped

Message = Mapping[str, Any]  # {"role": "user", "content": text or a list of parts}, as OpenAI and transformers have it


def terms(adapter: str) -> tuple[tuple[str, float], ...]:
    """Return the names and weights of an adapter sum: "vision+mine@0.7" is vision once and 0.7 of mine.

    Raises RouteError for what is no such sum, and for a weight beyond 10,000.
    """
    found: list[tuple[str, float]] = []
    for part in adapter.split("+"):
        name, _, weight = part.partition("@")
        try:
            found.append((name.strip(), float(weight) if _ else 1.0))
        except ValueError:
            found.append(("", 0.0))
    if not all(name and isfinite(weight) for name, weight in found) or len({name for name, _ in found}) < len(found):
        raise RouteError(f"{adapter!r} is no sum of adapters; write names with + between and weights behind @: a+b@0.7")
    if wrong := [weight for _, weight in found if abs(weight) > MOST_WEIGHT]:
        raise RouteError(
            f"{adapter!r:.80}: the weight {wrong[0]:g} must lie within {-MOST_WEIGHT:,.0f} and {MOST_WEIGHT:,.0f}, "
            "such as 0.7"
        )
    return tuple(found)


@dataclass(frozen=True)
class Route:
    """Which LoRA adapter each row uses: one name, a sum of several (`terms`), or None for the frozen decoder alone.

    A routed Linear computes an adapter for the rows that name it and for no other row.
    spans: tokens of each row where the rows lie end to end in one sequence, (1, tokens, width); None: they are the rows
    of a padded tensor, (batch, time, width).
    held: which tokens of that sequence are here, in their order, where processes share them; None: all.
    """

    adapters: tuple[str | None, ...]
    spans: tuple[int, ...] | None = None
    held: tuple[range, ...] | None = None

    @cached_property
    def groups(self) -> tuple[tuple[str, float, Tensor | slice | None], ...]:
        """(adapter, weight, where) for each adapter in use.

        where: indices of rows of a padded tensor, or the tokens of neighbouring rows of a sequence; None: everywhere.
        """
        used = dict.fromkeys(name for name in self.adapters if name is not None)
        found: list[tuple[str, float, Tensor | slice | None]] = []
        for name in used:
            rows = [row for row, own in enumerate(self.adapters) if own == name]
            places: list[Tensor | slice | None] = [None]
            if len(rows) < len(self.adapters):
                places = [torch.tensor(rows)] if self.spans is None else [*self._runs(name, self.spans)]
            found += [(one, weight, where) for one, weight in terms(name) for where in places]
        return tuple(found)

    def groups_on(self, device: torch.device) -> tuple[tuple[str, float, Tensor | slice | None], ...]:
        """Return `groups` with their indices on a device, where they are brought once for all Linears."""
        if device not in self._brought:
            self._brought[device] = tuple(
                (name, weight, where.to(device) if isinstance(where, Tensor) else where)
                for name, weight, where in self.groups
            )
        return self._brought[device]

    @cached_property
    def _brought(self) -> dict[torch.device, tuple[tuple[str, float, Tensor | slice | None], ...]]:
        return {}

    def _runs(self, name: str, spans: tuple[int, ...]) -> Iterator[slice]:
        at = 0
        for own, run in groupby(zip(self.adapters, spans, strict=True), key=lambda pair: pair[0]):
            start, at = at, at + sum(length for _, length in run)
            if own == name:
                yield from self._here(start, at)

    def _here(self, start: int, stop: int) -> Iterator[slice]:
        """Give where tokens start .. stop of the sequence lie here."""
        if self.held is None:
            yield slice(start, stop)
            return
        at = 0
        for piece in self.held:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                yield slice(at + first - piece.start, at + last - piece.start)
            at += len(piece)

    @property
    def tokens(self) -> Tensor:
        """The number of each token that is here, in the sequence of rows, (time,)."""
        assert self.spans is not None
        held = (range(sum(self.spans)),) if self.held is None else self.held
        return torch.cat([torch.arange(piece.start, piece.stop) for piece in (*held, range(0))])

    def select(self, rows: Sequence[int]) -> Route:
        """Return the route of some of the rows."""
        return Route(tuple(self.adapters[row] for row in rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What the media of a row are routed to: an adapter, and a projector branch per modality."""

    adapter: str | None
    branches: Mapping[str, str] = field(default_factory=dict)


class Cache(Protocol):
    """Keys and values of the tokens that a decoder has read, one length per row."""

    @property
    def lengths(self) -> Tensor:
        """Tokens held per row, (batch,)."""
        ...

    @property
    def counts(self) -> Sequence[int]:
        """The same as plain numbers, for which no device is asked twice."""
        ...

    @property
    def is_even(self) -> bool:
        """Whether every row holds as many tokens as the others."""
        ...

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's keys and values behind each row's own; return all held."""
        ...

    def advance(self, lengths: Tensor) -> None:
        """Count this call's real tokens, (batch,), once every layer has written."""
        ...


class Cut(Protocol):
    """How processes share the tokens of a sequence, and attend to those that others hold."""

    @property
    def pieces(self) -> int:
        """Runs of neighbouring tokens that a sequence is cut into at most."""
        ...

    def held(self, tokens: int) -> tuple[range, ...]:
        """Return which of so many tokens this process holds, in their order here."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Any, scale: float) -> Tensor:
        """Return attention of this process's queries to all keys; mask: of the whole sequence, with its spans."""
        ...


@dataclass(frozen=True)
class Rotations:
    """Rotary tables of the rows of one call, in place of the model's own: candidates that are compared side by side.

    frequencies: (batch, pairs) radians per token. scale: (batch,) what cos and sin are multiplied by.
    """

    frequencies: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Step:
    """What one decoder call needs besides its embeddings.

    lengths: (batch,) real tokens of this call; what follows them in a row is padding, unless `route.spans` says that
    the rows lie end to end in one sequence.
    long: (batch,) whether a row uses the rotary table for long windows.
    rotations: the rows' own tables, whatever `long` and the config say; None: the config's.
    cut: how processes share the tokens, of which `route.held` are here; None: one process has all.
    """

    lengths: Tensor
    route: Route
    long: Tensor
    cache: Cache | None = None
    rotations: Rotations | None = None
    cut: Cut | None = None


@dataclass(frozen=True)
class Media:
    """One image or sound of a batch: its features and the token span that it fills.

    features: named tensors that the modality's encoder takes (see processing/).
    branch: which projector of the modality is used ("speech" or "vision" for sound).
    row: NOWHERE for an item that no row gets.
    """

    modality: str
    features: Mapping[str, Tensor]
    row: int
    start: int
    tokens: int
    branch: str


@dataclass(frozen=True)
class Batch:
    """Rows of any mix of modalities.

    input_ids: (batch, time), padded on the right. lengths: (batch,). labels: (batch, time) or None, IGNORED =
    untrained.
    """

    input_ids: Tensor
    lengths: Tensor
    route: Route
    media: tuple[Media, ...] = ()
    labels: Tensor | None = None
    samples: tuple[str, ...] = ()  # where each row came from, "SOURCE:NUMBER", for reports and for counting

    @property
    def labelled(self) -> Tensor:
        """Which tokens are predicted by the one before them and train, (batch, time - 1) bool; none without labels."""
        if self.labels is None:
            return torch.zeros_like(self.input_ids[:, 1:], dtype=torch.bool)
        return self.labels[:, 1:] != IGNORED

    def select(self, rows: Sequence[int]) -> Batch:
        """Return a batch of some of the rows, in the order given."""
        index = torch.tensor(list(rows))
        time = int(self.lengths[index].max())
        media = [replace(item, row=new) for new, old in enumerate(rows) for item in self.media if item.row == old]
        return Batch(
            input_ids=self.input_ids[index, :time],
            lengths=self.lengths[index],
            route=self.route.select(rows),
            media=tuple(media),
            labels=None if self.labels is None else self.labels[index, :time],
            samples=tuple(self.samples[row] for row in rows) if self.samples else (),
        )

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """Return the rows of several batches as one; all have labels and samples, or none has."""
        time = max(batch.input_ids.shape[1] for batch in batches)
        starts = accumulate((len(batch.lengths) for batch in batches), initial=0)
        ids, labels = (
            [functional.pad(x, (0, time - x.shape[1]), value=value) for x in found if x is not None]
            for found, value in (([own.input_ids for own in batches], 0), ([own.labels for own in batches], IGNORED))
        )
        return Batch(
            input_ids=torch.cat(ids),
            lengths=torch.cat([batch.lengths for batch in batches]),
            route=Route(tuple(name for batch in batches for name in batch.route.adapters)),
            media=tuple(
                replace(item, row=start + item.row)
                for start, batch in zip(starts, batches, strict=False)
                for item in batch.media
            ),
            labels=torch.cat(labels) if labels else None,
            samples=tuple(sample for batch in batches for sample in batch.samples),
        )

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch with every tensor on the device; the route brings its indices where they are used."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            lengths=self.lengths.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            media=tuple(
                replace(item, features={name: value.to(device) for name, value in item.features.items()})
                for item in self.media
            ),
        )


class Batches(Protocol):
    """The data of a run, step by step; where it stands is a small JSON state."""

    def take(self) -> list[Batch]:
        """Return the micro-batches of the next step, those of this rank; on all ranks none once the data end."""
        ...

    def state(self) -> dict[str, Any]:
        """Return where the data stands after the last step taken, as JSON: counters, and rows carried over."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the next `take` is the one that followed it."""
        ...


def subsampled(frames: int, rate: int = 8) -> int:
    """Return the encoder frames that log-mel frames become; each is one token of sound.

    Three stride-2 convolutions of padding 1 round up, which equals one ceil (arXiv:2503.01743, section 2.2).
    """
    return ceil(frames / rate)


def image_tokens(valid_rows: int, valid_columns: int, side: int) -> int:
    """Return the tokens of an image.

    valid_rows, valid_columns: patches of the crop grid that hold picture, not padding. side: patches along one crop.
    The crops give ceil(rows / 2) lines of ceil(columns / 2) tokens, the global view side / 2 lines of as many; every
    line ends with a separator, and one token stands between the two. For side 32: 273 + R * (C + 1).
    """
    rows, columns, pooled = ceil(valid_rows / 2), ceil(valid_columns / 2), side // 2
    return rows * (columns + 1) + 1 + pooled * (pooled + 1)
