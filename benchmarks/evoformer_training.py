"""Does a small Evoformer learn from real alignments and real structures, and what beyond simple counts?

    pip install -e '.[science]'
    python benchmarks/evoformer_training.py              # about ten minutes of one core; --task picks one

The data are test files of Biopython's source archive, taken from the package index once and checked by its SHA-256.

letters: of two real alignments (globins, cyclins) the sequences are split into those to learn from and those held out,
such that no held-out sequence has IDENTITY or more in common with one of the others. Of a held-out sequence one amino
acid in five is hidden, told from the rest of it and from the training sequences, until each was hidden once. Nats for
each amino acid, beside: uniform; frequencies of amino acids; frequencies of the column; and frequencies of the column
where like sequences weigh more (the weight's steepness chosen on the training sequences).

distances: 64 distances between C-beta atoms, from one sequence alone, of chains held out with all that resemble them.
Nats for each pair of residues at least three apart, beside: uniform; the histogram of all training pairs; the histogram
of those as far apart along the chain. Some thousands of residues do not teach how proteins fold; the figures say what
they do teach. The training chains' own figures show whether a stack can hold structures at all.

parity: the same training with each attention backend, losses compared step by step in float64 and float32.
"""

from __future__ import annotations

import argparse
import math
import tarfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from modalora.data.genomes import fetch_archive
from modalora.nn.products import wide_products
from modalora.science.evoformer import Evoformer, EvoformerConfig
from modalora.science.tasks import (
    AMINO_ACIDS,
    BINS,
    HIDDEN,
    Distogram,
    Embedder,
    LetterHead,
    distance_bins,
    hide,
    letter_losses,
    letters,
)

ALIGNMENTS = {"globins": "Stockholm/globins45.ali", "cyclins": "Stockholm/pfam8.seed.txt"}
CHAINS = (
    *("1A8O.cif A", "1A7G.cif E", "1LCD.cif A", "2OFG.cif X", "4CUP.cif A", "1GBT.cif A", "4ZHL.cif U", "6WQA.cif A"),
    *("2XHE.cif A", "2XHE.cif B", "6WG6.cif A", "6WG6.cif B", "7CFN.cif A", "7CFN.cif B", "7CFN.cif G", "7CFN.cif N"),
    *("7CFN.cif R", "7DDO.pdb A", "7DDO.pdb C"),
)
IDENTITY = 0.6  # of aligned letters, beyond which two sequences are on one side of the split
HELD_OUT, SHARE = 0.2, 5  # of the sequences; one amino acid in so many is hidden at a time
APART = 3  # residues along the chain, of the pairs that count
WINDOW = 64  # residues that are seen at a time, in training and after

SIZES = EvoformerConfig(
    blocks=2,
    msa_width=64,
    pair_width=32,
    single_width=None,
    msa_heads=4,
    msa_head_dim=16,
    pair_heads=4,
    pair_head_dim=8,
    outer_width=8,
    triangle_width=32,
    widening=2,
)


# ------------------------------------------------------------------------------------------------------------ the data


