"""A conversation in the terminal: what it keeps, what it refuses, and how it ends."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import modalora
from modalora.assistant import Assistant, make_processor
from modalora.checkpoint.find import BUNDLED
from modalora.cli.chat import HELP, Session
from modalora.errors import ConfigError, WorkError
from modalora.modality import check_name
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from small import fox

SCENE, DIGITS = BUNDLED / "demo" / "scene.png", BUNDLED / "demo" / "digits.wav"
WINDOW = 2048  # of the tiny model
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def session() -> Session:
    """A session with a tiny model that was never trained, as at a terminal."""
    made = Session(
        Assistant(Multimodal(tiny()).eval(), make_processor(tiny(), fox())),
        {"max_tokens": 4, "temperature": 0.0, "seed": 0},
    )
    made.terminal = True
    return made


@pytest.fixture
def take(session: Session, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that takes lines and returns what the last one printed."""

    def said(*lines: str) -> str:
        for line in lines:
            capsys.readouterr()
            session.take(line)
        return capsys.readouterr().out

    return said


Take = Callable[..., str]


def roles(session: Session) -> list[str]:
    return [message["role"] for message in session.messages]


def test_media_are_held_as_they_were(session: Session, take: Take, tmp_path: Path) -> None:
    picture, saved = tmp_path / "my picture.png", tmp_path / "saved.jsonl"
    picture.write_bytes(SCENE.read_bytes())
    assert "goes with your next message" in take(f"/image '{picture}'")
    picture.unlink()
    assert not take("What?", "And now?").startswith("!")
    take(f'/save "{saved}"')
    (line,) = saved.read_text().splitlines()
    assert json.loads(line)["messages"][0]["content"][0] == {"type": "image", "image": "my picture.png"}


def test_what_was_saved_is_read_as_rows_of_training(
    session: Session, take: Take, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d" / "img").mkdir(parents=True)
    (tmp_path / "d" / "img" / "0.png").write_bytes(SCENE.read_bytes())
    monkeypatch.chdir(tmp_path)
    take("/image d/img/0.png", "What?", "/save d/chat.jsonl", f"/audio {DIGITS}", "And?", "/save d/both.jsonl")
    assert json.loads(Path("d/chat.jsonl").read_text())["messages"][0]["content"][0]["image"] == "img/0.png"
    code, out, _ = run("data", "check", "d/chat.jsonl")
    assert (code, "every row is good" in out) == (0, True)
    code, out, _ = run("data", "check", "d/both.jsonl")  # DIGITS is elsewhere
    assert (code, f"the audio '{DIGITS}' lies outside" in out.replace("\n", "")) == (1, True)
    assert run("data", "check", "d/both.jsonl", "mixture.0.options.media_root=/")[0] == 1  # the picture is not there
    code, out, _ = run("route", "explain", "nano", "Hi", "--batch", "d/chat.jsonl", "--json")
    assert (code, json.loads(out.splitlines()[1])["modalities"]) == (0, ["image"])
    code, _, err = run("route", "explain", "nano", "Hi", "--batch", "d/both.jsonl")
    assert (code, f"d/both.jsonl, line 1: the audio '{DIGITS}' lies outside 'd'" in err) == (2, True)


def test_tags_that_were_mere_text_are_such_in_what_was_saved(
    session: Session, take: Take, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    take("/system <audio> is a tag.", "Is <image> or <|image_1|> one?", "/save chat.jsonl")
    saved = json.loads(Path("chat.jsonl").read_text())["messages"]
    processor = session.assistant.processor
    assert processor.row(saved, answer=False).ids == processor.row(session.messages, answer=False).ids
    code, out, _ = run("data", "check", "chat.jsonl")
    assert (code, "every row is good" in out) == (0, True)


def test_the_route_shown_is_the_one_that_was_taken(session: Session, take: Take) -> None:
    take(f"/image {SCENE}", "What?")
    tokens = int(session.assistant.processor.measure(session.messages[:1]))
    shown = take("/route")
    assert "adapter    vision" in shown
    assert f"tokens     {tokens}" in shown
    shown = take("/route none", "/route")
    assert "adapter    vision" in shown
    assert "[route none]" in shown
    assert "adapter" not in take("/reset", "/route")


def interrupted(answer: list[str]) -> Callable[..., Iterator[str]]:
    def stream(*_: Any, **__: Any) -> Iterator[str]:
        yield from answer
        raise KeyboardInterrupt

    return stream


def test_a_stopped_answer_is_kept_as_far_as_it_came(
    session: Session, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    take("Hi", f"/image {SCENE}")
    monkeypatch.setattr(session.assistant, "stream", interrupted([]), raising=False)
    with pytest.raises(KeyboardInterrupt):
        session.take("What?")
    assert (roles(session), len(session.waiting)) == (["user", "assistant"], 1)
    monkeypatch.setattr(session.assistant, "stream", interrupted(["a ", "few"]), raising=False)
    with pytest.raises(KeyboardInterrupt):
        session.take("What?")
    assert session.messages[-1] == {"role": "assistant", "content": "a few"}
    assert session.waiting == []
    monkeypatch.undo()
    take("/retry")
    assert len(session.messages) == 4


def test_an_answer_that_fails_loses_nothing(session: Session, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[str]:
        raise WorkError("no numbers")

    take("Hi", f"/audio {DIGITS}")
    before, monkeypatched = session.messages, session.assistant
    monkeypatch.setattr(monkeypatched, "stream", stream, raising=False)
    assert take("/retry") == "! no numbers\n"
    assert take("What?") == "! no numbers\n"
    assert (session.messages, len(session.waiting), session.exit_code) == (before, 1, 1)


def test_ctrl_c_at_the_prompt_leaves_the_second_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str | BaseException] = [KeyboardInterrupt(), "Hi", KeyboardInterrupt(), KeyboardInterrupt(), "never"]

    def line(prompt: str = "") -> str:
        key = keys.pop(0)
        if isinstance(key, BaseException):
            raise key
        return key

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, out, err = run("chat", "nano", "--max-tokens", "1")
    assert (code, out.count("[Ctrl-C again leaves"), keys) == (130, 2, ["never"])


def test_what_was_added_can_be_dropped_and_stays_through_a_new_beginning(session: Session, take: Take) -> None:
    assert "goes with" in take(f"/image {SCENE}", "/system Be brief.", f"/audio {DIGITS}")
    assert len(session.waiting) == 2
    assert take("/drop") == "[dropped: image, audio]\n"
    assert (session.waiting, roles(session)) == ([], ["system"])
    assert take(f"/image {SCENE}", "/reset") == "[dropped: image]\n"
    assert (session.waiting, session.messages) == ([], [])


def test_media_that_no_longer_fit_are_refused_when_they_are_added(session: Session, take: Take) -> None:
    added = 0
    while "goes with" in (told := take(f"/image {SCENE}")):
        added += 1
    assert told.startswith("! with this the conversation is 2")
    assert f"and the model reads {WINDOW}, its answer included; /reset starts anew, /drop takes out" in told
    assert added == len(session.waiting)
    take("What?")
    assert roles(session) == ["user", "assistant"]


def test_an_answer_takes_the_room_that_is_left_and_a_full_window_is_told(session: Session, take: Take) -> None:
    session.settings["max_tokens"] = 128
    around = session.assistant.processor.measure([{"role": "user", "content": ""}])
    told = take("z" * (WINDOW - around - 2))
    assert "[the window is nearly full: 2 tokens were left for this answer; /reset starts anew]" in told
    assert "/reset starts anew" in take("Hi")
    assert len(session.messages) == 2


def test_a_file_of_a_further_modality_is_saved_as_rows_of_training_name_it(
    session: Session, take: Take, tmp_path: Path
) -> None:
    parts = [{"type": "dna", "dna": str(tmp_path / "gene.txt")}, {"type": "text", "text": "What?"}]
    session.messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a gene"}]
    take(f"/save {tmp_path / 'chat.jsonl'}")
    saved = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert saved[0]["content"] == [{"type": "dna", "dna": {"path": "gene.txt"}}, parts[1]]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/image", "/image '' names no file; write /image and the path of one"),
        ("/image ''", "/image '' names no file"),
        ("/save", "/save '' names no file"),
        ("/save a\0b", r"/save 'a\x00b' names no file"),
        ("/save chat.jsonl", "nothing to save yet"),
        ("/retry", "nothing to retry yet"),
    ],
)
def test_what_names_or_holds_nothing_is_refused(session: Session, take: Take, line: str, told: str) -> None:
    assert take(line).startswith(f"! {told}")
    assert session.exit_code == 2


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "'https://example.com/a.png'", "data:image/png;base64,AA"]
)
def test_a_url_is_told_as_it_was_written(take: Take, url: str) -> None:
    bare = url.strip("'")
    assert take(f"/image {url}") == f"! {bare!r} is a URL, and /image takes a file; download it and give its path\n"


