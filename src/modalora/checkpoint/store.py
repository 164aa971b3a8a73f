"""Model folders: our own layout and the published ones, read and written without losing a tensor or a bit.

Our own holds model.safetensors, config.json, tokenizer.json and manifest.json, which has size and SHA-256 of every
other file. Matrices may be stored as int8 with one float32 scale per row ("NAME.scale"); they are expanded when
loaded. The published ones are what names.LAYOUTS lists, recognised by the model_type of config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalora.checkpoint import configs
from modalora.checkpoint.adapters import NATIVE_FOLDERS, load_adapter, peek, save_adapter
from modalora.checkpoint.files import (
    FORMAT,
    MANIFEST,
    Weights,
    check_manifest,
    inside,
    mapped,
    release,
    write_folder,
    write_tensors,
)
from modalora.checkpoint.names import HOLDS_ADAPTERS, LAYOUTS, Stored, plain_names, plan
from modalora.checkpoint.preserve import CERTIFICATE, Preservation
from modalora.config import parse
from modalora.disk import read_json, write_json
from modalora.errors import CheckpointError, ConfigError
from modalora.modality import read_encoders, write_encoders
from modalora.models.multimodal import ModelConfig, Multimodal, parameter_counts, part_of
from modalora.nn.quantised import to_int8
from modalora.processing.chat import FORMATS, ChatFormat
from modalora.processing.tokenizer import END_OF_TEXT, PLACEHOLDERS, TextTokenizer

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
SHARD_BYTES = 5_000_000_000
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Files beside the weights that another layout of the same model needs as well.
_BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """What a model folder holds."""

    model: Multimodal
    tokenizer: TextTokenizer
    chat: ChatFormat
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """What the JSON files of a model folder tell."""

    layout: str
    config: ModelConfig
    notes: Mapping[str, Any]
    chat: ChatFormat | None  # None: by its tokenizer
    stop_ids: tuple[int, ...] = ()  # that end an answer, besides those of the tokenizer


def read_card(folder: Path, *, check: bool = True) -> Card:
    """Return layout and config of a model folder; check: compare the files with the manifest first, if there is one."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a model folder or the name of a bundled model")
    path, sealed = inside(folder, CONFIG), (folder / MANIFEST).exists()
    if check and sealed:
        check_manifest(folder, (CONFIG, WEIGHTS, TOKENIZER))
    fields = read_json(path)
    layout = fields.get("model_type")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise CheckpointError(f"{path} has model_type {layout!r}; the layouts read are {', '.join(LAYOUTS)}")
    if layout != "modalora":
        config = configs.read_config(layout, fields, str(path))
        return Card(layout, _with_crops(folder, config), {}, None, _stop_ids(folder))
    if check and not sealed:
        check_manifest(folder)  # which says that it is missing
    fields.pop("model_type")
    if fields.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}; load it with the version that wrote it")
    notes, chat = fields.pop("notes", {}), parse(ChatFormat, fields.pop("chat", {}), str(path))
    stop_ids = _ids(fields.pop("stop_ids", []), f"{path}: stop_ids")
    encoders = read_encoders(fields.pop("encoders", {}), str(path))
    return Card(layout, replace(parse(ModelConfig, fields, str(path)), encoders=encoders), notes, chat, stop_ids)


def read_texts(folder: Path, *, check: bool = True) -> tuple[Card, TextTokenizer, ChatFormat]:
    """Return what makes a model folder's prompts, without opening a weight. Raises CheckpointError."""
    card = read_card(folder, check=check)
    inside(folder, TOKENIZER)
    tokenizer = TextTokenizer.from_folder(folder)
    if tokenizer.vocab_size > card.config.decoder.vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} ids, the config's vocab_size is "
            f"{card.config.decoder.vocab_size}; they are not of one model"
        )
    _check_placeholders(folder, card.layout, tokenizer)
    tokenizer.stop_ids |= set(card.stop_ids)
    return card, tokenizer, card.chat or _chat(folder, card.layout, tokenizer)


