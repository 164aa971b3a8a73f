"""Question sets with one right answer each, scored by exact match or word error rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from numpy.random import Generator

from modalora.assistant import Assistant
from modalora.contracts import Message
from modalora.data.instruct import recall, repetition, sums
from modalora.data.nlvr import nlvr_scenes
from modalora.data.questions import kind_questions
from modalora.data.rows import TRUE_OR_FALSE, Conversation, frames, number_and_picture, spoken_question
from modalora.data.scenes import free_scene
from modalora.data.speech import TRANSCRIBE, Clip, by_text, digit_string, spoken_digits
from modalora.evaluation.intervals import wilson
from modalora.processing.questions import question_messages
from modalora.processing.tokenizer import TextTokenizer

KINDS = ("count", "color", "position")  # of questions about a picture


@dataclass(frozen=True)
class Case:
    """One question, its answer, and the group that a report splits by."""

    messages: Sequence[Message]
    answer: str
    group: str = ""


@dataclass
class Score:
    """Right answers of a set; words: errors and words for sets whose answers are transcripts."""

    right: int = 0
    count: int = 0
    errors: int = 0
    words: int = 0
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    wrong: list[dict[str, str]] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of answers that are exactly right."""
        return self.right / max(1, self.count)

    @property
    def word_error_rate(self) -> float:
        """Substitutions, insertions and deletions per reference word."""
        return self.errors / max(1, self.words)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson(self.right, self.count)


def score(assistant: Assistant, cases: Sequence[Case], *, rows: int = 16, max_tokens: int = 24) -> Score:
    """Ask every case greedily, in batches, and compare answers in lower case without closing full stops."""
    result = Score()
    for at in range(0, len(cases), rows):
        part = cases[at : at + rows]
        answers = assistant.ask_many([case.messages for case in part], max_tokens=max_tokens)
        for case, answer in zip(part, answers, strict=True):
            said = answer.text.strip().lower().rstrip(". ")
            good = said == case.answer
            result.right, result.count = result.right + good, result.count + 1
            right, count = result.groups.get(case.group, (0, 0))
            result.groups[case.group] = (right + good, count + 1)
            measured = jiwer.process_words(case.answer, said)
            result.errors += measured.substitutions + measured.insertions + measured.deletions
            result.words += len(case.answer.split())
            if not good:
                result.wrong.append({"group": case.group, "answer": case.answer, "said": said})
    return result


def single_digits(rows: Sequence[Clip]) -> list[Case]:
    """Every recording, transcribed."""
    return [Case(_heard(TRANSCRIBE, clip), clip.words[0], clip.speaker) for clip in rows]


def digit_strings(rows: Sequence[Clip], count: int) -> list[Case]:
    """Strings of three to seven recordings, transcribed."""
    rng = np.random.default_rng(0)
    clips = [digit_string(rows, rng, 3, 7, augmented=False) for _ in range(count)]
    return [Case(_heard(TRANSCRIBE, clip), clip.text, str(len(clip.words))) for clip in clips]


def nlvr_questions(folder: Path, count: int) -> list[Case]:
    """Questions made from the shapes of the real validation pictures."""
    rng = np.random.default_rng(0)
    return [case for row in nlvr_scenes(folder, "validation") for case in _questions(row.scene, rng)][:count]


def nlvr_sentences(folder: Path) -> list[Case]:
    """The human sentences of the validation pictures, true or false."""
    rows = nlvr_scenes(folder, "validation")
    known = {row.sentence for row in nlvr_scenes(folder, "train")}
    return [
        Case(
            question_messages(row.sentence + TRUE_OR_FALSE, row.scene.image),
            "true" if row.label else "false",
            "sentence in train" if row.sentence in known else "new sentence",
        )
        for row in rows
    ]


def numbers_and_pictures(folder: Path, count: int) -> list[Case]:
    """A recorded digit and a real picture: is it the number of some shapes? Yes and no equally often."""
    rng = np.random.default_rng(0)
    digits = by_text(spoken_digits(folder, "validation"))
    scenes = [row.scene for row in nlvr_scenes(folder, "validation")]
    cases = []
    for number in range(count):
        messages = number_and_picture(scenes[number % len(scenes)], digits, rng, augmented=False)
        cases.append(_first(messages))
    return cases


def spoken_questions(folder: Path, clips: Sequence[Clip], count: int) -> list[Case]:
    """A real picture and a clip that asks something about it, with no word of text; fewer where few clips fit."""
    rng = np.random.default_rng(0)
    bank = by_text(clips)
    rows = nlvr_scenes(folder, "validation")
    made = (spoken_question(rows[place % len(rows)].scene, bank, rng) for place in range(20 * count))
    return list(islice((_first(messages) for messages in made if messages), count))


def generated_questions(count: int, seed: int = 0) -> list[Case]:
    """Questions about drawn pictures of other shapes, sizes and backgrounds than NLVR's."""
    rng = np.random.default_rng(seed)
    return list(islice((case for _ in range(count) for case in _questions(free_scene(rng), rng)), count))


def frame_questions(folder: Path, count: int) -> list[Case]:
    """Two or three real pictures in a row and a question about one of them, or about which has the most of a colour."""
    rng = np.random.default_rng(0)
    scenes = [row.scene for row in nlvr_scenes(folder, "validation")]
    asked = [[scenes[index] for index in rng.integers(len(scenes), size=rng.integers(2, 4))] for _ in range(count)]
    return [_first(frames(shown, rng, 3)) for shown in asked]


def text_questions(text: str, tokenizer: TextTokenizer, count: int) -> list[Case]:
    """Count each of: sums up to forty, words of a passage to be said again, one of a list of things to be recalled."""
    rng = np.random.default_rng(0)
    stream = np.array(tokenizer.encode(text))
    made = [
        *(("sum", sums(rng)) for _ in range(count)),
        *(("copy", repetition(stream, tokenizer, rng)) for _ in range(count)),
        *(("recall", recall(stream, tokenizer, rng)) for _ in range(count)),
    ]
    return [_first(messages, group) for group, messages in made]


def _first(messages: Conversation, group: str = "") -> Case:
    return Case(messages[:1], str(messages[1]["content"]).lower(), group)


def _heard(question: str, clip: Clip) -> list[Message]:
    return question_messages(question, audio=(clip.wave, clip.rate))


def _questions(scene: Any, rng: Generator) -> Iterator[Case]:
    for made in kind_questions(scene, rng, len(KINDS), KINDS):
        yield Case(question_messages(made.question, scene.image), made.answer, made.kind)
