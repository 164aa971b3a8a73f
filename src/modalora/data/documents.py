"""Whole documents for training on two windows at once (LongRoPE2, arXiv:2502.20082, section 3.3).

Short rows are documents, each a row of its own; long rows are documents laid end to end and cut into rows of exactly
one length. A document stands between two <|endoftext|>, which begin and end it, as in Phi-4's pretraining. What lands
in no row is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from modalora.contracts import Message
from modalora.data.order import shuffled
from modalora.data.sources import Key, Place
from modalora.errors import ConfigError, DataError
from modalora.processing.processor import Row
from modalora.processing.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Shelf:
    """Documents in arrays of ids, without their marks.

    streams: ids. places: (documents, 3): which stream, where a document begins there, and where it ends.
    left_out: texts, or paragraphs, that are no document, and dropped: their tokens.
    """

    streams: Sequence[np.ndarray]
    places: np.ndarray
    left_out: int = 0
    dropped: int = 0

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens of each document with both its marks."""
        return self.places[:, 2] - self.places[:, 1] + 2

    def within(self, least: int, most: int) -> Shelf:
        """Return the documents of so many tokens, marks included."""
        fit = (self.sizes >= least) & (self.sizes <= most)
        left_out, dropped = int((~fit).sum()), int((self.sizes[~fit] - 2).sum())
        return Shelf(self.streams, self.places[fit], self.left_out + left_out, self.dropped + dropped)

    def ids(self, document: int, mark: int) -> np.ndarray:
        """Return a document between its marks."""
        stream, start, stop = self.places[document]
        inner = np.asarray(self.streams[stream][start:stop], dtype=np.int64)
        return np.concatenate(([mark], inner, [mark]))


def passages(stream: np.ndarray, tokenizer: TextTokenizer, mark: int, most: int) -> Shelf:
    """Return runs of whole paragraphs of the texts of a stream, as long as `most` tokens allow, marks included.

    stream: ids of texts that end with `mark`. A paragraph that is longer alone is left out.
    """
    ends = np.flatnonzero(_ends_paragraph(stream, tokenizer) | (stream == mark))
    starts = np.concatenate(([0], ends[:-1] + 1))
    places: list[tuple[int, int, int]] = []
    taken: tuple[int, int] | None = None  # the paragraphs of the next passage so far
    left_out = dropped = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        closes = stream[end] == mark
        stop = end if closes else end + 1  # the mark itself is no part of a text
        if taken and stop - taken[0] > most - 2:
            places.append((0, *taken))
            taken = None
        if start < stop <= start + most - 2:
            taken = (taken[0] if taken else start, stop)
        elif start < stop:
            left_out, dropped = left_out + 1, dropped + stop - start
        if closes and taken:
            places.append((0, *taken))
            taken = None
    return Shelf([stream], np.array(places, dtype=np.int64).reshape(-1, 3), left_out, dropped)


def texts(stream: np.ndarray, mark: int) -> Shelf:
    """Return the texts of a stream, each of which ends with `mark`."""
    ends = np.flatnonzero(stream == mark)
    starts = np.concatenate(([0], ends[:-1] + 1))
    places = np.stack((np.zeros_like(ends), starts, ends), axis=1)
    return Shelf([stream], places[ends > starts])


def _ends_paragraph(stream: np.ndarray, tokenizer: TextTokenizer) -> np.ndarray:
    """Tell of each id whether an empty line ends with it: in the token itself, or with the one before."""
    ending = np.zeros(tokenizer.vocab_size, dtype=np.int8)  # newlines at the end of each token, two at most
    only = np.zeros(tokenizer.vocab_size, dtype=bool)  # tokens of newlines alone
    for number in range(tokenizer.vocab_size):
        text = tokenizer.decode([number])
        ending[number] = min(2, len(text) - len(text.rstrip("\n")))
        only[number] = bool(text) and not text.strip("\n")
    own = ending[stream]
    before = np.concatenate(([0], own[:-1]))
    return (own == 2) | (only[stream] & (own + before >= 2))


