"""config.json of published layouts <-> ModelConfig. Every key is read, checked to have the one value that the networks
have, known to change no number, or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from modalora.config import parse
from modalora.errors import ConfigError
from modalora.models.decoder import DecoderConfig, Phi3Small
from modalora.models.multimodal import ModelConfig
from modalora.models.speech import SpeechConfig
from modalora.models.vision import VisionConfig
from modalora.nn.lora import LoraConfig
from modalora.nn.mask import BlockSparse
from modalora.nn.rope import DynamicNtk, LongRope, Plain, Rope, from_hf, su_temperature

Fields = Mapping[str, Any]

# Keys that transformers writes and that change no number of a forward pass.
_INERT = frozenset(
    """architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id full_attn_mod
    gradient_checkpointing id2label initializer_range interpolate_factor is_decoder is_encoder_decoder label2id
    max_sequence_length model_type output_attentions output_hidden_states pad_token_id problem_type return_dict
    tokenizer_class torch_dtype transformers_version unsloth_fixed unsloth_version use_cache""".split()
)
# Keys that older versions of transformers wrote into every config, or that say what these networks are anyway.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "task_specific_params": (None, {}), "torchscript": (False, None), "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None), "add_cross_attention": (False, None), "use_sliding_window": (False, None),
    "cross_attention_hidden_size": (None,), "use_bfloat16": (False, True, None), "finetuning_task": (None,),
    "output_scores": (False, None), "return_dict_in_generate": (False, None),
}  # fmt: skip
# How answers are chosen, which is asked for here with every question.
_GENERATION = frozenset(
    """bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences prefix remove_invalid_values repetition_penalty sep_token_id suppress_tokens temperature top_k
    top_p typical_p""".split()
)
# Of transformers, of its older versions, of MLX.
_QUANTISED = ("quantization_config", "compression_config", "quantization")
# Rates that matter in training only, where dropout is not used.
_NO_DROPOUT = dict.fromkeys(
    ("attention_dropout", "embd_pdrop", "resid_pdrop", "attention_dropout_prob", "embedding_dropout_prob",
     "ffn_dropout_prob", "dropout_rate", "dropout")
)  # fmt: skip


@dataclass
class Reader:
    """Keys of one JSON object, each asked for once; what is left at the end is refused."""

    fields: Fields
    where: str
    asked: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default where the key is absent."""
        self.asked.add(key)
        return self.fields.get(key, default)

    def need(self, key: str) -> Any:
        """Return a value. Raises ConfigError when the key is absent."""
        if key not in self.fields:
            raise ConfigError(f"{self.where}: {key} is missing")
        return self.get(key)

    def must(self, **values: Any) -> None:
        """Refuse a key whose value is none of the given (one, or a tuple of several); absent keys pass."""
        for key, wanted in values.items():
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            if self.get(key, wanted[0]) not in wanted:
                raise ConfigError(
                    f"{self.where}: {key}={self.fields[key]!r:.60}; these networks have {key}="
                    f"{' or '.join(map(repr, wanted))}"
                )

    def inner(self, key: str) -> Reader:
        """Return a reader of the object under a key."""
        value = self.need(key)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: {key} must be an object; it is {type(value).__name__}")
        return Reader(value, f"{self.where}: {key}")

    def sizes(self, **names: str) -> dict[str, Any]:
        """Return values under our names, ours=theirs; absent ones are left out."""
        return {ours: self.get(theirs) for ours, theirs in names.items() if theirs in self.fields}

    def finish(self) -> None:
        """Refuse every key that was not asked for and is not known to be inert."""
        for key in _QUANTISED:
            if self.fields.get(key) is not None:
                raise ConfigError(
                    f"{self.where}: {key} tells that the weights were quantised; give the plain ones, and once they "
                    "are loaded as m, quantize(m.model, 8) of modalora.quantize makes int8 of them (4: int4)"
                )
        known = self.asked | _INERT | _GENERATION | {*_QUANTISED}
        known |= {key for key, plain in _PLAIN.items() if self.fields.get(key) in plain}
        unknown = [key for key in self.fields if key not in known and not key.startswith("_")]
        unknown = [key for key in unknown if not (key in _NO_DROPOUT and isinstance(self.fields[key], int | float))]
        if unknown:
            raise ConfigError(
                f"{self.where}: unknown key {', '.join(map(repr, sorted(unknown)))}; if it changes nothing, remove it "
                "from the file"
            )


