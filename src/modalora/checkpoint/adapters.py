"""LoRA adapters in PEFT's folder layout, adapter_config.json and adapter_model.safetensors: read, written, judged.

Read are LoRA on any of the decoder's Linears, rank-stabilised too, with ranks and alphas per module, and whole modules
(modules_to_save) where rows can be routed to them: projectors, and the encoder of a modality that the folder brings
(modality.json). What would change the numbers in another way (DoRA, biases, an output matrix of its own) is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modalora.checkpoint.adapter_config import LINEARS, kinds, read_config, stranger, with_patterns
from modalora.checkpoint.files import FLOATS, Weights, fitted, inside, sort_metadata, write_folder
from modalora.checkpoint.modules import MODALITY, Modules, add_modules, find_modules, modules_of, ready_modules
from modalora.checkpoint.names import Stored, plain_name, plan
from modalora.checkpoint.preserve import CERTIFICATE, Preservation
from modalora.contracts import Batch, Route
from modalora.disk import CONFIG_BYTES, read_json, write_json
from modalora.errors import CheckpointError, ConfigError
from modalora.models.multimodal import Multimodal
from modalora.nn.lora import LoraConfig, RoutedLinear, check_name
from modalora.nn.rope import Plain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NATIVE_FOLDERS = ("vision", "speech")  # NAME-lora beside the weights of transformers' Phi-4-Multimodal
_BASE = "modalora.base"  # metadata of the weights: the fingerprint of the model they were trained on
# Published adapters differ in the prefix and in whether the adapter's name stands inside the key.
_KEY = re.compile(r"model\.(layers\.\d+\.[\w.]+?)(?:\.base_layer)?\.(lora_[AB])\.(?:[\w-]+\.)?weight")


@dataclass(frozen=True)
class Verdict:
    """What loading an adapter found.

    consumed: tensors used; none is missing or left over, or loading would have failed. linears: how many of the
    decoder's Linears it changes, of how many. zero: those among them that it leaves as they are: A, B or alpha is zero.
    base: the name of the model that it was trained on, as its config has it. fingerprint: of this model; matched:
    whether the adapter has the same one. logit_change: largest change of a logit on a fixed probe of 16 tokens.
    modules: modalities and projectors that came along.
    """

    consumed: int
    linears: tuple[int, int]
    zero: tuple[str, ...]
    base: str | None
    fingerprint: str
    matched: bool | None
    logit_change: float
    modules: tuple[str, ...] = ()


def fingerprint(model: Multimodal) -> str:
    """Return 16 hexadecimal digits that tell decoders apart: of sizes, norms and a few rows of each matrix."""
    sizes = model.config.decoder
    window = sizes.sliding_window
    if window is not None and window >= sizes.rope.window:  # hides nothing
        window = None
    found = hashlib.sha256(repr(replace(sizes, rope=Plain(), sliding_window=window)).encode())
    some = {f"{place}.weight": linear.some_rows() for place, linear in model.decoder.routed().items()}
    for name, tensor in sorted(model.decoder.named_parameters()):
        if "lora_" not in name:
            rows = some.get(name, tensor if tensor.ndim == 1 else tensor[:: max(1, len(tensor) // 4)][:4])
            found.update(rows.detach().bfloat16().float().cpu().numpy().tobytes())  # the same in any dtype
    return found.hexdigest()[:16]


def save_adapter(
    model: Multimodal, name: str, folder: Path, certificate: Preservation | None = None, base: Path | None = None
) -> None:
    """Write one adapter as a new PEFT folder, which PEFT loads on transformers' Phi-3.

    certificate: of its base. base: the folder of that, in a published layout, which AutoPeftModel opens. The encoder
    and projectors of a modality whose rows use it, and projectors of its own, go with it.
    """
    check_plain(model)
    held = linears_of(model, name)
    config = model.config.adapters[name]
    places = places_of(model)
    tensors: dict[str, Tensor] = {}
    for place, linear in held.items():
        key = f"base_model.model.{places[place].module}"
        tensors[f"{key}.lora_A.weight"] = linear.lora_A[name].detach().cpu().contiguous()
        up = places[place].pair.to_theirs(linear.lora_B[name].detach(), model.config)
        tensors[f"{key}.lora_B.weight"] = up.cpu().contiguous()
    saved, modules, modality = modules_of(model, name)
    tensors |= {key: tensor.detach().cpu().contiguous() for key, tensor in saved.items()}
    small = model.config.decoder.phi3_small is not None
    if model.encoders or (small and config.target_modules):  # in full: Linears of encoders may end alike
        targets = [places[place].module for place in held]
    elif small:
        targets = kinds(places)
    else:
        targets = [end.rsplit(".", 1)[1] if end in LINEARS else end for end in config.target_modules or LINEARS]
    config = with_patterns(config, {f"model.{place}": told.module for place, told in places.items()})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()) if base else None,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": targets,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "use_dora": False,
        "inference_mode": True,
        **({"modules_to_save": modules} if modules else {}),
    }

    def fill(draft: Path) -> None:
        write_json(draft / CONFIG, fields)
        if modality:
            write_json(draft / MODALITY, modality)
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt", _BASE: fingerprint(model)})
        sort_metadata(draft / WEIGHTS)
        if certificate:
            write_json(draft / CERTIFICATE, asdict(certificate))

    write_folder(folder, fill, manifest=False)


@dataclass(frozen=True)
class _Found:
    """An adapter's folder, checked. at: size by place. tensors: by place and side."""

    config: LoraConfig
    at: Mapping[str, LoraConfig]
    tensors: Mapping[tuple[str, str], Tensor]
    zero: tuple[str, ...]
    modules: Modules
    weights: Weights
    base: str | None
    fingerprint: str
    matched: bool | None


