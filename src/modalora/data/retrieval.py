"""Rows in which what follows can only be known from what was read before, at a chosen distance.

Two sorts: facts in running text of the books, ": amber seven", asked for later, "? amber seven", and passages that come
again and again. How far back the last mention lies is drawn from a named distribution, so that "long distances are
rarely trained", LongRoPE2's premise (arXiv:2502.20082, section 3.1), can be varied.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import exp, log

import numpy as np
from numpy.random import Generator

from modalora.errors import ConfigError
from modalora.processing.tokenizer import TextTokenizer

# Draws a distance between the nearest and the farthest that a row has room for.
DISTANCES: dict[str, Callable[[Generator, int, int], int]] = {
    "rare": lambda rng, near, far: int(exp(rng.uniform(log(near), log(far + 1)))),  # log-uniform: long ones are rare
    "uniform": lambda rng, near, far: int(rng.integers(near, far + 1)),
    "long": lambda rng, near, far: int(rng.integers(max(near, far // 2), far + 1)),  # the far half alone
}


class Phrases:
    """The words and signs that facts are made of, as ids of one tokenizer.

    keys, values: words of one token each, no word in both. A fact is three tokens, and so is a question with its
    answer: the sign tells which, the word behind the key is what has to be found.
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
        ((self.states,), (self.asks,)) = (tokenizer.encode(sign) for sign in ":?")

    def fact(self, key: int, value: int) -> list[int]:
        """Return the ids of a fact, such as ": amber seven"."""
        return [self.states, key, value]

    def question(self, key: int) -> list[int]:
        """Return the ids of a question up to its answer: "? amber"."""
        return [self.asks, key]


def facts_row(
    text: np.ndarray, phrases: Phrases, rng: Generator, distances: str, most: int
) -> tuple[list[int], list[int]]:
    """Return the ids of a row as long as `text` and where its answers stand.

    text: ids to put facts into, which cover what is there. most: facts of a row at most. Facts that nobody asks for
    are put where room is left, up to a third of the row, so that a key has to be looked for.
    """
    ids, length, size = text.copy(), len(text), 3
    free = np.ones(length, dtype=bool)
    keys = rng.permutation(phrases.keys)[: 2 * most].tolist()
    values = rng.choice(phrases.values, size=len(keys)).tolist()
    answers: list[int] = []

    def put(at: int, piece: list[int]) -> None:
        ids[at : at + size] = piece
        free[at : at + size] = False

    for _ in range(int(rng.integers(1, most + 1))):
        distance = DISTANCES[distances](rng, size, length - size)
        start = int(rng.integers(0, length - size - distance + 1))
        asked = start + distance
        if free[start : start + size].all() and free[asked : asked + size].all():
            key, value = keys.pop(), values.pop()
            put(start, phrases.fact(key, value))
            put(asked, [*phrases.question(key), value])
            answers.append(asked + size - 1)
    for key, value in zip(keys[: int(rng.integers(0, most + 1))], values, strict=False):
        at = int(rng.integers(0, length - size + 1))
        if free[at : at + size].all() and (~free).mean() < 0.66:
            put(at, phrases.fact(key, value))
    return ids.tolist(), sorted(answers)


def copy_row(text: np.ndarray, rng: Generator, distances: str) -> list[int]:
    """Return ids as many as `text`: a passage of it, half the time with its words shuffled, again and again.

    Each word stands as far behind its last mention as the passage is long.
    """
    period = DISTANCES[distances](rng, 3, len(text) - 3)
    passage = rng.permutation(text[:period]) if rng.random() < 0.5 else text[:period]
    return np.resize(passage, len(text)).tolist()
