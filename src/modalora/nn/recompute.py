"""Activation recompute (arXiv:1604.06174): a module keeps its input alone, and runs again in the backward pass.

Costs one more forward pass of what is trained through. The second run draws the same random numbers, so every gradient
has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let every module of these kinds run again instead of keeping what it computes. Kinds may lie in one another.

    Applied from outside to a finished model.
    """
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = partial(again, module.forward)


def again(forward: Callable[..., Any], *given: Any) -> Any:
    """Return forward(*given), of which nothing but what was given is kept for the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*given)
    return checkpoint(forward, *given, use_reentrant=False)
