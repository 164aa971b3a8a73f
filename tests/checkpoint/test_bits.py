"""Bits that conversions keep, and numbers in which a model with tensors of several dtypes runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalora.checkpoint.adapters import fingerprint, load_adapter, save_adapter
from modalora.checkpoint.store import describe, load_model
from modalora.checkpoint.sums import compose, merge
from modalora.checkpoint.write import convert, save_model
from modalora.contracts import Batch, Route
from modalora.disk import read_json, write_json
from modalora.errors import CheckpointError, RouteError
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import tiny
from modalora.nn.lora import LoraConfig
from modalora.processing.chat import FORMATS
from modalora.processing.tokenizer import TextTokenizer
from small import SMALL, fox

ADAPTER = "adapter_model.safetensors"
TEXT = ModelConfig(decoder=tiny().decoder)


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return fox()


def moved(config: ModelConfig, adapter: LoraConfig | None = None, seed: int = 0) -> Multimodal:
    """Return a model without a zero in it, with an adapter `mine`."""
    torch.manual_seed(seed)
    model = Multimodal(config).eval()
    shaken = set()
    for _ in range(2):  # the base first: it is the same with an adapter and without
        with torch.no_grad():
            for name in sorted(set(model.state_dict()) - shaken):
                tensor = model.state_dict()[name]
                tensor.add_(0.1 * torch.randn_like(tensor))
                shaken.add(name)
        if adapter and not model.adapters:
            model.add_adapter("mine", adapter)
    return model


def logits(model: Multimodal, route: str | None = None) -> Tensor:
    with torch.inference_mode():
        return model(Batch(torch.arange(20)[None], torch.tensor([20]), Route((route,))))


def change(folder: Path, name: str, edit: object) -> None:
    tensors = load_file(folder / name)
    for key in tensors:
        tensors[key] = edit(key, tensors[key])  # type: ignore[operator]
    save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.fixture
def mixed(tmp_path: Path, words: TextTokenizer) -> Path:
    """Return a folder in bf16 whose norms, and whose adapter, are float32."""
    model = moved(TEXT, LoraConfig(r=4, lora_alpha=8))
    save_model(model, words, tmp_path / "m", layout="phi3")
    change(tmp_path / "m", "model.safetensors", lambda key, own: own if "norm" in key else own.bfloat16())
    return tmp_path / "m"


def test_a_conversion_keeps_the_bits_of_every_dtype(mixed: Path, tmp_path: Path) -> None:
    convert(mixed, tmp_path / "own", "modalora")
    convert(tmp_path / "own", tmp_path / "back", "phi3")
    for name in ("model.safetensors", f"mine-lora/{ADAPTER}"):
        told, found = load_file(mixed / name), load_file(tmp_path / "back" / name)
        assert set(told) == set(found)
        assert all(told[key].dtype == found[key].dtype and torch.equal(told[key], found[key]) for key in told)


def test_tensors_of_several_dtypes_run_in_the_one_that_most_have(mixed: Path) -> None:
    assert describe(mixed)["runs_in"] == {"decoder": "bfloat16"}
    model = load_model(mixed).model
    dtypes = {tensor.dtype for name, tensor in model.state_dict().items() if "lora_" not in name}
    assert dtypes == {torch.bfloat16}  # adapters keep theirs
    assert logits(model, "mine").isfinite().all()


def test_a_number_that_a_dtype_cannot_hold_is_refused(tmp_path: Path, words: TextTokenizer) -> None:
    model = moved(TEXT, LoraConfig(r=4, lora_alpha=8))
    with torch.no_grad():
        model.decoder.layers[0].get_submodule("mlp.down_proj").lora_B["mine"][0, 0] = 1e6  # type: ignore[index, union-attr]
    save_model(model, words, tmp_path / "m", layout="phi3")
    change(tmp_path / "m" / "mine-lora", ADAPTER, lambda key, own: own)  # without the fingerprint, which is float32's
    load_model(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"mlp.down_proj.lora_B holds 1e\+06, which torch.float16 cannot tell"):
        load_model(tmp_path / "m", dtype=torch.float16)
    change(tmp_path / "m", "model.safetensors", lambda key, own: own.half())
    convert(tmp_path / "m", tmp_path / "same", "phi3")
    assert load_file(tmp_path / "same" / "mine-lora" / ADAPTER).popitem()[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda key, own: own.fill_(torch.nan) if "lora_B" in key else own, "holds numbers that are not finite"),
        (lambda key, own: own.to(torch.int8), "has dtype I8; F64, F32, F16, BF16 are read"),
        (lambda key, own: own > 0, "has dtype BOOL"),
        (lambda key, own: own * 1e18, "logits of a probe of 16 tokens are not finite"),
        (lambda key, own: own * ("lora_A" not in key), "so the adapter changes nothing"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_and_the_model_stays(edit: object, told: str, tmp_path: Path) -> None:
    save_adapter(moved(TEXT, LoraConfig(r=4, lora_alpha=8)), "mine", tmp_path / "lora")
    change(tmp_path / "lora", ADAPTER, edit)
    model = moved(TEXT)
    before, names = model.config, set(model.state_dict())
    with pytest.raises(CheckpointError, match=told):
        load_adapter(model, tmp_path / "lora", "mine")
    assert (model.config, set(model.state_dict())) == (before, names)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"r": True}, "r=True must be a number"),
        ({"lora_alpha": 0}, "so the adapter changes nothing"),
        ({"lora_alpha": 1e308}, r"lora_alpha=1e\+308 must lie within"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config=.*KaSA takes small singular values"),
        ({"brand_new_scale": 3.0}, "'brand_new_scale'=3.0, which is not known here"),
        ({"target_modules": ["q_proj", "v_proj"]}, "trained on a copy whose matrices are split"),
        ({"target_modules": ["lm_head"]}, "LoRA on embeddings or on the output matrix"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "layers_pattern='blocks'"),
        ({"rank_pattern": {f"a{number}": 2 for number in range(20_000)}}, "20,000 patterns of ranks or alphas"),
    ],
)
def test_settings_that_would_change_the_numbers_are_refused(
    fields: dict[str, object], told: str, tmp_path: Path
) -> None:
    save_adapter(moved(TEXT, LoraConfig(r=4, lora_alpha=8)), "mine", tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    write_json(path, read_json(path) | fields)
    with pytest.raises(CheckpointError, match=told):
        load_adapter(moved(TEXT), tmp_path / "lora", "mine")


def test_a_tied_output_matrix_that_was_saved_twice_and_is_the_base_is_no_change(tmp_path: Path) -> None:
    model = moved(TEXT, LoraConfig(r=4, lora_alpha=8))
    save_adapter(model, "mine", tmp_path / "lora")
    path, own = tmp_path / "lora" / "adapter_config.json", model.decoder.embed_tokens.weight.detach()
    write_json(path, read_json(path) | {"modules_to_save": ["lm_head", "embed_tokens"]})
    twice = {f"base_model.model.{key}.weight": own.clone() for key in ("lm_head", "model.embed_tokens")}
    save_file(load_file(tmp_path / "lora" / ADAPTER) | twice, tmp_path / "lora" / ADAPTER)
    plain = moved(TEXT)
    assert load_adapter(plain, tmp_path / "lora", "mine").modules == ()
    assert torch.equal(logits(plain, "mine"), logits(model, "mine"))


def test_an_adapter_of_encoders_is_told_as_such(tmp_path: Path) -> None:
    save_adapter(moved(TEXT, LoraConfig(r=4, lora_alpha=8)), "mine", tmp_path / "lora")
    key = "base_model.model.model.embed_tokens_extend.image_embed.img_processor.layers.0.q_proj.lora_A.weight"
    save_file(load_file(tmp_path / "lora" / ADAPTER) | {key: torch.ones(4, 8)}, tmp_path / "lora" / ADAPTER)
    with pytest.raises(CheckpointError, match="LoRA on encoders would change rows of every route"):
        load_adapter(moved(TEXT), tmp_path / "lora", "mine")


@pytest.mark.parametrize("route", ["mine@1e39", "mine@-10001"])
def test_weights_of_a_sum_are_bounded(route: str) -> None:
    model = moved(TEXT, LoraConfig(r=4, lora_alpha=8))
    for action in (lambda: compose(model, route, "sum"), lambda: merge(model, route)):
        with pytest.raises(RouteError, match="must lie within -10,000 and 10,000"):
            action()


def test_a_merge_that_overflows_leaves_the_model_as_it_was() -> None:
    model = moved(TEXT, LoraConfig(r=4, lora_alpha=8)).half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        last = list(model.decoder.routed().values())[-1]
        before[next(name for name in before if name.endswith("1.mlp.down_proj.lora_B.mine"))].fill_(100)
        last.lora_B["mine"].fill_(100)
    with pytest.raises(CheckpointError, match="which torch.float16 cannot tell from infinity"):
        merge(model, "mine@10000")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("weight", [1e-25, 1e-30, 1e-40])
def test_a_tiny_weight_is_merged(weight: float) -> None:
    model = moved(TEXT, LoraConfig(r=4, lora_alpha=8))
    found = merge(model, f"mine@{weight}")
    assert (found.linears, model.adapters) == (8, ())
    assert 0.9 < found.error <= 1.01  # float32 loses all of such a change


def test_a_merge_in_float64_keeps_float64() -> None:
    model = moved(TEXT, LoraConfig(r=4, lora_alpha=8)).double()
    wanted = logits(model, "mine")
    merge(model, "mine")
    # worst seen 1e-14; through float32 it is 1e-7
    torch.testing.assert_close(logits(model), wanted, atol=1e-11, rtol=0)


def test_a_sum_in_bfloat16_is_composed_in_float32() -> None:
    model = moved(TEXT, LoraConfig(r=4, lora_alpha=8)).bfloat16()
    compose(model, "mine@0.7", "part")
    for linear in model.decoder.routed().values():
        wanted = linear.lora_B["mine"].double() @ linear.lora_A["mine"].double() * 1.4
        found = linear.lora_B["part"].double() @ linear.lora_A["part"].double()
        assert (found - wanted).norm() < 1e-6 * wanted.norm()  # rounded to bf16 it is 2e-3


def test_phi3_small_adapters_have_the_published_names_and_rows(tmp_path: Path, words: TextTokenizer) -> None:
    """Adding B A to the weights as they are published gives what the adapter gives here."""
    size = LoraConfig(r=4, lora_alpha=8, rank_pattern={"o_proj": 2}, alpha_pattern={"layers.1.mlp.gate_up_proj": 3})
    model = moved(SMALL, size)
    wanted = logits(model, "mine")
    save_adapter(model, "mine", tmp_path / "lora")
    config = read_json(tmp_path / "lora" / "adapter_config.json")
    kinds = ["self_attn.query_key_value", "self_attn.dense", "mlp.up_proj", "mlp.down_proj"]
    assert config["target_modules"] == kinds
    plain = moved(SMALL)
    verdict = load_adapter(plain, tmp_path / "lora", "mine")
    assert torch.equal(logits(plain, "mine"), wanted)
    assert verdict.logit_change < 100  # ids that are never said do not count

    save_model(moved(SMALL), words, tmp_path / "m", layout="phi3small", chat=FORMATS["phi3-small"])
    lora = load_file(tmp_path / "lora" / ADAPTER)

    def with_adapter(key: str, own: Tensor) -> Tensor:
        module = "base_model.model." + key.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in lora:
            return own
        alpha = 3 if "1.mlp.up_proj" in key else 8
        down, up = lora[f"{module}.lora_A.weight"], lora[f"{module}.lora_B.weight"]
        return own + up @ down * (alpha / len(down))

    change(tmp_path / "m", "model.safetensors", with_adapter)
    torch.testing.assert_close(logits(load_model(tmp_path / "m").model), wanted, atol=1e-5, rtol=0)


def test_ids_and_settings_come_through_our_own_layout(tmp_path: Path, words: TextTokenizer) -> None:
    save_model(moved(TEXT), words, tmp_path / "a", layout="phi3")
    ids = {"bos_token_id": 1, "eos_token_id": [5, 6], "pad_token_id": 3}
    write_json(tmp_path / "a" / "config.json", read_json(tmp_path / "a" / "config.json") | ids)
    settings = {"temperature": 0.3, "do_sample": True, "eos_token_id": [5, 6]}
    write_json(tmp_path / "a" / "generation_config.json", settings)
    convert(tmp_path / "a", tmp_path / "b", "modalora")
    convert(tmp_path / "b", tmp_path / "c", "phi3")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert read_json(tmp_path / "c" / "config.json")["torch_dtype"] == "float32"


def test_ends_of_answers_are_those_of_the_config_without_a_generation_config(
    tmp_path: Path, words: TextTokenizer
) -> None:
    save_model(moved(TEXT), words, tmp_path / "m", layout="phi3")
    config, generation = tmp_path / "m" / "config.json", tmp_path / "m" / "generation_config.json"
    write_json(config, read_json(config) | {"eos_token_id": [5, 6]})
    assert not {5, 6} & load_model(tmp_path / "m").tokenizer.stop_ids
    generation.unlink()
    assert load_model(tmp_path / "m").tokenizer.stop_ids >= {5, 6}
    for wrong in (-1, True, 2**31, 10**400):
        config.write_text(json.dumps(read_json(config) | {"eos_token_id": 5}))
        write_json(generation, {"eos_token_id": [wrong]})
        with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id has .* a token id, below 320"):
            load_model(tmp_path / "m")
    generation.unlink()
    write_json(config, read_json(config) | {"eos_token_id": -5})
    with pytest.raises(CheckpointError, match="config.json: eos_token_id has -5"):
        load_model(tmp_path / "m")
    write_json(config, read_json(config) | {"eos_token_id": [5, 320]})
    assert 320 not in load_model(tmp_path / "m").tokenizer.stop_ids  # this model never says it


def test_a_target_within_the_source_or_a_link_to_nowhere_is_refused(tmp_path: Path, words: TextTokenizer) -> None:
    save_model(moved(TEXT), words, tmp_path / "m")
    with pytest.raises(CheckpointError, match="lies within"):
        convert(tmp_path / "m", tmp_path / "m" / "x", "phi3")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="link exists; give a new folder"):
        convert(tmp_path / "m", tmp_path / "link", "phi3")


def test_a_tokenizer_without_control_tokens_is_refused(tmp_path: Path, words: TextTokenizer) -> None:
    save_model(moved(TEXT), words, tmp_path / "m", layout="phi3")
    fields = json.loads(words.definition)
    fields["added_tokens"] = [one for one in fields["added_tokens"] if one["content"] != "<|user|>"]
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"has no control token <\|user\|>"):
        load_model(tmp_path / "m")


def test_an_adapter_is_used_on_packed_weights_where_gradients_are_asked_for(
    tmp_path: Path, words: TextTokenizer
) -> None:
    from modalora.nn.packed import can_pack

    model = moved(replace(TEXT), LoraConfig(r=4, lora_alpha=8)).bfloat16()
    if not can_pack(model.decoder.embed_tokens.weight):
        pytest.skip("this CPU has no bf16 products")
    save_adapter(model, "mine", tmp_path / "lora")
    wanted = logits(model, "mine")
    model.pack()
    load_adapter(model, tmp_path / "lora", "later")
    for name in ("mine", "later"):
        found = model(Batch(torch.arange(20)[None], torch.tensor([20]), Route((name,))))
        torch.testing.assert_close(found, wanted, atol=0.05, rtol=0)


def test_a_sliding_window_that_hides_nothing_makes_no_other_base(words: TextTokenizer, tmp_path: Path) -> None:
    """Its adapters were saved when such windows were not kept."""
    one = moved(TEXT)
    torch.manual_seed(0)
    other = moved(replace(TEXT, decoder=replace(TEXT.decoder, sliding_window=TEXT.decoder.rope.window)))
    assert fingerprint(one) == fingerprint(other)
    narrow = moved(replace(TEXT, decoder=replace(TEXT.decoder, sliding_window=40)))
    assert fingerprint(one) != fingerprint(narrow)
