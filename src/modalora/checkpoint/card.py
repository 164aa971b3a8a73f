"""What the files beside the weights of a model folder tell: its layout and config, its tokenizer, its chat format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modalora.checkpoint import configs
from modalora.checkpoint.files import (
    FORMAT,
    MANIFEST,
    RANKS_BYTES,
    TOKENIZER_BOUNDS,
    check_folder,
    check_manifest,
    inside,
)
from modalora.checkpoint.names import LAYOUTS
from modalora.config import parse
from modalora.disk import CONFIG_BYTES, check_file, read_json
from modalora.errors import CheckpointError, ConfigError
from modalora.modality import read_encoders
from modalora.models.multimodal import ModelConfig
from modalora.nn.lora import check_name
from modalora.processing.chat import FORMATS, ChatFormat
from modalora.processing.tokenizer import ASSISTANT, END, END_OF_TEXT, PLACEHOLDERS, RANKS, TextTokenizer

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SPOKEN = (END_OF_TEXT, END, ASSISTANT, "<|user|>")  # control tokens of every chat format
# Where transformers' layout of Phi-4-Multimodal tells which id stands for a piece of media.
PLACEHOLDER_KEYS = {"image": ("vision_config", "image_token_id"), "audio": ("audio_config", "audio_token_id")}
_HIDDEN = "dummy_token_indices"
_NEVER_SAID = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|endofprompt|>")  # and all of "dummy_id"


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
    check_folder(folder)
    path, sealed = inside(folder, CONFIG), (folder / MANIFEST).exists()
    if check and sealed:
        check_manifest(folder, (CONFIG, WEIGHTS, TOKENIZER))
    fields = read_json(path, most=CONFIG_BYTES)
    layout = fields.get("model_type")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise CheckpointError(f"{path} has model_type {layout!r}; the layouts read are {', '.join(LAYOUTS)}")
    if layout != "modalora":
        config = configs.read_config(layout, fields, str(path))
        return Card(
            layout, _with_crops(folder, config), {}, None, published_stop_ids(folder, config.decoder.vocab_size)
        )
    if check and not sealed:
        check_manifest(folder)  # which says that it is missing
    fields.pop("model_type")
    if fields.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}; load it with the version that wrote it")
    notes, chat = fields.pop("notes", {}), parse(ChatFormat, fields.pop("chat", {}), str(path))
    if not isinstance(notes, dict):
        raise CheckpointError(f"{path}: notes={notes!r:.60} must be an object, such as {{}}")
    told, kept = fields.pop("stop_ids", []), fields.pop("tokens", {})
    encoders = read_encoders(fields.pop("encoders", {}), str(path))
    config = replace(parse(ModelConfig, fields, str(path)), encoders=encoders)
    _check_names(config, path)
    vocab_size = config.decoder.vocab_size
    if not isinstance(kept, dict) or not set(kept) <= set(TOKEN_IDS):
        raise CheckpointError(f"{path}: tokens={kept!r:.60} must be an object of {', '.join(TOKEN_IDS)}")
    for key, value in kept.items():
        _ids(value, f"{path}: {key}", vocab_size)
    return Card(layout, config, notes, chat, _ids(told, f"{path}: stop_ids", vocab_size))


def _check_names(config: ModelConfig, path: Path) -> None:
    """Refuse names in a config of our own that no model of ours has."""
    for name in (*config.adapters, *(one for branches in config.branches.values() for one in branches)):
        try:
            check_name(name)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None
    for modality in config.branches:
        if modality not in config.modalities:
            raise CheckpointError(f"{path}: branches are of {modality!r:.60}, a modality that this model lacks")
    for name, other in config.aliases.items():
        if other not in config.adapters:
            raise CheckpointError(f"{path}: aliases leads from {name!r:.60} to {other!r:.60}, which is no adapter")


def read_texts(folder: Path, *, check: bool = True) -> tuple[Card, TextTokenizer, ChatFormat]:
    """Return what makes a model folder's prompts, without opening a weight. Raises CheckpointError."""
    card = read_card(folder, check=check)
    TOKENIZER_BOUNDS.check_file(inside(folder, TOKENIZER))
    check_file(inside(folder, RANKS), RANKS_BYTES)
    tokenizer = TextTokenizer.from_folder(folder)
    if lacks := [token for token in _SPOKEN if not tokenizer.has_control(token)]:
        raise CheckpointError(
            f"{folder / TOKENIZER} has no control token {', '.join(lacks)}, without which no question can be put; take "
            "the tokenizer.json of the model"
        )
    if tokenizer.vocab_size > card.config.decoder.vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} ids, the config's vocab_size is "
            f"{card.config.decoder.vocab_size}; they are not of one model"
        )
    _check_placeholders(folder, card.layout, tokenizer)
    tokenizer.stop_ids |= set(card.stop_ids)
    card = _with_hidden(folder, card, tokenizer)
    return card, tokenizer, card.chat or published_chat(folder, card.layout, tokenizer)


