from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch

from modalora.checkpoint.store import load_model
from modalora.cli.train import RECIPES
from modalora.config import load_run
from modalora.data.sources import SOURCES
from modalora.models.multimodal import Multimodal, part_of
from modalora.models.sizes import nano
from modalora.training.run import run_recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_sources_and_parts_that_exist(name: str) -> None:
    run = load_run(RECIPES / f"{name}.yaml")
    assert {source.source for source in run.mixture} <= set(SOURCES)
    with torch.device("meta"):
        parts = {part_of(parameter) for parameter, _ in Multimodal(nano()).named_parameters()}
    for pattern in (*run.train, *run.take, *run.optim.lr_scale):
        assert any(fnmatchcase(part, pattern) for part in parts), pattern


def test_a_recipe_starts_from_models_that_other_recipes_write() -> None:
    runs = [load_run(RECIPES / f"{name}.yaml") for name in NAMES]
    written = {f"{run.output}/model" for run in runs}
    for run in runs:
        assert {start for start in (run.init, *run.take.values()) if "/" in start} <= written


def test_the_base_recipe_runs_from_books_to_a_model_folder(tmp_path: Path) -> None:
    text = "".join(
        f"The {word} went home on day {day}.\n\n" for day in range(200) for word in ("cat", "dog", "old man")
    )
    (tmp_path / "books").mkdir()
    table = arrow.table({"name": ["one"], "title": ["One"], "text": [text]})
    parquet.write_table(table, tmp_path / "books" / "train.parquet")
    small = [
        "init=tiny",
        "steps=2",
        "rows=2",
        "accumulate=1",
        "window=16",
        f"data={tmp_path}",
        f"cache={tmp_path / 'cache'}",
    ]
    run = load_run(RECIPES / "nano-1-base.yaml", [*small, f"output={tmp_path / 'out'}"])
    folder = run_recipe(run)
    loaded = load_model(folder)
    assert loaded.notes["last"]["step"] == 2
    assert (folder.parent / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert run_recipe(run) == folder  # a finished run is not run again
