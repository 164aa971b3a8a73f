"""What a mixture draws from: makers of rows without end, and data files.

Every source gives rows by number: a row depends on the seed, the source and its number, on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.random import Generator

from modalora.contracts import Message
from modalora.data.genome_rows import GeneRows, RepeatRows, WindowRows
from modalora.data.genomes import TRAINING, Genome, read_genomes
from modalora.data.instruct import instruct
from modalora.data.nlvr import nlvr_scenes
from modalora.data.questions import QUESTION_KINDS
from modalora.data.retrieval import DISTANCES, Phrases, copy_row, facts_row
from modalora.data.rows import (
    Conversation,
    cells,
    drawn_picture,
    frames,
    heard_digits,
    heard_sentence,
    number_and_picture,
    real_scene,
    spoken_question,
)
from modalora.data.scenes import free_scene, nlvr_like
from modalora.data.speech import by_text, spoken_digits
from modalora.data.text import check_stream, recurring_window, token_stream, window
from modalora.data.variation import augment
from modalora.data.voices import digit_voices, question_voices, sentence_voices
from modalora.errors import ConfigError, DataError, InputError
from modalora.processing.processor import Processor, Row
from modalora.science.codons import definition, targets

Key = tuple[int, int]  # seed of the run, place of the source in the mixture
SCORED = 1 << 63  # in the place of a seed, where no run has one: rows that are scored, the same in every run
Draw = Callable[[Generator], Row]
Held = Sequence[tuple[str, Mapping[str, Any]]]  # the media of a row: modality and features of each


def any_media(held: Held) -> None:
    """Refuse no media."""


@dataclass(frozen=True)
class Context:
    """What sources are made from.

    folder: the data of docs/nano.md. cache: where derived files are kept. window: tokens of a plain text window.
    most: tokens that a row may have, where that is less than the model reads (0: it is not).
    labelled: whether a row needs a token that trains. suits: raises DataError for media that the objective cannot take.
    """

    folder: Path
    cache: Path
    processor: Processor
    window: int
    most: int = 0
    labelled: bool = True
    suits: Callable[[Held], None] = any_media


class Place(NamedTuple):
    """Where a row stands: file, line there, and the key of a tar's record. Without a file: nowhere."""

    file: str = ""
    line: int = 0
    key: str = ""

    def __str__(self) -> str:
        """Return FILE:LINE, as messages have it."""
        return f"{self.file}:{self.line}{f', key {self.key}' if self.key else ''}" if self.file else ""


class Source(Protocol):
    """Rows by number."""

    @property
    def rows(self) -> int | None:
        """How many there are in one epoch; None: without end."""
        ...

    def measure(self, number: int) -> int | None:
        """Return the tokens of a row where they are known without making it. Raises InputError for a bad row."""
        ...

    def row(self, number: int) -> Row:
        """Return a row. Raises InputError for a bad one."""
        ...

    def messages(self, number: int) -> Sequence[Message] | None:
        """Return the conversation that a row is made of, or None where there is none."""
        ...

    def place(self, number: int) -> Place:
        """Return where a row comes from."""
        ...


