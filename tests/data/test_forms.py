"""Records of the usual forms become the same messages; what cannot be read for sure is refused with its reason."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modalora.data.forms import FORMS, Options, control_tokens, detect, form_of, read_record, resolve
from modalora.errors import DataError, PromptError
from modalora.processing.chat import render
from small import as_text

ROOT = Path(__file__).parent
OPTIONS = Options(ROOT)
SAID = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "three"},
]
SAME: dict[str, dict[str, Any]] = {
    "messages": {"messages": SAID},
    "sharegpt": {
        "system": "Be short.",
        "conversations": [
            {"from": "human", "value": "One?"}, {"from": "gpt", "value": "two"},
            {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "three"},
        ],
    },
    "alpaca": {
        "system": "Be short.", "history": [["One?", "two"]], "instruction": "Two?", "input": "", "output": "three",
    },
}  # fmt: skip


@pytest.mark.parametrize("form", SAME)
def test_forms_are_told_by_their_keys_and_say_the_same(form: str) -> None:
    assert form_of(SAME[form]) == form
    assert read_record(SAME[form], form, OPTIONS) == SAID


def test_input_stands_below_the_instruction() -> None:
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert read_record(record, "alpaca", OPTIONS)[0]["content"] == "Add.\n1 2"


def test_fields_of_other_names_are_read_under_those_that_are_known() -> None:
    options = Options(ROOT, rename={"question": "instruction", "answer": "output"})
    messages = read_record({"question": "One?", "answer": "two"}, "alpaca", options)
    assert [message["content"] for message in messages] == ["One?", "two"]
    with pytest.raises(DataError, match="rename makes 'question' to 'instruction', and it has that too"):
        read_record({"question": "One?", "instruction": "old", "answer": "two"}, "alpaca", options)
    messages = read_record({"question": "One?", "instruction": None, "answer": "two"}, "alpaca", options)
    assert [message["content"] for message in messages] == ["One?", "two"]
    turned = Options(ROOT, rename={"output": "instruction", "instruction": "output"})
    messages = read_record({"output": "One?", "instruction": "two"}, "alpaca", turned)
    assert [message["content"] for message in messages] == ["One?", "two"]


def test_a_file_has_one_form_and_says_why() -> None:
    def told(*records: dict[str, Any]) -> tuple[str, str]:
        return detect({f"line {number}": record for number, record in enumerate(records)}, OPTIONS)

    assert told(*[SAME["alpaca"]] * 3) == ("alpaca", "'instruction' and 'output'")
    assert told(SAME["alpaca"], {"other": 1})[0] == "alpaca"  # the other is a bad row when it is read
    counts = r"\(of 3 looked at 2 alpaca; 1 sharegpt, the first in line 1\)"
    with pytest.raises(DataError, match=rf"several forms {counts}; split the file, or read all as one form: form=alp"):
        told(SAME["alpaca"], SAME["sharegpt"], SAME["alpaca"])
    with pytest.raises(DataError, match=r"keys \('question', 'answer'\) fit no form; rename them"):
        told({"question": "a", "answer": "b"})
    with pytest.raises(DataError, match="fit the forms messages, text alike; name one"):
        form_of({"messages": [], "text": "a"})


def pair(**changes: Any) -> dict[str, Any]:
    return {"instruction": "a", "output": "b"} | changes


def asked(content: Any, **media: Any) -> tuple[str, dict[str, Any]]:
    return "messages", {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "c"}],
        **media,
    }


A, B, EMPTY = {"type": "text", "text": "A "}, {"type": "text", "text": " b "}, {"type": "image"}
BOTH = ["1.png", "2.png"]
ONE, TWO = {"type": "image", "image": "1.png"}, {"type": "image_url", "image_url": {"url": "2.png"}}
TURNS = [{"from": "human", "value": "A <image> b <image>"}, {"from": "gpt", "value": "c"}]
PICTURES: list[tuple[str, dict[str, Any]]] = [
    asked("A <image> b <image>", images=BOTH),
    asked("A <|image_1|> b <|image_2|>", images=BOTH),
    asked([A, EMPTY, B, EMPTY], images=BOTH),
    asked([A, ONE, B, EMPTY], images=BOTH[1:]),
    asked([A, ONE, B, TWO]),
    ("sharegpt", {"conversations": TURNS, "image": BOTH}),
    ("alpaca", pair(instruction="A <image> b <image>", images=[{"path": "1.png", "bytes": None}, "2.png"])),
]


@pytest.mark.parametrize(("form", "record"), PICTURES)
def test_media_stand_where_tags_and_empty_parts_are(form: str, record: dict[str, Any]) -> None:
    assert form_of(record) == form
    one, two = ROOT / "1.png", ROOT / "2.png"
    assert read_record(record, form, OPTIONS)[0]["content"] == [
        {"type": "text", "text": "A "},
        {"type": "image", "image": one},
        {"type": "text", "text": " b "},
        {"type": "image", "image": two},
    ]


def test_media_without_tags_stand_before_the_first_words() -> None:
    record = {"instruction": "What?", "output": "a", "images": ["1.png"], "audio": "1.wav"}
    assert read_record(record, "alpaca", OPTIONS)[0]["content"] == [
        {"type": "image", "image": ROOT / "1.png"},
        {"type": "audio", "audio": ROOT / "1.wav"},
        {"type": "text", "text": "What?"},
    ]


def test_captions_answer_the_prompt_of_the_source() -> None:
    record = {"text": "a cat", "images": [b"P"]}
    assert form_of(record) == "caption"
    assert read_record(record, "caption", Options(ROOT, prompt="Describe."))[0]["content"] == [
        {"type": "image", "image": b"P"},
        {"type": "text", "text": "Describe."},
    ]
    assert form_of({"text": "a cat"}) == "text"


def test_tags_may_be_mere_text() -> None:
    record = {"instruction": "What does <image> do in SVG?", "output": "it shows a picture"}
    with pytest.raises(DataError, match="1 <image> places and 0 images; .* or set tags=false"):
        read_record(record, "alpaca", OPTIONS)
    assert read_record(record, "alpaca", Options(ROOT, tags=False))[0]["content"] == record["instruction"]


WAVE = base64.b64encode(b"wave").decode()


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (b"bytes", "image", b"bytes"),
        ({"bytes": b"bytes", "path": "/gone.png"}, "image", b"bytes"),
        (f"data:audio/wav;base64,{WAVE}", "audio", b"wave"),
        ({"path": "a/b.png"}, "image", ROOT / "a/b.png"),
        (str(ROOT / "a.png"), "image", ROOT / "a.png"),  # inside the root
        ("a/../b.png", "image", ROOT / "a/../b.png"),
    ],
)
def test_media_are_paths_or_bytes(value: Any, kind: str, expected: Any) -> None:
    assert resolve(value, kind, OPTIONS) == expected


def test_arrays_keep_their_rate() -> None:
    wave, rate = resolve({"array": [0.0, 0.5], "sampling_rate": 8000}, "audio", OPTIONS)
    assert rate == 8000
    np.testing.assert_array_equal(wave, np.array([0, 0.5], dtype=np.float32))
    for data in (WAVE, f"data:audio/wav;base64,{WAVE}"):
        part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        form, record = asked([part])
        assert read_record(record, form, OPTIONS)[0]["content"] == [{"type": "audio", "audio": b"wave"}]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("/etc/passwd", "lies outside .*; write paths from there, or set media_root"),
        ("../secret.png", "lies outside"),
        ("a/../../secret.png", "lies outside"),
        ("https://host/a.png", "a URL, and nothing is fetched"),
        ("file:///etc/passwd", "a URL, .* give its path"),
        ("data:image/png;base64,@@", "not base64"),
        ("a\0b", "the path of an image is"),
        ("a\ud800.png", "the path of an image is"),
        ("", "the path of an image is"),
        ({"url": None}, "give a path, bytes, or a data URL"),
        (None, "give a path"),
        (3, "give a path"),
    ],
)
def test_media_of_other_kinds_and_places_are_refused(value: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        resolve(value, "image", OPTIONS)


def test_a_link_that_leads_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(DataError, match="lies outside"):
        resolve("link.png", "image", Options(tmp_path / "in"))


def test_a_link_to_itself_is_a_path_like_any_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert resolve("loop.png", "image", Options(tmp_path)) == tmp_path / "loop.png"


@pytest.mark.parametrize(
    ("form", "record", "told"),
    [
        ("alpaca", pair(output=None), "the answer is missing"),
        ("alpaca", pair(output=7), "the answer is of type int"),
        ("alpaca", pair(output=""), "the assistant's, is empty"),
        ("alpaca", pair(instruction="a\0"), "NUL"),
        ("alpaca", {"instruction": "a", "response": "b"},
         "not of the form alpaca .* its keys are instruction, response;"),
        ("alpaca", pair(history=[["a"]]), r"history 1 is \['a'\]"),
        ("alpaca", pair(history=5), "history is 5; write a list"),
        ("alpaca", pair(videos=["a.mp4"]), "'videos', which is not read"),
        ("alpaca", pair(input=0), "input is of type int, and must be text"),
        ("alpaca", pair(instruction="<image>", images=["1", "2"]), "1 <image> places and 2 images"),
        ("alpaca", pair(instruction="<|image_2|><|image_1|>", images=["1", "2"]), "number tags in order"),
        ("alpaca", pair(instruction=f"<|image_{'9' * 5000}|>", images=["1"]), "number tags in order"),
        ("alpaca", pair(image="1", images=["1"]), "both 'image' and 'images'; keep one"),
        ("alpaca", pair(audio={"array": "abc", "sampling_rate": 8000}), "array of an audio is 'abc'; give one number"),
        ("alpaca", pair(audio={"array": [[1], [1, 2]]}), "array of an audio is"),
        ("alpaca", pair(audio={"array": [10**400]}), "array of an audio is"),
        ("alpaca", pair(instruction="<video>\nWhat?"), "the tag <video>, and no video is read; .* tags=false"),
        ("alpaca", pair(instruction="<|video_1|>What?", images=["1"]), r"the tag <\|video_1\|>, and no video"),
        ("alpaca", pair(output=" \n\u3000"), "the assistant's, is empty or blank"),
        ("alpaca", pair(instruction=""), "message 1, the user's, is empty"),
        ("alpaca", pair(instruction="   "), "message 1, the user's, is empty or blank"),
        ("alpaca", pair(history=[["", "c"]], images=["1"], instruction="", input="<image>"),
         "message 1, the user's, is empty"),
        ("messages", {"messages": [SAID[1], SAID[2], {"role": "user", "content": []}, SAID[2]]},
         "message 3, the user's, is empty"),
        ("messages", {"messages": []}, "must be a list of turns"),
        ("messages", {"messages": "text"}, "must be a list of turns"),
        ("messages", {"messages": [{"role": "bot", "content": "a"}]}, "role 'bot'; use one of system"),
        ("messages", {"messages": ["a"]}, "message 1 is 'a'; give a mapping with 'role'"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "content of message 1 is missing"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "part 1 has type 'video'"),
        ("messages", {"messages": SAID[:2]}, "no assistant's message, so nothing in it is trained"),
        ("messages", {"messages": SAID[2:]}, "the assistant speaks first"),
        ("messages", {"messages": [SAID[0], SAID[2]]}, "the assistant speaks first"),
        ("messages", {"messages": [SAID[1], SAID[2], SAID[4]]}, "messages 2 and 3 are both the assistant's; join"),
        ("messages", {"messages": [SAID[1], SAID[0], SAID[2]]}, "message 2 is a system message"),
        ("messages", {"messages": [{"role": "tool", "content": "a"}, SAID[2]]}, "no user's message"),
        ("messages", {"messages": [SAID[1], {**SAID[2], "loss": False}]}, "loss is false for every"),
        ("messages", {"messages": [SAID[1], {**SAID[2], "weight": 0}]}, "loss is false for every"),
        ("messages", {"messages": [SAID[1], {**SAID[2], "loss": "false"}]}, "has loss='false'; write loss as"),
        ("messages", {"messages": [SAID[1], {**SAID[2], "loss": True, "weight": 0}]}, "has loss=True, weight=0; write"),
        ("messages", {"messages": [SAID[1], {"role": "assistant", "content": [{"type": "text", "text": ""}]}]},
         "the assistant's, is empty"),
        ("messages", {"messages": [SAID[1], {"role": "assistant", "tool_calls": [1]}]}, "message 2, call 1 is 1;"),
        ("messages", {"messages": [{**SAID[1], "images": ["1"]}, SAID[2]]},
         "message 1 has 'images', which is not read there; write media beside the turns, or as parts"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a", "audio": "1"}]}, "turn 1 has 'audio', which"),
        ("sharegpt", {"conversations": [{"from": "chatbot", "value": "a"}]}, "turn 1 is from 'chatbot'"),
        ("sharegpt", {"conversations": [{"from": ["human"], "value": "a"}]}, r"turn 1 is from \['human'\]; use"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "the value of turn 1 is missing"),
        ("sharegpt", {"conversations": 3}, "must be a list of turns"),
    ],
)  # fmt: skip
def test_a_record_that_is_not_sure_is_refused_with_what_to_do(form: str, record: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told) as error:
        read_record(record, form, OPTIONS)
    assert "; " in str(error.value)


@pytest.mark.parametrize(
    "message",
    [
        7,
        {"content": "a"},
        {"role": "bot", "content": "a"},
        {"role": "user", "content": "a", "tool_calls": [1]},
        {"role": "user", "content": "a", "tools": [1]},
        {"role": "user", "content": [7]},
        {"role": "user", "content": [{"type": "video", "video": b""}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": 7}]},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "@"}}]},
    ],
)
def test_a_record_is_refused_in_the_words_of_a_prompt(message: Any) -> None:
    with pytest.raises(PromptError) as prompt:
        render([message])
    with pytest.raises(DataError) as record:
        read_record({"messages": [message, {"role": "assistant", "content": "a"}]}, "messages", OPTIONS)
    assert str(record.value) == str(prompt.value)


def test_calls_of_tools_are_the_same_in_every_form_that_has_them() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    written = {"function": {**call, "arguments": '{"a": 1}'}, "type": "function"}
    talk = [
        {"from": "human", "value": "One and one?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "two"},
    ]
    turns = [
        {"role": "user", "content": "One and one?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **written}]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    told = (
        '<|user|>One and one?<|end|><|assistant|><|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|>'
        "<|end|><|tool|>2<|end|><|assistant|>two<|end|>"
    )
    for record in ({"conversations": talk}, {"messages": turns}):
        assert as_text(render(read_record(record, form_of(record), OPTIONS), answer=False)) == told
    talk[1]["value"] = json.dumps([call, call])
    assert len(read_record({"conversations": talk}, "sharegpt", OPTIONS)[1]["tool_calls"]) == 2
    talk[1]["value"] = "add(1)"
    with pytest.raises(DataError, match=r"turn 2, a function_call, is 'add\(1\)'; write JSON"):
        read_record({"conversations": talk}, "sharegpt", OPTIONS)


TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": SAID[1:3], "tools": TOOLS},
        {"messages": [{"role": "system", "content": "", "tools": TOOLS}, *SAID[1:3]]},
        {"messages": [{"role": "system", "content": None, "tools": TOOLS}, *SAID[1:3]], "tools": []},
        {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "two"}], "tools": TOOLS},
    ],
)  # fmt: skip
def test_tools_beside_the_turns_are_those_of_the_system_message(record: dict[str, Any]) -> None:
    messages = read_record(record, form_of(record), OPTIONS)
    assert messages == [{"role": "system", "content": "", "tools": TOOLS}, *SAID[1:3]]
    assert not FORMS[form_of(record)].unread(record)


def test_tools_join_the_system_message_that_there_is() -> None:
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Ho")]
    talk = {"conversations": [{"from": name, "value": words} for name, words in turns], "tools": '[{"name":"f"}]'}
    system = {"role": "system", "content": "Be brief."}
    assert read_record(talk, "sharegpt", OPTIONS)[0] == {**system, "tools": '[{"name":"f"}]'}
    assert read_record({**talk, "tools": "[]"}, "sharegpt", OPTIONS)[0] == system
    assert read_record({"messages": SAID[1:3], "tools": "[]"}, "messages", OPTIONS) == SAID[1:3]
    alone = {"messages": [{"role": "system", "content": None, "tools": "[]"}, *SAID[1:3]]}
    with pytest.raises(DataError, match="the content of message 1 is missing"):
        read_record(alone, "messages", OPTIONS)
    both = {"messages": [{"role": "system", "content": "", "tools": TOOLS}, *SAID[1:3]], "tools": TOOLS}
    with pytest.raises(DataError, match="tools beside its turns and in its system message; keep one"):
        read_record(both, "messages", OPTIONS)
    with pytest.raises(DataError, match="it has tools=5; give a list of definitions"):
        read_record({"messages": SAID[1:3], "tools": 5}, "messages", OPTIONS)


def test_control_tokens_in_texts_are_seen() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a<|end|>"}]},
        {"role": "assistant", "content": "b"},
    ]
    assert control_tokens(messages) == ["<|end|>"]
    assert control_tokens(SAID) == []


def test_every_form_lists_the_fields_it_reads() -> None:
    for form, record in SAME.items():
        assert not FORMS[form].unread(record)
    turns = [{**SAID[1], "name": "Ann", "id": None}, {**SAID[2], "weight": 1, "train": False}]
    assert FORMS["messages"].unread({"messages": turns, "id": 7}) == ["id", "messages[].name", "messages[].train"]


def test_answers_are_left_out_of_the_loss_as_openai_writes_it() -> None:
    turns = [SAID[1], {**SAID[2], "weight": 0}, SAID[3], {**SAID[4], "weight": 1}]
    assert [turn.get("loss") for turn in read_record({"messages": turns}, "messages", OPTIONS)] == [None, 0, None, 1]
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss": False}] * 2
    talk[3] = {"from": "gpt", "value": "b", "loss": None}
    made = read_record({"conversations": talk}, "sharegpt", OPTIONS)
    assert [turn.get("loss", True) for turn in made] == [True, False, True, True]
