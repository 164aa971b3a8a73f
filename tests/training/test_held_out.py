"""Rows that are scored and never trained on: the right loss, nothing of the training changed, nothing trained on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objectives import sounds
from toys import Steps, assert_same_bits, fresh, mixed, settings, weights

from modalora.checkpoint.store import load_model
from modalora.checkpoint.write import save_model
from modalora.config import RunConfig, SourceConfig, load_stages, parse
from modalora.contracts import Batch
from modalora.data.reader import check_apart, make_source
from modalora.data.sources import SCORED
from modalora.errors import ConfigError, DataError, TrainingError
from modalora.processing.chat import FORMATS
from modalora.processing.tokenizer import TextTokenizer
from modalora.training.held_out import open_held_out
from modalora.training.loop import train
from modalora.training.plan import plan_run
from modalora.training.run import run_recipe
from modalora.training.signals import Interrupted
from modalora.training.start import open_context

Run = Callable[..., tuple[int, str, str]]
EVAL = {"eval_mixture": [SourceConfig(source="books")], "eval_every": 2, "steps": 5}
PARTS = ("adapter.*", "audio.*", "decoder")  # the speech adapter has dropout


def data(step: int) -> list[Batch]:
    return [mixed(step).select([0, 1]), mixed(step).select([2, 3])]


class Held(Steps):
    """Three micro-batches of two sources. at: done when the one of a number, over all scorings, is taken."""

    def __init__(
        self, make: Callable[[int], Batch] = mixed, at: Mapping[int, Callable[[], None]] | None = None
    ) -> None:
        names = ("one:0", "two:0", "one:1", "two:1")
        super().__init__(
            lambda step: (
                [replace(own, samples=names[: len(own.lengths)])] if (own := make(70 + step)) and step < 3 else []
            )
        )
        self.at, self.asked = at or {}, 0

    def take(self) -> list[Batch]:
        self.asked += 1
        self.at.get(self.asked, lambda: None)()
        torch.rand(3)  # as sources of others may
        return super().take()


def lines(folder: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "labels_per_second", "remaining_seconds", "memory_mb")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in found]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scoring_changes_no_bit_of_the_training(tmp_path: Path, precision: str) -> None:
    alone, scored = fresh(), fresh()
    plain = settings(tmp_path / "alone", *PARTS, steps=5, precision=precision, dropout={"audio.encoder": 0.2})
    train(plain, alone, Steps(data))
    own = plain.model_copy(update={**EVAL, "output": str(tmp_path / "scored")})
    train(own, scored, Steps(data), held_out=Held())
    assert_same_bits(weights(alone), weights(scored))
    assert [line for line in lines(tmp_path / "scored") if "lr" in line] == lines(tmp_path / "alone")
    told = [line for line in lines(tmp_path / "scored") if "eval_loss" in line]
    assert [line["step"] for line in told] == [0, 2, 4, 5]
    assert not torch.equal(alone.decoder.embed_tokens.weight, fresh().decoder.embed_tokens.weight)


def test_the_score_is_the_mean_loss_of_all_labels_as_the_model_will_be_used(tmp_path: Path) -> None:
    model, seen = fresh(), list[dict[str, Any]]()
    run = settings(tmp_path, *PARTS, **EVAL, dropout={"audio.encoder": 0.5})
    last = train(run, model, Steps(data), seen.append, held_out=Held())
    assert not model.training
    values, rows = [], []
    with torch.no_grad():
        for step in range(3):
            losses, places = model.loss(mixed(70 + step))
            values.append(losses)
            rows.append(places)
    every, place = torch.cat(values), torch.cat(rows)
    # the same sums in float64: rows that train nothing are read apart, which moves float32 products' last bits
    assert last["eval_loss"] == pytest.approx(float(every.mean()), abs=1e-6)
    assert last["eval_loss/one"] == pytest.approx(float(every[place % 2 == 0].mean()), abs=1e-6)
    assert last["eval_loss/two"] == pytest.approx(float(every[place % 2 == 1].mean()), abs=1e-6)
    assert last["loss"] == seen[-2]["loss"]  # of the last step, whose line comes before
    assert seen[0] == {key: seen[0][key] for key in ("step", "steps", "eval_loss", "eval_loss/one", "eval_loss/two")}


def test_an_objective_with_a_head_of_its_own_is_scored_too(tmp_path: Path) -> None:
    run = settings(tmp_path, "audio.encoder", objective="ctc", **EVAL)
    told = train(run, fresh(), Steps(lambda step: [sounds(step)]), held_out=Held(sounds))
    assert told["eval_loss"] > 0


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("taken", "step"), [(2, 0), (6, 2), (10, 4), (14, 5)])
def test_a_run_that_is_stopped_while_it_scores_ends_at_once_and_goes_on_the_same(
    tmp_path: Path, taken: int, step: int
) -> None:
    whole, model = fresh(), fresh()
    run = settings(tmp_path / "whole", *PARTS, **EVAL)
    end = train(run, whole, Steps(data), held_out=Held())
    cut = run.model_copy(update={"output": str(tmp_path / "cut")})
    begun = time.monotonic()
    with pytest.raises(Interrupted, match=f"stopped after step {step};" if step else "before the first st") as stopped:
        train(cut, fresh(), Steps(data), held_out=Held(at={taken: ask}))
    assert (stopped.value.exit_code, time.monotonic() - begun < 5) == (0, True)
    states = sorted(path.name for path in (tmp_path / "cut").glob("resume/*"))
    assert states == ([f"{step:08d}"] if step else [])  # one of step 0 would pin the settings of nothing
    told = train(cut, model, Steps(data), held_out=Held())
    assert_same_bits(weights(whole), weights(model))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert {key: told[key] for key in lines(tmp_path / "cut")[-1]} == lines(tmp_path / "whole")[-1]
    again = train(cut, fresh(), Steps(data), held_out=Held(at={1: ask}))  # scored before, and not once more
    assert again == told
    assert (again["loss"], again["eval_loss"]) == (end["loss"], end["eval_loss"])


def test_a_score_that_was_broken_off_is_made_again_whatever_was_logged_before(tmp_path: Path) -> None:
    run = settings(tmp_path / "whole", "decoder", **EVAL, log_every=5)
    train(run, fresh(), Steps(data), held_out=Held())
    cut = run.model_copy(update={"output": str(tmp_path / "cut")})
    with pytest.raises(Interrupted):  # the last line is then the score behind step 2
        train(cut, fresh(), Steps(data), held_out=Held(at={10: ask}))
    train(cut, fresh(), Steps(data), held_out=Held())
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_data_that_end_early_are_scored_at_their_end(tmp_path: Path) -> None:
    train(
        settings(tmp_path, *PARTS, **EVAL), fresh(), Steps(lambda step: data(step) if step < 3 else []), held_out=Held()
    )
    assert [line["step"] for line in lines(tmp_path) if "eval_loss" in line] == [0, 2, 3]


def test_a_score_that_is_not_finite_is_told_and_left_out(tmp_path: Path) -> None:
    def broken(step: int) -> Batch:
        batch = mixed(step)
        picture = replace(
            batch.media[0], features={**batch.media[0].features, "pixels": torch.full((2, 3, 56, 56), torch.nan)}
        )
        return replace(batch, media=(picture, *batch.media[1:]))

    told: list[str] = []
    train(settings(tmp_path, *PARTS, **EVAL), fresh(), Steps(data), say=told.append, held_out=Held(broken))
    assert "behind step 0, of the rows that are not trained on: eval_loss, eval_loss/two is not finite" in told
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "eval_loss/one" in lines(tmp_path)[0]


def test_scores_of_which_none_is_finite_leave_no_line(tmp_path: Path) -> None:
    def broken(step: int) -> Batch:
        batch = mixed(step).select([1])
        pixels = torch.full_like(batch.media[0].features["pixels"], torch.nan)
        return replace(batch, media=(replace(batch.media[0], features={**batch.media[0].features, "pixels": pixels}),))

    for _ in range(2):
        train(settings(tmp_path, "decoder", **EVAL), fresh(), Steps(data), held_out=Held(broken))
        assert all("loss" in line for line in lines(tmp_path))


def test_rows_without_a_label_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the held-out rows have no label to score"):
        train(settings(tmp_path, *PARTS, **EVAL), fresh(), Steps(data), held_out=Steps(lambda step: []))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eval_every": 3}, "eval_every=3 and no row to score; give eval_mixture, or a source of files"),
        ({"eval_rows": 3}, "eval_rows=3 and no row to score"),
        ({"eval_mixture": [SourceConfig(source="books", weight=2)]}, "rows of source 'books' are scored, each once"),
        ({"eval_mixture": [SourceConfig(source="files", name="x", epochs=2)]}, "source 'x' are scored, each once"),
        ({"eval_mixture": [SourceConfig(source="files", options={"held_out": 0.5})]}, "held_out says nothing"),
    ],
)
def test_a_setting_of_scores_without_effect_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        settings(tmp_path, **changes)


def test_rows_are_scored_whenever_a_state_is_saved_unless_told_otherwise(tmp_path: Path) -> None:
    assert settings(tmp_path, eval_mixture=EVAL["eval_mixture"], save_every=7).eval_every == 7
    assert settings(tmp_path, save_every=7).eval_every is None


# ------------------------------------------------------------------------------------------ rows of files

WORDS = "the quick brown fox jumps over the lazy dog and two red boxes one seven three. "


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A model folder, forty pairs to train on, and eight others."""
    tokenizer = TextTokenizer.train([WORDS * 40], 320)
    save_model(fresh(), tokenizer, tmp_path / "start", chat=FORMATS["phi4"])
    for name, count in (("rows", 40), ("others", 8)):
        write(tmp_path / f"{name}.jsonl", [" ".join(WORDS.split()[: 1 + number % 12]) for number in range(count)])
    return tmp_path


