"""Bytes and seconds as people read them, and JSON as programs do."""

from __future__ import annotations

import json
import sys
from typing import Any


def to_json(value: Any) -> str:
    """Return a value as JSON in letters that standard output can write."""
    return json.dumps(value, ensure_ascii="utf" not in (sys.stdout.encoding or "").lower())


def sized(size: float) -> str:
    """Return a number of bytes, such as 3.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # beyond, three digits make 1e+03 of it
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def lasting(seconds: float) -> str:
    """Return a time, such as 40 ms, 12.5 s, 3.0 min or 1.5 h."""
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