def unpack(path: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return where these test files are, once out of the archive."""
    folder = path.parent / "tests"
    found = {name: folder / name for name in names}
    if not all(file.exists() for file in found.values()):
        with tarfile.open(path) as whole:
            for name, file in found.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                member = whole.extractfile(f"{path.name.removesuffix('.tar.gz')}/Tests/{name}")
                file.write_bytes(member.read())
    return found


def read_alignments(path: Path) -> dict[str, Tensor]:
    from Bio import AlignIO

    files = unpack(path, list(ALIGNMENTS.values()))
    return {
        name: torch.stack([letters(str(one.seq)) for one in AlignIO.read(files[file], "stockholm")])
        for name, file in ALIGNMENTS.items()
    }


@dataclass(frozen=True)
class Chain:
    """One chain of a structure. coordinates: of C-beta, C-alpha of glycine; places: residue numbers."""

    name: str
    text: str
    places: Tensor
    bins: Tensor


def read_chains(path: Path) -> list[Chain]:
    from Bio.PDB import MMCIFParser, PDBParser
    from Bio.SeqUtils import seq1

    files, found = unpack(path, sorted({f"PDB/{one.split()[0]}" for one in CHAINS})), []
    for one in CHAINS:
        file, chain = one.split()
        parser = (MMCIFParser if file.endswith("cif") else PDBParser)(QUIET=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = next(iter(parser.get_structure(file, files[f"PDB/{file}"])))
        kept = [
            (residue.id[1], seq1(residue.get_resname()), residue["CB" if "CB" in residue else "CA"].coord)
            for residue in model[chain]
            if residue.id[0] == " " and "CA" in residue and seq1(residue.get_resname()) in "ARNDCQEGHILKMFPSTWYV"
        ]
        places, text, coordinates = zip(*kept, strict=True)
        bins = distance_bins(torch.from_numpy(np.stack(coordinates)).double())
        found.append(Chain(f"{file[:4]}:{chain}", "".join(text), torch.tensor(places), bins))
    return found


def clusters(size: int, are_alike: Callable[[int, int], bool]) -> list[list[int]]:
    """Return groups such that alike ones are always in one group (single linkage)."""
    parent = list(range(size))

    def top(one: int) -> int:
        while parent[one] != one:
            one = parent[one]
        return one

    for one in range(size):
        for other in range(one):
            if top(one) != top(other) and are_alike(one, other):
                parent[top(one)] = top(other)
    groups: dict[int, list[int]] = {}
    for one in range(size):
        groups.setdefault(top(one), []).append(one)
    return list(groups.values())


def identities(msa: Tensor) -> Tensor:
    """Return the share of equal letters of any two sequences, of the places where both have an amino acid."""
    real = (msa < AMINO_ACIDS).double()
    equal = torch.stack([((msa == one) * (one < AMINO_ACIDS)).sum(-1) for one in msa]).double()
    return equal / (real @ real.T).clamp(min=1)


def split(msa: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return sequences to learn from and held-out ones, (sequences,) numbers."""
    alike = identities(msa) >= IDENTITY
    groups = clusters(len(msa), lambda one, other: bool(alike[one, other]))
    np.random.default_rng(seed).shuffle(groups)
    groups.sort(key=lambda group: len(group) > HELD_OUT * len(msa))  # one that is too large to be held out
    held: list[int] = []
    for group in groups:
        if len(held) + len(group) <= HELD_OUT * len(msa):
            held += group
    rest = [one for one in range(len(msa)) if one not in held]
    return torch.tensor(rest), torch.tensor(sorted(held))


# -------------------------------------------------------------------------------------------------------------- letters


def counts(msa: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return how often each amino acid is in each column, (residues, AMINO_ACIDS), sequences weighed."""
    weights = torch.ones(len(msa), dtype=torch.double) if weights is None else weights
    found = torch.zeros(msa.shape[1], HIDDEN + 1, dtype=torch.double)
    return found.scatter_add_(1, msa.T, weights.expand(msa.shape[1], -1))[:, :AMINO_ACIDS]


def by_columns(known: Tensor, one: Tensor, alpha: float, beta: float) -> Tensor:
    """Return nats of the amino acids of a sequence by the frequencies of its columns in the known ones.

    alpha: letters that the frequencies of all columns count for. beta: how much more like sequences weigh; which are
    alike is seen from the letters that are not hidden, as many hidden at a time as for the network.
    """
    everywhere = counts(known).sum(0) + 1
    everywhere = everywhere / everywhere.sum()
    nats = torch.zeros(len(one), dtype=torch.double)
    for hidden in parts(one):
        weights = None
        if beta:
            seen = one.clone()
            seen[hidden] = HIDDEN
            both = (known < AMINO_ACIDS) & (seen < AMINO_ACIDS)
            alike = ((known == seen) & both).sum(-1) / both.sum(-1).clamp(min=1)
            weights = torch.softmax(beta * alike.double(), 0) * len(known)
        table = counts(known, weights) + alpha * everywhere
        nats[hidden] = -torch.log(table / table.sum(-1, keepdim=True))[hidden].gather(-1, one[hidden, None])[:, 0]
    return nats[one < AMINO_ACIDS]


def parts(one: Tensor) -> list[Tensor]:
    """Return SHARE sets of places of a sequence's amino acids, each place in one."""
    places = torch.nonzero(one < AMINO_ACIDS)[:, 0]
    order = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(len(places)))]
    return list(order.chunk(SHARE))


