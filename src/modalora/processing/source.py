"""The bytes of a picture or a sound, from a file or as they are given."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from modalora.errors import MediaError


def read_source(source: str | Path | bytes, noun: str, max_bytes: int) -> tuple[str, bytes]:
    """Return what to call a file or a byte string in messages, and its bytes; the size is checked before reading.

    noun: "image" or "audio". Raises MediaError when there is nothing to read or too much of it.
    """
    if isinstance(source, bytes):
        name, size = f"{noun} bytes", len(source)
    elif isinstance(source, str | Path):
        name = repr(str(source))
        if re.match(r"data:|[a-z][a-z\d+.-]+:/", str(source), re.IGNORECASE):  # Path makes "//" one
            short = name if len(name) <= 80 else name[:76] + "...'"
            raise MediaError(f"{short} is a URL, and {noun} sources are files or bytes; load it and give its bytes")
        try:
            status = Path(source).stat()
        except FileNotFoundError as error:
            raise MediaError(
                f"{name} does not exist (seen from '{Path.cwd()}'); give the path of an {noun} file"
            ) from error
        except (OSError, ValueError) as error:
            raise MediaError(f"{name} cannot be reached ({error}); give the path of an {noun} file") from error
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise MediaError(f"{name} is {what}; give the path of one {noun} file")
        size = status.st_size
    else:
        what = type(source).__name__
        decoded = {"image": "a PIL image (Image.fromarray(array))", "audio": "(samples, rate)"}.get(
            noun, f"decoded {noun}"
        )
        raise MediaError(f"an {noun} was given as {what}; give a path, the bytes of a file or {decoded}")
    if not size:
        raise MediaError(f"{name}: empty, 0 bytes; give an {noun} file with content")
    if size > max_bytes:
        raise MediaError(f"{name}: {size:,} bytes, and at most {max_bytes:,} are read; compress it or raise max_bytes")
    if isinstance(source, bytes):
        return name, source
    try:
        return name, Path(source).read_bytes()
    except OSError as error:
        raise MediaError(f"{name} cannot be read ({error.strerror}); check its permissions") from error
