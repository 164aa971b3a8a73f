"""What one record may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_BYTES = 64_000_000  # of one record: pictures may be inside, as base64
MOST_DEPTH = 100  # of nested JSON; far below Python's own limit, so that it never depends on who reads

Fields = Mapping[str, Any]
