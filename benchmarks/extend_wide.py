"""Does the search run at Phi-4-Mini's width, and what does a candidate cost beside the plan's count?

Run: python benchmarks/extend_wide.py [--data ../shared/data] [--window 256] [--target 512] [--documents 2]. Two layers
of its full width (3,072, 24 heads over 8, 3/4 rotated) with random weights and a small vocabulary go through
`extend`: search, factors file, scores, report. Prints CPU seconds of a document against its counted FLOP, and against
the matrix products of this machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from modalora.assistant import Assistant, make_processor
from modalora.checkpoint.card import read_texts
from modalora.checkpoint.find import find_model
from modalora.config import ExtendConfig
from modalora.longrope2.extend import extend
from modalora.longrope2.plan import plan_extension
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import phi4_mini
from modalora.nn.rope import Plain


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--target", type=int, default=512)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--anchor", type=int, help="search behind this pair alone: a population of 4 is then enough")
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, tokenizer, chat = read_texts(find_model("nano"))
        rope = Plain(rotated=0.75, window=asked.window)
        size = replace(phi4_mini().decoder, num_hidden_layers=2, vocab_size=tokenizer.vocab_size, rope=rope)
        config = ModelConfig(decoder=size)
        Assistant(Multimodal(config).eval(), make_processor(config, tokenizer, chat)).save(folder / "base")
        recipe = ExtendConfig.model_validate(
            {
                "kind": "extend", "init": str(folder / "base"), "output": str(folder / "out"), "target": asked.target,
                "guide": {"documents": asked.documents}, "dtype": asked.dtype, "rows": 2,
                "search": {"population": asked.population, "iterations": asked.iterations, "anchor": asked.anchor},
                "scores": {"documents": 1, "depths": [0.5], "lengths": [asked.target], "methods": ["longrope2"]},
                "data": str(asked.data), "cache": str(folder / "cache"), "threads": 1,
            }
        )  # fmt: skip
        plan = plan_extension(recipe, [("this", 1)], 1.0)
        started = time.process_time()
        found = extend(recipe, print)
        seconds = time.process_time() - started
    passes = found["search"]["passes"] + asked.documents * len(found["search"]["others"]) + 1
    rate = cpu_rate({"float32": torch.float32, "bfloat16": torch.bfloat16}[asked.dtype])
    print(json.dumps({key: found[key] for key in ("anchor", "first_stretched_pair", "theoretical_critical_pair")}))
    print("| parameters | documents read | CPU s | GFLOP a document | GFLOP/s | products here, GFLOP/s | share |")
    print("|---|---|---|---|---|---|---|")
    reached = passes * plan.document_flops / seconds
    print(
        f"| {plan.parameters:,} | {passes} x {asked.target} tokens | {seconds:.1f} | {plan.document_flops / 1e9:.0f} "
        f"| {reached / 1e9:.1f} | {rate / 1e9:.1f} | {reached / rate:.0%} |"
    )


def cpu_rate(dtype: torch.dtype, size: int = 1536) -> float:
    """FLOP per CPU second of matrix products, the best of four: other processes do not count."""
    x, best = torch.ones(size, size, dtype=dtype), float("inf")
    for _ in range(4):
        started = time.process_time()
        x @ x
        best = min(best, time.process_time() - started)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
