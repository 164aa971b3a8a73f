"""Training rows: cells of a picture, conversations, right answers, and mixtures that are the same every time."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor

from modalora.contracts import IGNORED, Message
from modalora.data.instruct import instruct, recall, repetition
from modalora.data.numbers import DIGITS, NUMBERS, number_words
from modalora.data.rows import ASKED, COUNTED, cells, conversation, frames, number_and_picture, spoken_question
from modalora.data.scenes import BOX_NAMES, COLORS, KINDS, SIZES, Scene, Shape, free_scene, nlvr_like
from modalora.data.speech import Clip
from modalora.data.text import recurring_window
from modalora.models.sizes import tiny
from modalora.models.vision import ImageEmbedder
from modalora.processing.image import ImageConfig, image_features
from modalora.processing.tokenizer import TextTokenizer

IMAGE = ImageConfig(crop=56, patch=14, max_crops=6)
SIDE = IMAGE.side // 2  # tokens along the global view
STORY = (
    "Once upon a time seven blue boxes stood by the wall, and the quick brown fox jumps over every one of them. " * 30
)
TOKENIZER = TextTokenizer.train([STORY], 320)
CANVASES = ((400, 100), (56, 56), (112, 300), (300, 170), (57, 113), (333, 111))


def picture(size: tuple[int, int], *shapes: Shape) -> Image.Image:
    image = Image.new("RGB", size, "white")
    for shape in shapes:
        box = [
            shape.x - shape.width / 2,
            shape.y - shape.width / 2,
            shape.x + shape.width / 2,
            shape.y + shape.width / 2,
        ]
        ImageDraw.Draw(image).rectangle(box, "black")
    return image


def tables(labels: Tensor, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The fine and the global grid of labels, (lines, tokens, 3), without their separators."""
    fine, coarse = labels[: -SIDE * (SIDE + 1) - 1], labels[-SIDE * (SIDE + 1) :]
    ends = (fine[:, 0] == IGNORED).nonzero().flatten()
    return fine.view(len(ends), -1, 3)[:, :-1], coarse.view(SIDE, SIDE + 1, 3)[:, :-1]


