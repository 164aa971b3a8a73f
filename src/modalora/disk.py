"""Files that are whole whenever the process is killed: put in place at once, or lines cut behind a step; and JSON."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf
from pathlib import Path
from secrets import token_hex
from typing import Any

from modalora.errors import CheckpointError, TrainingError

LINES_OF_STEP = 2  # of a journal at most: what training logs, and the scores of what it does not train on
MOST_JSON_BYTES = 64_000_000
CONFIG_BYTES = 1_000_000  # of what people or libraries write by hand: published configs have 10 KB


def draft_beside(path: Path) -> Path:
    """Return a hidden name for a draft of a file or folder, with its ending; no process on any machine has the same."""
    return path.with_name(f".{path.stem}.{token_hex(4)}.draft{path.suffix}")


def is_draft(path: Path) -> bool:
    """Tell whether a file or folder has a name of draft_beside's, and none that a person would give."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.draft(\.[^.]+)?", path.name) is not None


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Give a draft to write; it then takes the place of `path`, so that a reader sees the old file or the new one.

    The folder is made where it is missing. When the writing fails, the draft is removed and the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_beside(path)  # opened by its writer: one of tempfile would be closed to all other users
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class Journal:
    """JSON lines that each name their "step"; those behind the step that a run resumes from are taken away.

    last: what the lines of the last step that was there hold together. What is taken away tells of steps whose results
    were lost; they will be made and written again.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = cut_lines(path, step)
        self.last: dict[str, Any] = {}
        for line in lines[-LINES_OF_STEP:]:
            fields = json.loads(line)
            self.last = {**(self.last if self.last.get("step") == fields["step"] else {}), **fields}
        self.path, self._file = path, path.open("ab", buffering=0)

    def write(self, fields: Mapping[str, Any]) -> None:
        """Add a line, which other processes see at once. Raises TrainingError when the disk does not take it."""
        line = (json.dumps(fields) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise _refused(self.path, "no room for a whole line")
        except OSError as error:
            raise _refused(self.path, error) from None

    def sync(self) -> None:
        """Wait until every line is on the disk, so that no saved state is ahead of them. Raises TrainingError."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _refused(self.path, error) from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _refused(path: Path, why: OSError | str) -> TrainingError:
    return TrainingError(
        f"{path} could not be written: {why}; make room and run the same command, which goes on from what was "
        "saved last, or begins anew where nothing was"
    )


def cut_lines(path: Path, step: int) -> list[bytes]:
    """Take the lines behind a step out of a file of JSON lines, and return those that stay."""
    lines = [line for line in read_lines(path) if step_of(line) <= step]
    kept = b"".join(line + b"\n" for line in lines)
    if not path.exists() or path.stat().st_size != len(kept):
        with drafted(path) as draft:
            draft.write_bytes(kept)
    return lines


def read_lines(path: Path) -> list[bytes]:
    """Return the whole lines, none where there is no file; what a killed process left of its last one is none."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def step_of(line: bytes) -> float:
    """Return the step of a line; one that a power cut spoilt is behind every state, as those wait for their lines."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return inf


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_file(path: Path, most: int) -> None:
    """Refuse what would be read for ever: a pipe or device, or more bytes than are read. An absent file passes."""
    if not path.exists() or path.is_dir():  # which opening it tells
        return
    if not path.is_file():
        raise CheckpointError(f"{path} is a pipe or a device, and was not opened; a folder holds plain files")
    if (size := path.stat().st_size) > most:
        raise CheckpointError(f"{path} has {size:,} bytes; at most {most:,} are read")


def read_json(path: Path, *, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file of at most so many bytes. Raises CheckpointError, for a key given twice too."""
    check_file(path, most)
    try:
        fields = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.absolute()} is missing; a model folder needs it") from None
    except (CheckpointError, ValueError, RecursionError, IsADirectoryError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds {type(fields).__name__}")
    return fields


def parse_json(text: str) -> Any:
    """Return what a JSON text holds. Raises ValueError, CheckpointError for a key that stands twice in an object."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise CheckpointError(f"the key {key!r:.80} stands twice in an object")
        fields[key] = value
    return fields


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON object, two spaces deep, whole or not at all."""
    with drafted(path) as draft:
        draft.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
