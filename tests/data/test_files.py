"""Data files: every kind gives the same records by number, and damage is named with its reason."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from modalora.assistant import make_processor
from modalora.data.corpus import open_corpus
from modalora.data.files import find_files, open_records, texts
from modalora.data.files.limits import MOST_BYTES
from modalora.data.files.texts import parse_json
from modalora.data.sources import Context
from modalora.errors import DataError
from modalora.models.sizes import tiny
from modalora.processing.chat import FORMATS
from modalora.processing.tokenizer import TextTokenizer

RECORDS: list[dict[str, Any]] = [
    {"instruction": f'Ask "{number}" [{{,', "output": "é\\\n" * number, "n": [{"a": None, "b": number}]}
    for number in range(200)
]


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if path.name.endswith(".jsonl"):
        path.write_text(lines, encoding="utf-8")
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=30)
    elif path.name.endswith((".tar", ".tar.gz")):
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
            for number, record in enumerate(records):
                data = json.dumps(record).encode()
                info = tarfile.TarInfo(f"part/{number:05d}.json")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


KINDS = ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.tar", "a.tar.gz")


@pytest.mark.parametrize("name", KINDS)
def test_records_are_read_by_number_in_any_order(tmp_path: Path, name: str) -> None:
    records = open_records(write(tmp_path / name), tmp_path / "cache")
    assert len(records) == len(RECORDS)
    for number in (199, 0, 100, 29, 30, 31, 100):
        assert records.read(number) == RECORDS[number]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": 1}\n\n  \n{"a": 2}\r\n' + "\n" + '{"a": 3}', encoding="utf-8")
    records = open_records(tmp_path / "a.jsonl", tmp_path)
    assert [(records.line(number), records.read(number)["a"]) for number in range(3)] == [(1, 1), (4, 2), (6, 3)]
    assert len(records) == 3
    (tmp_path / "a.json").write_text('[\n{"a":\n1},{"a": 2},\n\n{"a": 3}\n]\n')
    records = open_records(tmp_path / "a.json", tmp_path)
    assert [(records.line(number), records.read(number)["a"]) for number in range(3)] == [(2, 1), (3, 2), (5, 3)]


@pytest.mark.parametrize("mark", ["", "\ufeff", "\n"])
def test_an_object_over_several_lines_is_one_record(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(mark + json.dumps({"a": [1, 2]}, indent=2) + "\n", encoding="utf-8")
    records = open_records(path, tmp_path)
    assert (len(records), records.read(0), records.line(0)) == (1, {"a": [1, 2]}, 1)
    path.write_text(mark + '{"a": 1\n{"a": 2}\n', encoding="utf-8")
    records = open_records(path, tmp_path)
    assert (len(records), records.read(1)) == (2, {"a": 2})


VALUES = st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=6)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=6)


@settings(max_examples=100, deadline=None)
@given(OBJECTS, st.integers(1, 40), st.booleans())
def test_an_array_is_cut_at_its_elements_wherever_chunks_end(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], chunk: int, plain: bool
) -> None:
    folder = tmp_path_factory.mktemp("array")
    (folder / "a.json").write_text(
        json.dumps(records, ensure_ascii=plain, indent=1 if plain else None), encoding="utf-8"
    )
    before, texts.CHUNK = texts.CHUNK, chunk
    try:
        opened = open_records(folder / "a.json", folder)
    finally:
        texts.CHUNK = before
    assert len(opened) == len(records)
    for number, record in enumerate(records):
        if any("\0" in text for text in json.dumps(record, ensure_ascii=False)):
            continue
        assert opened.read(number) == record


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(['{"a": 1}', '{"b": "é"}', "", "  ", "\r"]), max_size=12),
    st.integers(1, 20),
    st.booleans(),
)
def test_lines_are_cut_at_their_ends_wherever_chunks_end(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], chunk: int, closed: bool
) -> None:
    folder = tmp_path_factory.mktemp("lines")
    (folder / "a.jsonl").write_bytes(("\n".join(lines) + ("\n" if closed else "")).encode())
    before, texts.CHUNK = texts.CHUNK, chunk
    try:
        opened = open_records(folder / "a.jsonl", folder)
    finally:
        texts.CHUNK = before
    full = [(place, json.loads(line)) for place, line in enumerate(lines, start=1) if line.strip()]
    assert [(opened.line(number), opened.read(number)) for number in range(len(opened))] == full


@pytest.mark.parametrize("name", KINDS)
def test_an_index_is_made_once_and_anew_when_the_file_changes(tmp_path: Path, name: str) -> None:
    path, cache = write(tmp_path / name), tmp_path / "cache"
    open_records(path, cache)
    made = {file: file.stat().st_mtime_ns for file in (cache / "files").iterdir()}
    assert len(open_records(path, cache)) == 200
    assert {file: file.stat().st_mtime_ns for file in (cache / "files").iterdir()} == made
    write(path, RECORDS[:150])
    again = open_records(path, cache)
    assert len(again) == 150
    assert again.read(149) == RECORDS[149]
    own = [file for file in (cache / "files").iterdir() if file.name.startswith(path.name)]
    assert len(own) == len({file.suffixes[-1] for file in own})  # what was of the old file is gone
    status, made = path.stat(), dict.fromkeys((cache / "files").iterdir(), 0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    open_records(path, cache)
    assert not made.keys() & set((cache / "files").iterdir())


def test_a_file_is_never_held_whole(tmp_path: Path) -> None:
    import tracemalloc

    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(60_000):
            file.write(json.dumps({"instruction": f"{number} " * 100, "output": "b"}) + "\n")
    tracemalloc.start()
    records = open_records(tmp_path / "a.jsonl", tmp_path)
    assert records.read(59_999)["instruction"].startswith("59999 ")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # a chunk of 4 MB as bytes and as a mask, and 24 bytes a line; the file has 37 MB
    assert (tmp_path / "a.jsonl").stat().st_size > 35e6
    assert peak < 20e6


def test_members_of_one_key_are_one_record(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("x/1.json", b'{"messages": [], "images": ["2.png", "jpg"]}'), ("x/1.jpg", b"J"), ("x/1.2.png", b"P"),
            ("x/2.jpg", b"K"), ("x/2.txt", b"a cat"), ("y/2.txt", b"other"), ("y/2.wav", b"W"),
            ("z.json", b'{"text": "a", "image": "jpg"}'), ("z.jpg", b"J"), ("z.png", b"P"),
            ("zz.json", b'{"text": "a"}'), ("zz.txt", b"b"),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    records = open_records(tmp_path / "a.tar", tmp_path)
    assert [records.read(number) for number in range(3)] == [
        {"messages": [], "images": [b"P", b"J"]},
        {"text": "a cat", "images": [b"K"]},
        {"text": "other", "audios": [b"W"]},
    ]
    left = "a member that the JSON does not name"
    assert records.read(3) == {"text": "a", "image": [b"J"], "png": left}  # which a check lists as not read
    with pytest.raises(DataError, match=r"zz.json has 'text' and zz.txt says another; keep one"):
        records.read(4)


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.table(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the column 'text' twice, and a row would keep one; rename it"):
        open_records(tmp_path / "a.parquet", tmp_path)


def test_folders_that_datasets_saved_are_read_with_media_as_they_were(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    rows = {"instruction": ["What?"], "output": ["red"], "images": [[str(tmp_path / "a.png")]]}
    features = datasets.Features(
        {
            "instruction": datasets.Value("string"),
            "output": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
        }
    )
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "saved"))
    read = open_records(tmp_path / "saved", tmp_path, "train").read(0)
    assert read["images"][0]["bytes"] == (tmp_path / "a.png").read_bytes()
    with pytest.raises(DataError, match="holds the splits train; name one as split"):
        open_records(tmp_path / "saved", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no folder that `datasets` reads"):
        open_records(tmp_path / "empty", tmp_path)


def test_the_splits_of_one_folder_share_no_cache(tmp_path: Path) -> None:
    import datasets

    said = {"train": ["what is learnt from"] * 5, "test": ["zzz"] * 3}
    splits = {name: datasets.Dataset.from_dict({"text": own}) for name, own in said.items()}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    words = TextTokenizer.train(["what is learnt from zzz " * 9], 320)
    context = Context(tmp_path, tmp_path / "cache", make_processor(tiny(), words), window=40)
    for name, own in said.items():
        corpus = open_corpus(context, (0, 0), str(tmp_path / "saved"), split=name, shuffle=False)
        assert [words.decode(corpus.row(number).ids) for number in range(corpus.rows)] == own


def test_tokenizers_and_chat_formats_share_no_cache(tmp_path: Path) -> None:
    said = "what is learnt from "
    write(tmp_path / "text.jsonl", [{"text": said * 9}])
    write(tmp_path / "pairs.jsonl", [{"instruction": said, "output": said * 5}])
    found = []
    for learnt, chat in (("zzz ", "phi4"), (said, "phi4"), (said, "phi3")):
        processor = make_processor(tiny(), TextTokenizer.train([learnt * 99], 320), FORMATS[chat])
        context = Context(tmp_path, tmp_path / "cache", processor, window=400)
        texts, pairs = (open_corpus(context, (0, 0), str(tmp_path / f"{name}.jsonl")) for name in ("text", "pairs"))
        assert processor.tokenizer.decode(texts.row(0).ids) == said * 9
        found.append((texts.measure(0), pairs.measure(0)))
        assert found[-1] == (len(texts.row(0).ids), len(pairs.row(0).ids))
    (text, pair), (fewer, shorter), (same, longer) = found
    assert text > fewer == same
    assert pair > shorter < longer


def test_fields_of_other_names_share_no_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"one": "first", "two": "second"}])
    tokenizer = TextTokenizer.train(["words"], 320)
    context = Context(tmp_path, tmp_path / "cache", make_processor(tiny(), tokenizer), 40)
    for name, said in (("one", "first"), ("two", "second")):
        corpus = open_corpus(context, (0, 0), str(path), form="text", rename={name: "text"})
        assert tokenizer.decode(corpus.row(0).ids) == said


# ----------------------------------------------------------------------------------------------------- poison


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"[" * 1_000_000, "not JSON|nested deeper than 100"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested deeper than 100; flatten"),
        (b'{"a": "x\0y"}', "NUL bytes"),
        ('{"a": 1}'.encode("utf-16"), "NUL bytes.* UTF-16"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\xc0\xaf"}', "not UTF-8"),  # an overlong slash
        ('\ufeff{"a": 1}'.encode(), "byte order mark; files were joined"),
        (b'{"a": ' + b"9" * 1_000_000 + b"}", "not JSON .*digits"),
        (b'{"a": 1', "not JSON"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b'{"a": 1} {"a": 2}', "not JSON"),
    ],
)  # fmt: skip
def test_poison_is_refused_with_its_reason_at_once(data: bytes, told: str) -> None:
    started = time.process_time()
    with pytest.raises(DataError, match=told) as error:
        parse_json(data)
    assert "; " in str(error.value)  # behind it stands what to do
    assert len(str(error.value)) < 500
    assert time.process_time() - started < 2


def test_a_hundred_nested_lists_are_read() -> None:
    assert parse_json(b'{"a":' * 99 + b"[1]" + b"}" * 99)


def test_a_line_of_a_hundred_megabytes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "three"}\n')
    started = time.process_time()
    records = open_records(tmp_path / "a.jsonl", tmp_path)
    assert [records.read(number)["text"] for number in (0, 2)] == ["one", "three"]
    with pytest.raises(DataError, match=f"100,000,012 bytes, and at most {MOST_BYTES:,} are read"):
        records.read(1)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.parquet", "a.tar", "a.tar.gz"])
def test_a_file_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path, name: str) -> None:
    whole = write(tmp_path / name, RECORDS[:20]).read_bytes()
    end = len(whole.rstrip(b"\0")) if name.endswith(".tar") else len(whole.rstrip())
    for cut in sorted({1, 100, end // 3, end // 2, 1024, 1536, end - 1}):
        if cut < end:
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(DataError, match="; "):
                open_records(tmp_path / name, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "files").glob("*")) if (tmp_path / "cache" / "files").exists() else True


def test_a_tar_with_a_broken_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a.tar", RECORDS[:20]).read_bytes())
    assert data[2048 : 2048 + 5] == b"part/"
    data[2048 + 150] ^= 1  # its checksum
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"damaged or cut short at byte 2,048; copy"):
        open_records(tmp_path / "a.tar", tmp_path)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_bytes_that_were_changed_give_records_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[float, int]]
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    data = bytearray(write(folder / name, RECORDS[:12]).read_bytes())
    for share, value in changes:
        data[int(share * len(data))] = value
    (folder / name).write_bytes(data)
    try:
        records = open_records(folder / name, folder)
    except DataError:
        return
    for number in range(len(records)):
        try:
            records.read(number)
        except DataError:
            continue


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(MOST_BYTES * 2))
    (tmp_path / "a.jsonl.gz").write_bytes(bomb)
    with pytest.raises(DataError, match="grows to more than 200 times its size"):
        open_records(tmp_path / "a.jsonl.gz", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "files").iterdir())


def test_what_is_not_there_or_of_no_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"matches no file .*; give files or patterns"):
        find_files(str(tmp_path / "*.jsonl"))
    with pytest.raises(DataError, match="of no kind that is read"):
        open_records(write(tmp_path / "a.jsonl").rename(tmp_path / "a.csv"), tmp_path)
    with pytest.raises(DataError, match="/dev/null is a pipe or a device, .*; write them to a file first"):
        open_records(Path("/dev/null"), tmp_path)
    for name in ("b.jsonl", "c.jsonl", "a.jsonl"):
        write(tmp_path / name)
    assert [path.name for path in find_files(str(tmp_path / "?.jsonl"))] == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_a_file_that_comes_twice_is_refused(tmp_path: Path) -> None:
    file, link = write(tmp_path / "a.jsonl"), tmp_path / "link.jsonl"
    link.symlink_to(file)
    for paths, told in (
        ([str(file), str(tmp_path / "?.jsonl")], "a.jsonl' is named twice"),
        ([str(tmp_path / "*.jsonl")], "link.jsonl' is named as '.*a.jsonl' too"),
    ):
        with pytest.raises(DataError, match=f"{told}: its rows would come twice"):
            find_files(paths)