def darkness(features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """How dark the picture is that the encoder gets: the crops put together again, and the global view."""
    rows, columns = features["grid"].tolist()
    dark = (1 - features["pixels"].mean(1)) / 2
    together = dark[1:].unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return together, dark[0]


def centre(dark: Tensor) -> tuple[float, float]:
    """Row and column of the middle of what is dark, in tokens."""
    dark = dark.clamp(min=0)
    at = [float((dark.sum(axis) * (torch.arange(dark.shape[1 - axis]) + 0.5)).sum() / dark.sum()) for axis in (1, 0)]
    return at[0] / (2 * IMAGE.patch), at[1] / (2 * IMAGE.patch)


@pytest.mark.parametrize("size", CANVASES)
def test_cells_are_one_per_token_and_ignore_the_separators(size: tuple[int, int]) -> None:
    features, tokens = image_features(picture(size), IMAGE)
    labels = cells((), size, features, IMAGE.patch)["cells"]
    assert labels.shape == (tokens, 3)
    assert labels.dtype == torch.long
    embedder = ImageEmbedder(tiny().vision)  # type: ignore[arg-type]
    with torch.no_grad():
        embedder.line_end.fill_(50.0)
        embedder.view_end.fill_(60.0)
        (embedded,) = embedder([features])
    assert torch.equal((labels == IGNORED).all(1), (embedded >= 50).all(1))
    assert set(labels[(labels != IGNORED).all(1)].flatten().tolist()) == {0}


def test_the_fine_grid_comes_before_the_global_one() -> None:
    features, _ = image_features(picture((300, 170)), IMAGE)
    embedder = ImageEmbedder(tiny().vision).eval()  # type: ignore[arg-type]
    changed = features["pixels"].clone()
    changed[0] += torch.randn(changed[0].shape)
    with torch.no_grad():
        before, after = embedder([features])[0], embedder([{**features, "pixels": changed}])[0]
    other = (before != after).any(1)
    assert not other[: -SIDE * (SIDE + 1)].any()
    assert other[-SIDE * (SIDE + 1) :].view(SIDE, SIDE + 1)[:, :-1].all()


@given(st.sampled_from(CANVASES), st.floats(0, 1), st.floats(0, 1), st.sampled_from(KINDS), st.sampled_from(COLORS))
@settings(deadline=None, max_examples=60)
def test_a_shape_is_told_of_the_token_that_its_middle_falls_into(
    size: tuple[int, int], across: float, down: float, kind: str, color: str
) -> None:
    width = min(size) // 10 * 2 + 1
    x, y = (round(width + share * (length - 2 * width)) for share, length in zip((across, down), size, strict=True))
    shape = Shape(kind, color, "medium", x + 0.5, y + 0.5, width, 0)
    features, _ = image_features(picture(size, shape), IMAGE)
    told = torch.tensor([KINDS.index(kind) + 1, COLORS.index(color) + 1, SIZES.index("medium") + 1])
    labels = cells([shape], size, features, IMAGE.patch)["cells"]
    for table, dark in zip(tables(labels, features), darkness(features), strict=True):
        row, column = centre(dark)
        # resizing moves a middle by up to half a pixel of the 28 of a token: nothing is said about so near an edge
        assume(all(0.03 < place % 1 < 0.97 for place in (row, column)))
        assert torch.equal(table[int(row), int(column)], told)
        assert int((table != 0).any(-1).sum()) == 1


def test_cells_of_a_scene_of_three_boxes_stand_where_one_sees_them() -> None:
    # 400 x 100 becomes 224 x 56: 2 lines of 8 tokens of 50 x 50 pixels, and 2 x 2 of 200 x 50 in the global view
    shapes = (
        Shape("circle", "black", "small", 20.0, 20.0, 10.0, 0),
        Shape("square", "yellow", "large", 180.0, 75.0, 30.0, 1),
        Shape("triangle", "blue", "medium", 390.0, 60.0, 20.0, 2),
        Shape("square", "blue", "small", 385.0, 90.0, 10.0, 2),
    )
    features, _ = image_features(picture((400, 100), *shapes), IMAGE)
    fine, coarse = tables(cells(shapes, (400, 100), features, IMAGE.patch)["cells"], features)
    circle, square, triangle = (
        [KINDS.index(one.kind) + 1, COLORS.index(one.color) + 1, SIZES.index(one.size) + 1] for one in shapes[:3]
    )
    assert fine.shape == (2, 8, 3)
    assert {tuple(at): fine[tuple(at)].tolist() for at in (fine[..., 0] > 0).nonzero().tolist()} == {
        (0, 0): circle,
        (1, 3): square,
        (1, 7): triangle,  # the larger of two
    }
    assert coarse.tolist() == [[circle, [0, 0, 0]], [square, triangle]]


def test_counts_tell_of_the_crop_and_of_the_whole_picture() -> None:
    shapes = (
        Shape("circle", "black", "small", 20.0, 20.0, 10.0, 0),
        Shape("square", "blue", "large", 380.0, 75.0, 30.0, 2),
        Shape("square", "blue", "small", 340.0, 90.0, 10.0, 2),
    )
    features, tokens = image_features(picture((400, 100), *shapes), IMAGE)
    counts = cells(shapes, (400, 100), features, IMAGE.patch)["counts"]
    blue, square, pair = COLORS.index("blue"), 8 + KINDS.index("square"), 16 + 5 * COLORS.index("blue") + 1
    assert KINDS[1] == "square"
    assert counts.shape == (tokens, 2, COUNTED)
    first, last, whole = counts[0, 0], counts[7, 0], counts[-2, 1]  # top left, top right, and the last global token
    assert [int(first[at]) for at in (blue, square, pair)] == [0, 0, 0]
    assert int(first[COLORS.index("black")]) == 1
    assert [int(last[at]) for at in (blue, square, pair)] == [2, 2, 2]
    assert [int(whole[at]) for at in (blue, square, pair)] == [2, 2, 2]
    assert int(whole[:8].sum()) == len(shapes)
    assert bool((counts[0, 1] == IGNORED).all())  # a crop knows nothing of the whole


def test_a_conversation_shows_its_media_once_before_the_first_question() -> None:
    media = [("image", "picture"), ("audio", "clip")]
    assert conversation(media, [("How many?", "two"), ("Which?", "blue")]) == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "picture"},
                {"type": "audio", "audio": "clip"},
                {"type": "text", "text": "How many?"},
            ],
        },
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "blue"},
    ]
    (asked, answer) = conversation(media, [("", "two")])
    assert asked["content"] == [{"type": "image", "image": "picture"}, {"type": "audio", "audio": "clip"}]
    assert answer["content"] == "two"


def recount(scene: Scene, things: str) -> int:
    """How many of the things that a phrase names the scene shows."""
    words, _, box = things.partition(" in the ")
    shapes = [shape for shape in scene.shapes if not box or BOX_NAMES[shape.box] == box]
    if words.endswith("colors"):
        return len({shape.color for shape in shapes})
    wanted = set(words.removesuffix("s").split())
    return sum(wanted <= names(shape) for shape in shapes)