def write(path: Path, answers: list[str | None]) -> None:
    told = [{"instruction": f"{path.stem} {number}?", "output": own} for number, own in enumerate(answers)]
    path.write_text("".join(json.dumps(line) + "\n" for line in told))


def recipe(folder: Path, **changes: Any) -> RunConfig:
    fields = {
        "init": str(folder / "start"),
        "output": str(folder / "out"),
        "cache": str(folder / "cache"),
        "train": ["decoder"],
        "mixture": [{"source": "files", "name": "rows", "options": {"path": str(folder / "rows.jsonl")}}],
        "rows": 4,
        "steps": 12,
        "ledger": True,
        "precision": "fp32",
        "log_every": 1,
        "optim": {"warmup_steps": 0},
    }
    return parse(RunConfig, {**fields, **changes}, "a test")


def others(folder: Path, **options: Any) -> list[dict[str, Any]]:
    return [{"source": "files", "name": "others", "options": {"path": str(folder / "others.jsonl"), **options}}]


def keeping(run: RunConfig, share: float, **options: Any) -> RunConfig:
    (source,) = run.mixture
    own = source.model_copy(update={"options": {**source.options, "held_out": share, **options}})
    return run.model_copy(update={"mixture": [own], "eval_every": 5})


@pytest.mark.parametrize("budget", [{}, {"rows": 16, "tokens": 100}], ids=["rows", "tokens"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_no_row_that_is_held_out_is_trained_on(start: Path, shuffle: bool, budget: dict[str, int]) -> None:
    run = keeping(recipe(start, seed=3, **budget), 0.2, shuffle=shuffle)
    (source,) = run.mixture
    run_recipe(run)
    context = open_context(run)
    trained, scored = (make_source(context, source, key) for key in ((3, 0), (SCORED, 0)))
    held_out = {scored.place(number)[1] for number in range(scored.rows or 0)}
    ledger = [json.loads(line) for line in (start / "out" / "ledger.jsonl").read_text().splitlines()]
    seen = {trained.place(int(name.partition(":")[2]))[1] for step in ledger for name in step["samples"]}
    assert (len(held_out), seen & held_out) == (8, set())
    if not budget:
        assert seen | held_out == set(range(1, 41))
    assert shuffle or held_out == set(range(33, 41))
    batches = open_held_out(run, context)
    assert batches is not None
    names = [name for micro in iter(batches.take, []) for batch in micro for name in batch.samples]
    assert sorted(names) == [f"rows:{number}" for number in range(8)]
    assert [line["step"] for line in lines(start / "out") if "eval_loss" in line] == [0, 5, 10, 12]


def test_the_same_rows_are_held_out_whatever_the_seed_and_the_stage(start: Path) -> None:
    context, (source,) = open_context(recipe(start)), keeping(recipe(start), 0.2).mixture
    (whole,) = recipe(start).mixture
    for key in ((0, 0), (5, 0), (0, 3)):
        trained = make_source(context, source, key)
        first, second = ({trained.place(32 * epoch + at)[1] for at in range(32)} for epoch in range(2))
        assert first == second
        assert first == {make_source(context, source, (9, 9)).place(at)[1] for at in range(32)}
        everything = make_source(context, whole, key)
        assert {everything.place(at)[1] for at in range(40)} == set(range(1, 41))


def test_windows_of_text_are_held_out_too(start: Path) -> None:
    (start / "text.txt").write_text(WORDS * 60)
    context = replace(open_context(recipe(start)), window=40)
    source = SourceConfig(source="files", options={"path": str(start / "text.txt"), "held_out": 0.1})
    trained, scored = (make_source(context, source, key) for key in ((0, 0), (SCORED, 0)))
    assert scored.rows == max(1, round(0.1 * (scored.rows + trained.rows)))
    tokens = sum(len(own.row(at).ids) for own in (trained, scored) for at in range(own.rows or 0))
    everything = make_source(context, source.model_copy(update={"options": {"path": str(start / "text.txt")}}), (0, 0))
    assert tokens == sum(len(everything.row(at).ids) for at in range(everything.rows or 0))


def test_a_share_of_less_than_a_row_holds_one(start: Path) -> None:
    (source,) = keeping(recipe(start), 0.01).mixture
    context = open_context(recipe(start))
    assert [make_source(context, source, key).rows for key in ((0, 0), (SCORED, 0))] == [39, 1]


def test_a_share_that_leaves_no_row_is_refused(start: Path) -> None:
    run = keeping(recipe(start), 0.99)
    with pytest.raises(ConfigError, match=r"held_out=0.99 of the 40 rows in .* leaves none to train on; lower it"):
        make_source(open_context(run), run.mixture[0], (0, 0))


@pytest.mark.parametrize("share", [1, -0.1, float("nan"), True, None, "0.0", "0.2"])
def test_a_share_is_a_number_below_one(share: Any) -> None:
    fields = {"source": "files", "name": "own", "options": {"path": "rows.jsonl", "held_out": share}}
    with pytest.raises(ConfigError, match=r"held_out=.* of source 'own' must be a share of its rows, a number from 0"):
        parse(SourceConfig, fields, "a test")


def test_the_same_few_rows_of_each_source_are_scored_by_any_number_of_processes(start: Path) -> None:
    run = keeping(recipe(start, eval_mixture=others(start), eval_rows=5), 0.2)
    context = open_context(run)

    def samples(rank: int, world: int, seed: int = 0) -> list[str]:
        batches = open_held_out(run.model_copy(update={"seed": seed}), context, (rank, world))
        assert batches is not None
        taken = [batch for micro in iter(batches.take, []) for batch in micro]
        first = [name for batch in taken for name in batch.samples if name != "(blank)"]
        batches.restore({**batches.state(), "step": 0, "drawn": 0, "numbers": [0, 0], "pool": []})
        again = [name for micro in iter(batches.take, []) for own in micro for name in own.samples if name != "(blank)"]
        assert again == first
        return first

    alone = samples(0, 1)
    assert sorted(alone) == sorted(f"{name}:{number}" for name in ("others", "rows") for number in range(5))
    assert alone == samples(0, 1, seed=7)
    assert sorted(samples(0, 3) + samples(1, 3) + samples(2, 3)) == sorted(alone)


def test_scored_sources_are_called_as_in_training(start: Path) -> None:
    files = {"source": "files", "options": {"path": str(start / "rows.jsonl")}}
    kept = {**files, "options": {**files["options"], "held_out": 0.2}}
    run = recipe(start, mixture=[files, kept], eval_mixture=[{"source": "files"}, {"source": "books"}])
    assert [source.name for source in run.scored] == ["files", "books", "files.1"]
    run = recipe(start, mixture=[kept], eval_mixture=[{"source": "files"}])
    assert [source.name for source in run.scored] == ["eval.files", "files"]


def test_which_rows_are_scored_does_not_depend_on_what_else_is(start: Path) -> None:
    alone = keeping(recipe(start), 0.5)
    found = []
    for own in (alone, keeping(recipe(start, eval_mixture=others(start)), 0.5)):
        batches = open_held_out(own.model_copy(update={"eval_rows": 3}), open_context(own))
        assert batches is not None
        reader = batches.reader
        found.append([reader.sources[reader.names.index("rows")].place(number) for number in range(3)])
    assert found[0] == found[1]


def test_drawn_rows_that_are_scored_are_others_than_those_that_are_trained_on(start: Path) -> None:
    context = open_context(recipe(start))
    source = SourceConfig(source="pictures", options={"turns": 2})
    trained, scored = (make_source(context, source, key) for key in ((0, 0), (SCORED, 0)))
    assert [trained.row(at).ids for at in range(4)] != [scored.row(at).ids for at in range(4)]
    assert scored.row(1).ids == make_source(context, source, (SCORED, 0)).row(1).ids


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"split": None},
        {"held_out": 0.2},
        {"held_out": 0.1, "tags": False},
        {"held_out": 0.1, "form": "text"},
        {"held_out": 0.1, "rename": {"output": "text"}},
    ],
)
def test_a_file_that_is_trained_on_is_not_scored(start: Path, more: dict[str, Any]) -> None:
    own = keeping(recipe(start), 0.1)
    again = own.mixture[0].model_copy(update={"options": {"path": str(start / "rows.jsonl"), **more}})
    twice = own.model_copy(update={"mixture": [*own.mixture, again]})
    if "tags" in more:  # of the same rows
        assert open_held_out(twice, open_context(own)) is not None
        return
    with pytest.raises(ConfigError, match=r"rows.jsonl is scored, and a source of mixture trains on it"):
        open_held_out(twice, open_context(own))
    if not more:
        with pytest.raises(ConfigError, match=r"rows.jsonl is scored, and a source of mixture trains on it"):
            run_recipe(own.model_copy(update={"eval_mixture": [again]}))


