"""The independent reference: transformers' Phi-3 and Phi-4-Multimodal with PEFT, around its listed defects.

transformers 5.23 runs its vision tower causally under SDPA when a mask is full (so: eager), does not mask padded
sound (so: one sound at a time) and does not route (so: the adapter is set by hand). Weights are random at unit scale: a
slip of 1e-3 anywhere then shows in the logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

from peft import LoraConfig
from transformers import Phi3Config, Phi3ForCausalLM, Phi4MultimodalConfig, Phi4MultimodalForCausalLM
from transformers.utils import logging

from modalora.contracts import Batch
from modalora.models.multimodal import Multimodal
from modalora.processing.tokenizer import PLACEHOLDERS, TextTokenizer

logging.disable_progress_bar()
VOCAB = 320
TARGETS = r"model\.layers\.\d+\.((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up_proj|down_proj)))"  # of LoRA


def tokenizer() -> TextTokenizer:
    """Return a small tokenizer with Phi's control tokens."""
    return TextTokenizer.train(
        ["the quick brown fox jumps over the lazy dog, seven blue boxes touch the wall. " * 4], VOCAB
    )


def spread(model: nn.Module, seed: int) -> None:
    """Draw every weight so that activations stay near one and nothing agrees by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "global_invstd" in name:
                tensor.copy_(0.2 + 0.02 * noise)
            elif "global_mean" in name:
                tensor.copy_(12 + noise)
            elif "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif any(part in name for part in ("extensor", "position_embedding", "bias_values")):
                tensor.copy_(0.5 * noise)
            elif "embed_tokens.weight" in name:  # tied: logits of a normed state come out near one
                tensor.copy_(noise * tensor.shape[1] ** -0.5)
            elif tensor.ndim >= 2 and name.endswith("weight"):
                tensor.copy_(noise * tensor[0].numel() ** -0.5)
            else:
                tensor.copy_(0.1 * noise)


def draw_rope(rng: Any, pairs: int, window: int, *, plain: float = 0.3) -> dict[str, Any]:
    """Return rope parameters of one of the published kinds. plain: how often the unscaled one."""
    rope = {"rope_theta": float(rng.choice([10_000.0, 500_000.0]))}
    if rng.random() < plain:
        return {**rope, "rope_type": "default"}
    return {
        **rope,
        "rope_type": "longrope",
        "short_factor": [float(x) for x in 1 + 0.1 * rng.random(pairs)],
        "long_factor": [float(x) for x in 1 + 30 * rng.random(pairs)],
        "original_max_position_embeddings": window,
    }


def text_config(rng: Any, **fixed: Any) -> Phi3Config:
    """Return a random small Phi-3 config; `fixed` sets values."""
    kv_heads = int(rng.choice([1, 2, 4]))
    heads, head_dim = kv_heads * int(rng.choice([1, 2, 3])), int(rng.choice([16, 32]))
    share = float(rng.choice([1.0, 0.75, 0.5]))
    window = int(rng.choice([32, 64]))
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": heads * head_dim,
        "intermediate_size": int(rng.integers(2, 6)) * 24,
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": float(rng.choice([1e-5, 1e-6])),
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": window,
        "rope_parameters": {**draw_rope(rng, int(head_dim * share) // 2, window), "partial_rotary_factor": share},
        "tie_word_embeddings": bool(rng.random() < 0.5),
        "sliding_window": [None, 4096, 23][int(rng.integers(3))],
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attn_implementation": "eager",
    }
    return Phi3Config(**{**fields, **fixed})


def text_model(config: Phi3Config, seed: int) -> Phi3ForCausalLM:
    """Return the reference's text model with random weights."""
    model = Phi3ForCausalLM(config).eval()
    spread(model, seed)
    return model


def multimodal_config(rng: Any, words: TextTokenizer, **fixed: Any) -> Phi4MultimodalConfig:
    """Return a random small Phi-4-Multimodal config; `fixed` sets values."""
    text = text_config(rng).to_dict()
    keep = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "rms_norm_eps max_position_embeddings original_max_position_embeddings rope_parameters tie_word_embeddings "
        "sliding_window pad_token_id bos_token_id eos_token_id"
    ).split()
    crop = int(rng.choice([56, 112]))
    sound = 8 * int(rng.choice([4, 6]))
    fields = {
        **{key: text[key] for key in keep},
        "vision_config": {
            "hidden_size": 8 * int(rng.choice([3, 4])),
            "intermediate_size": 40,
            "num_hidden_layers": int(rng.integers(2, 5)),
            "num_attention_heads": 2,
            "image_size": crop,
            "crop_size": crop,
            "patch_size": 14,
            "image_token_id": words.control(PLACEHOLDERS["image"]),
        },
        "audio_config": {
            "hidden_size": sound,
            "ext_pw_out_channel": sound,
            "depthwise_separable_out_channel": sound,
            "intermediate_size": 36,
            "num_blocks": int(rng.integers(1, 4)),
            "num_attention_heads": 4,
            "nemo_conv_channels": 12,
            "bias_max_distance": 500,
            "audio_token_id": words.control(PLACEHOLDERS["audio"]),
        },
    }
    return Phi4MultimodalConfig(**{**fields, **fixed}, attn_implementation="eager")


