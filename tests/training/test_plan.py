from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from modalora.cli.main import app
from modalora.config import RunConfig, load_run, load_stages, parse
from modalora.config.recipes import RECIPES
from modalora.contracts import IGNORED, Batch, Route
from modalora.errors import CheckpointError, ConfigError, DataError, InputError, TrainingError
from modalora.models.multimodal import ModelConfig, Multimodal, part_of
from modalora.models.sizes import nano, phi4_multimodal, tiny
from modalora.nn import blockwise, loss, shown
from modalora.training.estimate import estimate, plan_reading
from modalora.training.meter import Meter
from modalora.training.objectives import OBJECTIVES, Cells
from modalora.training.optimizer import freeze
from modalora.training.plan import plan_run, plan_step, shaped_batch
from modalora.training.start import make_mixture, open_context

ROOT = Path(__file__).parents[2]
MIXED = ["text=40,image=100x80", "text=30", "text=20,audio=1.5"]


def run_of(**fields: Any) -> RunConfig:
    basis = {"init": "tiny", "output": "x", "train": ["adapter.*"], "mixture": [{"source": "books"}], "steps": 4}
    return parse(RunConfig, {**basis, **fields}, "test")


def test_a_plan_counts_what_trains_as_the_loop_freezes_it() -> None:
    plan = plan_step(tiny(), run_of(train=["adapter.vision", "image.encoder"]), [shaped_batch(tiny(), MIXED, 3)])
    model = Multimodal(tiny())
    trained = freeze(model, ["adapter.vision", "image.encoder"])
    assert plan.trained == sum(parameter.numel() for parameter in trained.values())
    assert plan.numbers == sum(parameter.numel() for parameter in model.parameters())
    assert {part.name for part in plan.parts if part.trained} == {"adapter.vision", "image.encoder"}
    assert {part.name for part in plan.parts} == {part_of(name) for name, _ in model.named_parameters()}


def test_weights_gradients_and_moments_are_four_bytes_a_number_each() -> None:
    plan = plan_step(tiny(), run_of(train=["decoder"]), [shaped_batch(tiny(), ["text=30"], 2)])
    (decoder,) = [part for part in plan.parts if part.name == "decoder"]
    assert decoder.gradients == decoder.weights == 4 * decoder.numbers
    assert 2 * decoder.weights <= decoder.optimizer <= 2.01 * decoder.weights  # and a step count per tensor


def test_the_largest_micro_batch_makes_the_peak_and_all_make_the_work() -> None:
    short, long = (shaped_batch(tiny(), [f"text={tokens}"], 2) for tokens in (20, 600))
    plan = plan_step(tiny(), run_of(train=["decoder"]), [short, short, short, long])
    alone, few = (
        plan_step(tiny(), run_of(train=["decoder"]), [long]),
        plan_step(tiny(), run_of(train=["decoder"]), [short]),
    )
    assert alone.step <= plan.step < 1.3 * alone.step + alone.gradients  # gradients of the others are there already
    assert plan.flops == pytest.approx(alone.flops + 3 * few.flops, rel=0.1)
    assert plan == plan_step(tiny(), run_of(train=["decoder"]), [long, short, short, short])


def test_blank_rows_take_the_route_of_the_runs_sources() -> None:
    """Rows of text use no adapter by themselves: nothing would be counted for one that learns from text."""
    sources = [{"source": "books", "route": "speech"}, {"source": "books"}]
    plan, _ = plan_run(run_of(train=["adapter.speech"], mixture=sources, rows=4), ["text=30"])
    (adapter,) = [part for part in plan.parts if part.name == "adapter.speech"]
    assert adapter.gradients == adapter.weights
    batch = shaped_batch(tiny(), ["text=30"], 3, routes=["speech", "auto"])
    assert batch.route.adapters == ("speech", None, "speech")


