"""The words of statements about scenes, and what a statement is: a sentence and the test that decides it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import NamedTuple

from modalora.data.numbers import NUMBERS
from modalora.data.scenes import BOX_NAMES, Shape

Boxes = Sequence[Sequence[Shape]]  # the shapes of each box, the highest first
Judge = Callable[[Boxes], bool]


class Statement(NamedTuple):
    """A sentence and the test that decides whether it holds."""

    sentence: str
    holds: Judge


Template = Callable[[Random], Statement]


def by_box(shapes: Iterable[Shape], boxes: int = len(BOX_NAMES)) -> Boxes:
    """Return the shapes of each box from top to bottom, as a statement's test wants them."""
    parts: list[list[Shape]] = [[] for _ in range(boxes)]
    for shape in sorted(shapes, key=lambda shape: (shape.y, shape.x)):
        parts[shape.box].append(shape)
    return parts


class Amount(NamedTuple):
    """A number of things in words: "exactly two", "at least 1", "no"."""

    words: str
    many: bool
    low: int
    high: int

    def right(self, count: int) -> bool:
        """Return whether a count is what the words say."""
        return self.low <= count <= self.high

    def of(self, noun: str) -> str:
        """Return the words with their noun, of which an "s" makes the plural of its first word."""
        first, _, rest = noun.partition("|")
        return f"{self.words} {first}{'s' if self.many else ''}{rest}"

    @property
    def there(self) -> str:
        """How a sentence about so many opens."""
        return f"There {'are' if self.many else 'is'}"


def draw_amount(roll: Random, most: int, none: float = 0.06) -> Amount:
    """Return a number of things. most: the greatest number named; none: how often it is "no"."""
    draw = roll.random()
    if draw < none:
        return Amount("no", False, 0, 0)
    if draw < 0.28:
        return Amount("a", False, 1, 99)
    number = min(roll.randint(1, most), roll.randint(1, most))
    word = str(number) if roll.random() < 0.3 else NUMBERS[number]
    if draw < 0.5:
        return Amount(("atleast " if roll.random() < 0.15 else "at least ") + word, number > 1, number, 99)
    if draw < 0.53:
        return Amount(f"at most {word}", number > 1, 0, number)
    exact = roll.choice(("", "", "", "exactly ", "exactly ", "only "))
    return Amount(exact + word, number > 1, number, number)


def draw_number(roll: Random, low: int, high: int) -> tuple[int, str]:
    """Return a number and how it is written, as a digit or a word."""
    number = roll.randint(low, high)
    return number, (str(number) if roll.random() < 0.35 else NUMBERS[number])


def plural(number: int, noun: str) -> str:
    """Return the noun as it stands behind a number."""
    return noun if number == 1 else noun + "s"


def draw_with(roll: Random, many: bool) -> str:
    """Return "with" or another way to say so of one thing or of many."""
    one, more = ("that has", "which has"), ("that have", "which have")
    return roll.choice(("with", "with", "with", "with", "having", *one, *(more if many else (f", {one[1]}",))))


def colors_of(box: Iterable[Shape]) -> set[str]:
    """Return the colours that a box holds."""
    return {shape.color for shape in box}


def repeat(*weighted: tuple[Template, int]) -> tuple[Template, ...]:
    """Return each template as often as it should be drawn."""
    return tuple(template for template, weight in weighted for _ in range(weight))
