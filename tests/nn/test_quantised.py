"""Matrices in few bits: how far they are from what they were, and how small."""

from __future__ import annotations

import pytest
import torch

from modalora.errors import ConfigError
from modalora.nn.quantised import BLOCK, LEVELS, Int8, Nf4, check_bits


def matrix(rows: int = 96, columns: int = 256) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns)


def test_int8_is_off_by_half_a_step_of_its_row_at_most() -> None:
    given = matrix() * torch.logspace(-3, 3, 96)[:, None]
    away = (Int8(given).expand(torch.float32) - given).abs().amax(1)
    steps = given.abs().amax(1) / 127
    assert bool((away <= 0.502 * steps).all())  # half a step, and the scale's own rounding to bf16 (2^-9)
    assert bool((away > 0.3 * steps).all())


def test_what_int8_keeps_is_kept_again_bit_for_bit() -> None:
    once = Int8(matrix()).expand(torch.float32)
    assert torch.equal(Int8(once).expand(torch.float32), once)
    assert torch.equal(Int8(once).expand(torch.bfloat16), once.bfloat16())


def test_nf4_takes_the_nearest_level_of_its_block() -> None:
    given = matrix()
    kept = Nf4(given)
    found = kept.expand(torch.float32)
    scales = given.view(-1, BLOCK).abs().amax(1, keepdim=True).bfloat16().float()
    levels = torch.tensor(LEVELS)
    nearest = (given.view(-1, BLOCK, 1) - scales[..., None] * levels).abs().argmin(-1)
    torch.testing.assert_close(found, (scales * levels[nearest]).view_as(given), atol=0, rtol=0)
    # QLoRA's own figure for a normal distribution is near 0.09 of its deviation
    assert 0.07 < float((found - given).std()) < 0.11


def test_zeros_stay_zeros_under_a_scale_above_zero() -> None:
    given = matrix()
    given[3] = 0
    for kind in (Int8, Nf4):
        kept = kind(given)
        assert not kept.expand(torch.float32)[3].any()
        assert float(kept.scales.min()) > 0


def test_bits_are_what_they_are_called() -> None:
    given = matrix()
    for kind, bits in ((Int8, 8 + 16 / 256), (Nf4, 4 + 16 / 64)):
        kept = kind(given)
        assert sum(buffer.nbytes for buffer in kept.buffers()) * 8 / given.numel() == bits
        assert not kept.state_dict()


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 64 numbers; this matrix is"):
        check_bits(4, (96, 100))