def load_adapter(model: Multimodal, folder: Path, name: str) -> Verdict:
    """Add a PEFT LoRA folder to the decoder under a new name, with the modality or the projectors that it brings.

    Matrices of more bits than the model runs in are cast when they are used, so that saving, sums and merges have them
    unrounded. Raises CheckpointError when the name is taken, the folder is not LoRA for this decoder, tensors are
    missing, unknown or of another shape, a logit would not be finite, or the whole adapter changes nothing; the model
    is then as before.
    """
    found = _find(model, folder, name)
    if len(found.zero) == len(found.at) and not found.modules.names:
        raise CheckpointError(
            f"{folder}: lora_B is zero in all {len(found.zero)} Linears, or lora_A, or lora_alpha, so the adapter "
            "changes nothing: it was saved before training, or its training never reached it"
        )
    brought = ready_modules(model, found.modules, found.weights)
    _put(model, found, name, exact=not model.decoder.is_packed)  # what is packed cannot be saved
    change = logit_change(model, name)
    if not isfinite(change):
        for linear in model.decoder.routed().values():
            if name in linear.adapters:
                linear.drop_adapter(name)
        raise CheckpointError(
            f"{folder}: with this adapter logits of a probe of 16 tokens are not finite; its numbers are too large for "
            f"{model.decoder.embed_tokens.weight.dtype}, or its lora_alpha={found.config.lora_alpha:g} is"
        )
    model.config = replace(model.config, adapters={**model.config.adapters, name: found.config})
    add_modules(model, found.modules, brought, name)
    return Verdict(
        consumed=len(found.weights.entries),
        linears=(len(found.at), len(model.decoder.routed())),
        zero=found.zero,
        base=found.base,
        fingerprint=found.fingerprint,
        matched=found.matched,
        logit_change=change,
        modules=found.modules.names,
    )