@pytest.mark.parametrize("budget", [{"tokens": 240}, {"rows": 5}])
def test_texts_stand_in_for_data_as_long_as_their_windows_and_in_their_shares(budget: dict[str, int]) -> None:
    sources = [{"source": "books", "window": 24, "weight": 2}, {"source": "books", "name": "long", "window": 120}]
    weigh = "tokens" if "tokens" in budget else "rows"
    run = run_of(train=["decoder"], mixture=sources, accumulate=6, weigh=weigh, data="/nowhere", **budget)
    plan, told = plan_run(run)
    assert told.startswith("rows of text=120 and text=24 in their shares, as its data were not opened")
    # a third of 1,440 tokens are 4 long rows, the others 40 short ones; a third of 30 rows are 10
    wanted = (44, 1440) if weigh == "tokens" else (30, 10 * 120 + 20 * 24)
    assert (plan.rows, plan.tokens) == wanted


def pictures_with_cells() -> Batch:
    batch = shaped_batch(tiny(), ["text=8,image=100x80"], 4)
    media = []
    for item in batch.media:
        cells, counts = torch.zeros(item.tokens, 3).long(), torch.ones(item.tokens, 2, Cells.COUNTS // 2).long()
        cells[::3] = IGNORED  # separators
        media.append(replace(item, features={**item.features, "cells": cells, "counts": counts}))
    return replace(batch, media=tuple(media))


@pytest.mark.parametrize(
    ("part", "objective", "batch"),
    [
        ("decoder", "next_token", shaped_batch(tiny(), ["text=200"], 4)),
        ("audio.encoder", "ctc", shaped_batch(tiny(), ["text=6,audio=4"], 4)),
        ("image.encoder", "cells", pictures_with_cells()),
    ],
)
def test_what_lives_in_a_step_is_what_an_allocator_counts(part: str, objective: str, batch: Batch) -> None:
    # The same step on real tensors: the profiler reports every byte that the allocator gives and takes.
    config, run = tiny(), run_of(train=[part], precision="fp32", objective=objective)
    plan = plan_step(config, run, [batch])
    model = Multimodal(config)
    freeze(model, run.train)
    objectives = OBJECTIVES[objective](model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        objectives(model, batch).values.mean().backward()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    # both count gradients and what the step holds; kernels take scratch space of their own, which only one sees
    told = plan.step + plan.gradients
    assert 0.9 < told / peak < 1.1


@pytest.mark.parametrize("objective", ["ctc", "cells"])
def test_rows_by_shape_are_refused_where_an_objective_needs_more(objective: str) -> None:
    run = run_of(train=["audio.encoder"], objective=objective, data="/nowhere")
    with pytest.raises(ConfigError, match=f"objective={objective} learns from what its own sources write"):
        plan_run(run, ["text=20,audio=2"])
    with pytest.raises(ConfigError, match=r"not opened: init=tiny has no tokenizer.* /nowhere/books/train.par"):
        plan_run(run)


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ("ctc", "row .*: objective=ctc learns from one sound and what is said in it, and the row holds image"),
        ("cells", "row .*: objective=cells learns what lies in the cells of a picture"),
    ],
)
def test_rows_that_an_objective_cannot_learn_from_are_refused_as_in_training(objective: str, told: str) -> None:
    rows = f"mixture.0.options.path={ROOT}/examples/finetune/rows.jsonl"
    run = load_run(RECIPES / "finetune-media.yaml", [f"objective={objective}", rows])
    with pytest.raises(DataError, match=told):
        plan_run(run)


@pytest.mark.data
@pytest.mark.parametrize(("recipe", "labels"), [("nano-3-eyes", False), ("nano-4-ears", True)])
def test_stages_that_train_an_encoder_alone_are_planned(recipe: str, labels: bool, data_folder: Path) -> None:
    plan, source = plan_run(load_run(RECIPES / f"{recipe}.yaml", [f"data={data_folder}", "rows=2"]), size="nano")
    assert source == "the fullest of a few steps of its data"
    assert plan.rows == 2
    assert bool(plan.labels) == labels
    assert {part.name for part in plan.parts if part.trained} > {"objective"}


@pytest.mark.data
def test_every_stage_of_a_chain_is_planned_with_rows_of_its_own(data_folder: Path, tmp_path: Path) -> None:
    small = [f"data={data_folder}", f"output={tmp_path}", "tokens=0", "rows=2"]
    for title, run in load_stages(RECIPES / "chain-nano.yaml", small).runs.items():
        plan, source = plan_run(run, size="bundled/nano")  # none of the models before it is there
        assert source == "the fullest of a few steps of its data", title
        assert plan.rows == 2


