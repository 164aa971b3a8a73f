"""The rows that a codon model is trained on: genes, windows of whole sequences, and stretches that come again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from modalora.data.genomes import Genome
from modalora.data.organisms import AMINO, made_up
from modalora.errors import ConfigError, DataError
from modalora.science.codons import END, NUMBER, encode, reverse_complement, reverse_complement_ids


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}={value} is a share of the rows, and must lie in 0 to 1")


class GeneRows:
    """Windows of the coding sequences of one genome, in any order, an END before, between and behind them."""

    def __init__(self, genomes: Sequence[Genome], window: int, *, made: float = 0.0, shuffled: bool = False) -> None:
        """made: share of rows of made-up organisms. shuffled: put the codons of each gene into any order, a control."""
        _check_share("made", made)
        self.genes = [[gene.ids for gene in genome.genes] for genome in genomes if genome.genes]
        if not self.genes:
            raise DataError("these files hold no coding sequence; give GenBank or EMBL files, or FASTA of genes")
        self.window, self.made, self.shuffled = window, made, shuffled
        sizes = np.array([sum(map(len, own)) for own in self.genes], dtype=float) ** 0.5  # small genomes are seen, too
        self.shares = sizes / sizes.sum()
        letters = [gene.letters for genome in genomes for gene in genome.genes]
        self.proteins = ["".join(AMINO[one[at : at + 3]] for at in range(0, len(one), 3)) for one in letters]

    def __call__(self, rng: Generator) -> list[int]:
        """Return the ids of one window."""
        if rng.random() < self.made:
            ids = [END, *(NUMBER[codon] for codon in made_up(self.proteins, rng, self.window - 1))]
            return self._mixed(ids, rng)
        own = self.genes[int(rng.choice(len(self.genes), p=self.shares))]
        ids = [END]
        while len(ids) < 2 * self.window:
            for place in rng.permutation(len(own)):
                gene = own[place]
                ids += [*(rng.permutation(gene).tolist() if self.shuffled else gene), END]
                if len(ids) >= 2 * self.window:
                    break
        start = int(rng.integers(0, len(ids) - self.window)) if rng.random() < 0.5 else 0
        return ids[start : start + self.window]

    def _mixed(self, ids: list[int], rng: Generator) -> list[int]:
        return [END, *rng.permutation(ids[1:]).tolist()] if self.shuffled else ids


class WindowRows:
    """Windows of whole sequences, on either strand, in any frame."""

    def __init__(self, genomes: Sequence[Genome], window: int) -> None:
        self.sequences = [one for genome in genomes for one in genome.sequences if len(one) >= 3 * window + 2]
        if not self.sequences:
            raise DataError(f"none of these sequences has the {3 * window + 2} letters of a window; make it shorter")
        self.window = window
        sizes = np.array([len(one) for one in self.sequences], dtype=float)
        self.shares = sizes / sizes.sum()

    def __call__(self, rng: Generator) -> list[int]:
        """Return the ids of one window."""
        letters = self.sequences[int(rng.choice(len(self.sequences), p=self.shares))]
        start = int(rng.integers(0, len(letters) - 3 * self.window + 1))
        piece = letters[start : start + 3 * self.window]
        return encode(reverse_complement(piece) if rng.random() < 0.5 else piece)


def repeat(ids: Sequence[int], kind: str) -> list[int]:
    """Return a second copy of codon ids: "direct" as they are, "inverted" as the other strand has them.

    "mirrored" is the order turned round without the complement, which no genome does: a control.
    """
    if kind == "inverted":
        return reverse_complement_ids(ids)
    if kind == "mirrored":
        return list(ids)[::-1]
    if kind == "direct":
        return list(ids)
    raise DataError(f"a repeat of kind {kind!r} is none of direct, inverted, mirrored")


class RepeatRows:
    """Windows of genomes in which a stretch comes again further on, as it is or as the other strand has it.

    The stretch is as it stands in the genome, or half the time with its codons in any order, so that there is
    nothing to know by heart. Half of the rows hold two copies; in the others they follow one another to the end.
    """

    def __init__(self, genomes: Sequence[Genome], window: int, *, inverted: float = 0.7, least: int = 16) -> None:
        """inverted: share of the repeats that are. least: codons of a stretch."""
        _check_share("inverted", inverted)
        self.windows, self.inverted, self.least = WindowRows(genomes, window), inverted, least
        if window < 2 * least:
            raise DataError(f"a window of {window} codons has no room for two copies of {least}; make it longer")

    def __call__(self, rng: Generator) -> list[int]:
        """Return the ids of one window."""
        ids = self.windows(rng)
        size = int(np.exp(rng.uniform(np.log(self.least), np.log(len(ids) // 2))))
        copy = list(ids[:size])
        if rng.random() < 0.5:
            copy = rng.permutation(copy).tolist()
        at = int(rng.integers(0, len(ids) - 2 * size + 1))
        ids[at : at + size] = copy
        only_two = rng.random() < 0.5
        while (room := len(ids) - at - 2 * size) >= 0:
            between = rng.integers(0, room + 1) if only_two else np.exp(rng.uniform(0, np.log(room + 1))) - 1
            at += size + int(between)
            if rng.random() < self.inverted:
                copy = reverse_complement_ids(copy)
            ids[at : at + size] = copy
            if only_two:
                break
        return ids
