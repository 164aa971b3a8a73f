"""Made-up organisms: proteins written in codons that each of them prefers in a way of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from modalora.science.codons import CODONS

_FORWARD = "KNKNTTTTRSRSIIMIQHQHPPPPRRRRLLLLEDEDAAAAGGGGVVVV*Y*YSSSS*CWCLFLF"  # of the codons in order; NCBI table 11
AMINO = dict(zip(CODONS, _FORWARD, strict=True))
SYNONYMS = {amino: [codon for codon in CODONS if AMINO[codon] == amino] for amino in sorted(set(_FORWARD))}

# Shares of amino acids in the proteins of UniProtKB/Swiss-Prot (release notes 2023_05), in percent.
SWISS_PROT = dict(zip("ALGVESIKRDTPNQFYMHCW", (
    8.25, 9.65, 7.07, 6.86, 6.71, 6.65, 5.91, 5.80, 5.53, 5.46, 5.36, 4.74, 4.06, 3.93, 3.86, 2.92, 2.41, 2.27, 1.38,
    1.10,
), strict=True))  # fmt: skip


def usage(rng: Generator) -> dict[str, tuple[list[str], np.ndarray]]:
    """Return the codons of each amino acid and their shares in one made-up organism.

    The organism prefers G and C at the third place, or A and T, as real ones do; other preferences are small.
    """
    strong = rng.uniform(0.15, 0.85)
    made = {}
    for amino, codons in SYNONYMS.items():
        weights = np.array([strong if codon[2] in "GC" else 1 - strong for codon in codons])
        made[amino] = (codons, rng.dirichlet(1 + 8 * weights / weights.mean()) * weights)
    return {amino: (codons, shares / shares.sum()) for amino, (codons, shares) in made.items()}


def made_up(proteins: Sequence[str], rng: Generator, length: int) -> list[str]:
    """Return codons of a made-up organism: real proteins, changed here and there, or random ones, in its own codons."""
    own = usage(rng)
    letters, shares = list(SWISS_PROT), np.array(list(SWISS_PROT.values()))
    shares = rng.dirichlet(120 * shares / shares.sum())
    change = rng.choice([0.1, 0.4, 1.0])
    protein = ""
    while len(protein) < length:
        one = str(rng.choice(proteins))
        keep = rng.random(len(one)) >= change
        random = rng.choice(letters, size=len(one), p=shares)
        protein += "M" + "".join(np.where(keep, list(one), random)[1:-1]) + "*"
    at = int(rng.integers(0, len(protein) - length + 1))
    return [str(rng.choice(own[amino][0], p=own[amino][1])) for amino in protein[at : at + length]]
