"""Activation recompute (arXiv:1604.06174): a layer keeps its input alone, and runs again in the backward pass.

Applied from outside to a finished model; costs one more forward pass of what is trained through. The second run draws
the same random numbers, so every gradient has the same bits.
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

from modalora.models.decoder import DecoderLayer
from modalora.models.speech import ConformerBlock
from modalora.models.vision import VisionLayer

LAYERS = (DecoderLayer, VisionLayer, ConformerBlock)


def recompute(model: nn.Module, *, offload: bool = False) -> None:
    """Let each decoder layer and encoder block of a model run again instead of keeping what it computes.

    offload: keep its input in the memory of the CPU meanwhile.
    """
    for module in model.modules():
        if isinstance(module, LAYERS):
            module.forward = partial(_run, module.forward, offload)  # type: ignore[method-assign]


def _run(forward: Callable[..., Any], offload: bool, *given: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given)
    # what the layer computes is kept nowhere: of all that the hooks of save_on_cpu see, its input is left
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
        return checkpoint(forward, *given, use_reentrant=False)
