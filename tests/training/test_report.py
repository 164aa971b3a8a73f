"""What a run tells: the table of what trains, curves, trackers, the share of the machine, schedules."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from toys import Steps, fresh, mixed, settings, text

from modalora.config import OptimConfig
from modalora.errors import ConfigError
from modalora.training.flops import StepFlops
from modalora.training.loop import train
from modalora.training.optimizer import Optimizer
from modalora.training.report import plot_metrics


def test_a_run_says_what_trains_before_it_trains(tmp_path: Path) -> None:
    told: list[str] = []
    optim = OptimConfig(lr=1e-3, warmup_steps=0, lr_scale={"image.*": 0.1})
    run = settings(tmp_path, "adapter.vision", "image.projector.*", steps=1, optim=optim)
    model = fresh()
    train(run, model, Steps(lambda step: [mixed(step)]), say=told.append)
    rows = {line.split()[0]: line.split()[1:] for line in told}
    assert rows["decoder"][1:] == ["0", "0.00%", "frozen"]
    assert rows["adapter.vision"][-1] == "0.001"
    assert rows["image.projector.vision"][-1] == "0.0001"
    numbers = sum(own.numel() for own in model.parameters())
    assert int(rows["all"][0].replace(",", "")) == numbers
    trained = sum(own.numel() for own in model.parameters() if own.requires_grad)
    assert int(rows["all"][1].replace(",", "")) == trained


def test_metrics_tell_norms_by_part_speed_and_memory(tmp_path: Path) -> None:
    last = train(settings(tmp_path, "adapter.*", steps=2), fresh(), Steps(lambda step: [mixed(step)]))
    parts = [last[f"grad_norm_adapter.{name}"] for name in ("vision", "speech")]
    assert last["grad_norm"] == pytest.approx(sum(norm**2 for norm in parts) ** 0.5)
    # 12 + 25 + 20 + 30 tokens; labels are those from the ninth on
    assert last["tokens_per_second"] / last["labels_per_second"] == pytest.approx(87 / 55, rel=0.05)
    assert last["memory_mb"] > 50
    assert last["remaining_seconds"] == 0
    assert "mfu" not in last


def test_the_share_of_the_machine_follows_from_operations_and_time(tmp_path: Path) -> None:
    model = fresh()
    run = settings(tmp_path, "decoder", steps=2, peak_tflops=1e-3)
    last = train(run, model, Steps(lambda step: [text(step)]))
    operations = StepFlops(model, {"decoder"}, decodes=True).of([text(0)])
    seconds = 64 / last["tokens_per_second"]
    assert last["mfu"] == pytest.approx(operations / seconds / 1e9, rel=0.01)


def test_curves_are_drawn_of_every_route_and_part(tmp_path: Path) -> None:
    train(settings(tmp_path, "adapter.*", steps=3), fresh(), Steps(lambda step: [mixed(step)]))
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[at : at + 4]) for at in (16, 20))
    assert (width, height) == (1440, 960)


def test_tensorboard_gets_every_logged_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = settings(tmp_path, "adapter.*", steps=4, log_every=2, trackers=["tensorboard"])
    train(run, fresh(), Steps(lambda step: [mixed(step)]))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(read.Tags()["scalars"]) == set(lines[0]) - {"step", "steps"}
    assert [event.step for event in read.Scalars("loss")] == [2, 4]
    assert [event.value for event in read.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_hosted_trackers_are_begun_fed_and_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls: list[tuple[str, Any]] = []
    library: Any = ModuleType(name)
    library.init = lambda **given: calls.append(("init", given))
    library.log = lambda figures, step: calls.append(("log", (step, sorted(figures)[:1])))
    library.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, name, library)
    train(settings(tmp_path / "mine", steps=2, trackers=[name]), fresh(), Steps(lambda step: [text(step)]))
    assert [call for call, _ in calls] == ["init", "log", "log", "finish"]
    assert calls[0][1]["name"] == "mine"
    assert calls[0][1]["config"]["steps"] == 2
    assert [step for _, (step, _) in calls[1:3]] == [1, 2]


def test_a_missing_tracker_names_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="pip install trackio"):
        train(settings(tmp_path, trackers=["trackio"]), fresh(), Steps(lambda step: [text(step)]))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("cosine", [0.5, 1.0, 1.0, 0.775, 0.325]), ("linear", [0.5, 1.0, 1.0, 0.7, 0.4]), ("constant", [0.5, 1, 1, 1, 1])],
)
def test_schedules_begin_with_a_warm_up_and_end_as_named(schedule: Any, rates: list[float]) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule=schedule, final_lr_ratio=0.1)
    optimizer = Optimizer({"decoder.x": torch.nn.Parameter(torch.zeros(2))}, config, 5)
    assert [optimizer.rate(step) for step in range(5)] == pytest.approx(rates)
