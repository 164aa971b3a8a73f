"""The example of fine-tuning on one's own files runs as it is written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from modalora.checkpoint.store import load_model
from modalora.config import load_run
from modalora.data.check import check_data
from modalora.models.multimodal import part_of
from modalora.training.run import open_context, run_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(ROOT)
    return [f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", "steps=2", "log_every=1"]


def test_every_row_of_the_example_is_good(small: list[str]) -> None:
    run = load_run(ROOT / "examples" / "finetune" / "recipe.yaml", small)
    (found,) = check_data(open_context(run), run.mixture)
    assert found.bad == []
    assert found.rows == 12
    assert found.media == {"image": 6, "audio": 4}
    assert found.read[0].endswith(
        "read as messages because its records have 'messages' of role and content, as OpenAI's"
    )


def test_the_example_trains_the_adapters_and_nothing_else(small: list[str]) -> None:
    run = load_run(ROOT / "examples" / "finetune" / "recipe.yaml", small)
    folder = run_recipe(run)
    before, after = load_model(ROOT / "src" / "modalora" / "bundled" / "nano").model, load_model(folder).model
    tensors = after.state_dict()
    moved = {part_of(name) for name, tensor in before.state_dict().items() if not tensor.equal(tensors[name])}
    assert moved == {"adapter.vision", "adapter.speech"}
    assert not (folder.parent / "quarantine.jsonl").exists()
