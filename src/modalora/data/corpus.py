"""The sources "files", conversations of data files or windows of their plain text, and "documents", whole texts.

Each epoch has an order of its own, shuffled by the seed of the run. Token lengths are kept in the cache as they become
known.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from modalora.contracts import Message
from modalora.data.documents import LongRows, Shelf, ShortRows, open_rows, passages, texts
from modalora.data.files import Fields, Records, Tar, cached, find_files, open_records
from modalora.data.forms import FORMS, Options, detect, read_record, read_text, renamed
from modalora.data.order import shuffled
from modalora.data.sources import SCORED, Context, Key, Place, check_window
from modalora.data.text import token_stream
from modalora.disk import drafted
from modalora.errors import ConfigError, DataError, InputError, PromptError, listed
from modalora.processing.processor import Row
from modalora.processing.tokenizer import END_OF_TEXT

Truncate = Literal["messages"]
LISTED = 3  # broken records of a file that has no others
SAMPLED = 64  # records of a file, evenly spread, whose form is looked at


@dataclass(frozen=True)
class Volume:
    """One data file: its records, how they are read, and why so."""

    records: Records
    form: str
    because: str
    options: Options


def open_corpus(
    context: Context,
    key: Key,
    path: str | Sequence[str],
    form: str = "auto",
    split: str | None = None,
    media_root: str | None = None,
    rename: Mapping[str, str] | None = None,
    prompt: str = "",
    tags: bool = True,
    truncate: Truncate | None = None,
    shuffle: bool = True,
    held_out: float = 0.0,
) -> Corpus | Passages:
    """Return the rows of data files.

    path: files or patterns. form: a name of forms.FORMS, or auto. split: of a folder of `datasets`. media_root: the
    folder that media paths are relative to and may not leave; by default the data file's. rename: field in the file ->
    field that the form knows. prompt: what is asked of a picture or sound that comes with a caption. tags: whether
    <image> and <audio> in texts stand for media. truncate: "messages" drops whole turns from the end of a conversation
    that is too long; by default it is a bad row. shuffle: whether rows come in another order each epoch.
    held_out: share of the rows that only a key of SCORED gives, the last ones where they are not shuffled.
    Raises ConfigError, DataError.
    """
    if form not in ("auto", *FORMS):
        raise ConfigError(f"form={form!r} must be auto or one of {', '.join(FORMS)}")
    if truncate is not None and truncate not in get_args(Truncate):
        raise ConfigError(f"truncate={truncate!r} must be 'messages', or left out")
    volumes: list[Volume] = []
    typed = "" if key[0] == SCORED else f"mixture.{key[1]}.options."  # which a scored source does not know
    for file in find_files(path):
        root = Path(media_root) if media_root else file if file.is_dir() else file.parent
        options = Options(root, dict(rename or {}), prompt, tags, context.processor.further, typed)
        volumes.append(_open_volume(file, context.cache, form, split, options))
    texts = [volume for volume in volumes if volume.form == "text"]
    if texts and len(texts) < len(volumes):
        raise DataError(
            f"{texts[0].records.path} is plain text and other files of this source are not; give each kind a source"
        )
    if texts:
        return Passages(context, Volumes(key, volumes, shuffle, held_out))
    return Corpus(context, Volumes(key, volumes, shuffle, held_out), truncate)


def open_documents(
    context: Context,
    key: Key,
    rows: str,
    path: str | Sequence[str] | None = None,
    split: str | None = None,
    least: int = 3,
    most: int = 0,
) -> ShortRows | LongRows:
    """Return rows of whole texts, for training on two windows at once (data/documents.py).

    rows: "short", a text of at most the source's window each, or "long", texts end to end, cut into rows of exactly the
    window. path: files whose records are texts, all of which must be readable; without it the books of a split, of
    which short rows take runs of whole paragraphs. split: of the books (train, unless told otherwise), or of a folder
    of `datasets`. least, most: tokens of the texts that are taken. Raises ConfigError, DataError.
    """
    tokenizer, window = context.processor.tokenizer, context.window
    mark = tokenizer.control(END_OF_TEXT)
    if path is None:
        stream = token_stream(context.folder, split or "train", tokenizer, context.cache)
        upper = min(window, most) if most else window
        shelf = passages(stream, tokenizer, mark, upper) if rows == "short" else texts(stream, mark)
        return open_rows(shelf, rows, window, least, most, mark, key)
    streams: list[np.ndarray] = []
    places: list[np.ndarray] = []
    left_out = 0
    for number, file in enumerate(find_files(path)):
        volume = _open_volume(file, context.cache, "text", split if file.is_dir() else None, Options(file.parent))
        ids, sizes = _tokenised(volume, context)
        unread = np.flatnonzero(sizes == 0).tolist()
        left_out += _only_empty(unread, volume)
        stops = sizes.cumsum() - 1  # a text ends with the mark
        found = np.stack((np.full_like(stops, number), stops - sizes + 1, stops), axis=1)
        streams.append(ids)
        places.append(found[sizes > 1])
    return open_rows(Shelf(streams, np.concatenate(places), left_out), rows, window, least, most, mark, key)


def _only_empty(unread: Sequence[int], volume: Volume) -> int:
    """Return how many texts are empty. Raises DataError when other records could not be read."""
    wrong = [number for number in unread if not _is_empty(volume, number)]
    if not wrong:
        return len(unread)
    records = volume.records
    try:
        read_text(records.read(wrong[0]), volume.options)
        reason = "it could not be read before, and can be now"
    except InputError as error:
        reason = str(error)
    raise DataError(
        f"{records.path}: {len(wrong)} of {len(records)} records cannot be read, the first in {records.unit} "
        f"{records.line(wrong[0])}: {reason}; mend them, or take them out"
    )


def _is_empty(volume: Volume, number: int) -> bool:
    try:
        return renamed(volume.records.read(number), volume.options).get("text") == ""
    except DataError:
        return False


def _open_volume(file: Path, cache: Path, form: str, split: str | None, options: Options) -> Volume:
    records = open_records(file, cache, split)
    if not len(records):
        raise DataError(f"{file} holds no record; leave it out")
    if form != "auto":
        return Volume(records, form, f"form={form} was asked for", options)
    sample, broken = _sample(records)
    if not sample:
        told = listed([f"{records.unit} {line}: {error.rpartition('; ')[0]}" for line, error in broken], LISTED, ", ")
        raise DataError(f"{file} holds no record that can be read: {told}; {broken[0][1].rpartition('; ')[2]}")
    try:
        found, because = detect(sample, options)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    return Volume(records, found, f"its records have {because}", options)


def _sample(records: Records) -> tuple[dict[str, Fields], list[tuple[int, str]]]:
    """Return some records by their place, evenly spread, and the lines of those that cannot be read, with errors."""
    found: dict[str, Fields] = {}
    broken: list[tuple[int, str]] = []
    for number in np.linspace(0, len(records) - 1, min(SAMPLED, len(records))).astype(int).tolist():
        try:
            key = f", key {records.key(number)}" if isinstance(records, Tar) else ""
            found[f"{records.unit} {records.line(number)}{key}"] = records.read(number)
        except DataError as error:  # it says nothing about the others, and is reported where it is used
            broken.append((records.line(number), str(error)))
    return found, broken


_SIDES = (SCORED,)  # key of the order that tells which rows are held out: in every run and stage the same


class Volumes:
    """Several files in one numbering, what is held out of it, and the order of each epoch."""

    def __init__(self, key: Key, volumes: Sequence[Volume], shuffle: bool, held_out: float) -> None:
        self.key, self.files, self.shuffle, self.held_out = key, tuple(volumes), shuffle, held_out
        self._starts = np.cumsum([0, *(len(volume.records) for volume in volumes)])

    @property
    def records(self) -> int:
        """How many records the files hold."""
        return int(self._starts[-1])

    def find(self, record: int) -> tuple[int, int]:
        """Return the place of a record's file, and its number there."""
        volume = bisect_right(self._starts, record) - 1
        return volume, record - int(self._starts[volume])

    def read(self, record: int) -> tuple[Volume, Fields]:
        """Return a record with its file. Raises DataError."""
        place, inner = self.find(record)
        return self.files[place], self.files[place].records.read(inner)

    def side(self, rows: int) -> range:
        """Return the places of those of so many rows that are trained on, or scored. Raises ConfigError for none."""
        if not self.held_out:
            return range(rows)
        trained = rows - max(1, round(rows * self.held_out))
        if trained < 1:
            raise ConfigError(
                f"held_out={self.held_out:g} of the {rows} rows in {self.files[0].records.path} leaves none to train "
                "on; lower it, or give more rows"
            )
        return range(trained, rows) if self.key[0] == SCORED else range(trained)

    def ordered(self, number: int, rows: int) -> int:
        """Return which of so many rows the run's row of a number is."""
        side = self.side(rows)
        epoch, place = divmod(number, len(side))
        if not self.shuffle:
            return side[place]
        place = side[shuffled(place, len(side), (*self.key, epoch))]
        return shuffled(place, rows, _SIDES) if self.held_out else place

    def place(self, record: int) -> Place:
        """Return where a record stands."""
        place, inner = self.find(record)
        records = self.files[place].records
        return Place(str(records.path), records.line(inner), records.key(inner) if isinstance(records, Tar) else "")


