"""Activation recompute (arXiv:1604.06174): a module keeps its input alone, and runs again in the backward pass.

Costs one more forward pass of what is trained through. The second run draws the same random numbers, so every gradient
has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


def recompute(model: nn.Module, kinds: tuple[type[nn.Module], ...], *, offload: bool = False) -> None:
    """Let every module of these kinds run again instead of keeping what it computes. Kinds may lie in one another.

    Applied from outside to a finished model. offload: inputs wait in the memory of the CPU.
    """
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = partial(again, module.forward, offload=offload)


def again(forward: Callable[..., Any], *given: Any, offload: bool = False) -> Any:
    """Return forward(*given), of which nothing but what was given is kept for the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*given)
    # what the module computes is kept nowhere: of all that the hooks of save_on_cpu see, its input is left
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
        return checkpoint(forward, *given, use_reentrant=False)
