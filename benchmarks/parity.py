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
from typing import Any

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

How far our logits are from those of transformers 5.23 with PEFT 0.21, over random models in the published layouts:
sizes, heads, rotary kinds, windows, ranks and media drawn anew for each, weights at unit scale, logits near 1; and how
far each side is from the same models in float64, which is what rounding alone costs it. `tests/parity/` holds other
such models to 1e-4 in float32, and compares hidden states layer by layer; what is around the reference's listed defects
is told in `tests/parity/oracle.py`. Phi-3-small, which transformers does not have, is compared with a float64 model
written loop by loop (`tests/models/test_phi3_small.py`).
"""


@dataclass
class Found:
    """What was seen of one kind of comparison: largest and mean distances, and the mean size of the values."""

    worst: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    mean: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    scale: list[float] = field(default_factory=list)

    def add(self, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        pairs = {"both": (ours, theirs), "ours": (ours, exact), "theirs": (theirs, exact)}
        for name, (one, other) in pairs.items():
            apart = (one.double() - other.double()).abs()
            self.worst[name] = max(self.worst[name], float(apart.max()))
            self.mean[name].append(float(apart.mean()))
        self.scale.append(float(exact.abs().mean()))


@torch.no_grad()
def compare(dtype: torch.dtype, device: torch.device) -> dict[str, Found]:
    """Return how far both sides are apart in a dtype, and each from transformers in float64."""
    found: dict[str, Found] = defaultdict(Found)
    for case in range(TEXT):
        rng = np.random.default_rng(case)
        config = oracle.text_config(rng)
        reference = oracle.text_model(config, case)
        with tempfile.TemporaryDirectory() as folder:
            saved = oracle.save(reference, Path(folder) / "m", oracle.tokenizer())
            ours = load_model(saved, dtype=dtype, device=str(device)).model
            exact, theirs = deepcopy(reference).double().to(device), reference.to(dtype).to(device)
            window = config.original_max_position_embeddings
            for name, length in {"up to the original window": window, "beyond it": 3 * window}.items():
                ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (1, length))).to(device)
                batch = test_text.text(ids).to(device)
                logits = (model(input_ids=ids).logits for model in (theirs, exact))
                found[f"text, {name}: logits"].add(ours(batch), *logits)
                states = (_states(model, ids) for model in (theirs, exact))
                for layers in zip(test_text.states(ours, batch), *states, strict=True):
                    found["text: hidden states, any layer"].add(*layers)
    for case in range(MULTIMODAL):
        rng = np.random.default_rng(1000 + case)
        with tempfile.TemporaryDirectory() as folder:
            reference, assistant = test_multimodal.build(rng, Path(folder) / "m", case)
            model = assistant.model.to(device, dtype)
            exact, theirs = deepcopy(reference).double().to(device), reference.to(dtype).to(device)
            for name, parts in test_multimodal.prompts(rng).items():
                batch = assistant.processor([[{"role": "user", "content": parts}]]).to(device)
                logits = (oracle.run(one, batch).logits for one in (theirs, exact))
                found[f"multimodal: {name}"].add(model(batch)[0], *logits)
    return found


def _states(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    return model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=CPU)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = compare(getattr(torch, given.dtype), given.device)
    if given.dtype == "float32":
        print(HEAD)
    print(f"## {given.dtype}\n")
    print("| what | compared | largest between us | ours from float64: mean, largest | transformers': mean, largest |")
    print("|---|---|---|---|---|")
    for name, own in found.items():
        sides = (f"{np.mean(own.mean[side]):.1e}, {own.worst[side]:.1e}" for side in ("ours", "theirs"))
        print(f"| {name} | {len(own.scale)} | {own.worst['both']:.1e} | {' | '.join(sides)} |")
    scale = np.mean([value for own in found.values() for value in own.scale])
    asked = " ".join(["python benchmarks/parity.py", *sys.argv[1:]])
    print(f"\nValues are {scale:.2f} on average. {where(device=given.device)}: `{asked}`")


if __name__ == "__main__":
    main()
