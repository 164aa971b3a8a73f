"""Copies and indices of files, made once."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from glob import escape
from pathlib import Path

from modalora.data.files.limits import MOST_BYTES
from modalora.disk import drafted
from modalora.errors import DataError

MOST_GROWTH = 200  # times that a gzip file may grow; JSON grows about 5 to 30 times
CHUNK = 1 << 22


def cached(path: Path, cache: Path, ending: str, make: Callable[[Path, Path], None], plain: Path | None = None) -> Path:
    """Return the file that `make(plain or path, draft)` writes, from the cache where it holds it for this `path`.

    plain: an unpacked copy of path. Raises DataError when path is written to meanwhile.
    """
    before = path.stat()
    stem = f"{path.name[:40]}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    target = cache / "files" / f"{stem}-{before.st_size}-{before.st_mtime_ns}{ending}"
    if target.exists():
        return target
    with drafted(target) as draft:
        make(plain or path, draft)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DataError(f"{path} was written to while it was indexed; try again when it is complete")
    for old in target.parent.glob(f"{escape(stem)}-*{ending}"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


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
