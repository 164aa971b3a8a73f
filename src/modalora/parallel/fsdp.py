"""Fully sharded data parallelism (FSDP2): parameters, gradients and moments cut over ranks, gathered layer by layer.

Zhao et al., arXiv:2304.11277; per-parameter sharding as in torchtitan, arXiv:2410.06511.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from modalora.config import MeshConfig
from modalora.contracts import Batch
from modalora.errors import ConfigError
from modalora.models.decoder import DecoderLayer
from modalora.models.multimodal import Multimodal, part_of
from modalora.models.speech import SpeechEncoder
from modalora.models.vision import ImageEmbedder
from modalora.parallel.engine import NONE, Snapshot, Updates, clear, kept, step_and_clear
from modalora.parallel.files import read, write_pieces
from modalora.parallel.idle import Presence, gate_adapters
from modalora.parallel.ranks import NOTHING_TO_OFFLOAD, shared_totals
from modalora.parallel.sequence import split_tokens
from modalora.parallel.tensor import rejoin_heads, split_heads

DIMENSIONS = ("replicate", "shard", "tensor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How what a rank holds is kept and gathered.

    bf16: gather the decoder's layers in bfloat16, for a forward pass under autocast. offload: keep what a rank holds,
    and its optimiser, on the CPU. ring, heads: neighbours in the dimension shard that share tokens.
    """

    bf16: bool = False
    offload: bool = False
    ring: int = 1
    heads: int = 1


def parallelize(model: Multimodal, mesh: DeviceMesh, plan: Plan) -> None:
    """Spread a finished model over a mesh of DIMENSIONS, in place.

    Gates come first, since what they pass on is one rank's; then tensor parallelism, whose heads sequence parallelism
    shares out further; FSDP gathers around what these leave to a rank. A layer that is run again in the backward pass
    (models/multimodal.py:recompute) may be so before all of them.
    Raises ConfigError when heads or channels do not fit the mesh.
    """
    gate_adapters(model)
    if mesh["tensor"].size() > 1:
        split_heads(model, mesh["tensor"])
    if plan.ring * plan.heads > 1:
        places = (mesh["shard"].size() // (plan.ring * plan.heads), plan.ring, plan.heads)
        fine = mesh["shard"]._unflatten(0, places, ("rows", "ring", "heads"))
        split_tokens(model, fine["ring"], fine["heads"])
    shard(model, _data_mesh(mesh), plan)


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    return mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]


def sizes(mesh: MeshConfig, world: int) -> tuple[int, int, int]:
    """Return the sizes of DIMENSIONS over so many processes; mesh.shard=0 takes what the others leave.

    Parameters are cut over processes that share tokens as over those that do not: each has a part of the gradient.
    Raises ConfigError when they do not multiply to the number of processes.
    """
    shard = mesh.shard or world // (mesh.replicate * mesh.copies)
    if mesh.replicate * shard * mesh.copies != world:
        raise ConfigError(
            f"mesh: replicate={mesh.replicate} x shard={mesh.shard or 'the rest'} x sequence={mesh.sequence} x "
            f"tensor={mesh.tensor} do not make up {world} processes"
        )
    return mesh.replicate, shard * mesh.sequence, mesh.tensor


def shard(model: Multimodal, mesh: DeviceMesh, plan: Plan) -> None:
    """Cut every parameter over a mesh of one dimension, or of two: copies, then cuts (HSDP).

    A unit is gathered while it runs: a decoder layer, a block of an encoder, the rest of an encoder, a projector, and
    the rest of the model (embeddings, head, last norm). Frozen parameters are cut too and never have a gradient.
    Gradients are summed in float32, not averaged: the loss is already divided by the labels of all ranks.
    """
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if plan.offload else OffloadPolicy()
    # encoders return views, which nothing changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    for unit in units(model):
        fully_shard(
            unit, mesh=mesh, mp_policy=half if plan.bf16 and _reads_halves(unit) else full, offload_policy=offload
        )
    register_fsdp_forward_method(model, "loss")
    _sum_gradients(model)


def _reads_halves(unit: nn.Module) -> bool:
    """Tell whether autocast makes bf16 of a unit's weights anyway: the decoder's layers, which hold nearly all.

    LayerNorm and some convolutions of encoders want float32 beside it.
    """
    return isinstance(unit, DecoderLayer) and not any(isinstance(module, nn.LayerNorm) for module in unit.modules())


def units(model: Multimodal) -> Iterable[nn.Module]:
    """Yield what is gathered at once, inner units before those around them.

    Each runs once per micro-batch on every rank. Of encoders from elsewhere that is known of the whole alone: one that
    goes through its items singly would gather its blocks as often as it has items.
    """
    yield from model.decoder.layers
    for encoder in model.encoders.values():
        if runs_once(encoder):
            for module in encoder.modules():
                if isinstance(module, nn.ModuleList):
                    yield from module
        yield encoder
    for branches in model.projectors.values():
        yield from branches.children()
    yield model


def runs_once(encoder: nn.Module) -> bool:
    """Tell whether an encoder runs each of its blocks once, on all items together."""
    return isinstance(encoder, ImageEmbedder | SpeechEncoder)


