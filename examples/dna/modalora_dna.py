"""DNA for modalora: coding sequences, one codon to one token, and tasks on real genes (docs/modality.md).

Codons are numbered as in modalora/science/codons.py; genes come from GenBank and FASTA files, read as in
modalora/data/genomes.py. The plasmid NC_005816 is read by the benchmark alone, never by a source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from modalora.assistant import Assistant
from modalora.config import check_sizes
from modalora.contracts import IGNORED
from modalora.data.genomes import LEAST, Gene, longest_frame, read_genome, records
from modalora.data.organisms import AMINO, made_up
from modalora.errors import DataError, MediaError
from modalora.modality import Modality
from modalora.nn.lora import LoraConfig
from modalora.science.codons import CODONS, UNKNOWN, encode, reverse_complement

Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the features and the encoder must agree on."""

    branches: ClassVar[tuple[str, ...]] = ("dna",)
    hidden_size: int = 96
    blocks: int = 2
    most: int = 768  # codons in one sequence

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        check_sizes(self)

    def encoder(self) -> Encoder:
        """Return the networks, with fresh weights."""
        return Encoder(self)

    def smallest(self) -> tuple[dict[str, Tensor], int]:
        """Return the features of one codon."""
        return features("ATG", self)


def features(payload: str | Path, sizes: Sizes) -> tuple[dict[str, Tensor], int]:
    """Return the codons of a sequence, (tokens,), one token each.

    payload: letters, or a FASTA or GenBank file with one record. Raises MediaError.
    """
    letters = payload if isinstance(payload, str) and re.fullmatch(r"[ACGTUNacgtun]{3,}", payload) else _read(payload)
    codons = encode(letters, partial="drop")
    if not 1 <= len(codons) <= sizes.most:
        raise MediaError(f"the DNA has {len(codons)} whole codons; give 1 to {sizes.most}, or a part of it")
    return {"codons": torch.tensor(codons)}, len(codons)


def _read(path: str | Path) -> str:
    kind = "genbank" if Path(path).suffix in (".gb", ".gbk", ".genbank") else "fasta"
    try:
        (record,) = records(Path(path))
    except (DataError, ValueError) as error:
        raise MediaError(
            f"{str(path)!r:.80} is neither DNA letters nor a {kind} file of one record: {error}; give ACGT in frame, "
            "or such a file"
        ) from None
    return str(record.seq)