def _with_crops(folder: Path, config: ModelConfig) -> ModelConfig:
    path = inside(folder, "preprocessor_config.json")
    if config.vision is None or not path.exists():
        return config
    most = read_json(path, most=CONFIG_BYTES).get("dynamic_hd", config.vision.max_crops)
    if type(most) is not int or not 1 <= most <= 10_000:
        raise CheckpointError(f"{path}: dynamic_hd={most!r:.40} must be a number of crops; Phi-4-multimodal has 36")
    return replace(config, vision=replace(config.vision, max_crops=most))


def _check_placeholders(folder: Path, layout: str, tokenizer: TextTokenizer) -> None:
    fields = read_json(folder / CONFIG) if layout == "phi4_multimodal" else {}
    for modality, (part, key) in PLACEHOLDER_KEYS.items():
        told, own = fields.get(part, {}).get(key), tokenizer.control(PLACEHOLDERS[modality]) if fields else None
        if told not in (None, own):
            raise CheckpointError(
                f"{folder / CONFIG}: {part}.{key}={told!r:.40}, and {folder / TOKENIZER} has "
                f"{PLACEHOLDERS[modality]} at {own}; they are not of one model"
            )


def _with_hidden(folder: Path, card: Card, tokenizer: TextTokenizer) -> Card:
    """Return the card with the ids that a Phi-3-small never says: the released code has them from its tokenizer."""
    small = card.config.decoder.phi3_small
    if small is None or card.layout == "modalora" or _HIDDEN in read_json(folder / CONFIG, most=CONFIG_BYTES):
        return card
    if lacks := [token for token in _NEVER_SAID if not tokenizer.has_control(token)]:
        raise CheckpointError(
            f"{folder / CONFIG}: {_HIDDEN} is missing, and the tokenizer has no control token {lacks[0]} to tell it "
            "by; add the list of ids that are never said, [] for none"
        )
    unsaid = (token for token in tokenizer.controls if token in _NEVER_SAID or "dummy_id" in token)
    small = replace(small, hidden_tokens=tuple(sorted(map(tokenizer.control, unsaid))))
    return replace(card, config=replace(card.config, decoder=replace(card.config.decoder, phi3_small=small)))


def published_chat(folder: Path, layout: str, tokenizer: TextTokenizer) -> ChatFormat:
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


def published_stop_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end an answer by a published model's generation_config.json, or its config without one."""
    path = inside(folder, "generation_config.json")
    path = path if path.exists() else inside(folder, CONFIG)
    return _ids(read_json(path, most=CONFIG_BYTES).get("eos_token_id"), f"{path}: eos_token_id", vocab_size)


def _ids(told: Any, where: str, vocab_size: int) -> tuple[int, ...]:
    ids = [] if told is None else told if isinstance(told, list) else [told]
    wrong = [index for index in ids if type(index) is not int or not 0 <= index < 2**31]
    if wrong:
        number = f"{wrong[0]!r:.40}" if not isinstance(wrong[0], int) or abs(wrong[0]) < 2**63 else "a large number"
        raise CheckpointError(
            f"{where} has {number}; it must be a token id, below {vocab_size:,} in this model, or a list of them"
        )
    # small models that were made from a published one's config keep its ids, which end nothing
    return tuple(index for index in ids if index < vocab_size)
