"""Model folders: our own layout and the published ones, read and written without losing a tensor or a bit.

Our own holds model.safetensors, config.json, tokenizer.json and manifest.json, which has size and SHA-256 of every
other file. Matrices may be stored as int8 with one float32 scale per row ("NAME.scale"); they are expanded when
loaded. The published ones are what names.LAYOUTS lists, recognised by the model_type of config.json.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalora.checkpoint import configs
from modalora.checkpoint.adapters import CONFIG as ADAPTER
from modalora.checkpoint.adapters import NATIVE_FOLDERS, peek, places_of, restore_adapter, save_adapter, split_matrices
from modalora.checkpoint.card import (
    CONFIG,
    PLACEHOLDER_KEYS,
    TOKEN_IDS,
    TOKENIZER,
    Card,
    published_chat,
    published_stop_ids,
    read_card,
    read_texts,
)
from modalora.checkpoint.files import (
    FORMAT,
    MANIFEST,
    Weights,
    fitted,
    inside,
    mapped,
    release,
    write_folder,
    write_tensors,
)
from modalora.checkpoint.names import HOLDS_ADAPTERS, LAYOUTS, Stored, plain_names, plan
from modalora.checkpoint.preserve import CERTIFICATE, Preservation
from modalora.disk import CONFIG_BYTES, read_json, write_json
from modalora.errors import CheckpointError, ConfigError
from modalora.modality import write_encoders
from modalora.models.multimodal import ModelConfig, Multimodal, parameter_counts, part_of
from modalora.nn.lora import check_name
from modalora.nn.quantised import to_int8
from modalora.processing.chat import FORMATS, ChatFormat
from modalora.processing.tokenizer import END_OF_TEXT, PLACEHOLDERS, RANKS, TextTokenizer

SHARD_BYTES = 5_000_000_000
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Files beside the weights that another layout of the same model needs as well.
_BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", RANKS, "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


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


def save_model(
    model: Multimodal,
    tokenizer: TextTokenizer,
    folder: Path,
    *,
    layout: str = "modalora",
    int8: bool = False,
    chat: ChatFormat | None = None,
    notes: Mapping[str, Any] | None = None,
    beside: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    certificate: Preservation | None = None,
) -> None:
    """Write a model folder. int8 stores every matrix as int8 with a scale per row (see `to_int8`).

    beside: a folder whose further tokenizer and processor files are taken along. Raises ConfigError when the layout
    cannot hold the model, CheckpointError when the folder exists or `beside` is none; nothing is written then.
    """
    if model.decoder.is_packed:
        raise ConfigError("this model was packed for reading; load it with pack=False to save it")
    if model.decoder.is_quantised:
        raise ConfigError("this model was quantised; quantize.restore it from its plain weights to save it")
    check_target(folder, beside)
    if beside is not None and not beside.is_dir():
        raise CheckpointError(
            f"{beside} is no folder any more: the tokenizer's and generation files of this model are to be copied from "
            "there; put it back, or do without them (the folder of an Assistant set to None)"
        )
    state = model.state_dict()
    fill = _filler(
        model.config, tokenizer, layout, chat or FORMATS["phi4"], notes or {}, beside,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda name: state[name].detach().cpu(), model.decoder.layers[0].get_parameter("mlp.down_proj.weight").dtype,
        int8=int8, shard_bytes=shard_bytes,
    )  # fmt: skip

    def fill_all(draft: Path) -> None:
        fill(draft)
        if certificate:
            write_json(draft / CERTIFICATE, certificate.fields())
        if layout not in HOLDS_ADAPTERS:
            for name in model.config.adapters:
                save_adapter(model, name, draft / f"{name}-lora", base=folder)

    write_folder(folder, fill_all, manifest=layout == "modalora")


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


def check_target(target: Path, source: Path | None) -> None:
    """Refuse a folder that could not be written, before the work; or one that would change what it is made from."""
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists; give a new folder, nothing was written")
    if source is not None and target.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target} lies within {source}, which is read; give a folder outside it")


def rounded_by_int8(model: Multimodal, names: Iterable[str]) -> str | None:
    """Return the first of some tensors that would not come back from int8 with the same bits, if there is one."""
    state = model.state_dict()
    for name in names:
        tensor = state[name]
        if _becomes_int8(tensor):
            values, scale = to_int8(tensor)
            if not torch.equal((values.float() * scale).to(tensor.dtype), tensor):
                return name
    return None


def _becomes_int8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[0] > 1


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
            kind = _FLOATS.get(weights.entries[place.name].dtype, torch.float32)
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
        elif kind not in _FLOATS:
            wrong.append(f"{name} has dtype {kind}; {'floats and int8' if scales else 'floats'} are read")
        elif scale is not None:
            wrong.append(f"{name}.scale belongs to no int8 tensor")
    if wrong:
        more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
        why = split_matrices(strangers, places_of(model))
        why = f"; it is a copy whose {why}: take the published model" if why else ""
        raise CheckpointError(f"{folder} does not fit its config: {'; '.join(wrong[:8])}{more}{why}")


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


def _filler(
    config: ModelConfig,
    tokenizer: TextTokenizer,
    layout: str,
    chat: ChatFormat,
    notes: Mapping[str, Any],
    beside: Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    get: Any,
    dtype: torch.dtype,
    *,
    int8: bool,
    shard_bytes: int,
) -> Any:
    """Check that the layout holds the model; return what fills a draft folder with it."""
    if int8 and layout != "modalora":
        raise ConfigError(f"int8 is stored by the layout 'modalora' alone, not by {layout!r}")
    tokens = {**dict.fromkeys(TOKEN_IDS, tokenizer.control(END_OF_TEXT)), **_kept_ids(beside)}
    try:
        stored, fields = _written(layout, shapes, config, tokens)
    except ConfigError as error:
        if layout not in LAYOUTS:
            raise
        able = [other for other in LAYOUTS if _can_hold(other, shapes, config, tokens)]
        raise ConfigError(f"{error}; choose a layout that holds this model: {', '.join(able)}") from None
    if layout == "modalora":
        own: dict[str, Any] = {} if chat == ChatFormat() else {"chat": asdict(chat)}
        if tokenizer.stop_ids != TextTokenizer(tokenizer.definition).stop_ids:
            own["stop_ids"] = sorted(tokenizer.stop_ids)
        sizes = asdict(config) | {"encoders": write_encoders(config)}
        sizes = {key: value for key, value in sizes.items() if value != {} or key == "adapters"}
        if kept := _kept_ids(beside):
            own["tokens"] = kept
        fields = {"model_type": "modalora", "format": FORMAT, **sizes, **own, "notes": dict(notes)}
    else:
        fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    if layout == "phi4_multimodal":
        for modality, (part, key) in PLACEHOLDER_KEYS.items():
            fields[part][key] = tokenizer.control(PLACEHOLDERS[modality])

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, place in stored.items():
            tensor = get(name)
            if int8 and _becomes_int8(tensor):
                values, scale = to_int8(tensor)
                yield name, values
                yield f"{name}.scale", scale
            else:
                yield place.name, place.pair.to_theirs(tensor, config)

    def fill(draft: Path) -> None:
        write_tensors(draft, tensors(), shard_bytes=shard_bytes if layout != "modalora" else 2**62)
        write_json(draft / CONFIG, fields)
        (draft / TOKENIZER).write_text(tokenizer.definition, encoding="utf-8")
        _take_along(draft, tokenizer, config, beside)
        if layout != "modalora":
            _write_defaults(draft, tokenizer, config)
            if (back := published_chat(draft, layout, tokenizer)) != chat:
                raise ConfigError(f"the layout {layout!r} cannot express this chat format: {chat} becomes {back}")

    return fill


def _written(
    layout: str, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, tokens: Mapping[str, Any]
) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Return where a layout has the tensors, and its config (ours is written apart). Raises ConfigError."""
    if layout not in HOLDS_ADAPTERS:
        shapes = {name: shape for name, shape in shapes.items() if not part_of(name).startswith("adapter.")}
    stored = plan(layout, shapes, config)
    return stored, {} if layout == "modalora" else configs.write_config(layout, config, tokens)


