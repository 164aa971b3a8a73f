"""`modalora ask --rows`: an answer for every row of a file; and adapters that an option loads and nothing uses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import modalora
from modalora.assistant import Answer
from modalora.checkpoint.adapters import save_adapter
from modalora.checkpoint.find import BUNDLED
from modalora.cli.rows import Answers, Rows, _line
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
    asked, answer = (
        Rows(open_records(rows, rows.parent), rows.parent),
        Answer("So[]", (), "tool_calls", {"adapter": None}, {}, 0.0),
    )
    assert "tool_calls" not in _line(asked, 0, answer)
    line = _line(asked, 0, replace(answer, content="So", tool_calls=(call,)))
    assert (line["content"], line["tool_calls"]) == ("So", [call])


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


def test_what_is_no_answer_to_these_rows_is_refused_and_left(run: Run, rows: Path, tmp_path: Path) -> None:
    rows.write_text('{"instruction": "Repeat: hello"}\n{"instruction": "Hi"}\n')
    target = tmp_path / "answers.jsonl"
    asked = ("ask", "nano", "--rows", str(rows), "--max-tokens", "2", "--output", str(target))
    assert run(*asked)[0] == 0
    whole = target.read_text()
    for held in ("a file of mine\n", "a file of mine, without an end", '[{"row": 1}]', whole + "and more"):
        target.write_text(held)
        code, _, err = run(*asked)
        assert (code, f"--output {target}, line {held.count(chr(10)) * (held > whole) + 1} is no answer" in err) == (
            2,
            True,
        )
        assert target.read_text() == held
    target.write_text(whole)
    others = [
        ("--media-root", "/"),
        ("--max-tokens", "3"),
        ("--seed", "1"),
        ("--stop", "x"),
        ("--tags", "false"),
        ("--route", "none"),
    ]
    for other in others:
        code, _, err = run(*asked, *other)
        assert (code, "line 1 answers another row, or was asked of another model or with other" in err) == (2, True)
    rows.write_text('{"instruction": "Repeat: hello"}\n{"instruction": "Ho"}\n')
    assert "line 2 answers another row" in run(*asked)[2]
    rows.write_text('{"instruction": "Repeat: hello"}\n')
    assert "line 2 answers more than the 1 rows of" in run(*asked)[2]
    assert target.read_text() == whole
    one = rows.with_name("one.jsonl")
    one.write_text('{"row": 1, "instruction": "Hi"}')
    for name in (one, one.parent / ".." / "d" / "one.jsonl"):
        code, _, err = run("ask", "nano", "--rows", str(one), "--output", str(name))
        assert (code, "is the file of --rows; name a new file" in err) == (2, True)
    assert one.read_text() == '{"row": 1, "instruction": "Hi"}'


def test_an_output_is_a_file_of_one_process(run: Run, rows: Path, tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    for place in ("/dev/full", "/dev/null", str(tmp_path)):
        code, _, err = run("ask", "nano", "--rows", str(rows), "--output", place)
        assert (code, f"--output {place} is no file; name one, or leave --output out" in err) == (2, True)
    target.touch()
    held = f"import fcntl; f = open({str(target)!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        code, _, err = run("ask", "nano", "--rows", str(rows), "--output", str(target))
        other.communicate(b"\n")
    assert (code, f"another process writes to --output {target}; wait" in err) == (2, True)


def test_no_file_is_left_where_nothing_was_answered(run: Run, rows: Path, tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    for wrong in (("no-such-model",), ("nano", "--route", "mine"), ("nano", "--max-tokens", "1021")):
        code, _, err = run("ask", *wrong, "--rows", str(rows), "--output", str(target))
        assert (code, target.exists()) == (2, False)
    assert "max_tokens=1021 exceed this model's window of 1024; lower max_tokens to" in err


def test_a_stopped_run_says_how_it_goes_on(
    run: Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "answers.jsonl"
    asked = ("ask", "nano", "--rows", str(rows), "--batch", "1", "--max-tokens", "2", "--output", str(target))
    plain = Answers.write
    monkeypatch.setattr(Answers, "write", lambda self, line: plain(self, line) if line["row"] < 3 else stop())
    code, _, err = run(*asked)
    assert (code, err) == (130, "modalora: stopped behind row 2; the same command goes on there\n")
    assert target.read_text().count("\n") == 2


def test_a_file_that_may_not_grow_is_told(rows: Path, tmp_path: Path) -> None:
    rows.write_text('{"instruction": "Hi"}\n' * 30)
    limited = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (2000, 2000)); import modalora.cli.main as m; m.main()"
    given = ["ask", "nano", "--rows", str(rows), "--max-tokens", "1", "--output", str(tmp_path / "answers.jsonl")]
    done = subprocess.run([sys.executable, "-c", limited, *given], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "modalora: File too large; make room, and do the same again\n")


def test_each_row_has_its_own_seed_however_it_is_batched(run: Run, rows: Path, tmp_path: Path) -> None:
    asked = {"instruction": "Continue the story: Once upon a time"}
    rows.write_text("".join(json.dumps(one) + "\n" for one in (asked, {"instruction": ""}, asked, asked)))
    target = tmp_path / "answers.jsonl"
    given = ("ask", "nano", "--rows", str(rows), "--max-tokens", "12", "--temperature", "1.0", "--seed", "5")
    found = held(run(*given)[1])
    assert len({line["text"] for line in found if "text" in line}) == 3
    assert found == held(run(*given, "--batch", "1")[1])
    assert run(*given, "--output", str(target))[0] == 1
    whole = target.read_text()
    target.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert run(*given, "--output", str(target))[0] == 1
    assert target.read_text() == whole
    assert [{**line, "asked": None} for line in held(whole)] == [{**line, "asked": None} for line in found]
    m = modalora.load("nano")
    said = m.ask(asked["instruction"], max_tokens=12, temperature=1.0, seed=7).text
    assert found[2]["text"] == said


def test_fields_of_a_row_that_are_not_read_are_told_and_lost_media_are_errors(run: Run, rows: Path) -> None:
    two = {"role": "user", "content": "What is two plus two?"}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    lines = [
        {"messages": [two], "tools": [tool]},
        {"messages": [{"role": "system", "content": None, "tools": [tool]}, two], "max_tokens": 3, "id": "a"},
        {"messages": [{**two, "images": ["scene.png"]}]},
        {"messages": [{**two, "name": "Bob"}], "max_tokens": 4},
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = run("ask", "nano", "--rows", str(rows), "--max-tokens", "2")
    found = held(out)
    assert (code, err.splitlines()[0]) == (
        1, f"{rows}: fields that are not read: max_tokens (2), id (1), messages[].name (1)"
    )  # fmt: skip
    assert found[0]["usage"] == found[1]["usage"]
    assert found[0]["usage"]["prompt_tokens"] > found[3]["usage"]["prompt_tokens"]
    assert "line 3: message 1 has 'images', which is not read there" in found[2]["error"]


def test_settings_that_errors_of_rows_name_are_those_of_the_command(run: Run, rows: Path) -> None:
    lines = [{"question": "Repeat: hello"}, {"instruction": "Is <image> a tag?"}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("ask", "nano", "--rows", str(rows), "--max-tokens", "2")
    first, second = held(run(*asked)[1])
    assert "rename them (--rename='{question: instruction, answer: output}')" in first["error"]
    assert "set --tags=false when the tag is mere text" in second["error"]
    code, out, _ = run(*asked, "--rename={question: instruction, answer: output}", "--tags=false")
    assert (code, [line["row"] for line in held(out) if "text" in line]) == (0, [1, 2])
    assert "not of the form messages" in held(run(*asked, "--form=messages")[1])[0]["error"]
    for wrong in ("--form=poem", "--rename=[1]", "--tags=maybe", "--rename={"):
        code, _, err = run(*asked, wrong)
        assert (code, wrong.partition("=")[0] in err, err.count("\n")) == (2, True, 1)


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
        (("Hi", "--tags", "false"), "--tags is for --rows"),
        (("--rows", "-"), "--rows - would be standard input, and rows are read more than once; write it to a file"),
        (("--rows", "/dev/null"), "/dev/null is a pipe or a device"),
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
