"""What a change of rotary table costs in generation: rows read again at the crossing, against a planned table.

Run: python benchmarks/rotary_switch.py [--tokens N]. The study model (window 128) answers one prompt greedily. Beside
the CPU seconds stand the tokens that went through the decoder: no engine that is exact reads fewer at a crossing.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from modalora.contracts import Batch, Route
from modalora.generation.engine import generate
from modalora.generation.sampling import Sampling
from modalora.generation.windows import Switch
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import window_study
from modalora.nn.rope import DynamicNtk, LongRope, Rope, table_number
from timing import best

WINDOWS = {"theta": 1000.0, "window": 1024, "original_window": 128}
ROPES: list[Rope] = [
    LongRope(short_factor=(1.0,) * 32, long_factor=tuple(8 ** (pair / 31) for pair in range(32)), **WINDOWS),
    DynamicNtk(factor=8.0, **WINDOWS),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| rope | prompt | tokens read, crossing | planned | CPU s, crossing | planned | ratio |")
    print("|---|---|---|---|---|---|---|")
    for rope in ROPES:
        for prompt in (100, 500):
            crossing, planned = (seconds(rope, prompt, asked.tokens, switch) for switch in ("crossing", "planned"))
            read = [prompt + asked.tokens - 1] * 2
            for length in range(prompt + 1, prompt + asked.tokens):
                if table_number(rope, length) != table_number(rope, length - 1):
                    read[0] += length - 1  # the row was held up to here
            print(
                f"| {rope.kind} | {prompt} | {read[0]:,} | {read[1]:,} | {crossing:.2f} | {planned:.2f} | "
                f"{crossing / planned:.2f} |",
                flush=True,
            )


def seconds(rope: Rope, prompt: int, tokens: int, switch: Switch) -> float:
    torch.manual_seed(0)
    base = window_study()
    model = Multimodal(replace(base, decoder=replace(base.decoder, rope=rope))).eval()
    batch = Batch(torch.randint(base.decoder.vocab_size, (1, prompt)), torch.tensor([prompt]), Route((None,)))

    def answer() -> None:
        list(generate(model, batch, sampling=Sampling(), max_tokens=tokens, stop_ids=(), switch=switch))

    return best(answer)


if __name__ == "__main__":
    main()
