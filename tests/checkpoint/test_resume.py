"""States of a run: the newest whole one is read, a few are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modalora.checkpoint.resume import load_state, save_state, states
from modalora.errors import CheckpointError


def save(run: Path, step: int, keep: int = 2) -> None:
    save_state(run, step, {"x": torch.full((2,), float(step))}, {"note": "n"}, keep)


def test_a_run_without_states_has_none(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert states(tmp_path) == []


def test_the_newest_states_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        save(tmp_path, step)
    assert [folder.name for folder in states(tmp_path)] == ["00000020", "00000100"]
    found = load_state(tmp_path)
    assert found is not None
    tensors, fields = found
    assert tensors["x"].tolist() == [100.0, 100.0]
    assert fields == {"step": 100, "note": "n"}


def test_a_state_may_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save_state(tmp_path, 5, {"x": torch.zeros(1)}, {}, 2)
    found = load_state(tmp_path)
    assert found is not None
    assert found[0]["x"].tolist() == [0.0]


def test_an_altered_state_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = states(tmp_path)[-1] / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    found = load_state(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1


def test_a_run_whose_states_are_all_altered_is_not_begun_anew_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (states(tmp_path)[0] / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no state .* is whole: .*state.json is missing.*; remove the folder"):
        load_state(tmp_path)
