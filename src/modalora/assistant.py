"""The front door: `modalora.load(...)`, then `.ask`, `.stream`, `.logits`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from modalora.errors import CheckpointError
from modalora.models.multimodal import ModelConfig
from modalora.models.router import route
from modalora.processing.audio import AudioConfig
from modalora.processing.image import ImageConfig
from modalora.processing.processor import Processor
from modalora.processing.tokenizer import TextTokenizer

BUNDLED = Path(__file__).parent / "bundled"


def find_model(name: str | Path) -> Path:
    """Return the folder of a model: a path, or the name of a bundled model."""
    path = Path(name)
    if path.is_dir():
        return path
    if (BUNDLED / str(name)).is_dir():
        return BUNDLED / str(name)
    bundled = ", ".join(sorted(folder.name for folder in BUNDLED.glob("*") if folder.is_dir())) or "none"
    raise CheckpointError(f"no model folder {str(name)!r}; give a folder, or the name of a bundled model ({bundled})")


def make_processor(config: ModelConfig, tokenizer: TextTokenizer) -> Processor:
    """Return the processor that fits a model."""
    vision = config.vision
    return Processor(
        tokenizer,
        image=ImageConfig(crop=vision.crop, patch=vision.patch, max_crops=vision.max_crops) if vision else None,
        audio=AudioConfig(mels=config.speech.mels) if config.speech else None,
        window=config.decoder.rope.window,
        router=partial(route, adapters=tuple(config.adapters)),
    )
