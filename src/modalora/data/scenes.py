"""Pictures of flat shapes whose contents are known, so that every question about them has one checkable answer.

Two families. Scenes in the manner of NLVR (Suhr et al. 2017): a 400 x 100 canvas with three light boxes of 100 x 100
at x = 0, 150 and 300 on grey, holding either a tower of blocks each or one to seven scattered shapes each. Free
scenes: any canvas, background, colour and kind, shapes apart. Pixels throughout, x to the right, y downward; x and y of
a shape are its centre, and every shape fills a square of side `width`. The same generator state gives the same picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin
from random import Random

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle", "star", "diamond")
COLORS = ("black", "blue", "yellow", "red", "green", "white", "purple", "orange")
SIZES = ("small", "medium", "large")
BOX_NAMES = ("left box", "middle box", "right box")

NLVR_KINDS = KINDS[:3]
NLVR_COLORS = COLORS[:3]
NLVR_WIDTHS = {"small": 10, "medium": 20, "large": 30}
NLVR_CANVAS = (400, 100)
BOX_SIDE = 100
BOX_STEP = 150  # from one box's left wall to the next one's
TOWER_TOPS = (80, 59, 38, 17)  # upper edge of each block of a tower, from the base: blocks of 20, one pixel apart

_BOX_GRAY, _GAP_GRAY = (211, 211, 211), (128, 128, 128)
_NLVR_RGB = {"black": (0, 0, 0), "blue": (0, 153, 255), "yellow": (255, 255, 0)}
_FREE_RGB = {
    "black": (12, 12, 12),
    "blue": (30, 90, 235),
    "yellow": (248, 232, 30),
    "red": (220, 30, 35),
    "green": (35, 165, 60),
    "white": (248, 248, 248),
    "purple": (140, 45, 175),
    "orange": (250, 145, 25),
}
_BACKGROUNDS = (
    (255, 255, 255), (211, 211, 211), (128, 128, 128), (60, 60, 60), (0, 0, 0), (245, 235, 215), (205, 225, 240),
    (215, 240, 215), (240, 215, 225), (95, 75, 60), (30, 40, 80), (170, 190, 170),
)  # fmt: skip
_FREE_WIDTHS = {"small": (0.11, 0.14), "medium": (0.19, 0.23), "large": (0.30, 0.36)}  # shares of the shorter side
_CONTRAST = 110.0  # least distance in RGB between a shape and its background

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """One shape: what it is and where, in pixels of the whole image. box counts from the left, 0 in a free scene."""

    kind: str
    color: str
    size: str
    x: float
    y: float
    width: float
    box: int


@dataclass(frozen=True)
class Scene:
    """A picture and all that is on it; boxes is 3 in the manner of NLVR and 1 for a free scene."""

    image: Image.Image
    shapes: tuple[Shape, ...]
    boxes: int

    @property
    def towers(self) -> bool:
        """Whether the scene shows towers of blocks rather than scattered shapes."""
        return self.boxes == len(BOX_NAMES) and are_towers(self.shapes)


def are_towers(shapes: Iterable[Shape]) -> bool:
    """Return whether every shape is a block of a tower, in the middle of its box."""
    return all(shape.size == "medium" and shape.kind == "square" and shape.x % BOX_STEP == 50 for shape in shapes)


def dice(rng: Generator) -> Random:
    """Return a fast source of single choices that depends on nothing but the generator's state."""
    return Random(int(rng.integers(1 << 62)))


def nlvr_shapes(roll: Random, towers: bool) -> tuple[Shape, ...]:
    """Return the shapes of one scene in the manner of NLVR, undrawn: box by box, as the real ones are spread."""
    make = _tower if towers else _scatter
    return tuple(shape for box in range(len(BOX_NAMES)) for shape in make(roll, box))


def _tower(roll: Random, box: int) -> list[Shape]:
    tops = TOWER_TOPS[: roll.randint(1, len(TOWER_TOPS))]
    x = box * BOX_STEP + 50.0
    return [Shape("square", roll.choice(NLVR_COLORS), "medium", x, top + 10.0, 20.0, box) for top in tops]


def _scatter(roll: Random, box: int) -> list[Shape]:
    taken: list[tuple[int, int, int]] = []
    shapes: list[Shape] = []
    for _ in range(roll.randint(1, 7)):
        size = roll.choice(SIZES)
        width = NLVR_WIDTHS[size]
        for _ in range(60):
            # positions beyond the far walls are pulled back to them: the real shapes touch right and bottom so often
            left, top = min(roll.randrange(100), BOX_SIDE - width), min(roll.randrange(100), BOX_SIDE - width)
            if all(
                left > x + side or x > left + width or top > y + side or y > top + width for x, y, side in taken
            ):  # one pixel of air at least
                taken.append((left, top, width))
                x, y = box * BOX_STEP + left + width / 2, top + width / 2
                kind, color = roll.choice(NLVR_KINDS), roll.choice(NLVR_COLORS)
                shapes.append(Shape(kind, color, size, x, y, float(width), box))
                break
    return shapes


def draw_nlvr(shapes: Iterable[Shape]) -> Image.Image:
    """Return the 400 x 100 picture of the shapes, drawn as NLVR's pictures are."""
    image = Image.new("RGB", NLVR_CANVAS, _GAP_GRAY)
    for box in range(len(BOX_NAMES)):
        image.paste(_BOX_GRAY, (box * BOX_STEP, 0, box * BOX_STEP + BOX_SIDE, BOX_SIDE))
    for shape in shapes:
        _draw(image, shape, _NLVR_RGB[shape.color])
    return image