def restore_adapter(
    model: Multimodal, folder: Path, name: str, *, as_stored: bool = False, exact: bool = False
) -> None:
    """Add an adapter that belongs to a model's own folder, untrained ones too; no logit is computed.

    as_stored: its tensors keep their dtype, whatever the model's. exact: its matrices are not rounded. Raises
    CheckpointError as `load_adapter` does.
    """
    found = _find(model, folder, name)
    brought = ready_modules(model, found.modules, found.weights, as_stored=as_stored)
    _put(model, found, name, as_stored=as_stored, exact=exact)
    model.config = replace(model.config, adapters={**model.config.adapters, name: found.config})
    add_modules(model, found.modules, brought, name)


def _find(model: Multimodal, folder: Path, name: str) -> _Found:
    """Return what an adapter's folder holds for this model. Raises CheckpointError."""
    check_free(model, name)
    path = _config_path(folder)
    fields = read_json(path, most=CONFIG_BYTES)
    linears, places = model.decoder.routed(), places_of(model)
    config = read_config(path, fields, places)
    weights = _weights(folder)
    given, others = _match(weights, places)
    modules = find_modules(model, folder, weights, others, fields.get("modules_to_save"), path)
    if unknown := modules.unknown:
        raise CheckpointError(
            f"{folder}: {len(unknown)} of {len(weights.entries)} tensors belong to no Linear of this decoder, such as "
            f"{unknown[0]!r}; {stranger(unknown, places)}"
        )
    found = {place: config.at(f"model.{place}") for place in linears if config.targets(f"model.{place}")}
    wanted = {(place, side) for place in found for side in "AB"}
    if unwanted := sorted(set(given) - wanted):
        place, side = unwanted[0]
        raise CheckpointError(f"{folder} holds {place}.lora_{side}, which the target_modules of its config leave out")
    if missing := sorted(wanted - set(given)):
        place, side = missing[0]
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(wanted)} tensors that its config promises are missing, such as "
            f"{place}.lora_{side}; the folder is half an adapter, copy it again or train it anew"
        )
    for (place, side), stored in given.items():
        rows, columns = linears[place].weight.shape
        entry, r = weights.entries[stored], found[place].r
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{folder}: {place}.lora_{side} has dtype {entry.dtype}; {', '.join(FLOATS)} are read"
            )
        if entry.shape != ((r, columns) if side == "A" else (rows, r)):
            raise CheckpointError(
                f"{folder}: {place}.lora_{side} has shape {list(entry.shape)}, and this decoder needs "
                f"{[r, columns] if side == 'A' else [rows, r]}: it was trained on another base model"
                f"{_base(fields)}, or its rank is not the config's"
            )
    own = fingerprint(model)
    told = weights.metadata.get(_BASE)
    if told not in (None, own):
        raise CheckpointError(
            f"{folder} was trained on another base model: its base has the fingerprint {told}, this one {own}"
            f"{_base(fields)}; load it on the model that it was trained on"
        )
    tensors = {at: weights.get(stored) for at, stored in given.items()}
    for (place, side), tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{folder}: {place}.lora_{side} holds numbers that are not finite; its training went wrong, train it "
                "anew or take an earlier state"
            )
        if side == "B":  # a published layout may have the rows in another order
            tensors[place, side] = places[place].pair.to_ours(tensor, model.config)
    idle = {place for (place, _), tensor in tensors.items() if not (tensor.any() and found[place].scaling)}
    return _Found(
        config, found, tensors, tuple(sorted(idle)), modules, weights,
        fields.get("base_model_name_or_path") or None, own, None if told is None else True,
    )  # fmt: skip


def _put(model: Multimodal, found: _Found, name: str, *, as_stored: bool = False, exact: bool = False) -> None:
    """Add the matrices, in the dtype that the model runs in; as_stored: in the file's; exact: in what holds both."""
    linears = model.decoder.routed()
    ready = {}
    for (place, side), tensor in found.tensors.items():
        runs_in = linears[place].weight.dtype
        cast = tensor if as_stored else fitted(tensor, runs_in, f"{found.weights.folder}: {place}.lora_{side}")
        ready[place, side] = tensor.to(torch.promote_types(tensor.dtype, runs_in)) if exact else cast
    for place, size in found.at.items():
        linear = linears[place]
        linear.add_adapter(name, size)
        for side, held in (("A", linear.lora_A), ("B", linear.lora_B)):
            held[name] = nn.Parameter(ready[place, side].to(linear.weight.device))


