"""Fully sharded data parallelism (FSDP2): parameters, gradients and moments cut over ranks, gathered layer by layer.

Zhao et al., arXiv:2304.11277; per-parameter sharding as in torchtitan, arXiv:2410.06511.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from modalora.models.multimodal import Multimodal
from modalora.models.speech import Subsampling


def shard(model: Multimodal, mesh: DeviceMesh, *, bf16: bool) -> None:
    """Cut every parameter of the model over the ranks of a mesh; what a layer needs is gathered while it runs.

    A unit is gathered at once: a decoder layer, a block of an encoder, the rest of an encoder, a projector, and the
    rest of the model (embeddings, head, last norm). Frozen parameters are cut too and never have a gradient.
    mesh: one dimension to cut over, or two: copies, then cuts (HSDP). bf16: gather in bfloat16, for a forward pass under
    autocast; gradients are summed in float32 either way.
    """
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    for unit in units(model):
        # these convolutions run in float32 under autocast too
        policy = half if bf16 and not isinstance(unit, Subsampling) else full
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "loss")
    sum_gradients(model)


def units(model: Multimodal) -> Iterable[nn.Module]:
    """Yield what is gathered at once, inner units before those around them."""
    yield from model.decoder.layers
    for encoder in model.encoders.values():
        for module in encoder.modules():
            if isinstance(module, nn.ModuleList):
                yield from module
            elif isinstance(module, Subsampling):
                yield module
        yield encoder
    for branches in model.projectors.values():
        yield from branches.children()
    yield model


def sum_gradients(model: nn.Module) -> None:
    """Sum gradients over ranks: the loss is already divided by the labels of all of them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