class Corpus:
    """Conversations, a row per record."""

    def __init__(self, context: Context, volumes: Volumes, truncate: Truncate | None) -> None:
        """volumes: what open_corpus found in the files."""
        self.volumes = volumes
        self._setting = volumes.files[0].options.setting
        self.processor, self.truncate = context.processor, truncate
        self.most = min(filter(None, (context.most, context.processor.window)))
        self.rows: int = len(volumes.side(volumes.records))
        self._lengths = _lengths(context, volumes.files, f"{truncate} {self.most}", volumes.records)

    def record(self, number: int) -> int:
        """Return the record that a row is made of."""
        return self.volumes.ordered(number, self.volumes.records)

    def measure(self, number: int) -> int:
        """Return the tokens of a row, from the cache, or from texts and headers of media. Raises InputError."""
        record = self.record(number)
        if not self._lengths[record]:
            tokens = self.processor.measure(self.conversation(record)[0], answer=False)
            if tokens > self.most:
                raise PromptError(
                    f"{'its first question and answer are' if self.truncate else 'it is'} {tokens} tokens, and a row "
                    f"has at most {self.most}; shorten it, give fewer or smaller media"
                    + ("" if self.truncate else f", or set {self._setting}truncate=messages to drop turns from its end")
                )
            self._lengths[record] = tokens
        return int(self._lengths[record])

    def row(self, number: int) -> Row:
        """Return a row. Raises InputError for a bad record."""
        return self.processor.row(self.conversation(self.record(number))[0], answer=False)

    def messages(self, number: int) -> Sequence[Message]:
        """Return the conversation that a row is made of."""
        return self.conversation(self.record(number))[0]

    def place(self, number: int) -> Place:
        """Return where a row comes from."""
        return self.volumes.place(self.record(number))

    def conversation(self, record: int) -> tuple[list[dict[str, Any]], int]:
        """Return a record as messages, cut where that is asked for, and how many messages were cut off."""
        volume, fields = self.volumes.read(record)
        messages = read_record(fields, volume.form, volume.options)
        if self.truncate is None:
            return messages, 0
        kept = self._fitting(messages)
        if not any(message["role"] == "assistant" and message.get("loss", True) for message in messages[:kept]):
            raise DataError(
                f"cut to fit {self.most} tokens it has no answer left that is trained; shorten it, or drop the record"
            )
        return messages[:kept], len(messages) - kept

    def unread(self, record: int) -> list[str]:
        """Return the fields of a record that its form does not read."""
        volume, fields = self.volumes.read(record)
        own = {name: before for before, name in volume.options.rename.items()}
        return [own.get(name, name) for name in FORMS[volume.form].unread(renamed(fields, volume.options))]

    def _fitting(self, messages: Sequence[Message]) -> int:
        """Return how many messages from the start, up to an answer, fit; media are kept or dropped with theirs."""

        def too_long(count: int) -> bool:
            return self.processor.measure(messages[:count], answer=False) > self.most

        if not too_long(len(messages)):
            return len(messages)
        ends = [place for place, message in enumerate(messages, start=1) if message["role"] == "assistant"]
        fitting = bisect_left(ends, True, key=too_long)
        return ends[fitting - 1] if fitting else ends[0]  # not even one pair fits: the row is refused by its length


