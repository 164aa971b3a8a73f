"""How well codons are predicted: bits per codon of a model and of counted tables, and of the second copy of a repeat.

Bits are -log2 of the probability of the codon that stands there, normalised over the 64 codons; ends of documents and
NNN are read and never scored. A document is ids of science/codons.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import log

import numpy as np
import torch
from numpy.random import Generator

from modalora.contracts import Batch, Route
from modalora.data.genome_rows import repeat
from modalora.data.genomes import Genome
from modalora.errors import ConfigError, DataError
from modalora.models.multimodal import Multimodal
from modalora.nn.products import wide_products
from modalora.science.codons import CODONS, END, clean, encode, reverse_complement

Document = Sequence[int]


# --------------------------------------------------------------------------------------------------------------- model


@torch.inference_mode()
@wide_products()
def model_bits(model: Multimodal, document: Document, window: int) -> np.ndarray:
    """Return the bits of each id of a document, (ids,), nan for what is not scored.

    Windows overlap by half: a codon has at least window / 2 ids before it, or all there are. Raises ConfigError where
    the model reads less than the window.
    """
    if not 4 <= window <= (most := model.config.decoder.rope.window):
        raise ConfigError(f"window={window} must lie in 4 .. {most}, what this model reads")
    ids = torch.tensor(list(document))
    bits = np.full(len(ids), np.nan)
    device = model.device
    scored = 1  # the first id follows nothing
    for start in range(0, len(ids), window // 2):
        piece = ids[start : start + window]
        if start + len(piece) > scored:
            batch = Batch(piece[None], torch.tensor([len(piece)]), Route((None,))).to(device)
            states = model.hidden(batch)[0, scored - start - 1 : len(piece) - 1]
            logs = model.decoder.head(states)[:, : len(CODONS)].double().log_softmax(-1).cpu()
            own = ids[scored : start + len(piece)]
            real = (own < len(CODONS)).numpy()
            told = -logs.gather(1, own.clamp(max=len(CODONS) - 1)[:, None])[:, 0].numpy() / log(2)
            bits[scored : start + len(piece)] = np.where(real, told, np.nan)
            scored = start + len(piece)
    return bits


# -------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True, slots=True)
class Tables:
    """Counts of training codons, smoothed.

    unigram: (64,) shares, one added to each count. bigram: (64, 64) counts of a codon behind another in one gene.
    weight: of the unigram in a row of the bigram, in codons. own: of the unigram against the counts of the document so
    far, in codons. Both are chosen on training genomes left out in turn (`fit`).
    """

    unigram: np.ndarray
    bigram: np.ndarray
    weight: float = 1.0
    own: float = 1.0

    def unigram_bits(self, document: Document) -> np.ndarray:
        """Return bits from how often codons are used."""
        return _masked(document, -np.log2(self.unigram)[_codons(document)])

    def bigram_bits(self, document: Document) -> np.ndarray:
        """Return bits from the codon before; behind an END, from the unigram."""
        ids = _codons(document)
        rows = self.bigram + self.weight * self.unigram
        shares = rows / rows.sum(1, keepdims=True)
        told = self.unigram[ids].copy()
        follows = np.array([False, *(one < len(CODONS) for one in document[:-1])])
        told[follows] = shares[ids[:-1], ids[1:]][follows[1:]]
        return _masked(document, -np.log2(told))

    def adaptive_bits(self, document: Document) -> np.ndarray:
        """Return bits from how often codons are used, here and in the document so far: what an organism prefers."""
        seen = self.own * self.unigram
        bits = np.full(len(document), np.nan)
        for place, number in enumerate(document):
            if number < len(CODONS):
                bits[place] = -np.log2(seen[number] / seen.sum())
                seen[number] += 1
        return bits


WEIGHTS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


def fit(documents: Sequence[Document]) -> Tables:
    """Return tables of training genomes, one document each: weights are those best for a genome that was not counted.

    Raises DataError for fewer than two documents.
    """
    if len(documents) < 2:
        raise DataError(f"tables are fitted by leaving one genome out of several; there are {len(documents)}")
    left = [(Tables(*_count([other for other in documents if other is not one])), one) for one in documents]

    def bigram(weight: float) -> float:
        return sum(float(np.nansum(replace(own, weight=weight).bigram_bits(one))) for own, one in left)

    def adaptive(weight: float) -> float:
        return sum(float(np.nansum(replace(own, own=weight).adaptive_bits(one))) for own, one in left)

    return Tables(*_count(documents), weight=min(WEIGHTS, key=bigram), own=min(WEIGHTS, key=adaptive))


def _count(documents: Iterable[Document]) -> tuple[np.ndarray, np.ndarray]:
    unigram, bigram = np.ones(len(CODONS)), np.zeros((len(CODONS), len(CODONS)))
    for document in documents:
        ids = np.array(document)
        np.add.at(unigram, ids[ids < len(CODONS)], 1)
        both = (ids[:-1] < len(CODONS)) & (ids[1:] < len(CODONS))
        np.add.at(bigram, (ids[:-1][both], ids[1:][both]), 1)
    return unigram / unigram.sum(), bigram


def _codons(document: Document) -> np.ndarray:
    return np.minimum(np.array(document), len(CODONS) - 1)


def _masked(document: Document, bits: np.ndarray) -> np.ndarray:
    return np.where(np.array(document) < len(CODONS), bits, np.nan)


# ----------------------------------------------------------------------------------------------------------- documents


def document_of(genome: Genome, rng: Generator | None = None) -> list[int]:
    """Return the genes of a genome as one document, an END before, between and behind them.

    rng: puts the codons of each gene into any order, the control: usage stays, order goes.
    """
    ids = [END]
    for gene in genome.genes:
        own = gene.ids
        ids += [*(own if rng is None else rng.permutation(own).tolist()), END]
    return ids


def by_gene(document: Document, bits: np.ndarray) -> list[np.ndarray]:
    """Return the scored bits of each gene of a document."""
    ends = [place for place, number in enumerate(document) if number == END]
    genes = [bits[start + 1 : stop] for start, stop in zip(ends, ends[1:], strict=False)]
    return [gene[~np.isnan(gene)] for gene in genes]


def mean_interval(groups: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Return the mean over all values and its 95 % interval, groups drawn anew with replacement (bootstrap)."""
    sums, sizes = np.array([own.sum() for own in groups]), np.array([len(own) for own in groups])
    places = np.random.default_rng(0).integers(0, len(groups), (2000, len(groups)))
    means = sums[places].sum(1) / sizes[places].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(sums.sum() / sizes.sum()), float(low), float(high)


