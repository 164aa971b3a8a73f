"""Records of data files by number: JSON, Parquet, WebDataset tar, plain text, Hugging Face datasets.

A file is indexed once and never held in memory. Indices, and copies of what cannot be entered in the middle (gzip,
Parquet), lie in the cache; their names hold size and time of the file, so a changed file is indexed anew.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import escape, glob
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from modalora.errors import DataError

MOST_BYTES = 64_000_000  # of one record: pictures may be inside, as base64
MOST_DEPTH = 100  # of nested JSON; far below Python's own limit, so that it never depends on who reads
MOST_GROWTH = 200  # times that a gzip file may grow; JSON grows about 5 to 30 times
CHUNK = 1 << 22
IMAGES = frozenset("jpg jpeg png webp gif bmp tif tiff ppm jp2 avif".split())
SOUNDS = frozenset("wav flac mp3 ogg opus".split())

Fields = dict[str, Any]


class Records(Protocol):
    """Records of one file."""

    path: Path
    unit: str  # what `line` counts: "line", "row" or "record"

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def read(self, number: int) -> Fields:
        """Return one record. Raises DataError when it cannot be read."""
        ...

    def line(self, number: int) -> int:
        """Return where in the file it stands, counted from 1."""
        ...


def find_files(path: str | Sequence[str]) -> list[Path]:
    """Return the files and folders that paths and patterns (*, ?, **) name, sorted. Raises DataError for none."""
    found: list[Path] = []
    for one in [path] if isinstance(path, str) else path:
        matches = sorted(glob(one, recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
        if not matches:
            raise DataError(f"path: {one!r} matches no file (seen from {str(Path.cwd())!r}); give files or patterns")
        found += [Path(match) for match in matches]
    return found


def open_records(path: Path, cache: Path, split: str | None = None) -> Records:
    """Return the records of a file, by its name's ending; of a folder, as a dataset that `datasets` saved.

    split: of a folder that holds several. Raises DataError when the file is of no such kind, damaged or cut short.
    """
    if path.is_dir():
        return Saved(path, cache, split)
    if split is not None:
        raise DataError(f"{path}: split={split!r} is for folders that `datasets` saved; leave it out")
    if not path.is_file():
        raise DataError(f"{path} does not exist (seen from {str(Path.cwd())!r}); give a data file")
    name = path.name.lower()
    plain = path
    if name.endswith((".gz", ".tgz")):
        name = name.removesuffix(".gz").replace(".tgz", ".tar")
        plain = cached(path, cache, "." + name.rpartition(".")[2], gunzip)
    if name.endswith((".jsonl", ".ndjson")) or (name.endswith(".json") and _first_byte(plain) != b"["):
        return Lines(path, plain, cached(path, cache, ".lines.npy", index_lines, plain))
    if name.endswith(".json"):
        return Lines(path, plain, cached(path, cache, ".array.npy", index_array, plain))
    if name.endswith(".tar"):
        members = cached(path, cache, ".members.jsonl", index_tar, plain)
        return Tar(path, plain, Lines(path, members, cached(path, cache, ".members.npy", index_lines, members)))
    if name.endswith(".parquet"):
        return Rows(path, cached(path, cache, ".arrow", unpack_parquet))
    if name.endswith(".txt"):
        return Document(path, plain)
    raise DataError(
        f"{path} is of no kind that is read; give .jsonl, .json, .parquet, .tar or .txt (each may end in .gz), or a "
        "folder of `datasets`"
    )


def cached(path: Path, cache: Path, ending: str, make: Callable[[Path, Path], None], plain: Path | None = None) -> Path:
    """Return the file that `make(plain or path, draft)` writes, from the cache where it holds it for this `path`.

    plain: an unpacked copy of path. Raises DataError when path is written to meanwhile.
    """
    before = path.stat()
    stem = f"{path.name[:40]}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    target = cache / "files" / f"{stem}-{before.st_size}-{before.st_mtime_ns}{ending}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.stem}.{os.getpid()}.draft{target.suffix}")
    try:
        make(plain or path, draft)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DataError(f"{path} was written to while it was indexed; try again when it is complete")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    for old in target.parent.glob(f"{escape(stem)}-*{ending}"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


# ------------------------------------------------------------------------------------------------------- JSON


def parse_json(data: bytes) -> Fields:
    """Return one record of JSON. Raises DataError with the reason and what to do."""
    if b"\0" in data:
        raise DataError("it holds NUL bytes, which JSON has not; save the file as UTF-8 (it may be UTF-16 or binary)")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from None
    if text.startswith("\ufeff"):
        raise DataError("it starts with a byte order mark; files were joined: remove the mark")
    try:
        fields = json.loads(text)
    except RecursionError:
        raise DataError(f"it is nested deeper than {MOST_DEPTH}; flatten it") from None
    except ValueError as error:
        raise DataError(f"it is not JSON ({error}); write one JSON object per record") from None
    if data.count(b"[") + data.count(b"{") > MOST_DEPTH and _depth(fields) > MOST_DEPTH:
        raise DataError(f"it is nested deeper than {MOST_DEPTH}; flatten it")
    if not isinstance(fields, dict):
        raise DataError(f"it is a JSON {type(fields).__name__}, not an object; write records as {{...}}")
    return fields


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if depth > MOST_DEPTH:
            break
    return depth


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head[:1]


class Document:
    """A text file, which is one record."""

    unit = "record"

    def __init__(self, path: Path, plain: Path) -> None:
        """path: what messages name. plain: the file that is read."""
        self.path, self.plain = path, plain

    def __len__(self) -> int:
        """Return 1."""
        return 1

    def read(self, number: int) -> Fields:
        """Return the text. Raises DataError when it is too long or not UTF-8."""
        size = self.plain.stat().st_size
        if size > MOST_BYTES:
            raise DataError(
                f"it has {size:,} bytes, and at most {MOST_BYTES:,} are read; split it, or write JSON lines"
            )
        try:
            return {"text": self.plain.read_bytes().decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise DataError(f"it is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from None

    def line(self, number: int) -> int:
        """Return where it starts."""
        return 1


class Lines:
    """JSON records of a text file. Index: offset in bytes, length in bytes, line, for each."""

    unit = "line"

    def __init__(self, path: Path, plain: Path, index: Path) -> None:
        """path: what messages name. plain: the file that is read."""
        self.path, self.plain = path, plain
        self.index = np.load(index, mmap_mode="r")

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.index)

    def read(self, number: int) -> Fields:
        """Return one record. Raises DataError when it cannot be read."""
        offset, size, _ = (int(value) for value in self.index[number])
        if size > MOST_BYTES:
            raise DataError(
                f"it has {size:,} bytes, and at most {MOST_BYTES:,} are read; keep media in files of their own"
            )
        with self.plain.open("rb") as file:
            file.seek(offset)
            return parse_json(file.read(size).strip())

    def line(self, number: int) -> int:
        """Return its line, counted from 1."""
        return int(self.index[number, 2])


def _chunks(file: BufferedReader) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def index_lines(path: Path, target: Path) -> None:
    """Write the index of the lines that are not blank."""
    ends: list[np.ndarray] = []
    blank: list[int] = []  # ends of lines of white space alone
    base, tail = 0, True  # tail: only white space since the last line's end
    with path.open("rb") as file:
        for chunk in _chunks(file):
            found = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
            ends.append(found + base)
            start = 0
            for end in found.tolist():
                if end - start < 64 and tail and not chunk[start:end].strip():
                    blank.append(base + end)
                tail, start = True, end + 1
            tail = tail and not chunk[start:].strip()
            base += len(chunk)
    stops = np.concatenate([*ends, np.array([] if tail else [base], dtype=np.int64)]).astype(np.int64)
    starts = np.concatenate(([0], stops[:-1] + 1)).astype(np.int64)[: len(stops)]
    if len(starts) and _starts_with_mark(path):
        starts[0] = 3
    index = np.stack((starts, stops - starts, np.arange(1, len(stops) + 1)), axis=1)
    np.save(target, index[~np.isin(stops, blank)])


def _starts_with_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == b"\xef\xbb\xbf"


_OUTSIDE, _INSIDE = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')


def index_array(path: Path, target: Path) -> None:
    """Write the index of the elements of a JSON array. Raises DataError when it does not end."""
    index: list[tuple[int, int, int]] = []
    depth, in_string, ended = 0, False, False
    base, line, start, start_line, skip = 0, 1, -1, 1, False
    with path.open("rb") as file:
        for chunk in _chunks(file):
            at = counted = int(skip)
            skip = False
            while match := (_INSIDE if in_string else _OUTSIDE).search(chunk, at):
                at, mark = match.end(), match[0]
                if mark == b'"':
                    in_string = not in_string
                elif mark == b"\\":
                    skip = at == len(chunk)
                    at += 1
                elif mark in b"[{":
                    depth += 1
                    if depth == 1:
                        if ended or mark != b"[":
                            raise DataError(f"{path} goes on behind its JSON array; keep one array per file")
                        start = base + at
                elif mark in b"]}":
                    depth -= 1
                if mark in (b",", b"]") and depth == (1 if mark == b"," else 0):
                    line += chunk.count(b"\n", counted, at)
                    counted = at
                    index.append((start, base + at - 1 - start, start_line))
                    start, start_line = base + at, line
                    ended = depth == 0
            line += chunk.count(b"\n", min(counted, len(chunk)))
            base += len(chunk)
    if not ended:
        raise DataError(f"{path}: its JSON array does not end, the file is cut short; copy or export it again")
    table = np.array(index, dtype=np.int64).reshape(-1, 3)
    np.save(target, _without_space(path, table))


def _without_space(path: Path, table: np.ndarray) -> np.ndarray:
    """Let every element begin at its first byte that is no white space, and drop the nothing of an empty array."""
    with path.open("rb") as file:
        for row in table:
            file.seek(int(row[0]))
            head = file.read(min(int(row[1]), 4096))
            space = len(head) - len(head.lstrip())
            row[0] += space
            row[1] -= space
            row[2] += head[:space].count(b"\n")
    return table[:0] if len(table) == 1 and table[0, 1] == 0 else table


def gunzip(path: Path, target: Path) -> None:
    """Write a gzip file unpacked. Raises DataError when it is damaged, cut short, or grows out of all measure."""
    most = MOST_GROWTH * path.stat().st_size + MOST_BYTES
    try:
        with gzip.open(path, "rb") as packed, target.open("wb") as plain:
            while chunk := packed.read(CHUNK):
                if plain.tell() > most:
                    raise DataError(f"{path} grows to more than {MOST_GROWTH} times its size; unpack it by hand")
                plain.write(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut short ({error}); copy or export it again") from None


# ---------------------------------------------------------------------------------------------------- Parquet


class Rows:
    """Rows of a table, mapped from an Arrow file."""

    unit = "row"

    def __init__(self, path: Path, table: Path) -> None:
        """path: what messages name. table: the Arrow file that is read."""
        arrow = _arrow()
        self.path = path
        self._file = arrow.ipc.open_file(arrow.memory_map(str(table)))
        sizes = [self._file.get_batch(number).num_rows for number in range(self._file.num_record_batches)]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        """Return how many there are."""
        return int(self._starts[-1])

    def read(self, number: int) -> Fields:
        """Return one row. Raises DataError when it cannot be read."""
        batch = bisect_right(self._starts, number) - 1
        try:
            (fields,) = self._file.get_batch(batch).slice(number - int(self._starts[batch]), 1).to_pylist()
        except ValueError as error:  # text that is no UTF-8
            raise DataError(f"it cannot be read ({error}); write the table anew") from None
        return fields

    def line(self, number: int) -> int:
        """Return its row, counted from 1."""
        return number + 1


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError("Parquet files need pyarrow; pip install 'modalora[train]'") from None
    return pyarrow


def unpack_parquet(path: Path, target: Path) -> None:
    """Write a Parquet file as Arrow, row group after row group: rows of it can be read singly."""
    arrow = _arrow()
    try:
        table = arrow.parquet.ParquetFile(path)
        with arrow.OSFile(str(target), "wb") as sink, arrow.ipc.new_file(sink, table.schema_arrow) as writer:
            for batch in table.iter_batches(batch_size=64):
                writer.write_batch(batch)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole Parquet file ({error}); copy or export it again") from None


# ------------------------------------------------------------------------------------------------- WebDataset


class Tar:
    """Groups of tar members with one key: "a/7.json", "a/7.jpg" are one record.

    Its fields are those of the .json member; text members stand under their ending (.txt as "text"), pictures and
    sounds under "images" and "audios", or where the JSON names them by ending or file name.
    """

    unit = "record"

    def __init__(self, path: Path, plain: Path, members: Lines) -> None:
        """path: what messages name. plain: the tar file that is read. members: offset and size of each member."""
        self.path, self.plain, self.members = path, plain, members

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.members)

    def line(self, number: int) -> int:
        """Return its number, counted from 1."""
        return number + 1

    def read(self, number: int) -> Fields:
        """Return one record. Raises DataError when it cannot be read."""
        group = self.members.read(number)
        key, held = group["key"], {}
        with self.plain.open("rb") as file:
            for ending, (offset, size) in group["members"].items():
                if size > MOST_BYTES:
                    raise DataError(f"member {key}.{ending} has {size:,} bytes, and at most {MOST_BYTES:,} are read")
                file.seek(offset)
                held[ending] = file.read(size)
        fields: Fields = {}
        for ending, data in held.items():
            if ending == "json":
                fields |= parse_json(data)
        media: dict[str, list[bytes]] = {"images": [], "audios": []}
        for ending, data in held.items():
            kind = ending.rpartition(".")[2]
            if kind in IMAGES | SOUNDS:
                media["images" if kind in IMAGES else "audios"].append(data)
            elif ending != "json":
                fields.setdefault("text" if ending == "txt" else ending, _text(data, f"{key}.{ending}"))
        named = {PurePosixPath(f"{key}.{ending}").name: data for ending, data in held.items()} | held
        return _with_members(fields, media, named)


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"member {name} is not UTF-8 text; save it as UTF-8, or leave it out of the tar") from None


def _with_members(fields: Fields, media: Mapping[str, list[bytes]], named: Mapping[str, bytes]) -> Fields:
    for plural, found in media.items():
        for key in (plural, plural[:-1]):
            if isinstance(given := fields.get(key), str | list):
                names = [given] if isinstance(given, str) else given
                fields[key] = [named.get(name, name) if isinstance(name, str) else name for name in names]
                break
        else:
            if found:
                fields[plural] = found
    return fields


def index_tar(path: Path, target: Path) -> None:
    """Write key, and offset and size by ending, of every group, a JSON line each."""
    key, members = "", dict[str, tuple[int, int]]()
    try:
        with tarfile.open(path, "r:") as tar, target.open("w", encoding="utf-8") as lines:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if not member.isfile() or member.issparse():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                own = f"{folder}/{stem}" if folder else stem
                if own != key and members:
                    lines.write(json.dumps({"key": key, "members": members}) + "\n")
                    members = {}
                key = own
                if ending.lower() in members:
                    raise DataError(f"{path} has the member {member.name!r} twice; names must differ")
                members[ending.lower()] = (member.offset_data, member.size)
            if members:
                lines.write(json.dumps({"key": key, "members": members}) + "\n")
            end = tar.offset
        with path.open("rb") as file:  # an unreadable header ends tarfile's reading without a word
            file.seek(end)
            if (block := file.read(512)).strip(b"\0") or len(block) < 512:
                raise DataError(f"{path} is damaged or cut short at byte {end:,}; copy or export it again")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} is no whole tar file ({error}); copy or export it again") from None


# ----------------------------------------------------------------------------------------------- Hugging Face


class Saved:
    """Rows of a folder that `datasets` saved, or of local files that it reads; media stay bytes or paths."""

    unit = "row"

    def __init__(self, path: Path, cache: Path, split: str | None) -> None:
        """split: of a folder that holds several."""
        try:
            import datasets
        except ModuleNotFoundError:
            raise DataError(f"{path} is a folder, read by `datasets`; pip install 'modalora[hf]'") from None
        try:
            if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path.resolve()), cache_dir=str(cache / "datasets"))
        except Exception as error:  # every builder fails in its own way
            raise DataError(f"{path} is no folder that `datasets` reads ({error}); name the files in it") from None
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise DataError(f"{path} holds the splits {', '.join(found)}; name one as split")
            found = found[split]
        elif split is not None:
            raise DataError(f"{path} holds no splits; leave split={split!r} out")
        raw = {"Image": datasets.Image(decode=False), "Audio": datasets.Audio(decode=False)}
        for name, feature in found.features.items():
            inner = feature.feature if isinstance(feature, datasets.List) else feature
            if type(inner).__name__ in raw:
                kept = raw[type(inner).__name__]
                found = found.cast_column(name, datasets.List(kept) if inner is not feature else kept)
        self.path, self._rows = path, found

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._rows)

    def read(self, number: int) -> Fields:
        """Return one row."""
        return dict(self._rows[number])

    def line(self, number: int) -> int:
        """Return its row, counted from 1."""
        return number + 1
