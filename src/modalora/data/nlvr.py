"""The real NLVR scenes: three boxes of shapes, each picture with a sentence by a person that is true or false.

The table names the shapes of each scene once, for its first picture; the other pictures show the same three boxes in
another order, which the last part of the identifier counts through lexicographically.
Source: Suhr et al. 2017, "A Corpus of Natural Language for Visual Reasoning".
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from PIL import Image

from modalora.data.files import load_arrow
from modalora.data.scenes import BOX_NAMES, BOX_STEP, SIZES, Scene, Shape
from modalora.errors import DataError

_COLUMNS = ["identifier", "sentence", "label", "boxes", "image"]
_COLORS = {"Black": "black", "Yellow": "yellow", "#0099ff": "blue"}
_ORDERS = tuple(permutations(range(len(BOX_NAMES))))


@dataclass(frozen=True)
class NlvrRow:
    """One real picture with its sentence; the picture stays a PNG until it is asked for."""

    png: bytes
    shapes: tuple[Shape, ...]
    sentence: str
    label: bool

    @property
    def scene(self) -> Scene:
        """The picture, decoded anew at each call, and what is on it."""
        return Scene(Image.open(io.BytesIO(self.png)).convert("RGB"), self.shapes, len(BOX_NAMES))


def nlvr_scenes(folder: Path, split: str) -> list[NlvrRow]:
    """Return the pictures and sentences of a split ("train" or "validation") from folder/nlvr/{split}.parquet.

    Raises DataError when the file is missing or a record is wrong.
    """
    found = folder / "nlvr" / f"{split}.parquet"
    if not found.is_file():
        raise DataError(
            f"no NLVR split {split!r}: {found} is missing; it must be a table with the columns {', '.join(_COLUMNS)}"
        )
    try:
        rows: list[dict[str, Any]] = load_arrow().parquet.read_table(found, columns=_COLUMNS).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{found} cannot be read: {error}; it must be a table with the columns {', '.join(_COLUMNS)}"
        ) from error
    layouts = {_stem(row["identifier"]): json.loads(row["boxes"]) for row in rows if row["boxes"]}
    made = []
    for row in rows:
        name = row["identifier"]
        layout, turn = layouts.get(_stem(name)), name.rpartition("-")[2]
        if layout is None or not turn.isdigit() or int(turn) >= len(_ORDERS):
            raise DataError(
                f"{found}: record {name!r} has no boxes; a record {_stem(name)}-* must name them, the last part 0 to 5"
            )
        shapes = _shapes(layout, _ORDERS[int(turn)], f"{found}: record {name!r}")
        made.append(NlvrRow(row["image"], shapes, row["sentence"], bool(row["label"])))
    return made


def _stem(identifier: str) -> str:
    return identifier.rpartition("-")[0]


def _shapes(layout: Sequence[Sequence[dict[str, Any]]], order: Sequence[int], where: str) -> tuple[Shape, ...]:
    shapes = []
    for box, source in enumerate(order):
        for item in layout[source]:
            color, width = _COLORS.get(item["color"]), item["size"]
            if color is None or width not in (10, 20, 30):
                raise DataError(
                    f"{where}: shape {item} must have a size of 10, 20 or 30 and a color of {sorted(_COLORS)}"
                )
            x, y = box * BOX_STEP + item["x_loc"] + width / 2, item["y_loc"] + width / 2
            shapes.append(Shape(item["type"], color, SIZES[width // 10 - 1], x, y, float(width), box))
    return tuple(shapes)
