"""True and false sentences about scenes in the manner of NLVR, worded like people's, judged by rule.

A template draws a sentence together with the test that decides it, without looking at any scene; so the same sentence
can be put to many scenes. The rules follow the labels of the real sentences: "two" means exactly two and "a" at least
one, "over" means directly on, and touching a wall means no pixel of air. A sentence with "the tower with four blocks"
is true when some such tower is as said. The words are in part careless (no full stop, "atleast", a lost leading A), as
the real ones are. The patterns come from the training split alone.
Source: Suhr et al. 2017, "A Corpus of Natural Language for Visual Reasoning".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from modalora.data.questions import NUMBERS, Pick, wall_gaps
from modalora.data.scenes import BOX_NAMES, NLVR_COLORS, NLVR_KINDS, Scene, Shape, dice, draw_nlvr, nlvr_shapes

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


class _Amount(NamedTuple):
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


def _amount(roll: Random, most: int, none: float = 0.06) -> _Amount:
    draw = roll.random()
    if draw < none:
        return _Amount("no", False, 0, 0)
    if draw < 0.28:
        return _Amount("a", False, 1, 99)
    number = min(roll.randint(1, most), roll.randint(1, most))
    word = str(number) if roll.random() < 0.3 else NUMBERS[number]
    if draw < 0.5:
        return _Amount(("atleast " if roll.random() < 0.15 else "at least ") + word, number > 1, number, 99)
    if draw < 0.53:
        return _Amount(f"at most {word}", number > 1, 0, number)
    exact = roll.choice(("", "", "", "exactly ", "exactly ", "only "))
    return _Amount(exact + word, number > 1, number, number)


def _few(roll: Random, low: int, high: int) -> tuple[int, str]:
    number = roll.randint(low, high)
    return number, (str(number) if roll.random() < 0.35 else NUMBERS[number])


def _plural(number: int, noun: str) -> str:
    return noun if number == 1 else noun + "s"


def _with(roll: Random, many: bool) -> str:
    one, more = ("that has", "which has"), ("that have", "which have")
    return roll.choice(("with", "with", "with", "with", "having", *one, *(more if many else (f", {one[1]}",))))


# Towers


def _color_at(box: Sequence[Shape], place: int) -> str | None:
    return box[place].color if box else None


def _tower_end(roll: Random) -> Statement:
    amount, color, end = _amount(roll, 3), roll.choice(NLVR_COLORS), roll.choice((0, -1))
    word = "top" if end == 0 else roll.choice(("base", "base", "bottom"))
    one = "1 " if roll.random() < 0.05 else "a "
    tail = roll.choice(("at the ", "at the ", "at the ", "on the " if end == 0 else "at the ", "at ")) + word
    sentence = f"{amount.there} {amount.of('tower')} {_with(roll, amount.many)} {one}{color} block {tail}"
    return Statement(sentence, lambda boxes: amount.right(sum(_color_at(box, end) == color for box in boxes)))


def _tower_end_block(roll: Random) -> Statement:
    amount, color, end = _amount(roll, 3), roll.choice(NLVR_COLORS), roll.choice((0, -1))
    word = "top" if end == 0 else "base"
    low, high, tail = _height(roll, 0.5)
    verb = "as" if roll.random() < 0.8 else "at"
    sentence = f"{amount.there} {amount.of(f'{color} block')} {verb} the {word} of a tower{tail}"
    return Statement(
        sentence,
        lambda boxes: amount.right(sum(_color_at(box, end) == color and low <= len(box) <= high for box in boxes)),
    )


def _height(roll: Random, chance: float) -> tuple[int, int, str]:
    """Return the least and greatest height that a tail like " with at least two blocks" allows, and the tail."""
    if roll.random() > chance:
        return 1, 99, ""
    number, word = _few(roll, 2, 4)
    if roll.random() < 0.35:
        number, word = min(number, 3), NUMBERS[min(number, 3)]
        return number, 99, f" with at least {word} blocks"
    if roll.random() < 0.2:
        number = min(number, 3)
        return number + 1, 99, f" with more than {NUMBERS[number]} blocks"
    exact = roll.choice(("", "exactly "))
    return number, number, f" with {exact}{word} blocks"


def _over(box: Sequence[Shape], upper: str, lower: str) -> bool:
    return any(a.color == upper and b.color == lower for a, b in zip(box, box[1:], strict=False))


def _tower_over(roll: Random) -> Statement:
    amount, upper, lower = _amount(roll, 2), roll.choice(NLVR_COLORS), roll.choice(NLVR_COLORS)
    over = roll.choice(("over", "over", "above", "above", "on top of", "on"))
    words = f"a {upper} block {over} a {lower} block"
    if roll.random() < 0.15:
        words = f"a {lower} block below a {upper} block"
    low, high, tail = _height(roll, 0.12)
    sentence = f"{amount.there} {amount.of('tower')}{tail} {_with(roll, amount.many)} {words}"
    return Statement(
        sentence,
        lambda boxes: amount.right(sum(_over(box, upper, lower) and low <= len(box) <= high for box in boxes)),
    )


def _block_over(roll: Random) -> Statement:
    none = roll.random() < 0.2
    words = "no" if none else roll.choice(("a", "a", "at least one"))
    upper, lower = roll.choice(NLVR_COLORS), roll.choice(NLVR_COLORS)
    over = roll.choice(("on", "above", "above", "over", "on top of"))
    apart = over == "above"  # of single blocks, "above" need not be directly so

    def held(box: Sequence[Shape]) -> bool:
        colors = [shape.color for shape in box]
        return (apart and upper in colors and lower in colors[colors.index(upper) + 1 :]) or _over(box, upper, lower)

    return Statement(
        f"There is {words} {upper} block {over} a {lower} block", lambda boxes: any(map(held, boxes)) != none
    )


def _block_lies(roll: Random) -> Statement:
    """A block by its neighbours: next to another colour, or between two blocks of one colour."""
    color, noun = roll.choice(NLVR_COLORS), roll.choice(("item", "block"))
    below = roll.random() < 0.6

    def beside(box: Sequence[Shape]) -> bool:
        pairs = zip(box, box[1:], strict=False)
        return any((b if below else a).color == color and a.color != b.color for a, b in pairs)

    def between(box: Sequence[Shape]) -> bool:
        return any(b.color == color and a.color == c.color for a, b, c in zip(box, box[1:], box[2:], strict=False))

    if roll.random() < 0.5:
        words = f"{'below' if below else 'above'} a block of a different color"
        return Statement(f"There is a tower with a {color} block {words}", lambda boxes: any(map(beside, boxes)))
    return Statement(
        f"There is a box with a {color} {noun} between {roll.choice(('2', 'two'))} {noun}s of the same color",
        lambda boxes: any(map(between, boxes)),
    )


def _tower_named_height(roll: Random) -> Statement:
    """A "two blocks tower" and what it is made of."""
    height = roll.randint(2, 4)
    color, number = roll.choice(NLVR_COLORS), roll.randint(1, 2)
    pick = Pick(color=color)
    opening = f"There is a {NUMBERS[height]} block{roll.choice(('', 's'))} tower"
    if roll.random() < 0.4:
        words = roll.choice(("that has only one color", "of only one color"))
        return Statement(
            f"{opening} {words}", lambda boxes: any(len(b) == height and len(_colors(b)) == 1 for b in boxes)
        )
    exact = roll.choice(("only", "exactly"))
    return Statement(
        f"{opening} {roll.choice(('which', 'that'))} has {exact} {NUMBERS[number]} {color} {_plural(number, 'block')}",
        lambda boxes: any(len(box) == height and pick.count(box) == number for box in boxes),
    )


def _tower_height(roll: Random) -> Statement:
    amount = _amount(roll, 3)
    height, word = _few(roll, 1, 4)
    draw = roll.random()
    low, high, exact = height, height, roll.choice(("", "", "exactly ", "only "))
    if draw < 0.15 and 1 < height < 4:
        low, high, exact = height, 99, "at least "
    elif draw < 0.3 and height < 4:
        low, high, exact = height + 1, 99, "more than "
    blocks = _plural(height, "block")
    sentence = f"{amount.there} {amount.of('tower')} {_with(roll, amount.many)} {exact}{word} {blocks}"
    return Statement(sentence, lambda boxes: amount.right(sum(low <= len(box) <= high for box in boxes)))


def _tower_height_end(roll: Random) -> Statement:
    amount, color, end = _amount(roll, 2), roll.choice(NLVR_COLORS), roll.choice((0, 0, -1))
    height, word = _few(roll, 2, 4)
    exact = roll.choice(("", "exactly ", "exactly "))
    word_end = "top" if end == 0 else "base"
    joint = roll.choice((" with", " having", ", which has", " and"))
    tail = f"{joint} a {color} block at the {word_end}"
    if roll.random() < 0.15:
        tail = f" and the {word_end} is {color}"
    sentence = f"{amount.there} {amount.of('tower')} with {exact}{word} blocks{tail}"
    return Statement(
        sentence,
        lambda boxes: amount.right(sum(len(box) == height and _color_at(box, end) == color for box in boxes)),
    )


def _the_tower(roll: Random) -> Statement:
    color, end = roll.choice(NLVR_COLORS), roll.choice((0, 0, -1))
    height, word = _few(roll, 2, 4)
    name = "top" if end == 0 else "base"
    sentence = roll.choice((
        f"the tower with {word} blocks has a {color} block at the {name}",
        f"The {name} of the {word} blocks tower is {color}.",
        f"The {name} of a {word} blocks tower is {color}.",
    ))  # fmt: skip
    return Statement(sentence, lambda boxes: any(len(box) == height and _color_at(box, end) == color for box in boxes))


def _block_total(roll: Random) -> Statement:
    amount, color = _amount(roll, 4), roll.choice(NLVR_COLORS)
    sentence = f"{amount.there} {amount.of(f'{color} block')}"
    return Statement(sentence, lambda boxes: amount.right(Pick(color=color).count(sum(map(list, boxes), []))))


def _tower_holds(roll: Random) -> Statement:
    """A number of towers with a number of blocks of one colour."""
    amount, color = _amount(roll, 3), roll.choice(NLVR_COLORS)
    number, word = _few(roll, 1, 3)
    low, high, exact = number, number, roll.choice(("", "", "exactly ", "only "))
    if roll.random() < 0.4:
        low, high, exact = number, 99, roll.choice(("at least ", "at least ", "atleast "))
    has = roll.choice(("with", "with", "that contain" + ("" if amount.many else "s"), _with(roll, amount.many)))
    sentence = f"{amount.there} {amount.of('tower')} {has} {exact}{word} {color} {_plural(number, 'block')}"
    if roll.random() < 0.2:
        low, high = 1, 99
        sentence = f"{amount.there} {amount.of('tower')} that contain{'' if amount.many else 's'} {color} blocks"
    pick = Pick(color=color)
    return Statement(sentence, lambda boxes: amount.right(sum(low <= pick.count(box) <= high for box in boxes)))


def _tower_stacked(roll: Random) -> Statement:
    amount, color = _amount(roll, 2), roll.choice(NLVR_COLORS)
    word = roll.choice(("2", "two"))
    return Statement(
        f"{amount.there} {amount.of('tower')} with {word} {color} blocks stacked together",
        lambda boxes: amount.right(sum(_over(box, color, color) for box in boxes)),
    )


def _tower_mixture(roll: Random) -> Statement:
    """A tower with blocks of this colour and of that."""
    amount = _amount(roll, 2)
    first, second, third = roll.sample(NLVR_COLORS, 3)
    draw = roll.random()
    opening = f"{amount.there} {amount.of('tower')} {_with(roll, amount.many)}"
    if draw < 0.35:
        number, word = _few(roll, 2, 3)
        return Statement(
            f"{opening} a {first} block and {word} {second} blocks",
            lambda boxes: amount.right(
                sum(Pick(color=first).count(box) == 1 and Pick(color=second).count(box) == number for box in boxes)
            ),
        )
    if draw < 0.65:
        return Statement(
            f"{opening} a {first} block and a {second} block",
            lambda boxes: amount.right(sum({first, second} <= _colors(box) for box in boxes)),
        )
    words = roll.choice((f"a {first} block, a {second} block and a {third} block", "blocks of all 3 colours"))
    return Statement(f"{opening} {words}", lambda boxes: amount.right(sum(len(_colors(box)) == 3 for box in boxes)))


def _colors(box: Iterable[Shape]) -> set[str]:
    return {shape.color for shape in box}


def _tower_only(roll: Random) -> Statement:
    """A tower of one colour, or of two and no third."""
    amount = _amount(roll, 3)
    first, second = roll.sample(NLVR_COLORS, 2)
    draw = roll.random()
    if draw < 0.35:
        return Statement(
            f"{amount.there} {amount.of('tower')} with only {first} and {second} blocks",
            lambda boxes: amount.right(sum(_colors(box) == {first, second} for box in boxes)),
        )
    if draw < 0.55:
        words = "with only " + first + " blocks"
        return Statement(
            f"{amount.there} {amount.of('tower')} {words}",
            lambda boxes: amount.right(sum(_colors(box) == {first} for box in boxes)),
        )
    if draw < 0.7:
        tail = roll.choice(("", "", " with only one block"))
        most = 1 if tail else 99
        return Statement(
            f"There is a {first} tower{tail}",
            lambda boxes: any(_colors(box) == {first} and len(box) <= most for box in boxes),
        )
    if draw < 0.85:
        words = roll.choice(("only one", "exactly one"))
        return Statement(
            f"{amount.there} {amount.of('tower')} with {words} block which is {first}",
            lambda boxes: amount.right(sum(len(box) == 1 and box[0].color == first for box in boxes)),
        )
    number = roll.randint(2, 4)
    words = roll.choice((
        "with more than one block where all the blocks are of same color", "with blocks of only one color",
        f"with {NUMBERS[number]} blocks of the same color",
    ))  # fmt: skip
    low, high = (number, number) if "same color" in words and "all" not in words else (2 if "more" in words else 1, 99)
    return Statement(
        f"{amount.there} {amount.of('tower')} {words}",
        lambda boxes: amount.right(sum(len(_colors(box)) == 1 and low <= len(box) <= high for box in boxes)),
    )


def _alike(values: Iterable[object]) -> int:
    """Return how many values of the commonest sort there are."""
    held = list(values)
    return max(map(held.count, held))


def _tower_same(roll: Random) -> Statement:
    low, high, words = roll.choice(
        ((2, 9, "at least two"), (2, 2, "two"), (2, 2, "exactly two"), (2, 2, "only two"), (3, 3, "three"))
    )
    draw, end = roll.random(), roll.choice((0, -1))
    name = "top" if end == 0 else "base"
    if draw < 0.5:
        height = f"{roll.choice(('with', 'of'))} the same height"
        return Statement(
            f"There are {words} towers {height}",
            lambda boxes: low <= _alike(len(box) for box in boxes) <= high,
        )
    if draw < 0.8:
        has = roll.choice(("with", "which have", "which has", "that have"))
        return Statement(
            f"There are {words} towers {has} the same {name} color",
            lambda boxes: low <= _alike(_color_at(box, end) for box in boxes) <= high,
        )
    return Statement(
        f"There are two towers with the same height but their {name}s are not the same in color",
        lambda boxes: any(
            len(a) == len(b) and _color_at(a, end) != _color_at(b, end)
            for a, b in ((boxes[0], boxes[1]), (boxes[0], boxes[2]), (boxes[1], boxes[2]))
        ),
    )


def _tower_second(roll: Random) -> Statement:
    color = roll.choice(NLVR_COLORS)
    amount = _amount(roll, 2)
    where = roll.choice(("the second block is {}", "the second block from the base is {}"))
    joint = roll.choice((" where ", " that "))
    return Statement(
        f"{amount.there} {amount.of('tower')}{joint}{where.format(color)}",
        lambda boxes: amount.right(sum(len(box) > 1 and box[-2].color == color for box in boxes)),
    )


def _tower_every(roll: Random) -> Statement:
    """All towers, or so many of them."""
    color, draw = roll.choice(NLVR_COLORS), roll.random()
    number, word = _few(roll, 1, 2)
    pick = Pick(color=color)
    if draw < 0.35:
        who = roll.choice(("All towers contain", "All towers have", "All 3 towers have", "All the towers have"))
        if roll.random() < 0.2:
            who = roll.choice(("Each tower has", "Every tower has"))
        words, most = roll.choice((("at least ", 99), ("at least ", 99), ("", number), ("exactly ", number)))
        sentence = f"{who} {words}{word} {color} {_plural(number, 'block')}"
        return Statement(sentence, lambda boxes: all(number <= pick.count(box) <= most for box in boxes))
    end = roll.choice((0, -1))
    name = "top" if end == 0 else "base"
    if draw < 0.55:
        who = roll.choice(("All towers have", "Each tower has"))
        return Statement(f"{who} a {color} {name}", lambda boxes: all(_color_at(box, end) == color for box in boxes))
    if draw < 0.75:
        count = roll.randint(1, 3)
        words = roll.choice(("{} of the towers", "{} towers")).format(NUMBERS[count].capitalize())
        least = roll.random() < 0.4
        if least:
            words = "At least " + words.lower()
        words = words.replace("ne towers", "ne tower")
        end_words = f"has a {color} {name}" if count == 1 else f"have {color} {name}s"
        return Statement(
            f"{words} {end_words}",
            lambda boxes: (
                sum(_color_at(box, end) == color for box in boxes) >= count
                if least
                else sum(_color_at(box, end) == color for box in boxes) == count
            ),
        )
    other = roll.choice(NLVR_COLORS)
    return Statement(
        f"One tower has a {color} block {roll.choice(('on top of', 'over', 'above'))} a {other} block",
        lambda boxes: sum(_over(box, color, other) for box in boxes) == 1,
    )


# Scattered shapes

_WALLS = ("the wall", "the wall", "the edge", "the edge", "an edge", "the side")
_PLAIN = ("item", "item", "object", "object")


def _touches(shape: Shape) -> bool:
    return min(wall_gaps(shape)) == 0


def _thing(roll: Random, color: float = 0.8, kind: float = 0.65, size: float = 0.04) -> tuple[Pick, str]:
    """Return some sort of shape and its noun in the singular."""
    pick = Pick(
        size=roll.choice(("small", "medium", "large")) if roll.random() < size else None,
        color=roll.choice(NLVR_COLORS) if roll.random() < color else None,
        kind=roll.choice(NLVR_KINDS) if roll.random() < kind else None,
    )
    return pick, pick.words(roll.choice(_PLAIN))


def _spread(boxes: Boxes) -> list[Shape]:
    return [shape for box in boxes for shape in box]


def _touch(roll: Random) -> Statement:
    amount, (pick, noun) = _amount(roll, 4), _thing(roll)
    apart = roll.random() < 0.4
    how = roll.choice(("", "", "", "closely ")) + "touching"
    wall = roll.choice(("any edge", "any edge", *_WALLS)) if apart else roll.choice(_WALLS)
    words = f"{'not ' if apart else ''}{how.removeprefix('closely ') if apart else how} {wall}"
    return Statement(
        f"{amount.there} {amount.of(noun)} {words}",
        lambda boxes: amount.right(sum(pick.fits(one) and _touches(one) != apart for one in _spread(boxes))),
    )


def _touch_side(roll: Random) -> Statement:
    amount, (pick, noun) = _amount(roll, 3), _thing(roll)
    side, words = roll.choice((
        (3, "the bottom of a box"), (3, "the bottom of a box"), (3, "the base"), (3, "the base"),
        (2, "right wall of a box"), (0, "left wall of a box"), (1, "the top of a box"),
    ))  # fmt: skip
    how = roll.choice(("closely touching", "touching"))
    both = roll.random() < 0.08
    if both:
        first, second = roll.sample(NLVR_COLORS, 2)
        kind = roll.choice(NLVR_KINDS)
        return Statement(
            f"There is a {first} or {second} {kind} {how} {words}",
            lambda boxes: any(
                one.kind == kind and one.color in (first, second) and wall_gaps(one)[side] == 0
                for one in _spread(boxes)
            ),
        )
    return Statement(
        f"{amount.there} {amount.of(noun)} {how} {words}",
        lambda boxes: amount.right(sum(pick.fits(one) and wall_gaps(one)[side] == 0 for one in _spread(boxes))),
    )


def _cornered(shape: Shape) -> bool:
    left, top, right, bottom = wall_gaps(shape)
    return min(left, right) <= 1 and min(top, bottom) <= 1  # people let a pixel of air pass in a corner


def _corner(roll: Random) -> Statement:
    amount, (pick, noun) = _amount(roll, 2), _thing(roll, color=0.3)
    if roll.random() < 0.3:
        kind, color = roll.choice(NLVR_KINDS), roll.choice(NLVR_COLORS)
        return Statement(
            f"There is a {kind} touching the corner that is not {color}",
            lambda boxes: any(one.kind == kind and one.color != color and _cornered(one) for one in _spread(boxes)),
        )
    words = roll.choice(("closely touching a corner of a box", "touching the corner", "closely touching a box corner"))
    if roll.random() < 0.35:
        return Statement(
            f"{amount.there} {amount.of('box|')} with {_a(noun)} closely touching a corner".replace("boxs", "boxes"),
            lambda boxes: amount.right(sum(any(pick.fits(one) and _cornered(one) for one in box) for box in boxes)),
        )
    return Statement(
        f"{amount.there} {amount.of(noun)} {words}",
        lambda boxes: amount.right(sum(pick.fits(one) and _cornered(one) for one in _spread(boxes))),
    )


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _boxes(roll: Random, amount: _Amount) -> str:
    name = "grey box" if roll.random() < 0.1 else "box"
    return f"{amount.there} {amount.words} {name}{'es' if amount.many else ''}"


def _total(roll: Random) -> Statement:
    amount, (pick, noun) = _amount(roll, 5), _thing(roll)
    return Statement(f"{amount.there} {amount.of(noun)}", lambda boxes: amount.right(pick.count(_spread(boxes))))


def _box_total(roll: Random) -> Statement:
    """Boxes with a number of shapes of any sort, perhaps one of them of a certain sort."""
    number, word = _few(roll, 1, 7)
    noun = _plural(number, roll.choice(_PLAIN))
    draw = roll.random()
    pick, thing = _thing(roll, color=0.5, kind=0.5)
    if draw < 0.4:
        who = roll.choice(
            ("One of the grey box", "One of the grey square", "One of the box", "One of the boxes", "One box")
        )
        has = roll.choice(("has exactly", "contains exactly"))
        if roll.random() < 0.4 and thing.count(" ") <= 1:
            one = f"one of which is {_a(thing)}" if number > 1 else f"which is {_a(thing)}"
            if pick.color and pick.kind is None:
                one = f"{'one of ' if number > 1 else ''}which is {pick.color}"
            return Statement(
                f"{who} {has} {NUMBERS[number]} {noun} {one}",
                lambda boxes: any(len(box) == number and pick.count(box) > 0 for box in boxes),
            )
        return Statement(
            f"{who} {has} {NUMBERS[number]} {noun}", lambda boxes: [len(b) for b in boxes].count(number) == 1
        )
    amount = _amount(roll, 2)
    if draw < 0.75:
        exact = roll.choice(("", "", "exactly ", "only "))
        return Statement(
            f"{_boxes(roll, amount)} with {exact}{word} {noun}",
            lambda boxes: amount.right(sum(len(box) == number for box in boxes)),
        )
    one = pick.words("one" if pick.color and not pick.kind else "item")
    return Statement(
        f"{_boxes(roll, amount)} with {word} {noun} and {_a(one)} touching the wall",
        lambda boxes: amount.right(
            sum(len(box) == number and any(pick.fits(s) and _touches(s) for s in box) for box in boxes)
        ),
    )


def _box_holds(roll: Random) -> Statement:
    """Boxes with so many of this sort, and perhaps so many of that one."""
    amount = _amount(roll, 2)
    parts, tests = [], []
    for place in range(roll.choice((1, 2, 2, 2, 3))):
        pick, noun = _thing(roll, color=0.97, kind=0.5, size=0.01)
        least = _amount(roll, 3, none=0.1 if place else 0.0)
        if roll.random() < 0.4 or place == 2:
            least = _Amount("a", False, 1, 99)
        parts.append(least.of(noun))
        tests.append((pick, least))
    words = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    if roll.random() < 0.12:
        pick, least = tests[0]
        return Statement(
            f"One box has {parts[0]}", lambda boxes: sum(least.right(pick.count(box)) for box in boxes) == 1
        )
    if roll.random() < 0.08:
        color, number = roll.choice(NLVR_COLORS), roll.randint(1, 3)
        verb = "is" if number == 1 else "are"
        return Statement(
            f"There is a box with multiple items and {NUMBERS[number]} of them {verb} {color}",
            lambda boxes: any(len(box) > 1 and Pick(color=color).count(box) == number for box in boxes),
        )
    return Statement(
        f"{_boxes(roll, amount)} with {words}",
        lambda boxes: amount.right(sum(all(least.right(pick.count(box)) for pick, least in tests) for box in boxes)),
    )


def _box_colors(roll: Random) -> Statement:
    """Boxes whose shapes have certain colours or so many of them."""
    amount = _amount(roll, 3)
    first, second = roll.sample(NLVR_COLORS, 2)
    opening, draw = f"{_boxes(roll, amount)} with", roll.random()
    number, word = _few(roll, 2, 7)
    noun = roll.choice(("items", "items", "objects"))
    counted = roll.random() < 0.4
    if draw < 0.4:
        words = f"only {first} and {second} {noun}"
        if counted:
            words = f"only {word} {noun} of {first} and {second} color"
        wanted = {first, second}
        return Statement(
            f"{opening} {words}",
            lambda boxes: amount.right(
                sum(_colors(box) == wanted and (len(box) == number or not counted) for box in boxes)
            ),
        )
    if draw < 0.55:
        return Statement(
            f"{opening} only {first} {noun}",
            lambda boxes: amount.right(sum(_colors(box) == {first} for box in boxes)),
        )
    many, words = roll.choice((
        (1, "{} of only one color"), (2, "{} of 2 different colors"), (3, "{} of all 3 different colors"),
        (3, "{} of all 3 colors"), (2, "{} of only two colors"),
    ))  # fmt: skip
    words = words.format(f"{word} {noun}" if counted else noun)
    tail = ""
    pick, thing = _thing(roll, color=0.9)
    tailed = roll.random() < 0.3
    if tailed:
        tail = f" and {_a(thing)}"
    return Statement(
        f"{opening} {words}{tail}",
        lambda boxes: amount.right(
            sum(
                len(_colors(box)) == many
                and (len(box) == number or not counted)
                and (not tailed or pick.count(box) > 0)
                for box in boxes
            )
        ),
    )


def _box_top(roll: Random) -> Statement:
    """Boxes by what lies highest in them."""
    amount, draw = _amount(roll, 2), roll.random()
    pick, noun = _thing(roll, color=1.0, kind=0.2)
    opening = _boxes(roll, amount)
    number, word = _few(roll, 2, 7)
    if draw < 0.35:
        return Statement(
            f"{opening} with {_a(noun)} on top",
            lambda boxes: amount.right(sum(pick.count(box[:1]) > 0 for box in boxes)),
        )
    if draw < 0.75:
        one = f"{_a(roll.choice((pick.words('one'), noun)))} on top"
        return Statement(
            f"{opening} with {word} items and {one}",
            lambda boxes: amount.right(sum(len(box) == number and pick.count(box[:1]) > 0 for box in boxes)),
        )
    if draw < 0.9:
        return Statement(
            f"{opening} with all 3 colors and {_a(noun)} on top",
            lambda boxes: amount.right(sum(len(_colors(box)) == 3 and pick.count(box[:1]) > 0 for box in boxes)),
        )
    return Statement(
        f"There is {_a(noun)} {roll.choice(('on top', 'on top of other items'))}",
        lambda boxes: any(pick.count(box[:1]) > 0 for box in boxes),
    )


def _box_every(roll: Random) -> Statement:
    pick, noun = _thing(roll, color=0.9, kind=0.35)
    number, word = _few(roll, 1, 2)
    many, least = _plural(number, noun), roll.choice(("at least", "at least", "atleast"))
    touching = roll.random() < 0.4
    tail = f" touching {roll.choice(_WALLS)}" if touching else ""
    words = roll.choice((
        f"Each box has {least} {word} {many}{tail}", f"Each grey box contains {least} {word} {many}{tail}",
        f"Every box has {least} {word} {many}{tail}", f"There is {least} {word} {many}{tail} in each box",
        f"All boxes contain {least} {word} {many}{tail}",
    ))  # fmt: skip
    return Statement(
        words,
        lambda boxes: all(
            sum(pick.fits(one) and (_touches(one) or not touching) for one in box) >= number for box in boxes
        ),
    )


def _all_things(roll: Random) -> Statement:
    """All of a sort touch the wall, or none of them does, or all lie in one box."""
    pick, noun = _thing(roll, color=0.95)
    draw = roll.random()
    if draw < 0.2:
        return Statement(
            f"All {noun}s are in the same box.",
            lambda boxes: sum(pick.count(box) > 0 for box in boxes) == 1,
        )
    verb = roll.choice(("touching", "touching", "closely touching"))
    wall = roll.choice(("the edge", "the edge", "an edge", "the wall"))
    if draw < 0.5:
        wall = roll.choice(("any edge", wall))
        none = f"All {noun}s are not {verb} {wall}"
        return Statement(none, lambda boxes: not any(pick.fits(one) and _touches(one) for one in _spread(boxes)))
    return Statement(
        f"{roll.choice(('All', 'All', 'All the'))} {noun}s are {verb} {wall}",
        lambda boxes: all(_touches(one) for one in _spread(boxes) if pick.fits(one)) and pick.count(_spread(boxes)) > 0,
    )


def _above(roll: Random) -> Statement:
    amount = _Amount(*roll.choice((("a", False, 1, 99), ("at least one", False, 1, 99), ("no", False, 0, 0))))
    (upper, noun), (lower, other) = _thing(roll, 0.95, 0.4, 0.0), _thing(roll, 0.95, 0.4, 0.0)
    word, down = roll.choice((("above", 1), ("above", 1), ("below", -1)))
    return Statement(
        f"There is {amount.words} {noun} {word} {_a(other)}",
        lambda boxes: amount.right(
            sum(
                any(lower.fits(two) and (two.y - one.y) * down > 0 for two in box)
                for box in boxes
                for one in box
                if upper.fits(one)
            )
        ),
    )


def _touch_colors(roll: Random) -> Statement:
    """So many of one colour and so many of another touch the walls."""
    first, second = roll.sample(NLVR_COLORS, 2)
    (one, one_word), (two, two_word) = _few(roll, 1, 3), _few(roll, 1, 3)
    only = roll.random() < 0.6
    noun = _plural(two, "item")
    opening = "Only" if only else ("There are" if one > 1 else "There is")

    def holds(boxes: Boxes) -> bool:
        near = [shape.color for shape in _spread(boxes) if _touches(shape)]
        return near.count(first) == one and near.count(second) == two and (not only or len(near) == one + two)

    tail = "are touching the wall." if only else "touching the wall."
    return Statement(f"{opening} {one_word} {first} and {two_word} {second} {noun} {tail}", holds)


def _box_touch(roll: Random) -> Statement:
    """Boxes with so many of a sort that touch a wall, or do not."""
    amount, (pick, noun) = _amount(roll, 3), _thing(roll, color=0.9)
    least = _amount(roll, 3, none=0.0)
    apart = roll.random() < 0.25
    words = f"{least.of(noun)} {'not ' if apart else ''}touching {roll.choice(_WALLS)}"
    return Statement(
        f"{_boxes(roll, amount)} with {words}",
        lambda boxes: amount.right(
            sum(least.right(sum(pick.fits(one) and _touches(one) != apart for one in box)) for box in boxes)
        ),
    )


def _repeat(*weighted: tuple[Template, int]) -> tuple[Template, ...]:
    return tuple(template for template, weight in weighted for _ in range(weight))


TOWER_TEMPLATES = _repeat(
    (_tower_end, 5), (_tower_end_block, 5), (_tower_over, 4), (_block_over, 3), (_tower_height, 3),
    (_tower_height_end, 3), (_the_tower, 2), (_block_total, 2), (_tower_holds, 4), (_tower_stacked, 1),
    (_tower_mixture, 2), (_tower_only, 3), (_tower_same, 2), (_tower_second, 1), (_tower_every, 3), (_block_lies, 1),
    (_tower_named_height, 1), (_total, 1),
    (_box_total, 2), (_box_holds, 4), (_box_colors, 4), (_box_top, 4), (_box_every, 1), (_touch, 2), (_touch_colors, 1),
)  # fmt: skip
SCATTER_TEMPLATES = _repeat(
    (_touch, 6), (_touch_side, 4), (_corner, 2), (_total, 3), (_box_total, 3), (_box_holds, 4), (_box_colors, 4),
    (_box_top, 3), (_box_every, 2), (_all_things, 3), (_above, 1), (_touch_colors, 2), (_box_touch, 1),
)  # fmt: skip


_NOT_OF_TOWERS = re.compile("circle|triangle|small|medium|large")


def _worn(roll: Random, sentence: str) -> str:
    """Return the sentence as hastily as people type: with or without capital and full stop, an opening A lost."""
    sentence = sentence.replace(" ,", ",").rstrip(".") + ("." if roll.random() < 0.45 else "")
    draw = roll.random()
    if sentence[0] == "A" and draw < 0.5:
        return sentence[1:]
    return sentence[0].lower() + sentence[1:] if draw < 0.35 else sentence[0].upper() + sentence[1:]


def draw_statement(roll: Random, towers: bool, templates: Sequence[Template] = ()) -> Statement:
    """Return a sentence about towers or scattered shapes, with its test."""
    template = roll.choice(templates or (TOWER_TEMPLATES if towers else SCATTER_TEMPLATES))
    made = template(roll)
    while towers and _NOT_OF_TOWERS.search(made.sentence):
        made = template(roll)
    return Statement(_worn(roll, made.sentence), made.holds)


def statement(scene: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """Return a sentence about the scene and whether it is true, true and false equally often.

    A free scene has no boxes, so it only gets sentences that count shapes (of NLVR's kinds and colours).
    """
    roll = dice(rng)
    target = roll.random() < 0.5
    boxes = by_box(scene.shapes, scene.boxes)
    templates: Sequence[Template] = (_total,) if scene.boxes == 1 else ()
    for _ in range(4):  # a sort of sentence first, so that the true ones are not all of the easily true sorts
        template = roll.choice(templates or (TOWER_TEMPLATES if scene.towers else SCATTER_TEMPLATES))
        for _ in range(30):
            made = draw_statement(roll, scene.towers, (template,))
            if made.holds(boxes) == target:
                return made.sentence, target
    return made.sentence, made.holds(boxes)


def nlvr_case(rng: np.random.Generator, towers: float = 0.6) -> tuple[Scene, str, bool]:
    """Return a sentence with a scene in the manner of NLVR for which it is true or false, equally often.

    The scene is sought to fit the sentence, not the reverse: so a sentence tells nothing about its own truth.
    """
    roll = dice(rng)
    target, tower = roll.random() < 0.5, roll.random() < towers
    while True:
        made = draw_statement(roll, tower)
        for _ in range(40):
            shapes = nlvr_shapes(roll, tower)
            if made.holds(by_box(shapes)) == target:
                return Scene(draw_nlvr(shapes), shapes, len(BOX_NAMES)), made.sentence, target
