"""Checks and previews: lengths are exact, media spans whole, every bad row listed, and pages need no other file."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from modalora.assistant import make_processor
from modalora.config import MediaConfig, SourceConfig
from modalora.contracts import IGNORED, Rule
from modalora.data.check import check_data, check_row
from modalora.data.corpus import Corpus, Passages, Volume, Volumes
from modalora.data.forms import Options, read_record
from modalora.data.mixture import Mixture
from modalora.data.preview import as_page, as_terminal, preview
from modalora.data.reader import check_labels, make_source, open_reader
from modalora.data.sources import Bad, Context
from modalora.errors import ConfigError, DataError, InputError, MediaError, PromptError, RouteError
from modalora.models.multimodal import Multimodal
from modalora.models.router import route
from modalora.models.sizes import tiny
from modalora.processing.tokenizer import PLACEHOLDERS, TextTokenizer

STORY = "the quick brown fox jumps over the lazy dog and two red boxes, one seven three. " * 40
TOKENIZER = TextTokenizer.train([STORY], 320)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path, tmp_path / "cache", make_processor(tiny(), TOKENIZER), window=40)


def write(path: Path, *records: dict[str, Any] | str) -> SourceConfig:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return SourceConfig(source="files", name="own", options={"path": str(path)})


def pair(question: str = "One?", answer: str = "two", **media: Any) -> dict[str, Any]:
    return {"instruction": question, "output": answer, **media}


def picture(width: int = 70, height: int = 50) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "blue").save(file, "PNG")
    return file.getvalue()


def sound(samples: int, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, samples)
    soundfile.write(file, wave, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


# ------------------------------------------------------------------------------------------ lengths and spans

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30) | st.sampled_from(
    ["<|end|>", "<|endoftext10|>", "<|image_1|", "e\u0301" * 20, "\u202eabc\u200b", "a " * 300, "<image"]
)
MEDIA = st.tuples(st.just("image"), st.integers(20, 200), st.integers(20, 200)) | st.tuples(
    st.just("audio"), st.integers(1200, 20_000), st.sampled_from((8_000, 11_025, 16_000, 44_100))
)
TURNS = st.lists(
    st.tuples(st.lists(TEXTS | MEDIA, min_size=1, max_size=4), TEXTS.filter(str.strip)), min_size=1, max_size=4
)


def conversation(turns: list[tuple[list[Any], str]]) -> dict[str, Any]:
    """A record in which every medium is a tag, with the media in lists."""
    record: dict[str, Any] = {"messages": [], "images": [], "audios": []}
    for parts, answer in turns:
        words = ""
        for part in parts:
            if isinstance(part, str):
                words += f"{part} "  # two of them make no tag
            else:
                words += f"<{part[0]}>"
                made = picture(*part[1:]) if part[0] == "image" else sound(*part[1:])
                record[f"{part[0]}s"].append(made)
        record["messages"] += [
            {"role": "user", "content": words if words.strip() else "?"},
            {"role": "assistant", "content": answer},
        ]
    return record


class Held:
    """A file of one record."""

    path, unit, identity = Path(__file__), "record", ""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record

    def __len__(self) -> int:
        return 1

    def read(self, number: int) -> dict[str, Any]:
        return self.record

    def line(self, number: int) -> int:
        return 1


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(TURNS, st.integers(20, 400))
def test_whatever_is_said_and_shown_lengths_and_spans_are_whole(
    context: Context, turns: list[tuple[list[Any], str]], most: int
) -> None:
    record = conversation(turns)
    messages = read_record(record, "messages", Options(Path.cwd()))
    processor = context.processor
    tokens = processor.measure(messages, answer=False)
    if tokens > processor.window:
        with pytest.raises(PromptError, match=f"the prompt is {tokens} tokens"):
            processor.row(messages, answer=False)
        return
    row = processor.row(messages, answer=False)
    check_row(row, tokens)
    placeholders = {TOKENIZER.control(token) for token in PLACEHOLDERS.values()}
    assert sum(index in placeholders for index in row.ids) == sum(item.tokens for item in row.media)
    assert [item.modality for item in row.media] == [
        part[0] for parts, _ in turns for part in parts if not isinstance(part, str)
    ]

    volume = Volume(Held(record), "messages", "", Options(Path.cwd()))
    cache = Path(tempfile.mkdtemp(dir=context.cache.parent))
    shelf = Volumes((0, 0), [volume], shuffle=False, held_out=0)
    corpus = Corpus(replace(context, most=most, cache=cache), shelf, truncate="messages")
    kept, dropped = corpus.conversation(0)
    assert kept == messages[: len(messages) - dropped]  # whole messages, from the end
    assert kept[-1]["role"] == "assistant"
    fits = processor.measure(kept, answer=False) <= most
    assert fits or len(kept) == 2
    if dropped:
        assert processor.measure(messages[: len(kept) + 2], answer=False) > most  # no more than need be
    if fits:
        cut = corpus.row(0)
        check_row(cut, corpus.measure(0))
        assert cut.ids == row.ids[: len(cut.ids)]
    else:
        with pytest.raises(PromptError, match=f"its first question and answer are .* at most {most}"):
            corpus.measure(0)


def test_spans_are_as_long_as_what_the_encoders_give(context: Context) -> None:
    torch.manual_seed(0)
    model = Multimodal(tiny()).eval()
    for size in ((70, 50), (200, 30), (56, 56), (111, 222)):
        parts = [{"type": "image", "image": picture(*size)}, {"type": "audio", "audio": sound(size[0] * 99)}]
        batch = context.processor([[{"role": "user", "content": parts}]])
        for item in batch.media:
            with torch.no_grad():
                (features,) = model.encoders[item.modality]([dict(item.features)])
            assert len(features) == item.tokens


def test_a_source_may_have_limits_on_media_of_its_own(context: Context, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(32_000), 16_000)
    (tmp_path / "wide.png").write_bytes(picture(600, 400))
    config = write(
        tmp_path / "a.jsonl", pair("<audio>What?", audios=["long.wav"]), pair("<image>What?", images=["wide.png"])
    )
    crops = [MediaConfig(max_crops=most) for most in (1, 6)]
    few, many = (make_source(context, config.model_copy(update={"media": media})) for media in crops)
    places = range(2)
    (place,) = [number for number in places if few.row(number).media[0].modality == "image"]
    assert few.measure(place) == len(few.row(place).ids) < len(many.row(place).ids) == many.measure(place)
    assert few.row(1 - place).ids == make_source(context, config).row(1 - place).ids
    short = make_source(context, config.model_copy(update={"media": MediaConfig(max_seconds=1.5)}))
    with pytest.raises(MediaError, match=r"lasts 2.0 s, and at most 1.5 s are read"):
        short.row(1 - place)
    assert short.row(place).ids == make_source(context, config).row(place).ids


def test_limits_on_media_that_a_source_cannot_have_are_refused(context: Context, tmp_path: Path) -> None:
    limits = MediaConfig(max_seconds=30)
    text = write(tmp_path / "a.jsonl", {"text": STORY})
    for config in (text, SourceConfig(source="documents", name="own", options={"path": str(tmp_path / "a.jsonl")})):
        with pytest.raises(ConfigError, match=r"media: .* of source 'own': its rows hold no audio; leave it out"):
            make_source(context, config.model_copy(update={"media": limits}))
    for name in ("instruct", "nlvr", "books"):
        with pytest.raises(
            ConfigError, match=rf"media: {{'max_seconds': 30.0}} of source '{name}': its rows hold no a"
        ):
            make_source(context, SourceConfig(source=name, media=limits))
    deaf = replace(context, processor=copy(context.processor))
    deaf.processor.media = {"image": context.processor.media["image"]}
    with pytest.raises(
        ConfigError, match=r"media: {'max_seconds': 30.0} of source 'own' is for a model that takes aud"
    ):
        make_source(deaf, write(tmp_path / "b.jsonl", pair()).model_copy(update={"media": limits}))


def test_a_conversation_that_is_too_long_is_bad_unless_turns_may_be_dropped(context: Context, tmp_path: Path) -> None:
    turns = [{"role": role, "content": "fox " * 60} for _ in range(40) for role in ("user", "assistant")]
    config = write(tmp_path / "a.jsonl", {"messages": turns})
    with pytest.raises(PromptError, match=r"a row has at most 2048; .* or set mixture.0.options.truncate=messages"):
        make_source(context, config).measure(0)
    cut = SourceConfig(source="files", options={**config.options, "truncate": "messages"})
    source = make_source(context, cut)
    assert 1500 < source.measure(0) <= 2048
    assert len(source.row(0).ids) == source.measure(0)
    assert check_data(context, [cut])[0].truncated == 1
    silent = [{**turn, "loss": False} if turn["role"] == "assistant" else turn for turn in turns[:-1]]
    write(tmp_path / "a.jsonl", {"messages": [*silent, turns[-1]]})
    (found,) = check_data(context, [cut])
    assert "cut to fit 2048 tokens it has no answer left that is trained" in found.bad[0].reason


def test_a_row_whose_media_have_no_route_is_bad(context: Context, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    config = write(tmp_path / "a.jsonl", pair(), pair(images=["a.png"]))

    def deaf(kinds: Collection[str], asked: str) -> Rule:
        return route(kinds, asked, adapters=("speech",))

    context.processor.router = deaf
    (found,) = check_data(context, [config])
    assert [(bad.line, bad.mend) for bad in found.bad] == [(2, "load one with load_adapter, or use --route none")]
    mixture = Mixture(context, [config], rows=2)
    assert (len(mixture.take()[0].samples), mixture.quarantine.count) == (1, 1)
    shown = list(preview(context, [config], rows=2))
    assert ["image needs the adapter 'vision'" in one.bad.reason for one in shown if one.bad] == [True]
    asked = config.model_copy(update={"route": "none"})
    assert check_data(context, [asked])[0].bad == []
    with pytest.raises(RouteError, match="unknown route 'gone'; use one of auto, none, speech"):
        check_data(context, [config.model_copy(update={"route": "gone"})])


def test_plain_text_becomes_windows_that_hold_each_token_once(context: Context, tmp_path: Path) -> None:
    texts = [STORY[:1000], "a", STORY[500:700]]
    records = [{"text": texts[0]}, {"text": texts[1]}, "{broken", {"text": ""}, {"text": texts[2]}]
    records.append({"text": "what is seen", "video": "a.mp4"})
    config = write(tmp_path / "a.jsonl", *records)
    source = make_source(context, SourceConfig(source="files", options={**config.options, "shuffle": False}))
    assert isinstance(source, Passages)
    ids: list[int] = []
    for number in range(source.rows):
        line = source.place(number)[1]
        if told := {3: "not JSON", 4: "its text is empty", 6: "'video', which is not read"}.get(line):
            with pytest.raises(InputError, match=told):
                source.row(number)
            continue
        row = source.row(number)
        assert row.ids == row.labels
        assert 2 <= len(row.ids) <= 40
        assert source.measure(number) == len(row.ids)
        ids += row.ids
    end = TOKENIZER.control("<|endoftext|>")
    assert ids == [index for text in texts for index in [*TOKENIZER.encode(text), end]]
    assert [bad.line for bad in check_data(context, [config])[0].bad] == [3, 4, 6]


# -------------------------------------------------------------------------------------------------- the check


def test_every_bad_row_is_listed_with_its_place_and_what_mends_it(context: Context, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "cut.wav").write_bytes(sound(8000)[:4000])
    source = write(
        tmp_path / "a.jsonl",
        pair(), pair(images=["a.png"]), "", pair(images=["gone.png"]), "{", pair(answer=""), pair("<image>"),
        pair(audio="cut.wav"), pair("x\ud800"), pair("fox " * 3000), pair("<|end|>", extra=1), pair(audio="a.png"),
        pair(images=["../a.png"]), '{"instruction": ' + "[" * 5000, '{"instruction": "a\0"}',
        pair(audio={"array": [0.0] * 9000, "sampling_rate": 10**30}),
    )  # fmt: skip
    (found,) = check_data(context, [source])
    assert found.rows == 15
    assert len(found.tokens) == 3
    assert found.media == {"image": 1}
    assert found.control == 1
    assert found.unread == {"extra": 1}
    told = {bad.line: bad.reason for bad in found.bad}
    expected = {
        4: "does not exist", 5: "not JSON", 6: "is empty", 7: "1 <image> places and 0 images", 8: "cut short",
        9: "Unicode", 10: "tokens", 12: "not a sound file", 13: "lies outside", 14: "not JSON|nested", 15: "NUL",
        16: "a sample rate of 1000000",
    }  # fmt: skip
    assert told.keys() == expected.keys()
    for line, words in expected.items():
        assert re.search(words, told[line]), (line, told[line])
    assert all(bad.mend and bad.file == str(tmp_path / "a.jsonl") for bad in found.bad)
    assert found.summary()["tokens"]["max"] == max(found.tokens)
    assert 0 < found.trained < sum(found.tokens)


def test_a_damaged_file_is_a_finding_and_the_others_are_checked_still(context: Context, tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing")
    broken = SourceConfig(source="files", name="broken", options={"path": str(tmp_path / "bad.parquet")})
    one, two = check_data(context, [broken, write(tmp_path / "a.jsonl", pair())])
    assert "no whole Parquet file" in one.bad[0].reason
    assert two.bad == []
    assert two.rows == 1


def test_a_check_leaves_the_lengths_in_the_cache(context: Context, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", pair(), pair(answer="fox fox"))
    check_data(context, [source])
    (lengths,) = (tmp_path / "cache" / "files").glob("lengths-*.npy")
    opened = make_source(context, source)
    assert sorted(np.load(lengths).tolist()) == sorted(opened.measure(number) for number in range(2))


def test_a_span_that_is_not_whole_is_noticed(context: Context) -> None:
    asked = {"role": "user", "content": [{"type": "image", "image": picture()}]}
    row = context.processor.row([asked, {"role": "assistant", "content": "a"}], answer=False)
    check_row(row, len(row.ids))
    placed = row.media[0]
    for broken in (placed.start - 1, placed.start + 1):
        row.media[0] = placed._replace(start=broken)
        with pytest.raises(DataError, match="span of its image"):
            check_row(row, len(row.ids))
    row.media[0] = placed
    row.labels = [IGNORED] * len(row.labels)
    with pytest.raises(DataError, match="no token of it is trained"):
        check_labels(row)


def as_messages(said: tuple[str, str]) -> dict[str, Any]:
    return {
        "messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
    }


def test_the_check_and_training_refuse_the_same_rows(context: Context, tmp_path: Path) -> None:
    untrained = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    good, long = ("one?", "two"), ("the quick brown fox " * 9, "two")
    source = write(tmp_path / "a.jsonl", *map(as_messages, (good, long)), untrained)
    context = replace(context, most=40)
    (found,) = check_data(context, [source])
    reader = open_reader(context, [source], 0)
    seen = {number: reader.look((0, number)) for number in range(3)}
    made = {number: reader.make((0, number)) for number in range(3)}
    bad = {one.line for one in found.bad}
    assert bad == {2, 3}
    assert {one.line for one in (*seen.values(), *made.values()) if isinstance(one, Bad)} == bad


def test_rows_that_the_objective_cannot_take_are_bad(recipe: Path, run: Run) -> None:
    code, out, _ = run("data", "check", str(recipe), "objective=ctc", "train=[audio.encoder]", "--json")
    assert code == 1
    (found,) = json.loads(out)
    told = {bad["line"]: bad["reason"].rpartition("the row holds ")[2] for bad in found["bad"]}
    assert told == {1: "text alone", 2: "image", 4: "message 2, the assistant's, is empty or blank"}
    assert found["bad"][0]["mend"] == "give it other rows, or leave objective out"


def test_parts_may_number_the_records_media_in_their_order(context: Context, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(picture(60, 60))

    def record(*order: int) -> dict[str, Any]:
        parts = [{"index": index, "text": None, "type": "image"} for index in order]
        asked = {"role": "user", "content": [*parts, {"index": None, "text": "one?", "type": "text"}]}
        return {"messages": [asked, {"role": "assistant", "content": "two"}], "images": ["a.png", "b.png"]}

    (found,) = check_data(context, [write(tmp_path / "a.jsonl", record(0, 1), record(1, 0))])
    assert [(bad.line, bad.reason) for bad in found.bad] == [(2, "message 1 has image 1 where 0 is next")]
    assert found.media == {"image": 2}


def test_a_users_weight_makes_no_label(context: Context, tmp_path: Path) -> None:
    turns = [
        ("user", "one?", 1),
        ("assistant", "two", 0),
        ("user", "more?", 0),
        ("assistant", "the quick fox " * 20, 1),
    ]
    messages = [{"role": role, "content": text, "weight": weight} for role, text, weight in turns]
    source = write(tmp_path / "a.jsonl", {"messages": messages})
    source = source.model_copy(update={"options": {**source.options, "truncate": "messages"}})
    (bad,) = check_data(replace(context, most=40), [source])[0].bad
    assert bad.reason.endswith("it has no answer left that is trained")


def test_a_window_beyond_the_budget_is_a_bad_row_for_both(context: Context, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": STORY[: 40 * size]}) + "\n" for size in (1, 9)), encoding="utf-8")
    source = SourceConfig(source="documents", window=512, options={"rows": "short", "path": str(path)})
    context = replace(context, most=64)
    (found,) = check_data(context, [source])
    reader = open_reader(context, [source], 0)
    (told,) = [one for one in (reader.look((0, number)) for number in range(2)) if isinstance(one, Bad)]
    assert (told.reason, told.mend) == (found.bad[0].reason, found.bad[0].mend)
    assert "tokens=64" in told.reason


def test_a_bad_record_of_a_tar_is_named_by_its_key_too(context: Context, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {"x/7.png": picture(), "x/7.txt": b"a", "x/8.png": b"no picture", "x/8.txt": b"b"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = SourceConfig(source="files", name="own", options={"path": str(path)})
    (bad,) = check_data(context, [source])[0].bad
    assert (str(bad.place), bad.key) == (f"{path}:2, key x/8", "x/8")
    assert f"{path}:2, key x/8" in {one.place for one in preview(context, [source], rows=2) if one.bad}


def test_a_setting_that_mends_a_row_is_told_as_it_is_typed(context: Context, tmp_path: Path) -> None:
    mixed = write(tmp_path / "a.jsonl", pair(), as_messages(("a", "b")), pair())
    one, two = check_data(context, [write(tmp_path / "b.jsonl", pair("<image>")), mixed])
    assert one.bad[0].mend.endswith("or set mixture.0.options.tags=false when the tag is mere text")
    assert two.bad[0].reason.endswith("(of 3 looked at 2 alpaca; 1 messages, the first in line 2)")
    assert two.bad[0].mend.endswith("read all as one form: mixture.1.options.form=alpaca")
    (two,) = check_data(context, [SourceConfig(source="files", options={**mixed.options, "form": "alpaca"})])
    assert two.read[0].endswith("read as alpaca because form=alpaca was asked for")
    assert [bad.line for bad in two.bad] == [2]


# ----------------------------------------------------------------------------------------------- command line


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(picture(900, 600))
    (tmp_path / "a.wav").write_bytes(sound(16_000))
    write(
        tmp_path / "a.jsonl",
        pair("<script>alert(1)</script>", "a & <b>"), pair("What? <image>", "blue", images=["a.png"]),
        pair("And <audio>", "noise", audios=["a.wav"]), pair(answer=""),
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(
        f"init: bundled/nano\noutput: {tmp_path}/out\ncache: {tmp_path}/cache\ntrain: [adapter.*]\nsteps: 1\n"
        f"mixture: [{{source: files, name: own, options: {{path: {tmp_path}/a.jsonl, shuffle: false}}}}]\n"
    )
    return tmp_path / "r.yaml"


def test_data_check_loads_no_weight_and_fails_when_a_row_is_bad(
    recipe: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr("modalora.checkpoint.store.Weights", refuse)
    monkeypatch.setattr("modalora.models.multimodal.Multimodal.__init__", refuse)
    code, out, _ = run("data", "check", str(recipe))
    assert code == 1
    assert "read as alpaca because its records have 'instruction' and 'output'" in out
    assert f"{recipe.parent / 'a.jsonl'}:4  message 2, the assistant's, is empty" in out
    assert "-> give an answer or drop the record" in out
    code, out, _ = run("data", "check", str(recipe), "--json")
    assert code == 1
    (found,) = json.loads(out)
    assert found["rows"] == 4
    assert found["media"] == {"image": 1, "audio": 1}
    assert [bad["line"] for bad in found["bad"]] == [4]
    lines = (recipe.parent / "a.jsonl").read_text().splitlines()
    (recipe.parent / "a.jsonl").write_text("\n".join(lines[:3]))
    code, out, _ = run("data", "check", str(recipe))
    assert code == 0
    assert "every row is good" in out
    code, _, err = run("data", "check", str(recipe), "mixture.0.options.form=chat")
    assert code == 2
    assert "form='chat' must be auto or one of messages" in err


def test_what_data_check_prints_to_a_file_has_a_line_for_each_figure(recipe: Path, run: Run) -> None:
    _, out, _ = run("data", "check", str(recipe))
    lines = out.splitlines()
    assert {"source  own", "rows  4", "media  1 image, 1 audio", "bad  1", "1 bad row"} <= set(lines)


def test_a_file_of_broken_records_alone_is_told_with_their_lines(tmp_path: Path, run: Run) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a\n{b\n[1]\n7\n')
    code, out, _ = run("data", "check", str(rows), f"cache={tmp_path}")
    assert code == 1
    told = r"line 1: it is not JSON \(Unterminated .*line 2: it is not JSON .*line 3: it is a JSON list.* and 1 more"
    assert re.search(told, out)
    assert "-> write one JSON object per record" in out
    code, out, err = run("data", "check", str(tmp_path / "no.jsonl"))
    assert (code, out, "no.jsonl' matches no file" in err) == (2, "", True)


def test_a_file_of_data_is_looked_at_without_a_recipe_and_not_taken_for_one(recipe: Path, run: Run) -> None:
    rows = recipe.with_name("a.jsonl")
    code, out, _ = run("data", "check", str(rows), f"cache={recipe.parent / 'cache'}", "--json")
    assert code == 1
    (found,) = json.loads(out)
    assert [bad["line"] for bad in found["bad"]] == [4]
    code, out, _ = run("data", "preview", str(rows), f"cache={recipe.parent / 'cache'}", "--rows", "1")
    assert code == 0
    assert "blue" in out or "noise" in out or "a & <b>" in out
    code, _, err = run("train", str(rows))
    assert code == 2
    assert f"give finetune-text mixture.0.options.path={rows}" in err


class Links(HTMLParser):
    """What a page loads, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_preview_is_one_page_with_pictures_and_sounds_inside(recipe: Path, run: Run) -> None:
    page = recipe.parent / "rows.html"
    code, out, _ = run("data", "preview", str(recipe), "--rows", "9", "--html", str(page))
    assert code == 0
    assert "4 rows" in out
    text = page.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert "script" not in links.tags
    assert {"img", "audio"} <= set(links.tags)
    assert [link.partition(",")[0] for link in links.loaded] == ["data:image/png;base64", "data:audio/wav;base64"]
    small = Image.open(io.BytesIO(base64.b64decode(links.loaded[0].partition(",")[2])))
    assert small.size == (320, 213)
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(links.loaded[1].partition(",")[2])))
    assert (len(wave), rate) == (16_000, 16_000)
    assert '<span class="trained">a &amp; &lt;b&gt;</span>' in text
    assert '<span class="trained">&lt;script' not in text
    assert "the assistant&#x27;s, is empty" in text


def test_what_is_trained_is_green_in_a_terminal(recipe: Path, context: Context, run: Run) -> None:
    source = SourceConfig(source="files", options={"path": str(recipe.parent / "a.jsonl"), "shuffle": False})
    shown = list(preview(context, [source], rows=4))
    text = as_terminal(shown[1])
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "bold green")
    assert green == "blue<|end|>"
    assert f"[image: {shown[1].spans[2].tokens} tokens]" in text.plain
    assert sum(span.tokens for span in shown[1].spans) == len(make_source(context, source).row(1).ids)
    code, out, _ = run("data", "preview", str(recipe), "--rows", "4")
    assert code == 0
    assert "blue<|end|>" in out
    assert as_page(shown, "x", context.processor).count("<article>") == 4


def test_a_terminal_is_not_driven_by_what_a_row_says(context: Context, tmp_path: Path) -> None:
    (shown,) = preview(context, [write(tmp_path / "a.jsonl", pair("a\x1b[2J\x07 b\nc"))], rows=1)
    assert "a\\x1b[2J\\x07 b\nc" in as_terminal(shown).plain