def read_config(layout: str, fields: Fields, where: str) -> ModelConfig:
    """Return the networks that a published config.json describes. Raises ConfigError naming file, key and rule."""
    reader = Reader(fields, where)
    config = _READERS[layout](reader)
    reader.finish()
    return config


def write_config(layout: str, config: ModelConfig, tokens: Fields) -> dict[str, Any]:
    """Return the config.json of a layout. tokens: bos, eos and pad ids as transformers names them.

    Raises ConfigError when the layout cannot express the networks: what it would be read as differs.
    """
    fields = {**_WRITERS[layout](config), **tokens}
    back = read_config(layout, fields, f"the written config of layout {layout!r}")
    held = config if layout == "phi4mm" else replace(config, adapters={})
    held = replace(held, decoder=replace(held.decoder, rope=_as_written(held.decoder.rope)))
    if (vision := held.vision) and layout == "phi4_multimodal":
        held = replace(held, vision=replace(vision, max_crops=VisionConfig().max_crops))
    if back != held:
        ours, theirs = _flat(asdict(held)), _flat(asdict(back))
        wrong = [
            f"{key}={ours.get(key)!r:.40} becomes {theirs.get(key)!r:.40}"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]
        raise ConfigError(f"the layout {layout!r} cannot express this model: {'; '.join(wrong[:4])}")
    return fields


def _flat(fields: Fields, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


ROPE_KEYS = (
    "max_position_embeddings", "original_max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor",
)  # fmt: skip


def _read_rope(fields: Fields, where: str) -> Plain | LongRope:
    rope = from_hf(fields, where)
    if not isinstance(rope, Plain | LongRope):
        raise ConfigError(
            f"{where}: rope parameters: this is {rope.kind}; of a Phi model, default and longrope are read"
        )
    return rope


def _write_rope(rope: Rope, *, two_scales: bool = False) -> dict[str, Any]:
    """Return the rotary keys as readers of any version take them. two_scales: the layout tells short and long apart."""
    rope = _as_written(rope)
    if isinstance(rope, DynamicNtk):
        raise ConfigError(
            "dynamic_ntk has a table for every length, which no published layout holds; choose a length and write the "
            "model with as_longrope(rope.at(length), head_dim) of modalora.nn.rope"
        )
    if not isinstance(rope, Plain | LongRope):
        raise ConfigError(
            f"published layouts hold the ropes plain and longrope, not {rope.kind}; as_longrope(rope, head_dim) of "
            "modalora.nn.rope has the same table as one divisor per pair: write the model with it"
        )
    if two_scales and isinstance(rope, LongRope) and rope.mscale is not None:
        fields = replace(rope, mscale=None).to_hf("rope_scaling")
        fields["rope_scaling"] |= dict(zip(("short_mscale", "long_mscale"), rope.mscale, strict=True))
        return fields
    return rope.to_hf("rope_scaling")


def _need_factor_of_windows(rope: Rope) -> None:
    """Refuse attention factors that the released code of Phi-4-Multimodal would ignore: it looks at the windows."""
    if isinstance(rope, LongRope):
        told = su_temperature(rope.stretch, rope.original_window)
        own = (rope.attention_factor(), rope.attention_factor(long=True))
        if own != (told, told):
            raise ConfigError(
                f"the code that reads the layout 'phi4mm' has the attention factor {told:.6g} from the windows, and "
                f"this model has {own[0]:.6g} and {own[1]:.6g}"
            )


def _as_written(rope: Rope) -> Rope:
    """Return the rope as files tell it: a temperature by its number."""
    if isinstance(rope, LongRope) and rope.temperature != "su":
        return replace(rope, temperature="su", mscale=(rope.attention_factor(), rope.attention_factor(long=True)))
    return rope


_ORIGINAL = 4096  # original window of a Phi model whose config tells none, in transformers and in the released code
_DECODER = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps",
)  # fmt: skip


