"""adapter_config.json, as PEFT writes it -> LoraConfig; what the decoder's Linears are called there.

`places` are the Linears of a decoder, and how the published code has each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modalora.checkpoint.names import Stored
from modalora.config import parse
from modalora.errors import CheckpointError, ConfigError
from modalora.nn.lora import LoraConfig, check_pattern

LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of other architectures, and of copies like them
# What these networks have no place for, and why it is not left out.
_REFUSED = {
    "use_dora": "DoRA scales every row of the merged weight, which a routed row cannot do without merging",
    "lora_bias": "the adapter adds biases",
    "layer_replication": "the adapter repeats layers",
    "exclude_modules": "the adapter leaves modules out by name",
    "trainable_token_indices": "the adapter brings embeddings of its own",
    "target_parameters": "the adapter targets bare parameters",
    "use_qalora": "QA-LoRA pools the inputs",
    "alora_invocation_tokens": "the adapter starts in the middle of a row",
    "arrow_config": "the adapter routes between experts",
    "corda_config": "the base weights were changed with it",
    "kasa_config": "KaSA takes small singular values out of the base, and scales the ranks",
    "monteclora_config": "MonteCLoRA brings a sampler of its own",
    "velora_config": "VeLoRA brings projections of its own",
    "use_bdlora": "the matrices are block-diagonal",
}
# PEFT's keys that are read, or change no number when an adapter is used.
_KNOWN = frozenset(
    """alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying eva_config fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_dtype
    lora_ga_config lorap_emb_lr lorap_lr_ratio megatron_config megatron_core modules_to_save peft_type peft_version
    qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_rslora""".split()
)
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that take W - s B A for W


def read_config(path: Path, fields: Mapping[str, Any], places: Mapping[str, Stored]) -> LoraConfig:
    """Return the size of the adapter that the fields of the file describe. Raises CheckpointError."""
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} has peft_type={fields.get('peft_type')!r}; LORA is read")
    if fields.get("bias", "none") != "none":
        raise CheckpointError(f"{path} has bias={fields['bias']!r}: biases of the base were trained; 'none' is read")
    if unknown := sorted(key for key in set(fields) - _KNOWN - set(_REFUSED) if fields[key]):
        raise CheckpointError(
            f"{path} has {unknown[0]!r:.60}={fields[unknown[0]]!r:.60}, which is not known here; if it changes "
            "nothing, remove it from the file"
        )
    for key, reason in _REFUSED.items():
        if fields.get(key):
            raise CheckpointError(
                f"{path} has {key}={fields[key]!r:.60}: {reason}; merge it with PEFT, or train without"
            )
    if str(start := fields.get("init_lora_weights")).lower().startswith(_CHANGE_BASE):
        raise CheckpointError(
            f"{path} has init_lora_weights={start!r:.60}: the base weights were changed with it, so the adapter does "
            "not fit the base as it was; convert it with PEFT (path_initial_model_for_weight_conversion of "
            "save_pretrained)"
        )
    if not {"r", "lora_alpha"} <= set(fields):
        raise CheckpointError(f"{path} has no r or no lora_alpha; PEFT writes both")
    size = {
        "r": fields["r"],
        "lora_alpha": fields["lora_alpha"],
        "lora_dropout": fields.get("lora_dropout", 0.0),
        "use_rslora": fields.get("use_rslora", False),
        "target_modules": _targets(fields, places, path),
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
    }
    try:
        config = parse(LoraConfig, size, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return with_patterns(config, {told.module: f"model.{place}" for place, told in places.items()})


def with_patterns(config: LoraConfig, names: Mapping[str, str]) -> LoraConfig:
    """Return the config with its patterns, which are of the modules' old names, for new ones; names: old -> new."""
    if all(old == new for old, new in names.items()):
        return config
    sizes = {re.escape(new): config.at(old) for old, new in names.items()}
    return replace(
        config,
        rank_pattern={new: one.r for new, one in sizes.items() if one.r != config.r},
        alpha_pattern={new: one.lora_alpha for new, one in sizes.items() if one.lora_alpha != config.lora_alpha},
    )


