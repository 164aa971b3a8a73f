"""How well does nano with the DNA adapter predict the codons of genes that no training row held, and do the DNA tasks?

    modalora train examples/dna/recipe.yaml data=../shared/data            # 20 minutes of one core at most
    python benchmarks/dna.py --adapter runs/dna/dna-lora --data ../shared/data

Held out wholly: the plasmid NC_005816 (Yersinia pestis), 10 genes. Scored is every codon of a gene but the first, from
the codons before it: up to 64 as DNA, of its gene and of the gene that stands before, and those of its block of 48 as
text. Probabilities are the decoder's own, normalised over the 64 codons (modalora_dna.py:codon_logs).
Baselines see the genes that the model was trained on: unigram with one added to every count; bigram mixed with the
unigram, its weight chosen on plastid genes that nothing was trained on; and the unigram of the same made-up organisms
besides real genes. The control shuffles the codons inside each gene: what is left then was usage, not order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "dna"))
import modalora
import modalora_dna as dna
from modalora.modality import register
from modalora.science.codons import NUMBER

BEFORE, BLOCK = 64, 48
Genes = Sequence[Sequence[str]]


def stretches(genes: Genes) -> list[tuple[int, list[str], list[str]]]:
    """Return (gene, codons before, codons to score) so that every codon but a gene's first is scored once."""
    found, stream = [], []
    for number, gene in enumerate(genes):
        for at in range(1, len(gene), BLOCK):
            found.append((number, [*stream, *gene[:at]][-BEFORE:], list(gene[at : at + BLOCK])))
        stream = list(gene)
    return found


def model_logs(assistant: modalora.Assistant, genes: Genes, rows: int = 8) -> list[np.ndarray]:
    made = stretches(genes)
    logs: list[list[float]] = [[] for _ in genes]
    for at in range(0, len(made), rows):
        part = made[at : at + rows]
        for (gene, *_), own in zip(part, dna.codon_logs(assistant, [one[1:] for one in part]), strict=True):
            logs[gene] += own.tolist()
    return [np.array(own) for own in logs]


def counts(genes: Genes) -> tuple[np.ndarray, np.ndarray]:
    unigram, bigram = np.ones(64), np.zeros((64, 64))
    for gene in genes:
        for one, following in zip(gene, gene[1:], strict=False):
            unigram[NUMBER[following]] += 1
            bigram[NUMBER[one], NUMBER[following]] += 1
    return unigram / unigram.sum(), bigram


def table_logs(genes: Genes, unigram: np.ndarray, bigram: np.ndarray | None = None, alpha: float = 0) -> list:
    def log(one: str, following: str) -> float:
        share = unigram[NUMBER[following]]
        if bigram is not None:
            row = bigram[NUMBER[one]]
            share = (row[NUMBER[following]] + alpha * share) / (row.sum() + alpha)
        return float(np.log2(share))

    return [np.array([log(one, two) for one, two in zip(gene, gene[1:], strict=False)]) for gene in genes]


def bits(logs: Sequence[np.ndarray]) -> float:
    return -float(np.concatenate(list(logs)).mean())


def accuracy(assistant: modalora.Assistant, cases: Sequence[list[dict]], rows: int = 16) -> dict[str, float]:
    right = letters = total = 0
    for at in range(0, len(cases), rows):
        part = cases[at : at + rows]
        answers = assistant.ask_many([case[:1] for case in part], max_tokens=48)
        for case, answer in zip(part, answers, strict=True):
            wanted, said = case[1]["content"].split(), answer.text.split()
            right += wanted == said
            letters += sum(a == b for a, b in zip(wanted, said, strict=False))
            total += len(wanted)
    return {"cases": len(cases), "exact": round(right / len(cases), 3), "words": round(letters / total, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=Path("runs/dna/dna-lora"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cases", type=int, default=100, help="questions of each task")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    register(dna.MODALITY)
    assistant = modalora.load("nano")
    probe = "The old man went home and said nothing."
    text = assistant.logits(probe)
    assistant.load_adapter(given.adapter, "dna")
    report: dict[str, object] = {"text logits bit-identical": bool(torch.equal(text, assistant.logits(probe)))}

    genomes = given.data / "genomes"
    plasmid = dna.coding_genes(genomes / dna.PLASMID)
    plastid = [gene for gene in dna.coding_genes(genomes / dna.PLASTID) if gene.name in dna.HELD_OUT]
    training = dna.training_genes(given.data)
    split = {
        name: [dna.triplets(gene.letters) for gene in genes]
        for name, genes in (("plasmid", plasmid), ("plastid", plastid))
    }
    unigram, bigram = counts([dna.triplets(gene.letters) for gene in training])
    alphas = (1, 3, 10, 30, 100, 300, 1000, 3000)
    alpha = min(alphas, key=lambda one: bits(table_logs(split["plastid"], unigram, bigram, one)))
    rng = np.random.default_rng(given.seed)
    proteins = ["".join(dna.AMINO[codon] for codon in dna.triplets(gene.letters)) for gene in training]
    mixed, _ = counts([dna.made_up(proteins, rng, 300) for _ in range(300)])
    mixed = 0.6 * mixed + 0.4 * unigram
    for name, genes in split.items():
        shuffled = [[gene[0], *rng.permutation(gene[1:]).tolist()] for gene in genes]
        logs = {
            "unigram": table_logs(genes, unigram),
            "unigram with made-up organisms": table_logs(genes, mixed),
            f"bigram, weight {alpha} of the unigram": table_logs(genes, unigram, bigram, alpha),
            "nano + dna": model_logs(assistant, genes),
            "nano + dna, codons shuffled in each gene": model_logs(assistant, shuffled),
        }
        two, ours = list(logs.values())[2:4]
        report[name] = {
            "genes": len(genes),
            "codons": sum(len(own) for own in ours),
            "bits per codon": {"uniform": 6.0, **{key: round(bits(own), 4) for key, own in logs.items()}},
            "genes below bigram": sum(bits([a]) < bits([b]) for a, b in zip(ours, two, strict=True)),
        }
    kinds = {
        dna.TRANSLATE: plasmid,
        dna.REVERSE: plasmid,
        dna.ORGANISM: [*plastid, *(gene for gene in training if gene.name in ("EGFR", "Adh"))],
        dna.GENE: [dna.mutated(gene, rng, 0.05) for gene in training],
    }
    report["tasks"] = {
        kind: accuracy(
            assistant,
            [dna.task(kind, genes[int(rng.integers(len(genes)))], rng, dna.LENGTHS[kind]) for _ in range(given.cases)],
        )
        for kind, genes in kinds.items()
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
