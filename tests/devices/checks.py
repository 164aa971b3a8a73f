"""What must hold on another device than the CPU: run by test_devices.py in a process of its own.

`python checks.py FOLDER DEVICE [CHECK]...` prints one JSON object, the complaint of each check by name, "" where it
holds. DEVICE is `elsewhere`, the emulated one, or a real one; only the emulated one counts its questions.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER, NAME = Path(sys.argv[1]), sys.argv[2]
questions: list[str] = []
if NAME == "elsewhere":  # which changes torch, so that nothing of ours may be there yet
    from elsewhere import questions

import modalora
from modalora.assistant import Assistant
from modalora.checkpoint.find import BUNDLED
from modalora.checkpoint.preserve import preservation
from modalora.config import load_run
from modalora.contracts import Batch, Route
from modalora.evaluation.mixed import worst_differences
from modalora.generation.engine import generate
from modalora.generation.sampling import Sampling
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.quantize import quantize
from modalora.science.evoformer_attention import DS4Sci_EvoformerAttention
from modalora.training.run import run_recipe

torch.set_num_threads(1)
DEMO = BUNDLED.parent / "bundled" / "demo"
ROWS = Path(__file__).parents[2] / "examples" / "finetune" / "rows.jsonl"
IMAGE, AUDIO = {"type": "image", "image": str(DEMO / "scene.png")}, {"type": "audio", "audio": str(DEMO / "number.wav")}
TEXT = {"type": "text", "text": "Is the spoken number the number of circles?"}
MIXED = [
    [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    for parts in ([TEXT], [IMAGE, TEXT], [AUDIO, TEXT], [IMAGE, AUDIO, TEXT])
]
ASKED = [row[:1] for row in MIXED]
CHECKS: list[Callable[[], None]] = []
Check = Callable[[], None]


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def counts(function: Check) -> Check:
    """For checks of how often a device is asked."""
    return check(function) if NAME == "elsewhere" else function


def load(device: str = NAME) -> Assistant:
    return modalora.load("nano", device=device)


@check
def strangers_are_refused() -> None:
    there = torch.ones(3).to(NAME)
    assert there.device.type == NAME.partition(":")[0]
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)


@check
def a_mixed_batch_is_answered_as_on_the_cpu() -> None:
    for settings in ({}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.3}):
        there, here = (load(device).ask_many(ASKED, max_tokens=12, **settings) for device in (NAME, "cpu"))
        assert [answer.tokens for answer in there] == [answer.tokens for answer in here]
    assert "".join(load().stream(ASKED[1], max_tokens=8)) == here_text(ASKED[1])


def here_text(messages: Any) -> str:
    return load("cpu").ask(messages, max_tokens=8).text


@counts
def a_decoded_token_asks_the_device_no_oftener_in_a_deeper_model() -> None:
    def asked(assistant: Assistant, tokens: int) -> int:
        questions.clear()
        words = [[{"role": "user", "content": "Repeat: the quick brown fox and the lazy dog and the cat"}]]
        assert len(assistant.ask_many(words, max_tokens=tokens)[0].tokens) == tokens
        return len(questions)

    assistant = load()
    few = asked(assistant, 6) - asked(assistant, 2)
    assert few <= 4 * 2, f"{few} questions in 4 steps"


@check
def rows_cross_to_the_long_table_as_on_the_cpu() -> None:
    def tokens(device: str) -> list[tuple[int, int]]:
        torch.manual_seed(1)
        model = Multimodal(tiny()).to(device).eval()
        ids = torch.randint(0, 320, (3, 254), generator=torch.Generator().manual_seed(0))
        batch = Batch(ids, torch.tensor([254, 100, 251]), Route((None, None, None))).to(device)
        found = generate(model, batch, sampling=Sampling(), max_tokens=8, stop_ids=())
        return [(token.row, token.id) for token in found]

    assert tokens(NAME) == tokens("cpu")


@check
def rows_of_a_mixed_batch_are_what_they_are_alone() -> None:
    logits, gradients = worst_differences(load(), MIXED)
    # sums over padded keys in another order: 1.7e-5 of logits up to 22 and 2e-7 seen; a wrong row or adapter gives 0.1
    assert logits < 1e-4, logits
    assert gradients < 1e-5, gradients


@check
def few_bits_give_what_they_give_on_the_cpu() -> None:
    for bits in (8, 4):
        found = []
        for device in (NAME, "cpu"):
            assistant = load(device)
            quantize(assistant.model, bits)
            found.append(assistant.logits(ASKED[1]).cpu())
        # the same numbers through other attention kernels, 1.1e-5 of 22 seen; a level of nf4 amiss gives more than 0.1
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@check
def a_certificate_is_the_same() -> None:
    there, here = (preservation(load(device).model, set()) for device in (NAME, "cpu"))
    assert there.frozen == here.frozen


@check
def evoformer_attention_trains() -> None:
    def gradients(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 3, 20, 2, 8).to(device).requires_grad_() for _ in range(3))
        biases = [torch.randn(1, 3, 1, 1, 20).to(device), torch.randn(1, 1, 2, 20, 20).to(device).requires_grad_()]
        DS4Sci_EvoformerAttention(q, k, v, biases).square().sum().backward()
        return [x.grad.cpu() for x in (q, k, v, biases[1]) if x.grad is not None]

    for there, here in zip(gradients(NAME), gradients("cpu"), strict=True):  # float32 sums in another order
        torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-5)


def losses(name: str, device: str, *settings: str, rows: Path = ROWS) -> list[float]:
    told: list[float] = []
    output = FOLDER / f"{name}-{device}"
    changes = (f"mixture.0.options.path={rows}", f"output={output}", f"device={device}", "steps=2", "log_every=1")
    recipe = BUNDLED.parent / "recipes" / "finetune-media.yaml"
    run_recipe(load_run(recipe, [*changes, "precision=fp32", *settings]), lambda step: told.append(float(step["loss"])))
    assert (output / "model" / "config.json").exists()
    return told


def rows_with(kind: str) -> Path:
    """Return a file of the example's rows that hold a kind of media, beside copies of these."""
    told = [line for line in ROWS.read_text(encoding="utf-8").splitlines() if kind in line]
    for pattern in ("*.png", "*.wav"):
        for file in ROWS.parent.glob(pattern):
            shutil.copy(file, FOLDER)
    (FOLDER / f"{kind}.jsonl").write_text("\n".join(told) + "\n", encoding="utf-8")
    return FOLDER / f"{kind}.jsonl"


