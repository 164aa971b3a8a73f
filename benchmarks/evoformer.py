"""What do exact Evoformer attention and all its gradients cost, beside plain PyTorch?

`memory`: the most that lives in a forward and backward pass, as an allocator counts it (every storage from its birth to
its end) and as the system does (resident). The ideal keeps q, k, v, the output and their gradients, eight tensors, and
the pair bias and its gradient; plain PyTorch ten and three of the size of the scores. `time`: CPU seconds of one
thread, the best of several. `growth`: what lives beyond inputs, outputs and their gradients when the length doubles.
`gpu`: milliseconds, peak memory, and the share of the computed floor of an H100, beside eager and compiled PyTorch and
flex_attention. Before anything is measured, outputs and gradients must agree.

    python benchmarks/evoformer.py memory | time | growth | gpu
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from modalora.nn.attend import attend
from modalora.nn.mask import Mask
from modalora.training.meter import Meter
from timing import best, peak, where

LAUNCH = {  # what is freed goes back at once, so that the system counts what is in use
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
# distances of outputs and gradients, |ours - theirs| / |theirs|: other orders of sums; bf16 rounds at other places
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Shape:
    """Rows that share a pair bias, their length, heads and head_dim."""

    rows: int
    length: int
    heads: int
    head_dim: int

    @property
    def scores(self) -> int:
        return self.rows * self.heads * self.length**2

    @property
    def numbers(self) -> int:
        return self.rows * self.heads * self.length * self.head_dim

    @property
    def bias(self) -> int:
        return self.heads * self.length**2

    @property
    def ideal_ratio(self) -> float:
        """Peak memory of plain PyTorch over that of an exact method which keeps no scores."""
        return (10 * self.numbers + 3 * self.scores) / (8 * self.numbers)

    @property
    def ideal_ratio_with_bias(self) -> float:
        """The same with what the pair bias and its gradient take on both sides: few rows make them count."""
        return (10 * self.numbers + 3 * self.scores + 2 * self.bias) / (8 * self.numbers + 2 * self.bias)

    def floor(self) -> tuple[float, float]:
        """Return the milliseconds that an H100 SXM needs at least, forward and backward, in bf16.

        The slowest of tensor cores (989.4 TFLOP/s), memory (3.35 TB/s) and exponentials (3.86e12 a second).
        """
        lse, size = 4 * self.numbers / self.head_dim, 2 * self.numbers
        forward = (4 * self.scores * self.head_dim, 4 * size + 2 * self.bias + lse)
        backward = (10 * self.scores * self.head_dim, 8 * size + 6 * self.bias + 2 * lse)
        return tuple(
            1e3 * max(work / 989.4e12, bytes_ / 3.35e12, self.scores / 3.86e12) for work, bytes_ in (forward, backward)
        )

    def __str__(self) -> str:
        return f"N={self.rows} L={self.length} H={self.heads} D={self.head_dim}"


CPU = (Shape(128, 256, 8, 32), Shape(64, 384, 8, 8))
GPU = (
    Shape(128, 256, 8, 32),
    Shape(512, 384, 8, 32),
    Shape(256, 256, 4, 32),
    Shape(384, 384, 4, 32),
    Shape(1024, 1024, 4, 32),
    Shape(1024, 256, 8, 8),
    Shape(5120, 384, 8, 8),
)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, pair_bias: Tensor) -> Tensor:
    """OpenFold's attention without a kernel: two products, a softmax, and the biases added in place."""
    q, k, v = (x.transpose(-2, -3) for x in (q * q.shape[-1] ** -0.5, k, v))
    logits = q @ k.transpose(-1, -2)
    logits += key_bias[:, :, None, None]
    logits += pair_bias[:, None]
    return (torch.softmax(logits, dim=-1) @ v).transpose(-2, -3)


def ours(backend: str) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, pair_bias: Tensor) -> Tensor:
        return attend(q, k, v, mask=Mask(), key_bias=key_bias, pair_bias=pair_bias, backend=backend)

    return attention


