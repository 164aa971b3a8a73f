"""Files of one JSON object per line that tell what happened at each step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

from modalora.errors import TrainingError


class Journal:
    """Lines that each name their "step"; those behind the step that a run resumes from are taken away.

    last: the last line that was there. What is taken away tells of steps whose results were lost; they will be made
    and written again.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = [line for line in _lines(path) if _step(line) <= step]
        kept = b"".join(lines)
        self.last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        if not path.exists() or path.stat().st_size != len(kept):
            draft = path.with_name(f".{path.name}.draft")
            draft.write_bytes(kept)
            draft.replace(path)
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
        f"{path} could not be written: {why}; the state saved last is whole: make room and run the same command, which "
        "goes on from there"
    )


def _step(line: bytes) -> float:
    """Return the step of a line; one that a power cut spoilt is behind every state, as those wait for their lines."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return inf


def _lines(path: Path) -> list[bytes]:
    """Return the whole lines; what a killed process left of its last one is none."""
    given = path.read_bytes() if path.exists() else b""
    return given.splitlines(keepends=True)[: given.count(b"\n")]
