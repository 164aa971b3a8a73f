"""`modalora ask --rows`: an answer for every row of a file; and adapters that an option loads and nothing uses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import modalora
from modalora.assistant import BUNDLED, Answer
from modalora.checkpoint.adapters import save_adapter
from modalora.cli.rows import _line
from modalora.data.files import open_records
from modalora.nn.lora import LoraConfig

DEMO = BUNDLED / "demo"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of every form, with an answer and without, and one whose picture is missing, one that is not JSON."""
    (tmp_path / "d").mkdir()
    for name in ("scene.png", "number.wav"):
        shutil.copy(DEMO / name, tmp_path / "d")
    asked, told = {"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": "five"}
    circles = {"role": "user", "content": "<image>How many circles are there?"}
    lines: list[Any] = [
        {"messages": [asked]},
        {"messages": [circles, told], "images": ["scene.png"]},
        {"messages": [circles], "images": ["gone.png"]},
        {"conversations": [{"from": "human", "value": "<audio>What number is spoken?"}], "audios": ["number.wav"]},
        {"instruction": "Repeat: hello", "output": ""},
        {"messages": [asked, told, {"role": "user", "content": "Repeat: hello"}, {"role": "assistant", "content": ""}]},
        {"messages": [circles]},
    ]
    path = tmp_path / "d" / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n{\n")
    return path


def test_calls_of_tools_stand_in_the_line_of_a_row(rows: Path) -> None:
    call = {"type": "function", "function": {"name": "seven", "arguments": "{}"}}
    answer = Answer("[...]", (), "tool_calls", {"adapter": None}, {}, 0.0)
    assert "tool_calls" not in _line(open_records(rows, rows.parent), 0, answer)
    assert _line(open_records(rows, rows.parent), 0, replace(answer, tool_calls=(call,)))["tool_calls"] == [call]


def held(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_row_has_a_line_with_what_it_is_answered_alone(run: Run, rows: Path) -> None:
    code, out, err = run("ask", "nano", "--rows", str(rows), "--batch", "3", "--max-tokens", "6")
    found = held(out)
    assert (code, err) == (1, '3 of 8 rows could not be asked: see "error" in their lines\n')
    assert [line["row"] for line in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert f"{rows}, line 3: '{rows.parent / 'gone.png'}' does not exist" in found[2]["error"]
    assert f"{rows}, line 7: it has 1 <image> places and 0 images" in found[6]["error"]
    assert f"{rows}, line 9: it is not JSON" in found[7]["error"]
    m = modalora.load("nano")
    two = "What is two plus two?"
    turns = [("user", two), ("assistant", "five"), ("user", "Repeat: hello")]
    alone = {
        0: m.ask(two, max_tokens=6),
        1: m.ask("How many circles are there?", image=DEMO / "scene.png", max_tokens=6),
        3: m.ask("What number is spoken?", audio=DEMO / "number.wav", max_tokens=6),
        4: m.ask("Repeat: hello", max_tokens=6),
        5: m.ask([{"role": role, "content": words} for role, words in turns], max_tokens=6),
    }
    for place, answer in alone.items():
        assert found[place] == {
            "row": place + 1, "text": answer.text, "finish_reason": answer.finish_reason,
            "route": answer.route["adapter"], "usage": answer.usage,
        }  # fmt: skip


def test_a_file_of_answers_is_gone_on_with_where_it_was_left(run: Run, rows: Path, tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    asked = ("ask", "nano", "--rows", str(rows), "--max-tokens", "4", "--output", str(target))
    assert run(*asked)[:2] == (1, "")
    whole = target.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 8
    target.write_text("".join(lines[:4]) + lines[4][:9])
    code, out, err = run(*asked)
    assert (code, out, target.read_text()) == (1, "", whole)
    assert err.startswith(f"{target} has 4 of 8 rows, and is gone on with\n3 of 8 rows could not be asked")
    target.write_text("a file of mine\n")
    code, _, err = run(*asked)
    assert (code, "line 1 is no answer to row 1; name a new file" in err) == (2, True)
    assert target.read_text() == "a file of mine\n"


def test_rows_do_not_leave_their_folder_unless_told(run: Run, rows: Path) -> None:
    away = rows.parent / "away"
    away.mkdir()
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "?"}], "images": ["../scene.png"]}))
    shutil.move(rows, away / "rows.jsonl")
    asked = ("ask", "nano", "--rows", str(away / "rows.jsonl"), "--max-tokens", "1")
    code, out, _ = run(*asked)
    assert (code, "lies outside" in held(out)[0]["error"]) == (1, True)
    (away / "rows.jsonl").write_text((away / "rows.jsonl").read_text().replace("../", ""))
    code, out, _ = run(*asked, "--media-root", str(rows.parent))
    assert (code, held(out)[0]["route"]) == (0, "vision")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give a QUESTION, or --rows FILE with many"),
        (("Hi", "--batch", "3"), "--batch is for --rows"),
        (("Hi", "--output", "x"), "--output is for --rows"),
        (("Hi", "--rows", "x.jsonl"), "QUESTION is for one question; leave it out beside --rows"),
        (("--image", "x.png", "--rows", "x.jsonl"), "--image is for one question; leave it out beside --rows"),
        (("--json", "--rows", "x.jsonl"), "--json is for one question"),
        (("--rows", "x.jsonl"), "x.jsonl does not exist"),
    ],
)
def test_options_that_would_be_lost_are_refused(run: Run, arguments: tuple[str, ...], told: str) -> None:
    code, out, err = run("ask", "no-such-model", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err


@pytest.fixture
def style(tmp_path: Path) -> str:
    """A PEFT folder for nano."""
    model = modalora.load("nano").model
    model.add_adapter("style", LoraConfig(r=4, lora_alpha=8))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.style"):
            parameter.data.normal_(std=0.1)
    save_adapter(model, "style", tmp_path / "style-lora")
    return str(tmp_path / "style-lora")


def test_an_adapter_that_no_route_of_the_question_uses_is_refused(run: Run, style: str, rows: Path) -> None:
    asked = ("ask", "nano", "Hi", "--max-tokens", "1", "--adapter", f"style={style}")
    told = "--adapter style=... would change nothing: --route auto does not use it for rows of"
    code, out, err = run(*asked)
    assert (code, out) == (2, "")
    assert f"{told} text; add --route style, or leave the adapter out" in err
    assert f"{told} audio + image;" in run(*asked, "--image", str(DEMO / "scene.png"), "--audio", "x.wav")[2]
    assert "--route vision does not use it" in run(*asked, "--route", "vision")[2]
    code, _, err = run("ask", "nano", "--rows", str(rows), "--adapter", f"style={style}")
    assert (code, "does not use it for such rows" in err) == (2, True)
    for route in ("style", "vision + style@0.5"):
        code, _, err = run(*asked, "--route", route)
        assert (code, err) == (0, "")


def test_chat_says_how_an_adapter_that_is_loaded_comes_to_be_used(
    run: Run, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["/route style", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, out, err = run("chat", "nano", "--adapter", f"style={style}")
    assert (code, err) == (0, "! the adapter 'style' is loaded and not used yet: /route style\n")
    assert out == "[route style]\n"