# ------------------------------------------------------------------------------------------------------------- repeats


LEAST = 200  # letters of an inverted repeat


@dataclass(frozen=True, slots=True)
class InvertedRepeat:
    """Two stretches of which one is the other strand of the other. Places count letters from 0."""

    first: int
    second: int
    length: int


def inverted_repeat(letters: str) -> InvertedRepeat:
    """Return the longest exact inverted repeat of a sequence that has one of LEAST letters. Raises DataError."""
    letters = clean(letters)
    other, size = reverse_complement(letters), len(letters)
    own, turned = (np.frombuffer(one.encode(), np.uint8) for one in (letters, other))
    best = InvertedRepeat(0, 0, 0)
    for at in range(0, size - LEAST, LEAST // 2):  # one of these lies wholly in any repeat that is long enough
        word = letters[at : at + LEAST // 2]
        found = other.find(word)
        while found >= 0:
            back = _agreeing(own[:at][::-1], turned[:found][::-1])
            stop = at + _agreeing(own[at:], turned[found:])
            start, there = at - back, found - back
            second = size - there - (stop - start)
            length = min(stop - start, second - start)  # a stretch that folds on itself is no two copies
            if start < second and length > best.length:
                best = InvertedRepeat(start, second, length)
            found = other.find(word, found + 1)
    if best.length < LEAST:
        raise DataError(f"this sequence of {size:,} letters has no inverted repeat of {LEAST}; give another")
    return best


def _agreeing(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many letters two stretches agree in from their start."""
    most = min(len(one), len(other))
    differs = one[:most] != other[:most]
    return int(differs.argmax()) if differs.any() else most


@dataclass(frozen=True, slots=True)
class Probe:
    """A first copy, what is between, and a second copy, as codon ids."""

    first: tuple[int, ...]
    between: tuple[int, ...]
    second: tuple[int, ...]


def repeat_probes(letters: str, size: int, between: int) -> list[Probe]:
    """Return disjoint stretches of `size` codons of the longest inverted repeat, each with its second copy.

    between: codons of the region between the copies that are kept, from its start; the rest is cut out, with the part
    of the repeat that lies further in. The frame is that of the window, so that codons of both copies face each other.
    Raises DataError where there is not so much.
    """
    letters = clean(letters)
    found = inverted_repeat(letters)
    stop = found.first + found.length
    middle = encode(letters[stop : found.second], partial="drop")
    if between > len(middle):
        raise DataError(f"there are {len(middle)} codons between the copies, fewer than between={between}")
    probes = []
    for inner in range(found.length // (3 * size)):  # from the innermost stretch outwards
        first = letters[stop - 3 * size * (inner + 1) : stop - 3 * size * inner]
        second = letters[found.second + 3 * size * inner :][: 3 * size]
        probes.append(Probe(tuple(encode(first)), tuple(middle[:between]), tuple(encode(second))))
    return probes


KINDS = ("inverted", "scrambled", "direct", "mirrored")


def copy_bits(model: Multimodal, probe: Probe, kind: str, sight: str, other: Probe) -> np.ndarray:
    """Return the bits of a second copy, (codons,), nan for NNN.

    kind: "inverted" is the genome's own second copy; "direct" repeats the first as it is; "mirrored" in the order
    turned round, which no training row does; "scrambled" is the second copy with its codons in any order. The last two
    hold the codons of "direct" and of "inverted": what they gain is usage, and what is beyond it is order.
    sight: "whole" shows the first copy; "short" leaves it out of the window; "replaced" has the first copy of another
    probe in its place, so that the window is as long and tells nothing of it.
    """
    if kind == "scrambled":
        second = tuple(np.random.default_rng(0).permutation(probe.second).tolist())
    else:
        second = probe.second if kind == "inverted" else tuple(repeat(probe.first, kind))
    before = {"whole": probe.first, "short": (), "replaced": other.first}
    if sight not in before:
        raise ConfigError(f"sight={sight!r} must be one of {', '.join(before)}")
    document = (*before[sight], *probe.between, *second)
    return model_bits(model, document, len(document))[-len(second) :]
