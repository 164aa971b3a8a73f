"""The registry row: a third modality, made here, goes through every room; packages that bring one are found."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modalora
from modalora import modality
from modalora.assistant import Assistant, make_processor
from modalora.checkpoint.adapters import CONFIG, WEIGHTS, save_adapter
from modalora.checkpoint.preserve import preservation
from modalora.checkpoint.sums import compose, merge
from modalora.checkpoint.write import convert, save_model
from modalora.config import SourceConfig
from modalora.contracts import Rule
from modalora.data.mixture import Mixture
from modalora.data.reader import make_source
from modalora.data.sources import Context
from modalora.disk import read_json, write_json
from modalora.errors import CheckpointError, ConfigError, InputError, ModaloraError, PromptError, RouteError, ShapeError
from modalora.modality import Modality
from modalora.models.multimodal import ModelConfig, Multimodal, part_of
from modalora.models.router import ROUTES
from modalora.models.sizes import tiny
from modalora.nn.lora import LoraConfig
from modalora.processing.questions import question_messages
from modalora.processing.spans import spans
from modalora.processing.tokenizer import TextTokenizer
from modalora.training.fresh import whiten_projectors
from small import shaken

WORDS = "seven blue boxes touch the wall, and the quick brown fox jumps over the lazy dog; how many are there? " * 4
TOKENIZER = TextTokenizer.train([WORDS], 320)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8))
SOUND = (np.random.default_rng(1).standard_normal(6000).astype(np.float32) / 8, 8000)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    branches: ClassVar[tuple[str, ...]] = ("plain", "loud")
    hidden_size: int = 16

    def encoder(self) -> nn.Module:
        return Smells(self)

    def smallest(self) -> tuple[dict[str, Tensor], int]:
        return sniff("a", self)


class Smells(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.table = nn.Embedding(5, sizes.hidden_size)

    def forward(self, items: Any) -> list[Tensor]:
        return [self.table(item["notes"]) for item in items]


def sniff(payload: str, sizes: Sizes) -> tuple[dict[str, Tensor], int]:
    return {"notes": torch.tensor([ord(letter) % 5 for letter in payload])}, len(payload)


def whiffs(context: Context, notes: int = 3) -> Any:
    def draw(rng: np.random.Generator) -> Any:
        payload = "".join(rng.choice(list("abcde"), size=notes))
        asked = {"role": "user", "content": [{"type": "smell", "smell": payload}]}
        return context.processor.row([asked, {"role": "assistant", "content": "fox"}], answer=False)

    return draw


ALONE, BOTH = frozenset({"smell"}), frozenset({"smell", "image"})
SMELL = Modality(
    name="smell",
    config=Sizes,
    features=sniff,
    adapter=LoraConfig(r=4, lora_alpha=8),
    routes={
        ALONE: Rule(adapter="nose", branches={"smell": "plain"}),
        BOTH: Rule(adapter="nose", branches={"smell": "loud", "image": "vision"}),
    },
    sources={"whiffs": whiffs},
)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts with the smell registered and leaves no trace."""
    monkeypatch.setattr(modality, "_given", {"smell": SMELL})
    return


def base() -> Assistant:
    return Assistant(shaken(), make_processor(tiny(), TOKENIZER))


