"""What does each saving of the search for rotary divisors bring, and does the search find as much with it?

The plain search reads one candidate and one document at a time, each document with one needle, and makes the logits of
all tokens. Each other line changes one thing, the last all of them: answers alone through the output projection;
several candidates and documents in one pass; racing; eight needles in a document instead of one, with as many needles
in all; a surrogate that chooses one of four proposals, in a quarter of the iterations; the same choice made by
documents of half the length; a bfloat16 copy of the model. What each search found is then judged by the same needle
documents of other books.

A pass of the plain search tells the same as one that only scores answers, to 1e-6 nats. With --sample N its search is
made with those, N plain passes are timed, and its times are theirs times the passes that it made.

    .venv/bin/python benchmarks/search.py MODEL [--target 1024] [--data ../shared/data] [--seeds 1] [--sample 50]

MODEL: a folder trained on the rows of data/retrieval.py (recipe window-1-base) for --style words; for --style digits
any model that reads text.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional

import modalora
from modalora.config import SearchConfig
from modalora.contracts import Batch, Route
from modalora.evaluation.documents import make_documents, part_of_books
from modalora.evaluation.needle import Document
from modalora.longrope2.factors import Factors, Stretch
from modalora.longrope2.judges import NeedleJudge, Surrogate, rotations
from modalora.longrope2.search import Judge, Outcome, rank_correlation, search
from modalora.longrope2.space import Space, space_of
from modalora.models.multimodal import Multimodal
from modalora.nn.products import wide_products

TOGETHER = 8  # needles of a document that shares its text among several


class Plain:
    """One candidate and one document at a time, and the logits of all tokens."""

    def __init__(self, model: Multimodal, documents: Sequence[Document]) -> None:
        self.model, self.texts, self.documents = model, documents, len(documents)

    @torch.inference_mode()
    def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
        return torch.tensor([[self._one(own, self.texts[number]) for number in documents] for own in candidates])

    def _one(self, candidate: Factors, text: Document) -> float:
        ids = torch.tensor([text.ids])
        batch = Batch(ids, torch.tensor([len(text.ids)]), Route((None,)))
        logits = self.model.decoder.head(self.model.hidden(batch, rotations=rotations(self.model, [candidate])))[0]
        at = torch.tensor(text.answers)
        losses = functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="none")
        return float(losses[at - 1].mean())


class Counted:
    """Counts what another judge computes: passes, forward operations, CPU seconds of this process."""

    def __init__(self, judge: Judge, model: Multimodal, texts: Sequence[Document], *, logits: bool = False) -> None:
        self.judge, self.model, self.texts, self.logits = judge, model, texts, logits
        self.documents, self.passes, self.flops, self.seconds = judge.documents, 0, 0.0, 0.0
        self.base: Factors | None = None

    def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
        start = time.process_time()
        found = self.judge.losses(candidates, documents)
        self.seconds += time.process_time() - start
        self.passes += len(candidates) * len(documents)
        for number in documents:
            text = self.texts[number]
            scored = len(text.ids) if self.logits else len(text.answers)
            if isinstance(self.judge, Surrogate):
                read = max(1, text.answers[0] - self.judge.lead)
                self.flops += len(candidates) * forward_flops(self.model, read, len(text.ids), scored)
                self.flops += (candidates[0] != self.base) * forward_flops(self.model, 0, read, 0)
            else:
                self.flops += len(candidates) * forward_flops(self.model, 0, len(text.ids), scored)
        self.base = candidates[0]
        return found


def forward_flops(model: Multimodal, start: int, stop: int, scored: int) -> float:
    """Operations of reading the tokens start .. stop behind what was read before, some of them scored.

    Two per number of a matrix and token, four per channel and visible pair in each layer's attention, as in
    training/flops.py.
    """
    size = model.config.decoder
    matrices = sum(linear.weight.numel() for linear in model.decoder.routed().values())
    pairs = (stop**2 - start**2) / 2
    attention = 4 * size.num_hidden_layers * size.hidden_size * pairs
    return 2.0 * matrices * (stop - start) + attention + 2.0 * size.vocab_size * size.hidden_size * scored


@dataclass(frozen=True)
class Line:
    """What differs from the plain search."""

    name: str
    plain: bool = False  # one at a time, whole logits
    rows: int = 1  # of a forward pass
    racing: bool = False
    shared: bool = False  # eight needles in a document
    half_precision: bool = False
    screen: str = ""  # what chooses among four proposals: "rotated" keys, or "half" documents


LINES = (
    Line("plain", plain=True),
    Line("answers alone"),
    Line("... rows together", rows=8),
    Line("... racing", racing=True),
    Line("... shared text", shared=True),
    Line("... surrogate", screen="rotated"),
    Line("... half documents first", screen="half"),
    Line("... bfloat16", half_precision=True),
    Line("all, without surrogate", rows=8, racing=True, shared=True, half_precision=True),
    Line("all", rows=8, racing=True, shared=True, half_precision=True, screen="rotated"),
)


@dataclass(frozen=True)
class Texts:
    """Documents to search with, one needle each or several, of half the length, and those that judge what was found."""

    single: list[Document]
    shared: list[Document]
    half: list[Document]
    held_out: list[Document]


def documents(assistant: modalora.Assistant, given: argparse.Namespace, seed: int) -> Texts:
    tokenizer, data = assistant.processor.tokenizer, Path(given.data)
    ours, others = (part_of_books(data, part) for part in ("search", "evaluation"))
    few = max(2, given.probes // TOGETHER)

    def made(count: int, needles: int, length: int) -> list[Document]:
        return make_documents(
            tokenizer, ours, count, length=length, part="search", style=given.style, needles=needles,
            distractors=given.distractors, seed=seed,
        )  # fmt: skip

    held_out = make_documents(
        tokenizer, others, given.held_out, length=given.target, part="evaluation", style=given.style,
        distractors=given.distractors, seed=seed,
    )  # fmt: skip
    return Texts(
        made(given.probes, 1, given.target), made(few, TOGETHER, given.target), made(2, TOGETHER, given.target // 2),
        held_out,
    )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a search took and found."""

    found: Outcome
    flops: float
    seconds: float  # of CPU, in judges
    wall: float
    held_out: Tensor  # (documents,) nats of the best candidate
    correlation: float | None


