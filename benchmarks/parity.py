"""How far apart are our logits and transformers', over many random models? Writes the tables of docs/parity.md.

python benchmarks/parity.py > docs/parity.md
python benchmarks/parity.py --dtype bfloat16 >> docs/parity.md
python benchmarks/parity.py --dtype bfloat16 --device cuda
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))

import numpy as np  # noqa: E402
import oracle  # noqa: E402
import test_multimodal  # noqa: E402
import test_text  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from modalora.checkpoint.store import load_model  # noqa: E402
from timing import CPU, where  # noqa: E402

TEXT, MULTIMODAL = 40, 24
HEAD = """# Parity

Largest absolute difference between our logits and those of transformers 5.23 with PEFT 0.21, over random models in
the published layouts: sizes, heads, rotary kinds, windows, ranks and media drawn anew for each, weights at unit scale,
logits near 1, float32. `tests/parity/` holds all of them to 1e-4 and compares hidden states layer by layer; what is
around the reference's listed defects is told in `tests/parity/oracle.py`. Phi-3-small, which transformers does not
have, is compared with a float64 model written loop by loop (`tests/models/test_phi3_small.py`).
"""


@dataclass
class Found:
    """What was seen of one kind of comparison: the largest and the mean distance of each side, and the mean value."""

    worst: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    mean: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    scale: list[float] = field(default_factory=list)

    def add(self, exact: Tensor, **sides: Tensor) -> None:
        for side, tensor in sides.items():
            apart = (tensor.float() - exact).abs()
            self.worst[side] = max(self.worst[side], float(apart.max()))
            self.mean[side].append(float(apart.mean()))
        self.scale.append(float(exact.abs().mean()))


@torch.no_grad()
def compare(dtype: torch.dtype, device: torch.device) -> dict[str, Found]:
    """Return the distances to transformers in float32: ours, and in another dtype transformers' own in it as well."""
    found: dict[str, Found] = defaultdict(Found)
    rounds = dtype != torch.float32
    for case in range(TEXT):
        rng = np.random.default_rng(case)
        config = oracle.text_config(rng)
        exact = oracle.text_model(config, case)
        with tempfile.TemporaryDirectory() as folder:
            saved = oracle.save(exact, Path(folder) / "m", oracle.tokenizer())
            ours = load_model(saved, dtype=dtype, device=str(device)).model
            rounded = deepcopy(exact).to(dtype).to(device) if rounds else None
            exact.to(device)
            window = config.original_max_position_embeddings
            for name, length in {"up to the original window": window, "beyond it": 3 * window}.items():
                ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (1, length))).to(device)
                batch = test_text.text(ids).to(device)
                told = exact.model(input_ids=ids, output_hidden_states=True, use_cache=False)
                theirs = {"transformers": rounded(input_ids=ids).logits} if rounded else {}
                found[f"text, {name}: logits"].add(exact(input_ids=ids).logits, ours=ours(batch), **theirs)
                if rounds:
                    continue
                for mine, state in zip(test_text.states(ours, batch), told.hidden_states, strict=True):
                    found["text: hidden states, any layer"].add(state, ours=mine)
    for case in range(MULTIMODAL):
        rng = np.random.default_rng(1000 + case)
        with tempfile.TemporaryDirectory() as folder:
            exact, assistant = test_multimodal.build(rng, Path(folder) / "m", case)
            model = assistant.model.to(device, dtype)
            rounded = deepcopy(exact).to(dtype).to(device) if rounds else None
            exact.to(device)
            for name, parts in test_multimodal.prompts(rng).items():
                batch = assistant.processor([[{"role": "user", "content": parts}]]).to(device)
                theirs = {"transformers": oracle.run(rounded, batch).logits} if rounded else {}
                found[f"multimodal: {name}"].add(oracle.run(exact, batch).logits, ours=model(batch)[0], **theirs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=CPU)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = compare(getattr(torch, given.dtype), given.device)
    if given.dtype == "float32":
        print(HEAD)
        print("| what | comparisons | largest difference | mean size of the values |")
        print("|---|---|---|---|")
        for name, own in found.items():
            print(f"| {name} | {len(own.scale)} | {own.worst['ours']:.1e} | {np.mean(own.scale):.2f} |")
    else:
        print(
            f"## {given.dtype}\n\nDistance of logits to those of transformers in float32, before weights are rounded.\n"
        )
        print("| what | comparisons | ours: mean, largest | transformers: mean, largest | mean size of the values |")
        print("|---|---|---|---|---|")
        for name, own in found.items():
            sides = (f"{np.mean(own.mean[side]):.4f}, {own.worst[side]:.3f}" for side in ("ours", "transformers"))
            print(f"| {name} | {len(own.scale)} | {' | '.join(sides)} | {np.mean(own.scale):.2f} |")
    asked = " ".join(["python benchmarks/parity.py", *sys.argv[1:]])
    print(f"\n{where(device=given.device)}: `{asked}`")


if __name__ == "__main__":
    main()
