"""The training loop on a tiny model: what moves, what stays, and that stopping changes nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Steps, assert_same_bits, fresh, mixed, settings, text, weights

from modalora.config import OptimConfig
from modalora.contracts import IGNORED, Batch, Route
from modalora.errors import ConfigError, TrainingError
from modalora.models.multimodal import Multimodal, part_of
from modalora.models.sizes import tiny
from modalora.parallel.engine import Single
from modalora.training.loop import train
from modalora.training.objectives import NextToken
from modalora.training.optimizer import Optimizer, freeze
from modalora.training.signals import Interrupted

# float32 sums in another order, through AdamW's division by a root: worst seen 1.2e-6 at this learning rate
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def test_the_loss_goes_down_and_is_recorded(tmp_path: Path) -> None:
    seen: list[dict[str, object]] = []
    model = fresh()
    run = settings(tmp_path / "run", steps=40, log_every=10, optim=OptimConfig(lr=5e-3, warmup_steps=2))
    last = train(run, model, Steps(lambda step: [text(step)]), seen.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == seen
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert last == lines[-1]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert not model.training


@pytest.mark.parametrize(
    "parts",
    [
        ("adapter.vision",),
        ("adapter.*", "image.projector.*"),
        ("audio.*", "adapter.speech"),
        ("image.encoder",),
    ],
)
def test_only_the_named_parts_move(tmp_path: Path, parts: tuple[str, ...]) -> None:
    model = fresh()
    before = weights(model)
    # weight decay would pull on a frozen part too, if it reached one
    run = settings(tmp_path, *parts, optim=OptimConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1))
    train(run, model, Steps(lambda step: [mixed(step)]))
    idle = ("tower.layers.2", "post_layernorm", "tower.head", "global_")  # stored, never read or not trained
    for name, tensor in weights(model).items():
        named = any(fnmatchcase(part_of(name), part) for part in parts)
        moved = not torch.equal(tensor, before[name])
        assert moved == (named and not any(piece in name for piece in idle)), name


def test_training_adapters_changes_no_bit_of_text(tmp_path: Path) -> None:
    model = fresh().eval()
    batch = text(0)
    with torch.no_grad():
        before = model(batch)
    train(settings(tmp_path, "adapter.*", "image.*", "audio.*"), model, Steps(lambda step: [mixed(step)]))
    with torch.no_grad():
        assert torch.equal(model(batch), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, precision: str, name: str) -> None:
    parts = ("adapter.*", "audio.*", "decoder")
    changes = {"steps": 5, "precision": precision, "optim": OptimConfig(name=name, lr=1e-3, warmup_steps=2)}
    whole = fresh()
    train(settings(tmp_path / "whole", *parts, **changes), whole, Steps(lambda step: [mixed(step)]))

    def interrupted(step: int) -> list[Batch]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return [mixed(step)]

    run = settings(tmp_path / "cut", *parts, **changes)
    with pytest.raises(Interrupted, match="stopped after step 2"):
        train(run, fresh(), Steps(interrupted))
    again = fresh()
    asked: list[int] = []

    def rest(step: int) -> list[Batch]:
        asked.append(step)
        return [mixed(step)]

    train(run, again, Steps(rest))
    assert asked == [2, 3, 4]
    assert_same_bits(weights(whole), weights(again))


def test_signals_are_as_before_once_training_has_ended(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(settings(tmp_path, steps=1), fresh(), Steps(lambda step: [text(step)]))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_run_cannot_go_on_under_other_settings(tmp_path: Path) -> None:
    train(settings(tmp_path, steps=2), fresh(), Steps(lambda step: [text(step)]))
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        train(settings(tmp_path, steps=3, seed=1), fresh(), Steps(lambda step: [text(step)]))


def test_two_micro_batches_are_one_batch_of_all_their_rows(tmp_path: Path) -> None:
    def unequal(step: int) -> Batch:
        batch = text(step)
        assert batch.labels is not None
        labels = batch.labels.clone()
        labels[0, 3:] = IGNORED  # rows of unequal numbers of targets
        return replace(batch, labels=labels)

    one, two = fresh(), fresh()
    train(settings(tmp_path / "one"), one, Steps(lambda step: [unequal(step)]))
    train(
        settings(tmp_path / "two"),
        two,
        Steps(lambda step: [unequal(step).select([0, 1]), unequal(step).select([2, 3])]),
    )
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, **TOLERANCE)


def test_a_step_on_a_mixed_batch_is_the_sum_of_steps_on_its_rows(tmp_path: Path) -> None:
    parts = ("adapter.vision", "image.*", "audio.*")  # without dropout, which draws per call
    # a large eps makes the update linear in the gradient; the clip is out of reach
    optim = OptimConfig(lr=1e-1, warmup_steps=0, eps=1.0, weight_decay=0, clip_norm=1e9)
    one, two = fresh(), fresh()
    train(
        settings(tmp_path / "one", *parts, steps=1, optim=optim), one, Steps(lambda step: [mixed(step).select([1, 3])])
    )
    train(
        settings(tmp_path / "two", *parts, steps=1, optim=optim),
        two,
        Steps(lambda step: [mixed(step).select([row]) for row in (1, 3)]),
    )
    start, ended, other = weights(fresh()), weights(one), weights(two)
    assert any(not torch.equal(start[name], ended[name]) for name in start)
    for name, tensor in ended.items():
        torch.testing.assert_close(other[name], tensor, **TOLERANCE)


def test_a_micro_batch_that_reaches_no_trained_part_adds_nothing(tmp_path: Path) -> None:
    model, told = fresh(), fresh()
    optim = OptimConfig(lr=1e-2, warmup_steps=0, clip_norm=1e9)
    run = settings(tmp_path / "run", "adapter.vision", steps=1, optim=optim)
    train(run, model, Steps(lambda step: [mixed(step).select([0]), mixed(step).select([1])]))
    run = settings(tmp_path / "told", "adapter.vision", steps=1, optim=optim)
    train(run, told, Steps(lambda step: [mixed(step).select([0, 1])]))
    for name, tensor in weights(told).items():
        torch.testing.assert_close(weights(model)[name], tensor, **TOLERANCE)


def test_a_pattern_that_matches_nothing_is_refused_with_the_parts_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'adapter.visoin' matches no part .* adapter.speech, adapter.vision"):
        train(settings(tmp_path, "decoder", "adapter.visoin"), fresh(), Steps(lambda step: [text(step)]))


def poisoned(step: int) -> list[Batch]:
    batch = mixed(step)
    if step == 1:
        for item in batch.media:
            if "mel" in item.features:
                item.features["mel"].fill_(float("nan"))
    return [batch]


def test_a_loss_that_is_not_finite_stops_the_run_and_moves_no_weight(tmp_path: Path) -> None:
    model, told = fresh(), fresh()
    # the same step and the same rate, so that both differ in the poisoned step alone
    train(settings(tmp_path / "told", "adapter.*", steps=1), told, Steps(poisoned))
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan; .*weights are as before"):
        train(settings(tmp_path / "run", "adapter.*", steps=3), model, Steps(poisoned))
    assert_same_bits(weights(model), weights(told))


def test_the_rate_warms_up_and_falls_to_its_share(tmp_path: Path) -> None:
    rates: list[float] = []
    optim = OptimConfig(lr=1.0, warmup_steps=2, final_lr_ratio=0.1, clip_norm=1e-9)
    run = settings(tmp_path, steps=6, optim=optim)
    train(run, fresh(), Steps(lambda step: [text(step)]), lambda metrics: rates.append(metrics["lr"]))
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.1 < rates[-1] < 0.3


def test_a_part_may_learn_at_a_rate_of_its_own(tmp_path: Path) -> None:
    model = fresh()
    before = weights(model)
    optim = OptimConfig(lr=1e-2, warmup_steps=0, weight_decay=0, lr_scale={"image.*": 1e-3})
    train(
        settings(tmp_path, "adapter.vision", "image.projector.*", optim=optim), model, Steps(lambda step: [mixed(step)])
    )
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in weights(model).items()}
    # Adam's steps are about as long as the rate, 4 of them here
    assert 0 < max(moved[name] for name in moved if part_of(name) == "image.projector.vision") < 1e-4
    assert max(moved[name] for name in moved if part_of(name) == "adapter.vision") > 1e-2


def test_losses_are_reported_per_route(tmp_path: Path) -> None:
    seen: list[dict[str, object]] = []
    report: Callable[[dict[str, object]], None] = seen.append
    train(settings(tmp_path, "adapter.*", steps=1), fresh(), Steps(lambda step: [mixed(step)]), report)
    assert {"loss_text", "loss_vision", "loss_speech"} <= set(seen[0])


@pytest.mark.parametrize("route", [None, Route(("speech",) * 4)])
def test_losses_are_reported_by_what_rows_hold_whatever_their_route(tmp_path: Path, route: Route | None) -> None:
    whole = mixed(0) if route is None else replace(mixed(0), route=route)
    kinds = ["text", "image", "audio", "image+audio"]
    told = train(settings(tmp_path / "whole", "adapter.*", steps=1), fresh(), Steps(lambda step: [whole]))
    for row, kind in enumerate(kinds):
        data = Steps(lambda step, row=row: [whole.select([row])])
        alone = train(settings(tmp_path / kind, "decoder", steps=1), fresh(), data)
        assert "loss_of_" not in " ".join(alone)  # of one kind, it would be the loss
        name = f"loss_of_{kind}"
        if route is None:  # a route of its own says it already
            name = {"text": "loss_text", "audio": "loss_speech"}.get(kind, name)
        # a row computes the same alone up to the order of sums: 5e-7 seen
        assert told[name] == pytest.approx(alone["loss"], rel=1e-5)
    assert sum(name.startswith("loss_of_") for name in told) == (2 if route is None else 4)
    assert ("loss_vision" in told) == (route is None)


def test_a_loss_of_some_rows_is_the_mean_over_their_labels_in_all_steps_of_the_line(tmp_path: Path) -> None:
    def own(step: int) -> list[Batch]:  # pictures alone, with sound alone, or both
        batch = replace(mixed(step), route=Route(("vision",) * 4))
        return [batch.select([[1], [3], [1, 3]][step % 3])]

    names = ("loss_of_image", "loss_of_image+audio")
    steps = list[dict[str, Any]]()
    train(settings(tmp_path / "each", "adapter.vision", steps=6), fresh(), Steps(own), steps.append)
    told = train(settings(tmp_path / "all", "adapter.vision", steps=6, log_every=6), fresh(), Steps(own))
    for place, name in enumerate(names):
        labels = [int(own(step)[0].select([0 if step % 3 < 2 else place]).labelled.sum()) for step in range(6)]
        losses = [line.get(name, line["loss"]) for line in steps]
        held = [step for step in range(6) if step % 3 != 1 - place]
        mean = sum(labels[step] * losses[step] for step in held) / sum(labels[step] for step in held)
        assert told[name] == pytest.approx(mean, rel=1e-9)  # the same float64 sums in another order
    assert "loss_vision" not in told  # it would be the loss


def test_states_are_kept_as_the_run_says(tmp_path: Path) -> None:
    train(settings(tmp_path, steps=7, save_every=2, keep=2), fresh(), Steps(lambda step: [text(step)]))
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == ["00000006", "00000007"]


def test_a_run_ends_with_its_data_and_says_so(tmp_path: Path) -> None:
    told: list[str] = []
    last = train(
        settings(tmp_path, steps=9), fresh(), Steps(lambda step: [text(step)] if step < 6 else []), say=told.append
    )
    assert last["step"] == 6
    assert "the data have ended after step 6 of 9" in told
    assert (tmp_path / "resume" / "00000006").is_dir()
    with pytest.raises(TrainingError, match="hold no row to train on"):
        train(settings(tmp_path / "none"), fresh(), Steps(lambda step: []))


def test_rows_that_train_nothing_are_read_apart_and_change_no_loss_and_no_gradient() -> None:
    batches, told = [mixed(0), mixed(1), text(0)], {}
    for name in ("apart", "together"):
        model = fresh()
        trained = freeze(model, ["adapter.*", "image.projector.*"])
        objective, engine = NextToken(model), Single()
        engine.shard(model, objective)
        levelled = engine.level(batches) if name == "apart" else batches
        found = [engine.losses(batch) for batch in levelled]
        for batch, losses in zip(levelled, found, strict=True):
            assert losses.values.requires_grad == (batch.route.adapters[-1] is not None)
            engine.backward(losses.values.sum(), last=True)
        values = torch.cat([losses.values.detach() for losses in found])
        told[name] = values.sort().values, [own.grad for own in trained.values()]
    # the text of both in one, behind the others; never more tokens than a micro-batch had
    assert [batch.route.adapters for batch in engine.level(batches)] == [
        ("vision", "speech", "vision"), ("vision", "speech", "vision"), text(0).route.adapters, (None, None),
    ]  # fmt: skip
    assert [len(batch.lengths) for batch in engine.level(8 * [mixed(0)])] == 8 * [3] + [7, 1]
    # float32: products of other heights round in another way
    torch.testing.assert_close(told["apart"][0], told["together"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(told["apart"][1], told["together"][1], atol=1e-5, rtol=1e-4)


def test_no_row_is_idle_where_the_decoder_learns() -> None:
    model = fresh()
    freeze(model, ["decoder"])
    assert model.idle_rows(mixed(0)) == []


def test_muon_has_matrices_between_hidden_states_alone() -> None:
    sizes = tiny()
    model = Multimodal(replace(sizes, decoder=replace(sizes.decoder, tie_word_embeddings=False)))
    optimizer = Optimizer(freeze(model, ["decoder", "adapter.vision"]), OptimConfig(name="muon"), 10)
    muon, adamw = (
        {optimizer.names[id(own)] for part in optimizer.parts if (type(part).__name__ == "Muon") == is_muon
         for group in part.param_groups for own in group["params"]}
        for is_muon in (True, False)
    )  # fmt: skip
    assert {"decoder.lm_head.weight", "decoder.embed_tokens.weight"} <= adamw
    assert "decoder.layers.0.self_attn.o_proj.weight" in muon
    assert not any("lora_" in name or "head" in name for name in muon)


def test_weights_of_matrices_alone_decay_and_the_last_rate_scale_of_a_part_counts() -> None:
    scales = {"image.*": 1.0, "image.encoder": 0.1, "adapter.vision": 0.5, "adapter.*": 2.0}
    optim = OptimConfig(name="muon", weight_decay=0.3, lr_scale=scales)
    optimizer = Optimizer(freeze(fresh(), ["decoder", "adapter.vision", "image.*"]), optim, 10)
    found = {
        optimizer.names[id(own)]: (type(part).__name__, group["weight_decay"], group["factor"])
        for part in optimizer.parts
        for group in part.param_groups
        for own in group["params"]
    }
    layer = "decoder.layers.0"
    assert found[f"{layer}.input_layernorm.weight"] == ("AdamW", 0.0, 1.0)
    assert found[f"{layer}.self_attn.o_proj.weight"] == ("Muon", 0.3, 1.0)
    assert found[f"{layer}.self_attn.o_proj.lora_A.vision"] == ("AdamW", 0.3, 2.0)
    tower = "encoders.image.tower.layers.0.self_attn.k_proj"
    assert (found[f"{tower}.bias"], found[f"{tower}.weight"]) == (("AdamW", 0.0, 0.1), ("Muon", 0.3, 0.1))
    assert {own[2] for name, own in found.items() if name.startswith("projectors.")} == {1.0}


def test_threads_of_a_run_are_its_own(tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), list[int]()
    for threads in (before + 1, 0):
        train(
            settings(tmp_path / str(threads), "adapter.*", threads=threads, steps=2), fresh(),
            Steps(lambda step: [mixed(step)]), lambda metrics: seen.append(torch.get_num_threads()),
        )  # fmt: skip
    assert seen == [before + 1] * 2 + [before] * 2
    assert torch.get_num_threads() == before
