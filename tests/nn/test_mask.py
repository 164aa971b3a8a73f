"""Masks hold structure; the dense form is made when a backend needs it."""

from __future__ import annotations

import torch

from modalora.nn.mask import Mask

CPU = torch.device("cpu")


def test_a_mask_without_rules_is_no_tensor() -> None:
    assert Mask().dense(3, 4, CPU) is None


def test_the_rules_of_a_mask_hold_together() -> None:
    mask = Mask(causal=True, offsets=torch.tensor([0, 2]), lengths=torch.tensor([4, 3]))
    dense = mask.dense(2, 4, CPU)
    assert dense is not None
    assert dense.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0]]], [[[1, 1, 1, 0], [1, 1, 1, 0]]]]