def test_books_whose_texts_are_trained_on_are_not_scored(start: Path) -> None:
    texts, other = ({"source": "documents", "options": {"rows": "short", **more}} for more in ({}, {"split": "test"}))
    check_apart(recipe(start, mixture=[texts]).mixture, recipe(start, eval_mixture=[other]).scored)
    texts["window"] = 64  # other rows of the same texts
    with pytest.raises(ConfigError, match="split=test of the books is scored, and a source of mixture trains on it"):
        check_apart(recipe(start, mixture=[texts, other]).mixture, recipe(start, eval_mixture=[other]).scored)


def test_bad_rows_are_put_aside_and_the_others_scored(start: Path) -> None:
    write(start / "others.jsonl", ["one", None, "two"])
    run_recipe(recipe(start, eval_mixture=others(start), eval_every=6))
    (bad,) = [json.loads(line) for line in (start / "out" / "quarantine-scored.jsonl").read_text().splitlines()]
    assert (bad["file"], bad["line"]) == (str(start / "others.jsonl"), 2)
    assert not (start / "out" / "quarantine.jsonl").exists()
    assert [line["step"] for line in lines(start / "out") if "eval_loss" in line] == [0, 6, 12]
    write(start / "others.jsonl", [None])
    with pytest.raises(TrainingError, match="no label to score"):
        run_recipe(recipe(start, eval_mixture=others(start), output=str(start / "none")))


