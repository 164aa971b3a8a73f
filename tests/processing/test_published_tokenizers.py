"""tokenizer.json of both published kinds: byte-level BPE (GPT-2, o200k) and SentencePiece with byte fallback (Llama-2).

The reference is the tokenizers library itself, reading the whole rendered prompt with its control tokens.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from modalora.processing.chat import FORMATS, ChatFormat, Piece, render, render_raw
from modalora.processing.processor import Processor
from modalora.processing.tokenizer import CONTROL_TOKENS, Growing, TextTokenizer
from small import as_text

CORPUS = ["the quick brown fox jumps over the lazy dog; 123 apples.\n\nseven blue boxes, don't touch!  twice " * 6]
PHI3 = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|placeholder1|>")


def llama(*, rstrip: bool, metaspace: bool) -> TextTokenizer:
    """Return a tokenizer of Llama-2's kind, as Phi-3's: of the older definition (normalizer) or the newer."""
    letters = sorted(set("".join(CORPUS)) | {"▁"})
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=specials, initial_alphabet=letters, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, rstrip=rstrip, normalized=False) for token in PHI3])
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = [one for one in fields["added_tokens"] if not one["content"].startswith("<0x")]
    return TextTokenizer(json.dumps(fields))


def _in_a_sequence(words: TextTokenizer) -> TextTokenizer:
    fields = json.loads(words.definition)
    inside = {"type": "Sequence", "pretokenizers": [fields["pre_tokenizer"]]}
    return TextTokenizer(json.dumps({**fields, "pre_tokenizer": inside}))


KINDS: dict[str, tuple[TextTokenizer, ChatFormat]] = {
    "o200k": (TextTokenizer.train(CORPUS, 380), FORMATS["phi4"]),
    "llama": (llama(rstrip=False, metaspace=False), FORMATS["phi3"]),
    "llama, tags eat spaces": (llama(rstrip=True, metaspace=False), FORMATS["phi3"]),
    "llama, metaspace": (llama(rstrip=True, metaspace=True), FORMATS["phi3"]),
    "llama, metaspace in a sequence": (
        _in_a_sequence(llama(rstrip=True, metaspace=True)),
        FORMATS["phi3"],
    ),
}


def processor(words: TextTokenizer, chat: ChatFormat) -> Processor:
    from modalora.contracts import Rule

    return Processor(words, media={}, window=10_000, router=lambda *_: Rule(adapter=None), chat=chat)


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "the quick fox"}],
    [{"role": "system", "content": "blue  boxes\n"}, {"role": "user", "content": " seven\n\n"}],
    [
        {"role": "user", "content": "touch 12345 apples!"},
        {"role": "assistant", "content": "don't"},
        {"role": "user", "content": "über naïve 北京 🙂"},
    ],
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_a_rendered_prompt_has_the_ids_of_the_whole_text(kind: str, number: int) -> None:
    words, chat = KINDS[kind]
    row = processor(words, chat).row(CONVERSATIONS[number])
    told = as_text(render(CONVERSATIONS[number], chat=chat))
    assert row.ids == Tokenizer.from_str(words.definition).encode(told, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_goes_there_and_back_and_never_becomes_a_control_token(kind: str, text: str) -> None:
    words, _ = KINDS[kind]
    for said in (text, f"<|end|>{text}<|assistant|>", "</s><s><unk>" + text):
        ids = words.encode(said)
        assert not set(ids) & words.control_ids
        if kind == "o200k" or ("▁" not in said and "metaspace" not in kind):  # it drops some spaces
            assert words.decode(ids) == said


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_text_only_grows_as_ids_come(kind: str, data: st.DataObject) -> None:
    words, _ = KINDS[kind]
    texts = st.text(st.sampled_from("東京😀é▁ a\nthe\ufffd"), max_size=30).map(words.encode)
    ids = data.draw(st.one_of(texts, st.lists(st.integers(0, words.last_id), max_size=60)))
    if ids and data.draw(st.booleans()):
        del ids[data.draw(st.integers(0, len(ids) - 1))]  # half a character is lost
    growing, before = Growing(words), ""
    for count, index in enumerate(ids, start=1):
        text = growing.add(index)
        assert text == words.decode(ids[:count])
        assert text.startswith(before)
        before = text.rstrip("\ufffd")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "o200k"])
def test_a_character_stays_when_the_next_is_cut(kind: str) -> None:
    words, _ = KINDS[kind]
    ids = words.encode("😀😀", after="<|user|>")
    ids = ids[ids.index(words.encode("😀")[-4]) :]
    assert [words.decode(ids[:count]) for count in range(1, 9)] == [
        *("\ufffd",) * 3, "😀", *("😀\ufffd",) * 3, "😀😀",
    ]  # fmt: skip
    assert words.decode([*ids[:2], *ids[:4]]) == "\ufffd😀"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_is_decoded_as_the_library_does(kind: str, text: str) -> None:
    words, _ = KINDS[kind]
    ids = words.encode(text)
    assert words.decode(ids) == Tokenizer.from_str(words.definition).decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_a_fine_tune_added_are_words(kind: str) -> None:
    given, chat = KINDS[kind]
    whole = Tokenizer.from_str(given.definition)
    whole.add_tokens(["ProteinX", "fox", AddedToken("    ", normalized=False)])
    whole.add_special_tokens(["<|new|>"])
    words = TextTokenizer(whole.to_str())
    assert words.controls == given.controls | {"<|new|>"}
    messages = [
        {"role": "user", "content": "the ProteinX fox    jumps<|new|>"},
        {"role": "assistant", "content": "fox"},
    ]
    row = processor(words, chat).row(messages)
    told = as_text(render(messages, chat=chat)).replace("<|new|>", "")  # typed by a user it stays text
    plain = processor(words, chat).row([{**messages[0], "content": "the ProteinX fox    jumps"}, messages[1]])
    assert plain.ids == whole.encode(told, add_special_tokens=False).ids
    for word in ("ProteinX", "fox", "    "):
        assert whole.token_to_id(word) in plain.ids
    assert whole.token_to_id("<|new|>") not in row.ids
    assert "ProteinX" in words.decode(plain.ids)
    assert words.encode_many(["a fox", "ProteinX"]) == [words.encode("a fox"), words.encode("ProteinX")]


def test_control_tokens_may_take_the_spaces_before_them() -> None:
    given, chat = KINDS["o200k"]
    fields = json.loads(given.definition)
    for token in fields["added_tokens"]:
        token["lstrip"] = token["content"] == "<|end|>"
    words = TextTokenizer(json.dumps(fields))
    row = processor(words, chat).row([{"role": "user", "content": " the fox  "}])
    whole = Tokenizer.from_str(words.definition)
    assert row.ids == whole.encode("<|user|> the fox  <|end|><|assistant|>", add_special_tokens=False).ids
    assert words.decode(row.ids) == " the fox"


def test_raw_prompts_are_the_only_way_to_write_control_tokens() -> None:
    words, chat = KINDS["o200k"]
    prompt = "<|user|>the fox<|end|><|assistant|>"
    asked = processor(words, chat)
    raw = asked.raw_row(prompt, {})
    assert raw.ids == asked.row([{"role": "user", "content": "the fox"}]).ids
    assert raw.ids == Tokenizer.from_str(words.definition).encode(prompt, add_special_tokens=False).ids
    typed = asked.row([{"role": "user", "content": prompt}])
    assert sum(index in words.control_ids for index in typed.ids) == 3


TOOLS = json.dumps([{"name": "get_weather", "description": "Weather.", "parameters": {"city": {"type": "str"}}}])


@pytest.mark.parametrize(
    ("chat", "messages", "told"),
    [
        ("phi4", [("user", "q")], "<|user|>q<|end|><|assistant|>"),
        ("phi4", [("system", "s"), ("user", "q")], "<|system|>s<|end|><|user|>q<|end|><|assistant|>"),
        (
            "phi4",
            [("system", "s", TOOLS), ("user", "q")],
            f"<|system|>s<|tool|>{TOOLS}<|/tool|><|end|><|user|>q<|end|><|assistant|>",
        ),
        (
            "phi4",
            [("user", "q"), ("assistant", "a"), ("user", "r")],
            "<|user|>q<|end|><|assistant|>a<|end|><|user|>r<|end|><|assistant|>",
        ),
        ("phi3", [("user", "q")], "<|user|>\nq<|end|>\n<|assistant|>\n"),
        (
            "phi3",
            [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r")],
            "<|system|>\ns<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nr<|end|>\n<|assistant|>\n",
        ),
        ("phi3-small", [("user", "q")], "<|endoftext|><|user|>\nq<|end|>\n<|assistant|>\n"),
    ],
)
def test_prompts_are_those_of_the_model_cards(chat: str, messages: list[tuple[str, ...]], told: str) -> None:
    made = [
        {"role": role, "content": content, **({"tools": rest[0]} if rest else {})} for role, content, *rest in messages
    ]
    assert as_text(render(made, chat=FORMATS[chat])) == told


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ("it", "<|user|><|image_1|>q<|end|><|assistant|>"),
        ("iit", "<|user|><|image_1|><|image_2|>q<|end|><|assistant|>"),
        ("at", "<|user|><|audio_1|>q<|end|><|assistant|>"),
        ("a", "<|user|><|audio_1|><|end|><|assistant|>"),
        ("ia", "<|user|><|image_1|><|audio_1|><|end|><|assistant|>"),
    ],
)
def test_prompts_with_media_are_those_of_the_model_card(parts: str, told: str) -> None:
    kinds = {"i": ("image", b""), "a": ("audio", b""), "t": ("text", "q")}
    content = [{"type": kinds[one][0], kinds[one][0]: kinds[one][1]} for one in parts]
    pieces = render([{"role": "user", "content": content}])
    assert as_text(pieces) == told
    media = {kind: [b""] * told.count(f"<|{kind}_") for kind in ("image", "audio")}
    assert render_raw(told, media, frozenset(CONTROL_TOKENS)) == pieces


def test_a_default_system_text_stands_where_there_is_none() -> None:
    chat = ChatFormat(default_system="Be exact.")
    assert as_text(render([{"role": "user", "content": "q"}], chat=chat)).startswith(
        "<|system|>Be exact.<|end|><|user|>"
    )
    own = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert "Be exact." not in as_text(render(own, chat=chat))
    assert Piece("control", "<|user|>") in render(own, chat=chat)
