"""Folders of safetensors and JSON with a manifest: written whole or not at all, checked before anything is allocated.

A folder holds model.safetensors, config.json, tokenizer.json and manifest.json, which has size and SHA-256 of every
other file. Matrices may be stored as int8 with one float32 scale per row ("NAME.scale"); they are expanded when loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modalora.config import parse
from modalora.errors import CheckpointError
from modalora.models.multimodal import ModelConfig, Multimodal, parameter_counts
from modalora.processing.tokenizer import TextTokenizer

FORMAT = 1
MANIFEST, CONFIG, WEIGHTS, TOKENIZER = "manifest.json", "config.json", "model.safetensors", "tokenizer.json"
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def write_folder(folder: Path, fill: Callable[[Path], None], *, replace: bool = False) -> None:
    """Create `folder` from what `fill` writes into a draft beside it, then rename: a reader sees all of it or none.

    Raises CheckpointError when the folder exists and replace is False.
    """
    if folder.exists() and not replace:
        raise CheckpointError(f"{folder} exists; give a new folder, nothing was written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        fill(draft)
        files = {
            path.relative_to(draft).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
            for path in sorted(draft.rglob("*"))
            if path.is_file()
        }
        write_json(draft / MANIFEST, {"format": FORMAT, "files": files})
        for path in draft.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(old)
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_manifest(folder: Path, needed: Sequence[str] = ()) -> None:
    """Compare every file that the manifest lists with it; the needed ones must be listed.

    Raises CheckpointError naming each file that is missing, altered, unlisted or outside the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a model folder or the name of a bundled model")
    manifest = read_json(folder / MANIFEST)
    files: Any = manifest.get("files")
    listed = isinstance(files, dict) and all(isinstance(told, dict) for told in files.values())
    if manifest.get("format") != FORMAT or not listed:
        raise CheckpointError(f"{folder / MANIFEST} is not a manifest of format {FORMAT}")
    wrong = [f"{name} is not in the manifest" for name in needed if name not in files]
    for name, told in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            wrong.append(f"{name} lies outside the folder")
        elif not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != told.get("bytes"):
            wrong.append(f"{name} has {path.stat().st_size} bytes, the manifest says {told.get('bytes')}")
        elif digest(path) != told.get("sha256"):
            wrong.append(f"{name} was altered: its SHA-256 is not the manifest's")
    if wrong:
        raise CheckpointError(f"{folder} fails its manifest: {'; '.join(wrong)}; copy the folder again from its source")


def save_model(
    model: Multimodal,
    tokenizer: TextTokenizer,
    folder: Path,
    *,
    int8: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder. int8 stores every matrix as int8 with a scale per row (see `to_int8`)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if int8 and tensor.ndim >= 2 and tensor.shape[0] > 1:
            stored[name], stored[f"{name}.scale"] = to_int8(tensor)
        else:
            stored[name] = tensor

    def fill(draft: Path) -> None:
        save_file(stored, draft / WEIGHTS, metadata={"format": "pt"})
        fields = {"model_type": "modalora", "format": FORMAT, **asdict(model.config), "notes": dict(notes or {})}
        write_json(draft / CONFIG, fields)
        (draft / TOKENIZER).write_text(tokenizer.definition, encoding="utf-8")

    write_folder(folder, fill)


@dataclass(frozen=True)
class Loaded:
    """What a model folder holds."""

    model: Multimodal
    tokenizer: TextTokenizer
    notes: Mapping[str, Any]


def read_config(folder: Path) -> tuple[ModelConfig, Mapping[str, Any]]:
    """Return the networks' config and the notes of a model folder."""
    fields = read_json(folder / CONFIG)
    if fields.pop("model_type", None) != "modalora":
        raise CheckpointError(f"{folder / CONFIG} is not of model_type 'modalora', the only layout this version reads")
    if fields.pop("format", None) != FORMAT:
        raise CheckpointError(f"{folder / CONFIG} is not of format {FORMAT}; load it with the version that wrote it")
    notes = fields.pop("notes", {})
    return parse(ModelConfig, fields, str(folder / CONFIG)), notes


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Loaded:
    """Read a model folder, checking manifest, names, shapes and dtypes against the config before allocating."""
    check_manifest(folder, (CONFIG, WEIGHTS, TOKENIZER))
    config, notes = read_config(folder)
    with torch.device("meta"):
        model = Multimodal(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = _read_tensors(folder / WEIGHTS, expected, dtype, device)
    model.load_state_dict(tensors, assign=True)
    tokenizer = TextTokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} ids, the config's vocab_size is "
            f"{config.decoder.vocab_size}; they are not of one model"
        )
    return Loaded(model=model.eval(), tokenizer=tokenizer, notes=notes)


