"""Mixtures: the same rows for any number of workers and processes, from any state, each row once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalora.assistant import make_processor
from modalora.config import RunConfig, SourceConfig, parse
from modalora.contracts import BLANK, IGNORED, Batch
from modalora.data.mixture import Mixture
from modalora.data.order import shuffled
from modalora.data.packing import fill
from modalora.data.quarantine import Quarantine
from modalora.data.reader import make_source
from modalora.data.sources import SOURCES, Context, Kind
from modalora.errors import ConfigError, DataError, TrainingError
from modalora.models.sizes import tiny
from modalora.processing.tokenizer import TextTokenizer
from small import write_books

STORY = (
    "Once upon a time seven blue boxes stood by the wall, and the quick brown fox jumps over every one of them. " * 30
)
TOKENIZER = TextTokenizer.train([STORY], 320)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    folder = tmp_path / "data"
    write_books(folder, STORY)
    return Context(folder, tmp_path / "cache", make_processor(tiny(), TOKENIZER), window=40)


def write_pairs(path: Path, count: int, bad: tuple[int, ...] = ()) -> SourceConfig:
    """A file of questions whose answers have from 1 to 40 words; the bad ones have no answer."""
    words = STORY.split()
    with path.open("w") as file:
        for number in range(count):
            answer = None if number in bad else " ".join(words[: 1 + number * 7 % 40])
            file.write(json.dumps({"instruction": f"Question {number}?", "output": answer}) + "\n")
    return SourceConfig(source="files", name="pairs", options={"path": str(path)})


def everything(context: Context) -> list[SourceConfig]:
    return [
        SourceConfig(source="books", weight=2),
        SourceConfig(source="pictures", options={"turns": 2}),
        write_pairs(context.folder / "pairs.jsonl", 23),
    ]


def samples(batches: list[Batch]) -> list[list[str]]:
    return [list(batch.samples) for batch in batches]


def names(steps: list[list[Batch]]) -> list[str]:
    return [name for step in steps for batch in step for name in batch.samples]


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.input_ids, other.input_ids)
        and one.samples == other.samples
        and one.route == other.route
        and len(one.media) == len(other.media)
        and all(
            torch.equal(a.features["pixels"], b.features["pixels"]) for a, b in zip(one.media, other.media, strict=True)
        )
    )


BUDGETS: list[dict[str, int]] = [{"rows": 3}, {"tokens": 400}]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_run_draws_the_same_rows_every_time(context: Context, budget: dict[str, int]) -> None:
    one, other = (Mixture(context, everything(context), accumulate=2, seed=4, **budget) for _ in range(2))
    taken = [one.take() for _ in range(4)]
    assert all(same(a, b) for step in taken for a, b in zip(step, other.take(), strict=True))
    rows = names(taken)
    assert len(set(rows)) == len(rows)
    assert {name.partition(":")[0] for name in rows} == {"books", "pictures", "pairs"}
    different = Mixture(context, everything(context), accumulate=2, seed=5, **budget).take()
    assert not any(same(a, b) for a, b in zip(taken[0], different, strict=True))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_processes_share_the_micro_batches_of_one_plan(context: Context, budget: dict[str, int]) -> None:
    alone = Mixture(context, everything(context), accumulate=6, **budget)
    whole = [samples(alone.take()) for _ in range(3)]
    for world in (2, 3, 6):
        parts = [
            Mixture(context, everything(context), accumulate=6, rank=rank, world=world, **budget)
            for rank in range(world)
        ]
        for step in whole:
            shares = [samples(part.take()) for part in parts]
            assert [shares[place % world][place // world] for place in range(6)] == step
        assert len({json.dumps(part.state()) for part in parts}) == 1
    with pytest.raises(ConfigError, match="accumulate=6 micro-batches cannot be shared by 4"):
        Mixture(context, everything(context), accumulate=6, rank=0, world=4, **budget)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_any_number_of_processes_goes_on_from_any_state(context: Context, budget: dict[str, int], cut: int) -> None:
    whole = Mixture(context, everything(context), accumulate=2, **budget)
    steps = [samples(whole.take()) for _ in range(6)]
    before = Mixture(context, everything(context), accumulate=2, **budget)
    for _ in range(cut):
        before.take()
    state = json.loads(json.dumps(before.state()))
    halves = [Mixture(context, everything(context), accumulate=2, rank=rank, world=2, **budget) for rank in range(2)]
    for half in halves:
        half.restore(state)
    for step in steps[cut:]:
        assert [samples(half.take())[0] for half in halves] == step


def test_workers_change_nothing(context: Context) -> None:
    alone = Mixture(context, everything(context), tokens=400, accumulate=2)
    helped = Mixture(context, everything(context), tokens=400, accumulate=2, workers=2)
    try:
        first = [helped.take() for _ in range(2)]
        state = helped.state()  # of the steps taken; the workers are ahead of them
        then = [helped.take() for _ in range(2)]
        assert state["step"] == 2
        helped.restore(state)
        again = [helped.take() for _ in range(2)]
    finally:
        helped.close()
    told = [alone.take() for _ in range(4)]
    assert all(same(a, b) for x, y in zip(told, first + then, strict=True) for a, b in zip(x, y, strict=True))
    assert all(same(a, b) for x, y in zip(told[2:], again, strict=True) for a, b in zip(x, y, strict=True))


def test_a_worker_that_dies_ends_the_run_with_its_reason(context: Context) -> None:
    mixture = Mixture(context, everything(context), rows=2, workers=1)
    try:
        mixture.take()
        assert mixture._pool is not None
        (worker,) = mixture._pool._processes
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(TrainingError, match="a worker that prepares rows ended by itself"):
            list(iter(mixture.take, []))  # some steps are ready still
    finally:
        mixture.close()


def test_a_worker_that_never_begins_ends_the_run(tmp_path: Path) -> None:
    """What workers are told is more than a pipe holds, and Python waits for ever to write it to one that has ended."""
    script = tmp_path / "trains.py"
    rows = Path(__file__).parents[2] / "examples" / "finetune" / "rows.jsonl"
    script.write_text(
        "import multiprocessing\nif multiprocessing.current_process().name != 'MainProcess':\n    raise SystemExit(3)\n"
        "from modalora.cli.recipes import find_recipe\nfrom modalora.config import load_run\n"
        "from modalora.training.run import run_recipe\n"
        f"run_recipe(load_run(find_recipe('finetune-media'), ['mixture.0.options.path={rows}', 'steps=2',"
        f" 'workers=1', 'output={tmp_path / 'out'}']))\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 1
    assert "a worker that prepares rows ended by itself" in ran.stderr
    assert "if __name__ == '__main__':" in ran.stderr


@pytest.mark.parametrize("budget", [{"rows": 2}, {"tokens": 300}], ids=str)
@pytest.mark.parametrize("bad", [(), (0, 7, 22)])
def test_every_row_of_every_epoch_is_kept_or_quarantined_once(
    context: Context, tmp_path: Path, budget: dict[str, int], bad: tuple[int, ...]
) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", 23, bad).model_copy(update={"epochs": 3})
    aside = Quarantine(tmp_path / "quarantine.jsonl", most=0.5)
    mixture = Mixture(context, [source], accumulate=2, quarantine=aside, **budget)
    steps: list[list[Batch]] = []
    while step := mixture.take():
        assert len(step) == 2
        steps.append(step)
    kept = [name for name in names(steps) if name != BLANK]
    lines = [json.loads(line) for line in aside.path.read_text().splitlines()] if bad else []
    assert sorted(kept + [line["sample"] for line in lines]) == sorted(f"pairs:{number}" for number in range(69))
    assert Counter(line["line"] for line in lines) == {number + 1: 3 for number in bad}
    assert mixture.take() == []
    assert mixture.state()["quarantined"] == len(lines) == 3 * len(bad)
    # each epoch has every record once, in an order of its own
    opened = mixture.reader.sources[0]
    epochs = [[opened.place(23 * epoch + place)[1] for place in range(23)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1, 24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_quarantine_forgets_what_came_behind_the_state(context: Context, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", 20, bad=tuple(range(0, 20, 4)))
    whole = Quarantine(tmp_path / "whole.jsonl", most=0.5)
    mixture = Mixture(context, [source], rows=4, quarantine=whole)
    for _ in range(8):
        mixture.take()
    cut = Quarantine(tmp_path / "cut.jsonl", most=0.5)
    before = Mixture(context, [source], rows=4, quarantine=cut)
    for _ in range(3):
        before.take()
    state = before.state()
    for _ in range(2):
        before.take()
    with (tmp_path / "cut.jsonl").open("a") as file:
        file.write('{"step": 5, "sam')  # as a process that dies leaves it
    after = Mixture(context, [source], rows=4, quarantine=cut)
    after.restore(state)
    for _ in range(5):
        after.take()
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert after.state() == mixture.state()


def test_too_many_bad_rows_stop_the_run_and_are_named(context: Context, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", 50, bad=(1, 2, 3, 4, 5, 6))
    aside = Quarantine(tmp_path / "quarantine.jsonl", most=0.005)
    mixture = Mixture(context, [source], rows=50, quarantine=aside)
    told = (
        r"6 of 5\d rows are bad, more than quarantine_most=0.005 .* pairs:\d+ \(.*pairs.jsonl:\d\): the answer is m.*; "
        r"write a string\. See"
    )
    with pytest.raises(TrainingError, match=told):
        mixture.take()


def test_media_that_turn_out_damaged_leave_their_batch(context: Context, tmp_path: Path) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(data[:5000] + bytes(50) + data[5050:])  # a whole header, damaged pixels
    records = [
        {"instruction": "What?", "output": "red", "image": name}
        for name in ("good.png", "bad.png", "good.png", "bad.png")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = SourceConfig(source="files", options={"path": str(tmp_path / "rows.jsonl"), "shuffle": False})
    alone = Mixture(context, [source], rows=1, accumulate=4, quarantine=Quarantine(tmp_path / "aside.jsonl"))
    batches = alone.take()
    assert [batch.samples for batch in batches].count((BLANK,)) == 2  # a row that trains nothing stands in
    assert all((batch.labels != IGNORED).any() == (batch.samples != (BLANK,)) for batch in batches)
    lines = [json.loads(line) for line in (tmp_path / "aside.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [2, 4]
    assert all("cannot be decoded" in line["reason"] and "export it again" in line["mend"] for line in lines)
    halves = [Mixture(context, [source], rows=1, accumulate=4, rank=rank, world=2) for rank in range(2)]
    shares = [samples(half.take()) for half in halves]
    assert [shares[place % 2][place // 2] for place in range(4)] == samples(batches)


def test_a_row_that_changed_after_it_was_measured_is_noticed(context: Context, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (50, 50)).save(tmp_path / "one.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "?", "output": "a", "image": "one.png"}) + "\n")
    source = SourceConfig(source="files", options={"path": str(tmp_path / "rows.jsonl")})
    Mixture(context, [source], rows=1).take()
    Image.new("RGB", (200, 50)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match=r"files:0 was \d+ tokens when it was measured and is \d+: .* remove the cache"):
        Mixture(context, [source], rows=1).take()


def test_weights_change_at_their_share_of_the_run(context: Context) -> None:
    sources = [
        SourceConfig(source="books", name="early", weight={0: 1, 0.5: 0}),
        SourceConfig(source="books", name="late", weight={0: 0, 0.5: 2}),
    ]
    mixture = Mixture(context, sources, rows=4, steps=4)
    drawn = [{name.partition(":")[0] for name in names([mixture.take()])} for _ in range(4)]
    assert drawn == [{"early"}, {"early"}, {"late"}, {"late"}]


def test_a_share_of_the_run_without_a_source_is_refused(context: Context, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="from 50% of the run on no source has a weight"):
        Mixture(context, [SourceConfig(source="books", weight={0: 1, 0.5: 0})])
    ends = write_pairs(tmp_path / "pairs.jsonl", 4).model_copy(update={"epochs": 1})
    later = SourceConfig(source="books", weight={0: 0, 0.5: 1})
    mixture = Mixture(context, [ends, later], rows=2, steps=100)
    mixture.take()
    mixture.take()
    with pytest.raises(ConfigError, match="at 2% of the run every source that has a weight then has ended"):
        mixture.take()


def test_a_run_that_starts_anew_starts_its_quarantine_anew(context: Context, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", 10, bad=(1, 2))
    for _ in range(2):
        Mixture(context, [source], rows=8, quarantine=Quarantine(tmp_path / "aside.jsonl")).take()
    assert len((tmp_path / "aside.jsonl").read_text().splitlines()) == 2


def test_sources_are_drawn_by_their_weights(context: Context) -> None:
    sources = [SourceConfig(source="books", name="much", weight=3), SourceConfig(source="books", name="less")]
    mixture = Mixture(context, sources, rows=400)
    share = Counter(name.partition(":")[0] for name in names([mixture.take()]))["much"] / 400
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 400) ** 0.5  # four deviations of a binomial


@pytest.mark.parametrize(
    ("weight", "told"),
    [(0, "greater than 0"), ({0.5: 1}, "the first 0"), ({0: 1, 1.5: 1}, "below 1"), ({0: 0}, "one of them above 0")],
)
def test_weights_that_say_nothing_are_refused(weight: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(SourceConfig, {"source": "books", "weight": weight}, "recipe")


def test_epochs_of_a_source_without_end_are_refused(context: Context) -> None:
    with pytest.raises(ConfigError, match="source 'books' has no end, so epochs=2 says nothing"):
        Mixture(context, [SourceConfig(source="books", epochs=2)])


def test_rows_and_tokens_are_not_set_together() -> None:
    run = {"init": "tiny", "output": "o", "train": ["decoder"], "mixture": [{"source": "books"}], "steps": 1}
    with pytest.raises(ConfigError, match="rows=4 and tokens=100 both set the micro-batch"):
        parse(RunConfig, {**run, "rows": 4, "tokens": 100}, "recipe")
    once = parse(RunConfig, {**run, "tokens": 100}, "recipe")
    assert parse(RunConfig, once.model_dump(mode="json"), "recipe") == once


def test_other_files_than_those_of_a_state_are_refused(context: Context, tmp_path: Path) -> None:
    state = Mixture(context, [write_pairs(tmp_path / "pairs.jsonl", 20)]).state()
    with pytest.raises(DataError, match=r"held \[20\] rows and now hold \[21\]"):
        Mixture(context, [write_pairs(tmp_path / "pairs.jsonl", 21)]).restore(state)


def test_a_window_of_running_text_is_trained_on_whole(context: Context) -> None:
    (batch,) = Mixture(context, [SourceConfig(source="books")], rows=2).take()
    assert batch.input_ids.shape == (2, 40)
    assert batch.labels is not None
    assert torch.equal(batch.labels, batch.input_ids)
    assert all(context.processor.tokenizer.decode(ids) in STORY for ids in batch.input_ids.tolist())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"source": "book"}, "unknown source 'book'; known are books, .*documents, .*files, .*pictures"),
        (
            {"source": "pictures", "options": {"turn": 2}},
            "source 'pictures' has no option 'turn'; did you mean 'turns'",
        ),
        ({"source": "files", "options": {"file": "a"}}, "source 'files' has no option 'file'; it takes path, form, "),
        ({"source": "files", "options": {"form": "text"}}, "source 'files' needs the option 'path'"),
        ({"source": "instruct", "options": {"turns": 2}}, "source 'instruct' has no option 'turns'; it takes none"),
        (
            {"source": "files", "options": {"path": 5}},
            "source 'files', path: 5: .* string; put it into quotes$",
        ),
        (
            {"source": "pictures", "options": {"turns": "many"}},
            "source 'pictures', turns: 'many': .* a valid integer",
        ),
    ],
)
def test_an_unknown_source_or_option_is_refused(context: Context, config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_source(context, SourceConfig(**config))


def test_options_of_someone_elses_source_are_given_as_the_types_that_it_declares(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def source(context: Any, turns: int = 1, table: np.ndarray | None = None, more=None) -> Any:  # type: ignore[no-untyped-def]
        given.extend((turns, table, more))

    monkeypatch.setitem(SOURCES, "theirs", Kind(source))
    table = np.ones(2)
    make_source(context, SourceConfig(source="theirs", options={"turns": "3", "table": table, "more": "x"}))
    assert given == [3, table, "x"]
    for maker in (partial(source), lambda context, turns=1: given.append(turns)):
        monkeypatch.setitem(SOURCES, "theirs", Kind(maker))
        make_source(context, SourceConfig(source="theirs", options={"turns": None}))
    assert given[3] is given[6] is None


def test_kinds_of_questions_are_checked_and_scenes_without_them_drawn_again(context: Context) -> None:
    for ask in (["colour"], []):
        with pytest.raises(ConfigError, match="must name some of the kinds count"):
            make_source(context, SourceConfig(source="pictures", options={"ask": ask}))
    rare = make_source(context, SourceConfig(source="pictures", options={"ask": ["touch"]}))  # none about towers
    assert all(any(label != IGNORED for label in rare.row(number).labels) for number in range(20))
    never = make_source(context, SourceConfig(source="pictures", options={"ask": ["touch"], "towers": 1.0}))
    with pytest.raises(DataError, match="no question of"):
        never.row(0)


# ----------------------------------------------------------------------------------------- packing and order


def lengths() -> Iterator[list[int]]:
    rng = np.random.default_rng(0)
    for _ in range(200):
        yield rng.integers(1, 30, size=int(rng.integers(1, 10))).tolist()


def test_a_budget_is_filled_as_well_as_any_choice_with_the_oldest_row_fills_it() -> None:
    for own in lengths():
        for budget in (30, 47, 80):
            places = fill(own, budget)
            best = max(
                total
                for choice in range(1 << (len(own) - 1))
                if (total := own[0] + sum(own[n + 1] for n in range(len(own) - 1) if choice >> n & 1)) <= budget
            )
            assert places[0] == 0
            assert places == sorted(set(places))
            assert sum(own[place] for place in places) == best


def test_of_equal_rows_the_older_ones_are_packed() -> None:
    assert fill([5, 5, 5, 5], 16) == [0, 1, 2]
    with pytest.raises(DataError):
        fill([17], 16)


def test_packed_batches_stay_within_their_budget_and_fill_it(context: Context) -> None:
    mixture = Mixture(context, everything(context), tokens=600)
    totals = [int(batch.lengths.sum()) for _ in range(20) for batch in mixture.take()]
    assert max(totals) <= 600
    assert sum(totals) >= 0.97 * 600 * len(totals)


def test_a_row_larger_than_the_budget_is_bad(context: Context, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", 23)
    aside = Quarantine(tmp_path / "aside.jsonl", most=0.5)
    mixture = Mixture(context, [source.model_copy(update={"epochs": 1})], tokens=45, quarantine=aside)
    while mixture.take():
        pass
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "aside.jsonl").read_text().splitlines()]
    assert reasons
    assert all("a row has at most 45" in reason for reason in reasons)
    drawn = Mixture(replace(context, window=200), [SourceConfig(source="books")], tokens=100, quarantine=aside)
    with pytest.raises(TrainingError, match="it is 200 tokens and tokens=100"):
        drawn.take()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**40), st.integers(0, 5))
def test_every_row_stands_once_in_a_shuffled_epoch(rows: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(place, rows, (seed, 0, epoch)) for place in range(rows)) == list(range(rows))


def test_a_shuffle_sends_a_row_everywhere_alike() -> None:
    rows, seeds = 10, 1500
    places = np.array([[shuffled(place, rows, (seed, 1)) for place in range(rows)] for seed in range(seeds)])
    counts = np.stack([np.bincount(places[:, place], minlength=rows) for place in range(rows)])
    expected = seeds / rows
    # chi-squared of 81 free cells: mean 81, deviation 12.7; 5 deviations
    assert ((counts - expected) ** 2 / expected).sum() < 81 + 5 * 12.7
    together = np.bincount(places[:, 0] * rows + places[:, 1], minlength=rows * rows)[~np.eye(rows, dtype=bool).ravel()]
    expected = seeds / len(together)
    # pairs: 89 free cells
    assert ((together - expected) ** 2 / expected).sum() < 89 + 5 * 13.3
