"""Needles: facts hidden in long text and asked for at its end, of which only the answers are scored.

The guide of LongRoPE2's search (arXiv:2502.20082, section 3.2 and appendix C): the perplexity of the answer tokens,
for what was read long ago decides them and nothing else, while nearly every other token can be guessed from its
neighbours. Lengths and positions are tokens; losses are nats.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modalora.assistant import set_regime
from modalora.contracts import Batch, Rotations, Route
from modalora.errors import DataError, WorkError
from modalora.evaluation.intervals import wilson
from modalora.models.multimodal import Multimodal
from modalora.nn.products import wide_products
from modalora.nn.rope import LongRope, Regime


@dataclass(frozen=True, slots=True)
class Document:
    """One row of token ids, and which of them are scored.

    ids: exactly as many as were asked for. answers: positions of the scored tokens, ascending; each is predicted from
    the position before it. depths: where the needles were asked to lie, 0 the start and 1 the end of the text, in the
    order in which they are asked for; none for plain text. sha256: of the ids, as `fingerprint` has it.
    Raises DataError for a document that could not be scored.
    """

    ids: tuple[int, ...]
    answers: tuple[int, ...]
    depths: tuple[float, ...]
    seed: int
    sha256: str

    def __post_init__(self) -> None:
        if not self.answers:
            raise DataError(f"document of seed {self.seed} has no scored token; its answers must name at least one")
        ascending = all(one < other for one, other in zip(self.answers, self.answers[1:], strict=False))
        if not ascending or self.answers[0] < 1 or self.answers[-1] >= len(self.ids):
            raise DataError(
                f"document of seed {self.seed}: answers {self.answers[0]}..{self.answers[-1]} must ascend within "
                f"1..{len(self.ids) - 1}, the positions that have a token before them"
            )
        if self.depths and len(self.depths) != len(self.probes):
            raise DataError(
                f"document of seed {self.seed} has {len(self.depths)} needles and {len(self.probes)} answers"
            )
        if self.sha256 != fingerprint(self.ids):
            raise DataError(f"document of seed {self.seed} is not the one whose sha256 was stored: its ids differ")

    @property
    def probes(self) -> tuple[tuple[int, ...], ...]:
        """The answers one by one: runs of scored positions without a gap."""
        runs: list[list[int]] = []
        for at in self.answers:
            if runs and at == runs[-1][-1] + 1:
                runs[-1].append(at)
            else:
                runs.append([at])
        return tuple(map(tuple, runs))


def fingerprint(ids: Sequence[int]) -> str:
    """Return the SHA-256 of ids written as 4 bytes each, the lowest first."""
    return hashlib.sha256(np.array(ids, dtype="<u4").tobytes()).hexdigest()


def plain_document(ids: Sequence[int], *, scored: int | None = None, seed: int = 0) -> Document:
    """Return running text as a document of which the last `scored` tokens count; None: all that have one before."""
    scored = len(ids) - 1 if scored is None else scored
    return Document(tuple(ids), tuple(range(len(ids) - scored, len(ids))), (), seed, fingerprint(ids))


@torch.no_grad()
@wide_products()
def answer_losses(
    model: Multimodal, documents: Sequence[Document], rotations: Rotations | None = None, adapter: str | None = None
) -> Tensor:
    """Return the mean nats over the answer tokens of each document, (documents,), in one forward pass.

    Rows may be longer than the model's window: how it reads them is what is asked. rotations: the rows' own rotary
    tables. adapter: of the rows, one or a sum; None: the decoder alone. Only the answers go through the output
    projection. Raises WorkError for a loss that is no finite number, DataError without documents.
    """
    losses = model.decoder.losses(*_answer_states(model, documents, rotations, adapter))
    means = torch.stack([part.mean() for part in losses.split([len(one.answers) for one in documents])])
    _check_finite(means, documents)
    return means


@dataclass(frozen=True, slots=True)
class Probe:
    """One question. right: whether greedy decoding gives exactly the answer. nats: mean over its `tokens`."""

    length: int
    depth: float
    right: bool
    nats: float
    tokens: int


@torch.no_grad()
@wide_products()
def ask_probes(
    model: Multimodal, documents: Sequence[Document], *, rows: int = 8, adapter: str | None = None
) -> list[Probe]:
    """Return what becomes of every question, document by document, in batches of `rows` documents of like length.

    One forward pass tells what greedy decoding says: up to its first wrong token it reads the true answer, so it is
    right where every answer token is the likeliest. Which rotary table is used, the whole document's length decides.
    adapter: as for `answer_losses`.
    Raises DataError for a document without needles, WorkError for a loss that is no finite number.
    """
    found: dict[int, list[Probe]] = {}
    order = sorted(range(len(documents)), key=lambda one: len(documents[one].ids))
    for at in range(0, len(order), rows):
        places = order[at : at + rows]
        part = [documents[place] for place in places]
        states, targets = _answer_states(model, part, None, adapter)
        losses, likeliest = model.decoder.losses(states, targets), model.decoder.head(states).argmax(-1)
        sizes = [len(probe) for document in part for probe in document.probes]
        means = [float(piece.mean()) for piece in losses.split(sizes)]
        rights = [bool(piece.all()) for piece in (likeliest == targets).split(sizes)]
        told = iter(zip(rights, means, sizes, strict=True))
        for place, document in zip(places, part, strict=True):
            if not document.depths:
                raise DataError(f"document of seed {document.seed} has no needles; build it with make_documents")
            found[place] = [
                Probe(len(document.ids), depth, *one) for depth, one in zip(document.depths, told, strict=False)
            ]
            _check_finite(torch.tensor([probe.nats for probe in found[place]]), [document] * len(found[place]))
    return [probe for place in range(len(documents)) for probe in found[place]]


@dataclass(frozen=True, slots=True)
class Cell:
    """Questions of one length and depth, or of one length over all depths (depth None). nats: mean per question."""

    length: int
    depth: float | None
    right: int
    count: int
    nats: float

    @property
    def accuracy(self) -> float:
        """Share of the questions that are answered exactly."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy, as if no two questions shared a document."""
        return wilson(self.right, self.count)


