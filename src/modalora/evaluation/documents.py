"""Documents with needles, built from running text to an exact number of tokens.

    [start] instruction | text .. fact .. text .. fact .. text | question answer question answer

Only facts and questions have a length of their own: text is cut at its front until everything fits, so no answer is
ever cut off. Two styles: "digits", in RULER's manner (arXiv:2404.06654) and words of our own, for any tokenizer, and
"words", the facts of data/retrieval.py, whose answers are one token, for the small model of the window study.
Depth 0 is the start of the text and 1 its end. A document depends on its texts, part, seed and settings alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import ceil
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.random import Generator

from modalora.config.extend import MOST_DISTRACTORS, MOST_NEEDLES
from modalora.data.retrieval import Phrases
from modalora.data.text import books
from modalora.errors import ConfigError, DataError
from modalora.evaluation.names import Part, draw_names, draw_numbers
from modalora.evaluation.needle import Document, fingerprint
from modalora.processing.tokenizer import END_OF_TEXT, TextTokenizer

# What the generators of a part begin with, so that no two parts draw the same.
_STREAMS: dict[Part, int] = {"search": 101, "evaluation": 102, "tasks": 103, "examples": 104}
_MOST = 100_000  # documents of one seed
# What ends a sentence, closing quotes and line ends with it; an empty line ends one too.
_END = re.compile(r"[.!?][\"'”’)]*(?=\s)\n*|\n{2,}")


def part_of_books(folder: Path, part: Literal["search", "evaluation"]) -> list[str]:
    """Return every other book of folder/books/validation.parquet, those of the other part being the rest.

    Raises DataError when there is no such file.
    """
    return list(books(folder, "validation"))[["search", "evaluation"].index(part) :: 2]


def load_texts(path: Path) -> list[str]:
    """Return the text of a file, or of the books that judge: those of a folder's part "evaluation".

    Raises DataError for what is neither UTF-8 text nor such a folder.
    """
    if path.is_dir():
        if not (path / "books").is_dir():
            raise DataError(f"{path} is a folder without books/validation.parquet; give a UTF-8 file, or such a folder")
        return part_of_books(path, "evaluation")
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}; give a UTF-8 file, or a folder of books") from None


def check_lengths(lengths: Sequence[int], window: int) -> None:
    """Raise ConfigError for a length that is none, or beyond what a model reads."""
    for length in lengths:
        if not 2 <= length <= window:
            raise ConfigError(f"length {length} must lie in 2 to {window}, this model's window; leave it out")


@dataclass(frozen=True, slots=True)
class Fact:
    """ids: the fact as it stands in the text. question: asks for it and answers; its last `scored` ids the answer."""

    ids: list[int]
    question: list[int]
    scored: int


class Style(Protocol):
    """How facts, questions and answers are written, as ids of one tokenizer."""

    @property
    def between_sentences(self) -> bool:
        """Whether a fact stands behind a sentence; else anywhere."""
        ...

    def opening(self, facts: int) -> list[int]:
        """Return what stands before the text."""
        ...

    def facts(self, rng: Generator, part: Part, count: int, text: Sequence[int]) -> list[Fact]:
        """Return facts about different things, none of which the text names. Raises DataError when too few can be."""
        ...


@dataclass(frozen=True, slots=True)
class Digits:
    """ "The secret number of the quiet-lantern is 4821937.", for any tokenizer."""

    tokenizer: TextTokenizer
    between_sentences: bool = True

    def opening(self, facts: int) -> list[int]:
        """Return the token that starts a text, where there is one, and the instruction."""
        start = [self.tokenizer.control(END_OF_TEXT)] if self.tokenizer.has_control(END_OF_TEXT) else []
        what = "A secret number is" if facts == 1 else f"{facts} secret numbers are"
        return start + self.tokenizer.encode(f"{what} hidden in this text, and asked for at its end. Remember.\n\n")

    def facts(self, rng: Generator, part: Part, count: int, text: Sequence[int]) -> list[Fact]:
        """Return facts of different names and numbers."""
        plain = self.tokenizer.decode(text)
        names = [name for name in draw_names(rng, part, 2 * count) if name not in plain][:count]
        numbers = [number for number in draw_numbers(rng, 2 * count) if number not in plain][:count]
        _check_enough(count, min(len(names), len(numbers)))
        return [self._fact(name, number) for name, number in zip(names, numbers, strict=True)]

    def _fact(self, name: str, number: str) -> Fact:
        tell = f" The secret number of the {name} is "
        asked = f"\n\nWhat is the secret number of the {name}?{tell}"
        question, prompt = within(self.tokenizer, asked + number), within(self.tokenizer, asked)
        # the last space may join the number's first token: the answer starts where the two differ
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(question, prompt, strict=False))))
        return Fact(within(self.tokenizer, f"{tell}{number}."), question, len(question) - same)


class Words:
    """ ": amber seven" and "? amber seven", for a model that was trained on `data.retrieval.facts_row`."""

    between_sentences = False

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Raises ConfigError when the vocabulary has too few whole words."""
        self.phrases = Phrases(tokenizer)

    def opening(self, facts: int) -> list[int]:
        """Return nothing: the rows that such a model reads start anywhere in a book."""
        return []

    def facts(self, rng: Generator, part: Part, count: int, text: Sequence[int]) -> list[Fact]:
        """Return facts of different keys; values come again only where there are fewer of them than facts."""
        words = self.phrases
        taken = {other for one, other in zip(text, text[1:], strict=False) if one == words.states}
        keys = [key for key in rng.permutation(words.keys).tolist() if key not in taken][:count]
        _check_enough(count, len(keys))
        values = rng.choice(words.values, size=count, replace=count > len(words.values)).tolist()
        return [
            Fact(words.fact(key, value), [*words.question(key), value], 1)
            for key, value in zip(keys, values, strict=True)
        ]


