"""Model folders written, in our own layout and the published ones: whole or not at all, without losing a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalora.checkpoint import configs
from modalora.checkpoint.adapters import check_plain, save_adapter
from modalora.checkpoint.card import (
    CONFIG,
    PLACEHOLDER_KEYS,
    TOKEN_IDS,
    TOKENIZER,
    published_chat,
    published_stop_ids,
)
from modalora.checkpoint.files import FORMAT, inside, write_folder, write_tensors
from modalora.checkpoint.names import HOLDS_ADAPTERS, LAYOUTS, Stored, plan
from modalora.checkpoint.preserve import CERTIFICATE, Preservation
from modalora.checkpoint.store import describe, load_model
from modalora.disk import CONFIG_BYTES, read_json, write_json
from modalora.errors import CheckpointError, ConfigError
from modalora.modality import write_encoders
from modalora.models.multimodal import ModelConfig, Multimodal, part_of
from modalora.nn.quantised import to_int8
from modalora.processing.chat import FORMATS, ChatFormat
from modalora.processing.tokenizer import END_OF_TEXT, PLACEHOLDERS, RANKS, TextTokenizer

SHARD_BYTES = 5_000_000_000
# Files beside the weights that another layout of the same model needs as well.
_BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", RANKS, "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


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
    check_plain(model)
    if model.decoder.is_quantised:
        raise ConfigError("this model was quantised; quantize.restore it from its plain weights to save it")
    check_target(folder, beside)
    if beside is not None and not beside.is_dir():
        raise CheckpointError(
            f"{beside} is no folder any more: the tokenizer's and generation files of this model are to be copied from "
            "there; put it back, or do without them (the folder of an Assistant set to None)"
        )
    fill = _filler(
        model, tokenizer, layout, chat or FORMATS["phi4"], notes or {}, beside, int8=int8, shard_bytes=shard_bytes
    )

    def fill_all(draft: Path) -> None:
        fill(draft)
        if certificate:
            write_json(draft / CERTIFICATE, asdict(certificate))
        if layout not in HOLDS_ADAPTERS:
            for name in model.config.adapters:
                save_adapter(model, name, draft / f"{name}-lora", base=folder)

    write_folder(folder, fill_all, manifest=layout == "modalora")


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


def _filler(
    model: Multimodal,
    tokenizer: TextTokenizer,
    layout: str,
    chat: ChatFormat,
    notes: Mapping[str, Any],
    beside: Path | None,
    *,
    int8: bool,
    shard_bytes: int,
) -> Callable[[Path], None]:
    """Check that the layout holds the model; return what fills a draft folder with it."""
    if int8 and layout != "modalora":
        raise ConfigError(f"int8 is stored by the layout 'modalora' alone, not by {layout!r}")
    config, state, kept = model.config, model.state_dict(), _kept_ids(beside)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tokens = {**dict.fromkeys(TOKEN_IDS, tokenizer.control(END_OF_TEXT)), **kept}
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
        if kept:
            own["tokens"] = kept
        fields = {"model_type": "modalora", "format": FORMAT, **sizes, **own, "notes": dict(notes)}
    else:
        dtype = model.decoder.layers[0].get_parameter("mlp.down_proj.weight").dtype
        fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    if layout == "phi4_multimodal":
        for modality, (part, key) in PLACEHOLDER_KEYS.items():
            fields[part][key] = tokenizer.control(PLACEHOLDERS[modality])

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, place in stored.items():
            tensor = state[name].detach().cpu()
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
