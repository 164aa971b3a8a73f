"""Rows of tokens told apart as spans."""

from __future__ import annotations

from modalora.processing.spans import Span, spans
from modalora.processing.tokenizer import TextTokenizer

TOKENIZER = TextTokenizer.train(["one two three"] * 20, 290)


def test_spans_are_media_single_control_tokens_and_text_cut_where_labels_change() -> None:
    user, end = TOKENIZER.control("<|user|>"), TOKENIZER.control("<|end|>")
    words = TOKENIZER.encode("one two")
    ids = [user, 7, 7, 7, *words, end, end]
    text = 4 + len(words)
    trained = [False] * (text - 1) + [True, True, False]
    found = list(spans(ids, {1: ("image", 3)}, TOKENIZER, trained))
    assert found == [
        Span("control", 0, 1, "<|user|>"),
        Span("image", 1, 4),
        Span("text", 4, text - 1, TOKENIZER.decode(words[:-1])),
        Span("text", text - 1, text, TOKENIZER.decode(words[-1:]), True),
        Span("control", text, text + 1, "<|end|>", True),
        Span("control", text + 1, text + 2, "<|end|>"),
    ]
    assert [span.tokens for span in found] == [1, 3, len(words) - 1, 1, 1, 1]
    assert [span.is_medium for span in found] == [False, True, False, False, False, False]
    assert [span.text for span in spans(ids, {1: ("image", 3)}, TOKENIZER)] == [
        "<|user|>",
        "",
        "one two",
        *["<|end|>"] * 2,
    ]
    assert list(spans([], {}, TOKENIZER)) == []


def test_the_set_of_control_ids_is_made_once() -> None:
    assert TOKENIZER.control_ids is TOKENIZER.control_ids