class Encoder(nn.Module):
    """Codons to tokens: a table and convolutions over five codons; each sequence is encoded by itself."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.table = nn.Embedding(UNKNOWN + 1, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(sizes.blocks))
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(sizes.blocks))

    def forward(self, items: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """items: {"codons": (tokens,)} each -> (tokens, hidden_size) each."""
        return [self._encode(item["codons"]) for item in items]

    def _encode(self, codons: Tensor) -> Tensor:
        x = self.table(codons)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = x + functional.gelu(convolution(norm(x).t()[None])[0].t())
        return x


# ---------------------------------------------------------------------------------------------------------- real genes

PLASTID, PLASMID = "NC_000932.gb", "NC_005816.gb"
HELD_OUT = ("rbcL", "petA", "atpB", "rps4", "ndhC", "psbD")  # of the plastid: seen by no source, for choosing settings


def coding_genes(path: Path) -> list[Gene]:
    """Return the coding sequences of a GenBank file, those that stand there twice once. Raises DataError."""
    if not path.exists():
        raise DataError(f"{path} is missing; `data` must name a folder with genomes/{path.name}")
    return list(read_genome(path).genes)


@cache
def training_genes(folder: Path) -> tuple[Gene, ...]:
    """Return the genes that sources draw from: of the plastid without HELD_OUT, of flies and of mammals."""
    genes = [gene for gene in coding_genes(folder / "genomes" / PLASTID) if gene.name not in HELD_OUT]
    seen: set[str] = set()
    for file, name in (("drosophila.fasta", "Adh"), ("egfr_nucl.fa", "EGFR")):
        for record in records(folder / "genomes" / file):
            species = " ".join(re.findall(r"(Drosophila|D\.|Bos|Homo|Rattus|Sus) ?([a-z]+)", record.description)[0])
            species = species.replace("D. ", "Drosophila ")
            letters = longest_frame(str(record.seq))
            if len(letters) >= 3 * LEAST and f"{name} {species}" not in seen:
                seen.add(f"{name} {species}")
                genes.append(Gene(name, species, letters))
    return tuple(genes)


# --------------------------------------------------------------------------------------------------------------- tasks

CONTINUE = "Continue."
TRANSLATE, REVERSE, ORGANISM, GENE = "Translate.", "Reverse complement?", "Which organism?", "Which gene?"
LENGTHS = {TRANSLATE: 8, REVERSE: 4, ORGANISM: 64, GENE: 64}  # codons asked about, at most


def words(codons: Sequence[str]) -> str:
    """Return codons as an answer has them, a word each: the space tells the model where a codon begins."""
    return " ".join(codons)


def conversation(codons: Sequence[str], question: str, answer: str) -> list[dict[str, Any]]:
    """Return one question about a sequence with its answer."""
    parts = [{"type": "dna", "dna": "".join(codons)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def triplets(letters: str) -> list[str]:
    """Return the codons of a sequence in frame."""
    return [letters[at : at + 3] for at in range(0, len(letters), 3)]


def task(kind: str, gene: Gene, rng: Rng, fewest: int = 1) -> list[dict[str, Any]]:
    """Return a question of a kind about a part of a gene, `fewest` to LENGTHS codons long, with its answer."""
    codons = triplets(gene.letters)
    most = min(LENGTHS[kind], len(codons))
    count = int(rng.integers(min(fewest, most), most + 1))
    at = int(rng.integers(0, len(codons) - count + 1))
    part = codons[at : at + count]
    letters = "".join(part)
    answers = {
        TRANSLATE: " ".join(AMINO[codon] for codon in part),
        REVERSE: words(triplets(reverse_complement(letters))),
        ORGANISM: gene.organism,
        GENE: gene.name,
    }
    return conversation(part, kind, answers[kind])


def mutated(gene: Gene, rng: Rng, share: float) -> Gene:
    """Return a gene in which a share of the letters is drawn anew."""
    letters = np.array(list(gene.letters))
    change = rng.random(len(letters)) < share
    letters[change] = rng.choice(list("ACGT"), size=int(change.sum()))
    return replace(gene, letters="".join(letters))


Draw = Callable[[Rng], Any]


def codons(context: Any, before: int = 64, after: int = 48, made: float = 0.5) -> Draw:
    """Source: codons of a stretch of genes as a sequence, the next ones as the answer. made: share made up."""
    genes = training_genes(context.folder)
    streams = [triplets(gene.letters) for gene in genes]
    plastid = [gene.organism == genes[0].organism for gene in genes]
    proteins = ["".join(AMINO[codon] for codon in stream) for stream in streams]

    def draw(rng: Rng) -> Any:
        held = int(rng.integers(1, before + 1))
        if rng.random() < made:
            stretch = made_up(proteins, rng, held + after)
        else:
            own = bool(rng.random() < 0.7)  # the plastid has most of the genes; flies and mammals are seen too
            chosen = [stream for stream, one in zip(streams, plastid, strict=True) if one == own]
            stretch = []
            while len(stretch) < held + after:
                stretch += chosen[int(rng.integers(len(chosen)))]
            at = int(rng.integers(0, len(stretch) - held - after + 1))
            stretch = stretch[at : at + held + after]
        answer = words(stretch[held:])
        return context.processor.row(conversation(stretch[:held], CONTINUE, answer), answer=False)

    return draw


def tasks(context: Any) -> Draw:
    """Source: what a part of a gene codes for, its other strand, its organism, its name."""
    genes = training_genes(context.folder)
    kinds, weights = (TRANSLATE, REVERSE, ORGANISM, GENE), (0.4, 0.4, 0.1, 0.1)

    def draw(rng: Rng) -> Any:
        kind = str(rng.choice(kinds, p=weights))
        gene = genes[int(rng.integers(len(genes)))]
        named = kind in (ORGANISM, GENE)
        gene = mutated(gene, rng, 0.03 if named else rng.choice([0.0, 0.5]))
        # other answers grow word by word: a long one is learnt where short ones are asked for too
        made = task(kind, gene, rng, LENGTHS[kind] if named else 1)
        return context.processor.row(made, answer=False)

    return draw


# -------------------------------------------------------------------------------------------------------------- scoring


def trie(paths: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Return by each beginning of a path the tokens that may follow it."""
    found: dict[tuple[int, ...], dict[int, None]] = {}
    for path in paths:
        for at, token in enumerate(path):
            found.setdefault(tuple(path[:at]), {})[token] = None
    return {beginning: list(following) for beginning, following in found.items()}


@torch.inference_mode()
def codon_logs(assistant: Assistant, stretches: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[Tensor]:
    """Return log2 of the probability of each codon, (codons,) per pair of a sequence and the codons that follow it.

    The model answers CONTINUE with codons as words of two or three tokens. At each token, the probabilities of those
    that go on towards one of the 64 codons are divided by their sum, and a codon has the product over its tokens: these
    sum to 1 over the 64. Codons of the pair before the one that is scored stand in the answer, as if the model had
    written them.
    """
    tokenizer = assistant.processor.tokenizer
    first = {codon: tokenizer.encode(codon) for codon in CODONS}
    later = {codon: tokenizer.encode(f"A {codon}")[1:] for codon in CODONS}
    tries = trie(list(first.values())), trie(list(later.values()))
    made = [
        assistant.processor.row(conversation(given, CONTINUE, words(asked)), answer=False) for given, asked in stretches
    ]
    batch = assistant.processor.collate(made)
    logs = assistant.model(batch.to(assistant.device)).float().cpu().log_softmax(-1)
    found = []
    for number, (_, asked) in enumerate(stretches):
        at = int((batch.labels[number] != IGNORED).nonzero()[0])
        scores = []
        for place, codon in enumerate(asked):
            path, following = (first, later)[place > 0][codon], tries[place > 0]
            score = 0.0
            for step, token in enumerate(path):
                own = logs[number, at - 1]
                score += float(own[token] - own[following[tuple(path[:step])]].logsumexp(0))
                at += 1
            scores.append(score)
        found.append(torch.tensor(scores) / np.log(2))
    return found


MODALITY = Modality(
    name="dna",
    config=Sizes,
    features=features,
    adapter=LoraConfig(r=16, lora_alpha=32),
    sources={"codons": codons, "tasks": tasks},
)
