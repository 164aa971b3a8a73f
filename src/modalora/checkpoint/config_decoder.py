"""config.json of published decoders, Phi-3 to Phi-4-mini and Phi-3-small <-> ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from modalora.checkpoint.config_keys import Fields, Reader
from modalora.config import parse
from modalora.errors import ConfigError
from modalora.models.decoder import DecoderConfig, Phi3Small
from modalora.models.multimodal import ModelConfig
from modalora.nn.mask import BlockSparse
from modalora.nn.rope import DynamicNtk, LongRope, Plain, Rope, from_hf

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
    rope = as_written(rope)
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


def as_written(rope: Rope) -> Rope:
    """Return the rope as files tell it: a temperature by its number."""
    if isinstance(rope, LongRope) and rope.temperature != "su":
        return replace(rope, temperature="su", mscale=(rope.attention_factor(), rope.attention_factor(long=True)))
    return rope


_ORIGINAL = 4096  # original window of a Phi model whose config tells none, in transformers and in the released code
_DECODER = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps",
)  # fmt: skip


def read_decoder(reader: Reader) -> DecoderConfig:
    """Return the decoder of a Phi-3, Phi-4-mini or Phi-4-Multimodal. Raises ConfigError, as all of these do."""
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


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """Return the keys of a decoder."""
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


def read_small(reader: Reader) -> ModelConfig:
    """Return a Phi-3-small."""
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


def write_small(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Phi-3-small."""
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


def read_phi3(reader: Reader) -> ModelConfig:
    """Return a decoder without encoders."""
    return ModelConfig(decoder=read_decoder(reader))


def write_phi3(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a decoder without encoders."""
    no_small(config, "phi3")
    return {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **write_decoder(config.decoder)}


def no_small(config: ModelConfig, layout: str) -> None:
    """Refuse what a layout has no place for: a Phi-3-small, and encoders in 'phi3'. Raises ConfigError."""
    if config.decoder.phi3_small is not None:
        raise ConfigError(f"the layout {layout!r} cannot express a Phi-3-small decoder")
    if layout == "phi3" and (config.vision or config.speech):
        raise ConfigError("the layout 'phi3' holds a decoder alone, and this model has encoders")
