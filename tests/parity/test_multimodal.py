"""Random small Phi-4-Multimodals in the native layout give transformers' numbers for every mix of media."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from PIL import Image

import modalora
from modalora.assistant import Assistant

pytestmark = pytest.mark.filterwarnings("ignore")

# fp32, towers and decoder together: worst seen 3e-5 of values near 1, where a sound of 41 s goes through the encoder. A
# slip in a mask, a separator, a projector or a route shows at 1e-2 and more.
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
WORDS = {"type": "text", "text": "the quick fox"}


def picture(rng: np.random.Generator, width: int, height: int) -> dict[str, Any]:
    return {"type": "image", "image": Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))}


def sound(rng: np.random.Generator, seconds: float, rate: int) -> dict[str, Any]:
    return {"type": "audio", "audio": ((0.1 * rng.standard_normal(int(seconds * rate))).astype(np.float32), rate)}


def prompts(rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    wide, high = (int(side) for side in rng.integers(30, 260, 2))
    return {
        "text": [WORDS],
        "one crop": [picture(rng, 50, 50), WORDS],
        "many crops": [picture(rng, wide + 200, high + 100), WORDS],
        "odd shapes": [picture(rng, 400, 31), WORDS, picture(rng, 37, 300)],
        "speech": [sound(rng, 1.3, 16_000), WORDS],
        "8 kHz and 44.1 kHz": [sound(rng, 0.7, 8_000), WORDS, sound(rng, 1.1, 44_100)],
        "image + speech": [picture(rng, high, wide), sound(rng, 0.5 + rng.random(), 16_000)],
        "speech of 41 s": [sound(rng, 41.0, 16_000), WORDS],
    }


def build(rng: np.random.Generator, folder: Path, seed: int) -> tuple[Any, Assistant]:
    words = oracle.tokenizer()
    reference = oracle.multimodal_model(oracle.multimodal_config(rng, words), seed)
    oracle.add_loras(reference, seed)
    return reference, modalora.load(oracle.save(reference, folder, words))


@pytest.mark.parametrize("case", range(16))
@torch.no_grad()
def test_a_random_model_equals_transformers(case: int, rng: np.random.Generator, tmp_path: Path) -> None:
    reference, ours = build(rng, tmp_path / "model", case)
    for name, parts in prompts(rng).items():
        batch = ours.processor([[{"role": "user", "content": parts}]])
        told = oracle.run(reference, batch)
        for layer, (own, theirs) in enumerate(zip(oracle.states(ours.model, batch), told.hidden, strict=True)):
            # the sum of all branches grows to 16, and so do its roundings: worst seen 1.5e-5 of the greatest value
            atol = TOLERANCE["atol"] * max(1.0, float(theirs.abs().max()))
            at = f"{name}, what layer {layer} of {len(told.hidden) - 1} is given"  # the last: what comes out of all
            torch.testing.assert_close(own[0], theirs, atol=atol, rtol=0, msg=lambda why, at=at: f"{at}: {why}")
        torch.testing.assert_close(
            ours.model(batch)[0], told.logits, **TOLERANCE, msg=lambda why, at=name: f"{at}: {why}"
        )


@torch.no_grad()
def test_rows_of_a_mixed_batch_equal_the_reference_row_by_row(rng: np.random.Generator, tmp_path: Path) -> None:
    reference, ours = build(rng, tmp_path / "model", 3)
    asked = [[{"role": "user", "content": parts}] for parts in prompts(rng).values()]
    together = ours.model(ours.processor(asked))
    for row, messages in enumerate(asked):
        told = oracle.run(reference, ours.processor([messages])).logits
        torch.testing.assert_close(together[row, : len(told)], told, **TOLERANCE)


@torch.no_grad()
def test_generated_tokens_are_the_reference_s(rng: np.random.Generator, tmp_path: Path) -> None:
    reference, ours = build(rng, tmp_path / "model", 5)
    for parts in prompts(rng).values():
        answer = ours.ask([{"role": "user", "content": parts}], max_tokens=6)
        batch = ours.processor([[{"role": "user", "content": parts}]])
        ids = batch.input_ids
        for token in answer.tokens:
            batch = modalora.Batch(ids, torch.tensor([ids.shape[1]]), batch.route, batch.media)
            assert int(oracle.run(reference, batch).logits[-1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


@torch.no_grad()
def test_official_semantics_give_a_batch_one_mode(rng: np.random.Generator, tmp_path: Path) -> None:
    reference, ours = build(rng, tmp_path / "model", 7)
    asked = [[{"role": "user", "content": parts}] for parts in ([WORDS], [sound(rng, 0.6, 16_000)])]
    asked.append([{"role": "user", "content": [picture(rng, 60, 60), WORDS]}])
    official = modalora.load(tmp_path / "model", compat="official")
    batch = official.processor(asked)
    assert batch.route.adapters == ("vision",) * 3
    assert [item.branch for item in batch.media] == ["vision", "vision"]
    together = official.model(batch)
    for row in range(3):
        told = oracle.run(reference, batch.select([row])).logits
        torch.testing.assert_close(together[row, : len(told)], told, **TOLERANCE)

    per_row = ours.explain(ours.processor(asked))
    assert [record["adapter"] for record in per_row] == [None, "speech", "vision"]
    assert per_row[1]["projectors"] == {"audio": "speech"}
    official_rows = ours.explain_official(ours.processor(asked))
    assert [record["adapter"] for record in official_rows] == ["vision"] * 3
    assert official_rows[1]["projectors"] == {"audio": "vision"}


@torch.no_grad()
def test_bf16_stays_as_near_to_float32_as_the_reference_does(rng: np.random.Generator, tmp_path: Path) -> None:
    apart: dict[str, list[float]] = {"ours": [], "theirs": []}
    for case in range(4):
        exact, ours = build(rng, tmp_path / str(case), case)
        rounded, model = deepcopy(exact).to(torch.bfloat16), ours.model.to(torch.bfloat16)
        for name, parts in prompts(rng).items():
            batch = ours.processor([[{"role": "user", "content": parts}]])
            told = oracle.run(exact, batch).logits
            for side, logits in (("ours", model(batch)[0]), ("theirs", oracle.run(rounded, batch).logits)):
                assert logits.dtype == torch.bfloat16, name
                apart[side].append(float((logits.float() - told).abs().mean()))
    # bf16 has 8 bits: each side rounds at other places and wanders 0.02 from values near 1; of 24 models ours came to
    # 0.94 to 1.03 of the reference's distance (docs/parity.md)
    assert sum(apart["ours"]) < 1.1 * sum(apart["theirs"])
