"""Do the fused attention kernels build for Hopper (sm_90) and fit, told without a GPU?

Every kernel of nn/fused.py, at each padded head size and dtype, with both biases: shared memory of a program, and
registers and spilled bytes of a thread as ptxas counts them. A multiprocessor has 228 KiB and 65,536 registers.

    python benchmarks/fused_ahead.py            # needs triton; stops with an error if a kernel does not build
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modalora.nn import fused

TARGET = GPUTarget("cuda", 90, 32)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FLOATS = ("lse", "delta", "to_lse", "to_pair", "to_key")  # float32 whatever the inputs are
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def compiled(kernel: triton.JITFunction, head_dim: int, dtype: torch.dtype, causal: bool) -> triton.CompiledKernel:
    """Build a kernel for contiguous inputs whose sizes are multiples of 16."""
    options = fused.blocks(head_dim, dtype)
    constants = {
        "HAS_KEY": not causal,
        "HAS_PAIR": not causal,
        "HAS_OFFSETS": causal,
        "HAS_LENGTHS": causal,
        "HAS_LSE": True,
        "TO_KEY": not causal,
        "causal": causal,
        "window": 0,
        "PRECISION": "ieee",
        "stride_bk": 1,
        "stride_pk": 1,
        **{name: options[name] for name in ("D", "BLOCK_D", "BLOCK_Q", "BLOCK_K")},
    }
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("scale", "natural"):
            signature[name] = "fp32"
        elif name in ("offsets", "lengths"):
            signature[name] = "*i64"
        elif name.startswith("stride_") or name in (
            "rows",
            "pairs",
            "share",
            "splits",
            "time",
            "keys",
            "heads",
            "group",
        ):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name in FLOATS else f"*{NAMES[dtype]}"
        if signature[name].startswith("*") or name.startswith("stride_") and name not in constants:
            attributes[(place,)] = [["tt.divisibility", 16]]
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, used, attributes)
    return triton.compile(source, TARGET, {name: options[name] for name in ("num_warps", "num_stages")})


def counted(ptx: str) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that it spills."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [PTXAS, "-v", "--gpu-name", "sm_90a", file, "-o", Path(folder) / "out"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.findall(r"Used (\d+) registers", told)[0]), int(re.findall(r"(\d+) bytes spill stores", told)[0])


def main() -> None:
    print(f"triton {triton.__version__}, sm_90")
    print("| kernel | mask | dtype | head_dim | shared KiB | registers | spilled bytes |")
    print("|---|---|---|---|---|---|---|")
    for dtype in NAMES:
        for kernel in (fused.forward_kernel, fused.queries_kernel, fused.keys_kernel, fused.pair_kernel):
            for head_dim in (8, 32, 64, 128):
                for causal in (False, True):
                    built = compiled(kernel, head_dim, dtype, causal)
                    registers, spilled = counted(built.asm["ptx"])
                    print(
                        f"| {kernel.__name__} | {'causal' if causal else 'biases'} | {NAMES[dtype]} | {head_dim} | "
                        f"{built.metadata.shared / 1024:.1f} | {registers} | {spilled} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