def places_of(model: Multimodal) -> dict[str, Stored]:
    """Return for each Linear of the decoder how the published code has it, by whose names PEFT goes."""
    shapes = {f"decoder.{place}.weight": linear.weight.shape for place, linear in model.decoder.routed().items()}
    layout = "phi3" if model.config.decoder.phi3_small is None else "phi3small"
    stored = plan(layout, shapes, model.config)
    return {name.removeprefix("decoder.").removesuffix(".weight"): told for name, told in stored.items()}


def peek(model: Multimodal, folder: Path) -> tuple[LoraConfig, int]:
    """Return the size of the adapter in a PEFT folder and how many numbers it has; the model may be without memory."""
    path = _config_path(folder)
    config = read_config(path, read_json(path, most=CONFIG_BYTES), places_of(model))
    return config, sum(prod(entry.shape) for entry in _weights(folder).entries.values())


def _config_path(folder: Path) -> Path:
    path = inside(folder, CONFIG)
    if not path.exists():
        lacks = f"has no {CONFIG}" if folder.is_dir() else "is not a folder"
        raise CheckpointError(f"{folder} {lacks}; an adapter is a PEFT folder of {CONFIG} and {WEIGHTS}")
    return path


def _weights(folder: Path) -> Weights:
    return Weights(folder, WEIGHTS.removesuffix(".safetensors"))


@torch.inference_mode()
def logit_change(model: Multimodal, route: str) -> float:
    """Return the largest change of a logit that a route makes on a fixed probe of 16 tokens."""
    ids = torch.arange(16, device=model.device)[None] % model.config.decoder.vocab_size
    lengths = torch.tensor([16], device=ids.device)
    plain, changed = (model(Batch(ids, lengths, Route((name,)))).float() for name in (None, route))
    said = plain.isfinite()  # Phi-3-small has ids that are never said
    return float((changed - plain)[said].abs().nan_to_num(torch.inf).max()) if said.any() else 0.0


def check_plain(model: Multimodal) -> None:
    """Refuse a model that only reads. Raises ConfigError."""
    if model.decoder.is_packed:
        raise ConfigError("this model was packed for reading; load it with pack=False to change or save it")


def check_free(model: Multimodal, name: str) -> None:
    """Refuse a name that an adapter has, or cannot have. Raises CheckpointError, ConfigError."""
    check_name(name)
    if name in model.config.adapters:
        raise CheckpointError(f"the adapter name {name!r} is taken; choose another")


def _match(weights: Weights, places: Mapping[str, Stored]) -> tuple[dict[tuple[str, str], str], list[str]]:
    ours = {told.module: place for place, told in places.items()}
    given: dict[tuple[str, str], str] = {}
    unknown: list[str] = []
    for key in weights.entries:
        match = _KEY.fullmatch(plain_name(key))
        at = (ours.get(f"model.{match[1]}", ""), match[2][-1]) if match else None
        if at is None or not at[0] or at in given:
            unknown.append(key)
        else:
            given[at] = key
    return given, unknown


def _base(fields: Mapping[str, Any]) -> str:
    name = fields.get("base_model_name_or_path")
    return f" ({name})" if name else ""


def linears_of(model: Multimodal, name: str) -> dict[str, RoutedLinear]:
    """Return the Linears that an adapter changes, by place. Raises CheckpointError where there is no such adapter."""
    if name not in model.config.adapters:
        raise CheckpointError(f"no adapter {name!r}; this model has {', '.join(model.config.adapters) or 'none'}")
    return {place: linear for place, linear in model.decoder.routed().items() if name in linear.adapters}