def _check_enough(asked: int, found: int) -> None:
    if found < asked:
        raise DataError(
            f"{asked} facts are asked for and there are {found} things that they can be about, not named in the text "
            "already; ask for fewer needles or distractors"
        )


STYLES: dict[str, Callable[[TextTokenizer], Style]] = {"digits": Digits, "words": Words}


def make_documents(
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    count: int,
    *,
    length: int,
    part: Part,
    style: str = "digits",
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    needles: int = 1,
    distractors: int = 0,
    seed: int = 0,
) -> list[Document]:
    """Return documents of `length` tokens with `needles` facts each, all asked for at the end, in an order of chance.

    The needles of all documents go through `depths` in turn, so that every depth comes as often as any other where
    count * needles is a multiple of them. distractors: further facts of the same form that nobody asks for, anywhere.
    part: names, numbers and draws of one part are those of no other; so are texts, of `part_of_books`.
    Raises DataError when a document cannot be made to fit.
    """
    if style not in STYLES:
        raise ConfigError(f"style={style!r} must be one of {', '.join(STYLES)}")
    for name, given, least, most in (
        ("count", count, 1, _MOST),
        ("needles", needles, 1, MOST_NEEDLES),
        ("distractors", distractors, 0, MOST_DISTRACTORS),
        ("seed", seed, 0, 2**32),
    ):
        if not least <= given <= most:
            raise ConfigError(f"{name}={given} must lie in {least} to {most}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ConfigError(f"depths={list(depths)} must be shares of the text, from 0 to 1")
    writer = STYLES[style](tokenizer)
    return [
        _document(
            tokenizer, texts, writer, part, length, seed=_MOST * seed + number, distractors=distractors,
            depths=[depths[(number * needles + one) % len(depths)] for one in range(needles)],
        )
        for number in range(count)
    ]  # fmt: skip


def grid_documents(
    tokenizer: TextTokenizer, texts: Sequence[str], lengths: Sequence[int], samples: int, *, part: Part,
    style: str = "digits", depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), needles: int = 1,
    distractors: int = 0, seed: int = 0,
) -> list[Document]:  # fmt: skip
    """Return documents that ask at least `samples` questions at every length and depth; settings as above."""
    return [
        document
        for length in lengths
        for document in make_documents(
            tokenizer, texts, ceil(samples * len(depths) / max(1, needles)), length=length, part=part, style=style,
            depths=depths, needles=needles, distractors=distractors, seed=seed,
        )
    ]  # fmt: skip


def _document(
    tokenizer: TextTokenizer, texts: Sequence[str], style: Style, part: Part, length: int, *, depths: Sequence[float],
    distractors: int, seed: int,
) -> Document:  # fmt: skip
    rng = np.random.default_rng((_STREAMS[part], seed))
    text, ends = passage(tokenizer, texts, length, rng)
    facts = style.facts(rng, part, len(depths) + distractors, text)
    opening = style.opening(len(depths))
    asked = [int(one) for one in rng.permutation(len(depths))]
    closing = [index for one in asked for index in facts[one].question]
    room = length - len(opening) - len(closing) - sum(len(fact.ids) for fact in facts)
    if room < 1:
        raise DataError(
            f"{length} tokens are too few: {len(facts)} facts and {len(asked)} questions alone take {length - room}; "
            "ask for a greater length, or fewer needles or distractors"
        )
    text = text[-room:]
    cuts = np.arange(room + 1)
    if style.between_sentences:
        cuts = np.array([0, *(end - (length - room) for end in ends if end > length - room)])
    places = [int(cuts[np.abs(cuts - depth * room).argmin()]) for depth in depths]
    places += rng.choice(cuts, size=distractors).tolist()
    ids, at = list(opening), 0
    for place, fact in sorted(zip(places, facts, strict=True), key=lambda pair: pair[0]):
        ids += [*text[at:place], *fact.ids]
        at = place
    ids += text[at:]
    answers: list[int] = []
    for one in asked:
        ids += facts[one].question
        answers += range(len(ids) - facts[one].scored, len(ids))
    return Document(tuple(ids), tuple(answers), tuple(depths[one] for one in asked), seed, fingerprint(ids))


def passage(tokenizer: TextTokenizer, texts: Sequence[str], tokens: int, rng: Generator) -> tuple[list[int], list[int]]:
    """Return this many ids of running text that end with a sentence, and the places behind each of its sentences.

    Raises DataError when no text is so long.
    """
    if tokens < 1:
        raise ConfigError(f"a passage of {tokens} tokens holds no text; ask for more")
    share = float(rng.random())  # of the text that may stand in front
    for one in rng.permutation(len(texts)).tolist():
        text, reach = texts[one], 6 * tokens
        while True:
            start = int(share * max(0, len(text) - reach))
            ids: list[int] = []
            ends: list[int] = []
            for sentence in sentences(text[start : start + reach]):
                ids += within(tokenizer, sentence)
                ends.append(len(ids))
                if len(ids) >= tokens:
                    spare = len(ids) - tokens
                    return ids[spare:], [end - spare for end in ends if end > spare]
            if reach >= len(text):
                break
            reach *= 2
    raise DataError(
        f"{tokens} tokens are asked for and no text of the {len(texts)} given has so many; give longer ones"
    )


def sentences(text: str) -> Iterator[str]:
    """Yield the whole sentences of a text; together they are the text up to the last one's end."""
    at = 0
    for end in _END.finditer(text):
        yield text[at : end.end()]
        at = end.end()


def within(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Return the ids of text in the middle of a row, where SentencePiece puts no space in front of it."""
    return tokenizer.encode(text, after="")