def load_model(
    folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu", pack: bool = False, check: bool = True
) -> Loaded:
    """Read a model folder, checking names, shapes and dtypes against the config before allocating.

    dtype: None keeps the stored one, and maps the files instead of copying them. pack: make the model faster to read
    and impossible to change (Multimodal.pack). check: compare files with the manifest first. Raises CheckpointError.
    """
    card, tokenizer, chat = read_texts(folder, check=check)
    weights, stored = _open(folder, card)
    model = _without_memory(folder, card, weights)
    tensors = {}
    for name, place in stored.items():
        tensors[name] = _read(weights, place, card.config, dtype).to(device)
    model.load_state_dict(tensors, assign=True)
    _check_memory(model)
    for name in _beside(folder, card):
        load_adapter(model, folder / f"{name}-lora", name, idle=True)
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
    cannot hold the model, CheckpointError when the folder exists; nothing is written then.
    """
    if model.decoder.is_packed:
        raise ConfigError("this model was packed for reading; load it with pack=False to save it")
    if model.decoder.is_quantised:
        raise ConfigError("this model was quantised; quantize.restore it from its plain weights to save it")
    state = model.state_dict()
    fill = _filler(
        model.config, tokenizer, layout, chat or FORMATS["phi4"], notes or {}, beside,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda name: state[name].detach().cpu(),
        int8=int8, shard_bytes=shard_bytes,
    )  # fmt: skip

    def fill_all(draft: Path) -> None:
        fill(draft)
        if certificate:
            write_json(draft / CERTIFICATE, certificate.fields())
        if layout not in HOLDS_ADAPTERS:
            for name in model.config.adapters:
                save_adapter(model, name, draft / f"{name}-lora")

    write_folder(folder, fill_all, manifest=layout == "modalora")


def describe(folder: Path) -> dict[str, Any]:
    """Return what a model folder holds, after checking its files and tensors; no weights are allocated."""
    card = read_card(folder)
    weights, stored = _open(folder, card)
    model = _without_memory(folder, card, weights)
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
        "tensors": len(stored),
        "parameters": sum(parts.values()),
        "parts": parts,
        "adapters": {name: asdict(lora) for name, lora in adapters.items()},
        "window": card.config.decoder.rope.window,
        "vocab_size": card.config.decoder.vocab_size,
        "config": asdict(card.config),
        "notes": dict(card.notes),
    }


def rounded_by_int8(model: Multimodal, names: Iterable[str]) -> str | None:
    """Return the first of some tensors that would not come back from int8 with the same bits, if there is one."""
    state = model.state_dict()
    for name in names:
        tensor = state[name]
        if tensor.ndim >= 2 and tensor.shape[0] > 1:
            values, scale = to_int8(tensor)
            if not torch.equal((values.float() * scale).to(tensor.dtype), tensor):
                return name
    return None


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
    return [*(name for name in NATIVE_FOLDERS if name in found), *sorted(found - {*NATIVE_FOLDERS})]


def _open(folder: Path, card: Card) -> tuple[Weights, dict[str, Stored]]:
    """Return the files' tensors and where each of ours stands among them, once all fit the config."""
    weights = Weights(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in _without_memory(folder, card, weights).state_dict().items()}
    names = plain_names(weights.entries)
    stored = {
        name: replace(place, name=names.get(place.name, place.name))
        for name, place in plan(card.layout, shapes, card.config).items()
    }
    _check(folder, weights, stored, card)
    return weights, stored


