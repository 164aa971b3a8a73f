"""Weighted mixtures of sources, drawn so that batch number N of a run is always the same.

A source draws one training row: a conversation, or a window of running text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modalora.config import SourceConfig
from modalora.contracts import Batch
from modalora.data.instruct import instruct
from modalora.data.nlvr import nlvr_scenes
from modalora.data.questions import QUESTION_KINDS
from modalora.data.rows import (
    Conversation,
    cells,
    drawn_picture,
    heard_digits,
    heard_sentence,
    number_and_picture,
    real_scene,
    spoken_question,
)
from modalora.data.scenes import free_scene, nlvr_like
from modalora.data.speech import Clip, augment, mask_bands, spoken_digits
from modalora.data.text import recurring_window, token_stream, windows
from modalora.data.voices import digit_voices, sentence_voices
from modalora.errors import ConfigError, DataError
from modalora.processing.processor import Processor, Row

Source = Callable[[np.random.Generator], Row]


@dataclass(frozen=True)
class Context:
    """What sources are made from. folder: the data of docs/nano.md. cache: where derived files are kept."""

    folder: Path
    cache: Path
    processor: Processor
    window: int


class Mixture:
    """Batches of rows drawn from weighted sources."""

    def __init__(
        self,
        context: Context,
        sources: Sequence[SourceConfig],
        *,
        rows: int,
        accumulate: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Draw steps of `accumulate` micro-batches, of which process `rank` of `world` gets every world-th.

        Raises ConfigError when they cannot be shared evenly.
        """
        if accumulate % world:
            raise ConfigError(
                f"accumulate={accumulate} micro-batches cannot be shared by {world} processes; make it a multiple of it"
            )
        self.rank, self.world = rank, world
        self.context, self.rows, self.accumulate, self.seed = context, rows, accumulate, seed
        weights = np.array([source.weight for source in sources])
        self.shares = weights / weights.sum()
        self.sources = [make_source(context, source) for source in sources]
        self.taken = 0  # steps

    def state(self) -> dict[str, Any]:
        """Return how many steps were taken."""
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.taken = int(state["taken"])

    def take(self) -> list[Batch]:
        """Return the micro-batches of the next step, rows of like length together so that little is padding."""
        rng = np.random.default_rng((self.seed, self.taken))
        self.taken += 1
        count = self.rows * self.accumulate
        drawn = [self.sources[rng.choice(len(self.sources), p=self.shares)](rng) for _ in range(count)]
        drawn.sort(key=lambda row: len(row.ids))
        collate = self.context.processor.collate
        starts = range(0, count, self.rows)[self.rank :: self.world]
        return [collate(drawn[at : at + self.rows]) for at in starts]


def make_source(context: Context, config: SourceConfig) -> Source:
    """Return the source that a recipe names. Raises ConfigError for an unknown name or option."""
    if config.source not in SOURCES:
        raise ConfigError(f"unknown source {config.source!r}; known are {', '.join(sorted(SOURCES))}")
    try:
        return SOURCES[config.source](context, **config.options)
    except TypeError as error:
        raise ConfigError(f"source {config.source!r} does not take these options: {error}") from None


def _books(context: Context, split: str = "train", recurring: float = 0.0) -> Source:
    stream = token_stream(context.folder, split, context.processor.tokenizer, context.cache)

    def draw(rng: np.random.Generator) -> Row:
        if rng.random() < recurring:
            ids = recurring_window(stream, context.window, rng)
        else:
            (ids,) = windows(stream, context.window, 1, rng)
        return Row(ids=ids, labels=list(ids))

    return draw


def _cells(context: Context, nlvr: float = 0.2, free: float = 0.32, towers: float = 0.4) -> Source:
    real = nlvr_scenes(context.folder, "train")
    image = context.processor.image
    if image is None:
        raise ConfigError("source 'cells' needs a model with a picture encoder")

    def draw(rng: np.random.Generator) -> Row:
        draw = rng.random()
        if draw < nlvr:
            scene = real[rng.integers(len(real))].scene
        else:
            scene = free_scene(rng) if draw < nlvr + free else nlvr_like(rng, towers)
        row = context.processor.row([{"role": "user", "content": [{"type": "image", "image": scene.image}]}])
        features = row.media[0][1]
        features.update(cells(scene.shapes, scene.image.size, features, image.patch))
        return row

    return draw


