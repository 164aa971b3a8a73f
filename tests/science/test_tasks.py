"""Alignments and distances as AlphaFold 2 trains on them."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
import torch

from modalora.nn import blockwise
from modalora.science.evoformer import Evoformer, tiny
from modalora.science.tasks import (
    ALPHABET,
    BINS,
    GAP,
    HIDDEN,
    LETTERS,
    Distogram,
    Embedder,
    LetterHead,
    distance_bins,
    hide,
    letter_losses,
    letters,
)


def test_letters_are_numbers_in_the_order_of_alphafold() -> None:
    assert letters(ALPHABET).tolist() == list(range(22))
    assert letters("a.B-").tolist() == [0, GAP, ALPHABET.index("X"), GAP]


def test_an_embedding_is_the_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    embedder, msa = Embedder(tiny()), torch.randint(LETTERS, (2, 3, 50))
    m, z = embedder(msa, torch.arange(50).expand(2, -1))
    assert m.shape == (2, 3, 50, 24)
    torch.testing.assert_close(m[1, 2, 7], embedder.letter.weight[msa[1, 2, 7]] + embedder.target.weight[msa[1, 0, 7]])
    # 40 residues apart is as far as 32
    sides = embedder.left.weight[msa[0, 0, 45]] + embedder.right.weight[msa[0, 0, 5]]
    torch.testing.assert_close(z[0, 45, 5], sides + embedder.apart.weight[64])


def test_a_distance_is_in_the_bin_that_holds_it() -> None:
    points = torch.tensor([[0.0, 0, 0], [2.3, 0, 0], [5.0, 0, 0], [100.0, 0, 0]])
    bins = distance_bins(points)
    assert bins[0, 0] == 0
    assert bins[0, 1] == 0  # below 2.3125
    assert bins[0, 2] == int((5.0 - 2.3125) / 0.3125) + 1
    assert bins[0, 3] == bins[2, 3] == BINS - 1
    assert torch.equal(bins, bins.T)


def test_a_distogram_is_symmetric_and_starts_even() -> None:
    head, pair = Distogram(tiny()), torch.randn(1, 5, 5, 20)
    assert not head(pair).any()
    torch.nn.init.normal_(head.linear.weight)
    torch.testing.assert_close(head(pair), head(pair).transpose(1, 2))
    torch.testing.assert_close(head(pair)[0, 1, 2], head.linear(pair[0, 1, 2]) + head.linear(pair[0, 2, 1]))


def test_seven_of_ten_chosen_letters_are_hidden_and_no_other_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    msa = torch.randint(20, (40, 500), generator=generator)
    chosen = torch.rand(msa.shape, generator=generator) < 0.5
    changed = hide(msa, chosen, generator)
    assert torch.equal(changed[~chosen], msa[~chosen])
    # 10,000 draws: a standard deviation is 0.005
    assert (changed[chosen] == HIDDEN).float().mean() == pytest.approx(0.7, abs=0.02)
    # one in ten stays, and of the two in ten that are drawn one in twenty is what it was
    assert (changed[chosen] == msa[chosen]).float().mean() == pytest.approx(0.1 + 0.2 / 20, abs=0.02)
    alike = msa[:1].expand(40, -1)  # a column of one letter gives that letter
    drawn = hide(alike, chosen, generator)[chosen]
    assert (drawn == alike[chosen]).float().mean() == pytest.approx(0.2 + 0.1 / 20, abs=0.02)


def test_a_stack_learns_an_alignment_the_same_with_exact_attention_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "TILE", 8)  # twelve residues are two tiles
    curves = []
    for backend in ("eager", "blockwise"):
        torch.manual_seed(0)
        config = replace(tiny(), backend=backend)
        embedder, stack, head = Embedder(config).double(), Evoformer(config).double(), LetterHead(config).double()
        parameters = [parameter for part in (embedder, stack, head) for parameter in part.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=5e-3)
        generator = torch.Generator().manual_seed(1)
        msa = torch.randint(20, (1, 12), generator=generator).repeat(6, 1)  # six like sequences
        losses = []
        for _ in range(25):
            chosen = torch.rand(msa.shape, generator=generator) < 0.3
            m, _, _ = stack(*embedder(hide(msa, chosen, generator)[None], torch.arange(12)[None]))
            loss = letter_losses(head(m), msa[None])[chosen[None]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][0] == pytest.approx(log(LETTERS))
    assert curves[0][-1] < 0.7 * curves[0][0]
    # worst seen 1e-13 in these steps; a wrong gradient leaves the curve at the second step by 1e-3
    assert curves[1] == pytest.approx(curves[0], abs=1e-10)