def describe(folder: Path) -> dict[str, Any]:
    """Return what a model folder holds, after checking its manifest and tensors; no weights are allocated."""
    check_manifest(folder, (CONFIG, WEIGHTS, TOKENIZER))
    config, notes = read_config(folder)
    with torch.device("meta"):
        model = Multimodal(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        _check_tensors(folder / WEIGHTS, file, set(file.keys()), expected)
    parts = parameter_counts(model)
    return {
        "folder": str(folder),
        "layout": "modalora",
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "tensors": len(expected),
        "parameters": sum(parts.values()),
        "parts": parts,
        "adapters": {name: asdict(lora) for name, lora in config.adapters.items()},
        "window": config.decoder.rope.window,
        "vocab_size": config.decoder.vocab_size,
        "config": asdict(config),
        "notes": dict(notes),
    }


def to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values and one float32 scale per row (first axis), (rows, 1, ...); error is at most half a scale.

    Scales have bf16's eight bits: the largest value of a row is then 127 x scale without rounding, so storing an
    expanded matrix again gives the same bits.
    """
    flat = tensor.float().flatten(1)
    scale = (flat.abs().amax(1).clamp(min=1e-12) / 127).bfloat16().float()
    values = (flat / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return values.view(tensor.shape), scale.view(-1, *[1] * (tensor.ndim - 1))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; a key given twice is refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise CheckpointError(f"{path} has the key {', '.join(sorted(twice))} twice")
        return dict(pairs)

    try:
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a model folder needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds {type(fields).__name__}")
    return fields


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON object, two spaces deep."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device=device) as file:
            names = set(file.keys())
            _check_tensors(path, file, names, expected)
            tensors: dict[str, Tensor] = {}
            for name in expected:
                tensor = file.get_tensor(name)
                if tensor.dtype == torch.int8:
                    tensor = tensor.float() * file.get_tensor(f"{name}.scale")
                tensors[name] = tensor.to(dtype)
            return tensors
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def _check_tensors(path: Path, file: Any, names: set[str], expected: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [f"{name} is missing" for name in expected if name not in names]
    scales = {f"{name}.scale" for name in expected}
    wrong += [f"{name} is unknown" for name in sorted(names - set(expected) - scales)]
    for name in sorted(names & set(expected)):
        view = file.get_slice(name)
        shape, kind = tuple(view.get_shape()), view.get_dtype()
        if shape != expected[name]:
            wrong.append(f"{name} has shape {list(shape)}, the config implies {list(expected[name])}")
        if kind == "I8":
            scale = f"{name}.scale"
            if scale not in names or file.get_slice(scale).get_shape() != [shape[0], *[1] * (len(shape) - 1)]:
                wrong.append(f"{name} is int8 without a scale per row")
        elif kind not in _FLOATS:
            wrong.append(f"{name} has dtype {kind}; floats and int8 are read")
        elif f"{name}.scale" in names:
            wrong.append(f"{name}.scale belongs to no int8 tensor")
    if wrong:
        more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
        raise CheckpointError(f"{path} does not fit its config: {'; '.join(wrong[:8])}{more}")
