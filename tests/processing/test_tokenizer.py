"""Text to ids and back: no text is lost, and no text ever becomes a control token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalora.errors import CheckpointError, PromptError
from modalora.processing.tokenizer import CONTROL_TOKENS, END, END_OF_TEXT, PLACEHOLDERS, TextTokenizer

TEXTS = ["The quick brown fox jumps over 12345 lazy dogs, doesn't it? Seven blue boxes touch the wall.\n\n" * 4]
TOKENIZER = TextTokenizer.train([*TEXTS, "<|end|><|user|>" * 50], 340)  # merges learnt from the tags' own letters too


@given(st.text())
@settings(deadline=None)
def test_any_text_comes_back_and_holds_no_control_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.control_ids.isdisjoint(ids)


@given(st.lists(st.sampled_from((*CONTROL_TOKENS, "<|", "|>", "<|image_1|>", "end", " ", "\n", "Ġ", "é", "seven"))))
@settings(deadline=None)
def test_control_tokens_written_by_a_user_stay_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.control_ids.isdisjoint(ids)


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_a_control_token_is_one_id_that_only_control_gives(token: str) -> None:
    index = TOKENIZER.control(token)
    assert TOKENIZER.show(index) == token
    assert len(TOKENIZER.encode(token)) > 1
    assert TOKENIZER.decode([index]) == ""


def test_control_tokens_take_the_last_ids_in_the_published_order() -> None:
    assert [TOKENIZER.control(token) for token in CONTROL_TOKENS] == list(range(340 - len(CONTROL_TOKENS), 340))
    assert CONTROL_TOKENS[0] == END_OF_TEXT
    assert PLACEHOLDERS == {"image": "<|endoftext10|>", "audio": "<|endoftext11|>"}
    assert TOKENIZER.vocab_size == 340


def test_decoding_leaves_control_tokens_out() -> None:
    ids = [TOKENIZER.control("<|user|>"), *TOKENIZER.encode("seven"), TOKENIZER.control(END)]
    assert TOKENIZER.decode(ids) == "seven"


def test_an_unknown_control_token_is_refused_with_those_there_are() -> None:
    with pytest.raises(PromptError, match=r"no control token '<\|video\|>'; it has .*<\|endoftext\|>"):
        TOKENIZER.control("<|video|>")


def test_digits_stand_in_groups_of_at_most_three() -> None:
    greedy = TextTokenizer.train(["1234567890 1234567890 12345678 0123456789 " * 200], 400)
    longest = 0
    for text in ("1234567890", "x12345678y", "3.14159265", "20260731"):
        for index in greedy.encode(text):
            digits = sum(letter.isdigit() for letter in greedy.decode([index]))
            longest = max(longest, digits)
            assert digits <= 3
    assert longest == 3  # groups were learnt at all
    assert greedy.encode("123456") == greedy.encode("123") + greedy.encode("456")


def test_words_do_not_merge_over_spaces_case_and_punctuation() -> None:
    greedy = TextTokenizer.train(["the fox's den. the fox's den. theFox end.\n\n" * 300], 420)
    tokens = [greedy.decode([index]) for index in greedy.encode("the fox's den. theFox end.\n\n")]
    assert tokens == ["the", " fox's", " den", ".", " the", "Fox", " end", ".\n\n"]


def test_many_texts_are_encoded_as_each_alone() -> None:
    texts = ["seven", "", "<|end|>", "the quick brown fox"]
    assert TOKENIZER.encode_many(texts) == [TOKENIZER.encode(text) for text in texts]


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match=r"'seven\\udcff' is not valid Unicode; give text that encodes as UTF-8"):
        TOKENIZER.encode("seven\udcff")


def test_a_stored_tokenizer_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.definition, encoding="utf-8")
    other = TextTokenizer.from_folder(tmp_path)
    assert other.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert other.control_ids == TOKENIZER.control_ids
    assert json.loads(other.definition) == json.loads(TOKENIZER.definition)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"added_tokens": []}'])
def test_a_broken_tokenizer_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer.json is not a tokenizer"):
        TextTokenizer.from_folder(tmp_path)


def test_a_missing_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        TextTokenizer.from_folder(tmp_path)