def names(shape: Shape) -> set[str]:
    return {shape.size, shape.color, shape.kind, "object", "thing", "item", "shape", "block"}


def test_number_and_picture_says_yes_exactly_when_the_number_is_right() -> None:
    rng = np.random.default_rng(0)
    # the value of every sample tells which digit it is
    digits = {word: [Clip(np.full(800, (n + 1) / 20, np.float32), 8000, (word,))] for n, word in enumerate(DIGITS)}
    answers: list[str] = []
    for turn in range(300):
        scene = nlvr_like(rng) if turn % 3 else free_scene(rng)
        asked, answer, *more = number_and_picture(scene, digits, rng, augmented=False)
        image, audio, text = asked["content"]
        assert image["image"] is scene.image
        wave, rate = audio["audio"]
        said = round(float(np.median(wave)) * 20) - 1
        assert rate == 8000
        question = text["text"].split("as the number")[0] if "as many" in text["text"] else text["text"]
        for frame in (
            "Is the spoken number the number of ",
            "Does the picture show as many ",
            "Compare the spoken number with the number of ",
        ):
            question = question.removeprefix(frame)
        things = question.partition(".")[0].removesuffix("?").strip()
        things = things.removesuffix(" as the number you hear").strip()
        assert answer["content"] == ("yes" if recount(scene, things) == said else "no"), text["text"]
        answers.append(answer["content"])
        assert [turn["content"] for turn in more[1:]] in ([], [DIGITS[said]])
    # 300 fair draws: four standard deviations are 0.115
    assert 0.385 < answers.count("yes") / len(answers) < 0.615


def test_more_turns_ask_the_same_number_of_other_things() -> None:
    rng = np.random.default_rng(1)
    digits = {word: [Clip(np.zeros(800, np.float32), 8000, (word,))] for word in DIGITS}
    answers: list[str] = []
    lengths: list[int] = []
    for turn in range(150):
        scene = nlvr_like(rng) if turn % 3 else free_scene(rng)
        turns = number_and_picture(scene, digits, rng, turns=6)
        texts = [turn["content"] if isinstance(turn["content"], str) else turn["content"][-1]["text"] for turn in turns]
        asked = [(q, a) for q, a in zip(texts[::2], texts[1::2], strict=True) if a in ("yes", "no")]
        assert 1 <= len(asked) <= 6
        assert len(set(asked)) == len(asked)
        answers += [a for _, a in asked]
        lengths.append(len(asked))
    assert set(answers) == {"yes", "no"}
    assert 0.3 < answers.count("yes") / len(answers) < 0.6
    assert max(lengths) > 3


def test_passages_recur_within_a_window() -> None:
    stream = np.arange(5000, dtype=np.uint16)
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = recurring_window(stream, 200, rng)
        assert len(ids) == 200
        assert len(set(ids)) <= 4 * 40  # at most four passages of at most a fifth


def test_recall_and_repetition_are_answered_from_the_question() -> None:
    stream, rng = np.array(TOKENIZER.encode(STORY)), np.random.default_rng(0)
    for _ in range(50):
        for message, answer in _pairs(repetition(stream, TOKENIZER, rng)):
            assert message.partition(": ")[2] == answer
        first, *rest = _pairs(recall(stream, TOKENIZER, rng))
        given, _, question = first[0].partition("\n")
        said = dict(item.split() for item in given.removeprefix("Remember: ").split(", "))
        for asked, answer in ((question, first[1]), *rest):
            if asked.startswith("What is "):
                assert said[asked.removeprefix("What is ").rstrip("?")] == answer
            else:
                value = asked.removeprefix("Which are ").rstrip("?")
                assert answer == ", ".join(name for name, told in said.items() if told == value)


