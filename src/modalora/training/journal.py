"""Files of one JSON object per line that tell what happened at each step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any


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
        self._file = path.open("a", encoding="utf-8")

    def write(self, fields: Mapping[str, Any]) -> None:
        """Add a line, and let other processes see it."""
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until every line is on the disk, so that no saved state is ahead of them."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


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
