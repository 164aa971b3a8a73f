"""Shapes of a scene in words: which are meant, and how one of them is named so that no other can be meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import NamedTuple

from modalora.data.scenes import (
    BOX_NAMES,
    BOX_SIDE,
    BOX_STEP,
    COLORS,
    KINDS,
    NLVR_COLORS,
    NLVR_KINDS,
    SIZES,
    Scene,
    Shape,
)

PLAIN = ("object", "object", "object", "thing", "item", "shape")
_LIFTS = ("bottom", "second", "third", "fourth")  # blocks of a tower, from the base
MANY_TRIES = 6  # before a kind of question is given up for now


class Pick(NamedTuple):
    """Which shapes are meant: those that agree with everything that is not None."""

    size: str | None = None
    color: str | None = None
    kind: str | None = None
    box: int | None = None

    def fits(self, shape: Shape) -> bool:
        """Return whether the shape is one of those meant."""
        return (
            (self.box is None or shape.box == self.box)
            and (self.color is None or shape.color == self.color)
            and (self.kind is None or shape.kind == self.kind)
            and (self.size is None or shape.size == self.size)
        )

    def count(self, shapes: Iterable[Shape]) -> int:
        """Return how many of the shapes are meant."""
        return sum(map(self.fits, shapes))

    def words(self, noun: str, many: bool = False) -> str:
        """Return the shapes in words, without the box; noun stands in for a kind that is left open."""
        end = "s" if many else ""
        return " ".join(word for word in (self.size, self.color, (self.kind or noun) + end) if word)


def noun_of(roll: Random, scene: Scene) -> str:
    """Return a word for any shape of the scene."""
    return "block" if scene.towers and roll.random() < 0.5 else roll.choice(PLAIN)


def with_article(words: str) -> str:
    """Return the words behind a or an."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def palette(scene: Scene) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the colours and kinds that such a scene may hold."""
    return (NLVR_COLORS, NLVR_KINDS) if scene.boxes > 1 else (COLORS, KINDS)


def random_pick(roll: Random, scene: Scene, boxed: float = 0.4) -> Pick:
    """Return shapes to ask after: often such as are there, else any."""
    colors, kinds = palette(scene)
    like = roll.choice(scene.shapes) if roll.random() < 0.6 else None
    color = (like.color if like else roll.choice(colors)) if roll.random() < 0.6 else None
    kind = (like.kind if like else roll.choice(kinds)) if roll.random() < 0.5 else None
    size = (like.size if like else roll.choice(SIZES)) if roll.random() < 0.15 else None
    if scene.towers:
        kind, size = ("square" if roll.random() < 0.15 else None), None
    box = roll.randrange(scene.boxes) if scene.boxes > 1 and roll.random() < boxed else None
    return Pick(size, color, kind, box)


def references(scene: Scene, shape: Shape, noun: str, hidden: str = "", boxed: bool = True) -> list[str]:
    """Return the ways to name this shape and no other, without the hidden attribute ("color", "kind" or "size")."""
    found = []
    for box in (None, shape.box) if boxed and scene.boxes > 1 else (None,):
        for color in (None, shape.color):
            for kind in (None, shape.kind):
                for size in (None,) if scene.towers or hidden == "size" else (None, shape.size):
                    if (color and hidden == "color") or (kind and hidden == "kind"):
                        continue
                    pick = Pick(size, color, kind, box)
                    if pick.count(scene.shapes) == 1:
                        where = "" if box is None else f" in the {BOX_NAMES[box]}"
                        found.append(pick.words(noun) + where)
    return found


def refer(scene: Scene, shape: Shape, roll: Random, hidden: str = "", boxed: bool = True) -> str | None:
    """Return a way to name the shape, the short ones more often, or None where there is none."""
    found = references(scene, shape, noun_of(roll, scene), hidden, boxed)
    found.sort(key=lambda words: words.count(" "))
    return found[min(roll.randrange(len(found)), roll.randrange(len(found)))] if found else None


def box_shapes(scene: Scene, box: int) -> list[Shape]:
    """Return the shapes of a box, the lowest first."""
    return sorted((shape for shape in scene.shapes if shape.box == box), key=lambda shape: -shape.y)


def _block(scene: Scene, roll: Random) -> tuple[str, Shape]:
    """Return a block of a tower by its place in it."""
    box = roll.choice(scene.shapes).box
    blocks = box_shapes(scene, box)
    lift = roll.randrange(len(blocks))
    name = "top" if lift == len(blocks) - 1 and roll.random() < 0.7 else _LIFTS[lift]
    if name in _LIFTS[1:]:
        return f"{name} block from the bottom in the {BOX_NAMES[box]}", blocks[lift]
    return f"{name} block in the {BOX_NAMES[box]}", blocks[lift]


_EXTREMES: tuple[tuple[str, Callable[[Shape], float], float], ...] = (
    ("biggest", lambda one: -one.width, 0.06),  # the last number: by how much of the box it must be so
    ("smallest", lambda one: one.width, 0.06),
    ("leftmost", lambda one: one.x, 0.08),
    ("rightmost", lambda one: -one.x, 0.08),
    ("highest", lambda one: one.y, 0.08),
    ("lowest", lambda one: -one.y, 0.08),
)


def _extreme(scene: Scene, roll: Random) -> tuple[str, Shape] | None:
    """Return a scattered or free shape by being the largest or the outermost, where that is clear."""
    if scene.towers:
        return None
    box = roll.randrange(scene.boxes)
    shapes = box_shapes(scene, box)
    if len(shapes) < 2:
        return None
    side = BOX_SIDE if scene.boxes > 1 else min(scene.image.size)
    word, key, least = roll.choice(_EXTREMES)
    shapes.sort(key=key)
    if key(shapes[1]) - key(shapes[0]) < least * side:
        return None
    where = f" in the {BOX_NAMES[box]}" if scene.boxes > 1 else ""
    return f"{word} {roll.choice(PLAIN)}{where}", shapes[0]


def attribute(scene: Scene, roll: Random, hidden: str, placed: float) -> tuple[str, Shape] | None:
    """Return a way to name a shape without the attribute that is asked for; its values are equally likely."""
    if roll.random() < placed:
        return _block(scene, roll) if scene.towers else _extreme(scene, roll)
    value = roll.choice(sorted({str(getattr(shape, hidden)) for shape in scene.shapes}))
    for _ in range(MANY_TRIES):
        shape = roll.choice(scene.shapes)
        if getattr(shape, hidden) == value and (words := refer(scene, shape, roll, hidden)):
            return words, shape
    return None


def wall_gaps(shape: Shape) -> tuple[float, float, float, float]:
    """Return the pixels between an NLVR shape and its box's walls: left, top, right, bottom."""
    left, top = shape.x - shape.width / 2 - shape.box * BOX_STEP, shape.y - shape.width / 2
    return left, top, BOX_SIDE - left - shape.width, BOX_SIDE - top - shape.width