def _lengths(context: Context, volumes: Sequence[Volume], how: str, rows: int) -> np.ndarray:
    """Return tokens per record, 0 = not known yet; a file of the cache that all processes write known lengths to."""
    made = context.processor
    parts: list[Any] = [made.tokenizer.definition, made.window, made.chat, how]
    parts += [(name, medium.settings) for name, medium in sorted(made.media.items())]
    for volume in volumes:
        status = volume.records.path.stat()
        parts += [
            volume.records.path.resolve(),
            volume.records.identity,
            status.st_size,
            status.st_mtime_ns,
            volume.form,
            asdict(replace(volume.options, setting="")),  # where the source stands in a recipe changes no length
        ]
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    target = context.cache / "files" / f"lengths-{digest}.npy"
    if not target.exists():
        with drafted(target) as draft:
            np.save(draft, np.zeros(rows, dtype=np.int32))
    return np.load(target, mmap_mode="r+")


class Passages:
    """Windows of plain text. Each document ends with <|endoftext|>; no window reaches into the next."""

    def __init__(self, context: Context, volumes: Volumes) -> None:
        """volumes: what open_corpus found in the files."""
        self.volumes = volumes
        self.processor = context.processor
        check_window(context)
        self.window = min(filter(None, (context.window, context.most)))
        self._ids, sizes = zip(*(_tokenised(volume, context) for volume in volumes.files), strict=True)
        self._sizes = np.concatenate(sizes)  # tokens per record, 0 for one that cannot be read
        self._starts = [np.cumsum([0, *own]) for own in sizes]
        windows = np.maximum(1, -(-self._sizes // self.window))  # of nearly one length each
        self._windows = np.concatenate(([0], np.cumsum(windows)))
        self.rows: int = len(volumes.side(int(self._windows[-1])))

    def _find(self, number: int) -> tuple[int, int]:
        """Return record and window of a row."""
        place = self.volumes.ordered(number, int(self._windows[-1]))
        record = int(np.searchsorted(self._windows, place, side="right")) - 1
        return record, place - int(self._windows[record])

    def _cut(self, record: int, window: int) -> tuple[int, int]:
        """Return where in its text a window begins and ends, in tokens. Raises InputError for an unreadable record."""
        size = int(self._sizes[record])
        if not size:
            volume, fields = self.volumes.read(record)
            self.processor.tokenizer.encode(read_text(fields, volume.options))
            raise DataError("it could not be read before and can be now; remove the cache")
        count = int(self._windows[record + 1] - self._windows[record])
        return size * window // count, size * (window + 1) // count

    def measure(self, number: int) -> int:
        """Return the tokens of a window. Raises InputError for a record that cannot be read."""
        start, stop = self._cut(*self._find(number))
        return stop - start

    def row(self, number: int) -> Row:
        """Return a window, all of it trained. Raises InputError for a record that cannot be read."""
        record, window = self._find(number)
        start, stop = self._cut(record, window)
        place, inner = self.volumes.find(record)
        base = int(self._starts[place][inner])
        ids = self._ids[place][base + start : base + stop].tolist()
        return Row(ids=ids, labels=list(ids))

    def messages(self, number: int) -> None:
        """Return None: text is no conversation."""
        return

    def place(self, number: int) -> Place:
        """Return where a window comes from."""
        return self.volumes.place(self._find(number)[0])


def _tokenised(volume: Volume, context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all texts of a file one after the other, mapped from the cache, and the tokens of each."""
    tokenizer = context.processor.tokenizer
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    how = f"{hashlib.sha256(tokenizer.definition.encode()).hexdigest()[:12]}{_renaming(volume.options)}"
    if volume.records.identity:
        how += hashlib.sha256(volume.records.identity.encode()).hexdigest()[:8]

    def write(path: Path, target: Path) -> None:
        end = tokenizer.control(END_OF_TEXT)
        sizes = np.zeros(len(volume.records), dtype=np.int64)
        with target.open("wb") as file:
            for number in range(len(volume.records)):
                try:
                    ids = [*tokenizer.encode(read_text(volume.records.read(number), volume.options)), end]
                except InputError:  # reported where the row is used
                    continue
                sizes[number] = len(ids)
                file.write(np.array(ids, dtype=kind).tobytes())
            file.write(sizes.tobytes())

    path = cached(volume.records.path, context.cache, f".{how}.ids", write)
    count = len(volume.records)
    tokens = (path.stat().st_size - 8 * count) // np.dtype(kind).itemsize
    ids = np.memmap(path, dtype=kind, mode="r", shape=(tokens,)) if tokens else np.zeros(0, dtype=kind)
    return ids, np.fromfile(path, dtype=np.int64, offset=path.stat().st_size - 8 * count)


def _renaming(options: Options) -> str:
    return hashlib.sha256(repr(sorted(options.rename.items())).encode()).hexdigest()[:6] if options.rename else ""