def _read_decoder(reader: Reader) -> DecoderConfig:
    reader.must(hidden_act="silu", attention_bias=False, mlp_bias=False, lm_head_bias=False, pretraining_tp=1)
    sizes = {key: reader.get(key) for key in _DECODER if reader.fields.get(key) is not None}
    sizes.setdefault("num_key_value_heads", sizes.get("num_attention_heads"))
    rope = _read_rope(_with_original(reader.fields, reader.where), reader.where)
    reader.asked.update(ROPE_KEYS)
    fields = {
        **sizes,
        "tie_word_embeddings": reader.get("tie_word_embeddings", False),
        "rope": asdict(rope),
        "sliding_window": reader.get("sliding_window"),
    }
    reader.get("num_key_value_heads")
    found = parse(DecoderConfig, fields, reader.where)
    reader.must(head_dim=(found.head_dim, None))
    kinds = reader.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f"{reader.where}: layer_types must be 'full_attention' for every layer")
    return found


def _with_original(fields: Fields, where: str) -> Fields:
    """Return the keys with the original window that transformers takes for a Phi model.

    It reads the key beside the rotary object, 4096 where there is none, and puts that over the one within. Nor does it
    know attention factors for short and long rows, which other engines read.
    """
    key, inner = "original_max_position_embeddings", fields.get("rope_parameters") or fields.get("rope_scaling")
    if not isinstance(inner, Mapping) or not {"short_factor", "long_factor"} & set(inner):
        return fields
    if fields.get(key) is None and inner.get(key) not in (None, _ORIGINAL):
        raise ConfigError(
            f"{where}: {key}={inner[key]!r:.40} stands within the rotary object alone, where transformers puts "
            f"{_ORIGINAL} in its place; add it beside max_position_embeddings, as published files have it"
        )
    window = fields.get("max_position_embeddings", _ORIGINAL)
    if fields.get(key) is None and type(window) is int and window < _ORIGINAL:
        raise ConfigError(
            f"{where}: {key} is missing, and {_ORIGINAL}, which transformers takes then, is beyond "
            f"max_position_embeddings={window}; add it"
        )
    if told := [one for one in ("short_mscale", "long_mscale") if inner.get(one) is not None]:
        raise ConfigError(
            f"{where}: {told[0]}={inner[told[0]]!r:.40} is read by some engines, and left out by transformers; give "
            "attention_factor, one number, in its place"
        )
    return {**fields, key: _ORIGINAL if fields.get(key) is None else fields[key]}