@dataclass(frozen=True, slots=True)
class Grid:
    """Accuracy over length and depth. regime: which rows used the long rotary table (nn.rope.Regime).

    tokens: mean tokens of an answer, which the tokenizer decides. cells: by length, then depth.
    """

    regime: str
    tokens: float
    cells: tuple[Cell, ...]

    @property
    def by_length(self) -> tuple[Cell, ...]:
        """All depths of each length together."""
        return tuple(
            _sum_cells([cell for cell in self.cells if cell.length == length])
            for length in sorted({cell.length for cell in self.cells})
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with shares and intervals; `from_json` reads them."""
        return {
            "regime": self.regime,
            "tokens": self.tokens,
            "cells": [_cell_json(cell) for cell in self.cells],
            "by_length": [_cell_json(cell) for cell in self.by_length],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Grid:
        """Return the grid that `as_json` wrote."""
        names = [field.name for field in dataclasses.fields(Cell)]
        cells = tuple(Cell(**{name: cell[name] for name in names}) for cell in fields["cells"])
        return cls(fields["regime"], fields["tokens"], cells)


def measure_grid(
    model: Multimodal, documents: Sequence[Document], *, regimes: Sequence[Regime] = ("reference",), rows: int = 8,
    adapter: str | None = None,
) -> list[Grid]:  # fmt: skip
    """Return one grid per regime over the documents' lengths and depths; the model keeps the regime that it had.

    adapter: as for `answer_losses`. Raises ConfigError for a regime that the model does not have.
    """
    rope = model.config.decoder.rope
    before: Regime = rope.regime if isinstance(rope, LongRope) else "reference"
    try:
        grids = []
        for regime in regimes:
            set_regime(model, regime)
            grids.append(make_grid(regime, ask_probes(model, documents, rows=rows, adapter=adapter)))
        return grids
    finally:
        set_regime(model, before)


def make_grid(regime: str, probes: Sequence[Probe]) -> Grid:
    """Return what became of questions as a grid. Raises DataError when there are none."""
    if not probes:
        raise DataError("a grid needs at least one question; build documents with needles")
    cells: dict[tuple[int, float], list[Probe]] = {}
    for probe in probes:
        cells.setdefault((probe.length, probe.depth), []).append(probe)
    made = tuple(
        Cell(length, depth, sum(one.right for one in own), len(own), sum(one.nats for one in own) / len(own))
        for (length, depth), own in sorted(cells.items())
    )
    return Grid(regime, sum(probe.tokens for probe in probes) / len(probes), made)


def _sum_cells(cells: Sequence[Cell]) -> Cell:
    count = sum(cell.count for cell in cells)
    nats = sum(cell.nats * cell.count for cell in cells) / count
    return Cell(cells[0].length, None, sum(cell.right for cell in cells), count, nats)


def _cell_json(cell: Cell) -> dict[str, Any]:
    low, high = cell.interval
    return {**dataclasses.asdict(cell), "accuracy": cell.accuracy, "low": low, "high": high}


def _answer_states(
    model: Multimodal, documents: Sequence[Document], rotations: Rotations | None, adapter: str | None
) -> tuple[Tensor, Tensor]:
    """Return the states that predict the answers of all documents, (answers, width), and the answers, (answers,)."""
    if not documents:
        raise DataError("no documents were given; build at least one")
    device = model.device
    lengths = [len(document.ids) for document in documents]
    padded = pad_sequence([torch.tensor(document.ids) for document in documents], batch_first=True)
    batch = Batch(padded.to(device), torch.tensor(lengths, device=device), Route((adapter,) * len(documents)))
    rows = torch.tensor([row for row, document in enumerate(documents) for _ in document.answers], device=device)
    columns = torch.tensor([at for document in documents for at in document.answers], device=device)
    return model.hidden(batch, rotations=rotations)[rows, columns - 1], batch.input_ids[rows, columns]


def _check_finite(losses: Tensor, documents: Sequence[Document]) -> None:
    for loss, document in zip(losses.tolist(), documents, strict=True):
        if not isfinite(loss):
            raise WorkError(
                f"a document of {len(document.ids)} tokens (seed {document.seed}) has a loss of {loss}; the model's "
                "weights, dtype or rotary factors cannot be used at this length"
            )
