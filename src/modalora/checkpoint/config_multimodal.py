"""config.json of Phi-4-Multimodal, as released and in transformers' own layout <-> ModelConfig."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from modalora.checkpoint.config_decoder import no_small, read_decoder, write_decoder
from modalora.checkpoint.config_keys import Reader
from modalora.config import parse
from modalora.errors import ConfigError
from modalora.models.multimodal import ModelConfig
from modalora.models.speech import SpeechConfig
from modalora.models.vision import VisionConfig
from modalora.nn.lora import LoraConfig
from modalora.nn.rope import LongRope, Rope, su_temperature

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


def read_official(reader: Reader) -> ModelConfig:
    """Return a Phi-4-Multimodal as it was released."""
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
        decoder=read_decoder(reader),
        vision=vision,
        speech=parse(SpeechConfig, sizes, sound.where),
        adapters=adapters,
    )


def write_official(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Phi-4-Multimodal as it was released."""
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
        **write_decoder(config.decoder),
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


def read_native(reader: Reader) -> ModelConfig:
    """Return a Phi-4-Multimodal as transformers has it."""
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
        decoder=read_decoder(reader),
        vision=parse(VisionConfig, {**tower, "crop": crop}, image.where),
        speech=parse(SpeechConfig, {**sizes, "bias_max_distance": reach, "segment": 500}, sound.where),
    )


def write_native(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Phi-4-Multimodal as transformers has it."""
    vision, speech = _both(config, "phi4_multimodal")
    return {
        "model_type": "phi4_multimodal",
        "architectures": ["Phi4MultimodalForCausalLM"],
        **write_decoder(config.decoder),
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
    no_small(config, layout)
    if config.vision is None or config.speech is None:
        raise ConfigError(f"the layout {layout!r} holds a picture and a sound encoder, and this model lacks one")
    return config.vision, config.speech


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