def _write_decoder(config: DecoderConfig) -> dict[str, Any]:
    return {
        **{key: getattr(config, key) for key in _DECODER},
        **_write_rope(config.rope),
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "sliding_window": config.sliding_window,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _read_small(reader: Reader) -> ModelConfig:
    reader.must(hidden_act="gegelu", mup_use_scaling=True, blocksparse_homo_head_pattern=False, gegelu_pad_to_256=True)
    reader.must(reset_attention_mask_on_eos=False, rope_position_scale=1.0)
    reader.must(attention_bias=False, ff_dim_multiplier=None, reorder_and_upcast_attn=False)  # which nothing reads
    reader.must(pad_sequence_to_multiple_of_64=(True, False))  # of rows that train, behind their last token
    reader.get("blocksparse_triton_kernel_block_size")  # how a kernel is cut, not what it gives
    rope = _read_rope({**reader.fields, "rope_theta": reader.get("rope_embedding_base", 1e6)}, reader.where)
    reader.asked.update(ROPE_KEYS)
    reader.must(partial_rotary_factor=1.0)
    small = Phi3Small(
        embedding_scale=reader.get("mup_embedding_multiplier", 10.0),
        attention_scale=reader.get("mup_attn_multiplier", 1.0),
        logit_scale=reader.get("mup_width_multiplier", 8.0),
        gegelu_limit=reader.get("gegelu_limit", 20.0),
        blocks=BlockSparse(
            block=reader.get("blocksparse_block_size", 64),
            local=reader.get("blocksparse_num_local_blocks", 16),
            stride=reader.get("blocksparse_vert_stride", 8),
        ),
        dense_every=reader.get("dense_attention_every_n_layers", 2),
    )
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    fields = {
        **{key: reader.need(key) for key in keys},
        "intermediate_size": reader.need("ff_intermediate_size"),
        "rms_norm_eps": reader.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": reader.get("tie_word_embeddings", True),
        "rope": asdict(rope),
        "phi3_small": asdict(small) | {"hidden_tokens": reader.get("dummy_token_indices", ())},
    }
    return ModelConfig(decoder=parse(DecoderConfig, fields, reader.where))


def _write_small(config: ModelConfig) -> dict[str, Any]:
    sizes, small = config.decoder, config.decoder.phi3_small
    if small is None or config.vision or config.speech:
        raise ConfigError("the layout 'phi3small' holds Phi-3-small decoders alone")
    rope = _write_rope(sizes.rope, two_scales=True)
    return {
        "model_type": "phi3small",
        "architectures": ["Phi3SmallForCausalLM"],
        **{key: getattr(sizes, key) for key in _DECODER if key not in ("intermediate_size", "rms_norm_eps")},
        "ff_intermediate_size": sizes.intermediate_size,
        "layer_norm_epsilon": sizes.rms_norm_eps,
        "tie_word_embeddings": sizes.tie_word_embeddings,
        "hidden_act": "gegelu",
        "gegelu_limit": small.gegelu_limit,
        "mup_use_scaling": True,
        "mup_embedding_multiplier": small.embedding_scale,
        "mup_attn_multiplier": small.attention_scale,
        "mup_width_multiplier": small.logit_scale,
        "blocksparse_block_size": small.blocks.block,
        "blocksparse_num_local_blocks": small.blocks.local,
        "blocksparse_vert_stride": small.blocks.stride,
        "blocksparse_homo_head_pattern": False,
        "dense_attention_every_n_layers": small.dense_every,
        "dummy_token_indices": list(small.hidden_tokens),
        "rope_embedding_base": rope.pop("rope_theta"),
        **rope,
    }


def _read_phi3(reader: Reader) -> ModelConfig:
    return ModelConfig(decoder=_read_decoder(reader))


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    _no_small(config, "phi3")
    return {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **_write_decoder(config.decoder)}


# What the released networks have and these have no setting for.
_SPEECH_FIXED: dict[str, Any] = {
    "activation": "swish", "conv_activation": "swish", "conv_glu_type": "swish", "chunk_size": -1, "time_reduction": 8,
    "depthwise_multiplier": 1,
}  # fmt: skip
_SPEECH_FREE = ("left_chunk", "feature_layer", "initializer_range")  # read by nothing when chunk_size is -1
_EMBD_IMAGE = {
    "embedding_cls": "tune_image", "use_hd_transform": True, "with_learnable_separator": True,
    "hd_transform_order": "sub_glb", "projection_cls": "mlp", "image_token_compression_cls": "avg_pool_2d",
}  # fmt: skip
_EMBD_AUDIO = {
    "embedding_cls": "audio", "projection_cls": "mlp", "compression_rate": 8, "downsample_rate": 1,
    "use_qformer": False, "use_conv_downsample": False,
}  # fmt: skip
_TARGETS = r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))"


