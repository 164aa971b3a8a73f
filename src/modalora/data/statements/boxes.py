"""Statements about shapes scattered in boxes, as `modalora.data.statements` words and judges them."""

from __future__ import annotations

from random import Random

from modalora.data.numbers import NUMBERS
from modalora.data.picks import Pick, wall_gaps, with_article
from modalora.data.scenes import NLVR_COLORS, NLVR_KINDS, Shape
from modalora.data.statements.words import Amount, Boxes, Statement, colors_of, draw_amount, draw_number, plural, repeat

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
    amount, (pick, noun) = draw_amount(roll, 4), _thing(roll)
    apart = roll.random() < 0.4
    how = roll.choice(("", "", "", "closely ")) + "touching"
    wall = roll.choice(("any edge", "any edge", *_WALLS)) if apart else roll.choice(_WALLS)
    words = f"{'not ' if apart else ''}{how.removeprefix('closely ') if apart else how} {wall}"
    return Statement(
        f"{amount.there} {amount.of(noun)} {words}",
        lambda boxes: amount.right(sum(pick.fits(one) and _touches(one) != apart for one in _spread(boxes))),
    )


def _touch_side(roll: Random) -> Statement:
    amount, (pick, noun) = draw_amount(roll, 3), _thing(roll)
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
    amount, (pick, noun) = draw_amount(roll, 2), _thing(roll, color=0.3)
    if roll.random() < 0.3:
        kind, color = roll.choice(NLVR_KINDS), roll.choice(NLVR_COLORS)
        return Statement(
            f"There is a {kind} touching the corner that is not {color}",
            lambda boxes: any(one.kind == kind and one.color != color and _cornered(one) for one in _spread(boxes)),
        )
    words = roll.choice(("closely touching a corner of a box", "touching the corner", "closely touching a box corner"))
    if roll.random() < 0.35:
        return Statement(
            f"{amount.there} {amount.of('box|').replace('boxs', 'boxes')} with {with_article(noun)} closely touching "
            "a corner",
            lambda boxes: amount.right(sum(any(pick.fits(one) and _cornered(one) for one in box) for box in boxes)),
        )
    return Statement(
        f"{amount.there} {amount.of(noun)} {words}",
        lambda boxes: amount.right(sum(pick.fits(one) and _cornered(one) for one in _spread(boxes))),
    )


def _boxes(roll: Random, amount: Amount) -> str:
    name = "grey box" if roll.random() < 0.1 else "box"
    return f"{amount.there} {amount.words} {name}{'es' if amount.many else ''}"


def _total(roll: Random) -> Statement:
    amount, (pick, noun) = draw_amount(roll, 5), _thing(roll)
    return Statement(f"{amount.there} {amount.of(noun)}", lambda boxes: amount.right(pick.count(_spread(boxes))))


def _box_total(roll: Random) -> Statement:
    """Boxes with a number of shapes of any sort, perhaps one of them of a certain sort."""
    number, word = draw_number(roll, 1, 7)
    noun = plural(number, roll.choice(_PLAIN))
    draw = roll.random()
    pick, thing = _thing(roll, color=0.5, kind=0.5)
    if draw < 0.4:
        who = roll.choice(
            ("One of the grey box", "One of the grey square", "One of the box", "One of the boxes", "One box")
        )
        has = roll.choice(("has exactly", "contains exactly"))
        if roll.random() < 0.4 and thing.count(" ") <= 1:
            one = f"one of which is {with_article(thing)}" if number > 1 else f"which is {with_article(thing)}"
            if pick.color and pick.kind is None:
                one = f"{'one of ' if number > 1 else ''}which is {pick.color}"
            return Statement(
                f"{who} {has} {NUMBERS[number]} {noun} {one}",
                lambda boxes: any(len(box) == number and pick.count(box) > 0 for box in boxes),
            )
        return Statement(
            f"{who} {has} {NUMBERS[number]} {noun}", lambda boxes: [len(b) for b in boxes].count(number) == 1
        )
    amount = draw_amount(roll, 2)
    if draw < 0.75:
        exact = roll.choice(("", "", "exactly ", "only "))
        return Statement(
            f"{_boxes(roll, amount)} with {exact}{word} {noun}",
            lambda boxes: amount.right(sum(len(box) == number for box in boxes)),
        )
    one = pick.words("one" if pick.color and not pick.kind else "item")
    return Statement(
        f"{_boxes(roll, amount)} with {word} {noun} and {with_article(one)} touching the wall",
        lambda boxes: amount.right(
            sum(len(box) == number and any(pick.fits(s) and _touches(s) for s in box) for box in boxes)
        ),
    )


