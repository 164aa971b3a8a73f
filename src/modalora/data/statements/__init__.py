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
from collections.abc import Sequence
from random import Random

from numpy.random import Generator

from modalora.data.scenes import BOX_NAMES, Scene, dice, draw_nlvr, nlvr_shapes
from modalora.data.statements.boxes import COUNTS, OF_TOWERS, SCATTERED
from modalora.data.statements.towers import TOWERS
from modalora.data.statements.words import Statement, Template, by_box

__all__ = ["by_box", "draw_statement", "nlvr_case", "statement"]


_NOT_OF_TOWERS = re.compile("circle|triangle|small|medium|large")


def _worn(roll: Random, sentence: str) -> str:
    """Return the sentence as hastily as people type: with or without capital and full stop, an opening A lost."""
    sentence = sentence.replace(" ,", ",").rstrip(".") + ("." if roll.random() < 0.45 else "")
    draw = roll.random()
    if sentence[0] == "A" and draw < 0.5:
        return sentence[1:]
    return sentence[0].lower() + sentence[1:] if draw < 0.35 else sentence[0].upper() + sentence[1:]


def _templates(towers: bool) -> Sequence[Template]:
    return (*TOWERS, *OF_TOWERS) if towers else SCATTERED


def draw_statement(roll: Random, towers: bool, templates: Sequence[Template] = ()) -> Statement:
    """Return a sentence about towers or scattered shapes, with its test."""
    template = roll.choice(templates or _templates(towers))
    made = template(roll)
    while towers and _NOT_OF_TOWERS.search(made.sentence):
        made = template(roll)
    return Statement(_worn(roll, made.sentence), made.holds)


def statement(scene: Scene, rng: Generator) -> tuple[str, bool]:
    """Return a sentence about the scene and whether it is true, true and false equally often.

    A free scene has no boxes, so it only gets sentences that count shapes (of NLVR's kinds and colours).
    """
    roll = dice(rng)
    target = roll.random() < 0.5
    boxes = by_box(scene.shapes, scene.boxes)
    templates = COUNTS if scene.boxes == 1 else _templates(scene.towers)
    for _ in range(4):  # a sort of sentence first, so that the true ones are not all of the easily true sorts
        template = roll.choice(templates)
        for _ in range(30):
            made = draw_statement(roll, scene.towers, (template,))
            if made.holds(boxes) == target:
                return made.sentence, target
    return made.sentence, made.holds(boxes)


def nlvr_case(rng: Generator, towers: float = 0.6) -> tuple[Scene, str, bool]:
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