def smelling() -> Assistant:
    assistant = base()
    assistant.add_modality("smell")
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in assistant.model.named_parameters():
            if part_of(name).startswith(("smell.", "adapter.nose")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return assistant


ASKED = question_messages("What is it?", media={"smell": "abba"})


def test_pictures_and_sound_are_rows_of_the_same_kind() -> None:
    assert set(modality.SHIPPED) == {"image", "audio"}
    config = tiny()
    assert {name: type(sizes) for name, sizes in config.modalities.items()} == {
        name: row.config for name, row in modality.SHIPPED.items()
    }
    assert modality.routes(config) == ROUTES
    media = modality.media(config, TOKENIZER)
    assert {name: medium.placeholder[0] for name, medium in media.items()} == {
        "image": "<|endoftext10|>",
        "audio": "<|endoftext11|>",
    }


def test_pictures_and_sound_are_prepared_in_the_sizes_of_their_networks() -> None:
    config = tiny()
    assert config.vision is not None
    assert config.speech is not None
    config = replace(config, vision=replace(config.vision, max_crops=5), speech=replace(config.speech, mels=40))
    image, audio = (modality.media(config, TOKENIZER)[name].settings for name in ("image", "audio"))
    assert (image.crop, image.patch, image.max_crops) == (56, 14, 5)
    assert audio.mels == 40


def test_adding_a_modality_leaves_every_other_row_as_it_was_to_the_bit() -> None:
    plain, added = base(), smelling()
    for messages in (
        question_messages("How many boxes?"),
        question_messages("Which?", PICTURE),
        question_messages("?", audio=SOUND),
        question_messages("Is it?", PICTURE, SOUND),
    ):
        assert torch.equal(plain.logits(messages), added.logits(messages))


def test_what_it_smells_reaches_the_answer() -> None:
    assistant = smelling()
    other = question_messages("What is it?", media={"smell": "abbb"})
    assert (assistant.logits(ASKED) - assistant.logits(other)).abs().max() > 0.01
    assert (
        assistant.ask("What is it?", media={"smell": "abba"}, max_tokens=3).usage["prompt_tokens"]
        == 4 + len(TOKENIZER.encode("What is it?")) + 3
    )


def test_its_spans_are_filled_with_a_control_token_that_text_cannot_write() -> None:
    assistant = smelling()
    batch = assistant.processor([ASKED])
    spare = TOKENIZER.control(modality.SPARE)
    assert batch.input_ids[0, 1:5].tolist() == [spare] * 4
    assert [(item.modality, item.start, item.tokens, item.branch) for item in batch.media] == [("smell", 1, 4, "plain")]
    typed = assistant.processor([question_messages(f"{modality.SPARE}<|smell_1|>")])
    assert spare not in typed.input_ids
    assert not typed.media


def test_the_embedding_of_its_placeholder_is_never_read() -> None:
    assistant = smelling()
    before = assistant.logits(ASKED)[:, :300]
    with torch.no_grad():
        assistant.model.decoder.embed_tokens.weight[TOKENIZER.control(modality.SPARE)] = torch.nan
    assert torch.equal(assistant.logits(ASKED)[:, :300], before)


def test_a_tokenizer_without_the_token_lends_an_id_behind_its_last() -> None:
    config = replace(tiny(), decoder=replace(tiny().decoder, vocab_size=330), encoders={"smell": Sizes()})
    row = replace(SMELL, placeholder="<|absent|>")
    modality.register(row)
    assert modality.media(config, TOKENIZER)["smell"].placeholder == ("<|smell|>", 322)
    config = replace(config, decoder=tiny().decoder)
    with pytest.raises(ConfigError, match=r"no control token '<\|absent\|>', and no id of the model's 320 is free"):
        modality.media(config, TOKENIZER)


def test_a_mixed_batch_gives_each_row_its_own_route_and_its_own_numbers() -> None:
    assistant = smelling()
    rows = [
        question_messages("How many boxes?"),
        ASKED,
        question_messages("Which?", PICTURE),
        question_messages("?", audio=SOUND),
        question_messages("Which?", PICTURE, media={"smell": ["ab", "cde"]}),
    ]
    batch = assistant.processor(rows)
    assert batch.route.adapters == (None, "nose", "vision", "speech", "nose")
    assert [item.branch for item in batch.media if item.row == 4] == ["vision", "loud", "loud"]
    together = assistant.model(batch)
    for number, messages in enumerate(rows):
        alone = assistant.logits(messages)
        # float32, two layers: other rows change the order of sums alone (worst seen 4e-6)
        torch.testing.assert_close(together[number, : len(alone)], alone, atol=1e-4, rtol=0)


def test_a_row_without_a_smell_survives_nan_in_all_its_parts() -> None:
    assistant = smelling()
    rows = [question_messages("How many boxes?"), question_messages("Which?", PICTURE)]
    before = assistant.model(assistant.processor(rows))
    with torch.no_grad():
        for name, parameter in assistant.model.named_parameters():
            if part_of(name).startswith(("smell.", "adapter.nose")):
                parameter.fill_(torch.nan)
    assert torch.equal(assistant.model(assistant.processor(rows)), before)
    assert assistant.model(assistant.processor([*rows, ASKED]))[2].isnan().any()


def test_its_route_is_explained_and_the_released_code_has_none() -> None:
    assistant = smelling()
    batch = assistant.processor([ASKED])
    record = assistant.explain(batch)[0]
    assert (record["modalities"], record["adapter"], record["scale"]) == (["smell"], "nose", 2.0)
    assert record["projectors"] == {"smell": "plain"}
    assert [span["kind"] for span in record["spans"]] == ["control", "smell", "text", "control", "control"]
    assert assistant.explain_official(batch) == [None]
    with pytest.raises(RouteError, match="no route for audio \\+ smell; there are routes for text, image"):
        assistant.processor([question_messages("?", audio=SOUND, media={"smell": "a"})])


def test_raw_prompts_and_tags_in_text_place_it() -> None:
    assistant = smelling()
    asked = question_messages("Is <|smell_1|> like <|smell_2|>?", media={"smell": ["ab", "c"]})
    assert [part.get("smell") for part in asked[0]["content"]] == [None, "ab", None, "c", None]
    raw = assistant.raw_batch("<|user|>Is <|smell_1|> like <|smell_2|>?<|end|>", media={"smell": ["ab", "c"]})
    assert [(item.start, item.tokens) for item in raw.media] == [
        (item.start, item.tokens) for item in assistant.processor([asked]).media
    ]
    with pytest.raises(PromptError, match="2 smell placeholder"):
        question_messages("Is <|smell_1|> like <|smell_2|>?", media={"smell": "ab"})


def test_a_list_of_numbers_is_one_payload_and_media_have_names() -> None:
    (message,) = question_messages("?", media={"smell": [0.5, 1.0]})
    assert message["content"][0] == {"type": "smell", "smell": [0.5, 1.0]}
    with pytest.raises(PromptError, match=r"media='series.txt' must be \{modality: payload\}"):
        question_messages("?", media="series.txt")  # type: ignore[arg-type]


def test_a_model_without_it_names_what_it_reads() -> None:
    with pytest.raises(PromptError, match="part 1 has type 'smell'; use one of text, image, audio"):
        base().logits(ASKED)


def test_a_model_folder_brings_it_back_to_the_bit(tmp_path: Path) -> None:
    assistant = smelling()
    assistant.save(tmp_path / "model")
    told = read_json(tmp_path / "model" / "config.json")
    assert told["encoders"] == {"smell": {"package": "modalora", "sizes": {"hidden_size": 16}}}
    back = modalora.load(tmp_path / "model")
    assert back.model.config == assistant.model.config
    assert torch.equal(back.logits(ASKED), assistant.logits(ASKED))


def test_a_model_folder_without_its_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modality.register(replace(SMELL, package="smell-o-vision"))
    smelling().save(tmp_path / "model")
    monkeypatch.setattr(modality, "_given", {})
    with pytest.raises(ConfigError, match="needs the modality 'smell' of 'smell-o-vision'.*pip install smell-o-vision"):
        modalora.load(tmp_path / "model")


def test_a_published_layout_has_no_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="encoders.smell"):
        smelling().save(tmp_path / "model", layout="phi4mm")
    assert not (tmp_path / "model").exists()


