"""Bits per token by how far the model may look back, against all logits in float64."""

from __future__ import annotations

import copy
from math import log, sqrt

import pytest
import torch
from stories import TEXTS

from modalora.contracts import Batch, Route
from modalora.errors import ConfigError, DataError
from modalora.evaluation.perplexity import LengthBits, bits_by_length, bits_gained
from modalora.models.multimodal import Multimodal
from modalora.processing.tokenizer import TextTokenizer


class Recorder:
    """Keeps the rows that a model is asked to read."""

    def __init__(self, model: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[list[int]] = []
        hidden = model.hidden

        def record(batch: Batch, **given: object) -> torch.Tensor:
            self.rows += [
                row[:length].tolist() for row, length in zip(batch.input_ids, batch.lengths.tolist(), strict=True)
            ]
            return hidden(batch, **given)

        monkeypatch.setattr(model, "hidden", record)


def test_every_length_scores_the_same_tokens_behind_more_or_less_text(
    model: Multimodal, letters: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Recorder(model, monkeypatch)
    found = bits_by_length(model, letters, TEXTS, [40, 300, 120], passages=3, scored=16, rows=2)
    assert [(one.length, one.tokens, len(one.each)) for one in found] == [(40, 48, 3), (300, 48, 3), (120, 48, 3)]
    short, whole, middle = seen.rows[:3], seen.rows[3:6], seen.rows[6:]
    for least, most, between in zip(short, whole, middle, strict=True):
        assert (len(least), len(most), len(between)) == (40, 300, 120)
        assert most[-40:] == least
        assert most[-120:] == between
    exact = copy.deepcopy(model).double()
    for one, rows in zip(found, (short, whole, middle), strict=True):
        for bits, row in zip(one.each, rows, strict=True):
            with torch.no_grad():
                shares = exact.decoder.head(
                    Multimodal.hidden(exact, Batch(torch.tensor([row]), torch.tensor([len(row)]), Route((None,))))
                )[0].log_softmax(-1)
            nats = -sum(float(shares[at - 1, row[at]]) for at in range(len(row) - 16, len(row))) / 16
            # float32 against float64: worst seen 2e-7 of 8 bits; one token of 16 left out is 1e-1
            assert bits == pytest.approx(nats / log(2), rel=1e-5)
        assert one.bits == pytest.approx(sum(one.each) / 3)


def test_by_default_half_the_shortest_window_is_scored(model: Multimodal, letters: TextTokenizer) -> None:
    (one, other) = bits_by_length(model, letters, TEXTS, [64, 100], passages=2)
    assert one.tokens == other.tokens == 2 * 32


def test_gains_are_compared_passage_by_passage() -> None:
    near, far = LengthBits(10, 2.0, 30, (1.0, 2.0, 3.0)), LengthBits(20, 2.5, 30, (1.4, 2.5, 3.6))
    gained, low, high = bits_gained(near, far)
    assert gained == pytest.approx(0.5)
    student = 4.302653  # of two degrees of freedom, as tables have it
    assert (low, high) == pytest.approx((0.5 - student * 0.1 / sqrt(3), 0.5 + student * 0.1 / sqrt(3)))
    assert near.interval == pytest.approx((2 - student / sqrt(3), 2 + student / sqrt(3)))
    assert bits_gained(near, near) == (0, 0, 0)
    told = near.as_json()
    assert (told["low"], told["high"], told["each"]) == (*near.interval, [1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="different passages"):
        bits_gained(near, LengthBits(20, 2.5, 40, (1.4, 2.5, 3.6, 1.0)))


def test_lengths_that_leave_nothing_to_score_are_refused(model: Multimodal, letters: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match="scored=40 must lie in 1 to 39, within the shortest window of 40"):
        bits_by_length(model, letters, TEXTS, [40, 80], scored=40)
    with pytest.raises(ConfigError, match="give a length, and 2 passages or more"):
        bits_by_length(model, letters, TEXTS, [], passages=3)
    with pytest.raises(DataError, match="no text of the 1 given has so many"):
        bits_by_length(model, letters, [TEXTS[0][:500]], [40, 5000])