def check_window(context: Context, of: str = "") -> None:
    """Refuse windows that the model cannot read, for sources that cut them. Raises ConfigError."""
    if context.window > context.processor.window:
        raise ConfigError(
            f"window={context.window}{of}: the model reads at most {context.processor.window} tokens; lower it, or "
            "give the run a rope with a longer window"
        )


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used, why, and what would mend it."""

    sample: str
    file: str
    line: int
    reason: str
    mend: str
    key: str = ""

    @property
    def place(self) -> Place:
        """Where it stands."""
        return Place(self.file, self.line, self.key)


@dataclass(frozen=True)
class Drawn:
    """Rows that are made up, or put together from stores, at random: each number has a generator of its own."""

    draw: Draw
    key: Key
    rows: int | None = None

    def _rng(self, number: int) -> Generator:
        seed, place = self.key
        return np.random.default_rng((seed, 2, place, number))  # 2: no other stream of the run begins so

    def measure(self, number: int) -> int | None:
        """Return None: a row is known once it is made."""
        return None

    def row(self, number: int) -> Row:
        """Return a row."""
        return self.draw(self._rng(number))

    def messages(self, number: int) -> Sequence[Message] | None:
        """Return the conversation of a row, None for a source of none."""
        return self.draw.converse(self._rng(number)) if isinstance(self.draw, Conversations) else None

    def place(self, number: int) -> Place:
        """Return no place."""
        return Place()


def bad_row(error: InputError, sample: str, source: Source, number: int) -> Bad:
    """Return what an error says about a row: messages end with what to do, behind the last semicolon."""
    file, line, key = source.place(number)
    reason, _, mend = str(error).rpartition("; ")
    return Bad(sample, file, line, reason or mend, mend if reason else "", key)


def _books(context: Context, split: str = "train", recurring: float = 0.0) -> Draw:
    stream = token_stream(context.folder, split, context.processor.tokenizer, context.cache)
    check_stream(stream, context.window)

    def draw(rng: Generator) -> Row:
        if rng.random() < recurring:
            ids = recurring_window(stream, context.window, rng)
        else:
            ids = window(stream, context.window, rng)
        return Row(ids=ids, labels=list(ids))

    return draw


def _retrieval(context: Context, distances: str = "uniform", most: int = 12, split: str = "train") -> Draw:
    if distances not in DISTANCES:
        raise ConfigError(f"distances={distances!r} of source 'retrieval' must be one of {', '.join(DISTANCES)}")
    tokenizer = context.processor.tokenizer
    stream, phrases = token_stream(context.folder, split, tokenizer, context.cache), Phrases(tokenizer)
    check_stream(stream, context.window)

    def draw(rng: Generator) -> Row:
        text = np.array(window(stream, context.window, rng))
        if rng.random() < 0.5:
            ids, _ = facts_row(text, phrases, rng, distances, most)
        else:
            ids = copy_row(text, rng, distances)
        return Row(ids=ids, labels=list(ids))

    return draw


def _genomes(context: Context, files: Sequence[str] | None, without: Sequence[str]) -> list[Genome]:
    if context.processor.tokenizer.definition != definition():
        raise ConfigError("genomes are read by a model of codons: init=genome, or one that was trained from it")
    names = list(TRAINING if files is None else files)
    if unknown := sorted(set(without) - set(names)):
        raise ConfigError(f"without: {', '.join(unknown)} is none of the files {', '.join(names)}")
    return read_genomes(context.folder, context.cache, [name for name in names if name not in without])


def _codon_rows(make: Callable[[Generator], list[int]]) -> Draw:
    def draw(rng: Generator) -> Row:
        ids = make(rng)
        return Row(ids=ids, labels=targets(ids))

    return draw


def _codons(
    context: Context,
    files: Sequence[str] | None = None,
    without: Sequence[str] = (),
    made: float = 0.0,
    shuffled: bool = False,
) -> Draw:
    genomes = _genomes(context, files, without)
    return _codon_rows(GeneRows(genomes, context.window, made=made, shuffled=shuffled))


def _genome_windows(context: Context, files: Sequence[str] | None = None, without: Sequence[str] = ()) -> Draw:
    return _codon_rows(WindowRows(_genomes(context, files, without), context.window))


def _genome_repeats(
    context: Context,
    files: Sequence[str] | None = None,
    without: Sequence[str] = (),
    inverted: float = 0.7,
    least: int = 16,
) -> Draw:
    genomes = _genomes(context, files, without)
    return _codon_rows(RepeatRows(genomes, context.window, inverted=inverted, least=least))


def _cells(context: Context, towers: float = 0.4) -> Draw:
    real = nlvr_scenes(context.folder, "train")
    image = context.processor.image
    if image is None:
        raise ConfigError("source 'cells' needs a model with a picture encoder")

    def draw(rng: Generator) -> Row:
        draw = rng.random()
        if draw < 0.2:
            scene = real[rng.integers(len(real))].scene
        else:
            scene = free_scene(rng) if draw < 0.52 else nlvr_like(rng, towers)
        row = context.processor.row([{"role": "user", "content": [{"type": "image", "image": scene.image}]}])
        features = row.media[0].features
        features.update(cells(scene.shapes, scene.image.size, features, image.patch))
        return row

    return draw


def _pictures(context: Context, turns: int = 6, ask: Sequence[str] | None = None, towers: float = 0.6) -> Draw:
    return _conversations(context, _asking(ask, lambda rng: drawn_picture(rng, turns, ask, towers)))


def _nlvr(context: Context, turns: int = 6, ask: Sequence[str] | None = None) -> Draw:
    rows = nlvr_scenes(context.folder, "train")
    return _conversations(context, _asking(ask, lambda rng: real_scene(rows[rng.integers(len(rows))], rng, turns, ask)))


def _frames(context: Context, turns: int = 4, most: int = 3, tallies: bool = False) -> Draw:
    if not 2 <= most <= 12:
        raise ConfigError(f"most={most} pictures of source 'frames' must lie in 2 .. 12")
    real = nlvr_scenes(context.folder, "train")

    def converse(rng: Generator) -> Conversation:
        count = int(rng.integers(2, most + 1))
        scenes = [real[rng.integers(len(real))].scene if rng.random() < 0.5 else free_scene(rng) for _ in range(count)]
        return frames(scenes, rng, turns, tallies=tallies)

    return _conversations(context, converse)


def _digits(
    context: Context,
    transcribe_only: bool = False,
    without: str | None = None,
    most: int = 7,
) -> Draw:
    rows = 2 * spoken_digits(context.folder, "train", without=without) + digit_voices(context.cache)
    return _conversations(context, lambda rng: heard_digits(rows, rng, most, transcribe_only=transcribe_only))


def _sentences(context: Context) -> Draw:
    clips = sentence_voices(context.cache)

    def converse(rng: Generator) -> Conversation:
        clip = clips[rng.integers(len(clips))]
        return heard_sentence(replace(clip, wave=augment(clip.wave, clip.rate, rng)))

    return _conversations(context, converse)


def _seen_and_heard(
    context: Context, spoken: float = 0.25, turns: int = 1, without: str | None = None, wide: bool = False
) -> Draw:
    digits = by_text(2 * spoken_digits(context.folder, "train", without=without) + digit_voices(context.cache))
    bank = by_text(sentence_voices(context.cache) + (question_voices(context.cache) if wide else []))
    real = nlvr_scenes(context.folder, "train")

    def converse(rng: Generator) -> Conversation:
        draw = rng.random()
        scene = real[rng.integers(len(real))].scene if draw < 0.4 else nlvr_like(rng) if draw < 0.8 else free_scene(rng)
        asked = spoken_question(scene, bank, rng, turns) if rng.random() < spoken else None
        return asked or number_and_picture(scene, digits, rng, turns=turns)

    return _conversations(context, converse)


def _instruct(context: Context) -> Draw:
    tokenizer = context.processor.tokenizer
    stream = token_stream(context.folder, "train", tokenizer, context.cache)
    return _conversations(context, instruct(stream, tokenizer))


def _asking(
    ask: Sequence[str] | None, converse: Callable[[Generator], Conversation]
) -> Callable[[Generator], Conversation]:
    """Check the kinds of questions asked for, and draw again where a scene gives rise to none of them."""
    if ask is not None and (not ask or not set(ask) <= set(QUESTION_KINDS)):
        raise ConfigError(f"ask: {list(ask)} must name some of the kinds {', '.join(QUESTION_KINDS)}")

    def draw(rng: Generator) -> Conversation:
        for _ in range(_TRIES):
            if made := converse(rng):
                return made
        raise DataError(f"ask: no question of {ask} in {_TRIES} scenes; name more kinds, or other scenes")

    return draw


_TRIES = 200


@dataclass(frozen=True)
class Conversations:
    """Draws conversations and makes rows of them."""

    processor: Processor
    converse: Callable[[Generator], Conversation]

    def __call__(self, rng: Generator) -> Row:
        """Return one row."""
        return self.processor.row(self.converse(rng), answer=False)


def _conversations(context: Context, converse: Callable[[Generator], Conversation]) -> Conversations:
    return Conversations(context.processor, converse)


class Kind(NamedTuple):
    """A source. draw: makes it, from a Context and its options. media: in its rows.

    cut: whether the window cuts its rows. windowed: whether they are as long as it, which may then be its own.
    """

    draw: Callable[..., Draw]
    media: tuple[str, ...] = ()
    cut: bool = False
    windowed: bool = False


SOURCES = {
    "books": Kind(_books, cut=True, windowed=True),
    "cells": Kind(_cells, ("image",)),
    "codons": Kind(_codons, cut=True),
    "digits": Kind(_digits, ("audio",)),
    "frames": Kind(_frames, ("image",)),
    "genome_repeats": Kind(_genome_repeats, cut=True),
    "genome_windows": Kind(_genome_windows, cut=True),
    "instruct": Kind(_instruct),
    "nlvr": Kind(_nlvr, ("image",)),
    "pictures": Kind(_pictures, ("image",)),
    "retrieval": Kind(_retrieval, cut=True, windowed=True),
    "seen_and_heard": Kind(_seen_and_heard, ("image", "audio")),
    "sentences": Kind(_sentences, ("audio",)),
}
CUT = {"documents", *(name for name, kind in SOURCES.items() if kind.cut)}
# the media in the rows of each source; of files, and of modalities' own sources, any
MADE = {"documents": (), **{name: kind.media for name, kind in SOURCES.items()}}
