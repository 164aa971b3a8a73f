"""Questions about scenes, each with exactly one right answer that is computed from the shapes.

They ask after counts, colours, places, sizes, presence, comparisons, shapes and walls. Answers are short and lower
case, numbers are words up to twelve. A question is only asked where the picture settles it: things named with "the" are
unique, and places and sizes differ clearly. Yes and no, and the values of what is asked for, are kept in balance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from numpy.random import Generator

from modalora.data.numbers import NUMBERS
from modalora.data.picks import (
    MANY_TRIES,
    PLAIN,
    Pick,
    attribute,
    box_shapes,
    noun_of,
    palette,
    random_pick,
    refer,
    references,
    wall_gaps,
    with_article,
)
from modalora.data.scenes import BOX_NAMES, BOX_SIDE, KINDS, NLVR_COLORS, Scene, Shape, caption, dice, listing

QUESTION_KINDS = ("count", "color", "position", "size", "presence", "comparison", "shape", "touch", "list", "tally")
DESCRIBE = ("Describe the image.", "What is in the picture?", "List the shapes.")


class Question(NamedTuple):
    """A question about a picture, what kind it is, and its answer."""

    kind: str
    question: str
    answer: str


def kind_questions(
    scene: Scene,
    rng: Generator,
    count: int,
    kinds: Sequence[str] = QUESTION_KINDS,
) -> list[Question]:
    """Return different questions about the scene, the kinds in turn.

    There are fewer than count where the scene does not give rise to so many of these kinds.
    """
    roll = dice(rng)
    open_kinds = list(kinds)
    roll.shuffle(open_kinds)
    failures: Counter[str] = Counter()
    found: dict[str, Question] = {}
    turn = 0
    while open_kinds and len(found) < count:
        kind = open_kinds[turn % len(open_kinds)]
        pair = _MAKERS[kind](scene, roll)
        turn += 1
        if pair is not None and pair[0] not in found:
            found[pair[0]] = Question(kind, pair[0], pair[1])
            continue
        failures[kind] += 1
        if failures[kind] > 2 * MANY_TRIES:
            open_kinds.remove(kind)
    return list(found.values())


def questions(
    scene: Scene,
    rng: Generator,
    count: int,
    kinds: Sequence[str] = QUESTION_KINDS,
) -> list[tuple[str, str]]:
    """Return different (question, answer) pairs about the scene; kind_questions without the kinds."""
    return [(made.question, made.answer) for made in kind_questions(scene, rng, count, kinds)]


Pair = tuple[str, str]


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _even(roll: Random, made: Sequence[tuple[Pick, str]]) -> tuple[Pick, str]:
    """Return one of the candidates such that rare answers are as likely as common ones."""
    answer = roll.choice(sorted({answer for _, answer in made}))
    return roll.choice([one for one in made if one[1] == answer])


def _count(scene: Scene, roll: Random) -> Pair | None:
    if scene.boxes > 1 and roll.random() < 0.1:
        return _count_boxes(scene, roll)
    if roll.random() < 0.04:
        colors = len({shape.color for shape in scene.shapes})
        return f"How many {roll.choice(('different ', ''))}colors are there?", NUMBERS[colors]
    made = []
    for _ in range(MANY_TRIES):
        pick = random_pick(roll, scene)
        total = pick.count(scene.shapes)
        if total < len(NUMBERS):
            made.append((pick, NUMBERS[total]))
    if not made:
        return None
    pick, answer = _even(roll, made)
    many = pick.words(noun_of(roll, scene), many=True)
    if pick.box is None:
        forms: tuple[str, ...] = ("How many {} are there?",) * 4 + (
            "How many {} can you see?", "How many {} are in the picture?", "How many {} does the image show?",
            "Count the {}.", "What is the number of {}?",
        )  # fmt: skip
        return roll.choice(forms).format(many), answer
    box = BOX_NAMES[pick.box]
    if scene.towers and roll.random() < 0.4:
        box = box.replace("box", "tower")
    forms = ("How many {} are in the {}?",) * 4 + (
        "How many {} are there in the {}?", "Count the {} in the {}.", "What is the number of {} in the {}?",
    )  # fmt: skip
    if roll.random() < 0.15:
        return f"How many {many} does the {box} have?", answer
    return roll.choice(forms).format(many, box), answer


def _count_boxes(scene: Scene, roll: Random) -> Pair:
    pick = random_pick(roll, scene, boxed=0.0)
    total = len({shape.box for shape in scene.shapes if pick.fits(shape)})
    verb = roll.choice(("contain", "have"))
    return f"How many boxes {verb} {with_article(pick.words(noun_of(roll, scene)))}?", NUMBERS[total]


def _color(scene: Scene, roll: Random) -> Pair | None:
    if scene.boxes == 1 and roll.random() < 0.15:
        places = [_place(scene, shape) for shape in scene.shapes]
        chosen = roll.randrange(len(places))
        place = places[chosen]
        if place is None or None in places or places.count(place) > 1:
            return None
        where = "at the center" if place == "center" else f"in the {place}"
        return f"What color is the {roll.choice(PLAIN)} {where}?", scene.shapes[chosen].color
    named = attribute(scene, roll, "color", 0.8 if scene.towers else 0.15)
    if named is None:
        return None
    forms = ("What color is the {}?",) * 4 + (
        "Which color is the {}?", "What is the color of the {}?", "Tell me the color of the {}.",
    )  # fmt: skip
    return roll.choice(forms).format(named[0]), named[1].color


def _shape(scene: Scene, roll: Random) -> Pair | None:
    if scene.towers:
        return None
    named = attribute(scene, roll, "kind", 0.15)
    if named is None or any(kind in named[0].split() for kind in KINDS):
        return None
    words = named[0].replace("shape", "object")
    return roll.choice(("What shape is the {}?", "What shape is the {}?", "Which shape is the {}?")).format(
        words
    ), named[1].kind


def _place(scene: Scene, shape: Shape) -> str | None:
    """Return the box, or the corner of a free canvas (or its centre), that the shape is in; None where unclear."""
    if scene.boxes > 1:
        return BOX_NAMES[shape.box]
    columns, rows = scene.image.size
    x, y = shape.x / columns - 0.5, shape.y / rows - 0.5
    if abs(x) < 0.09 and abs(y) < 0.09:
        return "center"
    if abs(x) < 0.13 or abs(y) < 0.13:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def _position(scene: Scene, roll: Random) -> Pair | None:
    draw = roll.random()
    if scene.towers and draw < 0.35:
        return _tower_place(scene, roll)
    if draw > (0.55 if scene.towers else 0.7):
        return _relation(scene, roll)
    boxes = [shape for shape in scene.shapes if refer(scene, shape, roll, boxed=False)]
    places = sorted({place for shape in boxes if (place := _place(scene, shape))})
    if not places:
        return None
    place = roll.choice(places)
    shape = roll.choice([shape for shape in boxes if _place(scene, shape) == place])
    words = refer(scene, shape, roll, boxed=False)
    if words is None:
        return None
    if scene.boxes > 1:
        forms: tuple[str, ...] = ("Where is the {}?",) * 3 + ("Which box is the {} in?", "In which box is the {}?")
    else:
        forms = ("Where is the {}?",) * 4 + ("Where is the {} in the picture?", "In which part is the {}?")
    return roll.choice(forms).format(words), place


def _tower_place(scene: Scene, roll: Random) -> Pair | None:
    towers = [box_shapes(scene, box) for box in range(scene.boxes)]
    kind, color, height = roll.randrange(3), roll.choice(NLVR_COLORS), roll.randint(1, 4)
    if kind == 2:
        fits = [len(tower) == height for tower in towers]
        words = f"tower of {NUMBERS[height]} block{'s' if height > 1 else ''}"
    else:
        fits = [bool(tower) and tower[-kind].color == color for tower in towers]
        words = f"tower with a {color} block at the {('base', 'top')[kind]}"
    if sum(fits) != 1:
        return None
    return f"Where is the {words}?", BOX_NAMES[fits.index(True)]


def _relation(scene: Scene, roll: Random) -> Pair | None:
    """Return a yes/no question on how two shapes of one box lie."""
    box = roll.randrange(scene.boxes)
    shapes = box_shapes(scene, box)
    if len(shapes) < 2:
        return None
    first, second = roll.sample(shapes, 2)
    side = BOX_SIDE if scene.boxes > 1 else min(scene.image.size)
    across, down = second.x - first.x, second.y - first.y
    word, gap = roll.choice(
        (("to the left of", across), ("to the right of", -across), ("above", down), ("below", -down))
    )
    if abs(gap) < 0.12 * side:
        return None
    part = Scene(scene.image, tuple(shapes), 1) if scene.boxes > 1 else scene
    noun = "block" if scene.towers else roll.choice(PLAIN)
    one, other = references(part, first, noun, boxed=False), references(part, second, noun, boxed=False)
    if not one or not other:
        return None
    where = f" in the {BOX_NAMES[box]}" if scene.boxes > 1 else ""
    one_words, other_words = min(one, key=len), min(other, key=len)
    return f"Is the {one_words} {word} the {other_words}{where}?", _yes(gap > 0)


def _size(scene: Scene, roll: Random) -> Pair | None:
    if scene.towers:
        return _heights(scene, roll)
    if roll.random() < 0.25:
        named = attribute(scene, roll, "size", 0.0)
        form = roll.choice(("What size is the {}?", "How big is the {}?"))
        return None if named is None else (form.format(named[0]), named[1].size)
    if len(scene.shapes) < 2:
        return None
    first, second = roll.sample(scene.shapes, 2)
    if first.size == second.size:
        return None
    boxed = scene.boxes > 1 and first.box == second.box and roll.random() < 0.5
    part = Scene(scene.image, tuple(box_shapes(scene, first.box)), 1) if boxed else scene
    noun = roll.choice(PLAIN)
    one = [references(part, shape, noun, hidden="size", boxed=False) for shape in (first, second)]
    if not all(one):
        return None
    names = [min(words, key=len) for words in one]
    where = f" in the {BOX_NAMES[first.box]}" if boxed else ""
    words, sign = roll.choice((("bigger", 1), ("bigger", 1), ("larger", 1), ("smaller", -1)))
    wins = (first.width - second.width) * sign > 0
    if roll.random() < 0.5:
        return f"Is the {names[0]} {words} than the {names[1]}{where}?", _yes(wins)
    form = roll.choice(("Which is {0}, the {1} or the {2}{3}?", "Which one is {0}, the {1} or the {2}{3}?"))
    return form.format(words, *names, where), names[0] if wins else names[1]


def _heights(scene: Scene, roll: Random) -> Pair | None:
    first, second = roll.sample(range(scene.boxes), 2)
    tall = [len(box_shapes(scene, box)) for box in (first, second)]
    if tall[0] == tall[1]:
        return None
    names = [BOX_NAMES[box].split()[0] for box in (first, second)]
    word, sign = roll.choice((("taller", 1), ("taller", 1), ("shorter", -1)))
    wins = (tall[0] - tall[1]) * sign > 0
    if roll.random() < 0.5:
        return f"Is the {names[0]} tower {word} than the {names[1]} tower?", _yes(wins)
    return f"Which tower is {word}, the {names[0]} or the {names[1]} one?", names[0] if wins else names[1]


def _presence(scene: Scene, roll: Random) -> Pair | None:
    target = roll.random() < 0.5
    every = scene.boxes > 1 and roll.random() < 0.25
    for _ in range(2 * MANY_TRIES):
        pick = random_pick(roll, scene, boxed=0.0 if every else 0.4)
        if pick.color is None and pick.kind is None and pick.size is None:
            continue
        held = {shape.box for shape in scene.shapes if pick.fits(shape)}
        if (len(held) == scene.boxes if every else bool(held)) != target:
            continue
        words = with_article(pick.words(noun_of(roll, scene)))
        if every:
            forms = ("Do all boxes contain {}?", "Does every box contain {}?", "Does each box have {}?")
            return roll.choice(forms).format(words), _yes(target)
        where = "" if pick.box is None else f" in the {BOX_NAMES[pick.box]}"
        if roll.random() < 0.2:
            where = where or " in the picture"
            return f"Can you see {words}{where}?", _yes(target)
        return f"Is there {words}{where}?", _yes(target)
    return None


def _comparison(scene: Scene, roll: Random) -> Pair | None:
    if scene.boxes > 1 and roll.random() < 0.6:
        pick = random_pick(roll, scene, boxed=0.0)
        counts = [Pick(pick.size, pick.color, pick.kind, box).count(scene.shapes) for box in range(scene.boxes)]
        word, best = roll.choice((("most", max(counts)), ("most", max(counts)), ("fewest", min(counts))))
        if counts.count(best) > 1:
            return None
        verb = roll.choice(("has", "has", "contains"))
        many = pick.words(noun_of(roll, scene), many=True)
        return f"Which box {verb} the {word} {many}?", BOX_NAMES[counts.index(best)]
    colors, kinds = palette(scene)
    if scene.towers or roll.random() < 0.5:
        noun = noun_of(roll, scene)
        first, second = (Pick(color=color) for color in roll.sample(colors, 2))
    else:
        noun = ""
        first, second = (Pick(kind=kind) for kind in roll.sample(kinds, 2))
    gap = first.count(scene.shapes) - second.count(scene.shapes)
    if gap == 0:
        return None
    if (gap > 0) != (roll.random() < 0.5):
        first, second, gap = second, first, -gap
    word = "more"
    if roll.random() < 0.25:
        first, second, word = second, first, "fewer"
    names = [pick.words(noun, many=True) for pick in (first, second)]
    return f"Are there {word} {names[0]} than {names[1]}?", _yes(gap > 0)


def _touch(scene: Scene, roll: Random) -> Pair | None:
    if scene.boxes == 1 or scene.towers:
        return None
    wall = roll.choice(("a wall", "a wall", "an edge", "the bottom", "the right wall"))
    side = {"the bottom": slice(3, 4), "the right wall": slice(2, 3)}.get(wall, slice(0, 4))
    gaps: list[float] = [min(list(wall_gaps(shape))[side]) for shape in scene.shapes]
    asked = roll.random() < 0.5
    target = roll.random() < 0.5
    made = []
    for _ in range(MANY_TRIES):
        pick = random_pick(roll, scene)
        near = [gap for gap, shape in zip(gaps, scene.shapes, strict=True) if pick.fits(shape)]
        if any(0 < gap < 3 for gap in near):
            continue  # a pixel or two of air: too close to call
        total = sum(gap == 0 for gap in near)
        if asked and (total > 0) == target:
            made.append((pick, _yes(target)))
        elif not asked and total < len(NUMBERS):
            made.append((pick, NUMBERS[total]))
    if not made:
        return None
    pick, answer = _even(roll, made)
    where = "" if pick.box is None else f" in the {BOX_NAMES[pick.box]}"
    noun = roll.choice(PLAIN)
    if asked:
        return f"Is there {with_article(pick.words(noun))} touching {wall}{where}?", answer
    return f"How many {pick.words(noun, many=True)} are touching {wall}{where}?", answer


def _list(scene: Scene, roll: Random) -> Pair | None:
    """Return a request to list what is in a box, what agrees with a description, or everything."""
    draw = roll.random()
    if draw < 0.15:
        return roll.choice(DESCRIBE), caption(scene)
    if draw < 0.4 and scene.boxes > 1:
        box = roll.randrange(scene.boxes)
        form = roll.choice(("What is in the {}?", "List the {}.", "Describe the {}."))
        return form.format(BOX_NAMES[box]), listing(scene, box_shapes(scene, box))
    pick = random_pick(roll, scene)
    if pick.box is None and pick == Pick():
        return None
    where = "" if pick.box is None else f" in the {BOX_NAMES[pick.box]}"
    words = pick.words(noun_of(roll, scene), many=True)
    return f"List the {words}{where}.", listing(scene, filter(pick.fits, scene.shapes))


def _tally(scene: Scene, roll: Random) -> Pair | None:
    """Return a request for all counts at once: many numbers to learn from in few words."""
    colors, kinds = palette(scene)
    by_color = scene.towers or roll.random() < 0.5
    each = "color" if by_color else "kind"
    picks = [Pick(color=color) for color in colors] if by_color else [Pick(kind=kind) for kind in kinds]

    def row(shapes: Sequence[Shape], words: Callable[[Pick, int], str]) -> str:
        counts = [(pick, pick.count(shapes)) for pick in picks]
        told = [f"{NUMBERS[count]} {words(pick, count)}" for pick, count in counts if count or scene.boxes > 1]
        return ", ".join(told)

    def name(pick: Pick, count: int) -> str:
        return pick.color or pick.words("", many=count != 1)

    if max(pick.count(scene.shapes) for pick in picks) >= len(NUMBERS):
        return None
    if scene.boxes == 1 or roll.random() < 0.4:
        return f"How many of each {each}?", row(scene.shapes, name)
    if roll.random() < 0.25:
        boxes = [f"{NUMBERS[len(box_shapes(scene, box))]} {BOX_NAMES[box].split()[0]}" for box in range(scene.boxes)]
        return "How many in each box?", ", ".join(boxes)
    boxes = [f"{BOX_NAMES[box].split()[0]}: {row(box_shapes(scene, box), name)}" for box in range(scene.boxes)]
    return f"How many of each {each} in each box?", "; ".join(boxes)


_MAKERS: dict[str, Callable[[Scene, Random], Pair | None]] = {
    "count": _count,
    "color": _color,
    "position": _position,
    "size": _size,
    "presence": _presence,
    "comparison": _comparison,
    "shape": _shape,
    "touch": _touch,
    "list": _list,
    "tally": _tally,
}
