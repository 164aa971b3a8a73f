"""JSON records by line or array element, and whole texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from modalora.data.files.cache import CHUNK
from modalora.data.files.limits import MOST_BYTES, MOST_DEPTH, Fields
from modalora.errors import DataError


def parse_json(data: bytes) -> dict[str, Any]:
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


def first_byte(path: Path) -> bytes:
    """Return the first byte that is neither a mark nor white space."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head[:1]


class Document:
    """A text file, which is one record."""

    unit = "record"
    identity = ""

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
    identity = ""

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


def index_objects(path: Path, target: Path) -> None:
    """Write the index of a file of one object over several lines, or of one in every line."""
    size, start = path.stat().st_size, 3 * _starts_with_mark(path)
    with path.open("rb") as file:
        file.seek(start)
        if size <= MOST_BYTES and not _is_json(file.readline()):
            file.seek(start)
            if _is_json(file.read()):
                np.save(target, np.array([[start, size - start, 1]], dtype=np.int64))
                return
    index_lines(path, target)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


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
