from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from modalora.checkpoint.find import BUNDLED, find_model
from modalora.checkpoint.write import save_model
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from small import fox

DEMO = BUNDLED / "demo"
SCENE, DIGITS = str(DEMO / "scene.png"), str(DEMO / "digits.wav")


def test_help_answers_without_loading_torch() -> None:
    probe = "import sys; sys.argv = ['modalora', '--help']\nimport modalora.cli.main as m\n"
    probe += "try: m.main()\nexcept SystemExit: print('torch' in sys.modules)"
    # torch alone takes more than a second to import: its absence is what keeps help fast on any machine
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("False\n")
    assert "Start with `modalora demo`" in shown.stdout


def test_an_answer_is_the_only_thing_on_stdout(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("ask", "nano", "Repeat: hello", "--max-tokens", "4")
    assert code == 0
    assert out.count("\n") == 1
    assert err == ""


def test_json_has_text_tokens_finish_reason_route_usage_and_seconds(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run(
        "ask", "nano", "What is this?", "--image", SCENE, "--audio", DIGITS, "--max-tokens", "3", "--json"
    )
    answer = json.loads(out)
    assert code == 0
    assert set(answer) == {"text", "tokens", "finish_reason", "route", "usage", "seconds", "content", "tool_calls"}
    assert answer["route"]["adapter"] == "vision"
    assert answer["route"]["projectors"] == {"image": "vision", "audio": "vision"}
    assert answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"] == answer["usage"]["total_tokens"]


@pytest.mark.parametrize(
    ("media", "adapter"),
    [((), "none"), (("--image", SCENE), "vision"), (("--audio", DIGITS), "speech")],
)
def test_route_explain_names_the_adapter(
    run: Callable[..., tuple[int, str, str]], media: tuple[str, ...], adapter: str
) -> None:
    code, out, _ = run("route", "explain", "nano", "Hi", *media)
    assert code == 0
    assert f"adapter    {adapter}" in out


def test_route_explain_tells_the_rotary_table_and_where_it_changes(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    save_model(Multimodal(tiny()), fox(), tmp_path / "long")  # original window 256
    ask = ("route", "explain", str(tmp_path / "long"), "z" * 240, "--max-tokens", "40")
    code, out, _ = run(*ask)
    assert code == 0
    rows = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in out.splitlines()[:6]}
    tokens = int(rows["tokens"])
    told = f"short: {tokens} tokens fit the original window of 256; at 257 tokens it is read again"
    assert rows["rope"] == told
    _, out, _ = run(*ask, "--switch", "planned")
    assert f"rope       long: {tokens} + 40 tokens of prompt and answer exceed the original window of 256\n" in out
    answers = {
        switch: json.loads(run("ask", *ask[2:], "--switch", switch, "--json")[1]) for switch in ("crossing", "planned")
    }
    assert answers["crossing"]["route"]["rope_crosses"] == 257
    assert answers["planned"]["route"]["rope"] == "long"


def test_inspect_counts_what_the_folder_holds(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("inspect", "nano", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["parameters"] == sum(found["parts"].values())
    assert set(found["adapters"]) == {"vision", "speech"}


def test_doctor_finds_the_bundled_model(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert "ok   nano" in out


def test_chat_answers_and_survives_bad_lines(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = tmp_path / "chat.jsonl"
    lines = iter(
        [
            *("/help", "Hello!", "/image no-such.png", f"/image {SCENE}", "What is it?", "/route", "/route shout"),
            *("/nonsense", "/retry", f"/save {saved}", "/exit"),
        ]
    )
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, out, err = run("chat", "nano", "--max-tokens", "3")
    assert code == 2
    assert [line[:30] for line in err.splitlines()] == [
        "! 'no-such.png' does not exist",
        "! unknown route 'shout'; use o",
        "! unknown command /nonsense; /",
    ]
    assert "adapter    vision" in out
    roles = [message["role"] for message in json.loads(saved.read_text())["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_chat_loses_nothing_when_a_line_fails(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picture, saved = tmp_path / "s.png", tmp_path / "chat.jsonl"
    shutil.copy(SCENE, picture)
    steps: list[str | Callable[[], None]] = [
        *(f"/image {picture}", "What is it?", picture.unlink, "/retry", f"/save {saved}"),
        *("/reset", "Hello!", f"/audio {DIGITS}", "/retry", "Transcribe it.", "/route"),
        *(
            "/route vision+speech@0.5",
            "Hello!",
            "/route",
            "/image ~nobody-of-this-name/x.png",
            "/save ~nobody-of-this-name/x",
        ),
    ]

    def line(prompt: str = "") -> str:
        while steps:
            step = steps.pop(0)
            if isinstance(step, str):
                return step
            step()
        raise EOFError

    monkeypatch.setattr("builtins.input", line)
    code, out, err = run("chat", "nano", "--max-tokens", "2")
    assert code == 2
    assert [message["role"] for message in json.loads(saved.read_text())["messages"]] == ["user", "assistant"]
    assert "adapter    speech" in out  # what was attached before /retry goes with the next message
    assert "adapter    vision+speech@0.5" in out
    assert err.count("! '~nobody-of-this-name/x") == 2


def test_a_piped_question_is_the_same_without_the_newline_of_echo(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--max-tokens", "4", "--json")
    told = json.loads(run("ask", "nano", "What is two plus two?", *asked)[1])
    for piped in ("What is two plus two?", "What is two plus two?\n", "What is two plus two?\r\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        assert json.loads(run("ask", "nano", "-", *asked)[1])["tokens"] == told["tokens"]
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        assert json.loads(run("route", "explain", "nano", "-", *asked)[1])["spans"] == told["route"]["spans"]


def _picture(path: Path, width: int, height: int) -> str:
    Image.new("1", (width, height)).save(path)
    return str(path)


def _sound(path: Path, seconds: float, rate: int = 8000) -> str:
    with soundfile.SoundFile(path, "w", rate, 1, "PCM_16") as file:
        left = round(seconds * rate)
        while left > 0:
            file.write(np.zeros(min(left, 1 << 20), dtype=np.int16))
            left -= 1 << 20
    return str(path)


def _half(source: str, path: Path) -> str:
    data = Path(source).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return str(path)


def _text(path: Path) -> str:
    path.write_text("not a picture")
    return str(path)


BAD_MEDIA: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "missing file": (lambda at: ["--image", str(at / "none.png")], "none.png"),
    "truncated picture": (lambda at: ["--image", _half(SCENE, at / "half.png")], "half.png"),
    "truncated sound": (lambda at: ["--audio", _half(DIGITS, at / "half.wav")], "half.wav"),
    "1x1 picture": (lambda at: ["--image", _picture(at / "dot.png", 1, 1)], "1x1"),
    "huge picture": (lambda at: ["--image", _picture(at / "huge.png", 20_000, 20_000)], "400,000,000 pixels"),
    "no sound": (lambda at: ["--audio", _sound(at / "empty.wav", 0)], "empty.wav"),
    "two hours": (lambda at: ["--audio", _sound(at / "long.flac", 7200)], "7,200.0 s"),
    "text named png": (lambda at: ["--image", _text(at / "text.png")], "text.png"),
    "folder": (lambda at: ["--audio", str(at)], "directory"),
    "unknown route": (lambda at: ["--route", "smell"], "smell"),
    "too many tokens": (lambda at: ["--max-tokens", "2000"], "1024"),
    "no tokens": (lambda at: ["--max-tokens", "0"], "max_tokens=0"),
    "top-p": (lambda at: ["--top-p", "1.5"], "top_p=1.5"),
    "switch": (lambda at: ["--switch", "later"], "switch='later' must be one of crossing, planned"),
    "plan": (lambda at: ["--switch", "planned"], "this model has one rotary table"),
}


@pytest.mark.parametrize("case", BAD_MEDIA)
def test_bad_input_gets_one_line_and_exit_code_two(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, case: str
) -> None:
    make, named = BAD_MEDIA[case]
    arguments = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, err = run("ask", "nano", "What is it?", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("modalora: ")
    assert err.count("\n") == 1
    assert named in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("question", "images", "named"),
    [
        ("<|image_1|> What is it?", 2, "1 image placeholder(s) and 2 image(s)"),
        ("<|image_1|><|image_2|> Which?", 1, "2 image placeholder(s) and 1 image(s)"),
        ("word " * 1200, 0, "at most 1024"),
        ("", 0, "empty"),
    ],
)
def test_bad_prompts_are_refused(
    run: Callable[..., tuple[int, str, str]], question: str, images: int, named: str
) -> None:
    code, out, err = run("ask", "nano", question, *["--image", SCENE] * images)
    assert (code, out) == (2, "")
    assert named in err


def _flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _unknown_key(folder: Path) -> None:
    from modalora.disk import digest, read_json, write_json

    fields = read_json(folder / "config.json")
    fields["decoder"]["hiden_size"] = 3
    write_json(folder / "config.json", fields)
    manifest = read_json(folder / "manifest.json")
    path = folder / "config.json"
    manifest["files"]["config.json"] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    write_json(folder / "manifest.json", manifest)


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (_flip, "model.safetensors was altered"),
    "missing weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "missing tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "unknown key": (_unknown_key, "hiden_size"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
@pytest.mark.parametrize("verb", [("ask", "Hi"), ("inspect",)])
def test_a_damaged_model_is_refused_by_name(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, case: str, verb: tuple[str, ...]
) -> None:
    damage, named = BAD_MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(find_model("nano"), folder)
    damage(folder)
    code, out, err = run(verb[0], str(folder), *verb[1:])
    assert (code, out) == (2, "")
    assert named in err


def test_a_model_that_is_not_there_names_the_bundled_ones(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run("ask", "no-such-model", "Hi")
    assert code == 2
    assert "nano" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train finetune-txt", "neither a file nor a bundled recipe; did you mean finetune-text?"),
        ("plan finetune-txt", "nor a model; did you mean finetune-text?"),
        ("plan phi4-mimi", "did you mean phi4-mini?"),
        ("plan zzz", "sizes are phi4-mini"),
        ("data check zzz", "zzz is neither a file"),
        ("adapter verify nano zzz", "zzz is not a folder; an adapter is a PEFT folder"),
        ("inspect .", "config.json is missing"),
    ],
)
def test_what_is_not_there_is_told_with_what_could_be_meant(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments.split())
    assert (code, out, named in err) == (2, "", True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("no-such-recipe",), "no-such-recipe"),
        (("nano-1-base", "stepz=3"), "did you mean 'steps'"),
        (("nano-1-base", "steps"), "key=value"),
        (("nano-1-base", "steps=0"), "steps"),
        (("nano-1-base", "init=no-such-model"), "no-such-model"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_written(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    code, _, err = run("train", *arguments, f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}")
    assert code == 2
    assert named in err
    assert not list(tmp_path.iterdir())


def test_a_missing_data_folder_is_named(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, err = run(
        "train", "nano-1-base", f"data={tmp_path}", f"cache={tmp_path / 'c'}", f"output={tmp_path / 'o'}"
    )
    assert code == 2
    assert "train.parquet" in err


@pytest.mark.parametrize("verb", ["train", "plan", "extend"])
def test_data_in_place_of_a_recipe_are_told_apart(
    verb: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Hi", "output": "Hello"}\n')
    code, out, err = run(verb, str(rows))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{rows} holds data" in err
    assert "finetune-text" in err