def letter_baselines(train: Tensor, held: Tensor) -> dict[str, float]:
    everywhere = counts(train).sum(0) + 1
    everywhere = everywhere / everywhere.sum()
    real = held[held < AMINO_ACIDS]
    found = {"uniform": math.log(AMINO_ACIDS), "frequencies": float(-torch.log(everywhere)[real].mean())}

    def left_out(alpha: float, beta: float) -> float:
        rows = range(len(train))
        rest = [torch.tensor([other for other in rows if other != one]) for one in rows]
        return float(torch.cat([by_columns(train[rest[one]], train[one], alpha, beta) for one in rows[::3]]).mean())

    for name, betas in (("columns", (0.0,)), ("like sequences", (5.0, 10.0, 20.0))):
        _, alpha, beta = min((left_out(a, b), a, b) for a in (1.0, 3.0, 10.0) for b in betas)
        found[name] = float(torch.cat([by_columns(train, one, alpha, beta) for one in held]).mean())
    return found


class LetterModel(nn.Module):
    """Embedder, stack and head for hidden letters."""

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.embedder, self.stack, self.head = Embedder(config), Evoformer(config), LetterHead(config)

    def forward(self, msa: Tensor, places: Tensor) -> Tensor:
        return self.head(self.stack(*self.embedder(msa, places))[0])


def letter_batch(msa: Tensor, generator: torch.Generator, rows: int = 16, width: int = 64) -> tuple[Tensor, ...]:
    """Return letters given, wanted, which count, and places. The first of the sequences is shown whole."""
    rows, width = min(rows, len(msa)), min(width, msa.shape[1])
    start = int(torch.randint(msa.shape[1] - width + 1, (), generator=generator))
    wanted = msa[torch.randperm(len(msa), generator=generator)[:rows], start : start + width]
    share = torch.rand(rows, 1, generator=generator) * 0.3  # so that a stack also sees sequences that are nearly whole
    chosen = (torch.rand(wanted.shape, generator=generator) < share) & (wanted < AMINO_ACIDS)
    chosen[0] = False
    return hide(wanted, chosen, generator), wanted, chosen, torch.arange(start, start + width)


@torch.inference_mode()
def letter_nats(model: LetterModel, train: Tensor, held: Tensor, context: int = 24) -> float:
    """Return nats for each amino acid of the held-out sequences, each shown alone with training sequences."""
    model.eval()
    found = []
    for one in held:
        known = train[:context]
        for hidden in parts(one):
            seen = one.clone()
            seen[hidden] = HIDDEN
            logits = model(torch.cat([known[:1], seen[None], known[1:]])[None], torch.arange(len(one))[None])
            found.append(letter_losses(logits[0, 1, hidden], one[hidden]))
    model.train()
    return float(torch.cat(found).double().mean())


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float = 3e-3) -> list[float]:
    """Train with Adam; warm-up of a tenth, then a cosine to zero. Returns the loss of every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    found = []
    for step in range(steps):
        share = min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(value.item())
    return found


def letters_task(path: Path, steps: int, seeds: int, most: int) -> None:
    alignments = read_alignments(path)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in alignments}
    for seed in range(seeds):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        sides = {name: split(msa, seed) for name, msa in alignments.items()}
        train = [alignments[name][sides[name][0]] for name in alignments]
        model = LetterModel(replace(SIZES, msa_dropout=0.1, pair_dropout=0.1)).train()

        def loss(
            model: nn.Module = model, train: list[Tensor] = train, generator: torch.Generator = generator
        ) -> Tensor:
            which = int(torch.randint(len(train), (), generator=generator))
            given, wanted, chosen, places = letter_batch(train[which], generator)
            return letter_losses(model(given[None], places[None])[0][chosen], wanted[chosen]).mean()

        start = time.process_time()
        fit(model, loss, steps)
        print(f"seed {seed}: {steps} steps in {time.process_time() - start:.0f} s of one core", flush=True)
        for name, msa in alignments.items():
            known, held = msa[sides[name][0]], msa[sides[name][1]][:most]
            own = letter_baselines(known, held) | {"Evoformer": letter_nats(model, known, held)}
            rows[name].append(own)
            told = ", ".join(f"{key} {value:.3f}" for key, value in own.items())
            print(f"seed {seed} {name}: {len(known)} sequences, {len(held)} held out; {told}", flush=True)
    print(f"\n| nats for each held-out amino acid ({seeds} splits and seeds) | " + " | ".join(rows) + " |")
    print("|---|" + "---|" * len(rows))
    for key in next(iter(rows.values()))[0]:
        cells = [[own[key] for own in found] for found in rows.values()]
        print(f"| {key} | " + " | ".join(f"{np.mean(one):.3f} ± {np.std(one):.3f}" for one in cells) + " |")


# ------------------------------------------------------------------------------------------------------------ distances


class DistanceModel(nn.Module):
    """Embedder, stack and head for distances."""

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.embedder, self.stack, self.head = Embedder(config), Evoformer(config), Distogram(config)

    def forward(self, msa: Tensor, places: Tensor) -> Tensor:
        return self.head(self.stack(*self.embedder(msa, places))[1])


def counted(chain: Chain, start: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return letters, places, bins and which pairs count, of a window."""
    own = slice(start, start + width)
    places = chain.places[own]
    apart = (places[:, None] - places).abs()
    return letters(chain.text[own]), places, chain.bins[own, own], apart >= APART