@dataclass(frozen=True)
class ShortRows:
    """Every document a row; each epoch has an order of its own."""

    shelf: Shelf
    mark: int
    key: Key

    def __post_init__(self) -> None:
        if not len(self.shelf.places):
            raise DataError("no document has the asked length; give other texts, or another window")

    @property
    def left_out(self) -> int:
        """Documents that are too long or too short, and texts that are none."""
        return self.shelf.left_out

    @property
    def dropped(self) -> int:
        """Tokens of what is left out."""
        return self.shelf.dropped

    @property
    def rows(self) -> int:
        """Documents of an epoch."""
        return len(self.shelf.places)

    def _document(self, number: int) -> int:
        epoch, place = divmod(number, self.rows)
        return shuffled(place, self.rows, (*self.key, epoch))

    def measure(self, number: int) -> int:
        """Return the tokens of a row."""
        return int(self.shelf.sizes[self._document(number)])

    def row(self, number: int) -> Row:
        """Return a row, all of it trained."""
        ids = self.shelf.ids(self._document(number), self.mark).tolist()
        return Row(ids=ids, labels=list(ids))

    def messages(self, number: int) -> Sequence[Message] | None:
        """Return None: text is no conversation."""
        return None

    def place(self, number: int) -> Place:
        """Return no place."""
        return Place()


@dataclass(frozen=True)
class LongRows:
    """Documents laid end to end, in an order drawn once, and cut into rows of exactly `window` tokens."""

    shelf: Shelf
    window: int
    mark: int
    key: Key

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError(
                f"all documents together have {int(self.shelf.sizes.sum())} tokens, and one row {self.window}; give "
                "more text, or a smaller window"
            )

    @cached_property
    def _order(self) -> np.ndarray:
        return np.random.default_rng((*self.key, 3)).permutation(len(self.shelf.places))

    @cached_property
    def _ends(self) -> np.ndarray:
        return self.shelf.sizes[self._order].cumsum()

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return int(self.shelf.sizes.sum()) // self.window

    @property
    def left_out(self) -> int:
        """Documents that are too long or too short, and texts that are none."""
        return self.shelf.left_out

    @property
    def dropped(self) -> int:
        """Tokens of what is left out, and those of an epoch that fill no whole row."""
        return self.shelf.dropped + int(self.shelf.sizes.sum()) % self.window

    def measure(self, number: int) -> int:
        """Return the tokens of a row."""
        return self.window

    def row(self, number: int) -> Row:
        """Return a row, all of it trained."""
        epoch, place = divmod(number, self.rows)
        start = shuffled(place, self.rows, (*self.key, epoch)) * self.window
        at = int(np.searchsorted(self._ends, start, side="right"))
        skip = start - int(self._ends[at] - self.shelf.sizes[self._order[at]])
        ids: list[int] = []
        while len(ids) < self.window:
            ids += self.shelf.ids(int(self._order[at]), self.mark)[skip:].tolist()
            at, skip = at + 1, 0
        ids = ids[: self.window]
        return Row(ids=ids, labels=list(ids))

    def messages(self, number: int) -> Sequence[Message] | None:
        """Return None: text is no conversation."""
        return None

    def place(self, number: int) -> Place:
        """Return no place."""
        return Place()


def open_rows(shelf: Shelf, kind: str, window: int, least: int, most: int, mark: int, key: Key) -> ShortRows | LongRows:
    """Return rows of the documents of least .. most tokens (most 0: any for long rows, the window for short ones).

    kind: "short" or "long". Raises ConfigError, DataError.
    """
    if kind not in ("short", "long"):
        raise ConfigError(f"rows={kind!r} of a source of documents must be short or long")
    if kind == "short" and most > window:
        raise ConfigError(f"most={most} tokens of a short row exceed its window={window}; lower most, or leave it out")
    upper = most or (window if kind == "short" else 1 << 62)
    if not 3 <= least <= upper:
        raise ConfigError(f"least={least} and most={upper}: documents have 3 tokens or more, and least is the smaller")
    chosen = shelf.within(least, upper)
    return ShortRows(chosen, mark, key) if kind == "short" else LongRows(chosen, window, mark, key)