def test_an_encoder_that_computes_a_number_in_secret_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def secretive(self: Smells, sizes: Sizes) -> None:
        nn.Module.__init__(self)
        self.table = nn.Embedding(5, sizes.hidden_size)
        self.register_buffer("angles", torch.arange(3.0), persistent=False)

    monkeypatch.setattr(Smells, "__init__", secretive)
    smelling().save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="encoders.smell.angles is stored in no file"):
        modalora.load(tmp_path / "model")


class Counting(Smells):
    """A smell's encoder with tables that are no floats, and dropout."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3)
        self.register_buffer("order", torch.arange(5000).flip(0))  # more of them than of floats
        self.register_buffer("pairs", torch.tensor([[1, 2], [3, 4]], dtype=torch.int8))
        self.register_buffer("heard", torch.tensor([True, False]))

    def forward(self, items: Any) -> list[Tensor]:
        return [self.drop(tokens) + self.order[0] for tokens in super().forward(items)]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Assistant:
    monkeypatch.setattr(Sizes, "encoder", lambda sizes: Counting(sizes))
    return smelling()


def test_what_an_adapter_folder_or_a_new_modality_brings_reads_as_the_model_does(
    tmp_path: Path, counting: Assistant
) -> None:
    assert not any(module.training for module in counting.model.modules())
    save_adapter(counting.model, "nose", tmp_path / "nose")
    other = base()
    other.load_adapter(tmp_path / "nose", "nose")
    assert not any(module.training for module in other.model.modules())
    assert torch.equal(other.logits(ASKED), counting.logits(ASKED))
    assert not other.model.add_branch("image", "more").training
    assert other.model.train().add_branch("image", "most").training


def test_tables_that_are_no_floats_come_back_as_they_were(tmp_path: Path, counting: Assistant) -> None:
    state = {name: own for name, own in counting.model.state_dict().items() if name.startswith("encoders.smell.")}
    assert {own.dtype for own in state.values()} == {torch.float32, torch.int64, torch.int8, torch.bool}

    def check(back: Assistant, floats: torch.dtype = torch.float32) -> None:
        found = back.model.state_dict()
        for name, own in state.items():
            kind = floats if own.is_floating_point() else own.dtype
            assert found[name].dtype == kind
            assert torch.equal(found[name], own.to(kind))

    counting.save(tmp_path / "model")
    check(modalora.load(tmp_path / "model"))
    check(modalora.load(tmp_path / "model", dtype="bfloat16"), torch.bfloat16)
    convert(tmp_path / "model", tmp_path / "again", "modalora")
    check(modalora.load(tmp_path / "again"))
    counting.model.to(torch.bfloat16)
    counting.save(tmp_path / "half")
    check(modalora.load(tmp_path / "half"), torch.bfloat16)
    counting.model.to(torch.float32)
    save_model(counting.model, TOKENIZER, tmp_path / "small", int8=True)
    assert torch.equal(modalora.load(tmp_path / "small").model.encoders["smell"].pairs, state["encoders.smell.pairs"])
    save_adapter(counting.model, "nose", tmp_path / "nose")
    state = {name: own.bfloat16() if own.is_floating_point() else own for name, own in state.items()}
    other = base()
    other.load_adapter(tmp_path / "nose", "nose")
    check(other)


def test_a_table_of_another_dtype_than_the_network_has_is_named(
    tmp_path: Path, counting: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting.save(tmp_path / "model")
    save_adapter(counting.model, "nose", tmp_path / "nose")
    monkeypatch.setattr(torch, "arange", partial(torch.arange, dtype=torch.int32))
    with pytest.raises(CheckpointError, match=r"smell.order has dtype I64, the network has torch.int32 there"):
        modalora.load(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"smell.order has dtype I64, and this model has torch.int32 there; fl"):
        base().load_adapter(tmp_path / "nose", "nose")


def turning(sizes: Sizes) -> nn.Module:
    encoder = Smells(sizes)
    encoder.register_buffer("turns", torch.ones(2, dtype=torch.complex64))
    return encoder


def test_an_encoder_with_a_file_of_its_own_is_written_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "modality.md").read_text()
    (snippet,) = re.findall(r"```python\n(class Encoder.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"nn": nn, "torch": torch, "Path": Path, "__file__": str(tmp_path / "motion.py")}
    exec(snippet, {**names, "Sizes": Sizes}, names)
    weights = {"0.weight": torch.rand(16, 4), "0.bias": torch.rand(16)}
    torch.save(weights, tmp_path / "net.pt")
    monkeypatch.setattr(Sizes, "patch", 4, raising=False)
    monkeypatch.setattr(Sizes, "encoder", lambda sizes: names["Encoder"](sizes))

    def check(assistant: Assistant) -> None:
        for name, tensor in assistant.model.encoders["smell"].net.state_dict().items():
            assert torch.equal(tensor, weights[name])

    assistant = base()
    assistant.add_modality("smell")
    check(assistant)
    assistant.save(tmp_path / "model")
    save_adapter(assistant.model, "nose", tmp_path / "nose")
    other = base()
    torch.save({name: -tensor for name, tensor in weights.items()}, tmp_path / "net.pt")
    other.load_adapter(tmp_path / "nose", "nose")
    check(other)
    (tmp_path / "net.pt").unlink()
    check(modalora.load(tmp_path / "model"))


@pytest.mark.parametrize("wrong", [lambda sizes: 1 / 0, lambda sizes: "encoder", turning])
def test_an_encoder_that_cannot_be_made_is_told_by_its_modality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    smelling().save(tmp_path / "model")
    save_adapter(smelling().model, "nose", tmp_path / "nose")
    monkeypatch.setattr(Sizes, "encoder", wrong)
    told = (
        r"the modality 'smell'(: encoder\(\) returns a str|: its encoder has complex numbers in turns, which no model| "
        "makes no encoder of .* fails with ZeroDivisionError: div)"
    )
    for make in (
        lambda: base().add_modality("smell"),
        lambda: base().load_adapter(tmp_path / "nose", "nose"),
        lambda: modalora.load(tmp_path / "model"),
    ):
        with pytest.raises(ConfigError, match=told) as error:
            make()
        assert isinstance(error.value.__cause__, ZeroDivisionError | None)


# ------------------------------------------------------------------------------------------------------ adapter folders


def test_an_adapter_folder_brings_encoder_projectors_and_matrices_to_the_frozen_base(tmp_path: Path) -> None:
    assistant = smelling()
    save_adapter(assistant.model, "nose", tmp_path / "nose")
    assert read_json(tmp_path / "nose" / CONFIG)["modules_to_save"] == ["encoders.smell", "projectors.smell"]
    other = base()
    text = other.logits("How many boxes?")
    verdict = other.load_adapter(tmp_path / "nose", "nose")
    assert verdict.modules == ("smell",)
    assert torch.equal(other.logits(ASKED), assistant.logits(ASKED))
    assert torch.equal(other.logits("How many boxes?"), text)


def test_under_another_name_its_rows_find_it_too(tmp_path: Path) -> None:
    assistant = smelling()
    save_adapter(assistant.model, "nose", tmp_path / "nose")
    other = base()
    other.load_adapter(tmp_path / "nose", "mine")
    batch = other.processor([ASKED])
    assert batch.route.adapters == ("mine",)
    assert torch.equal(other.logits(ASKED), assistant.logits(ASKED))
    other.save(tmp_path / "model")
    assert torch.equal(modalora.load(tmp_path / "model").logits(ASKED), assistant.logits(ASKED))
    save_adapter(other.model, "mine", tmp_path / "again")  # its modality goes with it under any name
    assert read_json(tmp_path / "again" / CONFIG)["modules_to_save"] == ["encoders.smell", "projectors.smell"]


def test_added_with_an_adapter_of_another_name_its_rows_take_that() -> None:
    model = shaken()
    modality.add(model, "smell", adapter="mine")
    assert tuple(model.config.adapters) == ("vision", "speech", "mine")
    batch = make_processor(model.config, TOKENIZER)([ASKED, question_messages("Which?", PICTURE)])
    assert batch.route.adapters == ("mine", "vision")


def test_merged_under_another_name_it_is_saved_and_read_again(tmp_path: Path) -> None:
    save_adapter(smelling().model, "nose", tmp_path / "nose")
    assistant = base()
    assistant.load_adapter(tmp_path / "nose", "mine")
    merge(assistant.model, "mine")
    assistant.save(tmp_path / "model")
    again = modalora.load(tmp_path / "model")
    assert (dict(again.model.config.adapters), dict(again.model.config.aliases)) == ({}, {})
    assert torch.equal(again.logits("How many boxes?"), assistant.logits("How many boxes?"))


def test_half_a_modality_is_refused_and_the_model_stays(tmp_path: Path) -> None:
    save_adapter(smelling().model, "nose", tmp_path / "nose")
    tensors = load_file(tmp_path / "nose" / WEIGHTS)
    metadata = {"format": "pt"}
    save_file(
        {key: tensor for key, tensor in tensors.items() if "loud.up.bias" not in key},
        tmp_path / "nose" / WEIGHTS,
        metadata,
    )
    other = base()
    before = list(other.model.state_dict())
    with pytest.raises(CheckpointError, match="1 tensors of its modality are missing, such as projectors.smell.loud"):
        other.load_adapter(tmp_path / "nose", "nose")
    assert list(other.model.state_dict()) == before
    assert other.model.config == tiny()


def test_what_a_folder_brings_frozen_is_compared_with_the_folder_itself(tmp_path: Path, run: Any) -> None:
    base().save(tmp_path / "model")
    assistant = smelling()
    names = dict(assistant.model.named_parameters())
    trained = {name for name in names if part_of(name) in ("adapter.nose", "smell.projector.plain")}
    save_adapter(assistant.model, "nose", tmp_path / "nose", preservation(assistant.model, trained))
    code, out, err = run("adapter", "verify", str(tmp_path / "model"), str(tmp_path / "nose"))
    frozen = len(assistant.model.state_dict()) - len(trained)
    assert (code, f"preserved  {frozen} frozen tensors and the logits of 4 texts are as certified" in out) == (
        0,
        True,
    ), err
    tensors = load_file(tmp_path / "nose" / WEIGHTS)
    for part in ("encoders.smell.table.weight", "projectors.smell.loud.up.bias"):
        changed = {**tensors, f"base_model.model.{part}": tensors[f"base_model.model.{part}"] + 1}
        save_file(changed, tmp_path / "nose" / WEIGHTS, {"format": "pt"})
        code, _, err = run("adapter", "verify", str(tmp_path / "model"), str(tmp_path / "nose"))
        assert (code, f"{part} is not what it was" in err) == (2, True)


def test_a_base_that_has_the_modality_is_compared_as_it_is(tmp_path: Path, run: Any) -> None:
    assistant = smelling()
    trained = {name for name, _ in assistant.model.named_parameters() if part_of(name) == "adapter.nose"}
    save_adapter(assistant.model, "nose", tmp_path / "nose", preservation(assistant.model, trained))
    with torch.no_grad():
        assistant.model.get_parameter("encoders.smell.table.weight").add_(1)
    assistant.save(tmp_path / "model")
    code, _, err = run("adapter", "verify", str(tmp_path / "model"), str(tmp_path / "nose"))
    assert (code, "encoders.smell.table.weight is not what it was" in err) == (2, True)


def with_module(tmp_path: Path, tensors: dict[str, Tensor], modules: list[str]) -> Path:
    """Return a PEFT folder of the speech adapter that saves whole modules besides."""
    folder = tmp_path / "whole"
    save_adapter(base().model, "speech", folder)
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), "modules_to_save": modules})
    return folder


UP = "base_model.model.model.embed_tokens_extend.image_embed.img_projection_up.weight"


def test_a_saved_projector_stands_beside_the_old_one_for_the_rows_of_its_adapter(tmp_path: Path) -> None:
    assistant = base()
    old = assistant.model.projectors.get_submodule("image.vision").up.weight.detach().clone()
    folder = with_module(tmp_path, {UP: -old}, ["img_projection_up"])
    asked = question_messages("Which?", PICTURE)
    before = assistant.logits(asked)
    verdict = assistant.load_adapter(folder, "mine")
    assert verdict.modules == ("image.projector.vision",)
    assert torch.equal(assistant.logits(asked), before)
    routed = assistant.processor([asked], route="mine")
    assert [item.branch for item in routed.media] == ["vision-mine"]
    ours = assistant.logits(asked, route="mine")

    # the same by hand: the module replaced for good, as PEFT does for its one active adapter
    other = base()
    save_adapter(other.model, "speech", tmp_path / "plain")
    other.load_adapter(tmp_path / "plain", "mine")
    with torch.no_grad():
        other.model.projectors.get_submodule("image.vision").up.weight.copy_(-old)
    assert torch.equal(ours, other.logits(asked, route="mine"))

    save_adapter(assistant.model, "mine", tmp_path / "again")
    told = read_json(tmp_path / "again" / CONFIG)["modules_to_save"]
    assert told == ["img_projection_up", "img_projection_down"]
    assert torch.equal(load_file(tmp_path / "again" / WEIGHTS)[UP], -old)
    assistant.save(tmp_path / "model")
    assert torch.equal(modalora.load(tmp_path / "model").logits(asked, route="mine"), ours)


@pytest.mark.parametrize("wrong", [float("nan"), 1e300, 1])
def test_a_projector_that_cannot_be_used_leaves_the_model_as_it_was(tmp_path: Path, wrong: float) -> None:
    assistant = base()
    old = assistant.model.projectors.get_submodule("image.vision").up.weight.detach()
    dtype = torch.int64 if wrong == 1 else torch.float64
    folder = with_module(tmp_path, {UP: torch.full(old.shape, wrong, dtype=dtype)}, ["img_projection_up"])
    adapters, branches, config = assistant.model.adapters, assistant.model.branches, assistant.model.config
    with pytest.raises(
        CheckpointError, match="not finite|cannot tell from infinity|has dtype I64, and this model has torch.float32"
    ):
        assistant.load_adapter(folder, "mine")
    assert (assistant.model.adapters, assistant.model.branches, assistant.model.config) == (adapters, branches, config)
    assert not any("mine" in linear.adapters for linear in assistant.model.decoder.routed().values())


def test_a_projector_of_its_own_is_lost_in_no_sum_and_no_merge(tmp_path: Path) -> None:
    assistant = base()
    old = assistant.model.projectors.get_submodule("image.vision").up.weight.detach()
    assistant.load_adapter(with_module(tmp_path, {UP: -old}, ["img_projection_up"]), "mine")
    for refused in (lambda: compose(assistant.model, "mine+vision", "both"), lambda: merge(assistant.model, "mine")):
        with pytest.raises(CheckpointError, match="'mine' brings a projector of its own for image"):
            refused()


def test_a_projector_is_its_adapters_alone_whatever_the_names_end_in(tmp_path: Path) -> None:
    assistant = base()
    old = assistant.model.projectors.get_submodule("image.vision").up.weight.detach()
    assistant.load_adapter(with_module(tmp_path, {UP: -old}, ["img_projection_up"]), "a-mine")
    save_adapter(assistant.model, "vision", tmp_path / "plain")
    assistant.load_adapter(tmp_path / "plain", "mine")
    assert compose(assistant.model, "mine+vision@0.5", "both").r > 0


def test_another_adapters_projector_does_not_go_with_the_modality(tmp_path: Path) -> None:
    assistant = smelling()
    save_adapter(assistant.model, "nose", tmp_path / "nose")
    tensors = load_file(tmp_path / "nose" / WEIGHTS)
    key = "base_model.model.projectors.smell.plain.up.weight"
    save_file({**tensors, key: -tensors[key]}, tmp_path / "nose" / WEIGHTS, {"format": "pt"})
    assistant.load_adapter(tmp_path / "nose", "second")  # the encoder's bits are the same
    assert (assistant.logits(ASKED, route="second") - assistant.logits(ASKED)).abs().max() > 0.01
    save_adapter(assistant.model, "nose", tmp_path / "first")
    assert set(load_file(tmp_path / "first" / WEIGHTS)) == set(tensors)
    save_adapter(assistant.model, "second", tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / WEIGHTS)[key], -tensors[key])


@pytest.mark.parametrize(
    ("key", "change", "told"),
    [
        ("base_model.model.model.embed_tokens.weight", 0.0, None),
        ("base_model.model.lm_head.weight", 0.0, None),
        ("base_model.model.lm_head.weight", 1.0, "embed_tokens.weight is the decoder's, it serves rows of every route"),
        ("base_model.model.model.norm.weight", 1.0, "norm.weight is the decoder's, it serves rows of every route"),
        ("base_model.model.encoders.image.line_end", 1.0, "the encoder of 'image' serves rows of every route"),
        ("base_model.model.score.weight", 0.0, "belong to no Linear of this decoder, such as 'base_model.model.score"),
    ],
)
def test_a_module_that_cannot_be_routed_is_taken_only_where_it_changes_nothing(
    tmp_path: Path, key: str, change: float, told: str | None
) -> None:
    model = base().model
    held = {
        "embed_tokens": model.decoder.embed_tokens.weight,
        "lm_head": model.decoder.embed_tokens.weight,
        "norm": model.decoder.norm.weight,
        "line_end": model.state_dict()["encoders.image.line_end"],
        "score": torch.zeros(2, 64),
    }
    name = next(name for name in held if name in key)
    folder = with_module(tmp_path, {key: (held[name] + change).detach().clone()}, [name])
    assistant = base()
    if told is None:
        assert assistant.load_adapter(folder, "mine").modules == ()
        return
    with pytest.raises(CheckpointError, match=told):
        assistant.load_adapter(folder, "mine")
    assert assistant.model.config == tiny()


def test_a_second_encoder_for_a_modality_is_refused_with_the_reason(tmp_path: Path) -> None:
    assistant = smelling()
    save_adapter(assistant.model, "nose", tmp_path / "nose")
    with torch.no_grad():
        assistant.model.get_submodule("encoders.smell.table").weight.add_(1)
    with pytest.raises(CheckpointError, match="the encoder of 'smell' serves rows of every route"):
        assistant.load_adapter(tmp_path / "nose", "second")


# ------------------------------------------------------------------------------------------------------------- finding

GOOD = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from modalora.modality import Modality
from modalora.nn.lora import LoraConfig

@dataclass(frozen=True, kw_only=True)
class Sizes:
    branches: ClassVar[tuple[str, ...]] = ("taste",)
    hidden_size: int = 4
    def encoder(self):
        return Tongue()
    def smallest(self):
        return features([0.0], self)

class Tongue(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
    def forward(self, items):
        return [item["drops"][:, None] * self.weight for item in items]

def features(drops, sizes):
    return {"drops": torch.tensor(drops)}, len(drops)

MODALITY = Modality(name="taste", config=Sizes, features=features, adapter=LoraConfig(r=2, lora_alpha=2))
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, module: str, text: str) -> None:
    """Put a package where Python finds it, with the metadata that an installer writes."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[modalora.modalities]\ntaste = {module}:MODALITY\n")
    (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))


