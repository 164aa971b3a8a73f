"""Tasks in the manner of RULER (arXiv:2404.06654): puzzles at the length asked for, their answers and scores.

As there, an answer prefix follows the question, so that a base model goes on with the answer; an answer is right where
it contains the reference in whatever case; and prompt and answer together take at most the tokens asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np

from modalora.assistant import Assistant
from modalora.errors import ConfigError, DataError
from modalora.evaluation.documents import check_lengths
from modalora.evaluation.intervals import wilson
from modalora.evaluation.needle import fingerprint
from modalora.evaluation.puzzles import TASKS, Sized, listed
from modalora.generation.engine import generate
from modalora.generation.sampling import Sampling
from modalora.processing.processor import Processor, Row
from modalora.processing.tokenizer import ASSISTANT, END_OF_TEXT

THRESHOLD = 0.856  # score that a length must reach to be effective: Llama-2-7B's at 4,096 tokens, as RULER has it
FORMS = ("plain", "chat")

# ------------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt as ids, the answer prefix included. budget: tokens that may be generated. sha256: of the ids."""

    task: str
    length: int
    ids: tuple[int, ...]
    answers: tuple[str, ...]
    budget: int
    seed: int
    sha256: str


def make_samples(
    processor: Processor, task: str, length: int, count: int, *, texts: Sequence[str] = (), form: str = "plain",
    example: bool = False, seed: int = 0,
) -> list[Sample]:  # fmt: skip
    """Return prompts that fill `length` tokens together with their answers.

    form: "plain", text that a base model goes on with; "chat", a user's message in the model's format. example: put a
    small solved puzzle of the same kind in front. texts: books for the tasks that need them (Task.needs_text).
    Raises ConfigError for an unknown task, DataError where nothing fits or the text runs out.
    """
    _check(task, form, seed)
    return [_sample(processor, task, length, texts, form, example, seed, number) for number in range(count)]


def least_length(
    processor: Processor, task: str, length: int, count: int, *, texts: Sequence[str] = (), form: str = "plain",
    example: bool = False, seed: int = 0,
) -> int:  # fmt: skip
    """Return the tokens that each of the samples for a length can be had in; beyond the length, they do not fit.

    Settings and errors as in `make_samples`.
    """
    _check(task, form, seed)
    sheets = [_sheet(processor, task, length, texts, form, example, seed, number) for number in range(count)]
    return max(sheet.tokens(sheet.sized.least) for sheet in sheets)


def _check(task: str, form: str, seed: int) -> None:
    if task not in TASKS:
        raise ConfigError(f"task {task!r} must be one of {', '.join(TASKS)}")
    if form not in FORMS:
        raise ConfigError(f"form={form!r} must be one of {', '.join(FORMS)}")
    if seed < 0:
        raise ConfigError(f"seed={seed} must be at least 0")


@dataclass(frozen=True, slots=True)
class _Sheet:
    """A puzzle of still open size. front: what stands before it. tokens: size -> tokens of prompt and answer."""

    sized: Sized
    front: str
    budget: int
    tokens: Callable[[int], int]


def _sheet(
    processor: Processor, task: str, length: int, texts: Sequence[str], form: str, example: bool, seed: int,
    number: int,
) -> _Sheet:  # fmt: skip
    key = (crc32(task.encode()), seed, number)
    front = ""
    if example:
        small = TASKS[task].make(np.random.default_rng((*key, 1)), texts, 256, "examples")
        solved = small.at(small.small)
        front = f"{solved.prompt}{solved.prefix} {listed(solved.answers)}.\n\n"
    sized = TASKS[task].make(np.random.default_rng((*key, 0)), texts, length, "tasks")
    answers = sized.at(sized.least).answers
    budget = 2 * len(processor.tokenizer.encode(f" {listed(answers)}.")) + 8

    def tokens(size: int) -> int:
        puzzle = sized.at(size)
        return _measure(processor, form, front + puzzle.prompt, puzzle.prefix) + budget

    return _Sheet(sized, front, budget, tokens)


def _sample(
    processor: Processor, task: str, length: int, texts: Sequence[str], form: str, example: bool, seed: int,
    number: int,
) -> Sample:  # fmt: skip
    sheet = _sheet(processor, task, length, texts, form, example, seed, number)
    size = _largest(sheet.tokens, sheet.sized.least, sheet.sized.most, length, task)
    puzzle = sheet.sized.at(size)
    ids = _prompt_ids(processor, form, sheet.front + puzzle.prompt, puzzle.prefix)
    return Sample(task, length, tuple(ids), puzzle.answers, sheet.budget, seed, fingerprint(ids))


