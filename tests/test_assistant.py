"""The front door, on a tiny model that was saved to disk."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import modalora
from modalora.assistant import Assistant, make_processor, set_regime
from modalora.checkpoint.adapters import CONFIG, WEIGHTS, load_adapter, save_adapter
from modalora.checkpoint.find import find_model
from modalora.contracts import Batch, Route
from modalora.disk import read_json, write_json
from modalora.errors import CheckpointError, ConfigError, ModaloraError, PromptError, RouteError
from modalora.generation import engine
from modalora.models.sizes import tiny
from modalora.nn.cache import KVCache
from modalora.nn.lora import LoraConfig
from modalora.processing.chat import render, render_raw
from modalora.processing.questions import question_messages
from modalora.processing.tokenizer import END, TextTokenizer
from small import as_text, shaken

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8))
SOUND = (np.random.default_rng(1).standard_normal(6000).astype(np.float32) / 8, 8000)
WORDS = "seven blue boxes touch the wall, and the quick brown fox jumps over the lazy dog; how many are there? " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = TextTokenizer.train([WORDS], 320)
    folder = tmp_path_factory.mktemp("models") / "small"
    assistant = Assistant(shaken(), make_processor(tiny(), tokenizer), notes={"trained": "never"})
    assistant.save(folder)
    return folder


@pytest.fixture
def assistant(folder: Path) -> Assistant:
    return modalora.load(folder)


# ------------------------------------------------------------------------------------------------------------- asking


def test_an_answer_is_the_text_of_its_tokens_with_their_count(assistant: Assistant) -> None:
    answer = assistant.ask("How many boxes?", max_tokens=12)
    prompt = len(assistant.processor.row(question_messages("How many boxes?")).ids)
    assert answer.text == assistant.processor.tokenizer.decode(answer.tokens)
    assert answer.finish_reason == "length"
    assert len(answer.tokens) == 12
    assert answer.usage == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}
    assert answer.seconds > 0


def test_a_question_is_a_user_message(assistant: Assistant) -> None:
    asked = assistant.ask("How many boxes?", max_tokens=8)
    told = assistant.ask([{"role": "user", "content": "How many boxes?"}], max_tokens=8)
    assert asked.tokens == told.tokens


def test_conversations_of_any_media_answered_together_say_what_they_say_alone(assistant: Assistant) -> None:
    rows = [
        question_messages("How many boxes?"),
        question_messages("Which is blue?", image=PICTURE),
        question_messages("", audio=SOUND),
        question_messages("Is it?", image=[PICTURE, PICTURE], audio=SOUND),
    ]
    together = assistant.ask_many(rows, max_tokens=10)
    alone = [assistant.ask(row, max_tokens=10) for row in rows]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.route for answer in together] == [answer.route for answer in alone]
    assert [answer.route["adapter"] for answer in together] == [None, "vision", "speech", "vision"]


def test_a_batch_may_be_smaller_than_what_is_asked(assistant: Assistant) -> None:
    asked = ["How many boxes?", question_messages("Which?", PICTURE), "Hi", question_messages("", audio=SOUND), "And?"]
    alone = [assistant.ask(one, max_tokens=5, temperature=1.0, seed=4).tokens for one in asked]
    for rows in (1, 2, 5, 9):
        found = assistant.ask_many(asked, max_tokens=5, temperature=1.0, seed=4, rows=rows)
        assert [answer.tokens for answer in found] == alone
    for rows in (0, True, "2"):
        with pytest.raises(ConfigError, match=f"rows={rows!r} must be a whole number of at least 1, such as 16"):
            assistant.ask_many(asked, rows=rows)


def test_as_the_released_code_does_one_picture_routes_all_that_is_asked(folder: Path) -> None:
    official = modalora.load(folder, compat="official")
    found = official.ask_many(["Hi", question_messages("Which?", PICTURE)], max_tokens=1, rows=1)
    assert [answer.route["adapter"] for answer in found] == ["vision"] * 2


def test_each_conversation_may_have_its_own_seed(assistant: Assistant) -> None:
    asked = ["How many boxes?"] * 3
    same = assistant.ask_many(asked, max_tokens=12, temperature=1.5, seed=4)
    assert len({answer.tokens for answer in same}) == 1
    found = assistant.ask_many(asked, max_tokens=12, temperature=1.5, seed=(3, 4, 5), rows=2)
    assert [answer.tokens for answer in found] == [
        assistant.ask(asked[0], max_tokens=12, temperature=1.5, seed=seed).tokens for seed in (3, 4, 5)
    ]
    assert len({answer.tokens for answer in found}) == 3
    with pytest.raises(ConfigError, match=r"seed has 2 number\(s\) for 3 conversation\(s\); give one for each"):
        assistant.ask_many(asked, seed=[1, 2])
    with pytest.raises(ConfigError, match="seed=.* must be a whole number of 64 bits"):
        assistant.ask_many(asked, seed=[1, 2, 2**70])


def test_what_is_wrong_with_one_of_many_is_told_with_its_number_before_an_answer(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("answered")

    monkeypatch.setattr(assistant, "_answers", never, raising=False)
    bad = question_messages("?", image="nowhere.png")
    for rows in (1, 9):
        with pytest.raises(ModaloraError, match="^conversation 3: 'nowhere.png' does not exist"):
            assistant.ask_many(["Hi", "Ho", bad], rows=rows)
    with pytest.raises(ModaloraError, match="^'nowhere.png' does not exist"):
        assistant.ask_many([bad])


def test_what_cannot_be_asked_comes_back_in_its_place(assistant: Assistant) -> None:
    asked = ["Hi", question_messages("?", image="nowhere.png"), "z" * 3000, "Ho"]
    first, missing, long, last = assistant.ask_each(asked, max_tokens=3, rows=3)
    assert (first.tokens, last.tokens) == tuple(assistant.ask(one, max_tokens=3).tokens for one in ("Hi", "Ho"))
    assert "'nowhere.png' does not exist" in str(missing)
    assert "this model reads at most" in str(long)
    with pytest.raises(RouteError, match="unknown route 'mine'"):
        assistant.ask_each(asked, route="mine")
    assert list(assistant.ask_each([])) == []


def test_one_line_shows_what_was_loaded(assistant: Assistant) -> None:
    numbers = sum(parameter.numel() for parameter in assistant.model.parameters())
    assert repr(assistant) == (
        f"Assistant(small: {numbers:,} numbers, window 2,048, adapters vision, speech, float32 on cpu)"
    )


def test_media_may_be_given_in_every_form(assistant: Assistant, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    told = assistant.ask("Which?", image=PICTURE, max_tokens=6).tokens
    path, buffer = tmp_path / "picture.png", io.BytesIO(data)
    buffer.seek(0, 2)  # as it is behind what was written
    held = [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, np.asarray(PICTURE), buffer]
    for image in (path, str(path), data, [PICTURE], (PICTURE,), *held):
        assert assistant.ask("Which?", image=image, max_tokens=6).tokens == told
    assert assistant.ask("Which?", image=[*held], max_tokens=6).tokens == (
        assistant.ask("Which?", image=[PICTURE] * 4, max_tokens=6).tokens
    )
    heard = assistant.ask("Which?", audio=SOUND, max_tokens=6).tokens
    for audio in ([SOUND], (SOUND,), (SOUND[0], np.int64(8000)), {"array": SOUND[0], "sampling_rate": 8000}):
        assert assistant.ask("Which?", audio=audio, max_tokens=6).tokens == heard
    plain = assistant.ask("Which?", max_tokens=6).tokens
    assert assistant.ask("Which?", image=None, audio=None, max_tokens=6).tokens == plain


def test_sampling_depends_on_the_seed_alone(assistant: Assistant) -> None:
    def ask(seed: int) -> tuple[int, ...]:
        return assistant.ask("How many?", max_tokens=12, temperature=1.5, seed=seed).tokens

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_an_unknown_sampling_setting_is_refused_with_those_there_are(assistant: Assistant) -> None:
    with pytest.raises(ConfigError, match="unknown sampling setting warmth; known are temperature, top_k, top_p"):
        assistant.ask("How many?", warmth=0.5, seed=1)
    with pytest.raises(ConfigError, match="unknown sampling setting warmth"):
        assistant.stream("How many?", warmth=0.5)
    with pytest.raises(ConfigError, match=r"top_p=2.0 must be in \(0, 1\]"):
        assistant.ask("How many?", top_p=2.0)


# ------------------------------------------------------------------------------------------------- stopping, streaming


class Script:
    """Says the given ids one after another, whatever it reads."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = iter(ids)

    def new_cache(self, batch: int) -> KVCache:
        return KVCache(0, batch)

    def read(self, batch: Batch, cache: KVCache, reach: Sequence[int] | None = None) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(self.ids)]), 320).float()

    def read_next(self, ids: Tensor, route: Route, cache: KVCache, reach: Sequence[int] | None = None) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(self.ids)]), 320).float()

    def table_number(self, length: int) -> int:
        return 0


