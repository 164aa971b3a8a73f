"""Rows that could not be used, in a file: each with where it stands, why, and what would mend it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from modalora.data.sources import Bad
from modalora.disk import cut_lines
from modalora.errors import TrainingError

LEAST = 1000  # rows that the share is counted over at least: one bad row of the first three says little


class Quarantine:
    """Counts bad rows, writes them down, and stops a run that has too many."""

    def __init__(self, path: Path | None = None, most: float = 0.01) -> None:
        """path: a file of JSON lines, appended to. most: share of all rows that may be bad."""
        self.path, self.most, self.count = path, most, 0

    def add(self, bad: Bad, step: int, written: bool = True) -> None:
        """Count a bad row of a step and write it down, unless another process does."""
        self.count += 1
        if written and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **asdict(bad)}, ensure_ascii=True) + "\n")

    def check(self, rows: int, last: Bad) -> None:
        """Raise TrainingError when the bad rows are more than their share of the rows drawn so far."""
        if self.is_too_much(self.count, rows):
            where = f" ({last.place})" if last.file else ""
            mend = f"; {last.mend}" if last.mend else ""
            raise TrainingError(
                f"{self.count} of {rows} rows are bad, more than quarantine_most={self.most:g} of them (counted over "
                f"at least {LEAST} rows); the last: {last.sample}{where}: {last.reason}{mend}. "
                f"See {self.path or 'them with `modalora data check`'}, or raise quarantine_most"
            )

    def is_too_much(self, count: int, rows: int) -> bool:
        """Tell whether so many bad ones of all rows drawn stop a run."""
        return count > self.most * max(rows, LEAST)

    def rewind(self, step: int, count: int) -> None:
        """Go back to the state behind a step: what later steps wrote down is written again when they come again."""
        self.count = count
        if self.path is not None and self.path.exists():
            cut_lines(self.path, step)
