"""Rows of Parquet files."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

from modalora.data.files.limits import Fields
from modalora.errors import DataError


class Rows:
    """Rows of a table, mapped from an Arrow file."""

    unit = "row"
    identity = ""

    def __init__(self, path: Path, table: Path) -> None:
        """path: what messages name. table: the Arrow file that is read."""
        arrow = load_arrow()
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


def load_arrow() -> Any:
    """Return pyarrow with its readers: an extra, loaded when a file asks for it. Raises DataError without it."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError("Parquet files need pyarrow; pip install -e '.[train]' in your clone") from None
    return pyarrow


def unpack_parquet(path: Path, target: Path) -> None:
    """Write a Parquet file as Arrow, row group after row group: rows of it can be read singly."""
    arrow = load_arrow()
    try:
        table = arrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{path} has the column {twice[0]!r} twice, and a row would keep one; rename it")
        with arrow.OSFile(str(target), "wb") as sink, arrow.ipc.new_file(sink, table.schema_arrow) as writer:
            for batch in table.iter_batches(batch_size=64):
                writer.write_batch(batch)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no whole Parquet file ({error}); copy or export it again") from None