def _can_hold(*given: Any) -> bool:
    try:
        return bool(_written(*given))
    except ConfigError:
        return False


def _kept_ids(beside: Path | None) -> dict[str, Any]:
    """Return the bos, eos and pad ids of the folder that a model came from."""
    fields = read_json(beside / CONFIG, most=CONFIG_BYTES) if beside is not None and (beside / CONFIG).exists() else {}
    if fields.get("model_type") == "modalora":
        fields = fields.get("tokens", {})
    return {key: fields[key] for key in TOKEN_IDS if key in fields}


def _take_along(draft: Path, tokenizer: TextTokenizer, config: ModelConfig, beside: Path | None) -> None:
    """Copy tokenizer, generation and processor files of the folder that a model came from."""
    for name in _BESIDE:
        if beside is not None and (path := inside(beside, name)).is_file():
            (draft / name).write_bytes(path.read_bytes())
    ends = sorted(tokenizer.stop_ids)
    if (taken := draft / "generation_config.json").exists() and not {*ends} <= {
        *published_stop_ids(draft, config.decoder.vocab_size),
        *TextTokenizer(tokenizer.definition).stop_ids,
    }:
        write_json(taken, {**read_json(taken), "eos_token_id": ends})


def _write_defaults(draft: Path, tokenizer: TextTokenizer, config: ModelConfig) -> None:
    """Write the files beside a published model that transformers cannot do without, unless they came along."""
    ends = sorted(tokenizer.stop_ids)
    defaults = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {"eos_token_id": ends, "pad_token_id": tokenizer.control(END_OF_TEXT)},
    }
    if config.vision is not None:
        defaults["preprocessor_config.json"] = {
            "dynamic_hd": config.vision.max_crops,
            "audio_compression_rate": 8,
            "audio_downsample_rate": 1,
            "audio_feat_stride": 1,
        }
    for name, fields in defaults.items():
        if not (draft / name).exists():
            write_json(draft / name, fields)


def convert(source: Path, target: Path, layout: str, *, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Rewrite a model folder in another layout, tensor by tensor; every tensor keeps its bits.

    Raises ConfigError when the layout has no place for part of the model, CheckpointError when the target exists or
    lies within the source.
    """
    check_target(target, source)
    loaded = load_model(source, as_stored=True)
    save_model(
        loaded.model, loaded.tokenizer, target, layout=layout, chat=loaded.chat, notes=loaded.notes, beside=source,
        shard_bytes=shard_bytes,
    )  # fmt: skip
    return describe(target)
