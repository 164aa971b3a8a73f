"""Phi-3 decoders of random sizes give transformers' numbers: logits, hidden states of every layer, cached decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from modalora.assistant import set_regime
from modalora.checkpoint.store import load_model
from modalora.contracts import Batch, Route
from modalora.generation.engine import generate
from modalora.generation.sampling import Sampling

pytestmark = pytest.mark.filterwarnings("ignore")

# fp32: a few hundred products a logit, each order of summation its own rounding; worst seen 6e-6 of values near 1. A
# wrong factor, mask or order of heads shows at 1e-2 and more.
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


def text(ids: Tensor) -> Batch:
    return Batch(input_ids=ids, lengths=torch.tensor([ids.shape[1]] * len(ids)), route=Route((None,) * len(ids)))


@pytest.mark.parametrize("case", range(24))
@torch.no_grad()
def test_a_random_decoder_equals_transformers(case: int, rng: np.random.Generator, tmp_path: Path) -> None:
    config = oracle.text_config(rng)
    reference = oracle.text_model(config, case)
    ours = load_model(oracle.save(reference, tmp_path / "model", oracle.tokenizer())).model
    window = config.original_max_position_embeddings
    for length in (5, window, window + 1, 3 * window):
        ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (1, length)))
        told = reference.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        for layer, (theirs, own) in enumerate(zip(told.hidden_states, oracle.states(ours, text(ids)), strict=True)):
            torch.testing.assert_close(own, theirs, **TOLERANCE, msg=lambda why, at=layer: f"layer {at}: {why}")
        torch.testing.assert_close(ours(text(ids)), reference(input_ids=ids).logits, **TOLERANCE)


@pytest.mark.parametrize("case", range(4))
@torch.no_grad()
def test_decoding_across_the_switch_equals_a_fresh_prefill(case: int, rng: np.random.Generator, tmp_path: Path) -> None:
    window = 64
    rope = {**oracle.draw_rope(rng, 6, window, plain=0.0), "partial_rotary_factor": 0.75}
    config = oracle.text_config(
        rng, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope,
        original_max_position_embeddings=window,
    )  # fmt: skip
    reference = oracle.text_model(config, case)
    ours = load_model(oracle.save(reference, tmp_path / "model", oracle.tokenizer())).model
    ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (1, window + 12)))
    cache = ours.new_cache(1)
    logits = ours.read(text(ids[:, : window - 6]), cache)
    for length in range(window - 6, window + 12):
        torch.testing.assert_close(logits, reference(input_ids=ids[:, :length]).logits[:, -1], **TOLERANCE)
        if ours.table_number(length + 1) != ours.table_number(
            length
        ):  # what the engine does: the cache was rotated otherwise
            cache = ours.new_cache(1)
            logits = ours.read(text(ids[:, : length + 1]), cache)
        else:
            logits = ours.read_next(ids[:, length], Route((None,)), cache)


@torch.no_grad()
def test_rows_decoded_over_4096_tokens_equal_a_fresh_prefill(rng: np.random.Generator, tmp_path: Path) -> None:
    """At the published window: a row that crosses it while others stay below or were beyond from the start."""
    rope = {**oracle.draw_rope(rng, 12, 4096, plain=0.0), "partial_rotary_factor": 0.75}
    config = oracle.text_config(
        rng, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, rope_parameters=rope,
        original_max_position_embeddings=4096, max_position_embeddings=131_072, sliding_window=262_144,
        attn_implementation="sdpa",
    )  # fmt: skip
    reference = oracle.text_model(config, 0)
    ours = load_model(oracle.save(reference, tmp_path / "model", oracle.tokenizer())).model
    lengths = [4090, 30, 4200]
    ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (3, max(lengths))))
    batch = Batch(input_ids=ids, lengths=torch.tensor(lengths), route=Route((None,) * 3))

    def answers() -> list[list[int]]:
        rows: list[list[int]] = [[], [], []]
        for token in generate(ours, batch, sampling=Sampling(), max_tokens=20, stop_ids=frozenset()):
            rows[token.row].append(token.id)
        return rows

    rows = answers()
    for prompt, length, said in zip(ids, lengths, rows, strict=True):
        assert len(said) == 20
        whole = torch.cat((prompt[:length], torch.tensor(said)))
        for end, token in enumerate(said, start=length):
            logits = reference(input_ids=whole[None, :end], use_cache=False, logits_to_keep=1).logits[0, -1]
            # the greatest, or one that rounding cannot tell from it
            assert logits.max() - logits[token] < TOLERANCE["atol"], (length, end)
    set_regime(ours, "short")
    fixed = answers()
    assert [fixed[row] == rows[row] for row in range(3)] == [False, True, False]  # a table kept too long would tell


@torch.no_grad()
def test_each_row_of_a_batch_has_its_own_table(rng: np.random.Generator, tmp_path: Path) -> None:
    rope = {**oracle.draw_rope(rng, 8, 32, plain=0.0), "partial_rotary_factor": 1.0}
    config = oracle.text_config(
        rng, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope,
        original_max_position_embeddings=32, sliding_window=None,
    )  # fmt: skip
    reference = oracle.text_model(config, 0)
    ours = load_model(oracle.save(reference, tmp_path / "model", oracle.tokenizer())).model
    ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (2, 50)))
    batch = Batch(input_ids=ids, lengths=torch.tensor([20, 50]), route=Route((None, None)))
    logits = ours(batch)
    torch.testing.assert_close(logits[:1, :20], reference(input_ids=ids[:1, :20]).logits, **TOLERANCE)
    torch.testing.assert_close(logits[1:], reference(input_ids=ids[1:]).logits, **TOLERANCE)

    long, short = reference(input_ids=ids[:1]).logits[:, :20], logits[:1, :20].clone()
    set_regime(ours, "long")
    torch.testing.assert_close(ours(text(ids[:1, :20])), long, **TOLERANCE)
    set_regime(ours, "short")
    torch.testing.assert_close(ours(text(ids[:1]))[:, :20], short, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("the published width, two layers", {"hidden_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 24,
                                             "num_key_value_heads": 8, "intermediate_size": 8192}),
        ("the published depth, narrow", {"hidden_size": 96, "num_hidden_layers": 32, "num_attention_heads": 6,
                                         "num_key_value_heads": 2, "intermediate_size": 256}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_published_width_and_depth(name: str, sizes: dict[str, int], rng: np.random.Generator, tmp_path: Path) -> None:
    pairs = int(sizes["hidden_size"] / sizes["num_attention_heads"] * 0.75) // 2
    factors = {"short_factor": [1.0] * pairs, "long_factor": [float(x) for x in 1 + 30 * rng.random(pairs)]}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75, **factors,
            "original_max_position_embeddings": 64}  # fmt: skip
    config = oracle.text_config(
        rng, **sizes, rope_parameters=rope, original_max_position_embeddings=64, sliding_window=262_144,
        tie_word_embeddings=True, rms_norm_eps=1e-5,
    )  # fmt: skip
    reference = oracle.text_model(config, 1)
    ours = load_model(oracle.save(reference, tmp_path / "model", oracle.tokenizer())).model
    for length in (40, 80):
        ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (1, length)))
        torch.testing.assert_close(ours(text(ids)), reference(input_ids=ids).logits, **TOLERANCE)


@torch.no_grad()
def test_bf16_stays_as_near_to_float32_as_the_reference_does(rng: np.random.Generator, tmp_path: Path) -> None:
    config = oracle.text_config(rng, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
                                tie_word_embeddings=True, sliding_window=None,
                                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})  # fmt: skip
    reference = oracle.text_model(config, 0).to(torch.bfloat16)
    folder = oracle.save(reference, tmp_path / "model", oracle.tokenizer())
    ours = load_model(folder).model
    assert next(ours.parameters()).dtype == torch.bfloat16
    ids = torch.from_numpy(rng.integers(0, oracle.VOCAB, (1, 60)))
    theirs, own = reference(input_ids=ids).logits.float(), ours(text(ids)).float()
    exact = load_model(folder, dtype=torch.float32).model(text(ids))
    # bf16 has 8 bits: both wander 1e-2 of values near 1 from the exact logits, not always to the same side

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    assert rms(own - exact) < 1.3 * rms(theirs - exact)
    assert rms(own - theirs) < 0.03
