"""A language as an adapter: an ordinary recipe with a route on its rows, and `--route` to ask for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import modalora
from modalora.assistant import Assistant, make_processor
from modalora.config import SourceConfig, load_run
from modalora.data.mixture import Mixture
from modalora.data.sources import Context
from modalora.errors import ConfigError, RouteError
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.processing.processor import Row
from modalora.processing.questions import question_messages
from modalora.processing.tokenizer import TextTokenizer
from modalora.training.run import run_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "language"
TEXT = (EXAMPLE / "gl.txt").read_text(encoding="utf-8")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "base"
    processor = make_processor(tiny(), TextTokenizer.train(["the quick brown fox jumps. " * 9, TEXT], 320))
    Assistant(Multimodal(tiny()).eval(), processor).save(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's recipe on a tiny model."""
    out = tmp_path_factory.mktemp("gl")
    # the tiny model is random: its adapter needs a higher rate than nano's
    small = [f"init={base}", f"output={out}", "steps=40", "window=32", "optim.lr=0.02"]
    small.append(f"mixture.0.options.path={EXAMPLE / 'gl.txt'}")
    return run_recipe(load_run(EXAMPLE / "recipe.yaml", small))


def loss(assistant: Assistant, route: str) -> float:
    ids = assistant.processor.tokenizer.encode(TEXT)[:400]
    row = Row(ids=ids, labels=list(ids), route=route)
    with torch.no_grad():
        return float(assistant.model.loss(assistant.processor.collate([row]))[0].mean())


def test_the_recipe_teaches_its_route_and_leaves_the_decoder_to_the_bit(base: Path, trained: Path) -> None:
    before, after = modalora.load(base), modalora.load(trained)
    # nats per token; without a working route the two are one number (a random decoder cannot be led further than 0.2)
    assert loss(after, "gl") < loss(after, "none") - 0.1
    assert loss(after, "none") == loss(before, "none")
    assert torch.equal(before.logits("the fox"), after.logits("the fox"))
    assert torch.equal(before.logits(question_messages("?", PICTURE)), after.logits(question_messages("?", PICTURE)))


def test_its_folder_is_an_adapter_for_the_base(base: Path, trained: Path) -> None:
    after, other = modalora.load(trained), modalora.load(base)
    other.load_adapter(trained.parent / "gl-lora", "gl")
    assert torch.equal(other.logits("O mar", route="gl"), after.logits("O mar", route="gl"))


def test_rows_of_the_language_stand_in_a_batch_with_others(trained: Path) -> None:
    assistant = modalora.load(trained)
    processor = assistant.processor
    rows = [processor.row(question_messages(text)) for text in ("O mar está", "the quick brown fox")]
    rows.append(processor.row(question_messages("Which?", PICTURE)))
    rows[0].route = "gl"
    batch = processor.collate(rows, labelled=False)
    assert batch.route.adapters == ("gl", None, "vision")
    together = assistant.model(batch)
    alone = assistant.logits("O mar está", route="gl")
    # float32, two layers: the order of sums alone differs (worst seen 2e-6)
    torch.testing.assert_close(together[0, : len(alone)], alone, atol=1e-4, rtol=0)


def test_a_mixture_routes_each_source(trained: Path, tmp_path: Path) -> None:
    context = Context(tmp_path, tmp_path, modalora.load(trained).processor, window=16)
    files = {"path": str(EXAMPLE / "gl.txt")}
    sources = [SourceConfig(source="files", options=files, route=route) for route in ("gl", None)]
    (batch,) = Mixture(context, sources, rows=12, accumulate=1, seed=0).take()
    assert set(batch.route.adapters) == {"gl", None}
    with pytest.raises(RouteError, match="unknown route 'lg'; use one of auto, none, gl, speech, vision"):
        Mixture(context, [SourceConfig(source="files", options=files, route="lg")], rows=1, accumulate=1, seed=0).take()


def test_it_is_asked_by_its_route(trained: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    told = [run("ask", str(trained), "O mar", "--route", route, "--max-tokens", "12") for route in ("gl", "auto")]
    assert [code for code, *_ in told] == [0, 0]
    assert told[0][1] != told[1][1]


def test_an_adapter_that_is_there_already_is_not_added_again(trained: Path, tmp_path: Path) -> None:
    run = load_run(EXAMPLE / "recipe.yaml", [f"init={trained}", f"output={tmp_path}"])
    with pytest.raises(ConfigError, match="has the adapter 'gl' already"):
        run_recipe(run)