def _pairs(turns: list[Message]) -> list[tuple[str, str]]:
    texts = [turn["content"] if isinstance(turn["content"], str) else turn["content"][0]["text"] for turn in turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_small_text_questions_have_one_right_answer() -> None:
    source = instruct(np.array(TOKENIZER.encode(STORY)), TOKENIZER)
    rng = np.random.default_rng(0)
    pairs: list[tuple[str, str]] = []
    for _ in range(2500):
        turns = source(rng)
        texts = [turn["content"] if isinstance(turn["content"], str) else turn["content"][0]["text"] for turn in turns]
        if not texts[0].startswith(("Picture: ", "Digits: ", "Remember: ")):
            pairs += zip(texts[::2], texts[1::2], strict=True)
    words = {number_words(value): value for value in range(100)} | {str(value): value for value in range(100)}
    seen: dict[str, int] = dict.fromkeys(("sum", "count", "down", "after", "bigger", "say", "words"), 0)
    for question, answer in pairs:
        rest = question.rstrip("?.")
        if rest.startswith("What is ") and any(sign in rest for sign in (" plus ", " + ", " minus ", " - ")):
            sign = next(sign for sign in (" plus ", " + ", " minus ", " - ") if sign in rest)
            one, two = (words[part] for part in rest.removeprefix("What is ").split(sign))
            value = one + two if sign in (" plus ", " + ") else one - two
            assert answer == (number_words(value) if sign.strip().isalpha() else str(value)), question
            seen["sum"] += 1
        elif rest.startswith(("Count from ", "Count down from ")):
            low, high = (words[part] for part in rest.partition(" from ")[2].split(" to "))
            step = 1 if rest.startswith("Count from") else -1
            assert answer == " ".join(number_words(value) for value in range(low, high + step, step)), question
            seen["count" if step == 1 else "down"] += 1
        elif rest.startswith("What number comes after "):
            assert answer == number_words(words[rest.removeprefix("What number comes after ")] + 1), question
            seen["after"] += 1
        elif rest.startswith("Which is bigger, "):
            both = rest.removeprefix("Which is bigger, ").split(" or ")
            assert words[both[0]] != words[both[1]]
            assert answer == max(both, key=words.__getitem__), question
            seen["bigger"] += 1
        elif rest.startswith("Say ") and rest.endswith(" times"):
            _, word, times, _ = rest.split()
            assert answer.split() == [word] * words[times], question
            seen["say"] += 1
        elif question.startswith("How many words are in: "):
            assert answer == NUMBERS[len(question.partition(": ")[2].split())], question
            seen["words"] += 1
    assert min(seen.values()) > 20, seen


def test_questions_about_several_pictures_are_answered_by_the_one_they_name() -> None:
    rng = np.random.default_rng(0)
    most = named = tallied = 0
    for turn in range(60):
        scenes = [free_scene(rng) for _ in range(int(rng.integers(2, 5)))]
        first, *rest = frames(scenes, rng, 4, tallies=turn % 2 == 1)
        assert [part["image"] for part in first["content"][:-1]] == [scene.image for scene in scenes]
        turns = [first["content"][-1]["text"], *(turn["content"] for turn in rest)]
        texts = [turn if isinstance(turn, str) else turn[-1]["text"] for turn in turns]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            if match := re.fullmatch(r"Which picture has the most (\w+) shapes\?", question):
                counts = [sum(shape.color == match[1] for shape in scene.shapes) for scene in scenes]
                assert answer == f"picture {NUMBERS[1 + int(np.argmax(counts))]}"
                assert counts.count(max(counts)) == 1
                most += 1
            elif match := re.fullmatch(r"How many (\w+) shapes are in each picture\?", question):
                counts = [sum(shape.color == match[1] for shape in scene.shapes) for scene in scenes]
                told = [f"picture {NUMBERS[place + 1]}: {NUMBERS[count]}" for place, count in enumerate(counts)]
                assert answer == ", ".join(told)
                assert any(counts)
                tallied += 1
            elif match := re.fullmatch(
                r"In picture (\w+): How many (\w+) (?:shapes|objects|things|items) are there\?", question
            ):
                if match[2] in COLORS:
                    shapes = scenes[NUMBERS.index(match[1]) - 1].shapes
                    assert answer == NUMBERS[sum(shape.color == match[2] for shape in shapes)], question
                named += 1
    assert most > 20
    assert named > 5
    assert tallied == 30


def test_a_spoken_question_goes_on_with_its_words_and_more_about_the_picture() -> None:
    rng = np.random.default_rng(0)
    spoken = ("how", "many", "objects", "are", "there")
    bank = {" ".join(spoken): [Clip(np.zeros(800, np.float32), 8000, spoken)]}
    lengths = []
    for _ in range(40):
        scene = nlvr_like(rng)
        alone, turns = (spoken_question(scene, bank, np.random.default_rng(len(lengths)), count) for count in (1, 5))
        if turns is None:
            assert alone is None
            continue
        assert alone == turns[:2]
        assert [part["type"] for part in turns[0]["content"]] == ["image", "audio"]
        assert turns[1]["content"] == NUMBERS[len(scene.shapes)]
        assert [
            message["content"] if n % 2 else message["content"][-1]["text"] for n, message in enumerate(turns[2:4])
        ] == [ASKED, " ".join(spoken)]
        lengths.append(len(turns))
    assert len(lengths) > 5
    assert set(lengths) == {10}
