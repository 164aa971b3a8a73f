"""Which folder is meant by the name of a model, and what a folder is that holds none."""

from __future__ import annotations

import os
from pathlib import Path

from modalora.checkpoint.adapters import CONFIG as ADAPTER
from modalora.checkpoint.files import MANIFEST
from modalora.checkpoint.resume import STATE
from modalora.errors import CheckpointError, ConfigError, listed

BUNDLED = Path(__file__).parents[1] / "bundled"

_ORIGINAL = "give the folder with the model's original config.json, tokenizer.json and safetensors"


def find_model(name: object) -> Path:
    """Return the folder of a model: a path, or the name of a bundled model.

    "bundled/NAME" is the same, for recipes, where a bare nano means fresh weights of that size. Raises ConfigError for
    what is neither, CheckpointError where there is no model.
    """
    if not isinstance(name, str | os.PathLike):
        raise ConfigError(f"the model {name!r:.60} must be a folder, or the name of a bundled model")
    path = Path(name)
    if path.is_dir():
        _check_model_folder(path)
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            raise CheckpointError(f"{str(name)!r} is GGUF, which is not read; {_ORIGINAL}")
        raise CheckpointError(f"{str(name)!r} is a file; give the folder of a model")
    short = str(name).removeprefix("bundled/")
    if (BUNDLED / short).is_dir():
        return BUNDLED / short
    bundled = ", ".join(sorted(folder.name for folder in BUNDLED.glob("*/") if (folder / "config.json").exists()))
    raise CheckpointError(
        f"no model folder {str(name)!r}; give a folder, or a bundled model ({bundled or 'none here'})"
    )


def _check_model_folder(path: Path) -> None:
    """Say what a folder is that holds no model, but an adapter, GGUF or a run. Raises CheckpointError."""
    held = any(path.glob("model*.safetensors*"))
    if (path / ADAPTER).is_file() and not held:
        raise CheckpointError(
            f"{path} is an adapter, not a model; load the model that it was trained on, and then "
            f"load_adapter({str(path)!r}, 'mine') (command line: --adapter mine={path} --route mine)"
        )
    if not held and (gguf := sorted(path.glob("*.gguf"))):
        raise CheckpointError(f"{gguf[0]} is GGUF, which is not read; {_ORIGINAL}")
    if (path / "model" / "config.json").is_file() and not (path / "config.json").exists():
        raise CheckpointError(f"{path} is the folder of a run; give the model in it, {path / 'model'}")
    if (path / STATE).is_file() and (path / MANIFEST).is_file() and not (path / "config.json").exists():
        model = path.absolute().parents[1] / "model"
        raise CheckpointError(
            f"{path} is a state from which training goes on, no model; a run ends with one in {model}"
        )


def check_adapter_folder(path: Path) -> None:
    """Say where the adapters are of a folder that only holds some, as runs write it. Raises CheckpointError."""
    if not (path / ADAPTER).exists() and (held := sorted(path.glob(f"*/{ADAPTER}"))):
        told = [str(one.parent) for one in held]
        raise CheckpointError(f"{path} is no adapter but holds some; give {listed(told, between=' or ')}")
