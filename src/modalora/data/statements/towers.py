"""Statements about towers of blocks, as `modalora.data.statements` words and judges them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

from modalora.data.numbers import NUMBERS
from modalora.data.picks import Pick
from modalora.data.scenes import NLVR_COLORS, Shape
from modalora.data.statements.words import Statement, colors_of, draw_amount, draw_number, draw_with, plural, repeat


def _color_at(box: Sequence[Shape], place: int) -> str | None:
    return box[place].color if box else None


def _tower_end(roll: Random) -> Statement:
    amount, color, end = draw_amount(roll, 3), roll.choice(NLVR_COLORS), roll.choice((0, -1))
    word = "top" if end == 0 else roll.choice(("base", "base", "bottom"))
    one = "1 " if roll.random() < 0.05 else "a "
    tail = roll.choice(("at the ", "at the ", "at the ", "on the " if end == 0 else "at the ", "at ")) + word
    sentence = f"{amount.there} {amount.of('tower')} {draw_with(roll, amount.many)} {one}{color} block {tail}"
    return Statement(sentence, lambda boxes: amount.right(sum(_color_at(box, end) == color for box in boxes)))


def _tower_end_block(roll: Random) -> Statement:
    amount, color, end = draw_amount(roll, 3), roll.choice(NLVR_COLORS), roll.choice((0, -1))
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
    number, word = draw_number(roll, 2, 4)
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
    amount, upper, lower = draw_amount(roll, 2), roll.choice(NLVR_COLORS), roll.choice(NLVR_COLORS)
    over = roll.choice(("over", "over", "above", "above", "on top of", "on"))
    words = f"a {upper} block {over} a {lower} block"
    if roll.random() < 0.15:
        words = f"a {lower} block below a {upper} block"
    low, high, tail = _height(roll, 0.12)
    sentence = f"{amount.there} {amount.of('tower')}{tail} {draw_with(roll, amount.many)} {words}"
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
            f"{opening} {words}", lambda boxes: any(len(b) == height and len(colors_of(b)) == 1 for b in boxes)
        )
    exact = roll.choice(("only", "exactly"))
    return Statement(
        f"{opening} {roll.choice(('which', 'that'))} has {exact} {NUMBERS[number]} {color} {plural(number, 'block')}",
        lambda boxes: any(len(box) == height and pick.count(box) == number for box in boxes),
    )


def _tower_height(roll: Random) -> Statement:
    amount = draw_amount(roll, 3)
    height, word = draw_number(roll, 1, 4)
    draw = roll.random()
    low, high, exact = height, height, roll.choice(("", "", "exactly ", "only "))
    if draw < 0.15 and 1 < height < 4:
        low, high, exact = height, 99, "at least "
    elif draw < 0.3 and height < 4:
        low, high, exact = height + 1, 99, "more than "
    blocks = plural(height, "block")
    sentence = f"{amount.there} {amount.of('tower')} {draw_with(roll, amount.many)} {exact}{word} {blocks}"
    return Statement(sentence, lambda boxes: amount.right(sum(low <= len(box) <= high for box in boxes)))


def _tower_height_end(roll: Random) -> Statement:
    amount, color, end = draw_amount(roll, 2), roll.choice(NLVR_COLORS), roll.choice((0, 0, -1))
    height, word = draw_number(roll, 2, 4)
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
    height, word = draw_number(roll, 2, 4)
    name = "top" if end == 0 else "base"
    sentence = roll.choice((
        f"the tower with {word} blocks has a {color} block at the {name}",
        f"The {name} of the {word} blocks tower is {color}.",
        f"The {name} of a {word} blocks tower is {color}.",
    ))  # fmt: skip
    return Statement(sentence, lambda boxes: any(len(box) == height and _color_at(box, end) == color for box in boxes))


def _block_total(roll: Random) -> Statement:
    amount, color = draw_amount(roll, 4), roll.choice(NLVR_COLORS)
    sentence = f"{amount.there} {amount.of(f'{color} block')}"
    return Statement(sentence, lambda boxes: amount.right(Pick(color=color).count(sum(map(list, boxes), []))))


def _tower_holds(roll: Random) -> Statement:
    """A number of towers with a number of blocks of one colour."""
    amount, color = draw_amount(roll, 3), roll.choice(NLVR_COLORS)
    number, word = draw_number(roll, 1, 3)
    low, high, exact = number, number, roll.choice(("", "", "exactly ", "only "))
    if roll.random() < 0.4:
        low, high, exact = number, 99, roll.choice(("at least ", "at least ", "atleast "))
    has = roll.choice(("with", "with", "that contain" + ("" if amount.many else "s"), draw_with(roll, amount.many)))
    sentence = f"{amount.there} {amount.of('tower')} {has} {exact}{word} {color} {plural(number, 'block')}"
    if roll.random() < 0.2:
        low, high = 1, 99
        sentence = f"{amount.there} {amount.of('tower')} that contain{'' if amount.many else 's'} {color} blocks"
    pick = Pick(color=color)
    return Statement(sentence, lambda boxes: amount.right(sum(low <= pick.count(box) <= high for box in boxes)))


def _tower_stacked(roll: Random) -> Statement:
    amount, color = draw_amount(roll, 2), roll.choice(NLVR_COLORS)
    word = roll.choice(("2", "two"))
    return Statement(
        f"{amount.there} {amount.of('tower')} with {word} {color} blocks stacked together",
        lambda boxes: amount.right(sum(_over(box, color, color) for box in boxes)),
    )


def _tower_mixture(roll: Random) -> Statement:
    """A tower with blocks of this colour and of that."""
    amount = draw_amount(roll, 2)
    first, second, third = roll.sample(NLVR_COLORS, 3)
    draw = roll.random()
    opening = f"{amount.there} {amount.of('tower')} {draw_with(roll, amount.many)}"
    if draw < 0.35:
        number, word = draw_number(roll, 2, 3)
        return Statement(
            f"{opening} a {first} block and {word} {second} blocks",
            lambda boxes: amount.right(
                sum(Pick(color=first).count(box) == 1 and Pick(color=second).count(box) == number for box in boxes)
            ),
        )
    if draw < 0.65:
        return Statement(
            f"{opening} a {first} block and a {second} block",
            lambda boxes: amount.right(sum({first, second} <= colors_of(box) for box in boxes)),
        )
    words = roll.choice((f"a {first} block, a {second} block and a {third} block", "blocks of all 3 colours"))
    return Statement(f"{opening} {words}", lambda boxes: amount.right(sum(len(colors_of(box)) == 3 for box in boxes)))


def _tower_only(roll: Random) -> Statement:
    """A tower of one colour, or of two and no third."""
    amount = draw_amount(roll, 3)
    first, second = roll.sample(NLVR_COLORS, 2)
    draw = roll.random()
    if draw < 0.35:
        return Statement(
            f"{amount.there} {amount.of('tower')} with only {first} and {second} blocks",
            lambda boxes: amount.right(sum(colors_of(box) == {first, second} for box in boxes)),
        )
    if draw < 0.55:
        words = "with only " + first + " blocks"
        return Statement(
            f"{amount.there} {amount.of('tower')} {words}",
            lambda boxes: amount.right(sum(colors_of(box) == {first} for box in boxes)),
        )
    if draw < 0.7:
        tail = roll.choice(("", "", " with only one block"))
        most = 1 if tail else 99
        return Statement(
            f"There is a {first} tower{tail}",
            lambda boxes: any(colors_of(box) == {first} and len(box) <= most for box in boxes),
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
        lambda boxes: amount.right(sum(len(colors_of(box)) == 1 and low <= len(box) <= high for box in boxes)),
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
    amount = draw_amount(roll, 2)
    where = roll.choice(("the second block is {}", "the second block from the base is {}"))
    joint = roll.choice((" where ", " that "))
    return Statement(
        f"{amount.there} {amount.of('tower')}{joint}{where.format(color)}",
        lambda boxes: amount.right(sum(len(box) > 1 and box[-2].color == color for box in boxes)),
    )


def _tower_every(roll: Random) -> Statement:
    """All towers, or so many of them."""
    color, draw = roll.choice(NLVR_COLORS), roll.random()
    number, word = draw_number(roll, 1, 2)
    pick = Pick(color=color)
    if draw < 0.35:
        who = roll.choice(("All towers contain", "All towers have", "All 3 towers have", "All the towers have"))
        if roll.random() < 0.2:
            who = roll.choice(("Each tower has", "Every tower has"))
        words, most = roll.choice((("at least ", 99), ("at least ", 99), ("", number), ("exactly ", number)))
        sentence = f"{who} {words}{word} {color} {plural(number, 'block')}"
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


TOWERS = repeat(
    (_tower_end, 5), (_tower_end_block, 5), (_tower_over, 4), (_block_over, 3), (_tower_height, 3),
    (_tower_height_end, 3), (_the_tower, 2), (_block_total, 2), (_tower_holds, 4), (_tower_stacked, 1),
    (_tower_mixture, 2), (_tower_only, 3), (_tower_same, 2), (_tower_second, 1), (_tower_every, 3), (_block_lies, 1),
    (_tower_named_height, 1),
)  # fmt: skip
