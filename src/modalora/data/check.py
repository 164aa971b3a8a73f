"""Proof that data fit a model, before the model is loaded: every row made, every bad one listed.

Rows of files are all looked at; of sources without end, some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from modalora.config import SourceConfig, source_names
from modalora.contracts import IGNORED
from modalora.data.corpus import Corpus, Passages
from modalora.data.documents import LongRows, ShortRows
from modalora.data.forms import control_tokens
from modalora.data.reader import check_usable, key_of, make_source
from modalora.data.sources import SCORED, Bad, Context, Source, bad_row
from modalora.errors import DataError, InputError
from modalora.processing.processor import Row

DRAWN = 32  # rows of a source without end that are looked at


@dataclass
class Found:
    """What a source holds. shares and lengths are of the good rows."""

    source: str
    read: list[str] = field(default_factory=list)  # each file, its form, and why
    rows: int = 0
    endless: bool = False
    tokens: list[int] = field(default_factory=list)
    trained: int = 0  # tokens with a label
    media: Counter[str] = field(default_factory=Counter)
    truncated: int = 0  # rows that lost turns
    control: int = 0  # rows whose text spells out a control token
    unread: Counter[str] = field(default_factory=Counter)  # fields of records that no form reads -> records
    dropped: int = 0  # tokens of an epoch that are in no row
    left_out: int = 0  # texts or paragraphs that are empty, or of other lengths than are asked for
    bad: list[Bad] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the findings as JSON holds them."""
        lengths = np.array(self.tokens or [0])
        return {
            "source": self.source,
            "read": self.read,
            "rows": self.rows,
            "endless": self.endless,
            "tokens": {"min": int(lengths.min()), "median": int(np.median(lengths)), "max": int(lengths.max())},
            "all_tokens": int(lengths.sum()),
            "trained_share": self.trained / max(1, int(lengths.sum())),
            "media": dict(self.media),
            "truncated": self.truncated,
            "control_tokens": self.control,
            "unread_fields": dict(self.unread),
            "dropped_tokens": self.dropped,
            "texts_left_out": self.left_out,
            "bad": [asdict(bad) for bad in self.bad],
        }


def check_data(context: Context, sources: Sequence[SourceConfig], seed: int = 0) -> list[Found]:
    """Make every row of every source and say what was found; the lengths of files' rows are in the cache then.

    seed: of the run, or SCORED for the sources that it scores.
    Raises ConfigError for a setting that stops a run before its first row.
    """
    found: list[Found] = []
    for place, (name, config) in enumerate(zip(source_names(sources), sources, strict=True)):
        name += " (scored)" * (seed == SCORED)
        try:
            source = make_source(context, config, key_of(seed, place))
        except DataError as error:  # a whole file, or none
            reason, _, mend = str(error).rpartition("; ")
            found.append(Found(name, bad=[Bad(name, "", 0, reason, mend)]))
            continue
        one = Found(name, endless=source.rows is None, rows=DRAWN if source.rows is None else source.rows)
        if isinstance(source, Corpus | Passages):
            one.read = [
                f"{volume.records.path}: {len(volume.records)} records, read as {volume.form} because {volume.because}"
                for volume in source.volumes.files
            ]
        if isinstance(source, ShortRows | LongRows):
            one.dropped, one.left_out = source.dropped, source.left_out
        for number in sorted(range(one.rows), key=source.place):
            _look(one, source, number, context, config.route)
        found.append(one)
    return found


def _look(found: Found, source: Source, number: int, context: Context, route: str | None) -> None:
    sample = f"{found.source}:{number}"
    try:
        measured = source.measure(number)
        row = source.row(number)
        check_row(row, measured)
        check_usable(row, route, context)
        context.suits([(item.modality, item.features) for item in row.media])
        if isinstance(source, Corpus):
            record = source.record(number)
            messages, dropped = source.conversation(record)
            found.truncated += dropped > 0
            found.control += bool(control_tokens(messages))
            found.unread.update(source.unread(record))
    except InputError as error:
        found.bad.append(bad_row(error, sample, source, number))
        return
    found.tokens.append(len(row.ids))
    found.trained += sum(label != IGNORED for label in row.labels[1:])
    found.media.update(item.modality for item in row.media)


def check_row(row: Row, measured: int | None) -> None:
    """Check that the length and media spans of a row are whole. Raises DataError."""
    if measured is not None and measured != len(row.ids):
        raise DataError(f"its media's headers promise {measured} tokens and it has {len(row.ids)}; remove the cache")
    for item in row.media:
        place = slice(item.start, item.start + item.tokens)
        span = row.ids[place]
        if len(span) != item.tokens or len(set(span)) != 1 or any(label != IGNORED for label in row.labels[place]):
            raise DataError(
                f"the span of its {item.modality} at token {item.start} is not whole; report this with the record"
            )
