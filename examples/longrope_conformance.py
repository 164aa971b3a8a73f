"""LongRoPE as served: vectors that any engine can check itself against, and a runner for this one.

`python examples/longrope_conformance.py` checks; with --write it makes the vectors anew. The file holds cos and sin at
chosen positions, in float64 from the formulas, and logits of a tiny Phi-3 around the switch of its rotary tables at 64
tokens, by this package in float64 (its tests compare them with transformers'). The tiny model's weights follow from a
formula, so that no file is needed: weight number k, from 0, of the tensor that transformers calls NAME is
scale * (2 u - 1), u = ((k + 1) * 2654435761 + crc32(NAME)) mod 2^32 / 2^32, with scale = columns^-0.5 for matrices and
0.1 for norms, whose weights are one more. Sizes and factors are ROPE and TINY below; a prompt is 0, 7, 14, ... mod 48.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from math import cos, log, sin, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalora.contracts import Batch, Route
from modalora.models.decoder import DecoderConfig
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import phi4_mini
from modalora.nn.rope import LongRope, is_long, rotation

VECTORS = Path(__file__).with_name("longrope_conformance.json")
ROPE = LongRope(
    short_factor=(1.0, 1.0, 1.1, 1.2, 1.3, 1.5), long_factor=(1.0, 1.5, 2.5, 5.0, 9.0, 16.0), rotated=0.75, window=512,
    original_window=64,
)  # fmt: skip
TINY = ModelConfig(
    decoder=DecoderConfig(
        vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope=ROPE,
    )
)  # fmt: skip
POSITIONS = (0, 1, 1000, 4095, 4096, 65_537, 131_071)
LENGTHS = (1, 60, 63, 64, 65, 66, 70, 128)  # around the switch: 64 is short, 65 long


def weights(name: str, shape: torch.Size) -> Tensor:
    """Return the tiny model's tensor of a name, float64."""
    k = torch.arange(1, shape.numel() + 1, dtype=torch.int64)
    u = ((k * 2_654_435_761 + zlib.crc32(name.encode())) % 2**32).double() / 2**32
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
    return (scale * (2 * u - 1) + (len(shape) == 1)).view(shape)


def tiny(dtype: torch.dtype) -> Multimodal:
    """Return the tiny model; names are those of transformers' Phi-3."""
    model = Multimodal(TINY).to(dtype).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(weights(name.replace("decoder.", "model."), tensor.shape))
    return model


def ids(length: int) -> Tensor:
    """Return the prompt of a length."""
    return torch.arange(length)[None] * 7 % 48


def exact_tables(rope: LongRope, head_dim: int, position: int) -> dict[str, list[list[float]]]:
    """Return cos and sin of every pair from the formulas, in float64."""
    pairs = int(head_dim * rope.rotated) // 2
    stretch = rope.window / rope.original_window
    factor = sqrt(1 + log(stretch) / log(rope.original_window))
    found = {}
    for name, divisors in (("short", rope.short_factor), ("long", rope.long_factor)):
        angles = [position / (divisors[i] * rope.theta ** (2 * i / (2 * pairs))) for i in range(pairs)]
        found[name] = [[factor * cos(angle) for angle in angles], [factor * sin(angle) for angle in angles]]
    return found


@torch.no_grad()
def make() -> dict[str, Any]:
    """Return the vectors."""
    rope = phi4_mini().decoder.rope
    assert isinstance(rope, LongRope)
    model = tiny(torch.float64)
    return {
        "what": "LongRoPE as transformers' Phi-3 serves it: long factors for every position of a row longer than the "
        "original window, the attention factor on cos and sin of both tables. See longrope_conformance.py.",
        "phi4_mini_tables": {str(at): exact_tables(rope, 128, at) for at in POSITIONS},
        "tiny_last_logits": {str(length): _last(model, length) for length in LENGTHS},
    }


def _last(model: Multimodal, length: int) -> list[float]:
    logits: Tensor = model(Batch(ids(length), torch.tensor([length]), Route((None,))))[0, -1]
    return logits.tolist()


@torch.no_grad()
def check(vectors: dict[str, Any]) -> list[str]:
    """Return what this package gets wrong, in float32; an empty list is a pass."""
    wrong = []
    rope = phi4_mini().decoder.rope
    for at, tables in vectors["phi4_mini_tables"].items():
        for name, told in tables.items():
            found = rotation(rope, 128, torch.tensor([[int(at)]]), torch.tensor([name == "long"]))
            # an angle of 131,071 radians is known to 0.008 in float32; engines share that, so the bound grows with it
            bound = 1e-6 + int(at) * 1.2e-7
            difference = max(
                float((x[0, 0].double() - torch.tensor(y)).abs().max()) for x, y in zip(found, told, strict=True)
            )
            if difference > bound:
                wrong.append(f"table {name} at position {at}: {difference:.2g} apart, bound {bound:.2g}")
    model = tiny(torch.float32)
    cache, state = model.new_cache(1), 0
    for length, told in vectors["tiny_last_logits"].items():
        fresh = torch.tensor(_last(model, int(length))).double()
        if (difference := float((fresh - torch.tensor(told)).abs().max())) > 1e-5:
            wrong.append(f"logits at length {length}: {difference:.2g} apart")
    for length in range(58, 71):  # decoding through the switch
        if state == 0 or len(set(is_long(ROPE, [length - 1, length]))) == 2:
            cache = model.new_cache(1)
            logits = model.read(Batch(ids(length), torch.tensor([length]), Route((None,))), cache)
        else:
            logits = model.read_next(ids(length)[0, -1:], Route((None,)), cache)
        state = length
        if str(length) in vectors["tiny_last_logits"]:
            told = torch.tensor(vectors["tiny_last_logits"][str(length)])
            if (difference := float((logits[0].double() - told).abs().max())) > 1e-5:
                wrong.append(f"decoded logits at length {length}: {difference:.2g} apart")
    return wrong


def main() -> None:
    """Check this package, or write the vectors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make the vectors anew")
    if parser.parse_args().write:
        VECTORS.write_text(json.dumps(make(), indent=1) + "\n")
        return
    wrong = check(json.loads(VECTORS.read_text()))
    sys.stdout.write("\n".join(wrong) + "\n" if wrong else "every vector agrees\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
