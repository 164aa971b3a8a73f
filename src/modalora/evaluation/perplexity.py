"""Bits of running text: per byte, comparable between tokenizers, and per token by how far the model may look back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import torch

from modalora.assistant import Assistant
from modalora.errors import ConfigError, DataError
from modalora.evaluation.documents import passage
from modalora.evaluation.intervals import mean_interval
from modalora.evaluation.needle import answer_losses, plain_document
from modalora.models.multimodal import Multimodal
from modalora.nn.products import wide_products
from modalora.processing.processor import Row
from modalora.processing.tokenizer import END_OF_TEXT, TextTokenizer

_STREAM = 105  # of the passages, apart from those of documents with needles


@torch.inference_mode()
@wide_products()
def bits_per_byte(assistant: Assistant, texts: Iterable[str], *, window: int = 768, rows: int = 8) -> float:
    """Return the bits that the model needs per UTF-8 byte, reading each text in windows that do not overlap.

    The first token of a window is predicted from <|endoftext|> alone. Raises DataError when there is no text.
    """
    tokenizer = assistant.processor.tokenizer
    start = tokenizer.control(END_OF_TEXT)
    nats, size = 0.0, 0
    waiting: list[Row] = []

    def flush() -> float:
        batch = assistant.processor.collate(waiting).to(assistant.device)
        waiting.clear()
        values, _ = assistant.model.loss(batch)
        return float(values.double().sum())

    for text in texts:
        size += len(text.encode())
        ids = tokenizer.encode(text)
        for at in range(0, len(ids), window - 1):
            piece = [start, *ids[at : at + window - 1]]
            waiting.append(Row(ids=piece, labels=list(piece)))
            if len(waiting) == rows:
                nats += flush()
    if waiting:
        nats += flush()
    if not size:
        raise DataError("bits_per_byte needs at least one text that is not empty")
    return nats / log(2) / size


@dataclass(frozen=True, slots=True)
class LengthBits:
    """Bits per token of the same targets behind contexts of one length.

    bits: mean over the passages. each: passage by passage, so that lengths can be compared in pairs. tokens: targets of
    all passages.
    """

    length: int
    bits: float
    tokens: int
    each: tuple[float, ...]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `bits` from the spread over passages."""
        return mean_interval(self.each)

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with the interval."""
        low, high = self.interval
        return {"length": self.length, "bits": self.bits, "low": low, "high": high, "tokens": self.tokens,
                "each": list(self.each)}  # fmt: skip


def bits_by_length(
    model: Multimodal, tokenizer: TextTokenizer, texts: Sequence[str], lengths: Sequence[int], *, passages: int = 32,
    scored: int | None = None, seed: int = 0, rows: int = 8, adapter: str | None = None,
) -> list[LengthBits]:  # fmt: skip
    """Return the bits per token of text at the end of windows of several lengths, the target tokens the same in all.

    Each passage is as long as the longest window, and its last `scored` tokens (None: half the shortest window) are the
    targets; a window of n tokens is its last n, read from position 0. So lengths differ in what the model may look back
    at, and in nothing else: one that gains from context falls, one that cannot read so far rises. Nothing slides.
    adapter: of the rows, one or a sum; None: the decoder alone.
    Raises ConfigError for lengths that leave no target, DataError when the texts are too short.
    """
    if not lengths or passages < 2:
        raise ConfigError(f"lengths={list(lengths)}, passages={passages}: give a length, and 2 passages or more")
    if seed < 0:
        raise ConfigError(f"seed={seed} must be at least 0")
    shortest, longest = min(lengths), max(lengths)
    scored = shortest // 2 if scored is None else scored
    if not 1 <= scored < shortest:
        raise ConfigError(f"scored={scored} must lie in 1 to {shortest - 1}, within the shortest window of {shortest}")
    rng = np.random.default_rng((_STREAM, seed))
    whole = [passage(tokenizer, texts, longest, rng)[0] for _ in range(passages)]
    found = []
    for length in lengths:
        documents = [plain_document(ids[-length:], scored=scored, seed=seed) for ids in whole]
        nats = [answer_losses(model, documents[at : at + rows], adapter=adapter) for at in range(0, passages, rows)]
        each = (torch.cat(nats).double() / log(2)).tolist()
        found.append(LengthBits(length, sum(each) / passages, scored * passages, tuple(each)))
    return found


def bits_gained(one: LengthBits, other: LengthBits) -> tuple[float, float, float]:
    """Return how many more bits a token takes at `other` than at `one`, passage by passage: mean and 95 % interval.

    Raises DataError for measurements of different passages.
    """
    if len(one.each) != len(other.each) or one.tokens != other.tokens:
        raise DataError("bits_gained compares lengths of one bits_by_length; these have different passages")
    each = [more - less for less, more in zip(one.each, other.each, strict=True)]
    return sum(each) / len(each), *mean_interval(each)