Say = Callable[[Sequence[int]], None]


@pytest.fixture
def say(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Return a function after which the next answer consists of the given ids and, behind them, <|end|>."""

    end = assistant.processor.tokenizer.control(END)

    def script(ids: Sequence[int]) -> None:
        model = Script([*ids, end])
        monkeypatch.setattr(
            "modalora.assistant.generate", lambda _, batch, **settings: engine.generate(model, batch, **settings)
        )

    return script


def test_the_end_token_stops_and_is_no_part_of_the_answer(assistant: Assistant, say: Say) -> None:
    tokenizer = assistant.processor.tokenizer
    ids = tokenizer.encode("seven boxes")
    say(ids)
    answer = assistant.ask("How many?")
    assert (answer.text, answer.tokens, answer.finish_reason) == ("seven boxes", tuple(ids), "stop")
    assert answer.usage["completion_tokens"] == len(ids)
    say([])
    assert assistant.ask("How many?").text == ""


def test_a_call_in_an_answer_is_told_from_its_text(assistant: Assistant, say: Say) -> None:
    tokenizer = assistant.processor.tokenizer
    written = '[{"name": "seven", "arguments": {"a": 1}}]'
    ids = [tokenizer.control("<|tool_call|>"), *tokenizer.encode(written), tokenizer.control("<|/tool_call|>")]
    say(ids)
    answer = assistant.ask("How many?")
    assert (answer.text, answer.content, answer.finish_reason) == (written, "", "tool_calls")
    assert answer.tool_calls == ({"type": "function", "function": {"name": "seven", "arguments": '{"a": 1}'}},)
    said = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": None, "tool_calls": answer.tool_calls},
        {"role": "tool", "content": "7"},
    ]
    read = assistant.processor.row(said).ids
    assert read[read.index(ids[0]) :][: len(ids)] == ids
    say(ids)
    assert assistant.ask("How many?", max_tokens=4).finish_reason == "length"
    say(tokenizer.encode(written))
    plain = assistant.ask("How many?")
    assert (plain.text, plain.content, plain.finish_reason, plain.tool_calls) == (written, written, "stop", ())


@pytest.mark.parametrize(
    ("between", "stop", "text", "content", "told"),
    [
        ("", (), "seven blue", "seven blue", [""]),
        ("[]", (), "seven[] blue", "seven blue", ["[]"]),
        ('{"name": "box", "arguments": {}}', "x", 'seven{"name": "bo', "seven", ['{"name": "b']),  # "ox" is a token
        ('{"name": "box", "arguments": {}}', "sev", "", "", []),
        ('{"name": "box", "arguments": {}}', "lu", 'seven{"name": "box", "arguments": {}} b', "seven b", ["box"]),
    ],
)
def test_what_is_no_whole_call_and_what_a_stop_string_cut_is_no_end_by_calls(
    assistant: Assistant, say: Say, between: str, stop: str, text: str, content: str, told: list[str]
) -> None:
    tokenizer = assistant.processor.tokenizer
    call, end = tokenizer.control("<|tool_call|>"), tokenizer.control("<|/tool_call|>")
    letters = [index for letter in " blue" for index in tokenizer.encode(letter)]
    say([*tokenizer.encode("seven"), call, *tokenizer.encode(between), end, *letters])
    answer = assistant.ask("How many?", stop=stop)
    assert (answer.text, answer.content, answer.finish_reason) == (text, content, "stop")
    assert [one if isinstance(one, str) else one["function"]["name"] for one in answer.tool_calls] == told


def test_a_stop_string_does_not_end_an_answer_within_a_character(assistant: Assistant, say: Say) -> None:
    for text, told in (("one € two", "one € two"), ("one \ufffd two", "one ")):
        say(assistant.processor.tokenizer.encode(text))
        assert assistant.ask("?", stop="\ufffd").text == told


@pytest.mark.parametrize(
    ("stop", "told"),
    [
        (["boxes"], "seven blue "),
        ("boxes", "seven blue "),
        (["wall", "blue"], "seven "),
        (["x", "o"], "seven blue b"),  # "ox" is a token
        (["e box"], "seven blu"),
        (["seven"], ""),
        (["absent"], "seven blue boxes touch é the wall"),
        (["é"], "seven blue boxes touch "),
        ([], "seven blue boxes touch é the wall"),
    ],
)
def test_stop_strings_end_the_answer_and_are_cut(
    assistant: Assistant, say: Say, stop: str | list[str], told: str
) -> None:
    ids = assistant.processor.tokenizer.encode("seven blue boxes touch é the wall")
    say(ids)
    answer = assistant.ask("How many?", stop=stop)
    assert (answer.text, answer.finish_reason) == (told, "stop")
    say(ids)
    assert "".join(assistant.stream("How many?", stop=stop)) == told


def test_an_empty_stop_string_is_refused(assistant: Assistant) -> None:
    for stop in ("", [""], [".", ""]):
        with pytest.raises(ConfigError, match="stop holds an empty string"):
            assistant.ask("How many?", stop=stop)


def test_pieces_of_a_stream_are_whole_characters_as_soon_as_they_are_known(assistant: Assistant, say: Say) -> None:
    text = "naïve — 東京 😀 ok"
    say(assistant.processor.tokenizer.encode(text))
    pieces = list(assistant.stream("Say it."))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 10
    assert "" not in pieces


@given(
    st.one_of(
        st.text(max_size=12),
        st.lists(st.integers(0, 319), max_size=24),  # bytes that are no text, and control tokens, among them
    ),
    st.lists(st.text(st.sampled_from("aé京e \ufffd😀s"), min_size=1, max_size=3), max_size=3),
    st.integers(1, 30),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_joins_to_the_text_that_ask_gives(
    assistant: Assistant, say: Say, answer: str | list[int], stop: list[str], count: int
) -> None:
    ids = assistant.processor.tokenizer.encode(answer) if isinstance(answer, str) else answer
    say(ids)
    told = assistant.ask("?", stop=stop, max_tokens=count)
    say(ids)
    assert "".join(assistant.stream("?", stop=stop, max_tokens=count)) == told.text
    assert not any(word in told.text for word in stop)


def test_a_stream_of_the_real_model_joins_to_its_answer(assistant: Assistant) -> None:
    for question in ("How many boxes?", question_messages("Which?", image=PICTURE)):
        told = assistant.ask(question, max_tokens=25, temperature=1.0, seed=3)
        assert "".join(assistant.stream(question, max_tokens=25, temperature=1.0, seed=3)) == told.text


def test_a_stream_gives_its_first_piece_before_the_answer_is_done(assistant: Assistant) -> None:
    ids = assistant.processor.tokenizer.encode("seven blue boxes")

    def slow() -> Iterator[int]:
        yield ids[0]
        raise AssertionError("asked for more before the first piece was taken")

    model = Script(())
    model.ids = slow()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modalora.assistant.generate", lambda _, batch, **told: engine.generate(model, batch, **told))
        assert next(assistant.stream("?")) == assistant.processor.tokenizer.decode(ids[:1])


LEFT = """
import sys, modalora
pieces = modalora.load(sys.argv[1]).stream("How many boxes?", max_tokens=9)
next(pieces)
"""


def test_a_stream_that_is_left_in_its_middle_ends_quietly(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LEFT, str(folder)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_what_a_stream_is_read_in_is_not_what_its_caller_computes_in(assistant: Assistant) -> None:
    pieces = assistant.stream("How many boxes?", image=PICTURE, max_tokens=9)
    next(pieces)
    assert not torch.is_inference_mode_enabled()
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad


# ------------------------------------------------------------------------------------------------- questions and media


def shown(messages: list[Any]) -> str:
    return as_text(render(messages))


def test_tags_in_a_question_place_its_media() -> None:
    other, clip = PICTURE.rotate(90), b"RIFF"
    (message,) = question_messages("Is <|image_1|> like <|image_2|>, as <|audio_1|> says?", [PICTURE, other], clip)
    assert message == {
        "role": "user",
        "content": [
            {"type": "text", "text": "Is "},
            {"type": "image", "image": PICTURE},
            {"type": "text", "text": " like "},
            {"type": "image", "image": other},
            {"type": "text", "text": ", as "},
            {"type": "audio", "audio": clip},
            {"type": "text", "text": " says?"},
        ],
    }
    assert shown([message]) == ("<|user|>Is <|image_1|> like <|image_2|>, as <|audio_1|> says?<|end|><|assistant|>")


def test_the_number_of_a_tag_is_that_of_its_picture() -> None:
    other = PICTURE.rotate(90)
    (message,) = question_messages("A <|image_2|> B <|image_1|>", [PICTURE, other])
    assert [part["image"] for part in message["content"] if part["type"] == "image"] == [other, PICTURE]


def test_a_tag_without_a_number_is_the_next_of_its_kind() -> None:
    other = PICTURE.rotate(90)
    (message,) = question_messages("<image>Is it like <|image_2|>, as <audio> says?", [PICTURE, other], SOUND)
    assert [part["type"] for part in message["content"]] == ["image", "text", "image", "text", "audio", "text"]
    assert [part["image"] for part in message["content"] if part["type"] == "image"] == [PICTURE, other]


def test_tags_in_messages_place_what_is_given_beside_them(assistant: Assistant) -> None:
    other = PICTURE.rotate(90)
    said = [
        {"role": "user", "content": "<image>Is it blue?"},
        {"role": "assistant", "content": "An <image> is no place in an answer"},
        {"role": "user", "content": "And <image>?"},
    ]
    told = assistant.ask(said, image=[PICTURE, other], max_tokens=4)
    parts = [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Is it blue?"}]},
        said[1],
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image", "image": other},
                                     {"type": "text", "text": "?"}]},
    ]  # fmt: skip
    assert told.route == assistant.ask(parts, max_tokens=4).route
    assert "".join(assistant.stream(said, image=[PICTURE, other], max_tokens=4)) == told.text


def test_a_tag_without_its_medium_is_refused_and_a_part_is_mere_text(assistant: Assistant) -> None:
    asked = [{"role": "user", "content": "<image>Is it blue?"}]
    for ask in (
        assistant.ask,
        assistant.logits,
        lambda one: assistant.stream(one),
        lambda one: assistant.ask_many([one]),
    ):
        with pytest.raises(
            PromptError, match=r"has 1 image placeholder\(s\) and 0 image\(s\) were given; give as many"
        ):
            ask(asked)
    with pytest.raises(PromptError, match="conversation 2: the text has 1 audio placeholder"):
        assistant.ask_many(["Hi", "Say <audio>"])
    asked = [{"role": "user", "content": [{"type": "text", "text": "What does <audio> do in HTML?"}]}]
    assert assistant.ask(asked, max_tokens=1).route["adapter"] is None


def test_a_conversation_that_ends_with_an_answer_is_not_answered_but_read(assistant: Assistant) -> None:
    said = [{"role": "user", "content": "Repeat: one two"}, {"role": "assistant", "content": "one"}]
    open_one = question_messages("Hi")
    for ask in (assistant.ask, lambda messages: list(assistant.stream(messages))):
        with pytest.raises(PromptError, match="^the last message is the assistant's own; leave that out"):
            ask(said)
    with pytest.raises(PromptError, match="conversation 2: the last message is the assistant's own"):
        assistant.ask_many([open_one, said])
    assert assistant.ask([*said, *open_one], max_tokens=1).finish_reason == "length"
    assert len(assistant.logits(said)) == len(assistant.processor.row(said).ids)


def test_logits_may_go_into_what_is_trained(assistant: Assistant) -> None:
    weight = torch.ones(320, requires_grad=True)
    (assistant.logits("Hi") * weight).sum().backward()
    assert weight.grad is not None


def test_media_without_tags_stand_before_the_text() -> None:
    assert shown(question_messages("Is it?", [PICTURE, PICTURE], SOUND)) == (
        "<|user|><|image_1|><|image_2|><|audio_1|>Is it?<|end|><|assistant|>"
    )
    assert shown(question_messages("Is it <|audio_1|>?", PICTURE, SOUND)) == (
        "<|user|><|image_1|>Is it <|audio_1|>?<|end|><|assistant|>"
    )
    assert shown(question_messages("", audio=SOUND)) == "<|user|><|audio_1|><|end|><|assistant|>"


@pytest.mark.parametrize(
    ("question", "images", "told"),
    [
        (
            "Is <|image_1|> blue?",
            2,
            r"the text has 1 image placeholder\(s\) and 2 image\(s\) were given; .*<\|image_N\|>",
        ),
        ("Is <|image_1|> like <|image_2|>?", 1, r"has 2 image placeholder\(s\) and 1 image\(s\)"),
        ("Is <|image_1|> blue?", 0, r"has 1 image placeholder\(s\) and 0 image\(s\)"),
        ("Say <|audio_1|>", 1, r"has 1 audio placeholder\(s\) and 0 audio\(s\)"),
        ("<|image_1|> or <|image_1|>?", 2, "placeholders are numbered 1, 1; number them 1 to 2, each once"),
        ("<|image_2|> or <|image_3|>?", 2, "placeholders are numbered 2, 3; number them 1 to 2"),
        ("<|image_0|> or <|image_1|>?", 2, "placeholders are numbered 0, 1; number them 1 to 2"),
        ("Is <|image_01|> blue?", 1, "placeholders are numbered 01; number them 1 to 1"),
    ],
)
def test_tags_must_be_as_many_as_media(assistant: Assistant, question: str, images: int, told: str) -> None:
    with pytest.raises(PromptError, match=told):
        assistant.ask(question, image=[PICTURE] * images)


def test_an_empty_question_needs_media(assistant: Assistant) -> None:
    with pytest.raises(PromptError, match="the question is empty and there are no media"):
        assistant.ask("")
    assert assistant.ask("", audio=SOUND, max_tokens=2).route["adapter"] == "speech"


def test_max_tokens_must_fit_behind_the_prompt(assistant: Assistant) -> None:
    prompt = assistant.ask("Hi", max_tokens=1).usage["prompt_tokens"]
    with pytest.raises(PromptError) as caught:
        assistant.ask("Hi", max_tokens=2048)
    assert str(caught.value) == (
        f"a prompt of {prompt} tokens and max_tokens=2048 exceed this model's window of 2048; "
        f"lower max_tokens to {2048 - prompt} or shorten the prompt"
    )
    with pytest.raises(PromptError, match="window of 2048; shorten the prompt$"):
        assistant.ask("z" * (2048 - prompt + 2), max_tokens=1)
    with pytest.raises(PromptError, match="the prompt is 2049 tokens"):
        assistant.ask("z" * (2048 - prompt + 3), max_tokens=1)
    with pytest.raises(ConfigError, match="max_tokens=0 must be at least 1"):
        assistant.ask("Hi", max_tokens=0)


# -------------------------------------------------------------------------------------------------- routes and logits


def test_logits_are_those_of_the_rendered_prompt(assistant: Assistant) -> None:
    messages = question_messages("Which?", image=PICTURE)
    logits = assistant.logits(messages)
    batch = assistant.processor([messages])
    assert logits.shape == (int(batch.lengths[0]), 320)
    assert logits.dtype == torch.float32
    assert int(logits[-1].argmax()) == assistant.ask(messages, max_tokens=1).tokens[0]


def test_text_logits_keep_every_bit_before_between_and_after_media(assistant: Assistant) -> None:
    before = assistant.logits("How many boxes?")
    assistant.ask("Which?", image=PICTURE, max_tokens=4)
    between = assistant.logits("How many boxes?")
    assistant.ask_many([question_messages("", audio=SOUND), question_messages("Hi")], max_tokens=4)
    list(assistant.stream(question_messages("Is it?", PICTURE, SOUND), max_tokens=4))
    after = assistant.logits("How many boxes?")
    assert torch.equal(before, between)
    assert torch.equal(before, after)
    assert not torch.equal(before, assistant.logits("How many boxes?", route="vision"))


def test_the_route_may_be_chosen(assistant: Assistant) -> None:
    picture = question_messages("Which?", image=PICTURE)
    auto, none, speech = (assistant.logits(picture, route=route) for route in ("auto", "none", "speech"))
    assert torch.equal(auto, assistant.logits(picture, route="vision"))
    assert not torch.equal(auto, none)
    assert not torch.equal(auto, speech)
    assert assistant.ask(picture, route="none", max_tokens=1).route["adapter"] is None
    assert assistant.ask("Hi", route="speech", max_tokens=1).route["adapter"] == "speech"
    with pytest.raises(RouteError, match="unknown route 'sight'; use one of auto, none, speech, vision"):
        assistant.ask(picture, route="sight")


def test_an_explanation_says_what_every_token_is(assistant: Assistant) -> None:
    messages = question_messages("Is <|image_1|> it?", image=PICTURE, audio=SOUND)
    batch = assistant.processor([messages, question_messages("z" * 260)])
    told, text = assistant.explain(batch)
    sound, picture = sorted(batch.media, key=lambda item: item.start)
    assert {key: told[key] for key in told if key != "spans"} == {
        "modalities": ["audio", "image"],
        "adapter": "vision",
        "scale": 2.0,
        "projectors": {"image": "vision", "audio": "vision"},
        "rope": "short",
        "rope_why": f"{int(batch.lengths[0])} tokens fit the original window of 256",
        "rope_crosses": None,
        "tokens": int(batch.lengths[0]),
    }
    kinds = [span["kind"] for span in told["spans"]]
    assert kinds == ["control", "audio", "text", "image", "text", "control", "control"]
    assert [span.get("text") for span in told["spans"]] == [
        "<|user|>", None, "Is ", None, " it?", "<|end|>", "<|assistant|>",
    ]  # fmt: skip
    assert [span["stop"] for span in told["spans"]][:-1] == [span["start"] for span in told["spans"]][1:]
    assert (told["spans"][0]["start"], told["spans"][-1]["stop"]) == (0, told["tokens"])
    assert (told["spans"][1]["start"], told["spans"][1]["stop"]) == (sound.start, sound.start + sound.tokens)
    assert (told["spans"][3]["start"], told["spans"][3]["stop"]) == (picture.start, picture.start + picture.tokens)
    assert assistant.explain(messages) == [told]
    assert assistant.explain("z" * 260) == [text]
    assert assistant.explain("z", route="speech")[0]["adapter"] == "speech"
    with pytest.raises(ConfigError, match="route='none' would change nothing: a Batch has its routes"):
        assistant.explain(batch, route="none")
    assert (text["modalities"], text["adapter"], text["scale"], text["rope"]) == (["text"], None, None, "long")


def test_a_planned_answer_has_one_table_in_ask_and_stream(assistant: Assistant) -> None:
    question = "z" * 240
    crossing = assistant.ask(question, max_tokens=30)
    prompt = crossing.usage["prompt_tokens"]
    assert prompt < 256 < prompt + 29
    assert (crossing.route["rope"], crossing.route["rope_crosses"]) == ("short", 257)
    planned = assistant.ask(question, max_tokens=30, switch="planned")
    assert (planned.route["rope"], planned.route["rope_crosses"]) == ("long", None)
    assert "".join(assistant.stream(question, max_tokens=30, switch="planned")) == planned.text
    set_regime(assistant.model, "long")
    assert assistant.ask(question, max_tokens=30).tokens == planned.tokens
    assert planned.tokens != crossing.tokens
    with pytest.raises(ConfigError, match="rope='long' gives every row this table; leave switch at 'crossing'"):
        assistant.ask(question, switch="planned")


# ----------------------------------------------------------------------------------------------------- saving, loading


def test_a_saved_model_says_the_same(assistant: Assistant, tmp_path: Path) -> None:
    assistant.save(tmp_path / "copy")
    other = modalora.load(tmp_path / "copy")
    messages = question_messages("Is it?", PICTURE, SOUND)
    assert torch.equal(other.logits(messages), assistant.logits(messages))
    assert other.notes == {"trained": "never"}
    with pytest.raises(CheckpointError, match="exists; give a new folder, nothing was written"):
        assistant.save(tmp_path / "copy")
    with pytest.raises(ConfigError, match="layout='hf' is unknown; known are modalora, phi3"):
        assistant.save(tmp_path / "other", layout="hf")
    assert not (tmp_path / "other").exists()


def test_the_tokens_that_end_an_answer_are_saved(assistant: Assistant, tmp_path: Path) -> None:
    assistant.stop_ids |= {assistant.processor.tokenizer.control("<|user|>")}
    assistant.save(tmp_path / "model")
    assert modalora.load(tmp_path / "model").stop_ids == assistant.stop_ids


def test_a_model_may_be_loaded_in_bfloat16(folder: Path) -> None:
    half = modalora.load(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.logits(question_messages("Is it?", PICTURE, SOUND)).dtype == torch.float32
    with pytest.raises(ConfigError, match="dtype='int3' must be one of auto, float32, bfloat16, float16"):
        modalora.load(folder, dtype="int3")


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model folder '.*absent'; give a folder, or a bundled model"):
        modalora.load(tmp_path / "absent")
    assert find_model(tmp_path) == tmp_path


def test_an_adapter_comes_back_from_a_peft_folder_to_the_bit(assistant: Assistant, tmp_path: Path) -> None:
    save_adapter(assistant.model, "vision", tmp_path / "sight")
    stored = load_file(tmp_path / "sight" / WEIGHTS)
    linears = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert set(stored) == {
        f"base_model.model.model.layers.{layer}.{linear}.lora_{side}.weight"
        for layer in range(2)
        for linear in linears
        for side in "AB"
    }
    fields = read_json(tmp_path / "sight" / CONFIG)
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 8, 16)
    assistant.load_adapter(tmp_path / "sight", "sight-2")
    messages = question_messages("Which?", image=PICTURE)
    assert torch.equal(assistant.logits(messages, route="sight-2"), assistant.logits(messages, route="vision"))
    assert assistant.ask(messages, route="sight-2", max_tokens=1).route["scale"] == 2.0
    assistant.save(tmp_path / "model")
    again = modalora.load(tmp_path / "model")
    assert torch.equal(again.logits(messages, route="sight-2"), assistant.logits(messages, route="vision"))


def test_a_new_adapter_changes_no_bit_of_the_other_routes(assistant: Assistant, tmp_path: Path) -> None:
    save_adapter(assistant.model, "speech", tmp_path / "style")
    asked = [question_messages("Hi"), question_messages("?", PICTURE), question_messages("?", audio=SOUND)]
    before = [assistant.logits(messages) for messages in asked]
    assistant.load_adapter(tmp_path / "style", "style")
    assert all(torch.equal(one, assistant.logits(messages)) for one, messages in zip(before, asked, strict=True))


def test_pictures_are_prepared_as_fast_after_an_adapter_came(
    folder: Path, assistant: Assistant, tmp_path: Path
) -> None:
    save_adapter(assistant.model, "vision", tmp_path / "sight")
    fast = modalora.load(folder, fast_images=True)
    fast.load_adapter(tmp_path / "sight", "style")
    assert assistant.processor.image is not None
    assert fast.processor.image == replace(assistant.processor.image, fast=True)


def test_an_adapter_takes_the_dtype_of_its_model(folder: Path, assistant: Assistant, tmp_path: Path) -> None:
    save_adapter(assistant.model, "vision", tmp_path / "sight")
    half = modalora.load(folder, dtype="bfloat16")
    half.load_adapter(tmp_path / "sight", "style")
    assert torch.equal(half.logits("Hi", route="style"), half.logits("Hi", route="vision"))


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "model."])
@pytest.mark.parametrize("infix", ["", "default.", "my-style."])
def test_published_spellings_of_adapter_keys_are_read(
    assistant: Assistant, tmp_path: Path, prefix: str, infix: str
) -> None:
    save_adapter(assistant.model, "vision", tmp_path / "sight")
    stored = load_file(tmp_path / "sight" / WEIGHTS)
    renamed = {
        prefix + name.removeprefix("base_model.model.model.").replace(".weight", f".{infix}weight"): tensor
        for name, tensor in stored.items()
    }
    save_file(renamed, tmp_path / "sight" / WEIGHTS)
    assistant.load_adapter(tmp_path / "sight", "style")
    assert torch.equal(assistant.logits("Hi", route="style"), assistant.logits("Hi", route="vision"))


PLACE = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[PLACE]


def widen(tensors: dict[str, Tensor]) -> None:
    tensors[PLACE] = torch.zeros(8, 97)


def add(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"] = torch.zeros(8, 96)


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["vision_tower.lora_A.weight"] = torch.zeros(8, 96)


def put(key: str, value: Any, fields: dict[str, Any]) -> None:
    fields[key] = value


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop, "1 of 16 tensors that its config promises are missing, such as layers.1.mlp.down_proj.lora_A"),
        (widen, r"layers.1.mlp.down_proj.lora_A has shape \[8, 97\], and this decoder needs \[8, 96\]"),
        (add, "1 of 17 tensors belong to no Linear of this decoder, such as 'base_model.*layers.2.mlp.down_proj"),
        (rename, "1 of 17 tensors belong to no Linear of this decoder, such as 'vision_tower.lora_A.weight'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_the_model_stays(
    assistant: Assistant, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], told: str
) -> None:
    save_adapter(assistant.model, "vision", tmp_path / "sight")
    stored = load_file(tmp_path / "sight" / WEIGHTS)
    change(stored)
    save_file(stored, tmp_path / "sight" / WEIGHTS)
    refuse(assistant, tmp_path / "sight", "style", told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (partial(put, "r", 4), r"has shape \[\d+, \d+\], and this decoder needs \[\d+, \d+\]"),
        (partial(put, "r", 0), "r=0 must be at least 1"),
        (partial(put, "r", "eight"), "r='eight'"),
        (partial(put, "lora_alpha", None), "lora_alpha=None"),
        (lambda fields: fields.pop("r"), "has no r or no lora_alpha; PEFT writes both"),
        (partial(put, "peft_type", "IA3"), "has peft_type='IA3'; LORA is read"),
        (partial(put, "use_dora", True), "has use_dora=True: DoRA scales every row of the merged weight"),
        (partial(put, "bias", "all"), "has bias='all': biases of the base were trained"),
        (
            partial(put, "rank_pattern", {"o_proj": 4}),
            r"o_proj.lora_A has shape \[8, 64\], and this decoder needs \[4, 64\]",
        ),
        (partial(put, "rank_pattern", {"(": 4}), "is no regular expression"),
        (partial(put, "target_modules", ["o_proj"]), "which the target_modules of its config leave out"),
        (partial(put, "target_modules", ["q_proj"]), "name no Linear of this decoder"),
        (
            partial(put, "modules_to_save", ["lm_head"]),
            r"has modules_to_save=\['lm_head'\], of which .* holds no tensor",
        ),
    ],
)
def test_an_adapter_of_another_kind_is_refused_and_the_model_stays(
    assistant: Assistant, tmp_path: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    save_adapter(assistant.model, "vision", tmp_path / "sight")
    fields = read_json(tmp_path / "sight" / CONFIG)
    change(fields)
    write_json(tmp_path / "sight" / CONFIG, fields)
    refuse(assistant, tmp_path / "sight", "style", told)


def test_an_adapter_that_is_saved_again_has_the_same_bytes(assistant: Assistant, tmp_path: Path) -> None:
    for number in range(6):  # the writer of safetensors orders metadata at random
        save_adapter(assistant.model, "vision", tmp_path / str(number))
    assert len({(tmp_path / str(number) / WEIGHTS).read_bytes() for number in range(6)}) == 1


@pytest.mark.parametrize("name", ["vision", "auto", "none", "", "my.style", "a b", "keys", "training"])
def test_a_name_that_is_taken_or_none_is_refused(assistant: Assistant, tmp_path: Path, name: str) -> None:
    save_adapter(assistant.model, "vision", tmp_path / "sight")
    refuse(assistant, tmp_path / "sight", name, "is taken; choose another|cannot name an adapter")


def test_a_folder_that_is_none_is_refused(assistant: Assistant, tmp_path: Path) -> None:
    refuse(assistant, tmp_path / "absent", "style", "absent is not a folder; an adapter is a PEFT folder")
    (tmp_path / "empty").mkdir()
    refuse(assistant, tmp_path / "empty", "style", "empty has no adapter_config.json")
    save_adapter(assistant.model, "vision", tmp_path / "sight")
    (tmp_path / "sight" / WEIGHTS).write_bytes(b"not safetensors")
    refuse(assistant, tmp_path / "sight", "style", "is not a readable safetensors file")
    (tmp_path / "sight" / WEIGHTS).rename(tmp_path / "sight" / "adapter_model.bin")
    refuse(assistant, tmp_path / "sight", "style", "has neither .*; adapter_model.bin is a pickle, which can run code")
    with pytest.raises(CheckpointError, match="no adapter 'style'; this model has vision, speech"):
        save_adapter(assistant.model, "style", tmp_path / "style")


def test_folders_of_a_run_say_where_model_and_adapter_are(assistant: Assistant, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assistant.save(run / "model")
    save_adapter(assistant.model, "vision", run / "mine-lora")
    with pytest.raises(CheckpointError, match="run is the folder of a run; give the model in it, .*run/model"):
        modalora.load(run)
    state = run / "resume" / "00000100"
    state.mkdir(parents=True)
    for name in ("state.json", "manifest.json"):
        (state / name).write_text("{}")
    with pytest.raises(CheckpointError, match="00000100 is a state from which training goes on, no model; .*run/model"):
        modalora.load(state)
    with pytest.raises(CheckpointError, match=r"mine-lora is an adapter, not a model; .* --adapter mine=.*mine-lora"):
        modalora.load(run / "mine-lora")
    with pytest.raises(CheckpointError, match="run is no adapter but holds some; give .*run/mine-lora"):
        assistant.load_adapter(run, "mine")
    assert modalora.load(run / "model").load_adapter(run / "mine-lora", "mine")


def refuse(assistant: Assistant, folder: Path, name: str, told: str) -> None:
    before = {key: tensor.clone() for key, tensor in assistant.model.state_dict().items()}
    with pytest.raises((CheckpointError, ConfigError), match=told):
        load_adapter(assistant.model, folder, name)
    after = assistant.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert assistant.model.adapters == ("vision", "speech")


def test_media_beside_messages_and_twice_named_media_are_not_dropped(assistant: Assistant) -> None:
    messages = [{"role": "user", "content": "How many boxes?"}]
    with pytest.raises(PromptError, match="image was given beside a list of messages; put it into the content of one"):
        assistant.ask(messages, image=PICTURE, max_tokens=1)
    parts = question_messages("Hi", image=[PICTURE], media={"image": PICTURE})[0]["content"]
    assert [part["type"] for part in parts] == ["image", "image", "text"]
    wave, rate = SOUND
    (sound, _) = question_messages("Hi", audio=(wave, float(rate)))[0]["content"]
    assert sound["audio"] == (wave, rate)
    with pytest.raises(PromptError, match=r"a\(b"):
        assistant.ask("Hi", media={"a(b": "x"}, max_tokens=1)


WRONG_KINDS = """
import sys, modalora
from fractions import Fraction
import numpy as np
from modalora.errors import InputError
model = modalora.load(sys.argv[1])
for settings in ({"route": None}, {"seed": None}, {"top_k": 5.0}, {"temperature": "hot"}, {"stop": 5}):
    try:
        print(model.ask("Hi", max_tokens=1, **settings).text)
    except InputError as error:
        print(error)
mine = {"seed": np.int64(4), "temperature": Fraction(1, 2), "top_p": np.float32(0.5)}
print(model.ask("Hi", max_tokens=4, **mine).tokens == model.ask("Hi", max_tokens=4, seed=4, temperature=0.5, top_p=0.5).tokens)
try:
    model.model([{"role": "user", "content": "Hi"}])
except InputError as error:
    print(error)
"""  # noqa: E501


def test_settings_of_another_kind_are_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device='nonsense' cannot be used: .*; 'cpu' always can"):
        modalora.load(folder, device="nonsense")
    # in a process of its own, where no type is checked as it is in tests
    done = subprocess.run([sys.executable, "-c", WRONG_KINDS, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "route=None must be 'auto', 'none' or an adapter's name",
        "seed=None must be a whole number, or a list of one for each conversation",
        "top_k=5.0 must be a whole number",
        "temperature='hot' must be a number",
        "stop=5 must be a string or a list of strings",
        "True",
        "the model takes a Batch, not list; make one: processor([messages])",
    ]


def test_the_scale_is_what_the_matrices_are_multiplied_by(assistant: Assistant) -> None:
    size = LoraConfig(r=4, lora_alpha=8, target_modules=("o_proj",), alpha_pattern={"o_proj": 1.0})
    assistant.model.add_adapter("mine", size)
    assistant = Assistant(assistant.model, make_processor(assistant.model.config, assistant.processor.tokenizer))
    (linear, *_) = [own for own in assistant.model.decoder.routed().values() if "mine" in own.adapters]
    assert assistant.ask("Hi", route="mine", max_tokens=1).route["scale"] == linear.adapters["mine"].scaling == 0.25


def test_the_scale_of_a_sum_has_its_weights(assistant: Assistant) -> None:
    (told,) = assistant.explain("Hi", route="vision+speech@0.7")
    alone = [assistant.explain("Hi", route=name)[0]["scale"] for name in ("vision", "speech")]
    assert told["scale"] == [alone[0], 0.7 * alone[1]]


def test_raw_prompts_take_control_tokens_of_any_form_and_no_bare_placeholder(assistant: Assistant) -> None:
    tokenizer = assistant.processor.tokenizer
    batch = assistant.raw_batch("<|user|>the fox<|end|><|assistant|>")
    assert [tokenizer.control(f"<|{name}|>") in batch.input_ids[0] for name in ("user", "end", "assistant")] == [
        True
    ] * 3
    with pytest.raises(
        PromptError, match=r"holds <\|endoftext10\|>, which stands for tokens of image; write <\|image_1"
    ):
        assistant.ask("<|user|><|endoftext10|>Hi<|end|><|assistant|>", raw=True, max_tokens=1)
    with pytest.raises(PromptError, match="the raw prompt is empty"):
        assistant.ask("", raw=True, max_tokens=1)
    pieces = render_raw("<s>a</s>b<|image_1|>", {"image": [PICTURE]}, {"<s>", "</s>"})
    assert [(piece.kind, piece.value) for piece in pieces][:4] == [
        ("control", "<s>"),
        ("text", "a"),
        ("control", "</s>"),
        ("text", "b"),
    ]
    assert pieces[4].kind == "image"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.ask(None), "question=None must be a string or a list of messages"),
        (lambda m: m.ask(5), "question=5 must be"),
        (lambda m: m.ask("Hi", max_tokens="5"), "max_tokens='5' must be a whole number"),
        (lambda m: m.ask("Hi", max_tokens=2.5), "max_tokens=2.5 must be a whole number"),
        (lambda m: m.ask("Hi", max_tokens=True), "max_tokens=True must be a whole number"),
        (lambda m: m.load_adapter(None, "z"), "takes a folder, and a name"),
        (lambda m: m.load_adapter("folder", None), "takes a folder, and a name"),
        (lambda m: m.load_adapter("a\0b", "z"), "takes a folder, and a name"),
        (lambda m: modalora.load(None), "the model None must be a folder"),
        (lambda m: modalora.load(5), "the model 5 must be a folder"),
        (lambda m: modalora.load("nano", dtype=[]), r"dtype=\[\] must be one of"),
        (lambda m: modalora.load("nano", device="meta"), "device='meta' cannot be used"),
        (lambda m: modalora.load("nano", device=None), "device=None cannot be used: it is no device of torch; 'cpu'"),
        (lambda m: modalora.load("nano", device=5), "device=5 cannot be used"),
        (lambda m: modalora.load("nano", device="gpu"), "device='gpu' .* 'cpu' always can, 'cuda' and 'cuda:1'"),
        (lambda m: modalora.load("nano", fast_images="yes"), "fast_images='yes' must be True or False"),
        (lambda m: modalora.load("nano", pack="no"), "pack='no' must be True or False"),
        (lambda m: modalora.load("nano", modalities=None), "modalities=None must be a list of Python files"),
        (lambda m: modalora.load("nano", modalities="x.py"), "modalities='x.py' must be a list"),
        (lambda m: m.ask("Hi", raw="yes"), "raw='yes' must be True or False"),
        (lambda m: m.ask("Hi", media={5: "x"}), "media has 5 as a modality's name"),
        (lambda m: m.ask_many(5), "conversations=5 must be a list of message lists"),
        (lambda m: m.ask_many("Hi"), "conversations='Hi' must be a list of message lists"),
        (lambda m: m.ask_each("Hi"), "conversations='Hi' must be a list of message lists"),
        (lambda m: m.ask_each({"role": "user"}), "conversations={'role': 'user'} must be a list of message lists"),
        (lambda m: m.ask_each(None), "conversations=None must be a list of message lists"),
        (lambda m: m.ask_each(one for one in "ab"), "conversations=<generator .* must be a list of message lists"),
        (lambda m: m.ask_many(["a", "b"], seed=np.array([1, 2])), "must be a whole number, or a list of one for each"),
        (lambda m: m.save(None), r"save\(None\) takes the path of a new folder"),
        (lambda m: m.save("a\0b"), r"save\('a\\x00b'\) takes the path of a new folder"),
        (lambda m: m.ask("Hi", audio=(SOUND[0], "8000")), r"it must be \(array, rate\), such as"),
        (lambda m: m.ask("Hi", audio=[SOUND[0], 8000]), r"was given as list; give .* or \(samples, rate\)"),
        (lambda m: m.ask("Hi", audio=SOUND[0]), r"was given as ndarray; give .* or \(samples, rate\)"),
        (lambda m: m.ask("Hi", image=np.zeros((9, 9, 3))), r"a float64 array of shape \(9, 9, 3\); give uint8 of"),
        (lambda m: m.ask("Hi", image=5), r"was given as int; give .* or a PIL image \(Image.fromarray\(array"),
    ],
)
def test_what_is_of_another_type_is_told(assistant: Assistant, call: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(ModaloraError, match=told):
        call(assistant)
