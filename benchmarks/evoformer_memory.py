"""How much memory does one Evoformer block take in training, with exact attention and without?

    python benchmarks/evoformer_memory.py                       # N = 128 sequences, L = 256 residues, one core
    python benchmarks/evoformer_memory.py --device cuda --dtype bfloat16 --residues 384 --sequences 512

Counted by the allocator (every allocation and release that the profiler sees; on a GPU max_memory_allocated): the most
that is held beyond inputs and weights while one block runs forward and backward, and what it keeps for the backward
pass. "naive": softmax of whole logits, the outer product in one piece. "exact": attention and outer product in tiles.
"updates": besides, each of the nine updates runs again in the backward pass, as in a stack whose block is the most that
is held at a time. The logits of one row attention are sequences x heads x residues^2 numbers, and are printed as a unit.
Sizes are AlphaFold 2's main stack. Time is CPU time of one run, the last column.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from modalora.nn.recompute import recompute
from modalora.science import evoformer
from modalora.science.evoformer import UPDATES, EvoformerBlock, EvoformerConfig

MIB = 2**20


def peak_of_cpu(work: Callable[[], None]) -> int:
    """Return the most bytes that are held at a time beyond what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    held = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def peak_of_gpu(work: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(kind: str, config: EvoformerConfig, asked: argparse.Namespace, outer: int) -> tuple[int, int, float]:
    """Return the peak, what is kept after the forward pass, both bytes, and seconds."""
    device, dtype = torch.device(asked.device), getattr(torch, asked.dtype)
    evoformer.OUTER = 2**62 if kind == "naive" else outer
    torch.manual_seed(0)
    own = replace(config, backend={"naive": "eager"}.get(kind, asked.backend))
    block = EvoformerBlock(own).to(device, dtype).train()
    if kind == "updates":
        recompute(block, UPDATES)
    sequences, residues = asked.sequences, asked.residues
    msa = torch.randn(1, sequences, residues, config.msa_width, device=device, dtype=dtype).requires_grad_()
    pair = torch.randn(1, residues, residues, config.pair_width, device=device, dtype=dtype).requires_grad_()
    kept: dict[int, int] = {}
    given = {tensor.data_ptr() for tensor in (msa, pair, *block.parameters())}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step() -> None:
        out = block(msa, pair, None, None)
        torch.autograd.backward(out, [torch.ones_like(one) for one in out])

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(msa, pair, None, None)
    del out
    start = time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = time.process_time() - start
    for tensor in (msa, pair, *block.parameters()):
        tensor.grad = None
    return (peak_of_gpu if device.type == "cuda" else peak_of_cpu)(step), sum(kept.values()), spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--residues", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="blockwise", help="of exact and updates")
    parser.add_argument("--kinds", nargs="+", default=["naive", "exact", "updates"])
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    config, outer = EvoformerConfig(blocks=1), evoformer.OUTER
    size = getattr(torch, asked.dtype).itemsize
    m = asked.sequences * asked.residues * config.msa_width * size
    z = asked.residues**2 * config.pair_width * size
    logits = asked.sequences * config.msa_heads * asked.residues**2 * size
    print(f"N = {asked.sequences}, L = {asked.residues}, {asked.dtype}, {asked.device}")
    print(f"msa {m / MIB:.0f} MiB, pair {z / MIB:.0f} MiB, logits of a row attention {logits / MIB:.0f} MiB")
    print("\n| | peak, MiB | kept for backward, MiB | naive / this, peak | CPU s |\n|---|---|---|---|---|")
    first = 0
    for kind in asked.kinds:
        peak, kept, spent = measure(kind, config, asked, outer)
        first = first or peak
        print(f"| {kind} | {peak / MIB:.0f} | {kept / MIB:.0f} | {first / peak:.2f} | {spent:.1f} |", flush=True)


if __name__ == "__main__":
    main()