def test_adapters_are_routed_as_in_training_on_a_base_in_few_bits(start: Path) -> None:
    fields: dict[str, Any] = {
        "adapters": {"mine": {"r": 4, "lora_alpha": 8}}, "train": ["adapter.mine"], "base_bits": 8, "steps": 12,
        "mixture": [{"source": "files", "route": "mine", "options": {"path": str(start / "rows.jsonl")}}],
        "optim": {"lr": 0.05, "warmup_steps": 0}, "eval_every": 40,
    }  # fmt: skip
    for route in ("mine", "none"):
        scored = [{**others(start)[0], "route": route}]
        run_recipe(recipe(start, **fields, eval_mixture=scored, output=str(start / route)))
    first, last = (line["eval_loss"] for line in lines(start / "mine") if "eval_loss" in line)
    assert last < 0.9 * first
    first, last = (line["eval_loss"] for line in lines(start / "none") if "eval_loss" in line)
    assert last == first


def test_scores_may_be_asked_for_on_the_way(start: Path) -> None:
    told = list[str]()
    run = recipe(start, steps=4)
    run_recipe(run)
    (start / "out" / "model").rename(start / "before")
    run_recipe(run.model_copy(update={"steps": 8, "eval_mixture": [SourceConfig(**others(start)[0])]}), say=told.append)
    assert [line["step"] for line in lines(start / "out") if "eval_loss" in line] == [8]
    assert load_model(start / "out" / "model").notes["last"]["eval_loss"] > 0