def _largest(tokens: Callable[[int], int], least: int, most: int, length: int, task: str) -> int:
    """Return the largest size whose tokens fit, guessing in proportion: they grow with the size nearly evenly."""
    low, low_tokens = least, tokens(least)
    if low_tokens > length:
        raise DataError(
            f"task {task!r} needs {low_tokens} tokens for prompt and answer at its smallest, and {length} are asked "
            f"for; ask for a length of {low_tokens} and more, or leave the task out"
        )
    high, high_tokens = most + 1, 0
    step = least
    while high - low > 1:
        if high_tokens:
            guess = low + (high - low) * (length - low_tokens) // (high_tokens - low_tokens)
        else:
            guess, step = low + step, 2 * step
        guess = min(max(guess, low + 1), high - 1)
        found = tokens(guess)
        if found <= length:
            low, low_tokens = guess, found
        else:
            high, high_tokens = guess, found
    if not high_tokens and low_tokens < 0.9 * length:
        raise DataError(
            f"task {task!r}: what surrounds the answer runs out after {low_tokens} of {length} tokens; give longer "
            "texts, or a shorter length"
        )
    return low


def _measure(processor: Processor, form: str, prompt: str, prefix: str) -> int:
    if form == "plain":
        return len(_prompt_ids(processor, form, prompt, prefix))
    return processor.measure(_messages(prompt)) + len(processor.tokenizer.encode(prefix.lstrip(), after=ASSISTANT))


def _prompt_ids(processor: Processor, form: str, prompt: str, prefix: str) -> list[int]:
    tokenizer = processor.tokenizer
    if form == "plain":
        return [tokenizer.control(END_OF_TEXT), *tokenizer.encode(prompt + prefix, after=END_OF_TEXT)]
    # a message of its own begins without a space
    return [*processor.row(_messages(prompt)).ids, *tokenizer.encode(prefix.lstrip(), after=ASSISTANT)]


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


# ------------------------------------------------------------------------------------------------------------- scoring


def score_answer(said: str, answers: Sequence[str], score: Literal["all", "part"] = "all") -> float:
    """Return the share of answers that the text contains ("all"), or whether it contains any ("part")."""
    held = [answer.lower() in said.lower() for answer in answers]
    return sum(held) / len(held) if score == "all" else float(any(held))


@dataclass(frozen=True, slots=True)
class TaskCell:
    """Samples of one task and length; points: the sum of their scores, each from 0 to 1."""

    task: str
    length: int
    points: float
    count: int

    @property
    def score(self) -> float:
        """Mean score."""
        return self.points / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean score (`wilson`)."""
        return wilson(self.points, self.count)


@dataclass(frozen=True, slots=True)
class Report:
    """Scores by task and length."""

    cells: tuple[TaskCell, ...]

    @property
    def averages(self) -> dict[int, float]:
        """Mean over tasks of the score, by length."""
        found: dict[int, list[float]] = {}
        for cell in self.cells:
            found.setdefault(cell.length, []).append(cell.score)
        return {length: sum(scores) / len(scores) for length, scores in sorted(found.items())}

    def effective_length(self, threshold: float = THRESHOLD) -> int | None:
        """Return the longest tested length up to which every average reaches the threshold; None: not the shortest."""
        reached = None
        for length, average in self.averages.items():
            if average < threshold:
                break
            reached = length
        return reached

    def as_json(self, threshold: float = THRESHOLD) -> dict[str, Any]:
        """Return plain values."""
        cells = [
            {**dataclasses.asdict(cell), "score": cell.score, "low": cell.interval[0], "high": cell.interval[1]}
            for cell in self.cells
        ]
        averages = [{"length": length, "score": score} for length, score in self.averages.items()]
        effective = self.effective_length(threshold)
        return {"cells": cells, "averages": averages, "threshold": threshold, "effective_length": effective}


def run_tasks(
    assistant: Assistant, tasks: Sequence[str], lengths: Sequence[int], *, samples: int = 20,
    texts: Sequence[str] = (), form: str = "plain", example: bool = False, seed: int = 0, rows: int = 8,
    adapter: str | None = None,
) -> Iterator[TaskCell]:  # fmt: skip
    """Yield the scores of a model task by task for each length, decoding greedily; settings as in `make_samples`.

    adapter: of the rows, one or a sum; None: the decoder alone.
    Raises ConfigError for a length that the model does not read.
    """
    check_lengths(lengths, assistant.processor.window)
    for length in lengths:
        for task in tasks:
            made = make_samples(
                assistant.processor, task, length, samples, texts=texts, form=form, example=example, seed=seed
            )
            points = 0.0
            for at in range(0, samples, rows):
                part = made[at : at + rows]
                said = answer_samples(assistant, part, adapter)
                points += sum(
                    score_answer(text, sample.answers, TASKS[task].score)
                    for text, sample in zip(said, part, strict=True)
                )
            yield TaskCell(task, length, points, samples)


def answer_samples(assistant: Assistant, samples: Sequence[Sample], adapter: str | None = None) -> list[str]:
    """Return what the model goes on with behind each prompt, greedily, in one batch."""
    rows = [Row(ids=list(sample.ids)) for sample in samples]
    batch = assistant.processor.collate(rows, route=adapter or "none", labelled=False).to(assistant.device)
    said: list[list[int]] = [[] for _ in samples]
    for token in generate(
        assistant.model,
        batch,
        sampling=Sampling(),
        max_tokens=max(sample.budget for sample in samples),
        stop_ids=assistant.stop_ids,
        stops=lambda row, ids: len(ids) >= samples[row].budget,
    ):
        said[token.row].append(token.id)
    return [assistant.processor.tokenizer.decode(ids) for ids in said]
