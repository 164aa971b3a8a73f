"""Records of data files by number: JSON, Parquet, WebDataset tar, plain text, Hugging Face datasets.

A file is indexed once and never held in memory. Indices, and copies of what cannot be entered in the middle (gzip,
Parquet), lie in the cache; their names hold size and time of the file, so a changed file is indexed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Protocol

from modalora.data.files.arrow import Rows, load_arrow, unpack_parquet
from modalora.data.files.cache import cached, gunzip
from modalora.data.files.limits import Fields
from modalora.data.files.saved import Saved
from modalora.data.files.tar import Tar, index_tar
from modalora.data.files.texts import Document, Lines, first_byte, index_array, index_lines, index_objects
from modalora.errors import DataError

__all__ = ["Fields", "Records", "Tar", "cached", "find_files", "is_data", "load_arrow", "open_records"]

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".tar", ".tgz", ".txt")  # and each but .tgz with .gz behind it


class Records(Protocol):
    """Records of one file."""

    path: Path
    unit: str  # what `line` counts: "line", "row" or "record"
    identity: str  # tells apart what one path may hold: splits of a folder

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def read(self, number: int) -> Fields:
        """Return one record. Raises DataError when it cannot be read."""
        ...

    def line(self, number: int) -> int:
        """Return where in the file it stands, counted from 1."""
        ...


def is_data(path: Path) -> bool:
    """Tell whether `open_records` reads it: a file by its name's ending, or a folder that `datasets` saved."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    return path.name.lower().removesuffix(".gz").endswith(ENDINGS)


def find_files(path: str | Sequence[str]) -> list[Path]:
    """Return the files and folders that paths and patterns (*, ?, **) name, sorted. Raises DataError for none."""
    found: list[Path] = []
    for one in [path] if isinstance(path, str) else path:
        literal = [one] if one and Path(one).exists() else []  # a name may hold what a pattern is made of: b[1].jsonl
        matches = literal or sorted(set(glob(one, recursive=True)))  # noqa: PTH207  (Path.glob takes no absolute pattern)
        if not matches:
            raise DataError(f"path: {one!r} matches no file (seen from {str(Path.cwd())!r}); give files or patterns")
        found += [Path(match) for match in matches]
    if not found:
        raise DataError(f"path: {path!r} names no file; give files or patterns")
    _check_once(found)
    return found


def _check_once(files: Sequence[Path]) -> None:
    """Refuse a file that comes twice, by links or patterns that overlap. Raises DataError."""
    seen: dict[Path, Path] = {}
    for file in files:
        before = seen.setdefault(file.resolve(), file)
        if before is not file:
            also = "twice" if before == file else f"as {str(before)!r} too"
            raise DataError(
                f"path: {str(file)!r} is named {also}: its rows would come twice, and held-out ones would be trained "
                "on; name each file once, weight or epochs give it more"
            )


def open_records(path: Path, cache: Path, split: str | None = None) -> Records:
    """Return the records of a file, by its name's ending; of a folder, as a dataset that `datasets` saved.

    split: of a folder that holds several. Raises DataError when the file is of no such kind, damaged or cut short.
    """
    if path.is_dir():
        return Saved(path, cache, split)
    if split is not None:
        raise DataError(f"{path}: split={split!r} is for folders that `datasets` saved; leave it out")
    if path.exists() and not path.is_file():
        raise DataError(
            f"{path} is a pipe or a device, and records are read more than once; write them to a file first"
        )
    if not path.is_file():
        raise DataError(f"{path} does not exist (seen from {str(Path.cwd())!r}); give a data file")
    name = path.name.lower()
    plain = path
    if name.endswith((".gz", ".tgz")):
        name = name.removesuffix(".gz").replace(".tgz", ".tar")
        plain = cached(path, cache, "." + name.rpartition(".")[2], gunzip)
    if name.endswith((".jsonl", ".ndjson")):
        return Lines(path, plain, cached(path, cache, ".lines.npy", index_lines, plain))
    if name.endswith(".json"):
        index, ending = (index_array, ".array.npy") if first_byte(plain) == b"[" else (index_objects, ".objects.npy")
        return Lines(path, plain, cached(path, cache, ending, index, plain))
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