# ------------------------------------------------------------------------------------------ what people see


def typed(start: Path, share: float = 0.2) -> list[str]:
    told = recipe(start).model_dump(mode="json", exclude_defaults=True)
    told["mixture"][0]["options"]["held_out"] = share
    (start / "recipe.yaml").write_text(json.dumps({**told, "eval_mixture": others(start), "eval_every": 6}))
    return [str(start / "recipe.yaml")]


def test_the_command_line_shows_plans_and_checks_them(start: Path, run: Run) -> None:
    code, told, _ = run("data", "check", *typed(start))
    assert code == 0
    assert [line.split("  ")[1] for line in told.splitlines() if line.startswith("source ")] == [
        "rows", "others (scored)", "rows (scored)",
    ]  # fmt: skip
    assert [line.split("  ")[1] for line in told.splitlines() if line.startswith("rows  ")] == ["32", "8", "8"]
    code, told, _ = run("plan", *typed(start))
    assert "scored     up to 256 rows of each of others, rows, every 6 steps, 3 times; up to " in told
    code, told, _ = run("plan", *typed(start), "--json")
    planned = json.loads(told)
    seconds, a_row = planned["scores"].pop("seconds"), planned["estimate"]["step_seconds"] / planned["plan"]["rows"]
    assert planned["scores"] == {"rows": 512, "every": 6, "times": 3}
    # all of the decoder trains: forward is a third of a step's products and attention, and every adapter's is less
    assert seconds / (512 * a_row) == pytest.approx(1 / 3, abs=0.01)
    code, told, _ = run("train", *typed(start))
    scores = [line for line in told.splitlines() if "eval_loss " in line]
    assert [line.split("  ")[0] for line in scores] == ["step 0", "step 6", "step 12"]
    assert all("eval_loss/others" in line and "eval_loss/rows" in line for line in scores)
    write(start / "others.jsonl", ["one", None])
    code, told, _ = run("data", "check", *typed(start))
    assert (code, f"bad  {start / 'others.jsonl'}:2" in told) == (1, True)
    code, _, told = run("data", "check", *typed(start), f"eval_mixture.0.options.path={start / 'rows.jsonl'}")
    assert (code, "rows.jsonl is scored, and a source" in told) == (2, True)


