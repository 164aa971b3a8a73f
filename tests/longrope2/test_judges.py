"""Judges that ask a model: the numbers of a plain pass, and a surrogate that is exact where theory says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hills import documents, small_model
from torch import Tensor
from torch.nn import functional

from modalora.config import SearchConfig
from modalora.contracts import Batch, Route
from modalora.errors import ConfigError
from modalora.evaluation.needle import Document
from modalora.longrope2.factors import Factors, Stretch
from modalora.longrope2.judges import NeedleJudge, Surrogate, rotations
from modalora.longrope2.search import rank_correlation
from modalora.longrope2.space import space_of
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import tiny

STRETCH = Stretch.of(tiny().decoder.rope, 16, 2048)  # window 256, six pairs
SPACE = space_of(STRETCH, SearchConfig())
TEXTS = documents(5)
# one pass of several rows against rows alone, in float32: worst seen 1e-6 of 6 nats
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def candidates(count: int, seed: int = 0) -> list[Factors]:
    rng = np.random.default_rng(seed)
    return [SPACE.factors(SPACE.sample(rng)) for _ in range(count)]


def by_hand(model: Multimodal, factors: Factors, text: Document) -> float:
    """The mean nats of the answers from whole logits, by a model whose config holds the factors."""
    config = ModelConfig(decoder=replace(model.config.decoder, rope=factors.rope(model.config.decoder.rope)))
    own = Multimodal(config).eval()
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = own(Batch(torch.tensor([text.ids]), torch.tensor([len(text.ids)]), Route((None,))))[0].double()
    at = torch.tensor(text.answers)
    return float(functional.cross_entropy(logits[at - 1], torch.tensor(text.ids)[at]))


def test_losses_are_those_of_a_model_with_these_factors_from_whole_logits() -> None:
    model, own = small_model(), candidates(3)
    found = NeedleJudge(model, TEXTS).losses(own, [4, 0, 2])
    told = [[by_hand(model, factors, TEXTS[number]) for number in (4, 0, 2)] for factors in own]
    torch.testing.assert_close(found.double(), torch.tensor(told).double(), **TOLERANCE)
    assert float((found[0] - found[1]).abs().max()) > 1e-3  # candidates differ by more than that


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_rows_of_a_pass_change_no_number(rows: int) -> None:
    model, own = small_model(), candidates(4)
    torch.testing.assert_close(
        NeedleJudge(model, TEXTS, rows=rows).losses(own, range(5)),
        NeedleJudge(model, TEXTS, rows=5).losses(own, range(5)),
        **TOLERANCE,
    )


def test_only_answers_reach_the_output_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small_model(), []
    losses = model.decoder.losses

    def counted(hidden: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(hidden))
        return losses(hidden, targets)

    monkeypatch.setattr(model.decoder, "losses", counted)
    monkeypatch.setattr(model.decoder, "head", None)
    NeedleJudge(model, TEXTS, rows=100).losses(candidates(2), range(5))
    assert seen == [2 * 5 * 3]  # candidates, documents, answers


@pytest.mark.parametrize("kind", [NeedleJudge, Surrogate])
def test_judging_leaves_the_model_as_it_was(kind: Any) -> None:
    model = small_model().train()
    config, random = model.config, torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kind(model, TEXTS).losses(candidates(3), range(5))
    assert model.config is config
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_surrogate_is_exact_for_its_first_candidate() -> None:
    model, own = small_model(), candidates(3)
    exact = NeedleJudge(model, TEXTS).losses(own, range(5))
    near = Surrogate(model, TEXTS).losses(own, range(5))
    torch.testing.assert_close(near[0], exact[0], **TOLERANCE)
    assert not torch.allclose(near[1:], exact[1:], **TOLERANCE)  # two layers: the others lean on its hidden states


def test_the_surrogate_is_exact_in_a_model_of_one_layer() -> None:
    """There keys and values are made of embeddings, which no rotation has touched."""
    torch.manual_seed(0)
    model = Multimodal(ModelConfig(decoder=replace(tiny().decoder, num_hidden_layers=1))).eval()
    own = candidates(4)
    torch.testing.assert_close(
        Surrogate(model, TEXTS).losses(own, range(5)), NeedleJudge(model, TEXTS).losses(own, range(5)), **TOLERANCE
    )


def test_the_surrogate_leans_on_the_candidate_that_is_first_now() -> None:
    model, own = small_model(), candidates(4)
    surrogate = Surrogate(model, TEXTS)
    before = surrogate.losses(own, range(5))
    surrogate.losses(own[::-1], range(5))
    assert torch.equal(surrogate.losses(own, [0, 1, 2, 3, 4]), before)


def test_the_surrogate_ranks_candidates_nearly_as_a_whole_pass_does() -> None:
    model, own = small_model(), candidates(24)
    exact = NeedleJudge(model, TEXTS).losses(own, range(5)).mean(1)
    near = Surrogate(model, TEXTS).losses(own, range(5)).mean(1)
    assert rank_correlation(exact.tolist(), near.tolist()) > 0.9  # random weights; seen 0.98


def test_tables_are_those_of_the_config_to_the_bit() -> None:
    model, own = small_model(), candidates(2)
    tables = rotations(model, own)
    for row, factors in enumerate(own):
        rope = factors.rope(model.config.decoder.rope)
        assert torch.equal(tables.frequencies[row], rope.frequencies(16, long=True))
        assert float(tables.scale[row]) == pytest.approx(rope.attention_factor(long=True), rel=1e-7)


def test_candidates_for_another_window_are_refused() -> None:
    other = Factors.meeting(Stretch(theta=1e4, pairs=6, window=128, target=1024), 2, [8.0] * 4)
    with pytest.raises(ConfigError, match="stretch a window of 128 tokens, and the model's is 256"):
        NeedleJudge(small_model(), TEXTS).losses([other], [0])


@pytest.mark.parametrize("kind", [NeedleJudge, Surrogate])
def test_a_judge_without_documents_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match="0 documents"):
        kind(small_model(), [])