def carry_out(
    line: Line, space: Space, model: Multimodal, texts: Texts, given: argparse.Namespace, seed: int
) -> Result:
    guides = texts.shared if line.shared else texts.single
    fields = {"population": given.population, "iterations": given.iterations, "seed": seed, "racing": line.racing}
    fields |= {"race_from": 2 if line.shared else 4, "together": max(1, line.rows // 2)}
    if line.screen:
        fields |= {"proposals": 4, "iterations": max(1, given.iterations // 4)}
    plain = line.plain and not given.sample
    own = copy.deepcopy(model).bfloat16() if line.half_precision else model
    judge = Plain(model, guides) if plain else NeedleJudge(own, guides, rows=line.rows)
    counted = Counted(judge, model, guides, logits=line.plain)
    screen: Counted | None = None
    if line.screen == "rotated":
        screen = Counted(Surrogate(own, guides[: 2 if line.shared else 8]), model, guides)
    elif line.screen == "half":
        screen = Counted(NeedleJudge(own, texts.half, rows=line.rows), model, texts.half)
    start = time.perf_counter()
    found = search(space, counted, SearchConfig.model_validate(fields), surrogate=screen)
    wall, seconds = time.perf_counter() - start, counted.seconds + (screen.seconds if screen else 0.0)
    if line.plain and given.sample:  # the same candidates, read plainly
        sample = Plain(model, guides)
        start, began = time.perf_counter(), time.process_time()
        for number in range(given.sample):
            sample.losses([found.parents[number % len(found.parents)][0]], [number % len(guides)])
        wall = (time.perf_counter() - start) / given.sample * found.passes
        seconds = (time.process_time() - began) / given.sample * found.passes
    held_out = NeedleJudge(model, texts.held_out).losses([found.best], range(len(texts.held_out)))[0]
    agreements = [told["surrogate_correlation"] for told in found.history if "surrogate_correlation" in told]
    return Result(
        found, counted.flops + (screen.flops if screen else 0.0), seconds, wall, held_out,
        fmean(agreements) if agreements else None,
    )  # fmt: skip


def validate_surrogate(space: Space, model: Multimodal, texts: Texts, best: Factors) -> None:
    """Print how well the cheap judges rank candidates, near the best and anywhere in the space."""
    import numpy as np

    rng = np.random.default_rng(1)
    genome = next(one for one in [space.sample(rng) for _ in range(10_000)] if one.anchor == best.anchor)
    genome = type(genome)(best.anchor, tuple(round(100 * value) for value in best.tail))
    sets = {
        "anywhere": [space.factors(space.sample(rng)) for _ in range(40)],
        "children of the best": [space.factors(space.mutate(genome, rng, 0.3)) for _ in range(40)],
    }
    exact = NeedleJudge(model, texts.shared, rows=8)
    judges = {
        "rotated keys": (Surrogate(model, texts.shared[:2]), texts.shared[:2]),
        "half documents": (NeedleJudge(model, texts.half, rows=8), texts.half),
        "two documents of full length": (NeedleJudge(model, texts.shared[:2], rows=8), texts.shared[:2]),
    }
    print("\nrank correlation (Spearman) with the loss on all documents, 40 candidates\n")
    print("| judge | " + " | ".join(sets) + " | forward MFLOP a candidate and document |\n|---|---|---|---|")
    for name, (judge, own) in judges.items():
        cells = []
        for candidates in sets.values():
            told = exact.losses([best, *candidates], range(exact.documents)).mean(1)
            counted = Counted(judge, model, own)
            near = counted.losses([best, *candidates], range(judge.documents)).mean(1)
            cells.append(f"{rank_correlation(told.tolist()[1:], near.tolist()[1:]):.2f}")
        print(f"| {name} | {' | '.join(cells)} | {counted.flops / counted.passes / 1e6:,.1f} |", flush=True)


@wide_products()  # for both sides
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--target", type=int, default=1024, help="tokens")
    parser.add_argument("--data", default=os.environ.get("MODALORA_DATA", "../shared/data"))
    parser.add_argument("--style", default="words", choices=("words", "digits"))
    parser.add_argument("--probes", type=int, default=64, help="needles that guide a search")
    parser.add_argument("--distractors", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=128, help="documents that judge what was found")
    parser.add_argument("--population", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sample", type=int, default=0, help="plain passes to time; 0: make the whole plain search")
    parser.add_argument("--lines", nargs="+", default=[line.name for line in LINES])
    given = parser.parse_args()
    assistant = modalora.load(str(given.model))
    model = assistant.model.eval()
    size = model.config.decoder
    stretch = Stretch.of(size.rope, size.head_dim, given.target)
    space = space_of(stretch, SearchConfig())
    print(
        f"{stretch.window} to {stretch.target} tokens, anchors {space.anchors[0]} to {space.anchors[-1]}, "
        f"{given.probes} needles, {torch.get_num_threads()} threads\n"
    )
    heads = (
        "seed", "search", "evaluations", "passes", "forward TFLOP", "less", "CPU s", "less", "wall s", "guides' loss",
        "held-out PPL", "nats above plain (se)", "anchor, first >= s", "surrogate's correlation",
    )  # fmt: skip
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for seed in range(given.seeds):
        texts = documents(assistant, given, seed)
        first: Result | None = None
        for line in (line for line in LINES if line.name in given.lines):
            told = carry_out(line, space, model, texts, given, seed)
            first = first or told
            gap = told.held_out - first.held_out
            best = told.found.best
            cells = (
                seed,
                line.name,
                told.found.evaluations,
                f"{told.found.passes:,}",
                f"{told.flops / 1e12:.2f}",
                f"{first.flops / told.flops:.1f}x",
                f"{told.seconds:,.0f}",
                f"{first.seconds / told.seconds:.1f}x",
                f"{told.wall:,.0f}",
                f"{told.found.loss:.4f}",
                f"{exp(float(told.held_out.mean())):.3f}",
                f"{float(gap.mean()):+.4f} ({float(gap.std()) / len(gap) ** 0.5:.4f})",
                f"{best.anchor}, {best.first_stretched}",
                "" if told.correlation is None else f"{told.correlation:.2f}",
            )
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        if seed == given.seeds - 1:  # once is enough, and takes as long as a search
            validate_surrogate(space, model, texts, told.found.best)


if __name__ == "__main__":
    main()