def _read_official(reader: Reader) -> ModelConfig:
    adapters = {}
    for name in ("vision", "speech"):
        lora = reader.inner(f"{name}_lora")
        lora.get("layer")
        adapters[name] = LoraConfig(
            r=lora.need("r"), lora_alpha=float(lora.need("lora_alpha")), lora_dropout=float(lora.get("dp", 0.0))
        )
        lora.finish()
    layers = reader.inner("embd_layer")
    layers.must(embedding_cls="image_audio")
    image, audio = layers.inner("image_embd_layer"), layers.inner("audio_embd_layer")
    image.must(**_EMBD_IMAGE)
    image.must(enable_gradient_checkpointing=(True, False))
    audio.must(**_EMBD_AUDIO)
    audio.must(enable_gradient_checkpointing=(True, False))
    # The released code fixes the tower's sizes; other sizes stand under a key of our own, which it ignores.
    tower = {**(image.get("modalora") or {}), "crop": image.get("crop_size", 448)}
    vision = parse(VisionConfig, tower, image.where)
    processor = reader.inner("audio_processor")
    processor.must(name="cascades")
    sound = processor.inner("config")
    bias = sound.inner("relative_attention_bias_args")
    bias.must(type="t5")
    nemo = sound.inner("nemo_conv_settings")
    sound.must(**_SPEECH_FIXED)
    sound.must(causal=True, input_layer="nemo_conv", bias_in_glu=True, batch_norm=False, cnn_layer_norm=True)
    for key in (*_SPEECH_FREE, "encoder_embedding_config", "activation_checkpointing", "modalora"):
        sound.get(key)
    width, reach = sound.need("attention_dim"), bias.need("t5_bias_max_distance")
    sound.must(depthwise_seperable_out_channel=width, ext_pw_out_channel=width, ext_pw_kernel_size=1)
    sizes = sound.sizes(
        mels="input_size", hidden_size="attention_dim", intermediate_size="linear_units", num_blocks="num_blocks",
        num_attention_heads="attention_heads", kernel_size="kernel_size",
    )  # fmt: skip
    own = {"segment": 500, **(sound.get("modalora") or {})}
    sizes |= {"subsampling_channels": nemo.need("conv_channels"), "bias_max_distance": reach, **own}
    for inner in (bias, nemo, sound, processor, image, audio, layers):
        inner.finish()
    for key in ("embd_layer", "audio_processor", "img_processor", "vision_lora", "speech_lora"):
        reader.get(key)
    reader.must(img_processor=None)
    return ModelConfig(
        decoder=_read_decoder(reader),
        vision=vision,
        speech=parse(SpeechConfig, sizes, sound.where),
        adapters=adapters,
    )


def _write_official(config: ModelConfig) -> dict[str, Any]:
    vision, speech = _both(config, "phi4mm")
    _need_factor_of_windows(config.decoder.rope)
    if set(config.adapters) != {"vision", "speech"}:
        raise ConfigError(
            "the layout 'phi4mm' holds the adapters vision and speech; this model has "
            f"{', '.join(config.adapters) or 'none'}"
        )
    own = {
        key: value for key, value in asdict(vision).items() if key != "crop" and value != getattr(VisionConfig(), key)
    }
    width = speech.hidden_size
    sound = {
        **_SPEECH_FIXED, "left_chunk": 18, "causal": True, "input_layer": "nemo_conv", "bias_in_glu": True,
        "batch_norm": False, "cnn_layer_norm": True, "dropout_rate": 0.0, "input_size": speech.mels,
        "attention_dim": width, "attention_heads": speech.num_attention_heads, "linear_units": speech.intermediate_size,
        "num_blocks": speech.num_blocks, "kernel_size": speech.kernel_size, "depthwise_seperable_out_channel": width,
        "ext_pw_out_channel": width, "ext_pw_kernel_size": 1,
        "encoder_embedding_config": {"input_size": speech.mels},
        "nemo_conv_settings": {"conv_channels": speech.subsampling_channels},
        "relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": speech.bias_max_distance},
    }  # fmt: skip
    if speech.segment != 500:
        sound["modalora"] = {"segment": speech.segment}
    image = {**_EMBD_IMAGE, "crop_size": vision.crop, "enable_gradient_checkpointing": True}
    audio = {**_EMBD_AUDIO, "enable_gradient_checkpointing": True}
    return {
        "model_type": "phi4mm",
        "architectures": ["Phi4MMForCausalLM"],
        **_write_decoder(config.decoder),
        "embd_layer": {
            "embedding_cls": "image_audio",
            "image_embd_layer": {**image, "modalora": own} if own else image,
            "audio_embd_layer": audio,
        },
        "audio_processor": {"name": "cascades", "config": sound},
        **{
            f"{name}_lora": {"r": lora.r, "lora_alpha": lora.lora_alpha, "dp": lora.lora_dropout, "layer": _TARGETS}
            for name, lora in config.adapters.items()
        },
    }


