"""Model folders read: our own layout and the published ones, without losing a tensor or a bit (written: write.py).

Our own holds model.safetensors, config.json, tokenizer.json and manifest.json, which has size and SHA-256 of every
other file. Matrices may be stored as int8 with one float32 scale per row ("NAME.scale"); they are expanded when
loaded. The published ones are what names.LAYOUTS lists, recognised by the model_type of config.json.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalora.checkpoint.adapter_config import split_matrices
from modalora.checkpoint.adapters import CONFIG as ADAPTER
from modalora.checkpoint.adapters import NATIVE_FOLDERS, peek, places_of, restore_adapter
from modalora.checkpoint.card import (
    Card,
    read_card,
    read_texts,
)
from modalora.checkpoint.files import (
    FLOATS,
    MANIFEST,
    Weights,
    fitted,
    inside,
    mapped,
    release,
)
from modalora.checkpoint.names import HOLDS_ADAPTERS, Stored, plain_names, plan
from modalora.errors import CheckpointError, ConfigError, listed
from modalora.models.multimodal import ModelConfig, Multimodal, parameter_counts
from modalora.nn.lora import check_name
from modalora.processing.chat import ChatFormat
from modalora.processing.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Loaded:
    """What a model folder holds."""

    model: Multimodal
    tokenizer: TextTokenizer
    chat: ChatFormat
    notes: Mapping[str, Any]


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    pack: bool = False,
    check: bool = True,
    as_stored: bool = False,
) -> Loaded:
    """Read a model folder, checking names, shapes and dtypes against the config before allocating.

    dtype: None keeps the stored one, and maps the files instead of copying them; of several the one that most numbers
    of a network have. pack: make the model faster to read and impossible to change (Multimodal.pack). check: compare
    files with the manifest first. as_stored: every tensor keeps its own dtype, to be written or trained, not read.
    Raises CheckpointError.
    """
    card, tokenizer, chat = read_texts(folder, check=check)
    weights, stored, model = _open(folder, card)
    runs_in = _dtypes(weights, stored, model)
    exact = dtype is None and not pack  # adapters are cast where they are used
    tensors, whole = {}, _whole(model)
    for name, place in stored.items():
        own = None if as_stored or (exact and ".lora_" in name) else dtype or runs_in[_network(name)]
        tensor = weights.get(place.name) if name in whole else _read(weights, place, card.config, own)
        tensors[name] = tensor.to(device)
    model.load_state_dict(tensors, assign=True)
    _check_memory(model)
    for name in _beside(folder, card):
        restore_adapter(model, folder / f"{name}-lora", name, as_stored=as_stored, exact=exact)
    if pack:
        model.pack(partial(release, spans=mapped()))  # dropping is not enough: the file stays mapped
    return Loaded(model.eval(), tokenizer, chat, card.notes)


def describe(folder: Path) -> dict[str, Any]:
    """Return what a model folder holds, after checking its files and tensors; no weights are allocated."""
    card = read_card(folder)
    weights, stored, model = _open(folder, card)
    parts, adapters = parameter_counts(model), dict(model.config.adapters)
    for name in _beside(folder, card):
        adapters[name], parts[f"adapter.{name}"] = peek(model, folder / f"{name}-lora")
    return {
        "folder": str(folder),
        "layout": card.layout,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "integrity": "SHA-256 of every file matches the manifest"
        if (folder / MANIFEST).exists()
        else "sizes and shapes",
        "dtypes": sorted({weights.entries[place.name].dtype for place in stored.values()}),
        "runs_in": {part: str(kind).removeprefix("torch.") for part, kind in _dtypes(weights, stored, model).items()},
        "tensors": len(stored),
        "parameters": sum(parts.values()),
        "parts": parts,
        "adapters": {name: asdict(lora) for name, lora in adapters.items()},
        "window": card.config.decoder.rope.window,
        "vocab_size": card.config.decoder.vocab_size,
        "config": asdict(card.config),
        "notes": dict(card.notes),
    }


def _whole(model: Multimodal) -> dict[str, torch.dtype]:
    """Return the tensors that are no floats, such as counters and tables of someone else's encoder; none is cast."""
    return {name: tensor.dtype for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}


def _network(name: str) -> str:
    """Return the network that a tensor is of, which runs in one dtype: "decoder", or a modality."""
    first, second, *_ = name.split(".")
    return second if first in ("encoders", "projectors") else first


def _dtypes(weights: Weights, stored: Mapping[str, Stored], model: Multimodal) -> dict[str, torch.dtype]:
    """Return the dtype that most numbers of each network have; int8 is expanded to float32."""
    counts: dict[str, Counter[torch.dtype]] = defaultdict(Counter)
    whole = _whole(model)
    for name, place in stored.items():
        if "lora_" not in name and name not in whole:
            kind = FLOATS.get(weights.entries[place.name].dtype, torch.float32)
            counts[_network(name)][kind] += prod(place.shape)
    return {network: found.most_common(1)[0][0] for network, found in counts.items()}


