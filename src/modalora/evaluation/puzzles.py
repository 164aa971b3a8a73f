"""Puzzles in the manner of RULER (arXiv:2404.06654), made offline and in words of our own.

    needles     single-repeated, single-book, single-needles: one thing is asked for, hidden in five sentences that
                repeat, in book text, among things of its own kind; multi-key: four are told, one is asked for;
                multi-value: one has four numbers; multi-query: four are asked for
    tracing     variables: a number is handed on from name to name; which names have it?
    counting    common-words: ten words of a list come more often than the others; frequent-words: the three most
                frequent of a text whose words come as often as 1 / rank^2

Names, numbers and sentences are none that documents of a search have (`names.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator

from modalora.errors import DataError
from modalora.evaluation.names import Part, draw_names, draw_numbers, draw_words, most_names

HOPS = 4  # times that a number is handed on
COMMON = 10  # words that come more often than the others


@dataclass(frozen=True, slots=True)
class Puzzle:
    """A question, how its answer begins, and what the answer must contain."""

    prompt: str
    prefix: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sized:
    """A puzzle that can be had in sizes from `least` to `most`: all is drawn but how much surrounds the answer.

    small: the size of an example.
    """

    least: int
    small: int
    most: int
    at: Callable[[int], Puzzle]


@dataclass(frozen=True, slots=True)
class Task:
    """make: (generator, texts, tokens to fill, whose names) -> puzzle. score: see ruler.py:score_answer."""

    make: Callable[[Generator, Sequence[str], int, Part], Sized]
    score: Literal["all", "part"] = "all"
    needs_text: bool = False


# ------------------------------------------------------------------------------------------------------------- needles

_CALM = (
    "The river runs slowly past the mill. ",
    "A light wind moves the tall grass. ",
    "Two birds rest upon the old wall. ",
    "Clouds drift over the quiet hills. ",
    "Evening comes, and the lamps are lit. ",
)
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*\s*$")


def _repeated(rng: Generator, texts: Sequence[str], length: int) -> list[str]:
    return [_CALM[one % len(_CALM)] for one in range(length)]


def _book(rng: Generator, texts: Sequence[str], length: int) -> list[str]:
    if not texts:
        raise DataError("this task hides things in running text and none was given; give a text, or leave it out")
    text = texts[int(rng.integers(len(texts)))]
    start = int(rng.random() * max(0, len(text) - 8 * length))
    return re.findall(r"\S+\s*", text[start : start + 8 * length])  # words: eight characters are a token and more


def _told(name: str, number: str) -> str:
    return f"The locker code of the {name} is {number}. "


def _hidden(
    lines_of: Callable[[Generator, Sequence[str], int], list[str]] | None,
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
) -> Callable[[Generator, Sequence[str], int, Part], Sized]:
    """Return a maker: `keys` names with `values` numbers each, `asked` of which are asked for.

    lines_of: what surrounds them; None: other names with numbers.
    """

    def make(rng: Generator, texts: Sequence[str], length: int, part: Part) -> Sized:
        others = 0 if lines_of else min(length // 12, most_names(part) - keys)  # a line has twelve tokens and more
        names = draw_names(rng, part, keys + others)
        numbers = draw_numbers(rng, keys * values + others)
        named = [name for name in names[:keys] for _ in range(values)]
        told = list(map(_told, named, numbers))
        around = list(map(_told, names[keys:], numbers[keys * values :]))
        lines = lines_of(rng, texts, length) if lines_of else around
        shares = sorted(rng.choice(40, size=len(told), replace=False) / 39)
        told = [told[one] for one in rng.permutation(len(told))]
        sought = names[:asked]
        answers = numbers[: asked * values]
        code = "code" if len(answers) == 1 else "codes"
        subject = f"locker {code} of the {listed(sought)}"

        def at(size: int) -> Puzzle:
            text = _insert(lines[:size], shares, told)
            what = f"What is the {subject}" if len(answers) == 1 else f"What are all {len(answers)} {subject}"
            return Puzzle(
                f"Locker codes are written down in the text below. Remember them, for you will be asked.\n\n{text}\n\n"
                f"{what} in the text above?",
                f" The {subject} in the text {'is' if len(answers) == 1 else 'are'}",
                tuple(answers),
            )

        return Sized(1, min(60 if lines_of is _book else 5, len(lines)), len(lines), at)

    return make


def _insert(pieces: Sequence[str], shares: Sequence[float], told: Sequence[str]) -> str:
    """Return sentences or words with sentences put in at shares of them, from 0, the start, to 1, the end.

    shares ascend; what is put in stands behind the sentence that ends there or before.
    """
    text: list[str] = []
    at = 0
    for share, one in zip(shares, told, strict=True):
        place = round(share * len(pieces))
        while place > at and not _SENTENCE_END.search(pieces[place - 1]):
            place -= 1
        text += [*pieces[at:place], one]
        at = place
    return "".join([*text, *pieces[at:]]).strip()


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ------------------------------------------------------------------------------------------------- tracing and counting


def _variables(rng: Generator, texts: Sequence[str], length: int, part: Part) -> Sized:
    lines = _repeated(rng, texts, length)
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), size=5))
        names += [name] if name not in names else []
    (number,) = draw_numbers(rng, 1, digits=5)
    told = [f"LET {names[0]} = {number}. "]
    told += [f"LET {new} = {old}. " for old, new in zip(names, names[1:], strict=False)]
    shares = sorted(rng.choice(40, size=len(told), replace=False) / 39)

    def at(size: int) -> Puzzle:
        return Puzzle(
            "Names are given values in the text below, by a number or by another name.\n\n"
            f"{_insert(lines[:size], shares, told)}\n\nWhich {len(names)} names have the value {number} in the end?",
            f" The {len(names)} names with the value {number} are",
            tuple(names),
        )

    return Sized(1, 5, len(lines), at)


def _common_words(rng: Generator, texts: Sequence[str], length: int, part: Part) -> Sized:
    often, seldom = (30, 3) if length >= 4096 else (6 if length >= 512 else 3, 1)
    words = draw_words(rng, COMMON + length // 4)
    order = int(rng.integers(2**32))

    def at(size: int) -> Puzzle:
        drawn = words[:COMMON] * often + words[COMMON : COMMON + size] * seldom
        mixed = np.random.default_rng(order).permutation(drawn).tolist()
        text = " ".join(f"{number}. {word}" for number, word in enumerate(mixed, start=1))
        return Puzzle(
            f"Some words of the list below come more often than the others. Remember them.\n\n{text}\n\n"
            f"Which {COMMON} words come most often in the list above?",
            f" The {COMMON} words that come most often are",
            tuple(words[:COMMON]),
        )

    return Sized(COMMON, COMMON, length // 4, at)


def zipf_counts(total: int, kinds: int) -> list[int]:
    """Return how often each of `kinds` words comes among about `total`, in proportion to 1 / rank^2, at least once."""
    shares = np.arange(1, kinds + 1, dtype=float) ** -2
    return [max(1, round(total * share)) for share in (shares / shares.sum()).tolist()]


def _frequent_words(rng: Generator, texts: Sequence[str], length: int, part: Part) -> Sized:
    words = draw_words(rng, max(8, length // 50))
    order = int(rng.integers(2**32))

    def at(size: int) -> Puzzle:
        counts = zipf_counts(size, len(words))
        coded = [word for word, count in zip(("...", *words[1:]), counts, strict=True) for _ in range(count)]
        text = " ".join(np.random.default_rng(order).permutation(coded).tolist())
        return Puzzle(
            "Count the words of the coded text below; the dots between them mean nothing.\n\n"
            f"{text}\n\nWhich three words come most often in the coded text above?",
            " The three words that come most often are",
            tuple(words[1:4]),
        )

    # from 80 words on, the fourth and the fifth rank, 1/16 and 1/25 of 0.6 of them and more, differ
    return Sized(80, 80, length, at)


TASKS: dict[str, Task] = {
    "single-repeated": Task(_hidden(_repeated)),
    "single-book": Task(_hidden(_book), needs_text=True),
    "single-needles": Task(_hidden(None)),
    "multi-key": Task(_hidden(_book, keys=4), needs_text=True),
    "multi-value": Task(_hidden(_book, values=4), needs_text=True),
    "multi-query": Task(_hidden(_book, keys=4, asked=4), needs_text=True),
    "variables": Task(_variables),
    "common-words": Task(_common_words),
    "frequent-words": Task(_frequent_words),
}
