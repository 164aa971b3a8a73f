"""Options that several verbs share, and figures as they print them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from modalora.cli.main import app
from modalora.cli.words import lasting, sized
from modalora.training.machines import MACHINES

Run = Callable[..., tuple[int, str, str]]
RUNNING = [
    ("ask", "nano", "Hi"),
    ("chat", "nano"),
    ("demo",),
    ("eval", "nano", "ruler"),
    ("adapter", "verify", "nano"),
]


@pytest.mark.parametrize("verb", RUNNING, ids=" ".join)
def test_a_device_that_is_not_there_is_one_line(verb: tuple[str, ...], run: Run) -> None:
    absent = f"cuda:{torch.cuda.device_count() if torch.cuda.is_available() else 0}"
    for device in (absent, "foo", "meta"):
        code, out, err = run(*verb, "--device", device)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert f"device='{device}' cannot be used" in err
        assert "'cpu' always can" in err


@pytest.mark.parametrize("verb", [("ask", "nano", "Hi"), ("chat", "nano"), ("eval", "nano", "ruler")], ids=" ".join)
def test_a_dtype_that_does_not_exist_is_one_line(verb: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*verb, "--dtype", "int3")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "dtype='int3' must be one of auto, float32, bfloat16, float16" in err


def test_a_model_answers_on_the_device_that_is_named(run: Run) -> None:
    asked = ("ask", "nano", "What is two plus two?", "--max-tokens", "4")
    assert run(*asked, "--device", "cpu:0") == run(*asked)


def test_chat_takes_a_dtype(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Hello!", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, out, err = run("chat", "nano", "--max-tokens", "2", "--dtype", "bfloat16")
    assert (code, out != "", err) == (0, True, "")


def test_the_help_of_plan_names_every_machine() -> None:
    (option,) = (one for one in get_command(app).commands["plan"].params if one.name == "machine")
    assert option.help == f"this, or a GPU by name: {', '.join(MACHINES)}."


def test_help_lists_the_recipes_of_its_verb_and_breaks_no_name(run: Run) -> None:
    for verb, own, others in (("train", "extend-mixed", "extend-study"), ("extend", "extend-study", "nano-1-base")):
        listed = run(verb, "--help")[1].rpartition("Bundled recipes: ")[2]
        assert own in listed
        assert others not in listed
        assert not [line for line in listed.splitlines() if line.endswith("-")]


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "modalora", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("modalora ")


def test_what_to_do_next_can_be_pasted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, out, _ = run("adapter", "new", "--modality", "motion", "--out", "a b/c d")
    assert "next: pip install -e 'a b/c d' && modalora train 'a b/c d/recipe.yaml'" in out


def test_shards_are_refused_where_the_layout_has_none(run: Run, tmp_path: Path) -> None:
    code, _, err = run("convert", "nano", str(tmp_path / "out"), "--layout", "modalora", "--shard-gb", "1")
    assert (code, "--shard-gb: the layout modalora is one weights file" in err) == (2, True)


def test_bytes_and_seconds_read_as_people_say_them() -> None:
    told = [sized(size) for size in (0, 999, 999.7, 1234, 5.84e9, 3.3e12, 4e15)]
    assert told == ["0 B", "999 B", "1 kB", "1.23 kB", "5.84 GB", "3.3 TB", "4e+03 TB"]
    told = [lasting(seconds) for seconds in (0, 0.0402, 0.9997, 12.5, 150, 7199, 7200, 5e6)]
    assert told == ["0 s", "40.2 ms", "1 s", "12.5 s", "2.5 min", "120.0 min", "2.0 h", "1,388.9 h"]