def trains_alike(name: str, *settings: str, rows: Path = ROWS, bound: float = 1e-5) -> None:
    there, here = (losses(name, device, *settings, rows=rows) for device in (NAME, "cpu"))
    for one, other in zip(there, here, strict=True):  # float32: 6e-7 seen
        assert abs(one - other) <= bound * max(1.0, abs(other)), (there, here)


@check
def adapters_train_as_on_the_cpu() -> None:
    trains_alike("plain")


@check
def half_precision_trains() -> None:
    trains_alike("bf16", "precision=bf16", bound=0.005)  # other kernels than the CPU's own bf16: 5e-4 seen


@check
def inputs_may_wait_on_the_cpu() -> None:
    assert losses("offload", NAME, "recompute=offload") == losses("plain-again", NAME)


@check
def moments_of_eight_bits_and_four_bit_matrices_train() -> None:
    trains_alike("bits", "optim.state_bits=8", "base_bits=4")


@check
def a_part_without_gradient_stops_nothing() -> None:
    trains_alike("images", rows=rows_with("image"))


@check
def sound_encoders_learn_by_ctc() -> None:
    trains_alike("ctc", "objective=ctc", "train=[audio.encoder]", rows=rows_with("audio"))


@check
def projectors_are_whitened_there() -> None:
    trains_alike("whiten", "train=[image.projector.vision]", "whiten=[image]", rows=rows_with("image"))


@counts
def a_loss_asks_the_device_no_oftener_for_more_pictures() -> None:
    assistant, found = load(), []
    for pictures in (1, 4):
        row = assistant.processor.row(MIXED[1], answer=False)
        batch = assistant.processor.collate([row] * pictures).to(NAME)
        questions.clear()
        assistant.model.loss(batch)[0].sum().backward()
        found.append(len(questions))
    assert found[0] == found[1] < 10, found


def main() -> None:
    found = {}
    for one in [one for one in CHECKS if one.__name__ in sys.argv[3:] or len(sys.argv) == 3]:
        try:
            one()
            found[one.__name__] = ""
        except Exception:  # whatever a device may meet is the test's answer
            found[one.__name__] = traceback.format_exc(limit=-8)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
