"""Tensors of a training state on disk: whole in one file, or every rank its own pieces; read by any number of ranks.

PLACE.safetensors holds whole tensors, the folder PLACE the pieces of ranks: torch.distributed.checkpoint plans who
writes what, and the header of each file tells where its pieces belong. Unlike the plan that it stores by default there
is no pickle, so opening a state runs no code. `notes` tie a file to the state that it lies in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from modalora.errors import CheckpointError, WorkError

_NOTES = "notes.json"


def write_whole(place: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write PLACE.safetensors. Raises OSError."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(held, place.with_suffix(".safetensors"), metadata=dict(notes))


def write_pieces(
    place: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str], group: dist.ProcessGroup | None = None
) -> None:
    """Write this rank's pieces of the tensors into the folder PLACE; all ranks call it. Raises WorkError on all alike.

    What several ranks hold is written by one of them.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # half a second, and one process never needs it
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if dist.get_rank(group) == 0:
        place.mkdir()
        (place / _NOTES).write_text(json.dumps(dict(notes)), encoding="utf-8")
    dist.barrier(group)
    held: dict[str, Any] = {name: tensor.detach() for name, tensor in tensors.items()}
    writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
    try:
        save(held, storage_writer=writer, process_group=group)
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        raise WorkError(f"rank {rank}: {error}") from None


def read(place: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Fill the tensors, whole or cut over ranks in whatever way, from what was written at PLACE.

    Every rank reads what it needs by itself. Raises CheckpointError when a name is missing or left over, a shape or
    dtype differs, or the notes are others.
    """
    held = {name: tensor.detach() for name, tensor in tensors.items()}
    if not place.is_dir():
        place = place.with_suffix(".safetensors")
    try:
        (_read_pieces if place.is_dir() else _read_whole)(place, held, notes)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{place} cannot be read: {error}") from None


def _read_whole(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    with safe_open(path, framework="pt") as file:
        _compare(path, dict(file.metadata() or {}), notes)
        _compare_names(path, set(file.keys()), set(tensors))
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            _compare_kind(path, name, found.shape, found.dtype, tensor)
            if isinstance(tensor, DTensor):
                found = distribute_tensor(found, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(found)


def _read_pieces(place: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    _compare(place, json.loads((place / _NOTES).read_text(encoding="utf-8")), notes)
    reader = HuggingFaceStorageReader(str(place))
    found: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    _compare_names(place, set(found), set(tensors))
    for name, tensor in tensors.items():
        _compare_kind(place, name, found[name].size, found[name].properties.dtype, tensor)
    try:
        load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as failed:
        raise CheckpointError(f"{place} cannot be read: {min(failed.failures.items())[1][0]}") from None


def _compare(place: Path, told: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for key in sorted({*told, *expected}):
        if told.get(key) != expected.get(key):
            raise CheckpointError(
                f"{place} is of {key} {told.get(key)!r}, the state it lies in of {expected.get(key)!r}; it was put "
                "there from elsewhere: remove the state's folder, the one before it is used then"
            )


def _compare_names(place: Path, found: set[str], expected: set[str]) -> None:
    if odd := sorted(found ^ expected):
        how = "is left over" if odd[0] in found else "is missing"
        raise CheckpointError(f"{place}: {odd[0]} {how} ({len(odd)} such); it is of another model or run")


def _compare_kind(place: Path, name: str, shape: torch.Size, dtype: torch.dtype, tensor: Tensor) -> None:
    if shape != tensor.shape or dtype != tensor.dtype:
        told = f"{list(shape)} of {dtype}, not {list(tensor.shape)} of {tensor.dtype}"
        raise CheckpointError(f"{place}: {name} is {told}")
