"""Does a codon model know more of a held-out organism than tables do, and does a long window predict a repeat?

    modalora data genomes                                                   # 20 MB, once
    python benchmarks/genome.py codons --data ../shared/data --seeds 3      # trains and scores; 20 minutes of one core
    python benchmarks/genome.py repeats --data ../shared/data               # after genome-2-repeats
    python benchmarks/genome.py repeats --model runs/genome/3-window/model --size 256 --between 16 256 512
    python benchmarks/genome.py repeats --model runs/genome/4-whole/model --size 1024 --between 5926 --probes 2

`codons`: for each held-out genome and seed the recipe genome-1-codons without that genome, and once more with the
codons of all training genes shuffled. A run that was broken off goes on, a finished one is only scored. Baselines
count the same training genes: uniform, unigram, bigram, and the unigram that adapts to what it has read of the
document, their weights chosen by leaving one training genome out. Two controls: held-out genes with their codons
shuffled, where unigram bits stay and what order told is gone, and the model that never saw order. Physical limit: none
is known; the best that counting can do is the yardstick.

`repeats`: the chloroplast of Arabidopsis holds 26,264 letters twice, the second time as the other strand. Stretches of
the second copy are read with the first in the window, without it, and with another stretch in its place. A window that
holds a stretch also tells which codons are used, so each kind stands beside one of the same codons in another order:
inverted beside scrambled, direct (the positive control) beside mirrored. The repeat is predicted if order tells bits.
Intervals are 95 %, by drawing stretches or genes anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modalora.checkpoint.find import find_model
from modalora.checkpoint.store import load_model
from modalora.config import load_run
from modalora.config.recipes import RECIPES
from modalora.data.genomes import FILES, TRAINING, Genome, read_genomes
from modalora.evaluation.genome import (
    KINDS,
    by_gene,
    copy_bits,
    document_of,
    fit,
    inverted_repeat,
    mean_interval,
    model_bits,
    repeat_probes,
)
from modalora.models.multimodal import Multimodal
from modalora.training.run import run_recipe

# Held out -> files that hold genes of the same organism, or of near kin, and are left out of training with it.
FOLDS = {
    "NC_005816.gb": (),  # Yersinia
    "extra_keywords.gb": ("extra_keywords.gb", "drosophila.fasta", "egfr_nucl.fa"),  # Drosophila
    "SC10H5.embl": ("SC10H5.embl",),  # Streptomyces
    "NC_001422.gbk": ("NC_001422.gbk",),  # phiX174
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("codons", "repeats"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--runs", type=Path, default=Path("runs/genome"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="codons: runs of each fold")
    parser.add_argument("--folds", nargs="+", choices=FOLDS, default=["NC_005816.gb"], help="codons: held-out genomes")
    parser.add_argument("--set", nargs="*", default=[], help="codons: settings of the recipe, e.g. steps=100")
    parser.add_argument("--model", type=Path, help="repeats: a model folder")
    parser.add_argument("--size", type=int, default=48, help="repeats: codons of a stretch")
    parser.add_argument("--between", type=int, nargs="+", default=[8, 32], help="repeats: codons between copies")
    parser.add_argument("--probes", type=int, default=136, help="repeats: stretches at most")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report = codons(given) if given.question == "codons" else repeats(given)
    print(json.dumps(report, indent=2))


# -------------------------------------------------------------------------------------------------------------- codons


def codons(given: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for held in given.folds:
        left = FOLDS[held]
        training = read_genomes(given.data, given.cache, [name for name in TRAINING if name not in left])
        (genome,) = read_genomes(given.data, given.cache, [held])
        check_apart(training, genome)
        report[held] = score_fold(given, genome, training, left)
        report[held]["sha256"] = {name: FILES[name] for name in (held, *(one.file for one in training))}
    return report


def check_apart(training: Sequence[Genome], held: Genome, letters: int = 60) -> None:
    """Refuse a held-out genome that shares twenty codons with a training gene."""
    seen = {gene.letters[at : at + letters] for one in training for gene in one.genes
            for at in range(len(gene.letters) - letters + 1)}  # fmt: skip
    for gene in held.genes:
        if any(gene.letters[at : at + letters] in seen for at in range(len(gene.letters) - letters + 1)):
            raise SystemExit(f"{gene.name} of {held.file} shares {letters} letters with a training gene")


def score_fold(
    given: argparse.Namespace, held: Genome, training: Sequence[Genome], left: Sequence[str]
) -> dict[str, Any]:
    tables = fit([document_of(one) for one in training if one.genes])
    plain = document_of(held)
    mixed = [document_of(held, np.random.default_rng(seed)) for seed in range(3)]
    told = {
        "unigram": tables.unigram_bits(plain),
        f"bigram, {tables.weight:g} of the unigram": tables.bigram_bits(plain),
        f"adaptive unigram, {tables.own:g} codons": tables.adaptive_bits(plain),
    }
    unigram = by_gene(plain, told["unigram"])
    found: dict[str, Any] = {"organism": held.organism, "genes": len(held.genes), "codons": sum(map(len, unigram))}
    found["bits"] = {"uniform": 6.0} | {name: interval(by_gene(plain, bits)) for name, bits in told.items()}
    adaptive = by_gene(plain, tables.adaptive_bits(plain))
    runs: dict[str, list[dict[str, Any]]] = {"trained on genes": [], "trained on shuffled genes": []}
    for shuffled in (False, True):
        for seed in range(given.seeds if not shuffled else 1):
            model, window = trained(given, held.file, left, seed, shuffled)
            own = by_gene(plain, model_bits(model, plain, window))
            control = [by_gene(one, model_bits(model, one, window)) for one in mixed]
            without_order = [np.concatenate(genes) for genes in zip(*control, strict=True)]
            line = {
                "seed": seed,
                "bits": interval(own),
                "below unigram": interval(minus(unigram, own)),
                "below adaptive unigram": interval(minus(adaptive, own)),
                "bits, codons of the held-out genes shuffled": interval(without_order),
                "what order tells": round(mean_interval(without_order)[0] - mean_interval(own)[0], 4),
            }
            runs["trained on shuffled genes" if shuffled else "trained on genes"].append(line)
    return found | runs


def trained(
    given: argparse.Namespace, held: str, left: Sequence[str], seed: int, shuffled: bool
) -> tuple[Multimodal, int]:
    """Return the model of a fold and seed and its window, trained now or before."""
    name = f"{held}-{seed}{'-shuffled' if shuffled else ''}"
    run = load_run(RECIPES / "genome-1-codons.yaml", [
        f"data={given.data}", f"cache={given.cache}", f"seed={seed}", f"output={given.runs / 'codons' / name}",
        f"threads={given.threads}", f"mixture.0.options.shuffled={json.dumps(shuffled)}",
        f"mixture.0.options.without={json.dumps(list(left))}", *given.set,
    ])  # fmt: skip
    folder = run_recipe(run, lambda metrics: print(f"{name}: {metrics}", file=sys.stderr, flush=True))
    return load_model(folder).model.eval(), run.window


def minus(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [a - b for a, b in zip(one, other, strict=True)]


def interval(groups: Sequence[np.ndarray]) -> list[float]:
    """Return mean, low and high."""
    return [round(value, 4) for value in mean_interval(groups)]


# ------------------------------------------------------------------------------------------------------------- repeats


def repeats(given: argparse.Namespace) -> dict[str, Any]:
    folder = find_model(str(given.model or given.runs / "2-repeats" / "model"))
    loaded = load_model(folder)
    model = loaded.model.eval()
    (genome,) = read_genomes(given.data, given.cache, ["NC_000932.gb"])
    (letters,) = genome.sequences
    found = inverted_repeat(letters)
    seen = [one for source in loaded.notes["trained"]["mixture"] for one in source["options"].get("without", [])]
    report: dict[str, Any] = {
        "model": str(folder),
        "sha256": genome.sha256,
        "chloroplast in training": "NC_000932.gb" not in seen,
        "repeat": {"first": found.first, "second": found.second, "letters": found.length},
        "letters between the copies": found.second - found.first - found.length,
    }
    for between in given.between:
        probes = repeat_probes(letters, given.size, between)[: given.probes]
        line: dict[str, Any] = {"window": 2 * given.size + between, "stretches": len(probes)}
        seen_whole: dict[str, list[np.ndarray]] = {}
        for kind in KINDS:
            bits = {
                sight: [
                    copy_bits(model, probe, kind, sight, probes[(place + len(probes) // 2) % len(probes)])
                    for place, probe in enumerate(probes)
                ]
                for sight in ("whole", "short", "replaced")
            }
            line[kind] = {sight: interval([one[~np.isnan(one)] for one in own]) for sight, own in bits.items()}
            gain = [one - two for one, two in zip(bits["replaced"], bits["whole"], strict=True)]
            seen_whole[kind] = bits["whole"]
            line[kind]["told by the first copy"] = interval([one[~np.isnan(one)] for one in gain])
            line[kind]["the same, from the 9th codon on"] = interval([one[8:][~np.isnan(one[8:])] for one in gain])
        for kind, control in (("inverted", "scrambled"), ("direct", "mirrored")):
            # a scrambled copy has its codons at other places: means over a stretch are what can be compared
            pairs = zip(seen_whole[control], seen_whole[kind], strict=True)
            line[kind]["told by order"] = interval(
                [np.array([np.nanmean(one) - np.nanmean(two)]) for one, two in pairs]
            )
        report[f"{between} codons between"] = line
    return report


if __name__ == "__main__":
    main()
