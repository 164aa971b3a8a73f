"""A judge that needs no model: a known best vector, and documents that each see it a little differently."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from math import log
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modalora.config import SearchConfig
from modalora.evaluation.needle import Document, fingerprint
from modalora.longrope2.factors import Factors, Stretch
from modalora.longrope2.judges import NeedleJudge
from modalora.longrope2.search import Outcome, search
from modalora.longrope2.space import space_of
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import tiny

STRETCH = Stretch(theta=1000.0, pairs=32, window=128, target=1024)  # anchors 4 .. 14
BEST = Factors.meeting(STRETCH, 9, [8 * (1 + 0.9 * (place / 22) ** 3) for place in range(23)])


class Hill:
    """Nats: how far a candidate's log divisors lie from the best ones, and what a document adds and weighs."""

    def __init__(self, documents: int = 16, noise: float = 1.0) -> None:
        rng = np.random.default_rng(0)
        self.documents, self.asked, self.passes = documents, 0, 0
        self.level = rng.uniform(0.5, 4.0, documents)  # some documents are hard for every candidate
        self.weights = rng.gamma(1 / noise, noise, (documents, STRETCH.pairs))  # a document looks at some pairs more

    def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
        self.asked += 1
        self.passes += len(candidates) * len(documents)
        best = np.log(BEST.long)
        gaps = np.array([[log(value) for value in own.long] for own in candidates]) - best
        picked = list(documents)
        return torch.tensor((gaps**2) @ self.weights[picked].T + self.level[picked])


class KilledError(Exception):
    """Stands for a process that ends in the middle of a call."""


class Mortal(Hill):
    """Ends after so many calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
        if self.left == 0:
            raise KilledError
        self.left -= 1
        return super().losses(candidates, documents)


SMALL = SearchConfig(population=16, iterations=5, seed=3, together=3, crossover=0.25)


def find(folder: Path, calls: int = 10**9, config: SearchConfig = SMALL) -> Outcome:
    """Search the hill; the process "dies" after so many calls."""
    return search(space_of(STRETCH, config), Mortal(calls), config, folder=folder)


def small_model() -> Multimodal:
    torch.manual_seed(0)
    return Multimodal(ModelConfig(decoder=tiny().decoder)).eval()


def documents(count: int, length: int = 320, probes: int = 3) -> list[Document]:
    """Random ids of which some near the end are scored."""
    rng = np.random.default_rng(count)
    found = []
    for seed in range(count):
        ids = tuple(rng.integers(0, 320, length).tolist())
        answers = tuple(range(length - 4 * probes, length, 4))
        found.append(Document(ids, answers, tuple(place / probes for place in range(probes)), seed, fingerprint(ids)))
    return found


TINY = SearchConfig(population=6, iterations=2, seed=1, race_from=2, together=2)


def search_tiny(folder: Path, kill_after: int | None = None) -> Outcome:
    """Search for the tiny model; kill this process, without a word, at the start of a call."""
    model = small_model()
    judge = NeedleJudge(model, documents(4))
    stretch = Stretch.of(model.config.decoder.rope, 16, 2048)

    class Doomed:
        documents = 4
        calls = 0

        def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
            if self.calls == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1
            return judge.losses(candidates, documents)

    return search(space_of(stretch, TINY), Doomed(), TINY, folder=folder)
