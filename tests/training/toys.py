"""A tiny model, batches of every kind of row, and settings of short runs, for the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalora.config import OptimConfig, RunConfig, SourceConfig
from modalora.contracts import IGNORED, Batch, Media, Route, image_tokens, subsampled
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny


def fresh() -> Multimodal:
    torch.manual_seed(0)
    return Multimodal(tiny())


def settings(output: Path, *parts: str, **changes: object) -> RunConfig:
    fields = {
        "init": "tiny",
        "output": str(output),
        "train": list(parts or ("decoder",)),
        "mixture": [SourceConfig(source="books")],
        "steps": 4,
        "precision": "fp32",
        "log_every": 1,
        "save_every": 1000,
        "optim": OptimConfig(lr=1e-3, warmup_steps=2),
    }
    return RunConfig.model_validate({**fields, **changes})


def text(step: int, rows: int = 4) -> Batch:
    """Counting by threes from a random start: easy to learn."""
    start = torch.randint(0, 60, (rows, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + 3 * torch.arange(16)) % 60
    return Batch(input_ids=ids, lengths=torch.full((rows,), 16), route=Route((None,) * rows), labels=ids.clone())


def mixed(step: int) -> Batch:
    """A row of each kind: text, image, speech, image and speech."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 320, (4, 30), generator=generator)
    lengths = torch.tensor([12, 25, 20, 30])
    labels = torch.where(torch.arange(30) < lengths[:, None], ids, IGNORED)
    labels[:, :8] = IGNORED

    def picture(row: int) -> Media:
        pixels = torch.randn(2, 3, 56, 56, generator=generator)
        features = {"pixels": pixels, "mask": torch.ones(2, 4, 4, dtype=torch.bool), "grid": torch.tensor([1, 1])}
        return Media("image", features, row, 1, image_tokens(4, 4, 4), "vision")

    def sound(row: int, branch: str) -> Media:
        mel = torch.randn(37, 80, generator=generator)
        return Media("audio", {"mel": mel}, row, 14, subsampled(37), branch)

    return Batch(
        input_ids=ids,
        lengths=lengths,
        route=Route((None, "vision", "speech", "vision")),
        media=(picture(1), sound(2, "speech"), picture(3), sound(3, "vision")),
        labels=labels,
    )


class Steps:
    """Batches that are a function of the step."""

    def __init__(self, make: Callable[[int], list[Batch]]) -> None:
        self.make, self.taken = make, 0

    def take(self) -> list[Batch]:
        self.taken += 1
        return self.make(self.taken - 1)

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]


def weights(model: Multimodal) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