@pytest.mark.parametrize("rows", [["text=700"], ["text=700", "text=90", "text=1"]])
def test_a_few_tiles_stand_for_all(rows: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in ((blockwise, "TILE", 64), (blockwise, "BYTES", 2**12), (blockwise, "MOST", 2**14)):
        monkeypatch.setattr(module, name, value)  # many tiles of so few tokens
    monkeypatch.setattr(loss, "TOKENS", 64)
    run, batch = run_of(train=["decoder"]), shaped_batch(tiny(), rows, len(rows))
    few = plan_step(tiny(), run, [batch])
    monkeypatch.setattr(shown, "SHOWN", 10**9)
    every = plan_step(tiny(), run, [batch])
    # all but the part of tiles that autograd frees at other moments
    assert few.peak == pytest.approx(every.peak, rel=0.002)
    assert few.flops == pytest.approx(every.flops, rel=0.002)  # the last tokens of a loss are filled up to eight


@pytest.mark.parametrize("ring", [1, 2])
def test_processes_that_share_tokens_share_what_a_step_holds(ring: int) -> None:
    batch = shaped_batch(nano(), ["text=900"], 2)
    one, two, four = (
        plan_step(nano(), run_of(train=["decoder"], precision="fp32", mesh=mesh), [batch])
        for mesh in ({}, {"sequence": 2, "ring": ring}, {"sequence": 4, "ring": ring})
    )
    # of the activations half and a quarter; chunks of the loss and tiles of attention are no smaller
    assert 0.4 < two.step / one.step < 0.6
    assert 0.15 < four.step / one.step < 0.35
    assert one.weights == two.weights == four.weights
    if ring == 1:  # a ring computes attention once more
        assert two.flops == pytest.approx(one.flops, rel=0.01)
    assert not dist.is_initialized()


def test_media_are_planned_for_processes_that_share_tokens() -> None:
    batch = shaped_batch(tiny(), ["text=30,image=200x100", "text=20,audio=2"], 2)
    one, two = (plan_step(tiny(), run_of(mesh=mesh), [batch]) for mesh in ({}, {"sequence": 2}))
    assert two.media_tokens == one.media_tokens > 0
    # the encoders' inputs and what they hold are as much on each: every process encodes all media of its rows
    assert 0.4 < two.step / one.step < 1


def test_a_mesh_that_cannot_be_planned_is_refused() -> None:
    batch = shaped_batch(tiny(), ["text=30"], 2)
    with pytest.raises(ConfigError, match="mesh.tensor=2 is not planned; plan without it"):
        plan_step(tiny(), run_of(mesh={"tensor": 2}), [batch])
    run = run_of(mesh={"sequence": 2})
    plan = plan_step(tiny(), run, [batch])
    with pytest.raises(ConfigError, match="plan for a multiple of so many, --count 2"):
        estimate(plan, run, "h100", 3, 0.4, 0)
    assert estimate(plan, run, "h100", 4, 0.4, 0).memory < plan.peak


def test_a_longer_row_needs_more_and_recognises_media() -> None:
    config, run = tiny(), run_of()
    short = plan_step(config, run, [shaped_batch(config, ["text=20,audio=1"], 1)])
    long = plan_step(config, run, [shaped_batch(config, ["text=20,audio=4,image=200x100"], 1)])
    assert long.media_tokens > short.media_tokens > 0
    assert long.step > 2 * short.step
    assert long.flops > 2 * short.flops


def test_bfloat16_weights_take_half_and_what_trains_stays_in_float32() -> None:
    config, batch = tiny(), shaped_batch(tiny(), ["text=20"], 1)
    single, half = (plan_step(config, run_of(), [batch], dtype) for dtype in (torch.float32, torch.bfloat16))
    for part, whole in zip(half.parts, single.parts, strict=True):
        assert part.weights == (whole.weights if part.trained else whole.weights // 2)


def test_a_plan_carries_out_the_options_that_save_memory() -> None:
    batch = shaped_batch(nano(), ["text=200"], 2)
    plain, again, small = (
        plan_step(nano(), run_of(**more), [replace(batch, route=Route(("vision", "vision")))])
        for more in ({}, {"recompute": True}, {"base_bits": 4, "optim": {"state_bits": 8}})
    )
    assert again.step < 0.6 * plain.step
    assert small.weights < 0.6 * plain.weights
    assert small.optimizer < 0.6 * plain.optimizer  # of 8,192 numbers and fewer all bits are kept


@pytest.mark.parametrize("shape", ["text", "text=a", "image=3", "video=3", "audio=x", "", "image=50x50,,text=4"])
def test_a_row_shape_that_is_none_is_refused(shape: str) -> None:
    with pytest.raises(ConfigError, match="row shape"):
        shaped_batch(tiny(), [shape], 1)
    with pytest.raises(ConfigError, match="row shape"):
        shaped_batch(ModelConfig(decoder=tiny().decoder), ["image=100x100"], 1)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ("text=100000000", "a row of 100,000,000 tokens: the model reads at most"),
        (f"text={'9' * 5000}", "row shape"),
        ("image=60000x60000", "at most 50,000,000 pixels are read"),
        (f"image=1x{'9' * 400}", "row shape"),
        ("audio=99999999999", "at most 1,800 s are read"),
    ],
)
def test_a_row_that_no_model_reads_is_refused_before_it_is_made(shape: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        shaped_batch(tiny(), [shape], 1)


def test_shares_of_a_plan_fall_with_the_machines_and_a_step_does_not() -> None:
    run = run_of(train=["decoder"])
    plan = plan_step(tiny(), run, [shaped_batch(tiny(), ["text=30"], 2)])
    one, four = (estimate(plan, run, "h100", count, 0.5, 2.0) for count in (1, 4))
    assert one.memory == plan.peak
    assert plan.step < four.memory < one.memory
    assert one.rate == pytest.approx(0.5 * 989e12)
    assert four.run_seconds == pytest.approx(one.run_seconds / 4)
    assert one.price == pytest.approx(2.0 * one.run_seconds / 3600)
    assert one.fits
    assert not estimate(replace(plan, step=10**12), run, "h100", 4, 0.5, 0).fits
    moments, gradients, weights = plan.optimizer, plan.gradients, plan.weights
    for more, kept in (
        ({"mesh": {"replicate": 4}}, weights + gradients + moments),
        ({"mesh": {"replicate": 2}}, (weights + gradients + moments) // 2),
        ({"engine": "zero1"}, weights + gradients + moments // 4),
        ({"engine": "zero2"}, weights + (gradients + moments) // 4),
        ({"engine": "zero3"}, (weights + gradients + moments) // 4),
    ):
        assert estimate(plan, run_of(train=["decoder"], **more), "h100", 4, 0.5, 0).memory == plan.step + kept
    with pytest.raises(ConfigError, match="do not make up 4 processes"):
        estimate(plan, run_of(train=["decoder"], mesh={"replicate": 3}), "h100", 4, 0.5, 0)
    with pytest.raises(ConfigError, match="rtx4090"):
        estimate(plan, run, "h1000", 1, 0.5, 0)


def test_what_operations_move_is_what_they_read_and_write() -> None:
    fake = FakeTensorMode()
    with fake:
        x, y, row, table = (torch.empty(shape) for shape in ((64, 32), (32, 16), (16,), (1000, 16)))
    product, ids = 64 * 32 + 32 * 16 + 64 * 16, torch.tensor([3, 5])
    for work, numbers in (
        (lambda: x @ y, product),
        (lambda: x.T.view(8, 4, 64)[1:], 0),
        (lambda: torch.empty_like(x), 0),
        (lambda: row.expand(64, 16) + 1, 16 + 64 * 16),  # an expanded row lies there once
        (lambda: x.add_(1), 2 * 64 * 32),
        (lambda: torch.nn.functional.embedding(ids, table), 2 * 2 * 16),
    ):
        with Meter(fake) as meter:
            work()
        assert meter.moved == 4 * numbers


def test_the_time_on_this_machine_is_that_of_products_and_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_step(tiny(), run_of(), [shaped_batch(tiny(), ["text=30"], 2)])
    monkeypatch.setattr("modalora.training.machines.measured_rate", lambda precision: 1e9)
    monkeypatch.setattr("modalora.training.estimate.measured_bandwidth", lambda: 1e6)
    found = estimate(plan, run_of(), "this", 1, 0.4, 0)
    assert found.step_seconds == pytest.approx(plan.flops / 1e9 + plan.moved / 1e6)
    assert "memory 0.001 GB/s" in found.assumption


def test_the_fullest_rows_of_all_phases_are_planned(tmp_path: Path) -> None:
    for name, words in (("short", 5), ("long", 200)):
        texts = [json.dumps({"text": " ".join(f"word{(n * k) % 89}" for k in range(words))}) for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
    short, long = (
        {"source": "files", "name": name, "options": {"path": str(tmp_path / f"{name}.jsonl")}}
        for name in ("short", "long")
    )
    basis = {"init": "bundled/nano", "train": ["decoder"], "rows": 2, "window": 256, "cache": str(tmp_path / "cache")}
    early, _ = plan_run(run_of(**basis, mixture=[short]))
    both, _ = plan_run(
        run_of(**basis, mixture=[{**short, "weight": {0: 1, 0.9: 0}}, {**long, "weight": {0: 0, 0.9: 1}}])
    )
    assert both.tokens > 4 * early.tokens
    for steps in (5, 80):
        run = run_of(**basis, mixture=[{**short, "epochs": 2}], steps=steps, optim={"warmup_steps": 0})
        assert plan_run(run)[0].steps == min(steps, 40)
    packed = {**basis, "tokens": 100, "rows": 16, "mixture": [{**short, "epochs": 2}], "steps": 800}
    run = run_of(**packed)
    mixture = make_mixture(run, open_context(run))
    taken = sum(1 for _ in iter(mixture.take, []))
    assert plan_run(run)[0].steps == pytest.approx(taken, rel=0.1)
    (tmp_path / "short.jsonl").write_text('{"text": ""}\n')
    bad = {**short, "epochs": 1, "options": {**short["options"], "form": "text"}}
    assert "they hold no row that can be used" in plan_run(run_of(**basis, mixture=[bad]))[1]
    with pytest.raises(TrainingError, match="1 of 1 rows are bad, more than quarantine_most=0 of them"):
        plan_run(run_of(**basis, mixture=[bad], quarantine_most=0))
    (tmp_path / "short.jsonl").write_text("\n".join([json.dumps({"text": "a few words"})] * 40))
    with pytest.raises(ConfigError, match="from 90% of the run on no source has a weight"):
        plan_run(run_of(**basis, mixture=[{**short, "weight": {0: 1, 0.9: 0}}]))
    for change, told in (
        ({"preserve": ["nope"]}, "preserve: 'nope' matches no part"),
        ({"optim": {"lr_scale": {"adapter.nope": 2}}}, "lr_scale: 'adapter.nope' matches no part"),
        ({"steps": 20}, "warmup_steps=50 is not shorter than the run"),
        ({"mixture": [{**short, "window": 4096}]}, "window=4096 of source 'short'"),
    ):
        with pytest.raises(ConfigError, match=told):
            plan_run(run_of(**{**basis, "mixture": [short], **change}))


def test_reading_with_phi4_mini_takes_the_bytes_of_its_weights_and_128_kb_a_token() -> None:
    found = plan_reading("phi4-mini", "h100")
    assert found.weights == {"decoder": 2 * 3_836_021_760}
    assert found.cache_per_token == 2 * 32 * 8 * 128 * 2
    assert found.lines[-1].tokens == 131_072
    assert found.lines[-1].cache == 131_072 * found.cache_per_token
    assert [line.decode_rate for line in found.lines] == sorted(
        (line.decode_rate for line in found.lines), reverse=True
    )


def test_plan_prints_a_table_or_json() -> None:
    arguments = ["plan", "nano-6-vision", "init=tiny", "rows=2", "--row", "text=20,image=90x90"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "adapter.vision" in shown.output
    assert "numbers train" in shown.output
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert told["plan"]["rows"] == 2
    assert told["estimate"]["memory"] == told["plan"]["peak"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--row", "text=10"], "the optimizer is the most, 30.7 GB before they are shared: try more of --count"),
        (["--row", "text=120000", "rows=1"], "the step itself is the most: try recompute=true, shorter rows, or mesh."),
    ],
)
def test_a_plan_that_does_not_fit_says_what_would(more: list[str], told: str) -> None:
    recipe = ["mixture=[{source: books}]", "train=[decoder]", "init=phi4-mini", "precision=fp32", "optim.name=adamw"]
    shown = CliRunner().invoke(app, ["plan", "nano-1-base", *recipe, "--machine", "rtx4090", *more])
    assert shown.exit_code == 0, shown.output
    assert f"it does not fit: rtx4090 has 24 GB; {told}" in shown.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["finetune-text", "--sequence", "4", "--link", "3"], "--sequence and --link without --lengths would change"),
        (["nano", "--alignment", "512"], "--alignment without --lengths would change nothing"),
        (["finetune-text", "mixture.0.options.path=no.jsonl"], "path: 'no.jsonl' matches no file"),
        (["chain-phi4", "vision-1-align.mixture.0.options.path=[no.jsonl]"], "path: 'no.jsonl' matches no file"),
    ],
)
def test_what_would_not_be_planned_as_it_was_typed_is_refused(arguments: list[str], told: str) -> None:
    shown = CliRunner().invoke(app, ["plan", *arguments])
    assert told in str(shown.exception)
    assert isinstance(shown.exception, InputError)


def test_a_chain_is_planned_as_one_list_in_json(tmp_path: Path) -> None:
    own = "mixture: [{source: books}]\ntrain: [decoder]\nsteps: 2\nrows: 2\ninit: tiny\noutput: out\n"
    (tmp_path / "own.yaml").write_text(own)
    (tmp_path / "chain.yaml").write_text(
        f"init: tiny\noutput: {tmp_path}/out\nstages: [{{recipe: own.yaml, name: a}}, {{recipe: own.yaml, name: b}}]\n"
    )
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "chain.yaml"), "--row", "text=9", "--json"])
    assert [one["run"] for one in json.loads(shown.output)] == ["a", "b"]


