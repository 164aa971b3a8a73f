"""What tests of several rooms write again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from modalora.processing.chat import Piece


def as_text(pieces: Sequence[Piece]) -> str:
    """The prompt as it is shown to people; media as numbered tags."""
    shown: list[str] = []
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts[piece.kind] += 1
        shown.append(piece.value if piece.kind in ("text", "control") else f"<|{piece.kind}_{counts[piece.kind]}|>")
    return "".join(shown)