def test_an_installed_package_is_found_by_its_entry_point_and_imported_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"from pathlib import Path\nPath({str(tmp_path / 'imported')!r}).touch()\n" + GOOD
    install(tmp_path / "site", monkeypatch, "sweet-tooth", "sweet_tooth", text)
    assert "taste" in modality.known()
    assistant = base()
    assert assistant.logits("How many boxes?").isfinite().all()
    assert not (tmp_path / "imported").exists()
    assistant.add_modality("taste")
    assert (tmp_path / "imported").exists()
    assert modality.find("taste").package == "sweet-tooth"
    assert assistant.processor([question_messages("?", media={"taste": [[0.5, 1.0]]})]).route.adapters == ("taste",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import a_library_that_is_absent\n", "MODALITY fails with ModuleNotFoundError: No module named"),
        ("1 / 0\n", "fails with ZeroDivisionError: division by zero; mend the package, or pip uninstall broken"),
        ("MODALITY = 'taste'\n", "promises the modality 'taste' .* and 'taste' stands there"),
        (GOOD.replace('name="taste"', 'name="flavour"'), "it must be a Modality of that name"),
        (GOOD.replace("hidden_size: int = 4", ""), "must be a dataclass of sizes .* it has no hidden_size"),
    ],
)
def test_a_broken_package_gives_one_message_and_breaks_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str
) -> None:
    module = f"broken_{tmp_path.name}"  # Python remembers what it imported
    install(tmp_path, monkeypatch, "broken", module, text)
    assert base().logits("How many boxes?").isfinite().all()
    with pytest.raises(ModaloraError, match=told):
        modality.find("taste")


