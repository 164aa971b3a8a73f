"""The state of a training run on disk: enough to go on as if it had not stopped."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from modalora.checkpoint.files import check_manifest, read_json, write_folder, write_json
from modalora.errors import CheckpointError

_STATE, _TENSORS = "state.json", "state.safetensors"


def save_state(run: Path, step: int, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], keep: int) -> None:
    """Write RUN/resume/STEP and remove all but the newest `keep`; the new one is whole before an old one goes."""

    def fill(draft: Path) -> None:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft / _TENSORS)
        write_json(draft / _STATE, {"step": step, **fields})

    write_folder(run / "resume" / f"{step:08d}", fill, replace=True)
    for old in states(run)[:-keep]:
        shutil.rmtree(old)


def load_state(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the newest whole state of a run, or None when there is none; an altered one is passed over for the one
    before."""
    problems: list[str] = []
    for folder in reversed(states(run)):
        try:
            check_manifest(folder)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return load_file(folder / _TENSORS), read_json(folder / _STATE)
    if problems:
        raise CheckpointError(
            f"no state under {run / 'resume'} is whole: {problems[0]}; remove the folder to start anew"
        )
    return None


def states(run: Path) -> list[Path]:
    """Return the state folders of a run, oldest first."""
    folder = run / "resume"
    return sorted(path for path in folder.glob("*") if re.fullmatch(r"\d{8}", path.name)) if folder.is_dir() else []
