"""Plain text to windows of token ids for language pretraining."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.random import Generator

from modalora.data.files import cached, load_arrow
from modalora.errors import DataError
from modalora.processing.tokenizer import END_OF_TEXT, TextTokenizer


def books(folder: Path, split: str) -> Iterator[str]:
    """Yield the whole texts of folder/books/SPLIT.parquet (columns name, title, text). Raises DataError when absent."""
    table = load_arrow().parquet.ParquetFile(books_file(folder, split))
    for batch in table.iter_batches(batch_size=1, columns=["text"]):
        yield from batch.column(0).to_pylist()


def books_file(folder: Path, split: str) -> Path:
    """Return the file of a split. Raises DataError when it is absent."""
    path = folder / "books" / f"{split}.parquet"
    if not path.is_file():
        raise DataError(f"{path} is missing; give a folder with books/{split}.parquet as data=FOLDER (docs/nano.md)")
    return path


def token_stream(folder: Path, split: str, tokenizer: TextTokenizer, cache: Path) -> np.ndarray:
    """Return all books of a split as one row of ids, each book ended by <|endoftext|>; kept in cache."""

    def make(path: Path, draft: Path) -> None:
        del path
        end = tokenizer.control(END_OF_TEXT)
        kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        parts: list[np.ndarray] = []
        for text in books(folder, split):
            paragraphs = text.split("\n\n")
            whole = [paragraph + "\n\n" for paragraph in paragraphs[:-1]] + paragraphs[-1:]
            for ids in tokenizer.encode_many(whole):
                parts.append(np.array(ids, dtype=kind))
            parts.append(np.array([end], dtype=kind))
        np.save(draft, np.concatenate(parts))

    key = hashlib.sha256(tokenizer.definition.encode()).hexdigest()[:12]
    return np.asarray(np.load(cached(books_file(folder, split), cache, f"-{key}.npy", make), mmap_mode="r"))


def check_stream(stream: np.ndarray, length: int) -> None:
    """Refuse a text that has no window of `length` ids. Raises DataError."""
    if len(stream) < length:
        raise DataError(
            f"the text is {len(stream)} tokens long, and windows of {length} are cut from it; give more text, or a "
            "shorter window where the recipe sets it"
        )


def window(stream: np.ndarray, length: int, rng: Generator) -> list[int]:
    """Return a random window of `length` ids. Raises DataError when the stream is shorter."""
    check_stream(stream, length)
    # the last start is drawn where it is the only one: a bound one higher would move half of the draws of earlier runs
    start = int(rng.integers(0, max(1, len(stream) - length)))
    ids: list[int] = stream[start : start + length].tolist()
    return ids


def recurring_window(stream: np.ndarray, length: int, rng: Generator) -> list[int]:
    """Return `length` ids in which a few passages, some with their words shuffled, come again and again.

    Natural text repeats itself too seldom for a small model to learn in few tokens that a context can be looked up.
    """
    passages = []
    for _ in range(int(rng.integers(1, 5))):
        passage = window(stream, int(rng.integers(4, max(5, length // 5))), rng)
        if rng.random() < 0.5:
            rng.shuffle(passage)
        passages.append(passage)
    ids: list[int] = []
    while len(ids) < length:
        ids += passages[int(rng.integers(len(passages)))]
    return ids[:length]


ANSWER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty hundred first last yes no true false none left "
    "middle right top bottom center above below red green blue yellow black white purple orange gray brown circle "
    "circles square squares triangle triangles star stars small medium large box boxes tower towers color colors "
    "shape shapes object objects item items bar bars block blocks touching edge wall corner exactly many what "
    "where which there bigger smaller tallest shortest picture image number numbers word words digit digits "
    "spoken transcribe audio clip text "
).split()


def learnt_tokenizer(folder: Path, vocab_size: int, cache: Path) -> TextTokenizer:
    """Return a BPE learnt from the books of a folder; kept in cache. Raises DataError when there are none."""

    def make(path: Path, draft: Path) -> None:
        del path
        draft.write_text(TextTokenizer.train(_corpus(folder), vocab_size).definition, encoding="utf-8")

    path = cached(books_file(folder, "train"), cache, f"-bpe-{vocab_size}.json", make)
    return TextTokenizer(path.read_text(encoding="utf-8"))


def _corpus(folder: Path) -> Iterator[str]:
    """Yield the books, and often enough the words that the bundled model's answers need."""
    yield from books(folder, "train")
    for word in ANSWER_WORDS:
        yield f"{word}\n {word}\n" * 2000
