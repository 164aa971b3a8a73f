"""Tensors that are cut over ranks, on disk: every rank writes its own pieces, any number of ranks reads them.

torch.distributed.checkpoint plans who writes and reads what. The files are safetensors, whose headers tell where each
piece belongs: unlike the plan that it writes by default, they hold no pickle, so that opening them runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from modalora.errors import CheckpointError

NOTES = "notes.json"


def write(folder: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Write every rank's pieces of the tensors into a folder that all ranks see. Raises OSError on all ranks alike."""
    if dist.get_rank(group) == 0:
        folder.mkdir()
        (folder / NOTES).write_text(json.dumps(dict(notes)), encoding="utf-8")
    dist.barrier(group)
    held: dict[str, Any] = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        dcp.save(
            held, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), process_group=group
        )
    except CheckpointException as failed:
        raise _first(failed) from None


def read(folder: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Fill the tensors, cut in whatever way, from what `write` wrote.

    Raises CheckpointError when a name is missing or left over, a shape or dtype differs, or the notes are others.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        told = json.loads((folder / NOTES).read_text(encoding="utf-8"))
        found: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None
    if told != dict(notes):
        raise CheckpointError(f"{folder} is of {told}, the state it lies in of {dict(notes)}; it was put there by hand")
    if odd := sorted(set(found) ^ set(tensors)):
        how = "is left over" if odd[0] in found else "is missing"
        raise CheckpointError(f"{folder}: {odd[0]} {how} ({len(odd)} such); it is of another model or run")
    for name, tensor in tensors.items():
        size, dtype = found[name].size, found[name].properties.dtype
        if size != tensor.shape or dtype != tensor.dtype:
            raise CheckpointError(f"{folder}: {name} is {list(size)} of {dtype}, not {list(tensor.shape)} of {tensor.dtype}")
    try:
        dcp.load({name: tensor.detach() for name, tensor in tensors.items()}, storage_reader=reader, process_group=group)
    except CheckpointException as failed:
        raise CheckpointError(f"{folder} cannot be read: {_first(failed)}") from None


def _first(failed: CheckpointException) -> BaseException:
    rank, (error, _) = min(failed.failures.items())
    return OSError(f"rank {rank}: {error}")