def _check(folder: Path, weights: Weights, stored: Mapping[str, Stored], card: Card) -> None:
    given = weights.entries
    expected = {place.name: place.shape for place in stored.values()}
    scales = {f"{name}.scale" for name in expected} if card.layout == "modalora" else set()
    tied = _tied_head(weights, stored, card)
    wrong = [f"{name} is missing" for name in expected if name not in given]
    wrong += [f"{name} is unknown" for name in sorted(set(given) - set(expected) - scales - tied)]
    for name in sorted(set(given) & set(expected)):
        shape, kind = given[name].shape, given[name].dtype
        if shape != expected[name]:
            wrong.append(f"{name} has shape {list(shape)}, the config implies {list(expected[name])}")
        scale = given.get(f"{name}.scale") if f"{name}.scale" in scales else None
        if kind == "I8" and scales:
            if scale is None or scale.shape != (shape[0], *[1] * (len(shape) - 1)):
                wrong.append(f"{name} is int8 without a scale per row")
        elif kind not in _FLOATS:
            wrong.append(f"{name} has dtype {kind}; {'floats and int8' if scales else 'floats'} are read")
        elif scale is not None:
            wrong.append(f"{name}.scale belongs to no int8 tensor")
    if wrong:
        more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
        raise CheckpointError(f"{folder} does not fit its config: {'; '.join(wrong[:8])}{more}")


def _tied_head(weights: Weights, stored: Mapping[str, Stored], card: Card) -> set[str]:
    """Return the name of an output matrix that a file repeats although it is tied; it must be the embedding."""
    embedding = stored["decoder.embed_tokens.weight"].name
    if card.layout == "modalora" or not card.config.decoder.tie_word_embeddings or embedding not in weights.entries:
        return set()
    if "lm_head.weight" not in weights.entries:
        return set()
    if not torch.equal(weights.get("lm_head.weight"), weights.get(embedding)):
        raise CheckpointError(
            f"{weights.folder}: lm_head.weight differs from {embedding}, and the config ties them; set "
            "tie_word_embeddings to false if they were trained apart"
        )
    return {"lm_head.weight"}


def _read(weights: Weights, place: Stored, config: ModelConfig, dtype: torch.dtype | None) -> Tensor:
    tensor = weights.get(place.name)
    if tensor.dtype == torch.int8:
        tensor = tensor.float() * weights.get(f"{place.name}.scale")
    tensor = place.pair.to_ours(tensor, config)
    return tensor if dtype is None else tensor.to(dtype)


def _with_crops(folder: Path, config: ModelConfig) -> ModelConfig:
    path = inside(folder, "preprocessor_config.json")
    if config.vision is None or not path.exists():
        return config
    most = read_json(path).get("dynamic_hd", config.vision.max_crops)
    if type(most) is not int or not 1 <= most <= 10_000:
        raise CheckpointError(f"{path}: dynamic_hd={most!r:.40} must be a number of crops; Phi-4-multimodal has 36")
    return replace(config, vision=replace(config.vision, max_crops=most))


# Where transformers' layout of Phi-4-Multimodal tells which id stands for a piece of media.
_PLACES = {"image": ("vision_config", "image_token_id"), "audio": ("audio_config", "audio_token_id")}


def _check_placeholders(folder: Path, layout: str, tokenizer: TextTokenizer) -> None:
    fields = read_json(folder / CONFIG) if layout == "phi4_multimodal" else {}
    for modality, (part, key) in _PLACES.items():
        told, own = fields.get(part, {}).get(key), tokenizer.control(PLACEHOLDERS[modality]) if fields else None
        if told not in (None, own):
            raise CheckpointError(
                f"{folder / CONFIG}: {part}.{key}={told!r:.40}, and {folder / TOKENIZER} has "
                f"{PLACEHOLDERS[modality]} at {own}; they are not of one model"
            )


def _chat(folder: Path, layout: str, tokenizer: TextTokenizer) -> ChatFormat:
    """Return the chat format of a published model. Templates in files are never run; one text is read out of them."""
    if layout == "phi3small":
        return FORMATS["phi3-small"]
    if not tokenizer.has_control("<|tool|>"):
        return FORMATS["phi3"]
    template = ""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = inside(folder, name)
        if path.is_file() and path.stat().st_size < 1_000_000:
            template += path.read_text(encoding="utf-8", errors="replace")
    own = re.search(r"<\|system\|>(Your name is Phi[^'\"<\\]*)", template)  # Phi-4-mini-reasoning has a default
    return replace(FORMATS["phi4"], default_system=own[1]) if own else FORMATS["phi4"]


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that end an answer by a published model's generation_config.json."""
    path = inside(folder, "generation_config.json")
    return _ids(read_json(path).get("eos_token_id"), f"{path}: eos_token_id") if path.exists() else ()


