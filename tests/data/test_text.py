from __future__ import annotations

from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from modalora.data.text import learnt_tokenizer, token_stream
from modalora.errors import DataError
from modalora.processing.tokenizer import END_OF_TEXT


def write(folder: Path, text: str) -> None:
    (folder / "books").mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({"text": [text]}), folder / "books" / "train.parquet")


def test_other_books_have_tokens_and_a_tokenizer_of_their_own(tmp_path: Path) -> None:
    """What is kept in the cache belongs to a file as it was: not to the next folder, and not to a changed file."""
    one, two, cache = (tmp_path / name for name in ("one", "two", "cache"))
    write(one, "The cat went home.\n\n" * 40)
    write(two, "Seven blue boxes fell down.\n\n" * 40)
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
    write(one, "A dog came too.\n\n" * 30)
    assert read(one) == "A dog came too.\n\n" * 30
    with pytest.raises(DataError, match=r"validation.parquet is missing"):
        token_stream(one, "validation", tokenizer, cache)