def windows(chain: Chain) -> list[int]:
    """Return starts of windows that cover a chain."""
    length = len(chain.text)
    return [min(at, max(0, length - WINDOW)) for at in range(0, length, WINDOW)]


def histograms(chains: Sequence[Chain], alpha: float) -> tuple[Tensor, Tensor]:
    """Return log-frequencies of all distances (BINS,) and of those by places apart (furthest apart last)."""
    table = torch.zeros(WINDOW + 1, BINS, dtype=torch.double)
    for chain in chains:
        for start in windows(chain):
            _, places, bins, real = counted(chain, start, WINDOW)
            apart = (places[:, None] - places).abs().clamp(max=WINDOW)
            table.view(-1).index_add_(0, (apart * BINS + bins)[real], torch.ones(int(real.sum()), dtype=torch.double))
    whole = table.sum(0) + 0.5
    whole = whole / whole.sum()
    near = torch.stack([table[max(0, one - one // 10) : one + one // 10 + 1].sum(0) for one in range(len(table))])
    near = near + alpha * whole
    return torch.log(whole), torch.log(near / near.sum(-1, keepdim=True))


@torch.inference_mode()
def distance_nats(chains: Sequence[Chain], told: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return nats for each pair. told: log-frequencies (residues, residues, BINS) of letters and places."""
    found = []
    for chain in chains:
        for start in windows(chain):
            text, places, bins, real = counted(chain, start, WINDOW)
            found.append(-told(text, places).gather(-1, bins[..., None])[..., 0][real].double())
    return float(torch.cat(found).mean())


def distance_baselines(train: Sequence[Chain], held: Sequence[Chain]) -> dict[str, float]:
    def by_table(chains: Sequence[Chain], given: Sequence[Chain], alpha: float) -> float:
        table = histograms(chains, alpha)[1]
        return distance_nats(given, lambda _, places: table[(places[:, None] - places).abs().clamp(max=WINDOW)])

    def left_out(alpha: float) -> float:
        return float(np.mean([by_table([other for other in train if other is not one], [one], alpha) for one in train]))

    alpha = min((10.0, 100.0, 1000.0), key=left_out)
    whole = histograms(train, alpha)[0]
    return {
        "uniform": math.log(BINS),
        "histogram": distance_nats(held, lambda text, _: whole.expand(len(text), len(text), -1)),
        "histogram by separation": by_table(train, held, alpha),
    }


def homologs(chains: Sequence[Chain]) -> list[list[int]]:
    """Return chains in groups that resemble each other: a third of the shorter one equal in the best alignment."""
    from Bio.Align import PairwiseAligner, substitution_matrices

    aligner = PairwiseAligner(mode="local", open_gap_score=-11, extend_gap_score=-1)
    aligner.substitution_matrix = substitution_matrices.load("BLOSUM62")

    def are_alike(one: int, other: int) -> bool:
        best = aligner.align(chains[one].text, chains[other].text)[0]
        equal = sum(a == b for a, b in zip(best[0], best[1], strict=True))
        return equal >= min(len(chains[one].text), len(chains[other].text)) / 3

    return clusters(len(chains), are_alike)


def distances_task(path: Path, steps: int, folds: int) -> None:
    chains = read_chains(path)
    groups = homologs(chains)
    print(f"{len(chains)} chains of {sum(len(one.text) for one in chains)} residues in {len(groups)} groups")
    for group in groups:
        if len(group) > 1:
            print("  together: " + ", ".join(chains[one].name for one in group))
    np.random.default_rng(0).shuffle(groups)
    rows = []
    for fold in range(folds):
        held = [chains[one] for group in groups[fold::folds] for one in group]
        train = [one for one in chains if one not in held]
        torch.manual_seed(fold)
        generator = torch.Generator().manual_seed(fold)
        model = DistanceModel(replace(SIZES, msa_width=32, msa_dropout=0.15, pair_dropout=0.25)).train()

        def loss(
            model: nn.Module = model, train: list[Chain] = train, generator: torch.Generator = generator
        ) -> Tensor:
            weights = torch.tensor([float(len(one.text)) for one in train])
            chain = train[int(torch.multinomial(weights, 1, generator=generator))]
            width = min(WINDOW, len(chain.text))
            start = int(torch.randint(len(chain.text) - width + 1, (), generator=generator))
            text, places, bins, real = counted(chain, start, width)
            logits = model(text[None, None], places[None])[0]
            return nn.functional.cross_entropy(logits[real], bins[real])

        def told(text: Tensor, places: Tensor, model: nn.Module = model) -> Tensor:
            return model(text[None, None], places[None])[0].log_softmax(-1)

        start = time.process_time()
        fit(model, loss, steps)
        spent = time.process_time() - start
        model.eval()
        own = distance_baselines(train, held) | {"Evoformer": distance_nats(held, told)}
        own |= {
            f"{key}, training chains": value for key, value in distance_baselines(train, train).items() if "sep" in key
        }
        own["Evoformer, training chains"] = distance_nats(train, told)
        rows.append(own)
        shown = ", ".join(f"{key} {value:.3f}" for key, value in own.items())
        print(f"fold {fold}: held out {', '.join(one.name for one in held)}; {shown}; {spent:.0f} s", flush=True)
    print(f"\n| nats for each pair, {folds} folds, {steps} steps | mean ± sd over folds |\n|---|---|")
    for key in rows[0]:
        values = [own[key] for own in rows]
        print(f"| {key} | {np.mean(values):.3f} ± {np.std(values):.3f} |")


# --------------------------------------------------------------------------------------------------------------- parity


def parity_task(path: Path, steps: int) -> None:
    msa = read_alignments(path)["globins"]
    for dtype in (torch.float64, torch.float32):
        curves = {}
        for backend in ("eager", "blockwise"):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            model = LetterModel(replace(SIZES, backend=backend)).to(dtype).train()

            def loss(model: nn.Module = model, generator: torch.Generator = generator) -> Tensor:
                given, wanted, chosen, places = letter_batch(msa, generator)
                return letter_losses(model(given[None], places[None])[0][chosen], wanted[chosen]).mean()

            curves[backend] = np.array(fit(model, loss, steps))
        apart = np.abs(curves["blockwise"] - curves["eager"]).max()
        first, last = curves["eager"][0], curves["eager"][-5:].mean()
        print(f"{dtype}: {steps} steps, loss {first:.4f} -> {last:.4f}; naive and exact attention apart by {apart:.1e}")


@wide_products()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("letters", "distances", "parity", "all"), default="all")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "modalora" / "biopython")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument(
        "--seeds", type=int, default=3, help="splits of the letters, and folds of the distances (two or more)"
    )
    parser.add_argument(
        "--held", type=int, default=10**6, help="score so many held-out sequences of an alignment at most"
    )
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    path = fetch_archive(asked.cache)
    if asked.task in ("parity", "all"):
        parity_task(path, min(asked.steps, 40))
    if asked.task in ("letters", "all"):
        letters_task(path, asked.steps, asked.seeds, asked.held)
    if asked.task in ("distances", "all"):
        distances_task(path, asked.steps, asked.seeds)


if __name__ == "__main__":
    main()