def test_two_packages_for_one_modality_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "a", monkeypatch, "sweet-tooth", "sweet_a", GOOD)
    install(tmp_path / "b", monkeypatch, "sour-tooth", "sweet_b", GOOD)
    with pytest.raises(ConfigError, match="'taste' is brought by sour-tooth and sweet-tooth; uninstall one"):
        modality.find("taste")


def test_a_file_that_is_named_is_run_and_remembered_in_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taste.py").write_text(GOOD)
    row = modality.load_file(tmp_path / "taste.py")
    assert (row.name, row.package) == ("taste", "the file taste.py")
    assistant = base()
    assistant.add_modality("taste", hidden_size=4)
    assistant.save(tmp_path / "model")
    monkeypatch.setattr(modality, "_given", {})
    with pytest.raises(
        ConfigError,
        match="the modality 'taste' of 'the file taste.py'.*name taste.py with modality_files=.*--modality-file",
    ):
        modalora.load(tmp_path / "model")
    back = modalora.load(tmp_path / "model", modalities=[tmp_path / "taste.py"])
    asked = question_messages("?", media={"taste": [[0.5, 1.0]]})
    assert torch.equal(back.logits(asked), assistant.logits(asked))
    for text, told in (
        ("1 / 0", "fails with ZeroDivisionError"),
        ("exit()", "fails with SystemExit"),
        ("x = 1", "must set MODALITY"),
    ):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(ConfigError, match=told):
            modality.load_file(tmp_path / "bad.py")
    with pytest.raises(ConfigError, match="does not exist"):
        modality.load_file(tmp_path / "absent.py")


