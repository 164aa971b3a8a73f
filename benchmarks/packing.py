"""How full packed micro-batches are on a mixed real set: books, NLVR's pictures and spoken digits, at nano's size.

Run: python benchmarks/packing.py [FOLDER] [--steps N]. FOLDER is the data of docs/nano.md. Prints real tokens as a
share of the budget, beside right-padded batches of the same mixture, with rows as drawn and sorted by length.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from modalora.assistant import make_processor
from modalora.checkpoint.card import read_texts
from modalora.checkpoint.find import find_model
from modalora.config import SourceConfig
from modalora.data.mixture import Mixture
from modalora.data.sources import Context

SOURCES = [
    SourceConfig(source="books", weight=1),
    SourceConfig(source="nlvr", weight=2, options={"turns": 6}),
    SourceConfig(source="nlvr", name="nlvr-short", weight=2, options={"turns": 1}),
    SourceConfig(source="digits", weight=3),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    card, tokenizer, chat = read_texts(find_model("nano"))
    with tempfile.TemporaryDirectory() as cache:
        context = Context(asked.folder, Path(cache), make_processor(card.config, tokenizer, chat), window=768)
        print("| micro-batches | rows | real tokens | share of the budget or padded size | planning, ms a step |")
        print("|---|---|---|---|---|")
        for tokens in (2048, 4096, 8192):
            report(f"packed to {tokens:,}", context, asked.steps, tokens=tokens)
        report("8 rows, padded", context, asked.steps, rows=8)
        report("8 rows of like length, padded", context, asked.steps, rows=8, accumulate=8)


def report(title: str, context: Context, steps: int, rows: int = 16, tokens: int = 0, accumulate: int = 1) -> None:
    mixture = Mixture(context, SOURCES, rows=rows, tokens=tokens, accumulate=accumulate, seed=0)
    made = real = size = 0
    look, looking = mixture.reader.look, 0.0

    def timed(name: tuple[int, int]) -> object:
        nonlocal looking
        start = time.process_time()
        try:
            return look(name)
        finally:
            looking += time.process_time() - start

    mixture.reader.look = timed  # type: ignore[assignment, method-assign]
    planning = 0.0
    for _ in range(steps):
        start = time.process_time()
        planned = mixture._plan()
        planning += time.process_time() - start
        for micro in planned.micro:
            lengths = [length for length, _ in micro]
            made += len(lengths)
            real += sum(lengths)
            size += tokens or max(lengths) * len(lengths)
    milliseconds = 1000 * (planning - looking) / steps
    print(f"| {title} | {made:,} | {real:,} | {real / size:.2%} | {milliseconds:.2f} |")


if __name__ == "__main__":
    main()
