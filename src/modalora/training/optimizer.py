"""What trains and how: parts chosen by pattern, AdamW (or Muon for matrices), warm-up and schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from math import cos, pi

import torch
from torch import nn

from modalora.config import OptimConfig
from modalora.errors import ConfigError
from modalora.models.multimodal import matches, part_of
from modalora.models.vision import VisionTower
from modalora.training.moments import SmallAdamW
from modalora.training.objectives import trained_part


def freeze(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let the parts that match a pattern train and freeze all others; return the trained parameters by name.

    A pattern is a part name of `part_of`, with * for any text. Raises ConfigError when a pattern matches nothing.
    """
    parts = sorted({part_of(name) for name, _ in model.named_parameters()})
    for pattern in patterns:
        if not any(matches(part, pattern) for part in parts):
            raise ConfigError(f"train: {pattern!r} matches no part of this model; its parts are {', '.join(parts)}")
    if not patterns:
        raise ConfigError(f"train: names no part, so nothing would learn; its parts are {', '.join(parts)}")
    trained: dict[str, nn.Parameter] = {}
    idle = _never_run(model)
    for name, parameter in model.named_parameters():
        chosen = matches(part_of(name), *patterns) and id(parameter) not in idle
        parameter.requires_grad_(chosen)
        if chosen:
            trained[name] = parameter
    return trained


def trained_parts(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Freeze a model as `freeze` does, and return the names of the parts that train."""
    return {part_of(name) for name in freeze(model, patterns)}


def _never_run(model: nn.Module) -> set[int]:
    """Parameters that no forward pass reads: the tower's last layer, norm and head, kept for the published layout."""
    idle: set[int] = set()
    for module in model.modules():
        if isinstance(module, VisionTower):
            for unused in (module.layers[-1], module.post_layernorm, module.head):
                if unused is not None:
                    idle |= {id(parameter) for parameter in unused.parameters()}
    return idle


# Tables, low-rank factors and output heads: Muon is for the matrices between hidden states.
_NOT_FOR_MUON = ("embed_tokens", "lm_head", "position_embedding", "lora_", "relative_bias", "objective.")


class Optimizer:
    """One or two torch optimisers over the trained parameters, stepped as one with a schedule."""

    def __init__(self, trained: dict[str, nn.Parameter], config: OptimConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.names = {id(parameter): name for name, parameter in trained.items()}
        muon: dict[float, list[nn.Parameter]] = defaultdict(list)
        adam: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in trained.items():
            factor = _factor(trained_part(name), config)
            matrix = parameter.ndim == 2 and not any(word in name for word in _NOT_FOR_MUON)
            if config.name == "muon" and matrix:
                muon[factor].append(parameter)
            else:
                adam[factor, config.weight_decay if parameter.ndim >= 2 else 0.0].append(parameter)
        self.parts: list[torch.optim.Optimizer] = []
        if adam:
            groups = [{"params": own, "factor": f, "weight_decay": decay} for (f, decay), own in adam.items()]
            kind = torch.optim.AdamW if config.state_bits == 32 else partial(SmallAdamW, bits=config.state_bits)
            self.parts.append(kind(groups, lr=config.lr, betas=config.betas, eps=config.eps))
        if muon:
            groups = [{"params": own, "factor": f} for f, own in muon.items()]
            self.parts.append(
                torch.optim.Muon(groups, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        for part in self.parts:
            _start(part)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        config = self.config
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        done = min(1.0, (step - config.warmup_steps) / max(1, self.steps - config.warmup_steps))
        down = {"cosine": 0.5 * (1 + cos(pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
        return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * down)

    def peak(self, part: str) -> float:
        """Return the highest learning rate of a part."""
        return self.config.lr * _factor(part, self.config)

    def set_rate(self, step: int) -> None:
        """Give every group of parameters its learning rate of a step, counted from 0."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.rate(step) * group["factor"]

    def state(self) -> dict[str, torch.Tensor]:
        """Return the moments by parameter name; filling these tensors sets the optimiser back."""
        return {
            f"{self.names[id(parameter)]}.{key}": value
            for part in self.parts
            for parameter, moments in part.state.items()
            for key, value in moments.items()
        }


def _start(part: torch.optim.Optimizer) -> None:
    """Give every parameter the moments that torch would give it at its first gradient, so that none is ever absent."""
    for group in part.param_groups:
        for parameter in group["params"]:
            if isinstance(part, SmallAdamW):
                part.begin(parameter, part.state[parameter])
            elif isinstance(part, torch.optim.Muon):
                part.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            elif isinstance(part, torch.optim.AdamW):
                part.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _factor(part: str, config: OptimConfig) -> float:
    factors = [factor for pattern, factor in config.lr_scale.items() if matches(part, pattern)]
    return factors[-1] if factors else 1.0