def _targets(fields: Mapping[str, Any], linears: Mapping[str, Stored], path: Path) -> tuple[str, ...]:
    """Return the ends of module names that PEFT's settings mean here; empty: all Linears."""
    targets, layers = fields.get("target_modules"), fields.get("layers_to_transform")
    if targets in ("all-linear", None):
        places = list(linears)
    elif isinstance(targets, str):  # a regular expression for the whole name
        try:
            check_pattern(targets)
            places = [place for place, told in linears.items() if re.fullmatch(targets, told.module)]
        except ConfigError as error:
            raise CheckpointError(f"{path}: target_modules: {error}") from None
    elif isinstance(targets, Sequence) and all(isinstance(one, str) for one in targets):
        places = [
            place for place, told in linears.items() if any(f".{told.module}".endswith(f".{one}") for one in targets)
        ]
    else:
        raise CheckpointError(f"{path}: target_modules={targets!r:.80} must be names or a regular expression")
    if layers not in (None, []):  # PEFT takes an empty list for all layers, and a name in full in any layer
        pattern = fields.get("layers_pattern")
        if pattern and pattern != "layers" and pattern != ["layers"]:
            raise CheckpointError(f"{path}: layers_pattern={pattern!r:.60}; the layers of this decoder are in 'layers'")
        numbers = {str(layer) for layer in (layers if isinstance(layers, list) else [layers])}
        full = set() if isinstance(targets, str) else {*_listed(targets)}
        places = [one for one in places if one.split(".")[1] in numbers or linears[one].module in full]
    if not places:
        raise CheckpointError(
            f"{path}: target_modules={targets!r:.80} name no Linear of this decoder, which has "
            f"{', '.join(kinds(linears))} in every layer; "
            f"{stranger([f'.{one}.' for one in _listed(targets)], linears, 'it was trained on another architecture')}"
        )
    return shortest(places, linears)


def _listed(targets: Any) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets or ())


def kinds(places: Mapping[str, Stored]) -> list[str]:
    """Return what the published code calls the Linears of a layer."""
    return list(dict.fromkeys(told.module.split(".", 3)[3] for told in places.values()))


def stranger(keys: Sequence[str], places: Mapping[str, Stored], otherwise: str = "") -> str:
    """Return in words why an adapter's names are none of this decoder's; otherwise: if nothing is known of them."""
    if any(f".{one}." in key for key in keys for one in ("lm_head", "embed_tokens")):
        return (
            "LoRA on embeddings or on the output matrix would change rows of every route; train it on the Linears alone"
        )
    if any(".embed_tokens_extend." in key for key in keys):
        return "LoRA on encoders would change rows of every route; train the decoder's Linears alone"
    if split := split_matrices(keys, places):
        return f"it was trained on a copy whose {split}; train it on the published model"
    return otherwise or f"keys look like base_model.model.{next(iter(places.values())).module}.lora_A.weight"


def split_matrices(keys: Sequence[str], places: Mapping[str, Stored]) -> str:
    """Return in words that names are of matrices which are one in the published code, whose Linears `places` are."""
    own = kinds(places)
    split = [one for one in _SPLIT if not any(kind.endswith(f".{one}") for kind in own)]
    if any(f".{one}." in key for key in keys for one in split):
        return f"matrices are split (q_proj, gate_proj and so on), which are one here: {', '.join(own)}"
    return ""


def shortest(places: Sequence[str], linears: Mapping[str, Any]) -> tuple[str, ...]:
    """Name modules by their kind where all layers are meant, else one by one; empty: all Linears."""
    if len(places) == len(linears):
        return ()
    meant = [kind for kind in LINEARS if all(place in places for place in linears if place.endswith(kind))]
    return (*meant, *(place for place in places if not place.endswith(tuple(meant))))
