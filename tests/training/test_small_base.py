"""A recipe on a base of 4 bits: adapters train, and the model that is written has the plain base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import modalora
from modalora.checkpoint.store import load_model
from modalora.config import RunConfig, SourceConfig
from modalora.errors import ConfigError
from modalora.models.multimodal import part_of
from modalora.training.run import run_recipe

NANO = Path(modalora.__file__).parent / "bundled" / "nano"


def short_run(folder: Path, init: Path, **more: Any) -> RunConfig:
    """Two steps of the vision adapter."""
    fields = {
        "init": str(init),
        "output": str(folder / "run"),
        "data": str(folder),
        "cache": str(folder / "cache"),
        "train": ["adapter.vision"],
        "mixture": [SourceConfig(source="pictures", options={"turns": 1})],
        "rows": 1,
        "steps": 2,
    }
    return RunConfig.model_validate(fields | more)


def test_what_a_four_bit_base_trained_is_written_with_the_plain_base(tmp_path: Path) -> None:
    run = short_run(tmp_path, NANO, base_bits=4, recompute=True, optim={"state_bits": 8})
    before, after = (modalora.load(place).model.state_dict() for place in (NANO, run_recipe(run)))
    moved = {part_of(name) for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {"adapter.vision"}


def test_on_a_bf16_model_what_trains_is_float32_and_takes_steps_that_bf16_would_round_away(tmp_path: Path) -> None:
    whole = modalora.load(NANO, dtype="bfloat16")
    whole.save(tmp_path / "half")
    assert {tensor.dtype for tensor in load_model(tmp_path / "half").model.state_dict().values()} == {torch.bfloat16}
    run = short_run(tmp_path, tmp_path / "half", optim={"lr": 1e-6, "warmup_steps": 0})
    before, after = load_model(tmp_path / "half").model.state_dict(), load_model(run_recipe(run)).model.state_dict()
    for name, tensor in after.items():
        learnt = part_of(name) == "adapter.vision"
        assert tensor.dtype == (torch.float32 if learnt else torch.bfloat16), name
        assert torch.equal(tensor, before[name].to(tensor.dtype)) != learnt, name


def test_a_decoder_in_few_bits_cannot_be_trained() -> None:
    mixture = [SourceConfig(source="books")]
    with pytest.raises(ConfigError, match="must be frozen"):
        RunConfig(init="nano", output="x", train=["dec*"], mixture=mixture, steps=1, base_bits=8)
