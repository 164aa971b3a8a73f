"""Conversations into batches: spans, labels, routes, padding and the window."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from modalora.contracts import IGNORED, Batch, subsampled
from modalora.errors import MediaError, PromptError, RouteError
from modalora.models.router import route
from modalora.processing.audio import AudioConfig, log_mel, read_audio
from modalora.processing.chat import FORMATS
from modalora.processing.image import ImageConfig, image_features, read_image
from modalora.processing.processor import Medium, Processor, Row
from modalora.processing.tokenizer import TextTokenizer

WORDS = "seven blue boxes touch the wall, and the quick brown fox jumps over the lazy dog; how many are there? " * 4
TOKENIZER = TextTokenizer.train([WORDS], 320)
IMAGE, AUDIO = ImageConfig(crop=56, patch=14, max_crops=6), AudioConfig()
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8))
SOUND = (np.random.default_rng(1).standard_normal(6000).astype(np.float32) / 8, 8000)
ROUTER = partial(route, adapters=("vision", "speech"))
CONTROL = TOKENIZER.control


def make(image: ImageConfig | None = IMAGE, audio: AudioConfig | None = AUDIO, **changes: Any) -> Processor:
    media = {
        "image": Medium(("<|endoftext10|>", CONTROL("<|endoftext10|>")), read_image, image),
        "audio": Medium(("<|endoftext11|>", CONTROL("<|endoftext11|>")), read_audio, audio),
    }
    media = {kind: medium for kind, medium in media.items() if medium.settings}
    return Processor(TOKENIZER, media=media, **{"window": 512, "router": ROUTER, **changes})


PROCESSOR = make()


def user(words: str = "", **media: Any) -> list[dict[str, Any]]:
    parts = [{"type": kind, kind: payload} for kind, payload in media.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}] if words else parts}]


ROWS = [
    user("seven"),
    user("which blue box?", image=PICTURE),
    user(audio=SOUND),
    user("it?", image=PICTURE, audio=SOUND),
]


def test_ids_are_the_control_tokens_and_the_encoded_words() -> None:
    batch = PROCESSOR([user("seven blue boxes")])
    words = TOKENIZER.encode("seven blue boxes")
    assert batch.input_ids.tolist() == [[CONTROL("<|user|>"), *words, CONTROL("<|end|>"), CONTROL("<|assistant|>")]]
    assert batch.lengths.tolist() == [len(words) + 3]
    assert batch.labels is None


@pytest.mark.parametrize("token", ["<|end|>", "<|endoftext10|>", "<|endoftext11|>", "<|image_1|>", "<|assistant|>"])
def test_tags_written_by_a_user_stay_text(token: str) -> None:
    (ids,) = PROCESSOR([user(f"seven{token}")]).input_ids.tolist()
    assert [index for index in ids if index in TOKENIZER.control_ids] == [
        CONTROL("<|user|>"),
        CONTROL("<|end|>"),
        CONTROL("<|assistant|>"),
    ]
    assert TOKENIZER.decode(ids) == f"seven{token}"


def spans(batch: Batch) -> list[tuple[int, str, int, int]]:
    return [(item.row, item.modality, item.start, item.tokens) for item in batch.media]


def test_placeholders_are_as_many_as_the_media_have_tokens() -> None:
    batch = PROCESSOR(ROWS)
    features, pictured = image_features(PICTURE, IMAGE)
    heard = subsampled(len(log_mel(*SOUND)))
    assert spans(batch) == [
        (1, "image", 1, pictured),
        (2, "audio", 1, heard),
        (3, "image", 1, pictured),
        (3, "audio", 1 + pictured, heard),
    ]
    for name, value in features.items():
        assert torch.equal(batch.media[0].features[name], value)
    assert torch.equal(batch.media[1].features["mel"], log_mel(*SOUND))
    marks = {CONTROL("<|endoftext10|>"): "image", CONTROL("<|endoftext11|>"): "audio"}
    for row, ids in enumerate(batch.input_ids.tolist()):
        found = {place: marks[index] for place, index in enumerate(ids) if index in marks}
        told = {
            item.start + step: item.modality for item in batch.media if item.row == row for step in range(item.tokens)
        }
        assert found == told


def test_media_stand_where_their_part_stands() -> None:
    content = [{"type": "text", "text": "blue"}, {"type": "image", "image": PICTURE}, {"type": "text", "text": "box"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "it"}, *user(audio=SOUND)]
    batch = PROCESSOR([turns])
    first, second = batch.media
    blue, box, it = (TOKENIZER.encode(word) for word in ("blue", "box", "it"))
    assert first.start == 1 + len(blue)
    assert second.start == first.start + first.tokens + len(box) + 2 + len(it) + 2


def test_openai_parts_give_the_same_batch() -> None:
    picture, sound = io.BytesIO(), io.BytesIO()
    PICTURE.save(picture, "PNG")
    soundfile.write(sound, SOUND[0], SOUND[1], format="WAV", subtype="FLOAT")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    data = {"data": base64.b64encode(sound.getvalue()).decode(), "format": "wav"}
    told = PROCESSOR([user("it?", image=PICTURE, audio=SOUND)])
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_audio", "input_audio": data},
        {"type": "text", "text": "it?"},
    ]
    batch = PROCESSOR([[{"role": "user", "content": content}]])
    assert torch.equal(batch.input_ids, told.input_ids)
    for item, other in zip(batch.media, told.media, strict=True):
        for name, value in other.features.items():
            assert torch.equal(item.features[name], value), name


def test_each_row_has_its_own_route_and_projectors() -> None:
    batch = PROCESSOR(ROWS)
    assert batch.route.adapters == (None, "vision", "speech", "vision")
    assert [item.branch for item in batch.media] == ["vision", "speech", "vision", "vision"]
    batch = PROCESSOR(ROWS, route="none")
    assert batch.route.adapters == (None,) * 4
    assert [item.branch for item in batch.media] == ["vision", "speech", "vision", "vision"]
    assert PROCESSOR(ROWS, route="speech").route.adapters == ("speech",) * 4


def test_an_unknown_route_is_refused_with_those_there_are() -> None:
    with pytest.raises(RouteError, match="unknown route 'sight'; use one of auto, none, speech, vision"):
        PROCESSOR(ROWS, route="sight")


def test_rows_are_padded_on_the_right() -> None:
    batch = PROCESSOR(ROWS)
    pad = CONTROL("<|endoftext|>")
    assert batch.input_ids.shape == (4, int(batch.lengths.max()))
    for row, messages in enumerate(ROWS):
        length = int(batch.lengths[row])
        assert batch.input_ids[row, :length].tolist() == PROCESSOR.row(messages).ids
        assert set(batch.input_ids[row, length:].tolist()) <= {pad}


def test_labels_are_the_assistants_words_and_their_end_and_nothing_else() -> None:
    turns = [
        *user("which box?", image=PICTURE),
        {"role": "assistant", "content": "blue"},
        *user("and?"),
        {"role": "assistant", "content": "the fox"},
    ]
    row = PROCESSOR.row(turns, answer=False)
    end = CONTROL("<|end|>")
    assert [label for label in row.labels if label != IGNORED] == [
        *TOKENIZER.encode("blue"),
        end,
        *TOKENIZER.encode("the fox"),
        end,
    ]
    assert len(row.labels) == len(row.ids)
    assert all(label in (IGNORED, index) for label, index in zip(row.labels, row.ids, strict=True))
    batch = PROCESSOR.collate([row, Row(ids=[1, 2], labels=[1, 2])])
    assert batch.labels is not None
    assert batch.labels[0].tolist() == row.labels
    assert batch.labels[1].tolist() == [1, 2, *[IGNORED] * (len(row.ids) - 2)]
    assert batch.route.adapters == ("vision", None)


def test_the_newline_behind_an_answer_is_no_label() -> None:
    row = make(chat=FORMATS["phi3"]).row([*user("it?"), {"role": "assistant", "content": "blue"}], answer=False)
    newline = TOKENIZER.encode("\n")
    answer = [*TOKENIZER.encode("\nblue"), CONTROL("<|end|>")]
    assert row.ids[-len(answer) - 1 :] == [*answer, *newline]
    assert row.labels[-len(answer) - 1 :] == [*answer, IGNORED]


def test_a_picture_in_an_answer_is_no_label() -> None:
    said = [{"type": "text", "text": "blue"}, {"type": "image", "image": PICTURE}, {"type": "text", "text": "box"}]
    row = PROCESSOR.row([*user("it?"), {"role": "assistant", "content": said}], answer=False)
    (picture,) = row.media
    blue, box = TOKENIZER.encode("blue"), TOKENIZER.encode("box")
    assert picture.tokens > 1
    assert row.labels[picture.start - len(blue) :] == [*blue, *[IGNORED] * picture.tokens, *box, CONTROL("<|end|>")]
    assert len(row.labels) == len(row.ids)


def test_a_prompt_longer_than_the_window_is_refused_with_its_length() -> None:
    length = len(PROCESSOR.row(ROWS[3]).ids)
    media = sum(item.tokens for item in PROCESSOR.row(ROWS[3]).media)
    assert len(make(window=length).row(ROWS[3]).ids) == length
    told = (
        rf"the prompt is {length} tokens \({media} of them media\) and this model reads at most {length - 1}; "
        "shorten the text, or give fewer, smaller or shorter media"
    )
    with pytest.raises(PromptError, match=told):
        make(window=length - 1)([ROWS[0], ROWS[3]])


def test_many_pictures_beyond_the_window_are_refused_before_one_is_decoded() -> None:
    made = make(window=300)
    made.media["image"] = replace(
        made.media["image"], read=lambda *_: pytest.fail("a picture was decoded"), count=lambda *_: 100
    )
    content = [{"type": "image", "image": PICTURE} for _ in range(24)]
    with pytest.raises(PromptError, match=r"the prompt is \d+ tokens .* and this model reads at most 300"):
        made.row([{"role": "user", "content": content}])


def test_a_model_without_an_encoder_refuses_its_media() -> None:
    with pytest.raises(PromptError, match="no picture encoder; leave the image out or load a multimodal model"):
        make(image=None)([ROWS[1]])
    with pytest.raises(PromptError, match="no sound encoder; leave the audio out or load a multimodal model"):
        make(audio=None)([ROWS[2]])
    assert make(image=None, audio=None)([ROWS[0]]).route.adapters == (None,)


def test_limits_on_media_hold() -> None:
    with pytest.raises(MediaError, match="pixels"):
        make(image=replace(IMAGE, max_pixels=100))([ROWS[1]])
    with pytest.raises(MediaError, match="0.1"):
        make(audio=replace(AUDIO, max_seconds=0.1))([ROWS[2]])


def test_an_empty_list_of_conversations_is_refused() -> None:
    with pytest.raises(PromptError, match="no conversation was given"):
        PROCESSOR([])


def test_one_conversation_where_several_are_wanted_is_refused() -> None:
    with pytest.raises(PromptError, match="messages must be a non-empty list"):
        PROCESSOR(ROWS[0])


def test_sound_has_as_many_mel_channels_as_the_model_wants() -> None:
    (sound,) = make(audio=AudioConfig(mels=40))([user(audio=SOUND)]).media
    assert sound.features["mel"].shape[1] == 40


def test_calls_are_trained_with_their_tokens_and_need_a_vocabulary_that_has_them() -> None:
    call = {"function": {"name": "fox", "arguments": {}}}
    turns = [*user("seven"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = PROCESSOR.row(turns, answer=False)
    told = [CONTROL("<|tool_call|>"), *TOKENIZER.encode('[{"name": "fox", "arguments": {}}]')]
    assert row.ids[-len(told) - 2 :] == [*told, CONTROL("<|/tool_call|>"), CONTROL("<|end|>")]
    assert [label for label in row.labels if label != IGNORED] == row.ids[-len(told) - 2 :]
    older = make()
    older.tokenizer = TextTokenizer(TOKENIZER.definition.replace("tool_call|>", "dummy|>"))
    for work in (older.row, older.measure):
        with pytest.raises(
            PromptError, match=r"have tool_calls, and this model's vocabulary has no <\|tool_call\|>: it"
        ):
            work(turns)


def smelling(read: Any, count: Any = None) -> Processor:
    """A processor with a modality of someone else's."""
    processor = make()
    processor.media["smell"] = Medium(("<|tag|>", CONTROL("<|tag|>")), read, None, count)
    return processor


