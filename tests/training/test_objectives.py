"""CTC against a sum over all its paths, and where its head starts."""

from __future__ import annotations

from itertools import groupby, product
from pathlib import Path

import pytest
import torch
from toys import Steps, fresh, settings

from modalora.config import load_run
from modalora.config.recipes import RECIPES
from modalora.contracts import IGNORED, Batch, Media, Route
from modalora.models.sizes import tiny
from modalora.training.fresh import count_said
from modalora.training.loop import train
from modalora.training.objectives import Ctc
from modalora.training.run import run_recipe
from modalora.training.start import make_mixture, open_context

VOCABULARY, END = tiny().decoder.vocab_size, 3


def sounds(step: int = 0) -> Batch:
    """Two sounds of five tokens each; their answers are "7 9" and "8", each with the end tag."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.full((2, 12), IGNORED)
    labels[0, 8:11], labels[1, 8:10] = torch.tensor([7, 9, END]), torch.tensor([8, END])
    media = (Media("audio", {"mel": torch.randn(37, 80, generator=generator)}, row, 1, 5, "speech") for row in range(2))
    return Batch(
        input_ids=labels.clamp(min=0),
        lengths=torch.tensor([11, 10]),
        route=Route(("speech", "speech")),
        media=tuple(media),
        labels=labels,
    )


def test_ctc_is_the_chance_of_all_paths_that_say_the_answer() -> None:
    model, batch = fresh(), sounds()
    objective = Ctc(model)
    found = objective(model, batch)
    assert found.rows.tolist() == [0, 1]
    encoded = model.encoders["audio"]([dict(item.features) for item in batch.media])
    for features, answer, value in zip(encoded, ([7, 9], [8]), found.values, strict=True):
        chances = objective.head(features).detach().double().softmax(-1)
        symbols = [*answer, objective.blank]
        chance = sum(
            float(torch.stack([chances[frame, symbol] for frame, symbol in enumerate(path)]).prod())
            for path in product(symbols, repeat=len(features))
            if [symbol for symbol, _ in groupby(path) if symbol != objective.blank] == answer
        )
        wanted = -torch.tensor(chance).log() / len(answer)
        # float32 sums of five logarithms
        torch.testing.assert_close(float(value.detach()), float(wanted), atol=1e-5, rtol=1e-5)


def test_head_starts_with_how_often_tokens_are_said() -> None:
    model = fresh()
    objective = Ctc(model)
    counts = torch.zeros(VOCABULARY, dtype=torch.long)
    counts[[7, 9]] = torch.tensor([30, 10])
    objective.start_from(counts)
    chances = objective.head.bias.detach().softmax(0)
    torch.testing.assert_close(chances[[7, 9, -1]], torch.tensor([0.375, 0.125, 0.5]), atol=0.01, rtol=0)
    assert 0 < float(chances.sum() - chances[[7, 9, -1]].sum()) < 0.01  # what nobody said may yet be learnt
    assert float(objective.head.weight.detach().abs().max()) > 0


def test_a_run_starts_from_what_its_answers_say(tmp_path: Path) -> None:
    said = torch.zeros(VOCABULARY, dtype=torch.long)
    said[7:10] = 1
    first = {}
    for name, counts in (("even", None), ("said", said)):
        heard = []
        run = settings(tmp_path / name, "audio.encoder", objective="ctc", steps=2)
        train(run, fresh(), Steps(lambda step: [sounds(step)]), heard.append, said=counts)
        first[name] = heard[0]["loss"]
    assert first["said"] < 0.5 * first["even"]


@pytest.mark.data
def test_the_recipe_of_the_ears_starts_there(tmp_path: Path, data_folder: Path) -> None:
    heard = []
    changes = ["rows=2", "steps=1", "optim.warmup_steps=0", "log_every=1", f"output={tmp_path}", f"data={data_folder}"]
    run_recipe(load_run(RECIPES / "fold-1-ears.yaml", changes), heard.append)
    assert heard[0]["loss"] < 30  # from even chances 6 to 8 frames of log(4097) a digit: 50


@pytest.mark.data
def test_what_answers_say_is_counted_without_end_tags(data_folder: Path) -> None:
    single = ["mixture.0.options.most=1", "mixture.1.options.most=1"]
    run = load_run(RECIPES / "fold-1-ears.yaml", [f"data={data_folder}", "rows=8", *single])
    context = open_context(run)
    counts = count_said(make_mixture(run, context), 4096, steps=3)
    assert counts.sum() == 3 * 8
    words = {context.processor.tokenizer.decode([token]) for token in counts.nonzero().flatten().tolist()}
    assert words <= {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