def nlvr_like(rng: Generator, towers: float = 0.6) -> Scene:
    """Return a scene that looks like one of NLVR's; towers is the share of scenes that show towers (really 0.67)."""
    roll = dice(rng)
    shapes = nlvr_shapes(roll, roll.random() < towers)
    return Scene(draw_nlvr(shapes), shapes, len(BOX_NAMES))


def free_scene(rng: Generator) -> Scene:
    """Return a scene of one to six shapes that do not overlap, on a canvas of 112 to 400 (mostly 240) pixels a side."""
    roll = dice(rng)
    most = 400 if roll.random() < 0.1 else 240  # large canvases cost many tokens
    columns, rows = roll.randint(112, most), roll.randint(112, most)
    side = min(columns, rows)
    background = roll.choice(_BACKGROUNDS)
    colors = [name for name in COLORS if _distance(_FREE_RGB[name], background) > _CONTRAST]
    image = Image.new("RGB", (columns, rows), background)
    shapes: list[Shape] = []
    for _ in range(roll.randint(1, 6)):
        size = roll.choice(SIZES)
        low, high = _FREE_WIDTHS[size]
        width = round(side * roll.uniform(low, high))
        for _ in range(40):
            left, top = roll.randint(2, columns - width - 2), roll.randint(2, rows - width - 2)
            x, y = left + width / 2, top + width / 2
            reach = width / 2 + 2
            if all(max(abs(x - one.x), abs(y - one.y)) > reach + one.width / 2 for one in shapes):
                color = roll.choice(colors)
                shape = Shape(roll.choice(KINDS), color, size, x, y, float(width), 0)
                _draw(image, shape, _shade(roll, color, background))
                shapes.append(shape)
                break
    return Scene(image, tuple(shapes), 1)


def _shade(roll: Random, color: str, background: Rgb) -> Rgb:
    """Return the colour, a little off its usual value; blue is now and then NLVR's light blue."""
    red, green, blue = _FREE_RGB[color]
    if color == "blue" and roll.random() < 0.3 and _distance(_NLVR_RGB["blue"], background) > _CONTRAST:
        red, green, blue = _NLVR_RGB["blue"]
    shift = [min(255, max(0, value + roll.randint(-12, 12))) for value in (red, green, blue)]
    return shift[0], shift[1], shift[2]


def _distance(one: Rgb, other: Rgb) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def _draw(image: Image.Image, shape: Shape, rgb: Rgb) -> None:
    width = round(shape.width)
    left, top = round(shape.x - width / 2), round(shape.y - width / 2)
    if shape.kind == "square":
        image.paste(rgb, (left, top, left + width, top + width))
    else:
        image.paste(rgb, (left, top), _stamp(shape.kind, width))


@lru_cache(maxsize=1024)
def _stamp(kind: str, width: int) -> Image.Image:
    """Return how much of each pixel the kind covers, 0 to 255, from 8 x 8 samples a pixel."""
    fine = 8
    if kind == "star":
        half, big = width * fine / 2, Image.new("L", (width * fine, width * fine))
        corners = [(half * (1 if point % 2 == 0 else 0.42), pi * (point / 5 - 0.5)) for point in range(10)]
        ImageDraw.Draw(big).polygon([(half + far * cos(turn), half + far * sin(turn)) for far, turn in corners], 255)
        return big.resize((width, width), Image.Resampling.BOX)
    at = (np.arange(width * fine) + 0.5) / (width * fine)
    x, y = at[None, :] - 0.5, at[:, None]
    inside = {
        "circle": x**2 + (y - 0.5) ** 2 <= 0.25,
        "triangle": np.abs(x) <= y / 2,
        "diamond": np.abs(x) + np.abs(y - 0.5) <= 0.5,
    }[kind]
    cover = inside.reshape(width, fine, width, fine).mean((1, 3))
    return Image.fromarray((cover * 255).round().astype(np.uint8))


def caption(scene: Scene) -> str:
    """Return every shape in words, box by box, in reading order; one picture has one caption."""
    if scene.boxes == 1:
        return listing(scene, scene.shapes)
    parts = [[shape for shape in scene.shapes if shape.box == box] for box in range(scene.boxes)]
    return "; ".join(f"{name.split()[0]}: {listing(scene, part)}" for name, part in zip(BOX_NAMES, parts, strict=True))


LINES = 6  # a picture is read in so many lines of equal height


def listing(scene: Scene, shapes: Iterable[Shape]) -> str:
    """Return some of a scene's shapes in words, in reading order: box by box, line by line, rightward."""
    height = scene.image.size[1] / LINES
    ordered = sorted(shapes, key=lambda shape: (shape.box, shape.y // height, shape.x))
    return ", ".join(f"{shape.size} {shape.color} {shape.kind}" for shape in ordered) or "none"


def cell_labels(
    shapes: Sequence[Shape],
    cell_width: float,
    cell_height: float,
    columns: int,
    rows: int,
) -> np.ndarray:
    """Return what lies in each cell of a grid, int64 (rows, columns, 3): places in KINDS, COLORS, SIZES, or -1.

    Cells are in the image's own pixels, from its upper left corner. A shape belongs to the cell that its centre falls
    in; of several in one cell the largest is given, and of equals the first.
    """
    labels = np.full((rows, columns, 3), -1, dtype=np.int64)
    for shape in sorted(shapes, key=lambda shape: -shape.width):
        column, row = int(shape.x // cell_width), int(shape.y // cell_height)
        if 0 <= column < columns and 0 <= row < rows and labels[row, column, 0] < 0:
            labels[row, column] = KINDS.index(shape.kind), COLORS.index(shape.color), SIZES.index(shape.size)
    return labels