FEATURES = {"notes": torch.ones(3)}


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ((FEATURES, 0), "'smell' makes 0 tokens of what was given; features must return a whole number of at least 1"),
        ((FEATURES, -1), "makes -1 tokens"),
        ((FEATURES, 2.0), "makes 2.0 tokens"),
        ((FEATURES, True), "makes True tokens"),
        ((FEATURES, None), "makes None tokens"),
        (None, "the smell cannot be read: the features of that modality fail with TypeError: cannot unpack"),
        (({"notes": np.ones(3)}, 3), "'smell' has features of ndarray; give a dict of tensors"),
        ((None, 3), "'smell' has features of NoneType; give a dict"),
    ],
)
def test_a_modality_that_does_not_say_what_it_makes_is_named(found: Any, told: str) -> None:
    processor = smelling(lambda payload, settings: found)
    for work in (processor.row, processor.measure):
        with pytest.raises(MediaError, match=told):
            work(user("it?", smell="a"))


def test_a_count_is_a_whole_number_too() -> None:
    processor = smelling(lambda payload, settings: (FEATURES, 3), lambda payload, settings: payload)
    assert processor.measure(user(smell=np.int64(3))) == 6
    assert processor.row(user(smell="a")).ids[1:4] == [CONTROL("<|tag|>")] * 3
    with pytest.raises(MediaError, match="'smell' makes 0 tokens"):
        processor.measure(user(smell=0))


