"""LoRA adapters in PEFT's folder layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modalora.checkpoint.store import read_json, write_folder, write_json
from modalora.config import parse
from modalora.errors import CheckpointError, ConfigError
from modalora.models.multimodal import Multimodal
from modalora.nn.lora import LoraConfig, RoutedLinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What a plain LoRA has under each key; anything else would change the numbers and be dropped silently.
_PLAIN = {
    "peft_type": "LORA",
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": [],
}
_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_NAME = re.compile(r"[A-Za-z0-9][\w-]*", re.ASCII)
# Published adapters differ in the prefix and in whether the adapter's name stands inside the key.
_KEY = re.compile(r"(?:base_model\.model\.)?model\.(layers\.\d+\.[\w.]+?)\.(lora_[AB])\.(?:[\w-]+\.)?weight")


def save_adapter(model: Multimodal, name: str, folder: Path) -> None:
    """Write one adapter as a new PEFT folder."""
    config = _config(model, name)
    tensors = {
        f"base_model.model.model.{place}.lora_{side}.weight": getattr(linear, f"lora_{side}")[name]
        .detach()
        .cpu()
        .contiguous()
        for place, linear in _linears(model).items()
        for side in "AB"
    }
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": [linear.rsplit(".", 1)[1] for linear in _LINEARS],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }

    def fill(draft: Path) -> None:
        write_json(draft / CONFIG, fields)
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})

    write_folder(folder, fill)


def load_adapter(model: Multimodal, folder: Path, name: str) -> None:
    """Add a PEFT LoRA folder to the decoder under a new name.

    Raises CheckpointError when the name is taken, the folder is not plain LoRA for this decoder, or tensors are
    missing, unknown or of another shape; the model is then as before.
    """
    if name in model.config.adapters or name in ("auto", "none"):
        raise CheckpointError(f"the adapter name {name!r} is taken; choose another")
    if not _NAME.fullmatch(name) or hasattr(nn.ParameterDict(), name):
        raise CheckpointError(f"{name!r} cannot name an adapter; use letters, digits, - and _, such as 'my-style'")
    fields = read_json(folder / CONFIG)
    for key, plain in _PLAIN.items():
        if (fields.get(key) or plain) != plain:
            raise CheckpointError(f"{folder / CONFIG} has {key}={fields[key]!r}; only {key}={plain!r} is read")
    try:
        size = {key: fields[key] for key in ("r", "lora_alpha")} | {"lora_dropout": fields.get("lora_dropout", 0.0)}
        config = parse(LoraConfig, size, str(folder / CONFIG))
        stored = load_file(folder / WEIGHTS)
    except KeyError as error:
        raise CheckpointError(f"{folder / CONFIG} has no {error}; PEFT writes it") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from None
    given: dict[tuple[str, str], Tensor] = {}
    unknown: list[str] = []
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key)
        if match:
            given[match.group(1), match.group(2)] = tensor
        else:
            unknown.append(key)
    linears = _linears(model)
    expected = {(place, side) for place in linears for side in ("lora_A", "lora_B")}
    missing = sorted(".".join(pair) for pair in expected - set(given))
    unknown += sorted(".".join(pair) for pair in set(given) - expected)
    if missing or unknown:
        raise CheckpointError(
            f"{folder} does not fit this decoder: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}"
        )
    for (place, side), tensor in given.items():
        rows, columns = linears[place].weight.shape
        shape = (config.r, columns) if side == "lora_A" else (rows, config.r)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{folder}: {place}.{side} has shape {list(tensor.shape)}, this decoder needs {list(shape)}"
            )
    with torch.no_grad():
        for place, linear in linears.items():
            linear.add_adapter(name, config)
            for side, held in (("lora_A", linear.lora_A), ("lora_B", linear.lora_B)):
                held[name] = nn.Parameter(given[place, side].to(linear.weight))  # in the dtype that the model runs in
    model.config = replace(model.config, adapters={**model.config.adapters, name: config})


def _linears(model: Multimodal) -> dict[str, RoutedLinear]:
    found = {name: module for name, module in model.decoder.named_modules() if isinstance(module, RoutedLinear)}
    return {name: module for name, module in found.items() if name.endswith(_LINEARS)}


def _config(model: Multimodal, name: str) -> LoraConfig:
    if name not in model.config.adapters:
        raise CheckpointError(f"no adapter {name!r}; this model has {', '.join(model.config.adapters) or 'none'}")
    return model.config.adapters[name]
