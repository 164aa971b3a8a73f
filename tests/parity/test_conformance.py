"""The published LongRoPE vectors hold here and in transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "longrope_conformance.py"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("longrope_conformance", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_runner_passes_and_the_file_is_what_it_writes(example: ModuleType) -> None:
    vectors = json.loads(example.VECTORS.read_text())
    assert example.check(vectors) == []
    made = json.loads(json.dumps(example.make()))
    for name in ("phi4_mini_tables", "tiny_last_logits"):
        assert made[name].keys() == vectors[name].keys()
    for length, logits in made["tiny_last_logits"].items():
        assert logits == pytest.approx(vectors["tiny_last_logits"][length], abs=1e-9)


def test_a_wrong_switch_or_factor_fails_the_runner(example: ModuleType) -> None:
    vectors = json.loads(example.VECTORS.read_text())
    vectors["tiny_last_logits"]["65"] = vectors["tiny_last_logits"]["64"]
    vectors["phi4_mini_tables"]["1"]["short"][0][0] /= 1.1902380714
    assert [line.split(":")[0] for line in example.check(vectors)] == [
        "table short at position 1", "logits at length 65", "decoded logits at length 65"
    ]  # fmt: skip


@torch.no_grad()
def test_the_logits_are_those_of_transformers(example: ModuleType) -> None:
    sizes, rope = example.TINY.decoder, example.ROPE
    config = Phi3Config(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers, num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads, max_position_embeddings=rope.window,
        original_max_position_embeddings=rope.original_window, tie_word_embeddings=True, pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": rope.theta, "partial_rotary_factor": rope.rotated,
            "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor),
            "original_max_position_embeddings": rope.original_window,
        },
        attn_implementation="eager",
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    for name, tensor in model.named_parameters():
        tensor.copy_(example.weights(name, tensor.shape))
    for length, told in json.loads(example.VECTORS.read_text())["tiny_last_logits"].items():
        logits = model(input_ids=example.ids(int(length))).logits[0, -1]
        # float32 against float64: worst seen 4e-7
        torch.testing.assert_close(logits.double(), torch.tensor(told, dtype=torch.float64), atol=1e-5, rtol=0)
