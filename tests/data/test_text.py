from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modalora.data.instruct import instruct
from modalora.data.text import learnt_tokenizer, token_stream, window
from modalora.errors import DataError
from modalora.processing.tokenizer import END_OF_TEXT
from small import write_books


def test_other_books_have_tokens_and_a_tokenizer_of_their_own(tmp_path: Path) -> None:
    """What is kept in the cache belongs to a file as it was: not to the next folder, and not to a changed file."""
    one, two, cache = (tmp_path / name for name in ("one", "two", "cache"))
    write_books(one, "The cat went home.\n\n" * 40)
    write_books(two, "Seven blue boxes fell down.\n\n" * 40)
    tokenizer = learnt_tokenizer(one, 300, cache)
    assert learnt_tokenizer(one, 300, cache).definition == tokenizer.definition
    assert learnt_tokenizer(two, 300, cache).definition != tokenizer.definition
    assert learnt_tokenizer(one, 310, cache).vocab_size == 310

    def read(folder: Path) -> str:
        ids = token_stream(folder, "train", tokenizer, cache).tolist()
        assert ids.pop() == tokenizer.control(END_OF_TEXT)
        return tokenizer.decode(ids)

    assert read(one) == read(one) == "The cat went home.\n\n" * 40
    assert read(two) == "Seven blue boxes fell down.\n\n" * 40
    write_books(one, "A dog came too.\n\n" * 30)
    assert read(one) == "A dog came too.\n\n" * 30
    with pytest.raises(DataError, match=r"validation.parquet is missing"):
        token_stream(one, "validation", tokenizer, cache)


def test_a_text_no_longer_than_the_window_is_drawn_whole_and_a_shorter_one_is_refused(tmp_path: Path) -> None:
    rng, stream = np.random.default_rng(0), np.arange(8)
    assert [window(stream, 8, rng) for _ in range(2)] == [list(range(8))] * 2
    assert {window(stream, 6, rng)[0] for _ in range(50)} == {0, 1}
    with pytest.raises(DataError, match=r"^the text is 8 tokens long, and windows of 9 are cut from it; give more"):
        window(stream, 9, rng)
    write_books(tmp_path, "The cat went home.\n\n" * 40)
    with pytest.raises(DataError, match="the text is 8 tokens long, and windows of 200 are cut from it"):
        instruct(stream, learnt_tokenizer(tmp_path, 300, tmp_path))
