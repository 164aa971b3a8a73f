from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from modalora.assistant import Assistant, load, make_processor
from modalora.checkpoint.adapters import save_adapter
from modalora.evaluation import ruler
from modalora.evaluation.needle import Grid
from modalora.models.sizes import tiny
from modalora.nn.lora import LoraConfig
from modalora.processing.tokenizer import TextTokenizer
from small import shaken

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A model with two rotary tables, which switches at 256 tokens."""
    letters = TextTokenizer.train(["The miller went home; his dog was tired."], 320)
    Assistant(shaken(), make_processor(tiny(), letters)).save(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("The miller went home. His dog was tired, and so was he. “Rain,” he said.\n\n" * 400)
    return str(path)


def test_a_table_shows_every_figure_with_its_interval(run: Run, book: str) -> None:
    code, out, err = run(
        "eval", "nano", "needle", "ruler", "perplexity", "--text", book, "--lengths", "150,200", "--samples", "2",
        "--depths", "0,1", "--only", "single-repeated",
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "needle: exact answers in %, of 7.0 tokens" in lines[0]
    assert [line.split()[:2] for line in lines[2:4]] == [["150", "4"], ["200", "4"]]
    assert [line.split()[:3] for line in lines[6:8]] == [
        ["single-repeated", "150", "2"],
        ["single-repeated", "200", "2"],
    ]
    assert lines[10].startswith("effective length at 85.6: ")
    assert [line.split()[:2] for line in lines[13:]] == [["150", "150"], ["200", "150"]]
    assert all("[" in line and "]" in line for line in (*lines[2:4], *lines[6:8], *lines[13:]))


def test_json_holds_what_the_table_shows_and_reads_back(run: Run, book: str) -> None:
    code, out, _ = run(
        "eval", "nano", "needle", "ruler", "perplexity", "--text", book, "--lengths", "200", "--samples", "2",
        "--depths", "0.5", "--only", "single-repeated", "--threshold", "0", "--seed", "3", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert (found["model"], found["seed"], found["lengths"]) == ("nano", 3, [200])
    (result,) = found["results"]
    grid = Grid.from_json(result["needle"])
    assert result["rope"] == grid.regime == "reference"
    assert [(cell.length, cell.depth, cell.count) for cell in grid.cells] == [(200, 0.5, 2)]
    assert [(cell["task"], cell["count"]) for cell in result["ruler"]["cells"]] == [("single-repeated", 2)]
    assert result["ruler"]["effective_length"] == 200
    assert result["perplexity"][0]["low"] <= result["perplexity"][0]["bits"] <= result["perplexity"][0]["high"]


def test_rotary_tables_are_compared_where_a_model_has_two(run: Run, small: str, book: str) -> None:
    settings = ("--text", book, "--lengths", "300", "--samples", "2")
    code, out, _ = run(
        "eval", small, "perplexity", *settings, "--rope", "short", "--rope", "long", "--rope",
        "reference", "--json",
    )  # fmt: skip
    assert code == 0
    results = json.loads(out)["results"]
    assert [one["rope"] for one in results] == ["short", "long", "reference"]
    short, long, reference = (one["perplexity"][0]["bits"] for one in results)
    assert short != long == reference  # 300 tokens are beyond its original window
    _, table, _ = run("eval", small, "perplexity", *settings, "--rope", "short", "--rope", "long")
    assert [line for line in table.splitlines() if ":" in line][::2] == ["rotary table: short", "rotary table: long"]


def test_without_a_text_ruler_says_what_it_leaves_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler, "answer_samples", lambda assistant, samples, adapter: [" ".join(samples[0].answers)])
    code, out, _ = run("eval", "nano", "ruler", "--lengths", "900", "--samples", "1")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:7]] == [
        "single-repeated", "single-needles", "variables", "common-words", "frequent-words",
    ]  # fmt: skip
    assert "effective length at 85.6: 900" in out
    assert out.endswith("tasks in book text were left out: they need --text\n")


def test_without_lengths_ruler_asks_those_that_all_its_tasks_fit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler, "answer_samples", lambda assistant, samples, adapter: [""] * len(samples))
    every = json.loads(run("eval", "nano", "ruler", "--samples", "1", "--json")[1])
    assert every["lengths"] == [1024]  # common-words needs more than 512
    one = json.loads(run("eval", "nano", "ruler", "--samples", "1", "--only", "single-repeated", "--json")[1])
    assert one["lengths"] == [256, 512, 1024]


def test_a_length_that_is_named_twice_is_asked_once(run: Run, book: str) -> None:
    once, twice = (
        run("eval", "nano", "needle", "--text", book, "--lengths", lengths, "--depths", depths, "--samples", "2")[1]
        for lengths, depths in (("256", "0,1"), ("256,256", "0,1,0"))
    )
    assert once == twice
    assert " 256" in once


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("haystack",), "task 'haystack' must be one of needle, ruler, perplexity"),
        (("needle",), "needle and perplexity read running text; give --text"),
        (("ruler", "--lengths", "512,2000"), "length 2000 must lie in 2 to 1024, this model's window"),
        (("ruler", "--lengths", "many"), "--lengths 'many' must be numbers"),
        (("ruler", "--only", "qa"), "task 'qa' must be one of single-repeated"),
        (("ruler", "--form", "prose"), "form='prose' must be one of plain, chat"),
        (("ruler", "--seed", "-1"), "seed=-1 must be at least 0"),
        (("ruler", "--samples", "0"), "--samples 0 must be at least 1"),
        (("ruler", "--depths", "0.5"), "--depths is a setting of needle, which is not among the tasks"),
        (("needle", "--example"), "--example is a setting of ruler, which is not among the tasks"),
        (("ruler", "--rope", "long"), "rope='long': this model has no long and short table"),
        (("ruler", "--rope", "reference", "--rope", "long"), "rope='long': this model has no long and short table"),
        (("perplexity", "--text", "no-such.txt"), "no-such.txt cannot be read as text"),
        (("perplexity", "--samples", "1"), "--samples 1: perplexity compares passages and needs at least 2"),
        (("ruler", "--threshold", "nan"), "--threshold nan must lie in 0 to 1, such as 0.856"),
        (("ruler", "--threshold", "85.6"), "--threshold 85.6 must lie in 0 to 1"),
        (("needle", "--depths", ""), "--depths '' must be numbers"),
        (("needle", "--depths", "abc"), "--depths 'abc' must be numbers with commas between, such as 0,0.5,1"),
        (("ruler", "--lengths", ""), "--lengths '' must be numbers with commas between, such as 256,1024"),
        (("ruler", "--lengths", "256"), "and 256 are asked for; ask for a length of"),
    ],
)
def test_wrong_settings_are_one_clear_line(run: Run, given: tuple[str, ...], says: str) -> None:
    code, out, err = run("eval", "nano", *given)
    assert (code, out) == (2, "")
    assert err.startswith("modalora: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.fixture
def adapter(small: str, tmp_path: Path) -> str:
    """A PEFT folder for the small model that changes what it says."""
    assistant = load(small)
    assistant.model.add_adapter("mine", LoraConfig(r=4, lora_alpha=8))
    with torch.no_grad():
        for name, parameter in assistant.model.named_parameters():
            if name.endswith("lora_B.mine"):
                parameter.normal_(std=0.1)
    save_adapter(assistant.model, "mine", tmp_path / "mine-lora")
    return str(tmp_path / "mine-lora")


def test_an_adapter_is_measured_as_the_model_that_it_is_merged_into(
    run: Run, small: str, adapter: str, book: str, tmp_path: Path
) -> None:
    tasks = ("needle", "ruler", "perplexity", "--text", book, "--lengths", "300", "--samples", "2", "--depths", "0.5")
    tasks = (*tasks, "--only", "single-repeated", "--json")
    mine = ("--adapter", f"mine={adapter}")

    def figures(*arguments: str) -> tuple[float, float, float]:
        code, out, err = run("eval", *arguments)
        assert (code, err) == (0, "")
        (result,) = json.loads(out)["results"]
        return (
            result["perplexity"][0]["bits"],
            result["needle"]["cells"][0]["nats"],
            result["ruler"]["cells"][0]["score"],
        )

    routed, plain = figures(small, *tasks, *mine, "--route", "mine"), figures(small, *tasks)
    assert run("adapter", "merge", small, "mine", str(tmp_path / "merged"), *mine)[0] == 0
    # float32 sums in another order; without the adapter the bits differ by more than 0.01
    assert figures(str(tmp_path / "merged"), *tasks) == pytest.approx(routed, rel=1e-4)
    assert abs(routed[0] - plain[0]) > 0.01


def test_every_task_of_eval_takes_the_route(
    run: Run, small: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def said(assistant: Assistant, samples: Sequence[ruler.Sample], adapter: str | None = None) -> list[str]:
        seen.append(adapter)
        return [""] * len(samples)

    monkeypatch.setattr(ruler, "answer_samples", said)
    asked = ("eval", small, "ruler", "--lengths", "900", "--samples", "1", "--only", "single-needles")
    code, out, _ = run(*asked, "--adapter", f"mine={adapter}", "--route", "vision+mine@0.5")
    assert (code, seen) == (0, ["vision+mine@0.5"])
    assert out.startswith("adapter: vision+mine@0.5\n")


def test_an_adapter_that_eval_would_not_use_is_refused(run: Run, small: str, adapter: str) -> None:
    code, _, err = run("eval", small, "ruler", "--adapter", f"mine={adapter}")
    assert code == 2
    assert (
        "--adapter mine=... would change nothing: --route auto does not use it for rows of text; add --route mine"
        in err
    )
    code, _, err = run("eval", small, "ruler", "--route", "mine")
    assert (code, "unknown route 'mine'" in err) == (2, True)
