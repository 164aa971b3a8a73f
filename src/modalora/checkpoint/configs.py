"""config.json of published layouts <-> ModelConfig."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from modalora.checkpoint.config_decoder import as_written, read_phi3, read_small, write_phi3, write_small
from modalora.checkpoint.config_keys import Fields, Reader
from modalora.checkpoint.config_multimodal import read_native, read_official, write_native, write_official
from modalora.errors import ConfigError
from modalora.models.multimodal import ModelConfig
from modalora.models.vision import VisionConfig


def read_config(layout: str, fields: Fields, where: str) -> ModelConfig:
    """Return the networks that a published config.json describes. Raises ConfigError naming file, key and rule."""
    reader = Reader(fields, where)
    config = _READERS[layout](reader)
    reader.finish()
    return config


def write_config(layout: str, config: ModelConfig, tokens: Fields) -> dict[str, Any]:
    """Return the config.json of a layout. tokens: bos, eos and pad ids as transformers names them.

    Raises ConfigError when the layout cannot express the networks: what it would be read as differs.
    """
    fields = {**_WRITERS[layout](config), **tokens}
    back = read_config(layout, fields, f"the written config of layout {layout!r}")
    held = config if layout == "phi4mm" else replace(config, adapters={})
    held = replace(held, decoder=replace(held.decoder, rope=as_written(held.decoder.rope)))
    if (vision := held.vision) and layout == "phi4_multimodal":
        held = replace(held, vision=replace(vision, max_crops=VisionConfig().max_crops))
    if back != held:
        ours, theirs = _flat(asdict(held)), _flat(asdict(back))
        wrong = [
            f"{key}={ours.get(key)!r:.40} becomes {theirs.get(key)!r:.40}"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]
        raise ConfigError(f"the layout {layout!r} cannot express this model: {'; '.join(wrong[:4])}")
    return fields


def _flat(fields: Fields, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


_READERS: dict[str, Callable[[Reader], ModelConfig]] = {
    "phi3": read_phi3,
    "phi3small": read_small,
    "phi4mm": read_official,
    "phi4_multimodal": read_native,
}
_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "phi3": write_phi3,
    "phi3small": write_small,
    "phi4mm": write_official,
    "phi4_multimodal": write_native,
}