@pytest.mark.parametrize("name", ["Smell", "time series", "text", "input_audio", "keys", "train", "1d", ""])
def test_a_name_that_cannot_be_a_modality_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a modality"):
        replace(SMELL, name=name)


def test_a_shipped_modality_is_not_replaced_and_one_is_not_added_twice() -> None:
    with pytest.raises(ConfigError, match="'image' is shipped with modalora"):
        modality.register(replace(SMELL, name="image", routes={}))
    with pytest.raises(ConfigError, match="has the modality 'smell' already"):
        smelling().add_modality("smell")
    with pytest.raises(ConfigError, match="unknown key 'hiden_size'; did you mean 'hidden_size'"):
        base().add_modality("smell", hiden_size=3)


@pytest.mark.parametrize("name", ["image", "audio"])
def test_a_shipped_modality_is_not_added_and_the_model_stays(name: str) -> None:
    model = Multimodal(replace(tiny(), vision=None, speech=None, adapters={}))
    before = model.config, list(model.state_dict())
    with pytest.raises(ConfigError, match=f"'{name}' is shipped with modalora and cannot be added to a model that"):
        modality.add(model, name)
    assert (model.config, list(model.state_dict())) == before
    with pytest.raises(ConfigError, match=f"has the modality '{name}' already"):
        modality.add(Multimodal(tiny()), name)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"routes": {frozenset({"image", "smell"}): Rule(adapter="nose", branches={"smell": "plain"})}},
            "must have a rule",
        ),
        (
            {"routes": {frozenset({"smell"}): Rule(adapter="nose", branches={"smell": "absent"})}},
            "one of its projectors",
        ),
        ({"routes": {frozenset({"smell"}): Rule(adapter="nose")}}, "one of its projectors .plain, loud."),
        (
            {"config": TextTokenizer},
            "must be a dataclass of sizes .* it has no encoder, smallest, branches, hidden_size",
        ),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(SMELL, **change)


