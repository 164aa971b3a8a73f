"""Scenes, the questions about them and the sentences in NLVR's manner: every answer must follow from the shapes."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from modalora.data import statements
from modalora.data.nlvr import NlvrRow, nlvr_scenes
from modalora.data.numbers import NUMBERS
from modalora.data.pictures import chart_picture, word_picture
from modalora.data.questions import QUESTION_KINDS, kind_questions, questions
from modalora.data.scenes import (
    BOX_NAMES,
    COLORS,
    KINDS,
    SIZES,
    Scene,
    Shape,
    are_towers,
    caption,
    cell_labels,
    draw_nlvr,
    free_scene,
    listing,
    nlvr_like,
)
from modalora.data.statements import by_box, draw_statement, nlvr_case, statement
from modalora.errors import DataError


def shape(kind: str, color: str, size: str, box: int, left: int, top: int) -> Shape:
    width = {"small": 10, "medium": 20, "large": 30}[size]
    return Shape(kind, color, size, box * 150 + left + width / 2, top + width / 2, float(width), box)


def block(color: str, box: int, lift: int) -> Shape:
    return shape("square", color, "medium", box, 40, (80, 59, 38, 17)[lift])


SCATTERED = (
    shape("triangle", "yellow", "large", 0, 10, 5),
    shape("square", "blue", "small", 0, 50, 60),
    shape("circle", "black", "medium", 1, 80, 30),
    shape("square", "yellow", "small", 1, 10, 90),
    shape("square", "black", "large", 2, 70, 70),
)
TOWERS = (
    block("blue", 0, 0),
    block("blue", 0, 1),
    block("black", 1, 0),
    block("yellow", 1, 1),
    block("blue", 1, 2),
    block("yellow", 2, 0),
)


def scene_of(shapes: tuple[Shape, ...]) -> Scene:
    return Scene(draw_nlvr(shapes), shapes, 3)


def known(scene: Scene, kind: str, seeds: int = 150) -> dict[str, str]:
    found: dict[str, str] = {}
    for seed in range(seeds):
        for question, answer in questions(scene, np.random.default_rng(seed), 6, (kind,)):
            assert found.setdefault(question, answer) == answer
    return found


def test_questions_about_a_hand_made_scene_have_the_answers_that_one_sees():
    count = known(scene_of(SCATTERED), "count", 400)
    assert count["How many objects are there?"] == "five"
    assert count["How many squares are there?"] == "three"
    assert count["How many yellow objects are there?"] == "two"
    assert count["How many circles are in the left box?"] == "zero"
    color = known(scene_of(SCATTERED), "color")
    assert color["What color is the triangle?"] == "yellow"
    assert color["What color is the circle?"] == "black"
    assert "What color is the square?" not in color
    position = known(scene_of(SCATTERED), "position")
    assert position["Where is the blue square?"] == "left box"
    assert position["Where is the black square?"] == "right box"
    assert position["Is the triangle above the square in the left box?"] == "yes"
    size = known(scene_of(SCATTERED), "size")
    assert size["Is the circle bigger than the triangle?"] == "no"
    assert size["Which is bigger, the triangle or the circle?"] == "triangle"
    presence = known(scene_of(SCATTERED), "presence", 600)
    assert presence["Is there a blue circle?"] == "no"
    assert presence["Do all boxes contain a square?"] == "yes"
    assert known(scene_of(SCATTERED), "shape")["What shape is the blue object?"] == "square"
    touch = known(scene_of(SCATTERED), "touch", 500)
    assert touch["How many objects are touching a wall?"] == "three"
    assert touch["Is there a triangle touching a wall?"] == "no"


def test_questions_about_towers_have_the_answers_that_one_sees():
    color = known(scene_of(TOWERS), "color")
    assert color["What color is the top block in the middle box?"] == "blue"
    assert color["What color is the second block from the bottom in the middle box?"] == "yellow"
    size = known(scene_of(TOWERS), "size")
    assert size["Is the left tower taller than the right tower?"] == "yes"
    assert size["Which tower is taller, the left or the middle one?"] == "middle"
    assert known(scene_of(TOWERS), "position")["Where is the tower of three blocks?"] == "middle box"
    compare = known(scene_of(TOWERS), "comparison")
    assert compare["Which box has the most blocks?"] == "middle box"
    assert compare["Which box has the fewest objects?"] == "right box"


def test_plain_counts_agree_with_a_recount():
    rng = np.random.default_rng(0)
    checked = 0
    for turn in range(300):
        scene = nlvr_like(rng) if turn % 2 else free_scene(rng)
        for question, answer in questions(scene, rng, 4, ("count",)):
            if not (question.startswith("How many ") and question.endswith(" are there?")) or "colors" in question:
                continue
            words = question.removeprefix("How many ").removesuffix(" are there?").split()
            total = 0
            for one in scene.shapes:
                fits = {one.size, one.color, one.kind + "s", "objects", "things", "items", "shapes", "blocks"}
                total += set(words) <= fits
            assert NUMBERS[total] == answer, question
            checked += 1
    assert checked > 200


def test_a_tally_agrees_with_a_recount():
    rng = np.random.default_rng(5)
    boxes = {"left": 0, "middle": 1, "right": 2}
    checked = 0
    for turn in range(120):
        scene = (nlvr_like(rng, 1.0), nlvr_like(rng, 0.0), free_scene(rng))[turn % 3]
        for question, answer in questions(scene, rng, 4, ("tally",)):
            for part in answer.split("; "):
                box, _, items = part.rpartition(": ")
                for item in items.split(", "):
                    number, name = item.split()
                    there = [one for one in scene.shapes if not box or one.box == boxes[box]]
                    total = sum(
                        one.box == boxes[name] if name in boxes else name in (one.color, one.kind, f"{one.kind}s")
                        for one in there
                    )
                    assert NUMBERS[total] == number, (question, answer)
                    checked += 1
    assert checked > 1000


def test_a_list_holds_exactly_what_fits():
    rng = np.random.default_rng(6)
    plain = {"objects", "things", "items", "shapes", "blocks", "list"}
    checked = 0
    for turn in range(120):
        scene = (nlvr_like(rng, 1.0), nlvr_like(rng, 0.0), free_scene(rng))[turn % 3]
        for question, answer in questions(scene, rng, 4, ("list",)):
            words, _, where = question.lower().rstrip(".?").partition(" in the ")
            if "; " in answer or where == "picture" or not words.startswith("list the ") or words.endswith(" box"):
                continue
            asked = set(words.split()) - plain - {"the"}
            fits = [
                one
                for one in scene.shapes
                if asked <= {one.size, one.color, f"{one.kind}s"} and where in ("", BOX_NAMES[one.box])
            ]
            told = [] if answer == "none" else answer.split(", ")
            assert Counter(told) == Counter(f"{one.size} {one.color} {one.kind}" for one in fits), question
            checked += 1
    assert checked > 150


def test_a_listing_is_in_reading_order():
    high, left, right = (shape("circle", "blue", "small", 0, *at) for at in ((80, 2), (5, 44), (70, 36)))
    scene = scene_of((replace(right, color="black"), left, high))
    line = (
        "small blue circle, small blue circle, small black circle"  # left and right share a line, a sixth of the height
    )
    assert listing(scene, scene.shapes) == line
    assert listing(scene, ()) == "none"


def test_a_question_comes_once_and_is_of_the_kind_asked_for():
    rng = np.random.default_rng(1)
    for _ in range(40):
        made = kind_questions(nlvr_like(rng), rng, 8)
        assert len({one.question for one in made}) == len(made) == 8
        assert {one.kind for one in made} <= set(QUESTION_KINDS)
        assert all(one.answer == one.answer.lower() for one in made)
    assert {one.kind for one in kind_questions(nlvr_like(rng), rng, 5, ("count",))} == {"count"}


def test_yes_and_no_are_as_frequent():
    rng = np.random.default_rng(2)
    for kind in ("presence", "comparison", "position", "touch", "size"):
        answers: Counter[str] = Counter()
        for turn in range(400):
            scene = nlvr_like(rng) if turn % 2 else free_scene(rng)
            answers.update(answer for _, answer in questions(scene, rng, 4, (kind,)))
        assert 0.42 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.58, kind


def test_the_same_seed_gives_the_same_of_everything():
    def everything(seed: int) -> list[object]:
        rng = np.random.default_rng(seed)
        first, second, (case, sentence, truth) = nlvr_like(rng), free_scene(rng), nlvr_case(rng)
        word, chart = word_picture(rng), chart_picture(rng)
        pictures = [one.tobytes() for one in (first.image, second.image, case.image, word[0], chart[0])]
        texts = [questions(first, rng, 6), questions(second, rng, 6), statement(first, rng), caption(first)]
        return [pictures, first.shapes, second.shapes, sentence, truth, word[1], chart[1], texts]

    assert everything(7) == everything(7)
    assert everything(7) != everything(8)


def test_shapes_lie_apart_and_inside_their_box():
    rng = np.random.default_rng(3)
    for _ in range(100):
        for scene in (nlvr_like(rng, towers=0.3), free_scene(rng)):
            width, height = (100, 100) if scene.boxes == 3 else scene.image.size
            for place, one in enumerate(scene.shapes):
                half = one.width / 2
                assert half <= one.x - one.box * 150 <= width - half
                assert half <= one.y <= height - half
                for other in scene.shapes[:place]:
                    assert max(abs(one.x - other.x), abs(one.y - other.y)) > half + other.width / 2
        assert 1 <= len(scene.shapes) <= 6


def test_a_drawn_shape_has_its_colour_at_its_centre():
    image = scene_of(SCATTERED).image
    assert image.size == (400, 100)
    assert image.getpixel((120, 50)) == (128, 128, 128)
    rgb = {"black": (0, 0, 0), "blue": (0, 153, 255), "yellow": (255, 255, 0)}
    for one in SCATTERED:
        assert image.getpixel((int(one.x), int(one.y))) == rgb[one.color]


def test_a_caption_reads_box_by_box_from_the_top():
    said = caption(scene_of(SCATTERED[:4]))
    assert said == (
        "left: large yellow triangle, small blue square; middle: medium black circle, small yellow square; right: none"
    )


def test_a_cell_holds_the_larger_of_two_centres():
    small, large = shape("circle", "black", "small", 0, 20, 20), shape("square", "blue", "large", 0, 10, 10)
    labels = cell_labels((small, large), 50, 50, columns=8, rows=2)
    assert labels.shape == (2, 8, 3)
    assert labels.dtype == np.int64
    assert labels[0, 0].tolist() == [KINDS.index("square"), COLORS.index("blue"), SIZES.index("large")]
    assert (labels.reshape(-1, 3)[1:] == -1).all()


def test_statements_about_a_hand_made_scene_are_judged_rightly():
    def judged(shapes: tuple[Shape, ...], towers: bool) -> dict[str, bool]:
        roll, boxes = Random(0), by_box(shapes)
        drawn = [draw_statement(roll, towers) for _ in range(50_000)]
        return {made.sentence.lower().rstrip("."): made.holds(boxes) for made in drawn}

    truths = judged(TOWERS, True)
    assert truths["there is exactly one tower with a blue block at the top"] is False
    assert truths["there are two towers with a blue block at the top"] is True
    assert truths["there is a yellow block on a black block"] is True
    assert truths["there is no blue block as the base of a tower"] is False
    assert truths["there are at least two towers with the same height"] is False
    assert truths["there are 3 blue blocks"] is True
    truths = judged(SCATTERED, False)
    assert truths["there is a black circle touching the wall"] is True
    assert truths["there is a blue square touching the wall"] is False
    assert truths["there is a box with only black items"] is True
    assert truths["there is a square touching the corner that is not yellow"] is True


def test_statements_are_true_half_of_the_time():
    rng = np.random.default_rng(4)
    own = [statement(nlvr_like(rng), rng)[1] for _ in range(600)]
    cases = [nlvr_case(rng)[2] for _ in range(600)]
    assert 0.44 < np.mean(own) < 0.56
    assert 0.44 < np.mean(cases) < 0.56


def test_an_empty_box_breaks_nothing():
    rng = np.random.default_rng(8)
    for shapes in (SCATTERED[:2], TOWERS[:2]):
        for _ in range(200):
            scene = scene_of(shapes)
            assert questions(scene, rng, 6)
            assert statement(scene, rng)[0]


def test_a_free_scene_gets_statements_that_count():
    rng = np.random.default_rng(5)
    sentence, truth = statement(free_scene(rng), rng)
    assert sentence.lower().startswith("there ")
    assert truth in (True, False)


def test_words_and_charts_bring_their_answers():
    rng = np.random.default_rng(6)
    for _ in range(50):
        image, pairs = word_picture(rng)
        text = pairs[0][1]
        assert 1 <= len(text) <= 6
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 2
        assert (NUMBERS[len(text)]) in {answer for _, answer in pairs}
        _, asked = chart_picture(rng)
        answers = dict(asked)
        assert answers["How many bars are there?"] in NUMBERS[2:6]
        assert answers["Which bar is the tallest?"] != answers["Which bar is the shortest?"]


def test_a_missing_split_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="validation.parquet is missing"):
        nlvr_scenes(tmp_path, "validation")


@pytest.fixture(scope="module")
def real(data_folder: Path) -> list[NlvrRow]:
    return nlvr_scenes(data_folder, "train")


@pytest.mark.data
def test_our_drawing_equals_the_real_pictures_but_for_soft_edges(real: list[NlvrRow]):
    for row in real[:300]:
        drawn = np.asarray(draw_nlvr(row.shapes)).astype(int)
        actual = np.asarray(row.scene.image).astype(int)
        assert np.abs(drawn - actual).max() < 60  # samples of a soft edge; a misplaced shape differs by 150 or more


@pytest.mark.data
def test_counts_of_generated_scenes_are_spread_like_the_real_ones(real: list[NlvrRow]):
    rng = np.random.default_rng(0)
    for towers, most in ((True, 4), (False, 7)):
        truly = [len(box) for row in real if are_towers(row.shapes) == towers for box in by_box(row.shapes)]
        made = [len(box) for _ in range(400) for box in by_box(nlvr_like(rng, towers=float(towers)).shapes)]
        assert max(truly) == max(made) == most
        assert np.mean(made) == pytest.approx(np.mean(truly), abs=0.25)


@pytest.mark.data
def test_our_judgement_of_sentences_equals_the_real_labels(real: list[NlvrRow]):
    def plain(sentence: str) -> str:
        return " ".join(sentence.lower().rstrip(". ").split()).removeprefix("a")

    roll = Random(0)
    held: dict[tuple[bool, str], statements.Judge] = {}
    for towers in (True, False):
        for _ in range(60_000):
            made = draw_statement(roll, towers)
            held.setdefault((towers, plain(made.sentence)), made.holds)
    outcomes: defaultdict[bool, int] = defaultdict(int)
    for row in real:
        judge = held.get((are_towers(row.shapes), plain(row.sentence)))
        if judge is not None:
            outcomes[judge(by_box(row.shapes)) == row.label] += 1
    assert sum(outcomes.values()) > 900
    assert outcomes[True] / sum(outcomes.values()) > 0.99  # 0.998 seen; people err now and then


def test_pictures_are_plain_rgb():
    rng = np.random.default_rng(9)
    made: list[Image.Image] = [nlvr_like(rng).image, free_scene(rng).image, word_picture(rng)[0], chart_picture(rng)[0]]
    assert [one.mode for one in made] == ["RGB"] * 4
