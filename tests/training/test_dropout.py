"""Dropout of encoders: in training alone, of the encoders named alone, gone afterwards, and the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Steps, assert_same_bits, fresh, mixed, settings, weights

from modalora.errors import ConfigError, TrainingError
from modalora.models.multimodal import Multimodal
from modalora.training.dropout import add_dropout
from modalora.training.fresh import whiten_projectors
from modalora.training.loop import train
from modalora.training.plan import plan_step, shaped_batch

ENCODERS = ("audio.encoder", "image.encoder")


def heard(model: Multimodal, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    mel = torch.randn(37, 80, generator=torch.Generator().manual_seed(5))
    found: Tensor = model.encoders["audio"]([{"mel": mel}])[0]
    return found


def test_training_drops_and_reading_does_not() -> None:
    model = fresh()
    plain = heard(model.eval())
    add_dropout(model, {"audio.encoder": 0.3})
    assert torch.equal(heard(model), plain)
    model.train()
    assert not torch.equal(heard(model), plain)
    assert torch.equal(heard(model), heard(model))
    assert not torch.equal(heard(model), heard(model, seed=1))


def test_every_block_drops_its_share_and_scales_the_rest() -> None:
    model = fresh().train()
    encoder = model.encoders["audio"]
    blocks = [encoder.embed, *encoder.blocks]
    before, after = [], []
    for block in blocks:
        block.register_forward_hook(lambda _block, _given, out: before.append(out))
    add_dropout(model, {"audio.*": 0.25})
    for block in blocks:
        block.register_forward_hook(lambda _block, _given, out: after.append(out))
    for seed in range(20):
        heard(model, seed)
    for out, given in zip(after, before, strict=True):
        torch.testing.assert_close(out, torch.where(out == 0, 0, given / 0.75), atol=1e-6, rtol=1e-6)
    dropped = torch.cat([(out == 0).float().flatten() for out in after])
    assert len(after) == 20 * len(blocks)
    assert abs(float(dropped.mean()) - 0.25) < 5 * (0.25 * 0.75 / len(dropped)) ** 0.5  # five deviations


@pytest.mark.parametrize("part", ENCODERS)
def test_only_the_encoder_that_is_named_drops(part: str) -> None:
    model, batch = fresh().train(), mixed(0)
    add_dropout(model, {part: 0.5})
    dropping = {name for name, module in model.named_modules() if module._forward_hooks}
    kind = part.split(".", maxsplit=1)[0]
    assert dropping
    assert all(name.startswith(f"encoders.{kind}.") for name in dropping)
    torch.manual_seed(0)
    one = model.loss(batch)
    torch.manual_seed(1)
    other = model.loss(batch)
    changed = {int(row) for row in one[1][(one[0] != other[0])]}
    assert changed == ({2, 3} if kind == "audio" else {1, 3})


def test_every_block_of_the_tower_is_among_those_that_drop() -> None:
    model = fresh()
    add_dropout(model, {"image.encoder": 0.1})
    dropping = [name for name, module in model.named_modules() if module._forward_hooks]
    assert [name for name in dropping if ".layers." in name] == [
        f"encoders.image.tower.layers.{place}" for place in range(len(model.encoders["image"].tower.layers))
    ]


class Noisy(nn.Module):
    """An encoder of someone else's: with dropout and running statistics."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.drop, self.norm = encoder, nn.Dropout(0.5), nn.BatchNorm1d(32)

    def forward(self, items: Any) -> list[Tensor]:
        return [self.norm(self.drop(found)) for found in self.encoder(items)]


def noisy() -> Multimodal:
    model = fresh()
    model.encoders["audio"] = Noisy(model.encoders["audio"])
    return model


