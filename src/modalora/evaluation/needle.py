"""Needles: facts hidden in long text and asked for at its end, of which only the answers are scored.

The guide of LongRoPE2's search (arXiv:2502.20082, section 3.2 and appendix C): the perplexity of the answer tokens,
for what was read long ago decides them and nothing else, while nearly every other token can be guessed from its
neighbours. Lengths and positions are tokens; losses are nats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modalora.contracts import Batch, Rotations, Route
from modalora.errors import DataError, WorkError
from modalora.models.multimodal import Multimodal


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


def answer_losses(model: Multimodal, documents: Sequence[Document], rotations: Rotations | None = None) -> Tensor:
    """Return the mean nats over the answer tokens of each document, (documents,), in one forward pass.

    Rows may be longer than the model's window: how it reads them is what is asked. rotations: the rows' own rotary
    tables. Raises WorkError for a loss that is no finite number, DataError without documents.
    """
    states, targets = _answer_states(model, documents, rotations)
    losses = model.decoder.losses(states, targets)
    return _per_document(losses, documents)


@torch.no_grad()
def _answer_states(
    model: Multimodal, documents: Sequence[Document], rotations: Rotations | None
) -> tuple[Tensor, Tensor]:
    """Return the states that predict the answers of all documents, (answers, width), and the answers, (answers,)."""
    if not documents:
        raise DataError("no documents were given; build at least one")
    device = model.decoder.embed_tokens.weight.device
    lengths = [len(document.ids) for document in documents]
    padded = torch.zeros((len(documents), max(lengths)), dtype=torch.long)
    for row, document in enumerate(documents):
        padded[row, : lengths[row]] = torch.tensor(document.ids)
    batch = Batch(padded.to(device), torch.tensor(lengths, device=device), Route((None,) * len(documents)))
    rows = torch.tensor([row for row, document in enumerate(documents) for _ in document.answers], device=device)
    columns = torch.tensor([at for document in documents for at in document.answers], device=device)
    return model.hidden(batch, rotations=rotations)[rows, columns - 1], batch.input_ids[rows, columns]


def _per_document(losses: Tensor, documents: Sequence[Document]) -> Tensor:
    means = torch.stack([part.mean() for part in losses.detach().split([len(one.answers) for one in documents])])
    if not bool(means.isfinite().all()):
        (first,) = (~means.isfinite()).nonzero()[0].tolist()
        raise WorkError(
            f"document {first} (seed {documents[first].seed}, {len(documents[first].ids)} tokens) has a loss of "
            f"{float(means[first])}; the model's weights, its dtype or its rotary factors cannot be used at this length"
        )
    return means