def multimodal_model(config: Phi4MultimodalConfig, seed: int) -> Phi4MultimodalForCausalLM:
    """Return the reference's multimodal model with random weights, eager attention throughout."""
    model = Phi4MultimodalForCausalLM._from_config(config, attn_implementation="eager").eval()
    spread(model, seed)
    return model


def add_loras(
    model: Any, seed: int, ranks: Mapping[str, tuple[int, int]] = {"vision": (8, 16), "speech": (5, 10)}
) -> None:
    """Add random LoRA adapters with PEFT, as the native layout has them; they start disabled."""
    generator = torch.Generator().manual_seed(seed)
    for name, (r, alpha) in ranks.items():
        model.add_adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=TARGETS), name)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".lora_" in name:  # A as wide as PEFT draws it, from numbers that no test seeds
                width = tensor.shape[1] * (3 if "lora_A" in name else 1)
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * width**-0.5)
    model.disable_adapters()


def save(model: Any, folder: Path, words: TextTokenizer) -> Path:
    """Write the reference model as transformers does, its adapters in folders beside; return the folder."""
    adapters = list(getattr(model, "peft_config", {}))
    if adapters:
        plain = type(model)(model.config).eval()
        plain.load_state_dict(
            {
                name.replace(".base_layer", ""): tensor
                for name, tensor in model.state_dict().items()
                if "lora_" not in name
            }
        )
        plain.save_pretrained(folder)
        for name in adapters:
            model.enable_adapters()
            model.set_adapter(name)
            model.save_pretrained(folder / f"{name}-lora")
        model.disable_adapters()
    else:
        model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(words.definition)
    return folder


@dataclass
class Run:
    """What the reference gives for one row: logits (time, vocab), hidden states per layer (time, width)."""

    logits: Tensor
    hidden: list[Tensor]


@torch.no_grad()
def run(model: Any, batch: Batch) -> Run:
    """Run a batch of one row on the reference, its media encoded one at a time, its adapter set by hand."""
    (adapter,) = batch.route.adapters
    if getattr(model, "peft_config", None):
        if adapter is None:
            model.disable_adapters()
        else:
            model.enable_adapters()
            model.set_adapter(adapter)
    embeds = model.get_input_embeddings()(batch.input_ids)
    for item in batch.media:
        span = slice(item.start, item.start + item.tokens)
        embeds[0, span] = IMAGE_OR_SOUND[item.modality](model, item, batch)[0, span]
    output = model.model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
    return Run(model.lm_head(output.last_hidden_state)[0], [state[0] for state in output.hidden_states])


@torch.no_grad()
def states(model: Multimodal, batch: Batch) -> list[Tensor]:
    """Return what our model gives every layer, and what comes out after the last norm, as `Run.hidden` holds them."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in model.decoder.layers]
    seen.append(model.hidden(batch))
    for hook in hooks:
        hook.remove()
    return seen


def _image(model: Any, item: Any, batch: Batch) -> Tensor:
    crop = model.config.vision_config.crop_size
    return model.model.embed_tokens_extend.image_embed(
        _only(batch, item),
        _nothing(model, batch),
        image_pixel_values=item.features["pixels"][None].to(model.dtype),
        image_sizes=(item.features["grid"] * crop)[None],
        image_attention_mask=item.features["mask"][None],
    )


def _sound(model: Any, item: Any, batch: Batch) -> Tensor:
    return model.model.embed_tokens_extend.audio_embed(
        _only(batch, item),
        _nothing(model, batch),
        audio_input_features=item.features["mel"][None].to(model.dtype),
        audio_embed_sizes=torch.tensor([item.tokens], device=batch.input_ids.device),
        audio_projection_mode=item.branch,
    )


def _nothing(model: Any, batch: Batch) -> Tensor:
    size = 1, batch.input_ids.shape[1], model.config.hidden_size
    return torch.zeros(size, device=batch.input_ids.device, dtype=model.dtype)


def _only(batch: Batch, item: Any) -> Tensor:
    """Return the row's ids with no placeholder but those of one image or sound."""
    ids = torch.zeros_like(batch.input_ids)
    span = slice(item.start, item.start + item.tokens)
    ids[0, span] = batch.input_ids[0, span]
    return ids


# each takes the model, an item and its batch; embeddings (1, time, width), right at the item's span
IMAGE_OR_SOUND: dict[str, Callable[[Any, Any, Batch], Tensor]] = {"image": _image, "audio": _sound}