def test_a_plan_refuses_what_training_would(start: Path) -> None:
    run = recipe(start, eval_mixture=others(start))
    (start / "others.jsonl").unlink()
    with pytest.raises(DataError, match=r"others.jsonl' matches no file"):
        plan_run(run)
    with pytest.raises(ConfigError, match="leaves none to train on"):
        plan_run(keeping(recipe(start), 0.99))
    for shapes in ([], ["text=20"]):
        with pytest.raises(ConfigError, match=r"rows.jsonl is scored, and a source of mixture trains on it"):
            plan_run(run.model_copy(update={"eval_mixture": run.mixture}), shapes)


def test_a_chain_passes_them_on(start: Path) -> None:
    typed(start)
    stages = "[{recipe: recipe.yaml, name: a}, {recipe: recipe.yaml, name: b, set: {eval_rows: 7}}]"
    (start / "chain.yaml").write_text(f"{{init: x, output: y, set: {{eval_every: 3}}, stages: {stages}}}")
    runs = load_stages(start / "chain.yaml", ["a.eval_rows=2"]).runs
    assert {name: (own.eval_every, own.eval_rows) for name, own in runs.items()} == {"a": (3, 2), "b": (3, 7)}


def test_scores_are_a_second_curve_and_go_to_trackers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    figures = pytest.importorskip("matplotlib.figure")
    run = settings(tmp_path, *PARTS, **EVAL, trackers=["tensorboard"])
    train(run, fresh(), Steps(data), held_out=Held())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from modalora.training.report import plot_metrics

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("eval_loss")] == [0, 2, 4, 5]
    drawn: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.Figure, "savefig", lambda self, *args, **more: drawn.append(self))
        assert plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    curves = {line.get_label(): list(line.get_xdata()) for line in drawn[0].axes[0].get_lines()}
    assert curves["eval_loss"] == [0, 2, 4, 5]
    assert curves["loss"] == [1, 2, 3, 4, 5]