def _sum_gradients(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


class Sharded:
    """Processes that each hold a share of every parameter, gradient and moment."""

    def __init__(self, mesh: MeshConfig, plan: Plan, device: torch.device) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if plan.offload and device.type == "cpu":
            raise ConfigError(NOTHING_TO_OFFLOAD)
        self.plan = replace(plan, ring=mesh.ring, heads=mesh.sequence // mesh.ring)
        self.device = device
        # where a mesh has more dimensions, one collective for each is what is meant
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self.mesh = init_device_mesh(device.type, sizes(mesh, self.world), mesh_dim_names=DIMENSIONS)
        # what is written beside training must not wait in its line
        self.saving = dist.new_group(backend="gloo")
        self.copies = mesh.copies
        data = self.mesh["replicate", "shard"]._flatten("data")
        self.group = data.get_group()
        self.share = (data.get_local_rank() // mesh.sequence, data.size() // mesh.sequence)

    def shard(self, model: Multimodal, objective: nn.Module) -> None:
        """Spread the model, and the objective's own head if it has one."""
        self.model, self.objective = model, objective
        parallelize(model, self.mesh, self.plan)
        if list(objective.parameters()):
            fully_shard(objective, mesh=_data_mesh(self.mesh))
            _sum_gradients(objective)

    def wrap(self, optimizer: Updates) -> None:
        """Take the optimiser."""
        self.optimizer = optimizer

    def losses(self, batch: Batch) -> Any:
        """Return what the objective makes of a batch."""
        return self.objective(self.model, batch)

    def level(self, batches: Sequence[Batch]) -> list[Batch]:
        """Agree with all ranks on which encoders and projectors run in each micro-batch."""
        self.presence = Presence(self.model, batches, self._total)
        return self.presence.level(batches)

    def totals(self, values: Mapping[str, float], parts: Mapping[str, float] = NONE) -> dict[str, float]:
        """Return the sum over the shares by key."""
        # all ranks have to learn of what one alone was told, such as a signal
        return shared_totals(values, parts, copies=self.copies, tellers=self.mesh["tensor"].size())

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch, summed over ranks; behind the last, parts that no row reached have none.

        The optimiser then leaves those as they are, as in one process.
        """
        loss.backward()
        if last:
            for name, parameter in self.model.named_parameters():
                if self.presence.is_idle(part_of(name)):
                    parameter.grad = None

    def norm(self, trained: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of some parameters, over all ranks' parts of them, ()."""
        norms: list[Tensor] = []
        for own in _by_mesh(trained):
            norm = nn.utils.get_total_norm([parameter.grad for parameter in own if parameter.grad is not None])
            norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).to(self.device))
        return torch.linalg.vector_norm(torch.stack(norms))

    def clip(self, trained: Mapping[str, nn.Parameter], norm: Tensor, limit: float) -> None:
        """Scale gradients, whose norm is given, down to the limit."""
        for own in _by_mesh(trained):
            nn.utils.clip_grads_with_norm_(own, limit, norm)

    def step(self) -> None:
        """Update this rank's share of every parameter and clear its gradient."""
        step_and_clear(self.optimizer)

    def snapshot(self, trained: Mapping[str, nn.Parameter], *, copied: bool) -> Snapshot:
        """Return this rank's pieces."""
        weights, moments = kept(trained, copied), kept(self.optimizer.state(), copied)
        return _Pieces(weights, moments, self._notes({}), self.saving)

    def load(
        self, folder: Path, trained: Mapping[str, nn.Parameter], optimizer: Updates, notes: Mapping[str, str]
    ) -> None:
        """Read this rank's pieces, wherever they were cut."""
        read(folder / "weights", trained, self._notes(notes))
        read(folder / "optimizer", optimizer.state(), self._notes(notes))

    def clear(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Drop the gradients of a step that is not taken."""
        clear(trained)

    def local(self, tensor: Tensor) -> Tensor:
        """Return the numbers of a parameter that this rank holds."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the numbers of a parameter's gradient that this rank holds."""
        return None if parameter.grad is None else self.local(parameter.grad)

    def whole(self) -> Multimodal | None:
        """Return the model as one process has it, on the CPU of rank 0; None on the others."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.rank == 0:
                found[name] = rejoin_heads(self.model, name, full.cpu(), self.mesh["tensor"].size())
        return assemble(self.model, found) if self.rank == 0 else None

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier()

    def _notes(self, notes: Mapping[str, str]) -> dict[str, str]:
        # rows of fused matrices lie in another order for every tensor degree
        tensor = self.mesh["tensor"].size()
        return {**notes, "tensor": str(tensor)} if tensor > 1 else dict(notes)

    def _total(self, tensor: Tensor) -> Tensor:
        here = tensor.to(self.device)
        dist.all_reduce(here, group=self.group)
        return here


@dataclass(frozen=True)
class _Pieces:
    """What one rank has of weights and moments."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    told: Mapping[str, str]
    group: dist.ProcessGroup

    def write(self, folder: Path, notes: Mapping[str, str]) -> None:
        notes = {**notes, **self.told}
        write_pieces(folder / "weights", self.weights, notes, self.group)
        write_pieces(folder / "optimizer", self.moments, notes, self.group)

    def barrier(self) -> None:
        dist.barrier(self.group)


def assemble(model: Multimodal, tensors: Mapping[str, Tensor]) -> Multimodal:
    """Return a model like this one with these whole tensors, frozen where it is frozen."""
    with torch.device("meta"):
        whole = Multimodal(model.config)
    whole.load_state_dict(tensors, assign=True)
    trains = {name for name, own in model.named_parameters() if own.requires_grad}
    for name, own in whole.named_parameters():
        own.requires_grad_(name in trains)
    return whole.train(model.training)


def _by_mesh(trained: Mapping[str, nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters in groups whose pieces lie alike: norms of unlike ones cannot be stacked."""
    groups: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in trained.values():
        key = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        groups[key].append(parameter)
    return list(groups.values())
