"""What an Evoformer is given, and two things that it is trained to tell: hidden letters and distances.

AlphaFold 2 (doi:10.1038/s41586-021-03819-2), supplement: input embeddings, algorithms 3 and 4; masked letters, 1.2.7
and 1.9.9; distogram, 1.9.8. Letters are numbers below LETTERS, as ALPHABET has them, and one more for a hidden letter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from modalora.science.evoformer import EvoformerConfig

ALPHABET = "ARNDCQEGHILKMFPSTWYVX-"  # the amino acids, any of them, a gap
AMINO_ACIDS, GAP, HIDDEN = 20, 21, 22
LETTERS = 23  # with the hidden letter
NEAR = 32  # residues apart; further is as far
BINS, NEAREST, FURTHEST = 64, 2.3125, 21.6875  # of a distogram; edges in Angstrom


def letters(text: str) -> Tensor:
    """Return the letters of an aligned sequence, (residues,). Lower case is upper case, "." a gap, any other an X."""
    plain = text.upper().replace(".", "-")
    return torch.tensor([ALPHABET.find(letter) if letter in ALPHABET else ALPHABET.index("X") for letter in plain])


class Embedder(nn.Module):
    """An alignment to both representations (algorithms 3 and 4; letters alone, without deletions and profiles)."""

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        msa_width, pair_width = config.msa_width, config.pair_width
        self.letter = nn.Embedding(LETTERS, msa_width)  # a matrix times a one-hot letter is a row of it
        self.target = nn.Embedding(LETTERS, msa_width)
        self.left, self.right = nn.Embedding(LETTERS, pair_width), nn.Embedding(LETTERS, pair_width)
        self.apart = nn.Embedding(2 * NEAR + 1, pair_width)

    def forward(self, msa: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return msa (batch, sequences, residues, msa_width) and pair (batch, residues, residues, pair_width).

        msa: letters (batch, sequences, residues), the target sequence first. places: (batch, residues) whole numbers,
        along the chain.
        """
        target = msa[:, 0]
        apart = (places[:, :, None] - places[:, None]).clamp(-NEAR, NEAR) + NEAR
        pair = self.left(target)[:, :, None] + self.right(target)[:, None] + self.apart(apart)
        return self.letter(msa) + self.target(target)[:, None], pair


class LetterHead(nn.Module):
    """Logits of every letter of an alignment."""

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.msa_width, LETTERS)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, msa: Tensor) -> Tensor:
        """msa: (..., msa_width) -> (..., LETTERS)."""
        out: Tensor = self.linear(msa)
        return out


class Distogram(nn.Module):
    """Logits of the distance between any two residues, the same both ways."""

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.pair_width, BINS)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pair: Tensor) -> Tensor:
        """pair: (batch, residues, residues, pair_width) -> (batch, residues, residues, BINS)."""
        half = self.linear(pair)
        out: Tensor = half + half.transpose(1, 2)
        return out


def distance_bins(coordinates: Tensor) -> Tensor:
    """Return the bin of every distance, (..., residues, residues), of coordinates (..., residues, 3) in Angstrom.

    BINS - 1 edges, evenly from NEAREST to FURTHEST; the last bin is all that is further.
    """
    edges = torch.linspace(NEAREST, FURTHEST, BINS - 1, dtype=coordinates.dtype, device=coordinates.device)
    return torch.bucketize(torch.cdist(coordinates, coordinates), edges)


def hide(msa: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Return the alignment with the chosen letters changed: of ten, seven are hidden, one is any amino acid, one is
    drawn from its column, one stays.

    msa: letters (sequences, residues); chosen: bool of that shape.
    """
    kind = torch.rand(msa.shape, generator=generator)
    anything = torch.randint(AMINO_ACIDS, msa.shape, generator=generator)
    row = torch.randint(len(msa), msa.shape, generator=generator)
    changed = torch.where(kind < 0.7, HIDDEN, torch.where(kind < 0.8, anything, msa.gather(0, row)))
    return torch.where(chosen & (kind < 0.9), changed, msa)


def letter_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the nats of each letter. logits: (..., LETTERS); wanted: (...)."""
    return functional.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none").view(wanted.shape)
