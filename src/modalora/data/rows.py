"""Training rows from scenes, pictures and sound: what the sources of a mixture draw.

A conversation puts its media before the first question; further questions follow as turns, so that one picture or clip
pays for several answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from modalora.contracts import IGNORED, Message
from modalora.data.nlvr import NlvrRow
from modalora.data.numbers import DIGITS, NUMBERS
from modalora.data.pictures import chart_picture, word_picture
from modalora.data.questions import DESCRIBE, questions
from modalora.data.scenes import COLORS, KINDS, SIZES, Scene, Shape, caption, cell_labels, free_scene, nlvr_like
from modalora.data.speech import TRANSCRIBE, Clip, digit_string, speech_questions
from modalora.data.statements import nlvr_case, statement

Pairs = Sequence[tuple[str, str]]
Conversation = list[Message]

TRUE_OR_FALSE = " True or false?"


def conversation(media: Sequence[tuple[str, Any]], pairs: Pairs) -> Conversation:
    """Return a conversation: media (modality, payload) and the first question, then the other questions as turns."""
    messages: Conversation = []
    for number, (question, answer) in enumerate(pairs):
        parts = [{"type": kind, kind: payload} for kind, payload in media] if number == 0 else []
        content = [*parts, {"type": "text", "text": question}] if question else parts
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def judged(sentence: str, truth: bool) -> tuple[str, str]:
    """Return a sentence as the question whether it is true, with the answer."""
    return sentence + TRUE_OR_FALSE, "true" if truth else "false"


def scene_conversation(scene: Scene, rng: Generator, turns: int) -> Conversation:
    """Return questions, statements or a caption about a scene."""
    draw = rng.random()
    if draw < 0.15:
        pairs = [(str(rng.choice(DESCRIBE)), caption(scene))]
    elif draw < 0.45 and scene.boxes > 1:
        pairs = [judged(*statement(scene, rng)) for _ in range(turns)]
    else:
        pairs = list(questions(scene, rng, turns))
    return conversation([("image", scene.image)], pairs)


def drawn_picture(rng: Generator, turns: int, ask: Sequence[str] | None = None, towers: float = 0.6) -> Conversation:
    """Return a conversation about a generated picture: NLVR-like or free scenes, words, charts, or a written case.

    ask: kinds of questions; where given there are only such questions, about scenes. towers: their share of those in
    the manner of NLVR.
    """
    draw = rng.random()
    if ask is not None:
        scene = free_scene(rng) if draw < 0.25 else nlvr_like(rng, towers)
        return conversation([("image", scene.image)], questions(scene, rng, turns, ask))
    if draw < 0.06:
        image, pairs = word_picture(rng) if rng.random() < 0.6 else chart_picture(rng)
        return conversation([("image", image)], pairs[:turns])
    if draw < 0.28:
        scene, sentence, truth = nlvr_case(rng)
        rest = [*questions(scene, rng, turns - 2), judged(*statement(scene, rng))]
        return conversation([("image", scene.image)], [judged(sentence, truth), *rest])
    scene = free_scene(rng) if draw < 0.42 else nlvr_like(rng, towers)
    return scene_conversation(scene, rng, turns)


def real_scene(row: NlvrRow, rng: Generator, turns: int, ask: Sequence[str] | None = None) -> Conversation:
    """Return a conversation about a real NLVR picture that opens with its human sentence, or only asks such kinds."""
    scene = row.scene
    if ask is not None:
        return conversation([("image", scene.image)], questions(scene, rng, turns, ask))
    rest = list(questions(scene, rng, turns - 2)) + [judged(*statement(scene, rng))]
    rng.shuffle(rest)
    return conversation([("image", scene.image)], [judged(row.sentence, row.label), *rest])


def heard_digits(rows: Sequence[Clip], rng: Generator, most: int = 7, *, transcribe_only: bool = False) -> Conversation:
    """Return a conversation about one to `most` spoken digits, the transcription among the questions."""
    clip = digit_string(rows, rng, 1, most)
    pairs = speech_questions(clip, rng)
    if transcribe_only:
        pairs = pairs[:1]
    else:
        order = rng.permutation(len(pairs))[:3]
        pairs = pairs[:1] if rng.random() < 0.5 else [pairs[index] for index in order]
    return conversation([("audio", (clip.wave, clip.rate))], pairs)


def heard_sentence(clip: Clip) -> Conversation:
    """Return the transcription of a spoken sentence."""
    return conversation([("audio", (clip.wave, clip.rate))], [(TRANSCRIBE, clip.text)])


SAME_NUMBER = (
    "Is the spoken number the number of {things}?",
    "Does the picture show as many {things} as the number you hear?",
    "Compare the spoken number with the number of {things}. Are they equal?",
)


def number_and_picture(
    scene: Scene, digits: dict[str, list[Clip]], rng: Generator, *, augmented: bool = True, turns: int = 1
) -> Conversation:
    """Return a picture with a spoken digit, asked whether that many things are shown; yes and no equally often.

    Further turns ask the same of other things, and for numbers of things and the spoken number themselves.
    """
    counts: dict[str, int] = {}
    counted = questions(scene, rng, 8 * turns, ("count",))
    for question, answer in counted:
        match = re.fullmatch(r"How many (.+) are (?:there|(in the .+ box))\?", question)
        if match and answer in DIGITS:
            counts[" ".join(filter(None, match.groups()))] = DIGITS.index(answer)
    (things, many), *others = counts.items() or [("green shapes", sum(one.color == "green" for one in scene.shapes))]
    same = bool(rng.random() < 0.5)
    near = [value for value in range(max(0, many - 3), min(9, many + 3) + 1) if value != many]
    value = many if same else int(rng.choice(near))
    clips = digits[DIGITS[value]]
    clip = digit_string([clips[int(rng.integers(len(clips)))]], rng, 1, 1, augmented)
    equal = [name for name, count in others if count == value][: turns // 2]
    unequal = [name for name, count in others if count != value][: max(len(equal), 1)]
    rest = [(name, True) for name in equal] + [(name, False) for name in unequal]
    rng.shuffle(rest)
    asked = [(things, same), *rest][:turns]
    pairs = [(str(rng.choice(SAME_NUMBER)).format(things=name), "yes" if yes else "no") for name, yes in asked]
    if rng.random() < 0.3:
        pairs.append(("What number is spoken?", DIGITS[value]))
    if turns > 1:
        pairs += counted[: turns // 3]
        rng.shuffle(pairs)
    return conversation([("image", scene.image), ("audio", (clip.wave, clip.rate))], pairs)


def frames(scenes: Sequence[Scene], rng: Generator, turns: int, *, tallies: bool = False) -> Conversation:
    """Return several pictures with questions about one of them, by its number, or about which has the most of a colour.

    Scenes in the manner of NLVR or free, at least two. With tallies one turn counts a colour in each of them.
    """
    pairs: list[tuple[str, str]] = []
    for color in rng.permutation(COLORS).tolist():
        counts = [sum(shape.color == color for shape in scene.shapes) for scene in scenes]
        if counts.count(max(counts)) == 1:
            question = f"Which picture has the most {color} shapes?"
            pairs.append((question, f"picture {NUMBERS[1 + counts.index(max(counts))]}"))
            break
    for number in rng.integers(len(scenes), size=turns).tolist():
        for question, answer in questions(scenes[number], rng, 1, ("count", "color", "presence")):
            pairs.append((f"In picture {NUMBERS[number + 1]}: {question}", answer))
    if tallies:
        pairs[:0] = _tally(scenes, rng)
    asked = list(dict(pairs).items())[:turns]  # a question once
    rng.shuffle(asked)
    return conversation([("image", scene.image) for scene in scenes], [(str(q), str(a)) for q, a in asked])


def _tally(scenes: Sequence[Scene], rng: Generator) -> Pairs:
    """Return a request to count a colour that is shown in each picture; none where there are too many of all."""
    by_color = {
        color: [sum(shape.color == color for shape in scene.shapes) for scene in scenes]
        for color in COLORS
        if any(shape.color == color for scene in scenes for shape in scene.shapes)
    }
    fit = [color for color, counts in by_color.items() if max(counts) < len(NUMBERS)]
    if not fit:
        return []
    color = str(rng.choice(fit))
    told = [f"picture {NUMBERS[place]}: {NUMBERS[count]}" for place, count in enumerate(by_color[color], 1)]
    return [(f"How many {color} shapes are in each picture?", ", ".join(told))]


ASKED = "What was asked?"


def spoken_question(scene: Scene, bank: dict[str, list[Clip]], rng: Generator, turns: int = 1) -> Conversation | None:
    """Return a picture with a question that is only spoken, or None when the bank has no question for the scene.

    Further turns ask for the words that were spoken, and about the picture.
    """
    pairs = list(questions(scene, rng, 24, ("count", "color", "position")))
    for question, answer in pairs:
        clips = bank.get(question.lower().rstrip("?"))
        if clips:
            clip = clips[int(rng.integers(len(clips)))]
            rest = [(ASKED, clip.text), *pairs[: turns - 2]][: turns - 1]
            return conversation([("image", scene.image), ("audio", (clip.wave, clip.rate))], [("", answer), *rest])
    return None


def cells(shapes: Sequence[Shape], size: tuple[int, int], features: dict[str, Tensor], patch: int) -> dict[str, Tensor]:
    """Return what each token of a picture covers, as targets of training.objectives.Cells.

    "cells" (tokens, 3): kind, colour, size of the shape centred there, counted from 1; 0 empty; IGNORED separators.
    "counts" (tokens, 2, COUNTED): how many shapes of each colour, kind, size and colour with kind, at most
    MOST_COUNTED: first in the token's crop (in its third of the picture, for the global view), then in the picture
    (global view only, else IGNORED).
    size: width and height of the picture in pixels. features: what image_features gave for it.
    """
    mask = features["mask"]
    rows, columns = (int(value) for value in features["grid"])
    side = mask.shape[-1]
    crop = side * patch
    scale = min(columns * crop / size[0], rows * crop / size[1])
    full = mask[1:].unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    lines, across = (int(full[:, 0].sum()) + 1) // 2, (int(full[0].sum()) + 1) // 2
    cell, pooled = 2 * patch / scale, side // 2
    fine = cell_labels(shapes, cell, cell, across, lines) + 1
    coarse = cell_labels(shapes, columns * cell, rows * cell, pooled, pooled) + 1
    by_crop, by_third = np.zeros((rows, columns, COUNTED), np.int64), np.zeros((3, COUNTED), np.int64)
    for shape in shapes:
        kind, color = KINDS.index(shape.kind), COLORS.index(shape.color)
        at = [color, 8 + kind, 13 + SIZES.index(shape.size), 16 + 5 * color + kind]
        by_crop[min(rows - 1, int(shape.y * scale // crop)), min(columns - 1, int(shape.x * scale // crop)), at] += 1
        by_third[min(2, int(3 * shape.x * scale // (columns * crop))), at] += 1
    counts = np.full((lines, across, 2, COUNTED), IGNORED)
    counts[:, :, 0] = by_crop[np.arange(lines)[:, None] // pooled, np.arange(across) // pooled]
    whole = np.empty((pooled, pooled, 2, COUNTED), np.int64)
    whole[:, :, 0] = by_third[np.arange(pooled) * 3 // pooled]
    whole[:, :, 1] = by_third.sum(0)
    return {
        "cells": torch.cat((_with_ends(fine), torch.full((1, 3), IGNORED), _with_ends(coarse))),
        "counts": torch.cat((_with_ends(counts), torch.full((1, 2, COUNTED), IGNORED), _with_ends(whole))).clamp(
            max=MOST_COUNTED
        ),
    }


COUNTED = 16 + 8 * 5  # colours, kinds, sizes, and each colour with each kind
MOST_COUNTED = 8


def _with_ends(labels: np.ndarray) -> Tensor:
    table = torch.from_numpy(labels)
    ends = torch.full((len(table), 1, *table.shape[2:]), IGNORED)
    return torch.cat((table, ends), dim=1).flatten(0, 1)
