"""The rows of the example, and the recipes for one's own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from modalora.checkpoint.store import load_model
from modalora.cli.recipes import find_recipe
from modalora.config import load_run
from modalora.data.check import check_data
from modalora.errors import DataError
from modalora.models.multimodal import part_of
from modalora.training.run import run_recipe
from modalora.training.start import open_context

ROOT = Path(__file__).parents[2]


ROWS = ROOT / "examples" / "finetune" / "rows.jsonl"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    out = [f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", "steps=2", "tokens=1024", "log_every=1"]
    return [*out, f"mixture.0.options.path={ROWS}"]


def test_every_row_of_the_example_is_good(small: list[str]) -> None:
    run = load_run(find_recipe("finetune-media"), small)
    (found,) = check_data(open_context(run), run.mixture)
    assert found.bad == []
    assert found.rows == 12
    assert found.media == {"image": 6, "audio": 4}
    assert found.read[0].endswith(
        "read as messages because its records have 'messages' of role and content, as OpenAI's"
    )


@pytest.mark.parametrize(
    ("recipe", "parts"), [("finetune-media", {"adapter.vision", "adapter.speech"}), ("finetune-text", {"adapter.mine"})]
)
def test_a_recipe_for_own_rows_trains_its_adapters_and_nothing_else(
    recipe: str, parts: set[str], small: list[str]
) -> None:
    folder = run_recipe(load_run(find_recipe(recipe), small))
    before, after = load_model(ROOT / "src" / "modalora" / "bundled" / "nano").model, load_model(folder).model
    given = before.state_dict()
    moved = {
        part_of(name) for name, own in after.state_dict().items() if name not in given or not own.equal(given[name])
    }
    assert moved == parts
    assert not (folder.parent / "quarantine.jsonl").exists()


def test_a_frozen_decoder_of_random_weights_is_pointed_out(small: list[str], tmp_path: Path) -> None:
    told: list[str] = []
    run = load_run(find_recipe("finetune-text"), [*small, "init=nano", f"data={tmp_path}"])
    with pytest.raises(DataError, match=r"books/train.parquet is missing"):
        run_recipe(run, say=told.append)
    (line,) = told
    assert line.startswith("init=nano names a size, so the decoder is random, and frozen")
    assert line.endswith("the trained one is bundled/nano")