def _box_holds(roll: Random) -> Statement:
    """Boxes with so many of this sort, and perhaps so many of that one."""
    amount = draw_amount(roll, 2)
    parts, tests = [], []
    for place in range(roll.choice((1, 2, 2, 2, 3))):
        pick, noun = _thing(roll, color=0.97, kind=0.5, size=0.01)
        least = draw_amount(roll, 3, none=0.1 if place else 0.0)
        if roll.random() < 0.4 or place == 2:
            least = Amount("a", False, 1, 99)
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
    amount = draw_amount(roll, 3)
    first, second = roll.sample(NLVR_COLORS, 2)
    opening, draw = f"{_boxes(roll, amount)} with", roll.random()
    number, word = draw_number(roll, 2, 7)
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
                sum(colors_of(box) == wanted and (len(box) == number or not counted) for box in boxes)
            ),
        )
    if draw < 0.55:
        return Statement(
            f"{opening} only {first} {noun}",
            lambda boxes: amount.right(sum(colors_of(box) == {first} for box in boxes)),
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
        tail = f" and {with_article(thing)}"
    return Statement(
        f"{opening} {words}{tail}",
        lambda boxes: amount.right(
            sum(
                len(colors_of(box)) == many
                and (len(box) == number or not counted)
                and (not tailed or pick.count(box) > 0)
                for box in boxes
            )
        ),
    )


def _box_top(roll: Random) -> Statement:
    """Boxes by what lies highest in them."""
    amount, draw = draw_amount(roll, 2), roll.random()
    pick, noun = _thing(roll, color=1.0, kind=0.2)
    opening = _boxes(roll, amount)
    number, word = draw_number(roll, 2, 7)
    if draw < 0.35:
        return Statement(
            f"{opening} with {with_article(noun)} on top",
            lambda boxes: amount.right(sum(pick.count(box[:1]) > 0 for box in boxes)),
        )
    if draw < 0.75:
        one = f"{with_article(roll.choice((pick.words('one'), noun)))} on top"
        return Statement(
            f"{opening} with {word} items and {one}",
            lambda boxes: amount.right(sum(len(box) == number and pick.count(box[:1]) > 0 for box in boxes)),
        )
    if draw < 0.9:
        return Statement(
            f"{opening} with all 3 colors and {with_article(noun)} on top",
            lambda boxes: amount.right(sum(len(colors_of(box)) == 3 and pick.count(box[:1]) > 0 for box in boxes)),
        )
    return Statement(
        f"There is {with_article(noun)} {roll.choice(('on top', 'on top of other items'))}",
        lambda boxes: any(pick.count(box[:1]) > 0 for box in boxes),
    )


def _box_every(roll: Random) -> Statement:
    pick, noun = _thing(roll, color=0.9, kind=0.35)
    number, word = draw_number(roll, 1, 2)
    many, least = plural(number, noun), roll.choice(("at least", "at least", "atleast"))
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
    amount = Amount(*roll.choice((("a", False, 1, 99), ("at least one", False, 1, 99), ("no", False, 0, 0))))
    (upper, noun), (lower, other) = _thing(roll, 0.95, 0.4, 0.0), _thing(roll, 0.95, 0.4, 0.0)
    word, down = roll.choice((("above", 1), ("above", 1), ("below", -1)))
    return Statement(
        f"There is {amount.words} {noun} {word} {with_article(other)}",
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
    (one, one_word), (two, two_word) = draw_number(roll, 1, 3), draw_number(roll, 1, 3)
    only = roll.random() < 0.6
    noun = plural(two, "item")
    opening = "Only" if only else ("There are" if one > 1 else "There is")

    def holds(boxes: Boxes) -> bool:
        near = [shape.color for shape in _spread(boxes) if _touches(shape)]
        return near.count(first) == one and near.count(second) == two and (not only or len(near) == one + two)

    tail = "are touching the wall." if only else "touching the wall."
    return Statement(f"{opening} {one_word} {first} and {two_word} {second} {noun} {tail}", holds)


def _box_touch(roll: Random) -> Statement:
    """Boxes with so many of a sort that touch a wall, or do not."""
    amount, (pick, noun) = draw_amount(roll, 3), _thing(roll, color=0.9)
    least = draw_amount(roll, 3, none=0.0)
    apart = roll.random() < 0.25
    words = f"{least.of(noun)} {'not ' if apart else ''}touching {roll.choice(_WALLS)}"
    return Statement(
        f"{_boxes(roll, amount)} with {words}",
        lambda boxes: amount.right(
            sum(least.right(sum(pick.fits(one) and _touches(one) != apart for one in box)) for box in boxes)
        ),
    )


COUNTS = (_total,)  # of a scene without boxes
OF_TOWERS = repeat(
    (_total, 1), (_box_total, 2), (_box_holds, 4), (_box_colors, 4), (_box_top, 4), (_box_every, 1), (_touch, 2),
    (_touch_colors, 1),
)  # fmt: skip
SCATTERED = repeat(
    (_touch, 6), (_touch_side, 4), (_corner, 2), (_total, 3), (_box_total, 3), (_box_holds, 4), (_box_colors, 4),
    (_box_top, 3), (_box_every, 2), (_all_things, 3), (_above, 1), (_touch_colors, 2), (_box_touch, 1),
)  # fmt: skip
