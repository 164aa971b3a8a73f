"""How much faster are float32 products, and what stands on them, through oneDNN than through torch's default, MKL?

    python benchmarks/products.py        # a minute

One thread, CPU seconds, the quickest of several, by turns. First the products alone, with their distance from float64;
then a pass and a training step of the decoder of the study of longer windows (5.4 million numbers), float32. The limit
is half of the bf16 rate: AVX-512 multiplies twice as many bf16 numbers in an instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from modalora.contracts import Batch, Route
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import SIZES
from modalora.nn.products import gains, wide_products
from timing import best, where


def by_turns(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds with torch's default and with ours."""
    found = {True: [], False: []}
    for _ in range(4):
        for wide in (False, True):
            with wide_products() if wide else nullcontext():
                found[wide].append(best(work, 2))
    return min(found[False]), min(found[True])


def products() -> None:
    print("| product | default, GFLOP/s | oneDNN | ratio | bf16 | distance from float64: default | oneDNN |")
    print("|---|---|---|---|---|---|---|")
    for rows, inner, columns in ((8192, 256, 768), (8192, 768, 256), (2048, 3072, 3072), (16, 3072, 8192)):
        x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
        low, low_weight = x.bfloat16(), weight.bfloat16()
        told(f"{rows} x {inner} x {columns}", lambda x=x, w=weight: x @ w.T, 2 * rows * inner * columns,
             best(lambda x=low, w=low_weight: x @ w.T), x.double() @ weight.double().T)  # fmt: skip
    q, k = torch.randn(8, 576, 64), torch.randn(8, 1024, 64)
    low_q, low_k = q.bfloat16(), k.bfloat16()
    told("8 heads of 576 x 64 x 1024", lambda: torch.bmm(q, k.mT), 2 * 8 * 576 * 64 * 1024,
         best(lambda: torch.bmm(low_q, low_k.mT)), torch.bmm(q.double(), k.double().mT))  # fmt: skip


def told(name: str, work: Callable[[], Tensor], flops: int, low: float, exact: Tensor) -> None:
    default, ours = by_turns(work)
    far = float((work() - exact).norm() / exact.norm())
    with wide_products():
        near = float((work() - exact).norm() / exact.norm())
    rates = (flops / one / 1e9 for one in (default, ours, low))
    first, second, third = (f"{rate:.0f}" for rate in rates)
    print(f"| {name} | {first} | {second} | {ours / default:.2f} | {third} | {far:.1e} | {near:.1e} |")


def models() -> None:
    torch.manual_seed(0)
    model = Multimodal(SIZES["window-study"]())
    ids = torch.randint(0, 1024, (8, 1024))
    batch = Batch(ids, torch.full((8,), 1024), Route((None,) * 8))

    def read() -> None:
        with torch.no_grad():
            model.hidden(batch)

    def step() -> None:
        model.zero_grad()
        states = model.hidden(batch)
        model.decoder.losses(states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).mean().backward()

    print("\n| 8 x 1,024 tokens, float32 | default, s | oneDNN, s | ratio |\n|---|---|---|---|")
    for name, work in (("a pass", read), ("a training step", step)):
        default, ours = by_turns(work)
        print(f"| {name} | {default:.2f} | {ours:.2f} | {ours / default:.2f} |")


def main() -> None:
    torch.set_num_threads(1)
    print(f"{where()}, {'oneDNN is used' if gains() else 'the default stands here'}\n")
    products()
    models()


if __name__ == "__main__":
    main()