def test_code_of_a_modality_that_fails_is_named_and_kept() -> None:
    def fail(payload: Any, settings: Any) -> Any:
        raise MediaError("its own words") if payload == "known" else KeyError("notes")

    processor = smelling(fail, fail)
    for work in (processor.row, processor.measure):
        with pytest.raises(MediaError, match="the smell cannot be read: .* fail with KeyError: 'notes'; give") as error:
            work(user(smell="a"))
        assert isinstance(error.value.__cause__, KeyError)
        with pytest.raises(MediaError, match="^its own words$"):
            work(user(smell="known"))


def test_too_many_tokens_of_media_are_refused_before_they_are_listed() -> None:
    processor = smelling(lambda payload, settings: (FEATURES, 10**15))
    with pytest.raises(PromptError, match=f"the prompt is {10**15 + 8} tokens \\({10**15} of them media\\)"):
        processor.row(user("12345", smell="a"))


def test_a_borrowed_placeholder_in_a_raw_prompt_names_all_that_borrow_it() -> None:
    processor = smelling(read_image)
    processor.media["taste"] = processor.media["smell"]
    with pytest.raises(PromptError, match=r"tokens of smell or taste; write <\|smell_1\|> or <\|taste_1\|> and give"):
        processor.raw_row("<|user|><|tag|>", {})