def _read_native(reader: Reader) -> ModelConfig:
    image, sound = reader.inner("vision_config"), reader.inner("audio_config")
    image.must(hidden_act="gelu_pytorch_tanh", num_channels=3, feature_layer=-2)
    crop = image.get("crop_size", 448)
    image.must(image_size=crop)
    image.get("image_token_id")  # compared with the tokenizer when the model is loaded, as audio_token_id is
    tower = image.sizes(
        hidden_size="hidden_size", intermediate_size="intermediate_size", num_hidden_layers="num_hidden_layers",
        num_attention_heads="num_attention_heads", patch="patch_size", layer_norm_eps="layer_norm_eps",
    )  # fmt: skip
    sound.must(**_SPEECH_FIXED)
    sound.must(nemo_activation="relu", bias_symmetric=False, downsample_rate=1)
    width, reach = sound.get("hidden_size", 1024), sound.get("bias_max_distance", 1000)
    sound.must(depthwise_separable_out_channel=width, ext_pw_out_channel=width)
    for key in (*_SPEECH_FREE, "audio_token_id", "nemo_final_size"):
        sound.get(key)
    sizes = sound.sizes(
        mels="input_size", hidden_size="hidden_size", intermediate_size="intermediate_size", num_blocks="num_blocks",
        num_attention_heads="num_attention_heads", kernel_size="kernel_size",
        subsampling_channels="nemo_conv_channels",
    )  # fmt: skip
    image.finish()
    sound.finish()
    return ModelConfig(
        decoder=_read_decoder(reader),
        vision=parse(VisionConfig, {**tower, "crop": crop}, image.where),
        speech=parse(SpeechConfig, {**sizes, "bias_max_distance": reach, "segment": 500}, sound.where),
    )


def _write_native(config: ModelConfig) -> dict[str, Any]:
    vision, speech = _both(config, "phi4_multimodal")
    return {
        "model_type": "phi4_multimodal",
        "architectures": ["Phi4MultimodalForCausalLM"],
        **_write_decoder(config.decoder),
        "vision_config": {
            "model_type": "phi4_multimodal_vision",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.crop,
            "crop_size": vision.crop,
            "patch_size": vision.patch,
            "layer_norm_eps": vision.layer_norm_eps,
            "feature_layer": -2,
        },
        "audio_config": {
            "model_type": "phi4_multimodal_audio",
            **_SPEECH_FIXED,
            "hidden_size": speech.hidden_size,
            "intermediate_size": speech.intermediate_size,
            "num_blocks": speech.num_blocks,
            "num_attention_heads": speech.num_attention_heads,
            "input_size": speech.mels,
            "kernel_size": speech.kernel_size,
            "nemo_conv_channels": speech.subsampling_channels,
            "ext_pw_out_channel": speech.hidden_size,
            "depthwise_separable_out_channel": speech.hidden_size,
            "bias_max_distance": speech.bias_max_distance,
        },
    }


def _both(config: ModelConfig, layout: str) -> tuple[VisionConfig, SpeechConfig]:
    _no_small(config, layout)
    if config.vision is None or config.speech is None:
        raise ConfigError(f"the layout {layout!r} holds a picture and a sound encoder, and this model lacks one")
    return config.vision, config.speech


def _no_small(config: ModelConfig, layout: str) -> None:
    if config.decoder.phi3_small is not None:
        raise ConfigError(f"the layout {layout!r} cannot express a Phi-3-small decoder")
    if layout == "phi3" and (config.vision or config.speech):
        raise ConfigError("the layout 'phi3' holds a decoder alone, and this model has encoders")


_READERS: dict[str, Callable[[Reader], ModelConfig]] = {
    "phi3": _read_phi3,
    "phi3small": _read_small,
    "phi4mm": _read_official,
    "phi4_multimodal": _read_native,
}
_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "phi3": _write_phi3,
    "phi3small": _write_small,
    "phi4mm": _write_official,
    "phi4_multimodal": _write_native,
}