def _ids(told: Any, where: str) -> tuple[int, ...]:
    ids = [] if told is None else told if isinstance(told, list) else [told]
    if not all(type(index) is int for index in ids):
        raise CheckpointError(f"{where}={told!r:.60} must be a token id or a list of them")
    return tuple(ids)


def _filler(
    config: ModelConfig,
    tokenizer: TextTokenizer,
    layout: str,
    chat: ChatFormat,
    notes: Mapping[str, Any],
    beside: Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    get: Any,
    *,
    int8: bool,
    shard_bytes: int,
) -> Any:
    """Check that the layout holds the model; return what fills a draft folder with it."""
    if int8 and layout != "modalora":
        raise ConfigError(f"int8 is stored by the layout 'modalora' alone, not by {layout!r}")
    if layout not in HOLDS_ADAPTERS:
        shapes = {name: shape for name, shape in shapes.items() if not part_of(name).startswith("adapter.")}
    stored = plan(layout, shapes, config)
    if layout == "modalora":
        own: dict[str, Any] = {} if chat == ChatFormat() else {"chat": asdict(chat)}
        if tokenizer.stop_ids != TextTokenizer(tokenizer.definition).stop_ids:
            own["stop_ids"] = sorted(tokenizer.stop_ids)
        sizes = asdict(config) | {"encoders": write_encoders(config)}
        sizes = {key: value for key, value in sizes.items() if value != {} or key == "adapters"}
        fields = {"model_type": "modalora", "format": FORMAT, **sizes, **own, "notes": dict(notes)}
    else:
        fields = configs.write_config(layout, config, _token_ids(tokenizer, beside))
    if layout == "phi4_multimodal":
        for modality, (part, key) in _PLACES.items():
            fields[part][key] = tokenizer.control(PLACEHOLDERS[modality])

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, place in stored.items():
            tensor = get(name)
            if int8 and tensor.ndim >= 2 and tensor.shape[0] > 1:
                values, scale = to_int8(tensor)
                yield name, values
                yield f"{name}.scale", scale
            else:
                yield place.name, place.pair.to_theirs(tensor, config)

    def fill(draft: Path) -> None:
        write_tensors(draft, tensors(), shard_bytes=shard_bytes if layout != "modalora" else 2**62)
        write_json(draft / CONFIG, fields)
        (draft / TOKENIZER).write_text(tokenizer.definition, encoding="utf-8")
        if layout != "modalora":
            _write_beside(draft, tokenizer, config, beside)
            if (back := _chat(draft, layout, tokenizer)) != chat:
                raise ConfigError(f"the layout {layout!r} cannot express this chat format: {chat} becomes {back}")

    return fill


def _token_ids(tokenizer: TextTokenizer, beside: Path | None) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields = read_json(beside / CONFIG) if beside is not None and (beside / CONFIG).exists() else {}
    end = tokenizer.control(END_OF_TEXT)
    return {key: fields.get(key, end) for key in keys}


def _write_beside(draft: Path, tokenizer: TextTokenizer, config: ModelConfig, beside: Path | None) -> None:
    """Take tokenizer and processor files along, and write those that transformers cannot do without."""
    for name in _BESIDE:
        if beside is not None and (path := inside(beside, name)).is_file():
            (draft / name).write_bytes(path.read_bytes())
    ends = sorted(tokenizer.stop_ids)
    if (taken := draft / "generation_config.json").exists() and not {*ends} <= {
        *_stop_ids(draft),
        *TextTokenizer(tokenizer.definition).stop_ids,
    }:
        write_json(taken, {**read_json(taken), "eos_token_id": ends})
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

    Raises ConfigError when the layout has no place for part of the model, CheckpointError when the target exists.
    """
    loaded = load_model(source)
    save_model(
        loaded.model, loaded.tokenizer, target, layout=layout, chat=loaded.chat, notes=loaded.notes, beside=source,
        shard_bytes=shard_bytes,
    )  # fmt: skip
    return describe(target)
