"""Published layouts: every tensor has one place, keeps its bits on every way, and nothing is left over."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalora.checkpoint import configs, names
from modalora.checkpoint.files import Weights
from modalora.checkpoint.store import load_model
from modalora.checkpoint.write import convert, save_model
from modalora.contracts import Batch, Route
from modalora.disk import read_json, write_json
from modalora.errors import CheckpointError, ConfigError
from modalora.models.decoder import Phi3Small
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import phi4_mini, phi4_multimodal, tiny
from modalora.nn.dense import Product
from modalora.nn.lora import LoraConfig
from modalora.nn.rope import LongRope, Plain
from modalora.processing.chat import FORMATS
from modalora.processing.tokenizer import RANKS, TextTokenizer
from small import SMALL, fox, shaken


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return fox()


def sizes(config: ModelConfig) -> ModelConfig:
    """Return sizes that every layout can express: the published code fixes a segment of 500 and 36 crops."""
    assert config.speech is not None
    assert config.vision is not None
    return replace(
        config,
        speech=replace(config.speech, segment=500, bias_max_distance=500),
        vision=replace(config.vision, max_crops=36),
    )


TEXT = ModelConfig(decoder=replace(tiny().decoder, tie_word_embeddings=False, sliding_window=100))


@pytest.mark.parametrize(
    ("config", "way"),
    [
        (sizes(tiny()), ("phi4mm", "phi4_multimodal", "modalora", "phi4_multimodal", "phi4mm", "modalora")),
        (TEXT, ("phi3", "modalora", "phi3", "modalora")),
        (SMALL, ("phi3small", "modalora", "phi3small", "modalora")),
    ],
    ids=["multimodal", "phi3", "phi3small"],
)
def test_every_tensor_keeps_its_bits_on_every_way(
    config: ModelConfig, way: tuple[str, ...], words: TextTokenizer, tmp_path: Path
) -> None:
    model = shaken(config)
    save_model(model, words, tmp_path / "0", chat=FORMATS["phi3-small" if config is SMALL else "phi4"])
    before = model.state_dict()
    for step, layout in enumerate(way, start=1):
        found = convert(tmp_path / str(step - 1), tmp_path / str(step), layout, shard_bytes=100_000)
        assert found["layout"] == layout
        loaded = load_model(tmp_path / str(step))
        after = loaded.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name].view(-1), tensor.view(-1)) for name, tensor in before.items())
        assert loaded.model.config == config
        assert found["parameters"] == sum(tensor.numel() for tensor in before.values())
        assert set(found["adapters"]) == set(config.adapters)


def test_the_published_sizes_have_the_published_names() -> None:
    with torch.device("meta"):
        model = Multimodal(phi4_multimodal())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    places = names.plan("phi4mm", shapes, phi4_multimodal())
    assert len(places) == 2047
    told = {place.name: place.shape for place in places.values()}
    assert sum(torch.Size(shape).numel() for shape in told.values()) == 5_574_460_384
    extend = "model.embed_tokens_extend."
    assert told["model.layers.31.mlp.gate_up_proj.base_layer.weight"] == (16384, 3072)
    assert told["model.layers.0.self_attn.qkv_proj.lora_B.speech.weight"] == (5120, 320)
    assert told[f"{extend}image_embed.sub_GN"] == (1, 1, 1, 1152)
    assert told[f"{extend}image_embed.glb_GN"] == (1, 1, 1152)
    assert told[f"{extend}image_embed.img_processor.head.attention.in_proj_weight"] == (3456, 1152)
    assert told[f"{extend}audio_embed.audio_projection.vision.2.weight"] == (3072, 3072)
    assert told[f"{extend}audio_embed.encoder.encoders.23.feed_forward_in.net.0.linear.weight"] == (3072, 1024)
    assert told[f"{extend}audio_embed.encoder.encoders.0.conv.dw_sep_conv_1d.dw_conv.weight"] == (1024, 1, 3)
    assert told[f"{extend}audio_embed.encoder.relative_attention_bias_layer.bias_values.weight"] == (1000, 16)
    assert told[f"{extend}audio_embed.encoder.encoder_embedding.global_invstd"] == (80,)

    native = names.plan(
        "phi4_multimodal", {name: shape for name, shape in shapes.items() if "lora_" not in name}, phi4_multimodal()
    )
    assert len(native) == 1535
    told = {place.name: place.shape for place in native.values()}
    assert sum(torch.Size(shape).numel() for shape in told.values()) == 4_743_988_192
    assert told[f"{extend}audio_embed.up_proj_for_vision_speech.weight"] == (3072, 1024)
    assert told[f"{extend}image_embed.global_img_feature_extensor"] == (1, 1, 1152)
    assert told[f"{extend}audio_embed.encoder.encoders.0.self_attn.o_proj.bias"] == (1024,)


TOKENS = {"bos_token_id": 199_999, "eos_token_id": 199_999, "pad_token_id": 199_999}


@pytest.mark.parametrize(("layout", "config"), [("phi3", phi4_mini()), ("phi4mm", phi4_multimodal())])
def test_published_configs_are_read_as_they_are_written(layout: str, config: ModelConfig) -> None:
    fields = json.loads(json.dumps(configs.write_config(layout, config, TOKENS)))
    assert configs.read_config(layout, fields, "config.json") == config
    assert fields["rope_scaling"]["type"] == "longrope"
    assert len(fields["rope_scaling"]["long_factor"]) == 48


def test_older_and_newer_spellings_of_a_config_are_one() -> None:
    fields = configs.write_config("phi3", phi4_mini(), TOKENS)
    scaling = fields.pop("rope_scaling")
    for spelling in (
        {"rope_scaling": {**scaling, "type": "su"}},
        {"rope_scaling": {**{k: v for k, v in scaling.items() if k != "type"}, "rope_type": "longrope"}},
        {
            "rope_parameters": {
                **{k: v for k, v in scaling.items() if k != "type"},
                "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4096,
            }
        },
    ):  # fmt: skip
        assert configs.read_config("phi3", {**fields, **spelling}, "config.json") == phi4_mini()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; these networks have hidden_act='silu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config tells .* quantised; .* quantize\(m.model, 8\)"),
        ({"quantization": {"bits": 4}}, "quantization tells that the weights were quantised"),
        ({"compression_config": {"format": "int"}}, "compression_config tells that the weights were quantised"),
        ({"attention_sinks": 4}, "unknown key 'attention_sinks'; if it changes nothing, remove it"),
        ({"sliding_window": True}, "sliding_window=True must be a number"),
        ({"rms_norm_eps": 0}, r"config.json: rms_norm_eps=0.0 must lie in \(0, 1\]"),
        ({"head_dim": 64}, "head_dim=64; these networks have head_dim=128"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types must be 'full_attention'"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings=a number of many digits must be"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "this is linear; of a Phi model, default and longrope are read",
        ),
        ({"hidden_size": 3073}, "hidden_size=3073 must be a multiple of num_attention_heads"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers='many'"),
    ],
)
def test_a_config_that_these_networks_do_not_have_is_refused(change: dict[str, Any], told: str) -> None:
    fields = {**configs.write_config("phi3", phi4_mini(), TOKENS), **change}
    with pytest.raises(ConfigError, match=told):
        configs.read_config("phi3", fields, "config.json")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"factor": -4}, r"factor=-4 must lie in \[1e-6, 1e6\]"),
        ({"factor": float("nan")}, r"factor=nan must lie in \[1e-6, 1e6\]"),
        ({"long_factor": [1e308] * 48}, r"lie in \[1e-6, 1e9\]; 1e\+308 does not"),
        ({"short_mscale": 1.1, "long_mscale": 1.2}, "short_mscale=1.1 is read by some engines, and left out by transf"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings is 64 within and 4096 beside"),
    ],
)
def test_a_longrope_that_transformers_reads_otherwise_is_refused(change: dict[str, Any], told: str) -> None:
    fields = configs.write_config("phi3", phi4_mini(), TOKENS)
    with pytest.raises(ConfigError, match=told):
        configs.read_config("phi3", {**fields, "rope_scaling": fields["rope_scaling"] | change}, "config.json")


def test_an_original_window_is_read_where_transformers_reads_it() -> None:
    """Beside the rotary object; 4096 if it is not there, whatever stands within."""
    fields = configs.write_config("phi3", phi4_mini(), TOKENS)
    del fields["original_max_position_embeddings"]
    assert configs.read_config("phi3", fields, "config.json") == phi4_mini()
    with pytest.raises(ConfigError, match="original_max_position_embeddings is missing, and 4096"):
        configs.read_config("phi3", fields | {"max_position_embeddings": 256}, "config.json")
    fields["rope_scaling"]["original_max_position_embeddings"] = 64
    with pytest.raises(ConfigError, match="=64 stands within the rotary object alone.* add it beside max_position_emb"):
        configs.read_config("phi3", fields, "config.json")


def test_an_empty_quantization_config_changes_nothing() -> None:
    fields = {**configs.write_config("phi3", phi4_mini(), TOKENS), "quantization_config": None}
    assert configs.read_config("phi3", fields, "config.json") == phi4_mini()


def test_keys_that_older_versions_wrote_change_nothing() -> None:
    fields = configs.write_config("phi3", phi4_mini(), TOKENS)
    old = {
        "task_specific_params": None, "top_k": 50, "torchscript": False, "pruned_heads": {},
        "use_sliding_window": False, "tie_encoder_decoder": False, "head_dim": 128,
        "layer_types": ["full_attention"] * 32,
    }  # fmt: skip
    assert configs.read_config("phi3", fields | old, "config.json") == phi4_mini()
    with pytest.raises(ConfigError, match="unknown key 'pruned_heads', 'torchscript'"):
        configs.read_config("phi3", fields | {"torchscript": True, "pruned_heads": {"0": [1]}}, "config.json")


def test_a_sliding_window_beyond_the_window_is_kept() -> None:
    fields = configs.write_config("phi3", phi4_mini(), TOKENS) | {"sliding_window": 262_144}
    config = configs.read_config("phi3", fields, "config.json")
    assert configs.write_config("phi3", config, TOKENS)["sliding_window"] == 262_144


def test_a_layout_that_cannot_hold_a_model_is_refused_and_nothing_written(words: TextTokenizer, tmp_path: Path) -> None:
    for layout, told in {
        "phi3": "has no place for|holds a decoder alone",
        "phi4_multimodal": r"cannot express this model: speech.segment=50 becomes 500.*; .* model: modalora, phi4mm$",
        "phi3small": "has no place for|holds Phi-3-small decoders alone",
        "llama": "layout='llama' is unknown",
    }.items():
        with pytest.raises(ConfigError, match=told):
            save_model(shaken(tiny()), words, tmp_path / "other", layout=layout)
    alone = shaken(replace(tiny(), adapters={}))
    with pytest.raises(ConfigError, match="has none; choose a layout that holds this model: modalora$"):
        save_model(alone, words, tmp_path / "other", layout="phi4mm")
    assert list(tmp_path.iterdir()) == []


def test_a_third_adapter_and_further_stop_ids_survive_every_way(words: TextTokenizer, tmp_path: Path) -> None:
    model = shaken(sizes(tiny()))
    model.add_adapter("mine", LoraConfig(r=2, lora_alpha=4))
    with torch.no_grad():
        for linear in model.decoder.routed().values():
            linear.lora_B["mine"].normal_()
    save_model(model, words, tmp_path / "native", layout="phi4_multimodal")
    ends = [words.control("<|endoftext|>"), words.control("<|assistant|>"), words.control("<|end|>")]
    write_json(tmp_path / "native" / "generation_config.json", {"eos_token_id": ends})
    convert(tmp_path / "native", tmp_path / "own", "modalora")
    convert(tmp_path / "own", tmp_path / "back", "phi4_multimodal")
    for folder in ("native", "own", "back"):
        found = load_model(tmp_path / folder)
        assert found.model.adapters == ("vision", "speech", "mine")
        assert found.tokenizer.stop_ids == set(ends)
        again = found.model.state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert read_json(tmp_path / "back" / "generation_config.json")["eos_token_id"] == sorted(ends)


@pytest.fixture
def official(words: TextTokenizer, tmp_path: Path) -> Path:
    save_model(shaken(sizes(tiny())), words, tmp_path / "official", layout="phi4mm")
    return tmp_path / "official"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_with_marks_of_checkpoint_wrappers_are_read(official: Path) -> None:
    def wrap(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".encoders.1." in name]:
            tensors[name.replace(".encoders.1.", ".encoders.1._checkpoint_wrapped_module.")] = tensors.pop(name)

    # copies: older safetensors write over the file that the model is mapped from
    before = {name: tensor.clone() for name, tensor in load_model(official).model.state_dict().items()}
    rewrite(official, wrap)
    after = load_model(official).model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."),
        lambda name: name.removeprefix("model."),
    ],
    ids=["compile", "DDP", "PEFT", "both", "FSDP", "Phi3Model"],
)
def test_names_as_wrappers_and_bare_models_save_them_are_read(
    rename: Callable[[str], str], tied: bool, words: TextTokenizer, tmp_path: Path
) -> None:
    model = shaken(replace(TEXT, decoder=replace(TEXT.decoder, tie_word_embeddings=tied)))
    save_model(model, words, tmp_path / "m", layout="phi3")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, tmp_path / "m" / "model.safetensors")
    after = load_model(tmp_path / "m").model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tied_model_may_be_stored_by_its_head_alone(official: Path) -> None:
    before = {name: tensor.clone() for name, tensor in load_model(official).model.state_dict().items()}
    rewrite(official, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    after = load_model(official).model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_model_with_split_matrices_is_told_as_such(words: TextTokenizer, tmp_path: Path) -> None:
    def split(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "qkv_proj" in name]:
            fused = tensors.pop(name)
            for kind, part in zip("qkv", fused.split((64, 32, 32)), strict=True):
                tensors[name.replace("qkv", kind)] = part.clone()

    save_model(shaken(TEXT), words, tmp_path / "m", layout="phi3")
    rewrite(tmp_path / "m", split)
    with pytest.raises(
        CheckpointError,
        match=r"qkv_proj.weight is missing; .*k_proj.weight is unknown; .*matrices are split .* which are one here",
    ):
        load_model(tmp_path / "m")


def test_a_tied_head_in_the_file_must_be_the_embedding(official: Path) -> None:
    rewrite(official, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    load_model(official)
    rewrite(official, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_model(official)


def test_half_precision_is_kept_and_mapped_not_copied(official: Path) -> None:
    rewrite(official, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    loaded = load_model(official)
    weight = loaded.model.decoder.layers[0].mlp.down_proj.weight
    assert weight.dtype == torch.bfloat16
    maps = Path("/proc/self/maps")
    if maps.exists():
        spans = [line for line in maps.read_text().splitlines() if str(official) in line]
        ends = [tuple(int(part, 16) for part in line.split()[0].split("-")) for line in spans]
        assert any(begin <= weight.data_ptr() < end for begin, end in ends)
    assert load_model(official, dtype=torch.float32).model.decoder.norm.weight.dtype == torch.float32


def test_shards_and_their_index_must_agree(words: TextTokenizer, tmp_path: Path) -> None:
    save_model(shaken(TEXT), words, tmp_path / "m", layout="phi3", shard_bytes=60_000)
    folder = tmp_path / "m"
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = Weights(folder)
    assert sum(len(load_file(shard)) for shard in shards) == len(whole.entries)
    index = read_json(folder / "model.safetensors.index.json")
    name = next(iter(index["weight_map"]))
    for change, told in (
        ({name: "../m/" + shards[0].name, "x": "../../etc/passwd"}, "lies outside the folder; it was not opened"),
        ({name: shards[-1].name}, "differ on 1 tensors, among them"),
        ({"more": shards[0].name}, "differ on 1 tensors, among them more"),
    ):
        write_json(folder / "model.safetensors.index.json", {"weight_map": {**index["weight_map"], **change}})
        with pytest.raises(CheckpointError, match=told):
            load_model(folder)
    write_json(folder / "model.safetensors.index.json", index)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match="cannot be read|No such file"):
        load_model(folder)


def test_a_longrope_with_scales_of_its_own_is_kept() -> None:
    rope = LongRope(short_factor=(1.0,) * 48, long_factor=(2.0,) * 48, rotated=0.75, mscale=(1.1, 1.1))
    config = replace(phi4_mini(), decoder=replace(phi4_mini().decoder, rope=rope))
    fields = configs.write_config("phi3", config, TOKENS)
    assert fields["rope_scaling"]["attention_factor"] == 1.1
    with pytest.raises(ConfigError, match="regime='long' is a setting of this run"):
        configs.write_config(
            "phi3", replace(config, decoder=replace(config.decoder, rope=replace(rope, regime="long"))), TOKENS
        )


def test_attention_factors_that_the_reader_of_a_layout_would_not_see_are_refused() -> None:
    rope = phi4_mini().decoder.rope
    assert isinstance(rope, LongRope)

    def written(layout: str, base: ModelConfig, **own: Any) -> dict[str, Any]:
        config = replace(base, decoder=replace(base.decoder, rope=replace(rope, **own)))
        return configs.write_config(layout, config, TOKENS)

    with pytest.raises(ConfigError, match="'phi4mm' has the attention factor 1.19024 .* this model has 1 and 1"):
        written("phi4mm", phi4_multimodal(), mscale=(1.0, 1.0))
    with pytest.raises(ConfigError, match=r"mscale=\(1.0, 1.2\): transformers multiplies"):
        written("phi3", phi4_mini(), mscale=(1.0, 1.2))
    assert written("phi3", phi4_mini(), mscale=(1.0, 1.0))["rope_scaling"]["attention_factor"] == 1.0


def test_phi3_small_tells_short_and_long_rows_apart() -> None:
    rope = LongRope(
        short_factor=(1.0,) * 8, long_factor=(2.0,) * 8, theta=1e6, window=512, original_window=64, mscale=(1.0, 1.2)
    )
    config = replace(SMALL, decoder=replace(SMALL.decoder, rope=rope))
    fields = json.loads(json.dumps(configs.write_config("phi3small", config, TOKENS)))
    assert (fields["rope_scaling"]["short_mscale"], fields["rope_scaling"]["long_mscale"]) == (1.0, 1.2)
    assert configs.read_config("phi3small", fields, "config.json") == config


# Phi-3-small-8k as it was published, but for names and paths.
PUBLISHED_SMALL: dict[str, Any] = {
    "architectures": ["Phi3SmallForCausalLM"], "attention_bias": False, "attention_dropout_prob": 0.0, "auto_map": {},
    "blocksparse_block_size": 64, "blocksparse_homo_head_pattern": False, "blocksparse_num_local_blocks": 16,
    "blocksparse_triton_kernel_block_size": 64, "blocksparse_vert_stride": 8, "bos_token_id": 100257,
    "dense_attention_every_n_layers": 2, "embedding_dropout_prob": 0.1, "eos_token_id": 100257,
    "ff_dim_multiplier": None, "ff_intermediate_size": 14336, "ffn_dropout_prob": 0.1, "gegelu_limit": 20.0,
    "gegelu_pad_to_256": True, "hidden_act": "gegelu", "hidden_size": 4096, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "max_position_embeddings": 8192, "model_type": "phi3small",
    "mup_attn_multiplier": 1.0, "mup_embedding_multiplier": 10.0, "mup_use_scaling": True,
    "mup_width_multiplier": 8.0, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pad_sequence_to_multiple_of_64": True, "reorder_and_upcast_attn": False, "rope_embedding_base": 1_000_000,
    "rope_position_scale": 1.0, "torch_dtype": "bfloat16", "transformers_version": "4.38.1", "use_cache": True,
    "vocab_size": 100352,
}  # fmt: skip


def test_the_published_config_of_phi3_small_is_read() -> None:
    decoder = configs.read_config("phi3small", PUBLISHED_SMALL, "config.json").decoder
    assert decoder.phi3_small == Phi3Small()
    assert (decoder.rope, decoder.vocab_size) == (Plain(theta=1e6, window=8192), 100_352)
    configs.read_config("phi3small", PUBLISHED_SMALL | {"pad_sequence_to_multiple_of_64": False}, "config.json")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attention_bias": True}, "attention_bias=True; these networks have attention_bias=False"),
        ({"ff_dim_multiplier": 2}, "ff_dim_multiplier=2; these networks have ff_dim_multiplier=None"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True; these networks have"),
        ({"pad_sequence_to_multiple_of_64": 64}, "pad_sequence_to_multiple_of_64=64; these networks have"),
        ({"dummy_token_indices": 5}, "hidden_tokens"),
        ({"dummy_token_indices": [100_352]}, r"hidden_tokens has 100352; ids lie in \[0, vocab_size=100352\)"),
    ],
)
def test_a_phi3_small_that_was_not_published_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        configs.read_config("phi3small", PUBLISHED_SMALL | change, "config.json")


@pytest.fixture
def published_small(tmp_path: Path, words: TextTokenizer) -> Path:
    """A small Phi-3-small whose folder has the published keys, and ranks in place of a tokenizer.json."""
    save_model(shaken(replace(SMALL, decoder=replace(SMALL.decoder, vocab_size=400))), words, tmp_path / "m",
               layout="phi3small", chat=FORMATS["phi3-small"])  # fmt: skip
    written = read_json(tmp_path / "m" / "config.json")
    keys = "vocab_size hidden_size ff_intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    keys += " max_position_embeddings blocksparse_block_size blocksparse_num_local_blocks blocksparse_vert_stride"
    own = {key: written[key] for key in keys.split()} | {"bos_token_id": 265, "eos_token_id": 265}
    write_json(tmp_path / "m" / "config.json", PUBLISHED_SMALL | own)
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink()
    vocabulary = [
        *(bytes([byte]) for byte in range(256)),
        b"th",
        b"the",
        b" f",
        b"ox",
        b" fox",
        b"1234567",
        b"as",
        b"is",
    ]
    lines = [b"%s %d" % (base64.b64encode(word), rank) for rank, word in enumerate(vocabulary)]
    (tmp_path / "m" / RANKS).write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path / "m"


def test_phi3_small_never_says_the_tokens_that_its_tokenizer_does_not_use(
    published_small: Path, tmp_path: Path
) -> None:
    """Those are "dummy_id", and of cl100k's own all but the end of a text."""
    loaded = load_model(published_small)
    assert len(loaded.tokenizer.encode("the fox")) == 2
    # in the order of the published ids, 264 words lower than there: 100256, 100258 to 100260, 100264, 100265 ...
    unsaid = {0, 2, 3, 4, 8, 9, *range(11, 96)}
    small = loaded.model.config.decoder.phi3_small
    assert small is not None
    assert small.hidden_tokens == tuple(264 + index for index in sorted(unsaid))
    batch = Batch(torch.arange(6)[None], torch.tensor([6]), Route((None,)))
    with torch.inference_mode():
        logits = loaded.model(batch)
    assert logits[0, -1].isinf().nonzero().flatten().tolist() == list(small.hidden_tokens)

    convert(published_small, tmp_path / "own", "modalora")
    convert(tmp_path / "own", tmp_path / "back", "phi3small")
    assert read_json(tmp_path / "back" / "config.json")["dummy_token_indices"] == list(small.hidden_tokens)
    assert (tmp_path / "back" / RANKS).read_bytes() == (published_small / RANKS).read_bytes()
    back = load_model(tmp_path / "back")
    assert back.tokenizer.definition == loaded.tokenizer.definition
    with torch.inference_mode():
        assert torch.equal(back.model(batch), logits)


