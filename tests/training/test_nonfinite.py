"""A loss or gradient that is not finite moves no weight, and is traced to its tensors and rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import Steps, assert_same_bits, fresh, mixed, settings, weights

from modalora.contracts import Batch
from modalora.errors import TrainingError
from modalora.models.multimodal import Multimodal
from modalora.training.loop import train

NAMES = ("text:0", "pictures:1", "sounds:2", "both:3")


def named(step: int) -> Batch:
    return replace(mixed(step), samples=tuple(f"{name}{step}" for name in NAMES))


def poisoned(*bad: int) -> Steps:
    """Rows 2 and 3 of some steps hold sounds of NaN."""

    def make(step: int) -> list[Batch]:
        batch = named(step)
        for item in batch.media if step in bad else ():
            if "mel" in item.features:
                item.features["mel"].fill_(float("nan"))
        return [batch.select([0, 1]), batch.select([2, 3])]

    return Steps(make)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_loss_of_nan_stops_the_run_and_names_rows_and_tensors(tmp_path: Path) -> None:
    model, told = fresh(), fresh()
    train(settings(tmp_path / "told", "adapter.*", steps=1), told, poisoned())
    run = settings(tmp_path / "run", "adapter.*", steps=1)
    train(run, model, poisoned())
    with pytest.raises(
        TrainingError, match=r"step 2: the loss is nan; .*from the rows both:31, sounds:21; weights are"
    ):
        train(run.model_copy(update={"steps": 3}), model, poisoned(1))
    assert_same_bits(weights(model), weights(told))
    (event,) = events(tmp_path / "run")
    assert event["rows"] == ["both:31", "sounds:21"]
    assert event["gradients"][0] == "decoder.layers.0.self_attn.qkv_proj.lora_A.vision"


def test_a_skipped_step_moves_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    told: list[str] = []
    run = settings(tmp_path, "adapter.*", steps=6, save_every=1, keep=9, nonfinite="skip", log_every=2)
    last = train(run, fresh(), poisoned(3), say=told.append)
    saved = [load_file(tmp_path / "resume" / f"{step:08d}" / "weights.safetensors") for step in (3, 4, 5)]
    assert_same_bits(saved[0], saved[1])
    assert any(not torch.equal(own, saved[2][name]) for name, own in saved[1].items())
    assert last["skipped"] == 1
    assert [line for line in told if "step 4: the loss is nan" in line and "it is skipped" in line]
    assert [(event["step"], event["event"]) for event in events(tmp_path)] == [(4, "skipped")]


def test_a_stopped_run_goes_on_by_skipping(tmp_path: Path) -> None:
    straight, model = fresh(), fresh()
    train(settings(tmp_path / "straight", "adapter.*", steps=4, nonfinite="skip"), straight, poisoned(2))
    run = settings(tmp_path / "run", "adapter.*", steps=4)
    with pytest.raises(TrainingError, match="or go on with nonfinite=skip"):
        train(run, model, poisoned(2))
    again = fresh()
    train(run.model_copy(update={"nonfinite": "skip"}), again, poisoned(2))
    assert_same_bits(weights(again), weights(straight))


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    run = settings(tmp_path, "adapter.*", steps=20, nonfinite="skip", nonfinite_most=3)
    with pytest.raises(TrainingError, match="step 7: .* 3 steps in a row"):
        train(run, fresh(), poisoned(1, 2, 4, 5, 6, 7, 8, 9))
    assert [event["step"] for event in events(tmp_path)] == [2, 3, 5, 6, 7]


class _Blows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, bad: Tensor) -> Tensor:
        context.save_for_backward(bad)
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (bad,) = context.saved_tensors
        return gradient.masked_fill(bad, float("inf")), None


def blowing(model: Multimodal, is_bad: Callable[[Batch, int], bool]) -> Multimodal:
    """Let the gradients of some rows be infinite though their losses are finite."""
    plain = model.loss

    def loss(batch: Batch) -> tuple[Tensor, Tensor]:
        values, rows = plain(batch)
        bad = torch.tensor([is_bad(batch, row) for row in rows.tolist()])
        return _Blows.apply(values, bad), rows

    model.loss = loss  # type: ignore[method-assign]
    return model


def test_a_gradient_that_is_not_finite_is_traced_to_its_row_by_running_rows_again(tmp_path: Path) -> None:
    model = blowing(fresh(), lambda batch, row: batch.samples[row] == "both:32")
    before = weights(model)
    run = settings(tmp_path, "adapter.*", steps=4, nonfinite="skip", log_every=1)
    told: list[str] = []
    train(run, model, poisoned(), say=told.append)
    (event,) = events(tmp_path)
    assert event["step"] == 3
    assert event["what"] == "gradient"
    assert event["rows"] == ["both:32"]
    assert all("vision" in name for name in event["gradients"])  # the speech adapter's gradient was finite
    assert any("the gradient is nan" in line or "the gradient is inf" in line for line in told)
    assert any(not torch.equal(own, before[name]) for name, own in weights(model).items())


def test_a_model_that_itself_holds_nan_is_named(tmp_path: Path) -> None:
    model = fresh()
    with torch.no_grad():
        model.decoder.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(
        TrainingError, match=r"the model itself holds .* first in decoder.layers.1.input_layernorm.weight"
    ):
        train(settings(tmp_path, "adapter.*"), model, poisoned())