def test_the_published_sizes_are_planned_without_memory() -> None:
    config = phi4_multimodal()
    with torch.device("meta"):
        model = Multimodal(config)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    small = replace(config, decoder=replace(config.decoder, num_hidden_layers=1), vision=nano().vision, speech=None)
    small = replace(small, adapters={"vision": config.adapters["vision"]})
    run = run_of(init="phi4-multimodal", train=["adapter.vision"], rows=1)
    plan = plan_step(small, run, [shaped_batch(small, ["text=64,image=120x120"], 1)], torch.bfloat16)
    assert plan.weights > 1_200_000_000  # 200,064 words of 3,072 in two bytes, and a layer


def test_a_run_whose_start_is_not_there_yet_is_told_to_name_a_size() -> None:
    with pytest.raises(
        CheckpointError, match=r"no model folder 'runs/none'.*; or name a size to plan with, init=phi4-mini"
    ):
        plan_run(run_of(init="runs/none"))


def test_the_parts_of_a_plan_hold_all_of_its_weights() -> None:
    for more in ({}, {"base_bits": 4}):
        plan = plan_step(nano(), run_of(**more), [shaped_batch(nano(), ["text=20"], 1)])
        assert sum(part.weights for part in plan.parts) == plan.weights


def test_a_plan_has_the_modalities_adapters_and_limits_that_the_run_adds() -> None:
    run = run_of(init="tiny", train=["adapter.more"], adapters={"more": {"r": 2, "lora_alpha": 4}})
    plan, _ = plan_run(run, ["text=20"])
    assert {part.name for part in plan.parts if part.trained} == {"adapter.more"}
    few, many = (plan_run(run_of(media=media), ["image=300x300"])[0] for media in ({"max_crops": 1}, {}))
    assert few.media_tokens < many.media_tokens
    sources = [{"source": "books"}, *({"source": "files", "media": {"max_crops": most}} for most in (1, 4))]
    own, two = (plan_run(run_of(mixture=sources[:count]), ["image=300x300"])[0] for count in (2, 3))
    assert few.media_tokens == own.media_tokens < two.media_tokens <= many.media_tokens


def test_what_plans_a_recipe_is_refused_for_a_model() -> None:
    for more in (["steps=3"], ["--row", "text=5"], ["--count", "2"]):
        told = CliRunner().invoke(app, ["plan", "tiny", *more])
        assert isinstance(told.exception, InputError)