def _without_memory(folder: Path, card: Card, weights: Weights) -> Multimodal:
    """Return the networks that the config describes, on the meta device, if the files may hold them."""
    config = card.config if card.layout in HOLDS_ADAPTERS else replace(card.config, adapters={})
    layers = config.decoder.num_hidden_layers
    layers += config.vision.num_hidden_layers if config.vision else 0
    layers += config.speech.num_blocks if config.speech else 0
    if layers > len(weights.entries):
        raise CheckpointError(
            f"{folder} does not fit its config, which has {layers:,} layers: the files hold "
            f"{len(weights.entries):,} tensors"
        )
    try:
        with torch.device("meta"):
            return Multimodal(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{folder}: its config describes networks that cannot be: {error!s:.160}") from None


def _check_memory(model: Multimodal) -> None:
    """Refuse a network of someone else's with numbers that its files do not hold."""
    empty = [name for name, one in (*model.named_parameters(), *model.named_buffers()) if one.is_meta]
    if empty:
        raise CheckpointError(
            f"{empty[0]} is stored in no file: the encoder computes it when it is made; register it as a persistent "
            "buffer"
        )


def _beside(folder: Path, card: Card) -> list[str]:
    """Return the adapters that stand in folders beside the weights."""
    if card.layout in HOLDS_ADAPTERS:
        return []
    found = {path.name.removesuffix("-lora") for path in folder.glob("*-lora") if inside(folder, path.name).is_dir()}
    for name in sorted(found):
        try:
            check_name(name)
        except ConfigError as error:
            raise CheckpointError(f"{folder / name}-lora would be loaded with the model: {error}") from None
    return [*(name for name in NATIVE_FOLDERS if name in found), *sorted(found - {*NATIVE_FOLDERS})]


def _open(folder: Path, card: Card) -> tuple[Weights, dict[str, Stored], Multimodal]:
    """Return the files' tensors, where each of ours stands among them, and the networks that want them, once all fit
    the config.
    """
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder} holds an adapter beside the model ({ADAPTER}), which transformers applies to every row and a "
            "model here does not; move its two files into a folder of their own, and load_adapter that"
        )
    weights = Weights(folder)
    model = _without_memory(folder, card, weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = plain_names(weights.entries)
    planned = plan(card.layout, shapes, card.config)
    tied = card.config.decoder.tie_word_embeddings and card.layout != "modalora"
    if head := names.get("lm_head.weight") if tied else None:
        embedding = planned["decoder.embed_tokens.weight"].name
        _check_tied(weights, head, names.setdefault(embedding, head))  # safetensors keeps one of two names
    stored = {name: replace(place, name=names.get(place.name, place.name)) for name, place in planned.items()}
    _check(folder, weights, stored, card, model, {head} if head else set())
    return weights, stored, model


def _check(
    folder: Path, weights: Weights, stored: Mapping[str, Stored], card: Card, model: Multimodal, tied: Set[str]
) -> None:
    """Compare names, shapes and dtypes with what is wanted; tied: the output matrix, where it is the embedding."""
    given = weights.entries
    expected = {place.name: place.shape for place in stored.values()}
    whole = {stored[name].name: kind for name, kind in _whole(model).items()}
    scales = {f"{name}.scale" for name in expected} if card.layout == "modalora" else set()
    missing = [f"{name} is missing" for name in expected if name not in given]
    strangers = sorted(set(given) - set(expected) - scales - tied)
    unknown = [f"{name} is unknown" for name in strangers]
    wrong = [*missing[:4], *unknown[:4], *missing[4:], *unknown[4:]]  # either may be the cause
    for name in sorted(set(given) & set(expected)):
        shape, kind = given[name].shape, given[name].dtype
        if shape != expected[name]:
            wrong.append(f"{name} has shape {list(shape)}, the config implies {list(expected[name])}")
        scale = given.get(f"{name}.scale") if f"{name}.scale" in scales else None
        if name in whole:
            if weights.get(name).dtype != whole[name]:
                wrong.append(f"{name} has dtype {kind}, the network has {whole[name]} there")
        elif kind == "I8" and scales:
            if scale is None or scale.shape != (shape[0], *[1] * (len(shape) - 1)):
                wrong.append(f"{name} is int8 without a scale per row")
        elif kind not in FLOATS:
            wrong.append(f"{name} has dtype {kind}; {'floats and int8' if scales else 'floats'} are read")
        elif scale is not None:
            wrong.append(f"{name}.scale belongs to no int8 tensor")
    if wrong:
        why = split_matrices(strangers, places_of(model))
        why = f"; it is a copy whose {why}: take the published model" if why else ""
        raise CheckpointError(f"{folder} does not fit its config: {listed(wrong)}{why}")


def _check_tied(weights: Weights, head: str, embedding: str) -> None:
    """Refuse an output matrix that a file repeats although it is tied, and that is not the embedding."""
    ours, table = weights.get(head), weights.get(embedding)
    if ours.shape != table.shape or not torch.equal(ours.to(torch.float64), table.to(torch.float64)):
        raise CheckpointError(
            f"{weights.folder}: {head} differs from {embedding}, and the config ties them; set "
            "tie_word_embeddings to false if they were trained apart"
        )


def _read(weights: Weights, place: Stored, config: ModelConfig, dtype: torch.dtype | None) -> Tensor:
    tensor = weights.get(place.name)
    if tensor.dtype == torch.int8:
        tensor = tensor.float() * weights.get(f"{place.name}.scale")
    tensor = place.pair.to_ours(tensor, config)
    return tensor if dtype is None else fitted(tensor, dtype, f"{weights.folder}: {place.name}")
