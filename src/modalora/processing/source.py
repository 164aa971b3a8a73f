"""The bytes of a picture or a sound, from a file or as they are given, in the forms that libraries hand on."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modalora.errors import MediaError


def unwrapped(source: Any, noun: str) -> Any:
    """Return a medium as a path, bytes, a Pillow image or (samples, rate); what is none of these as it is.

    source: also what `datasets` holds, {"bytes", "path"} or {"array", "sampling_rate"}; for pictures an array (height,
    width[, channels]) of uint8; a file open for reading bytes, which is read whole and set back.
    Raises MediaError for a mapping without a medium, other arrays, and files that give no bytes.
    """
    if isinstance(source, Mapping):
        if source.get("bytes") is not None:
            return source["bytes"]
        if source.get("array") is not None and noun == "audio":
            return source["array"], source.get("sampling_rate")
        if source.get("path") is not None:
            return source["path"]
        held = "'array' and 'sampling_rate'" if noun == "audio" else "'path'"
        raise MediaError(f"an {noun} was given as a mapping of {[*source]!r:.60}; give one with 'bytes', or {held}")
    if isinstance(source, np.ndarray) and noun == "image":
        if source.dtype == np.uint8 and source.size and source.shape[2:] in ((), (3,), (4,)) and source.ndim > 1:
            return Image.fromarray(source)
        raise MediaError(
            f"an image was given as a {source.dtype} array of shape {source.shape}; give uint8 of (height, width, 3)"
        )
    if hasattr(source, "read") and hasattr(source, "seek"):
        try:
            start = source.tell()
            source.seek(0)
            data = source.read()
            source.seek(start)
        except (OSError, ValueError) as error:  # closed, or a pipe
            raise MediaError(f"the {noun} file cannot be read from ({error}); give its path or its bytes") from error
        if not isinstance(data, bytes):
            raise MediaError(f"the {noun} file gives {type(data).__name__}, no bytes; open it with mode 'rb'")
        return data
    return source


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
            raise MediaError(
                f"{short} is a URL, and {noun} sources are files or bytes; download it, and give path or bytes"
            )
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