def test_a_phi3_small_without_the_tokens_that_tell_it_is_refused(published_small: Path, words: TextTokenizer) -> None:
    (published_small / "tokenizer.json").write_text(words.definition)
    with pytest.raises(
        CheckpointError, match=r"config.json: dummy_token_indices is missing, .* token <\|fim_prefix\|>"
    ):
        load_model(published_small)
    fields = read_json(published_small / "config.json")
    write_json(published_small / "config.json", fields | {"dummy_token_indices": []})
    small = load_model(published_small).model.config.decoder.phi3_small
    assert small is not None
    assert small.hidden_tokens == ()


def test_placeholders_are_those_of_the_tokenizer(words: TextTokenizer, tmp_path: Path) -> None:
    save_model(shaken(sizes(tiny())), words, tmp_path / "m", layout="phi4_multimodal")
    fields = read_json(tmp_path / "m" / "config.json")
    assert fields["audio_config"]["audio_token_id"] == words.control("<|endoftext11|>")
    fields["vision_config"]["image_token_id"] = 5
    write_json(tmp_path / "m" / "config.json", fields)
    with pytest.raises(CheckpointError, match=r"vision_config.image_token_id=5, and .* has <\|endoftext10\|> at"):
        load_model(tmp_path / "m")


def test_untrained_adapters_of_a_model_come_back(words: TextTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_model(Multimodal(sizes(tiny())), words, tmp_path / "m", layout="phi4_multimodal")
    assert load_model(tmp_path / "m").model.adapters == ("vision", "speech")


def test_a_chat_format_that_would_be_lost_is_refused(words: TextTokenizer, tmp_path: Path) -> None:
    own = replace(FORMATS["phi4"], default_system="Your name is Phi, an expert.")
    with pytest.raises(ConfigError, match="cannot express this chat format"):
        save_model(shaken(TEXT), words, tmp_path / "m", layout="phi3", chat=own)
    assert list(tmp_path.iterdir()) == []


def test_packing_gives_the_same_bits_and_is_refused_in_float32(words: TextTokenizer, tmp_path: Path) -> None:
    from modalora.nn.packed import can_pack

    save_model(shaken(TEXT), words, tmp_path / "m")
    with pytest.raises(ConfigError, match="pack rearranges bfloat16"):
        load_model(tmp_path / "m", pack=True)
    plain = load_model(tmp_path / "m", dtype=torch.bfloat16).model
    if not can_pack(plain.decoder.embed_tokens.weight):
        pytest.skip("this CPU has no bf16 products")
    packed = load_model(tmp_path / "m", dtype=torch.bfloat16, pack=True).model
    batch = Batch(torch.arange(20)[None], torch.tensor([20]), Route((None,)))
    with torch.inference_mode():
        assert torch.equal(packed(batch), plain(batch))
    save_model(shaken(tiny()), words, tmp_path / "whole")
    plain, whole = (load_model(tmp_path / "whole", dtype=torch.bfloat16, pack=pack).model for pack in (False, True))
    features = {"image": {"pixels": torch.randn(2, 3, 56, 56), "mask": torch.ones(2, 4, 4, dtype=torch.bool)}}
    features["image"]["grid"] = torch.tensor([1, 1])
    features["audio"] = {"mel": torch.randn(40, tiny().modalities["audio"].mels)}
    for name, projectors in plain.projectors.items():
        with torch.inference_mode():
            (told,), (found,) = (model.encoders[name]([features[name]]) for model in (plain, whole))
            assert torch.equal(found, told)
            for branch, projector in projectors.named_children():
                assert torch.equal(whole.projectors.get_submodule(f"{name}.{branch}")(told), projector(told))
        matrices = [x for x in whole.encoders[name].modules() if isinstance(x, Product)]
        assert matrices
        assert all(one.weight.isnan().all() for one in matrices)
    with pytest.raises(ConfigError, match="packed for reading"):
        save_model(packed, words, tmp_path / "again")
