"""How far apart are our logits and transformers', over many random models? Writes the table of docs/parity.md.

python benchmarks/parity.py > docs/parity.md
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import defaultdict
from datetime import date
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))

import numpy as np  # noqa: E402
import oracle  # noqa: E402
import test_multimodal  # noqa: E402
import test_text  # noqa: E402
import torch  # noqa: E402

from modalora.checkpoint.store import load_model  # noqa: E402

TEXT, MULTIMODAL = 40, 24
HEAD = """# Parity

Largest absolute difference between our logits and those of transformers 5.23 with PEFT 0.21, over random models in
the published layouts: sizes, heads, rotary kinds, windows, ranks and media drawn anew for each, weights at unit scale,
logits near 1, float32. `tests/parity/` holds all of them to 1e-4 and compares hidden states layer by layer; what is
around the reference's listed defects is told in `tests/parity/oracle.py`. Phi-3-small, which transformers does not
have, is compared with a float64 model written loop by loop (`tests/models/test_phi3_small.py`).
"""


@torch.no_grad()
def main() -> None:
    worst: dict[str, float] = defaultdict(float)
    cases: dict[str, int] = defaultdict(int)
    scale: dict[str, list[float]] = defaultdict(list)

    def note(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        worst[name] = max(worst[name], float((ours - theirs).abs().max()))
        cases[name] += 1
        scale[name].append(float(theirs.abs().mean()))

    torch.set_num_threads(1)
    for case in range(TEXT):
        rng = np.random.default_rng(case)
        config = oracle.text_config(rng)
        reference = oracle.text_model(config, case)
        with tempfile.TemporaryDirectory() as folder:
            ours = load_model(oracle.save(reference, Path(folder) / "m", oracle.tokenizer())).model
            window = config.original_max_position_embeddings
            for name, length in {"up to the original window": window, "beyond it": 3 * window}.items():
                ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (1, length)))
                batch = test_text.text(ids)
                told = reference.model(input_ids=ids, output_hidden_states=True, use_cache=False)
                note(f"text, {name}: logits", ours(batch), reference(input_ids=ids).logits)
                for mine, theirs in zip(test_text.states(ours, batch), told.hidden_states, strict=True):
                    note("text: hidden states, any layer", mine, theirs)
    for case in range(MULTIMODAL):
        rng = np.random.default_rng(1000 + case)
        with tempfile.TemporaryDirectory() as folder:
            reference, assistant = test_multimodal.build(rng, Path(folder) / "m", case)
            for name, parts in test_multimodal.prompts(rng).items():
                batch = assistant.processor([[{"role": "user", "content": parts}]])
                note(f"multimodal: {name}", assistant.model(batch)[0], oracle.run(reference, batch).logits)
    print(HEAD)
    print("| what | comparisons | largest difference | mean size of the values |")
    print("|---|---|---|---|")
    for name, value in worst.items():
        print(f"| {name} | {cases[name]} | {value:.1e} | {np.mean(scale[name]):.2f} |")
    print(f"\n{date.today()}, torch {torch.__version__}, one thread: `python benchmarks/parity.py > docs/parity.md`")


if __name__ == "__main__":
    main()
