"""Question sets with one right answer each, scored by exact match or word error rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from modalora.assistant import Assistant, question_messages
from modalora.contracts import Message
from modalora.data.nlvr import nlvr_scenes
from modalora.data.questions import kind_questions
from modalora.data.rows import TRUE_OR_FALSE, number_and_picture
from modalora.data.speech import TRANSCRIBE, Clip, digit_string, spoken_digits
from modalora.evaluation.intervals import wilson


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


def digit_strings(rows: Sequence[Clip], count: int, seed: int = 0) -> list[Case]:
    """Strings of three to seven recordings, transcribed."""
    rng = np.random.default_rng(seed)
    clips = [digit_string(rows, rng, 3, 7, augmented=False) for _ in range(count)]
    return [Case(_heard(TRANSCRIBE, clip), clip.text, str(len(clip.words))) for clip in clips]


def nlvr_questions(
    folder: Path, count: int, kinds: Sequence[str] = ("count", "color", "position"), seed: int = 0
) -> list[Case]:
    """Questions made from the shapes of the real validation pictures."""
    rng = np.random.default_rng(seed)
    return [case for row in nlvr_scenes(folder, "validation") for case in _questions(row.scene, rng, kinds)][:count]


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


def numbers_and_pictures(folder: Path, count: int, seed: int = 0) -> list[Case]:
    """A recorded digit and a real picture: is it the number of some shapes? Yes and no equally often."""
    rng = np.random.default_rng(seed)
    digits: dict[str, list[Clip]] = {}
    for clip in spoken_digits(folder, "validation"):
        digits.setdefault(clip.words[0], []).append(clip)
    scenes = [row.scene for row in nlvr_scenes(folder, "validation")]
    cases = []
    for number in range(count):
        messages = number_and_picture(scenes[number % len(scenes)], digits, rng, augmented=False)
        cases.append(Case(messages[:1], str(messages[1]["content"])))
    return cases


def _heard(question: str, clip: Clip) -> list[Message]:
    return question_messages(question, audio=(clip.wave, clip.rate))


def _questions(scene: Any, rng: np.random.Generator, kinds: Sequence[str]) -> Iterator[Case]:
    for made in kind_questions(scene, rng, len(kinds), kinds):
        yield Case(question_messages(made.question, scene.image), made.answer, made.kind)
