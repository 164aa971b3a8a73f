"""AdamW in few bits follows AdamW, in a quarter or half of the memory, and resumes to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modalora.config import OptimConfig
from modalora.errors import ConfigError
from modalora.parallel.engine import step_and_clear
from modalora.training.moments import SmallAdamW, table, to_codes
from modalora.training.optimizer import Optimizer


def problem(seed: int = 0) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Least squares with channels of very different scales, so that moments are too."""
    torch.manual_seed(seed)
    x = torch.randn(512, 128) * torch.logspace(-2, 1, 128)
    return nn.Linear(128, 160), x, x @ torch.randn(128, 160) + torch.randn(512, 160)


def run(optimizer: torch.optim.Optimizer, model: nn.Linear, x: torch.Tensor, y: torch.Tensor, steps: int) -> float:
    loss = torch.tensor(0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


SETTINGS = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8}


def small(model: nn.Module, bits: int) -> SmallAdamW:
    return SmallAdamW([{"params": list(model.parameters()), "weight_decay": 0.01}], bits=bits, **SETTINGS)


def test_with_all_bits_it_is_adamw() -> None:
    (one, x, y), (other, _, _) = problem(), problem()
    run(small(one, 32), one, x, y, 20)
    run(torch.optim.AdamW(other.parameters(), weight_decay=0.01, **SETTINGS), other, x, y, 20)
    torch.testing.assert_close(one.weight, other.weight, atol=1e-5, rtol=1e-5)  # float32 sums, seen 2e-6


@pytest.mark.parametrize(("bits", "bound"), [(16, 1.02), (8, 1.05)])
def test_the_loss_falls_as_with_all_bits(bits: int, bound: float) -> None:
    (one, x, y), (other, _, _) = problem(), problem()
    first = run(small(one, bits), one, x, y, 1)
    last = run(small(one, bits), one, x, y, 150)
    told = run(torch.optim.AdamW(other.parameters(), weight_decay=0.01, **SETTINGS), other, x, y, 151)
    assert told < 0.05 * first
    assert last < bound * told


@pytest.mark.parametrize(("bits", "size"), [(16, 2.0), (8, 1.0 + 4 / 256)])
def test_bytes_per_moment(bits: int, size: float) -> None:
    model, x, y = problem()
    optimizer = small(model, bits)
    run(optimizer, model, x, y, 1)
    held = sum(t.nbytes for name, t in optimizer.state[model.weight].items() if name.startswith("exp_avg"))
    assert held == 2 * size * model.weight.numel()
    assert all(tensor.dtype == torch.float32 for tensor in optimizer.state[model.bias].values())


@pytest.mark.parametrize("signed", [False, True])
def test_codes_are_the_nearest_of_their_table_to_a_bf16_rounding(signed: bool) -> None:
    torch.manual_seed(0)
    numbers = table(signed)
    assert len(numbers) == 256
    assert bool((numbers.diff() > 0).all())
    moment = torch.randn(1000) * torch.logspace(-5, 0, 1000)
    moment = moment if signed else moment.square()
    codes, scale = to_codes(moment, signed=signed)
    found = (numbers[codes.int()] * scale).flatten()[:1000]
    scale = scale.expand(-1, 256).flatten()[:1000]
    nearest = (moment[:, None] / scale[:, None] - numbers).abs().min(1).values * scale
    away = (found - moment).abs()
    # rounding to bf16 moves a number by 2^-8 of it, there and back; the least code but 0 also stands for all below
    assert bool(((away <= nearest + moment.abs() / 128) | (found == numbers[1] * scale)).all())


def test_a_second_moment_above_zero_is_never_written_as_zero() -> None:
    moment = torch.zeros(512)
    moment[0], moment[1], moment[2] = 1.0, 1e-20, 0.0
    codes, scale = to_codes(moment, signed=False)
    found = (table(False)[codes.int()] * scale).flatten()
    assert found[1] > 0
    assert found[2] == 0


@pytest.mark.parametrize("bits", [8, 16])
def test_state_goes_through_the_optimizer_to_the_bit(bits: int) -> None:
    ends = []
    for cut in (False, True):
        model, x, y = problem()
        trained = {"decoder.weight": model.weight, "decoder.bias": model.bias}
        config = OptimConfig(lr=0.03, state_bits=bits, warmup_steps=0)
        optimizer = Optimizer(trained, config, 10)
        for step in range(6):
            if cut and step == 3:
                state = optimizer.state()
                optimizer = Optimizer(trained, config, 10)
                for name, own in optimizer.state().items():
                    own.copy_(state[name])
            (model(x) - y).square().mean().backward()
            optimizer.set_rate(step)
            step_and_clear(optimizer)
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)


def test_moments_that_would_not_move_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"betas\[1\]=0.999"):
        OptimConfig(state_bits=16, betas=(0.9, 0.999))
    with pytest.raises(ConfigError, match="state_bits=8 is for name: adamw"):
        OptimConfig(name="muon", state_bits=8)
