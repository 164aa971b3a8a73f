"""Rows in which what follows can only be known from what was read before, at a chosen distance.

Two sorts, both in running text of the books: facts, " amber: seven;", asked for later, "? amber: seven;", and passages
that come again. How far back they lie is drawn from a named distribution, so that "long distances are rarely trained",
LongRoPE2's premise (arXiv:2502.20082, section 3.1), can be varied. Distances are tokens from answer to answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import exp, log

import numpy as np

from modalora.errors import ConfigError
from modalora.processing.tokenizer import TextTokenizer

Rng = np.random.Generator

# Draws a distance between the nearest and the farthest that a row has room for.
DISTANCES: dict[str, Callable[[Rng, int, int], int]] = {
    "rare": lambda rng, near, far: int(exp(rng.uniform(log(near), log(far + 1)))),  # log-uniform: long ones are rare
    "uniform": lambda rng, near, far: int(rng.integers(near, far + 1)),
    "long": lambda rng, near, far: int(rng.integers(max(near, far // 2), far + 1)),  # the far half alone
}


class Phrases:
    """The words and signs that facts are made of, as ids of one tokenizer.

    keys, values: words of one token each, no word in both. A fact is four tokens, a question with its answer five.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Raises ConfigError when the vocabulary has too few whole words."""
        words = []
        for index in range(tokenizer.vocab_size):
            text = tokenizer.decode([index])
            if re.fullmatch(r" [a-z]{3,}", text) and tokenizer.encode(text) == [index]:
                words.append(index)
        if len(words) < 64:
            raise ConfigError(
                f"facts are made of words of one token; this vocabulary has {len(words)} of them, and 64 are needed"
            )
        self.keys, self.values = words[::2], words[1::2]
        ((self.colon,), (self.end,), (self.asks,)) = (tokenizer.encode(sign) for sign in ":;?")

    def fact(self, key: int, value: int) -> list[int]:
        """Return the ids of a fact, such as " amber: seven;"."""
        return [key, self.colon, value, self.end]

    def question(self, key: int) -> list[int]:
        """Return the ids of a question up to its answer: "? amber:"."""
        return [self.asks, key, self.colon]


def facts_row(text: np.ndarray, phrases: Phrases, rng: Rng, distances: str, most: int) -> tuple[list[int], list[int]]:
    """Return the ids of a row as long as `text` and where its answers stand.

    text: ids to put facts into, which cover what is there. most: facts of a row at most. Facts that nobody asks for
    are put where room is left, up to a third of the row, so that a key has to be looked for.
    """
    ids, length = text.copy(), len(text)
    free = np.ones(length + 1, dtype=bool)
    keys = rng.permutation(phrases.keys)[: 2 * most].tolist()
    values = rng.choice(phrases.values, size=len(keys)).tolist()
    answers: list[int] = []

    def put(at: int, piece: list[int]) -> None:
        ids[at : at + len(piece)] = piece
        free[at : at + len(piece)] = False

    def fits(at: int, size: int) -> bool:
        return at >= 0 and at + size <= length and bool(free[at : at + size].all())

    for _ in range(int(rng.integers(1, most + 1))):
        key, value = keys[-1], values[-1]
        fact, question = phrases.fact(key, value), [*phrases.question(key), value]
        near = len(question) + 1
        distance = DISTANCES[distances](rng, near, length - len(fact))
        at = int(rng.integers(distance, length - 2)) if distance < length - 2 else distance
        start, asked = at - distance - 2, at - len(question) + 1  # of the fact, of the question
        if fits(start, len(fact)) and fits(asked, len(question)):
            put(start, fact)
            put(asked, question)
            answers.append(at)
            keys.pop(), values.pop()
    for key, value in zip(keys[: int(rng.integers(0, most + 1))], values, strict=False):
        at = int(rng.integers(0, length - 4))
        if fits(at, 4) and (~free).mean() < 0.66:
            put(at, phrases.fact(key, value))
    return ids.tolist(), sorted(answers)


def copy_row(text: np.ndarray, rng: Rng, distances: str) -> list[int]:
    """Return the ids of `text` in which passages come again, each once, at distances drawn anew."""
    ids, length = text.copy(), len(text)
    for _ in range(int(rng.integers(1, 4))):
        size = int(rng.integers(6, max(7, length // 5)))
        distance = DISTANCES[distances](rng, size, length - size)
        start = int(rng.integers(0, length - size - distance + 1))
        ids[start + distance : start + distance + size] = ids[start : start + size]
    return list(map(int, ids))