@pytest.mark.parametrize(
    ("encoders", "told"),
    [
        ({"image": {"package": "x", "sizes": {}}}, "holds 'image', which is shipped"),
        ({"smell": {"package": "x"}}, "must give each modality a package and sizes"),
        ([], "must give each modality a package and sizes"),
        ({"smell": {"package": "x", "sizes": {"hidden_size": "wide"}}}, "hidden_size='wide'"),
    ],
)
def test_a_config_that_lies_about_its_modalities_is_refused(encoders: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        modality.read_encoders(encoders, "config.json")


def test_a_route_that_is_not_its_own_to_give_is_refused() -> None:
    modality.register(replace(SMELL, routes={**SMELL.routes, frozenset({"image"}): Rule(adapter="nose")}))
    config: ModelConfig = replace(tiny(), encoders={"smell": Sizes()})
    with pytest.raises(ConfigError, match="a route for image that is not its own to give"):
        modality.routes(config)


def test_two_modalities_that_disagree_about_rows_of_both_are_refused() -> None:
    both = frozenset({"smell", "taste"})
    for name in ("smell", "taste"):
        own = {
            frozenset({name}): Rule(adapter=name, branches={name: "plain"}),
            both: Rule(adapter=name, branches={"smell": "plain", "taste": "plain"}),
        }
        modality.register(replace(SMELL, name=name, routes=own))
    config: ModelConfig = replace(tiny(), encoders={"smell": Sizes(), "taste": Sizes()})
    with pytest.raises(ConfigError, match=r"'taste' .* a route for smell \+ taste .* that another modality gives"):
        modality.routes(config)


def fails(tokens: list[Tensor]) -> Any:
    raise KeyError("notes")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda tokens: tokens[:-1],
            "gave a list .torch.float32 .4, 16.. for 2 item.s.; return a list of float tensors",
        ),
        (lambda tokens: None, "gave a NoneType for 2 item"),
        (lambda tokens: tokens[0].sum(), "gave torch.float32 .. for 2 item"),
        (lambda tokens: iter(tokens), "gave a list_iterator for 2 item"),
        (lambda tokens: [one[:, :5] for one in tokens], r"4, 5\], .* return .* \(tokens, 16\) each"),
        (lambda tokens: [one[None] for one in tokens], "float32 .1, 4, 16., torch.float32 .1, 2, 16.. for 2"),
        (lambda tokens: [one.long() for one in tokens], "int64"),
        (lambda tokens: [one.numpy() for one in tokens], "a list .a ndarray, a ndarray. for 2"),
        (lambda tokens: [one[:-1] for one in tokens], "smell gave 3 features for 4 placeholder tokens"),
        (fails, "fails with KeyError: 'notes'; mend it, or the features"),
    ],
)
def test_an_encoder_that_fails_or_gives_something_else_is_named(
    tmp_path: Path, change: Callable[[list[Tensor]], Any], told: str
) -> None:
    assistant = smelling()
    encoder = assistant.model.encoders["smell"]
    own = encoder.forward
    encoder.forward = lambda items: change([one.detach() for one in own(items)])
    batch = assistant.processor([question_messages("?", media={"smell": notes}) for notes in ("abba", "ab")])
    with pytest.raises(ShapeError, match=told) as caught:
        assistant.model(batch)
    assert isinstance(caught.value.__cause__, KeyError) == (change is fails)
    if "placeholder" not in told:
        source = SourceConfig(source="smell.whiffs")
        rows = Mixture(context(assistant, tmp_path), [source], rows=2, accumulate=1, seed=0)
        with pytest.raises(ShapeError, match="the encoder of the modality 'smell'"):
            whiten_projectors(assistant.model, "smell", ["smell.*"], rows)