def test_no_modality_takes_the_name_of_a_command() -> None:
    commands = set(re.findall(r"(?<!\S)/([a-z]+)", HELP)) - {"image", "audio", "dna"}
    assert commands >= {"save", "system", "exit", "help"}
    for name in commands:
        with pytest.raises(ConfigError, match=f"'{name}' cannot name a modality"):
            check_name(name)


def test_a_second_conversation_is_appended(session: Session, take: Take, tmp_path: Path) -> None:
    saved = tmp_path / "chat.jsonl"
    assert take("Hi", f"/save {saved}") == f"[saved to {saved}]\n"
    assert take(f"/save {saved}") == f"[appended to {saved} as line 2]\n"
    saved.write_text(saved.read_text().rstrip("\n"))
    assert take(f"/save {saved}") == f"[appended to {saved} as line 3]\n"
    assert len([json.loads(line) for line in saved.read_text().splitlines()]) == 3


def test_a_greedy_answer_that_is_the_same_again_says_why(session: Session, take: Take) -> None:
    assert "[the same: a greedy answer does not change; begin with --temperature" in take("Hi", "/retry")
    session.settings["temperature"] = 2.0
    assert "[the same" not in take("/retry", "/retry")


@pytest.mark.parametrize(("option", "value"), [("--temperature", "nan"), ("--max-tokens", "0"), ("--seed", str(2**70))])
def test_bad_settings_are_refused_before_a_model_is_looked_for(run: Run, option: str, value: str) -> None:
    code, _, err = run("chat", "no-such-model", option, value)
    assert code == 2
    assert f"{option[2:].replace('-', '_')}={value} must be" in err


def test_errors_of_a_piped_chat_go_to_stderr_and_make_its_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/nonsense\nHi\n"))
    code, out, err = run("chat", "nano", "--max-tokens", "1")
    assert (code, err, "!" in out) == (2, "! unknown command /nonsense; /help lists the commands\n", False)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert run("chat", "nano", "--max-tokens", "1")[0] == 0


def test_what_an_encoding_lacks_is_escaped() -> None:
    code = "import sys; from modalora.cli.main import main; sys.argv[1:] = ['--version']\n"
    code += "try: main()\nexcept SystemExit: print('n\u00f8 \u6771')"
    plain = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(modalora.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.endswith(r"n\xf8 \u6771" + "\n")
