"""How much memory does one Evoformer block take in training, with exact attention and without?

    python benchmarks/evoformer_memory.py                   # every storage counted from its birth to its end; 5 GB
    python benchmarks/evoformer_memory.py --device cuda --dtype bfloat16 --shapes 128x256 512x384 252x640

What lives at most while one block of AlphaFold 2's main stack runs forward and backward, with inputs, weights and all
gradients; and what it keeps for the backward pass.

naive: softmax of whole logits, the outer product in one piece. exact: attention and outer product in tiles. updates:
besides, each of the nine updates runs again in the backward pass (nn/recompute.py). A deep stack whose blocks are
recomputed holds one block's peak, and both representations of every other block.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modalora.nn.recompute import recompute
from modalora.science import evoformer
from modalora.science.evoformer import UPDATES, EvoformerBlock, EvoformerConfig
from modalora.training.meter import Meter

OUTER = evoformer.OUTER
KINDS = ("naive", "exact", "updates")


def build(kind: str, backend: str) -> EvoformerBlock:
    evoformer.OUTER = 2**62 if kind == "naive" else OUTER
    config = EvoformerConfig(blocks=1, msa_dropout=0.0, pair_dropout=0.0)
    block = EvoformerBlock(replace(config, backend="eager" if kind == "naive" else backend))
    if kind == "updates":
        recompute(block, UPDATES)
    return block


def inputs(sequences: int, residues: int) -> list[Tensor]:
    config = EvoformerConfig()
    return [
        torch.randn(1, sequences, residues, config.msa_width, requires_grad=True),
        torch.randn(1, residues, residues, config.pair_width, requires_grad=True),
    ]


def step(block: EvoformerBlock, msa: Tensor, pair: Tensor) -> None:
    out = block(msa, pair, None, None)
    torch.autograd.backward(out, [torch.ones_like(one) for one in out])


def counted(kind: str, sequences: int, residues: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the most bytes that live in a step, and those kept between its passes beside inputs and weights."""
    torch.set_default_dtype(dtype)
    block, given, meter = build(kind, "blockwise"), inputs(sequences, residues), Meter(FakeTensorMode())
    for tensor in (*block.parameters(), *given):
        meter.hold(tensor)
    held = meter.now
    with meter:
        out = block(*given, None, None)
        gc.collect()
        kept = meter.now - held
        torch.autograd.backward(out, [torch.ones_like(one) for one in out])
    torch.set_default_dtype(torch.float32)
    return meter.peak, kept


def on_gpu(kind: str, sequences: int, residues: int, dtype: torch.dtype, backend: str) -> tuple[int, float]:
    """Return the same peak as the GPU's allocator has it, and milliseconds."""
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        block, given = build(kind, backend), inputs(sequences, residues)
        for _ in range(2):
            step(block, *given)
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(block, *given)
        end.record()
    torch.cuda.synchronize()
    torch.set_default_dtype(torch.float32)
    return torch.cuda.max_memory_allocated(), start.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", nargs="+", default=["128x256"], help="sequences x residues")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", help="of exact and updates on a GPU; default: the fastest that can")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    dtype = getattr(torch, asked.dtype)
    last = "ms" if asked.device == "cuda" else "kept, GB"
    print(f"| N, L, {asked.dtype} | logits of a row attention, GB | | peak, GB | naive / this | {last} |")
    print("|---|---|---|---|---|---|")
    for shape in asked.shapes:
        sequences, residues = map(int, shape.split("x"))
        logits = sequences * EvoformerConfig().msa_heads * residues**2 * dtype.itemsize
        first = 0
        for kind in KINDS:
            if asked.device == "cuda":
                try:
                    peak, told = on_gpu(kind, sequences, residues, dtype, asked.backend)
                except torch.cuda.OutOfMemoryError:
                    print(f"| {sequences}, {residues} | {logits / 1e9:.2f} | {kind} | out of memory | | |")
                    continue
                more = f"{told:.1f}"
            else:
                peak, kept = counted(kind, sequences, residues, dtype)
                more = f"{kept / 1e9:.2f}"
            first = first or peak
            print(
                f"| {sequences}, {residues} | {logits / 1e9:.2f} | {kind} | {peak / 1e9:.2f} | {first / peak:.2f} | "
                f"{more} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