def test_a_frozen_encoder_runs_as_it_is_read(tmp_path: Path) -> None:
    model = noisy()
    told: dict[str, bool] = {}
    handles = [
        module.register_forward_hook(lambda own, _given, _out, name=name: told.update({name: own.training}))
        for name, module in model.named_modules()
    ]
    run = settings(tmp_path, "audio.projector.speech", "image.encoder", "adapter.*", steps=5)
    train(run, model, Steps(lambda n: [mixed(n)]))
    for handle in handles:
        handle.remove()
    assert not told["encoders.audio.drop"]
    assert not told["projectors.audio.vision"]
    assert told["projectors.audio.speech"]
    assert told["encoders.image"]
    assert torch.equal(model.encoders["audio"].norm.running_mean, torch.zeros(32))
    assert not model.training


def test_running_statistics_in_what_trains_are_told_as_such(tmp_path: Path) -> None:
    told = r"audio\.norm\.\w+ moved in the first 4 steps without a gradient: running statistics \(BatchNorm\)"
    with pytest.raises(TrainingError, match=told):
        train(settings(tmp_path, "audio.*"), noisy(), Steps(lambda n: [mixed(n)]))


def test_a_projector_is_whitened_on_what_its_encoder_reads() -> None:
    one, other = noisy().train(), noisy().eval()
    for model in (one, other):
        whiten_projectors(model, "audio", ["audio.*"], Steps(lambda n: [mixed(n)]))
    assert_same_bits(weights(one), weights(other))
    assert one.encoders["audio"].drop.training


def test_a_block_that_hands_on_more_than_a_tensor_is_named() -> None:
    model = fresh().train()
    model.encoders["audio"].register_module("after", torch.nn.GRU(3, 3))
    add_dropout(model, {"audio.encoder": 0.1})
    with pytest.raises(ConfigError, match="a GRU of the encoder hands on a tuple, and only a tensor"):
        model.encoders["audio"].after(torch.zeros(1, 3))


def test_training_takes_the_dropout_away_again(tmp_path: Path) -> None:
    model = fresh()
    train(settings(tmp_path, "audio.encoder", dropout={"audio.encoder": 0.2}), model, Steps(lambda n: [mixed(n)]))
    assert not [name for name, module in model.named_modules() if module._forward_hooks]


def test_a_resumed_run_drops_what_the_whole_one_did(tmp_path: Path) -> None:
    def run(folder: str, steps: int, dropout: float = 0.2) -> dict[str, Tensor]:
        rates = dict.fromkeys(ENCODERS, dropout)
        own = settings(tmp_path / folder, *ENCODERS, "adapter.*", dropout=rates, steps=steps, save_every=2)
        model = fresh()
        train(own, model, Steps(lambda n: [mixed(n)]))
        return weights(model)

    whole = run("whole", 4)
    run("cut", 2)
    assert_same_bits(run("cut", 4), whole)
    other = run("other", 4, 0.3)
    assert any(not torch.equal(tensor, whole[name]) for name, tensor in other.items())


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ({"vision.encoder": 0.1}, "'vision.encoder' matches no encoder of this model; the model's encoders are"),
        ({"image.encoder": 0.1}, "'image.encoder' is not in train:; the model's encoders are"),
    ],
)
def test_a_rate_that_nothing_would_use_is_refused(tmp_path: Path, rates: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        train(settings(tmp_path, "audio.encoder", dropout=rates), fresh(), Steps(lambda n: [mixed(n)]))


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_lies_between_none_and_all(tmp_path: Path, rate: float) -> None:
    with pytest.raises(ValueError, match="dropout"):
        settings(tmp_path, "audio.encoder", dropout={"audio.encoder": rate})


def test_a_plan_counts_what_dropout_keeps(tmp_path: Path) -> None:
    batch = shaped_batch(fresh().config, ["text=20,audio=1.5"], 2)
    plain, dropped = (
        plan_step(fresh().config, settings(tmp_path, "audio.encoder", dropout=rates), [batch])
        for rates in ({}, {"audio.encoder": 0.2})
    )
    assert dropped.peak > plain.peak
