"""Text to ids and back: no text is lost, and no text ever becomes a control token."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from modalora.errors import CheckpointError, PromptError
from modalora.processing.tokenizer import CONTROL_TOKENS, END, END_OF_TEXT, PLACEHOLDERS, RANKS, TextTokenizer

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


def test_the_last_id_is_the_highest_though_ids_are_missing_before_it() -> None:
    fields = json.loads(TOKENIZER.definition)
    word = max(fields["model"]["vocab"], key=fields["model"]["vocab"].get)
    fields["model"]["vocab"][word] = 500
    words = TextTokenizer(json.dumps(fields))
    assert (words.vocab_size, words.last_id) == (340, 500)


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


@pytest.mark.parametrize("missing", ["added_tokens", "model"])
def test_a_tokenizer_without_a_key_names_it(tmp_path: Path, missing: str) -> None:
    fields = json.loads(TOKENIZER.definition)
    del fields[missing]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=rf"(?i)tokenizer.json is not a tokenizer .*\b{missing}\b"):
        TextTokenizer.from_folder(tmp_path)


def replace(content: str, **pattern: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    ("key", "steps"),
    [
        ("normalizer", [replace("a" * 16, String="a")] * 40),
        ("normalizer", [replace("aa", String="a")] * 5),
        ("normalizer", [replace("b", Regex="(?=a)")] * 5),
        ("normalizer", [replace("b", String="")] * 5),
        ("normalizer", [{"type": "Prepend", "prepend": "a" * 99}]),
        ("normalizer", [{"type": "ByteLevel"}] * 3),
        ("normalizer", [{"type": "Precompiled", "precompiled_charsmap": ""}]),
        ("pre_tokenizer", [{"type": "ByteLevel"}] * 3),
        ("decoder", [replace("a" * 99, String="a")]),
        ("decoder", [{"type": "BPEDecoder", "suffix": ""}] * 5),
    ],
)
def test_a_tokenizer_that_makes_texts_many_times_longer_is_refused(
    tmp_path: Path, key: str, steps: list[dict[str, object]]
) -> None:
    within = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[key]
    chain = {"type": "Sequence", within: [{"type": "Sequence", within: steps}]}
    fields = json.loads(TOKENIZER.definition) | {key: chain}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=f"its {key} may make a text .* times as long; at most 16 times is read"):
        TextTokenizer.from_folder(tmp_path)


# ------------------------------------------------------------------------------------------------ tiktoken's ranks


def ranks_file(words: list[bytes]) -> bytes:
    """Return the file of a vocabulary: each byte, then the words."""
    every = [*(bytes([byte]) for byte in range(256)), *words]
    return b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(every))


def greedy(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return tiktoken's ids: the whole piece's, or those left when two that make the lowest word are always joined."""
    parts = [piece] if piece in ranks else [bytes([byte]) for byte in piece]
    while True:
        joins = [(ranks[a + b], at) for at, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
        if not joins:
            return [ranks[part] for part in parts]
        _, at = min(joins)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@given(
    words=st.lists(st.text("aab é", min_size=2, max_size=6).map(str.encode), unique=True, max_size=40),
    texts=st.lists(st.text("aaabb é1'S\n!", max_size=30), min_size=1, max_size=10),
)
@settings(deadline=None, max_examples=150)
def test_ranks_give_the_ids_of_tiktoken(
    tmp_path_factory: pytest.TempPathFactory, words: list[bytes], texts: list[str]
) -> None:
    """Words in any order: those that no two others make, and those whose parts come later."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / RANKS).write_bytes(ranks_file(words))
    found = TextTokenizer.from_folder(folder)
    ranks = {word: rank for rank, word in enumerate([*(bytes([byte]) for byte in range(256)), *words])}
    for text in texts:
        told = [index for piece in regex.findall(CL100K, text) for index in greedy(piece.encode(), ranks)]
        assert found.encode(text) == told
        assert found.decode(told) == text


def test_ranks_have_phi3_small_s_control_tokens_behind_them(tmp_path: Path) -> None:
    (tmp_path / RANKS).write_bytes(ranks_file([b"the", b" a"]))
    found = TextTokenizer.from_folder(tmp_path)
    assert found.vocab_size == 258 + 96
    # published: 100,256 words, then these ids
    published = {
        "<|dummy_id_2|>": 100256, "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_suffix|>": 100260,
        "<|system|>": 100261, "<|user|>": 100262, "<|assistant|>": 100263, "<|dummy_id_0|>": 100264, "<|end|>": 100266,
        "<|dummy_id_3|>": 100267, "<|dummy_id_11|>": 100275, "<|endofprompt|>": 100276, "<|dummy_id_12|>": 100277,
        "<|dummy_id_86|>": 100351,
    }  # fmt: skip
    assert {token: found.control(token) - 258 for token in published} == {
        token: index - 100_256 for token, index in published.items()
    }
    assert found.control_ids.isdisjoint(found.encode("<|end|><|dummy_id_3|>"))
    assert found.stop_ids == {found.control("<|end|>"), found.control("<|endoftext|>")}


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"IQ==", b"IQ== x", b"!!== 0\n", ranks_file([])[7:], ranks_file([b"ab", b"ab"]), ranks_file([]) * 2],
    ids=["empty", "no text", "no rank", "no number", "no base 64", "a byte is missing", "twice", "all twice"],
)
def test_a_file_that_lists_no_ranks_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RANKS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cl100k_base.tiktoken is not a tokenizer .* its lines must be words in"):
        TextTokenizer.from_folder(tmp_path)


def test_ranks_of_too_many_pairs_are_refused(tmp_path: Path) -> None:
    words = [b"a" * left + b"b" * right for left in range(150) for right in range(150) if left + right > 1]
    (tmp_path / RANKS).write_bytes(ranks_file(words))
    with pytest.raises(CheckpointError, match="more than 1,000,000 pairs of its words make a third"):
        TextTokenizer.from_folder(tmp_path)