def test_an_encoder_may_return_one_tensor_or_other_floats() -> None:
    assistant = smelling()
    asked = [question_messages("?", media={"smell": notes}) for notes in ("abba", "cdde")]
    batch = assistant.processor(asked)
    logits = assistant.model(batch)
    assistant.model.encoders["smell"].register_forward_hook(lambda module, given, out: torch.stack(out).double())
    assert torch.equal(assistant.model(batch), logits)


# ------------------------------------------------------------------------------------------------------------- training


def context(assistant: Assistant, tmp_path: Path) -> Context:
    return Context(tmp_path, tmp_path, assistant.processor, window=40)


def test_its_sources_are_named_by_recipes(tmp_path: Path) -> None:
    assistant = smelling()
    mixture = Mixture(
        context(assistant, tmp_path),
        [SourceConfig(source="smell.whiffs", options={"notes": 6})],
        rows=3,
        accumulate=1,
        seed=0,
    )
    (batch,) = mixture.take()
    assert [item.tokens for item in batch.media] == [6, 6, 6]
    assert batch.route.adapters == ("nose",) * 3
    for name, told in (("smell.taste", "no source 'taste'; it has whiffs"), ("taste", "unknown source 'taste'")):
        with pytest.raises(ConfigError, match=told):
            make_source(context(assistant, tmp_path), SourceConfig(source=name))


def test_gradients_reach_its_own_parts_and_no_other_adapter(tmp_path: Path) -> None:
    assistant = smelling()
    draw = whiffs(context(assistant, tmp_path))
    batch = assistant.processor.collate([draw(np.random.default_rng(0)) for _ in range(3)])
    values, _ = assistant.model.loss(batch)
    assert math.isfinite(float(values.detach().mean()))
    values.mean().backward()
    used = {
        part_of(name) for name, one in assistant.model.named_parameters() if one.grad is not None and one.grad.any()
    }
    assert used == {"decoder", "smell.encoder", "smell.projector.plain", "adapter.nose"}


def test_a_data_file_holds_a_modality_of_ones_own_as_a_content_part(tmp_path: Path) -> None:
    assistant = smelling()

    def record(part: Any) -> str:
        asked = {"role": "user", "content": [part, {"type": "text", "text": "What <image>?"}]}
        return json.dumps({"messages": [asked, {"role": "assistant", "content": "fox"}]})

    parts = [{"type": "smell", "smell": "abba"}, {"type": "smell"}, {"type": "smell", "smell": {"path": "../b.txt"}},
             {"type": "taste", "taste": "a"}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(record, parts)))
    context = Context(folder=tmp_path, cache=tmp_path / "cache", processor=assistant.processor, window=64)
    options = {"path": str(tmp_path / "rows.jsonl"), "shuffle": False, "tags": False}
    source = make_source(context, SourceConfig(source="files", options=options))
    row = source.row(0)
    assert [(item.modality, item.tokens) for item in row.media] == [("smell", 4)]
    assert torch.equal(row.media[0].features["notes"], sniff("abba", Sizes())[0]["notes"])
    whole = assistant.processor.row(json.loads(record(parts[0]))["messages"], answer=False)
    assert row.ids == whole.ids
    for number, told in ((1, "write the payload in the part"), (2, "lies outside"), (3, "audio, smell, image_url")):
        with pytest.raises(InputError, match=told):
            source.row(number)
    media = {item.start: (item.modality, item.tokens) for item in row.media}
    found = spans(row.ids, media, assistant.processor.tokenizer)
    assert [span.kind for span in found if span.is_medium] == ["smell"]