def _pictures(context: Context, turns: int = 6, ask: Sequence[str] | None = None, towers: float = 0.6) -> Source:
    return _conversations(context, _asking(ask, lambda rng: drawn_picture(rng, turns, ask, towers)))


def _nlvr(context: Context, turns: int = 6, ask: Sequence[str] | None = None) -> Source:
    rows = nlvr_scenes(context.folder, "train")
    return _conversations(context, _asking(ask, lambda rng: real_scene(rows[rng.integers(len(rows))], rng, turns, ask)))


def _digits(
    context: Context,
    transcribe_only: bool = False,
    without: str | None = None,
    real: int = 2,
    most: int = 7,
    masks: int = 0,
) -> Source:
    rows = real * spoken_digits(context.folder, "train", without=without) + digit_voices(context.cache)
    draw = _conversations(context, lambda rng: heard_digits(rows, rng, most, transcribe_only=transcribe_only))

    def masked(rng: np.random.Generator) -> Row:
        row = draw(rng)
        features = row.media[0][1]
        features["mel"] = torch.from_numpy(mask_bands(features["mel"].numpy(), rng, masks))
        return row

    return masked if masks else draw


def _sentences(context: Context) -> Source:
    clips = sentence_voices(context.cache)

    def converse(rng: np.random.Generator) -> Conversation:
        clip = clips[rng.integers(len(clips))]
        return heard_sentence(replace(clip, wave=augment(clip.wave, clip.rate, rng)))

    return _conversations(context, converse)


def _seen_and_heard(context: Context, spoken: float = 0.25, turns: int = 1, without: str | None = None) -> Source:
    digits: dict[str, list[Clip]] = defaultdict(list)
    for clip in 2 * spoken_digits(context.folder, "train", without=without) + digit_voices(context.cache):
        digits[clip.words[0]].append(clip)
    bank: dict[str, list[Clip]] = defaultdict(list)
    for clip in sentence_voices(context.cache):
        bank[clip.text].append(clip)
    real = nlvr_scenes(context.folder, "train")

    def converse(rng: np.random.Generator) -> Conversation:
        draw = rng.random()
        scene = real[rng.integers(len(real))].scene if draw < 0.4 else nlvr_like(rng) if draw < 0.8 else free_scene(rng)
        asked = spoken_question(scene, bank, rng) if rng.random() < spoken else None
        return asked or number_and_picture(scene, digits, rng, turns=turns)

    return _conversations(context, converse)


def _instruct(context: Context) -> Source:
    tokenizer = context.processor.tokenizer
    stream = token_stream(context.folder, "train", tokenizer, context.cache)
    return _conversations(context, instruct(stream, tokenizer))


def _asking(
    ask: Sequence[str] | None, converse: Callable[[np.random.Generator], Conversation]
) -> Callable[[np.random.Generator], Conversation]:
    """Check the kinds of questions asked for, and draw again where a scene gives rise to none of them."""
    if ask is not None and (not ask or not set(ask) <= set(QUESTION_KINDS)):
        raise ConfigError(f"ask: {list(ask)} must name some of the kinds {', '.join(QUESTION_KINDS)}")

    def draw(rng: np.random.Generator) -> Conversation:
        for _ in range(_TRIES):
            if made := converse(rng):
                return made
        raise DataError(f"ask: no question of {ask} in {_TRIES} scenes; name more kinds, or other scenes")

    return draw


_TRIES = 200


def _conversations(context: Context, converse: Callable[[np.random.Generator], Conversation]) -> Source:
    return lambda rng: context.processor.row(converse(rng), answer=False)


SOURCES: dict[str, Callable[..., Source]] = {
    "books": _books,
    "cells": _cells,
    "digits": _digits,
    "instruct": _instruct,
    "nlvr": _nlvr,
    "pictures": _pictures,
    "seen_and_heard": _seen_and_heard,
    "sentences": _sentences,
}