def flex(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, pair_bias: Tensor) -> Tensor:
    def add(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + key_bias[0, row, key] + pair_bias[0, head, query, key]

    q, k, v = (x[0].transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, score_mod=add).transpose(1, 2)[None]


@dataclass(frozen=True)
class Case:
    """Inputs of a shape, and the gradient of the output."""

    inputs: tuple[Tensor, ...]  # q, k, v, pair_bias
    key_bias: Tensor
    upstream: Tensor

    def forward(self, attention: Attention) -> Tensor:
        q, k, v, pair_bias = self.inputs
        return attention(q, k, v, self.key_bias, pair_bias)

    def step(self, attention: Attention) -> tuple[Tensor, ...]:
        """Return the output and the gradients of q, k, v and the pair bias."""
        out = self.forward(attention)
        return out.detach(), *torch.autograd.grad(out, self.inputs, self.upstream)


def make(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Case:
    torch.manual_seed(0)
    size = (1, shape.rows, shape.length, shape.heads, shape.head_dim)
    q, k, v, upstream = (torch.randn(size, dtype=dtype, device=device) for _ in range(4))
    pair_bias = torch.randn(1, shape.heads, shape.length, shape.length, dtype=dtype, device=device)
    key_bias = torch.zeros(1, shape.rows, shape.length, dtype=dtype, device=device)
    key_bias[:, :, -shape.length // 8 :] = -1e4
    return Case(tuple(x.requires_grad_() for x in (q, k, v, pair_bias)), key_bias, upstream)


def agree(case: Case, one: Attention, other: Attention) -> None:
    """Stop when an output or a gradient differs by more than rounding."""
    for found, told in zip(case.step(one), case.step(other), strict=True):
        distance = float((found - told).double().norm() / told.double().norm())
        if not distance <= CLOSE[told.dtype]:
            raise SystemExit(f"results differ by {distance:.2g}: nothing measured")


def measured(shape: Shape, attention: Attention) -> dict[str, int]:
    """Return the most bytes that lived in a forward and backward pass: counted, beyond start, and resident."""
    case = make(shape)
    Case(
        tuple(x[:, :1].detach().requires_grad_() for x in case.inputs[:3]) + case.inputs[3:],
        case.key_bias[:, :1],
        case.upstream[:, :1],
    ).step(attention)  # what a first call loads is no tensor
    gc.collect()
    meter = Meter(FakeTensorMode())
    for tensor in (*case.inputs, case.key_bias, case.upstream):
        meter.hold(tensor)
    held = meter.now
    with peak() as found, meter:
        case.step(attention)
    return {"counted": meter.peak, "held": held, "resident": found.bytes + held}


def alone(shape: Shape, name: str) -> dict[str, int]:
    """Measure in a process of its own."""
    sizes = [str(x) for x in (shape.rows, shape.length, shape.heads, shape.head_dim)]
    told = subprocess.run(
        [sys.executable, __file__, "one", name, *sizes],
        env=os.environ | LAUNCH,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(told.stdout)


def memory() -> None:
    names = "plain MB | blockwise MB | ratio | resident | ideal | without biases | ideal | ideal / ratio | without"
    print(f"| shape, float32 | {names} |")
    print("|---" * 10 + "|")
    for shape in CPU:
        agree(make(shape), ours("blockwise"), plain)
        theirs, own = alone(shape, "plain"), alone(shape, "blockwise")
        ratio, resident = (theirs[key] / own[key] for key in ("counted", "resident"))
        biases = 2 * 4 * shape.bias  # the pair bias and its gradient, on both sides
        bare = (theirs["counted"] - biases) / (own["counted"] - biases)
        print(
            f"| {shape} | {theirs['counted'] / 1e6:.1f} | {own['counted'] / 1e6:.1f} | {ratio:.2f} | {resident:.2f} | "
            f"{shape.ideal_ratio_with_bias:.2f} | {bare:.2f} | {shape.ideal_ratio:.2f} | "
            f"{shape.ideal_ratio_with_bias / ratio:.2f} | {shape.ideal_ratio / bare:.2f} |"
        )


def growth() -> None:
    """Print what lives beyond q, k, v, the biases and their gradients: in all, and what is no output or gradient."""
    print("| N, H, D | length | beyond inputs and biases, MB | growth | beyond outputs too, MB |")
    print("|---|---|---|---|---|")
    last = 0.0
    for length in (256, 512, 1024, 2048, 4096):
        shape = Shape(4, length, 2, 32)
        found = alone(shape, "blockwise")["counted"] - 4 * (3 * shape.numbers + 2 * shape.bias)
        rest = found - 4 * 5 * shape.numbers
        print(
            f"| 4, 2, 32 | {length} | {found / 1e6:.2f} | {f'{found / last:.2f}' if last else ''} | {rest / 1e6:.2f} |"
        )
        last = found


def cpu_time() -> None:
    torch.set_num_threads(1)
    print("| shape | dtype | plain s | blockwise s | ratio | products alone s |")
    print("|---|---|---|---|---|---|")
    for shape in CPU:
        for dtype in (torch.float32, torch.bfloat16):
            case = make(shape, dtype)
            agree(case, ours("blockwise"), plain)
            theirs, own = (best(partial(case.step, f), 5) for f in (plain, ours("blockwise")))
            print(
                f"| {shape} | {dtype} | {theirs:.3f} | {own:.3f} | {own / theirs:.2f} | {products(shape, dtype):.3f} |"
            )


def products(shape: Shape, dtype: torch.dtype) -> float:
    """Return the CPU seconds of the five kinds of matrix products of a step, in tiles: what no exact method avoids."""
    heads, length, head_dim = shape.heads, shape.length, shape.head_dim
    x, square = torch.randn(heads, length, head_dim, dtype=dtype), torch.randn(heads, length, length, dtype=dtype)
    wide = best(lambda: [torch.bmm(x, x.transpose(1, 2)) for _ in range(shape.rows)])
    narrow = best(lambda: [torch.bmm(square, x) for _ in range(shape.rows)])
    return 2 * wide + 2 * narrow + narrow + wide + narrow  # forward one of each; backward two and three


def gpu() -> None:
    """Print times, peaks and shares of the floor on a GPU, bf16, forward + backward."""
    rivals = {
        "eager": plain,
        "compiled": torch.compile(plain),
        "flex": torch.compile(flex),
        "blockwise": ours("blockwise"),
        "fused": ours("fused"),
    }
    print(torch.cuda.get_device_name())
    print("| shape, bf16 | attention | forward ms | both ms | peak MB | floor ms | share |")
    print("|---|---|---|---|---|---|---|")
    for shape in GPU:
        case, floors = make(shape, torch.bfloat16, "cuda"), shape.floor()
        for name, attention in rivals.items():
            try:
                if name != "eager" and 3 * 2 * shape.scores < 16e9:
                    agree(case, attention, plain)
                forward, both = (_milliseconds(partial(f, attention)) for f in (case.forward, case.step))
            except torch.OutOfMemoryError:
                print(f"| {shape} | {name} | out of memory |")
                continue
            torch.cuda.reset_peak_memory_stats()
            case.step(attention)
            peak = torch.cuda.max_memory_allocated() / 1e6
            print(
                f"| {shape} | {name} | {forward:.3f} | {both:.3f} | {peak:.0f} | {sum(floors):.3f} | "
                f"{sum(floors) / both:.0%} |",
                flush=True,
            )


def _milliseconds(work: Callable[[], object], times: int = 20) -> float:
    for _ in range(3):
        work()
    found = []
    for _ in range(times):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop))
    return statistics.median(found)


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "one":
        shape = Shape(*(int(x) for x in sys.argv[3:]))
        print(json.dumps(measured(shape, plain if sys.argv[2] == "plain" else ours(sys.argv[2]))))
        return
    commands = {"memory": memory, "time": cpu_time, "growth": growth, "gpu": gpu}
    if what not in commands:
        raise SystemExit(__doc__)
    print(where(torch.get_num_threads()))
    commands[what]()


if __name__ == "__main__":
    main()
