"""What should learn and does not, and what should not and does, ends a run within its first steps."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import Steps, fresh, mixed, settings, text

from modalora.config import OptimConfig
from modalora.contracts import Batch
from modalora.errors import ConfigError, ModaloraError, TrainingError
from modalora.parallel.engine import Single
from modalora.training.audit import AUDITED, bit_sum
from modalora.training.loop import train
from modalora.training.signals import Interrupted
from wrong_setups import WRONG, Wrong, mixed_data


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_set_up_of_a_bug_report_is_told_before_the_fifth_step(tmp_path: Path, name: str) -> None:
    wrong: Wrong = WRONG[name]
    data = mixed_data()
    with pytest.raises(ModaloraError, match=re.compile(wrong.told, re.DOTALL)):
        wrong.work(tmp_path, data)
    assert data.taken <= AUDITED < 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_right_set_up_passes_and_every_part_is_judged(tmp_path: Path, precision: str) -> None:
    told: list[str] = []
    parts = ("adapter.*", "image.*", "audio.*", "decoder")
    run = settings(tmp_path, *parts, steps=AUDITED + 1, precision=precision)
    train(run, fresh(), mixed_data(), say=told.append)
    assert not [line for line in told if "not judged" in line]


def test_the_audit_knows_a_lora_a_without_gradient_and_a_slow_warm_up(tmp_path: Path) -> None:
    """A has no gradient while B is zero; in a long warm-up, norms of 1.0 take more than 4 steps to move."""
    optim = OptimConfig(lr=1e-5, warmup_steps=10_000)
    run = settings(tmp_path, "adapter.vision", "decoder", steps=20_000, optim=optim)
    data = mixed_data()

    class EnoughError(Exception):
        pass

    def report(metrics: dict[str, object]) -> None:
        if metrics["step"] == AUDITED + 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        train(run, fresh(), data, report)


def test_a_part_without_rows_is_watched_until_they_come(tmp_path: Path) -> None:
    told: list[str] = []
    run = settings(tmp_path, "adapter.*", steps=12)
    late = Steps(lambda step: [mixed(step) if step >= 6 else mixed(step).select([0, 1])])
    train(run, fresh(), late, say=told.append)
    said = [line for line in told if "not judged yet" in line]
    assert said == ["adapter.speech trains, and no labelled row of the first 4 steps reached it: not judged yet"]


def test_a_part_that_never_has_rows_fails_the_run_at_its_end(tmp_path: Path) -> None:
    never = Steps(lambda step: [mixed(step).select([0, 1])])
    with pytest.raises(TrainingError, match=r"adapter.speech trains, and in 8 steps no labelled row reached it"):
        train(settings(tmp_path, "adapter.*", steps=8), fresh(), never)


@pytest.mark.parametrize("cut", [1, AUDITED + 2])  # adapter.speech is reached, but not judged yet; it is judged
def test_what_was_seen_of_a_part_before_a_run_was_cut_counts_behind_it(tmp_path: Path, cut: int) -> None:
    run = settings(tmp_path, "adapter.*", steps=2 * (AUDITED + 2))

    def first(step: int) -> list[Batch]:
        if step == cut:
            os.kill(os.getpid(), signal.SIGTERM)
        return [mixed(step)]

    with pytest.raises(Interrupted, match=f"stopped after step {cut};"):
        train(run, fresh(), Steps(first))
    assert train(run, fresh(), Steps(lambda step: [mixed(step).select([0, 1])]))["step"] == run.steps


class Clip(Single):
    """An engine that does something before each update."""

    def __init__(self, spoil: Callable[[Mapping[str, nn.Parameter]], None]) -> None:
        self.spoil = spoil

    def clip(self, trained: Mapping[str, nn.Parameter], norm: Tensor, limit: float) -> None:
        super().clip(trained, norm, limit)
        self.spoil(trained)


def test_a_tensor_that_no_optimiser_moves_is_told(tmp_path: Path) -> None:
    def drop(trained: Mapping[str, nn.Parameter]) -> None:
        for name, own in trained.items():
            if "lora_A.vision" in name and "layers.0" in name:
                own.grad = None

    with pytest.raises(TrainingError, match=r"vision trains, and 4 of its 16 tensors have gradients but did not move"):
        train(settings(tmp_path, "adapter.vision", steps=8), fresh(), mixed_data(), engine=Clip(drop))


def test_a_gradient_of_rounding_alone_need_not_move_its_tensor(tmp_path: Path) -> None:
    """Softmax does not see a bias of keys: 1e-9 is left of its gradient, which an eps of 1e-3 keeps from moving 3."""
    told: list[str] = []
    model = fresh()
    for name, own in model.named_parameters():
        if name.endswith("k_proj.bias"):
            own.data.fill_(3.0)
    optim = OptimConfig(lr=1e-4, eps=1e-3, warmup_steps=0)
    train(settings(tmp_path, "image.encoder", steps=AUDITED + 1, optim=optim), model, mixed_data(), say=told.append)
    assert not [line for line in told if "not judged" in line]
    assert (model.encoders["image"].tower.layers[0].self_attn.k_proj.bias == 3.0).all()


def test_updates_below_the_precision_of_the_weights_are_told(tmp_path: Path) -> None:
    model = fresh()
    model.decoder.to(torch.bfloat16)
    optim = OptimConfig(lr=1e-7, warmup_steps=0)
    run = settings(tmp_path, "decoder", steps=8, precision="bf16", optim=optim)
    with pytest.raises(TrainingError, match=r"did not move .*too small for bfloat16"):
        train(run, model, Steps(lambda step: [text(step)]))


@pytest.mark.parametrize("rows", [slice(None), slice(7, 8), slice(-1, None)])
def test_a_frozen_tensor_of_which_any_row_moves_is_told_before_the_fifth_step(tmp_path: Path, rows: slice) -> None:
    model, data = fresh(), mixed_data()

    def nudge(trained: Mapping[str, nn.Parameter]) -> None:
        with torch.no_grad():
            model.decoder.embed_tokens.weight[rows].add_(1e-2)

    with pytest.raises(TrainingError, match=r"embed_tokens.weight is frozen and moved in the first 4 steps"):
        train(settings(tmp_path, "adapter.vision", steps=8), model, data, engine=Clip(nudge))
    assert data.taken == AUDITED


def test_frozen_tensors_are_looked_at_once_all_that_trains_was_judged(tmp_path: Path) -> None:
    model, data = fresh(), Steps(lambda step: [text(step)])

    def nudge(trained: Mapping[str, nn.Parameter]) -> None:
        if data.taken == AUDITED:
            model.encoders["image"].state_dict()["line_end"].add_(1e-2)

    with pytest.raises(TrainingError, match=r"encoders.image.line_end is frozen and moved"):
        train(settings(tmp_path, "decoder", steps=8), model, data, engine=Clip(nudge))
    assert data.taken == AUDITED


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool])
@pytest.mark.parametrize("count", [0, 1, 3, 8, 1000])
def test_a_sum_of_bits_changes_with_any_one_number(kind: torch.dtype, count: int) -> None:
    whole = torch.arange(count + 1).to(kind)
    own = whole[1:]  # begins at an odd place
    before = bit_sum(own)
    for place in range(count):
        kept = own[place].clone()
        own[place] = 1 - kept.long() % 2
        changed = not torch.equal(own[place], kept)
        assert (bit_sum(own) != before) == changed
        own[place] = kept
    assert bit_sum(own) == before


def test_one_frozen_number_that_moves_late_is_told_at_the_end(tmp_path: Path) -> None:
    model, data = fresh(), mixed_data()

    def nudge(trained: Mapping[str, nn.Parameter]) -> None:
        if data.taken == 6:
            model.decoder.embed_tokens.weight.data[17, 3] += 1e-3

    told = r"frozen has moved while training: decoder.embed_tokens.weight is not what it was"
    with pytest.raises(TrainingError, match=told):
        train(settings(tmp_path, "adapter.vision", steps=8), model, data, engine=Clip(nudge))


def test_a_rate_scale_of_no_trained_part_is_refused(tmp_path: Path) -> None:
    optim = OptimConfig(warmup_steps=0, lr_scale={"image.*": 0.5})
    with pytest.raises(ConfigError, match=r"'image.\*' matches no part that trains; these do: adapter.vision"):
        train(settings(tmp_path, "adapter.vision", optim=optim), fresh(), mixed_data())
