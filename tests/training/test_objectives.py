"""CTC against a sum over all its paths, where its head starts, cells one by one, and rows that turned out bad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Steps, assert_same_bits, fresh, mixed, settings, weights

from modalora.config import load_run
from modalora.config.recipes import RECIPES
from modalora.contracts import BLANK, IGNORED, Batch, Media, Route
from modalora.models.sizes import tiny
from modalora.training.fresh import count_said
from modalora.training.loop import train
from modalora.training.objectives import OBJECTIVES, Cells, Ctc
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


def test_ctc_reads_each_sound_against_its_own_row() -> None:
    model, batch = fresh(), sounds()
    objective = Ctc(model)
    found = objective(model, replace(batch, media=batch.media[::-1]))
    assert found.rows.tolist() == [1, 0]
    assert found.values.flip(0).tolist() == pytest.approx(objective(model, batch).values.tolist(), abs=1e-6)


def test_an_answer_of_more_tokens_than_its_sound_has_frames_loses_nothing() -> None:
    model, batch = fresh(), sounds()
    assert batch.labels is not None
    batch.labels[0, 4:11] = torch.tensor([7, 9, 7, 9, 7, 9, END])  # six tokens on five frames: no path says them
    objective = Ctc(model)
    values = objective(model, batch).values
    assert values[0] == 0 < values[1]
    values.sum().backward()
    assert all(bool(own.grad.isfinite().all()) for own in objective.parameters() if own.grad is not None)


def seen(step: int = 0) -> Batch:
    """A picture whose tokens all have kinds, colours and sizes, but for two; few of them tell the whole picture."""
    batch = mixed(step).select([1])
    (item,) = batch.media
    generator = torch.Generator().manual_seed(step)
    cells = torch.randint(0, Cells.CLASSES, (item.tokens, Cells.ATTRIBUTES), generator=generator)
    counts = torch.randint(0, Cells.LEVELS, (item.tokens, 2, Cells.COUNTS // 2), generator=generator)
    cells[[1, 4]], counts[[1, 4]] = IGNORED, IGNORED
    counts[::2, 1] = IGNORED
    return replace(batch, media=(replace(item, features={**item.features, "cells": cells, "counts": counts}),))


def test_a_token_loses_the_sum_of_its_cell_and_the_mean_of_its_counts() -> None:
    model, batch = fresh(), seen()
    objective = Cells(model)
    (item,) = batch.media
    (features,) = model.encoders["image"]([dict(item.features)])

    def loss(logits: torch.Tensor, target: int) -> float:
        return float(logits.logsumexp(0) - logits[target])

    of_cells, of_counts = list[float](), list[float]()
    for place in range(item.tokens):
        cells, counts = item.features["cells"][place].tolist(), item.features["counts"][place].flatten().tolist()
        if cells[0] == IGNORED:
            continue
        logits = objective.cells(features[place]).detach().double().split(Cells.CLASSES)
        of_cells.append(sum(loss(own, target) for own, target in zip(logits, cells, strict=True)))
        logits = objective.counts(features[place]).detach().double().split(Cells.LEVELS)
        told = [loss(own, target) for own, target in zip(logits, counts, strict=True) if target != IGNORED]
        of_counts.append(sum(told) / len(told))
    found = objective(model, batch)
    # float32 sums of some hundred logarithms
    assert found.values.tolist() == pytest.approx([*of_cells, *of_counts], rel=1e-5)
    assert found.rows.tolist() == [0] * objective.count(batch)


def blank() -> Batch:
    """The row that stands in for a micro-batch whose rows all turned out bad."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    labels = torch.full((1, 1), IGNORED)
    return Batch(input_ids=ids, lengths=torch.tensor([1]), route=Route((None,)), labels=labels, samples=(BLANK,))


@pytest.mark.parametrize(("objective", "part", "make"), [("ctc", "audio", sounds), ("cells", "image", seen)])
def test_rows_that_turned_out_bad_train_nothing_and_stop_nothing(
    tmp_path: Path, objective: str, part: str, make: Callable[[int], Batch]
) -> None:
    def trained(name: str, steps: Callable[[int], list[Batch]]) -> tuple[dict[str, Any], Any]:
        run = settings(tmp_path / name, f"{part}.encoder", objective=objective, steps=2)
        model = fresh()
        return train(run, model, Steps(steps)), weights(model)

    alone, plain = trained("alone", lambda step: [make(step)])
    beside, same = trained("beside", lambda step: [make(step), blank()])
    assert_same_bits(same, plain)
    assert (beside["loss"], beside["labels_per_second"] > 0) == (alone["loss"], True)
    last, _ = trained("last", lambda step: [blank()] if step else [make(step)])
    assert last["loss"] == 0


@pytest.mark.parametrize(
    ("objective", "modality", "branch"), [("ctc", "audio", "speech"), ("cells", "image", "vision")]
)
def test_what_is_encoded_for_other_ranks_alone_has_no_loss_and_gradients_of_zeros(
    objective: str, modality: str, branch: str
) -> None:
    model = fresh()
    head = OBJECTIVES[objective](model)
    found = head(model, replace(blank(), media=(model.smallest(modality, branch),)))
    assert len(found.values) == len(found.rows) == 0
    found.values.sum().backward()
    assert all(own.grad is not None and not own.grad.any() for own in head.parameters())
    read = [own.grad for own in model.encoders[modality].parameters() if own.grad is not None]
    assert read
    assert not any(own.any() for own in read)


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
