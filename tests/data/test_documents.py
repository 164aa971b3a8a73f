from __future__ import annotations

import shutil

import numpy as np
import pytest

from modalora.assistant import make_processor
from modalora.config import SourceConfig
from modalora.data.check import check_data
from modalora.data.documents import LongRows, ShortRows, open_rows, passages, texts
from modalora.data.mixture import Mixture
from modalora.data.reader import make_source
from modalora.data.sources import Context
from modalora.errors import ConfigError, DataError
from modalora.models.sizes import tiny
from modalora.processing.processor import Processor
from modalora.processing.tokenizer import END_OF_TEXT, TextTokenizer
from small import write_books

PARAGRAPHS = [f"The {word} went home on day {day}, and stayed." for day in range(60) for word in ("cat", "old dog")]
BOOKS = ["\n\n".join(PARAGRAPHS[:70]), "\n\n".join([*PARAGRAPHS[70:], "An end."])]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return make_processor(tiny(), TextTokenizer.train(BOOKS, 320))


@pytest.fixture(scope="module")
def context(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("books")
    write_books(folder, *BOOKS)
    shutil.copy(folder / "books" / "train.parquet", folder / "texts.parquet")
    return Context(folder, folder / "cache", processor, window=64)


def stream_of(processor: Processor) -> tuple[np.ndarray, int]:
    mark = processor.tokenizer.control(END_OF_TEXT)
    ids: list[int] = []
    for book in BOOKS:
        paragraphs = book.split("\n\n")
        for piece in [one + "\n\n" for one in paragraphs[:-1]] + paragraphs[-1:]:
            ids += processor.tokenizer.encode(piece)
        ids.append(mark)
    return np.array(ids, dtype=np.uint16), mark


def short(context: Context, **options: object) -> ShortRows:
    source = make_source(context, SourceConfig(source="documents", options={"rows": "short", **options}))
    assert isinstance(source, ShortRows)
    return source


def long(context: Context, window: int, **options: object) -> LongRows:
    source = make_source(context, SourceConfig(source="documents", window=window, options={"rows": "long", **options}))
    assert isinstance(source, LongRows)
    return source


def test_short_rows_hold_every_token_of_the_books_once_in_whole_paragraphs(context: Context) -> None:
    source, decode = short(context), context.processor.tokenizer.decode
    rows = [source.row(number) for number in range(source.rows)]
    told = "".join(sorted(decode(row.ids) for row in rows))
    assert sorted(told) == sorted("".join(BOOKS))  # control tokens are left out of decoded text
    paragraphs = [piece for row in rows for piece in decode(row.ids).strip("\n").split("\n\n")]
    assert sorted(paragraphs) == sorted([*PARAGRAPHS, "An end."])
    assert max(len(row.ids) for row in rows) <= 64
    assert len(rows) < len(PARAGRAPHS)  # several to a row


def test_each_short_row_begins_and_ends_with_the_mark_and_has_no_other(context: Context) -> None:
    source, mark = short(context), context.processor.tokenizer.control(END_OF_TEXT)
    for number in range(source.rows):
        ids = source.row(number).ids
        assert (ids[0], ids[-1], ids.count(mark)) == (mark, mark, 2)
        assert source.measure(number) == len(ids)


def test_a_paragraph_longer_than_a_row_is_in_none(processor: Processor) -> None:
    stream, mark = stream_of(processor)
    most = 12  # tokens: some paragraphs are longer
    shelf = passages(stream, processor.tokenizer, mark, most)
    sizes = [len(processor.tokenizer.encode(piece + "\n\n")) for piece in PARAGRAPHS]
    assert sum(size > most - 2 for size in sizes) > 0
    assert shelf.sizes.max(initial=0) <= most
    assert shelf.left_out > 0
    assert shelf.sizes.sum() - 2 * len(shelf.sizes) + shelf.dropped == len(stream) - 2  # all but the marks of two books


def test_long_rows_are_the_documents_end_to_end_and_the_overhang_is_counted(context: Context) -> None:
    source = long(context, 96)
    stream, mark = stream_of(context.processor)
    shelf = texts(stream, mark)
    order = np.random.default_rng((0, 0, 3)).permutation(2)
    laid = np.concatenate([shelf.ids(int(number), mark) for number in order])
    rows = [source.row(number).ids for number in range(source.rows)]
    assert {len(row) for row in rows} == {96}
    assert source.rows * 96 + source.dropped == len(laid)
    assert 0 < source.dropped < 96
    cut = laid[: source.rows * 96].reshape(-1, 96).tolist()
    assert sorted(rows) == sorted(cut)


def test_each_epoch_has_every_row_in_an_order_of_its_own(context: Context) -> None:
    source = long(context, 96)
    epochs = [[tuple(source.row(number + epoch * source.rows).ids) for number in range(source.rows)]
              for epoch in range(2)]  # fmt: skip
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_documents_of_files_are_whole_texts_and_lengths_choose_among_them(context: Context) -> None:
    path = str(context.folder / "texts.parquet")
    sizes = sorted(len(context.processor.tokenizer.encode(book)) + 2 for book in BOOKS)
    both = long(context, 96, path=path)
    assert both.rows * 96 + both.dropped == sum(sizes)
    one = long(context, 96, path=path, least=sizes[0] + 1)
    assert (one.left_out, one.rows * 96 + one.dropped) == (1, sizes[1] + sizes[0] - 2)
    with pytest.raises(DataError, match="no document has the asked length"):
        short(context, path=path)


def test_the_check_of_data_counts_what_is_in_no_row(context: Context) -> None:
    shorter = min(len(context.processor.tokenizer.encode(book)) + 2 for book in BOOKS)
    options = {"rows": "long", "path": str(context.folder / "texts.parquet"), "least": shorter + 1}
    source = SourceConfig(source="documents", window=96, options=options)
    (found,) = check_data(context, [source])
    opened = long(context, 96, path=options["path"], least=shorter + 1)
    assert (found.dropped, found.left_out) == (opened.dropped, 1)
    assert found.dropped > 0
    assert sum(found.tokens) == opened.rows * 96


def test_a_record_that_cannot_be_read_is_told_and_an_empty_text_counted(context: Context) -> None:
    path = context.folder / "few.jsonl"
    path.write_text('{"text": "the old man"}\n{"text": ""}\n')
    (found,) = check_data(context, [SourceConfig(source="documents", options={"rows": "short", "path": str(path)})])
    assert (found.rows, found.left_out, found.bad) == (1, 1, [])
    path.write_text('{"text": "the old man"}\n{"text": 5}\nno json\n')
    (found,) = check_data(context, [SourceConfig(source="documents", options={"rows": "short", "path": str(path)})])
    (bad,) = found.bad
    assert "2 of 3 records cannot be read, the first in line 2: text is of type int" in bad.reason
    assert bad.mend == "mend them, or take them out"


def test_what_cannot_be_asked_of_documents_is_refused(context: Context, processor: Processor) -> None:
    stream, mark = stream_of(processor)
    with pytest.raises(DataError, match=r"path: '' matches no file"):
        short(context, path="")
    with pytest.raises(DataError, match=r"path: \[\] names no file"):
        short(context, path=[])
    with pytest.raises(ConfigError, match="must be short or long"):
        open_rows(texts(stream, mark), "medium", 64, 3, 0, mark, (0,))
    with pytest.raises(ConfigError, match="most=65 tokens of a short row exceed its window=64"):
        short(context, most=65)
    with pytest.raises(DataError, match="and one row 1000000"):
        open_rows(texts(stream, mark), "long", 1_000_000, 3, 0, mark, (0,))
    with pytest.raises(ConfigError, match="window=4096 of source 'documents': the model reads at most 2048 tokens"):
        long(context, 4096)
    with pytest.raises(ConfigError, match="window=32 of source 'digits'"):
        make_source(context, SourceConfig(source="digits", window=32))


@pytest.mark.parametrize("window", [24, 48])
def test_a_source_has_a_window_of_its_own(context: Context, window: int) -> None:
    assert len(make_source(context, SourceConfig(source="books", window=window)).row(0).ids) == window
    assert len(make_source(context, SourceConfig(source="books")).row(0).ids) == 64


def test_weights_are_shares_of_tokens_where_they_are_asked_to_be(context: Context) -> None:
    sources = [
        SourceConfig(source="documents", weight=0.44, options={"rows": "short"}),
        SourceConfig(source="books", weight=0.56, window=192),
    ]
    totals = {"rows": [0, 0], "tokens": [0, 0]}
    for weigh in ("rows", "tokens"):
        mixture = Mixture(context, sources, tokens=384, accumulate=4, weigh=weigh)
        for _ in range(60):
            for batch in mixture.take():
                for sample, size in zip(batch.samples, batch.lengths.tolist(), strict=True):
                    totals[weigh][sample.startswith("books")] += size if weigh == "tokens" else 1
    for weigh, (one, other) in totals.items():
        # drawn at random: of 400 rows or more, the share's deviation is below 0.025
        assert one / (one + other) == pytest.approx(0.44, abs=0.05), weigh
