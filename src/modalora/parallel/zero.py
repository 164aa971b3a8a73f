"""DeepSpeed's ZeRO as a second engine: moments (1), gradients (2) and parameters (3) cut over ranks.

Rajbhandari et al., arXiv:1910.02054. States are written whole, by rank 0, as one process writes them: any engine at any
world size reads them, and none of DeepSpeed's own checkpoints, which are pickles, is ever written or opened.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modalora.config import MeshConfig
from modalora.contracts import Batch
from modalora.errors import ConfigError
from modalora.models.decoder import DecoderLayer
from modalora.models.multimodal import Multimodal, part_of
from modalora.nn.attend import attend
from modalora.nn.mask import Mask
from modalora.parallel.engine import NONE, Snapshot, Updates, Whole
from modalora.parallel.files import read
from modalora.parallel.fsdp import assemble, runs_once
from modalora.parallel.idle import Presence, gate_adapters
from modalora.parallel.ranks import shared_totals
from modalora.parallel.sequence import Cut, split_tokens

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """Processes that share moments, gradients and parameters through DeepSpeed, in float32 with AdamW.

    A part that no row of a step reaches has a gradient of zero here, and its moments fade: ZeRO keeps all trained
    parameters in one piece.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3],
        device: torch.device,
        *,
        offload: bool,
        clip_norm: float,
        mesh: MeshConfig | None = None,
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.mesh = mesh or MeshConfig()
        if self.world % self.mesh.sequence:
            raise ConfigError(f"mesh.sequence={self.mesh.sequence} does not divide {self.world} processes")
        self.share = (self.rank // self.mesh.sequence, self.world // self.mesh.sequence)
        self.stage, self.device = stage, device
        self.saving = dist.new_group(backend="gloo")
        cut: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": False}
        if offload:
            cut["offload_optimizer"] = {"device": "cpu"}
            if stage == 3:
                cut["offload_param"] = {"device": "cpu"}
        self.settings = {
            "train_micro_batch_size_per_gpu": 1,  # batches are made elsewhere
            "zero_optimization": cut,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # which is compiled when it is first used
            "gradient_clipping": clip_norm,
            "steps_per_print": 10**9,
        }

    def shard(self, model: Multimodal, objective: nn.Module) -> None:
        """Prepare the model; DeepSpeed spreads it once weights and moments are as they should be.

        Raises ConfigError for encoders that ZeRO-3, which gathers module by module, could wait in for ever.
        """
        others = [name for name, encoder in model.encoders.items() if not runs_once(encoder)]
        if self.stage == 3 and others:
            raise ConfigError(
                f"engine=zero3 gathers an encoder's blocks each time they run, and {others[0]}'s may run once per "
                "item, of which ranks have unlike numbers; use engine=fsdp or zero2"
            )
        gate_adapters(model)
        if self.mesh.sequence > 1:
            cut = split_tokens(model, *self._token_meshes())
            if self.mesh.ulysses == "deepspeed":
                model.cut = _DeepSpeedCut(cut)
        trained = {part_of(name) for name, own in model.named_parameters() if own.requires_grad}
        self.always = {
            (name, branch)
            for name, branch in model.branches
            if trained & {f"{name}.encoder", f"{name}.projector.{branch}"}
        }
        self.model, self.task = model, _Task(model, objective)

    def _token_meshes(self) -> tuple[DeviceMesh, DeviceMesh]:
        places = (self.share[1], self.mesh.ring, self.mesh.sequence // self.mesh.ring)
        mesh = init_device_mesh(self.device.type, places, mesh_dim_names=("rows", "ring", "heads"))
        return mesh["ring"], mesh["heads"]

    def load(
        self, folder: Path, trained: Mapping[str, nn.Parameter], optimizer: Updates, notes: Mapping[str, str]
    ) -> None:
        """Set weights and moments back: until `wrap` they are whole on every rank."""
        read(folder / "weights", trained, notes)
        read(folder / "optimizer", optimizer.state(), notes)

    def wrap(self, optimizer: Updates) -> None:
        """Hand model, optimiser and moments to DeepSpeed. Raises ConfigError for an optimiser that it cannot cut."""
        if len(optimizer.parts) != 1 or not isinstance(optimizer.parts[0], torch.optim.AdamW):
            raise ConfigError(f"engine=zero{self.stage} works with optim.name=adamw alone; use engine=fsdp for others")
        deepspeed = _deepspeed(self.device)
        self.adam = optimizer.parts[0]
        moments = optimizer.state()
        self.adam.state.clear()
        if self.stage == 3:
            # gathered at once: which norms a layer makes again in the backward pass (Made) depends on the rows
            deepspeed.utils.set_z3_leaf_modules(self.task, [DecoderLayer])
            for layer in self.model.decoder.layers:
                layer.register_forward_pre_hook(_with_gradient)
            head = self.model.decoder.output
            deepspeed.zero.register_external_parameter(self.task, head.weight)  # losses read it
        self.engine, *_ = deepspeed.initialize(model=self.task, optimizer=self.adam, config=self.settings)
        if self.stage == 3:
            for encoder in self.model.encoders.values():
                _join_items(encoder)
        self._take(moments)

    def _take(self, moments: Mapping[str, Tensor]) -> None:
        """Give every rank its pieces of the moments."""
        cut = self.engine.optimizer
        # all of a group take their steps together
        taken = max((value for name, value in moments.items() if name.endswith(".step")), default=torch.tensor(0.0))
        for flat in cut.fp32_partitioned_groups_flat if self.stage == 3 else cut.single_partition_of_fp32_groups:
            self.adam.state[flat] = {
                "step": taken.clone(),
                **{kind: torch.zeros_like(flat) for kind in _MOMENTS},
            }
        if self.stage < 3:
            cut._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._trained().items():
            for kind in _MOMENTS:
                self._place(parameter, kind, moments[f"{name}.{kind}"].flatten())

    def _place(self, parameter: Any, kind: str, whole: Tensor) -> None:
        if self.stage == 3:
            from deepspeed.utils import safe_set_local_optimizer_state

            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(whole, (0, size * self.world - len(whole)))
            safe_set_local_optimizer_state(parameter, padded[size * self.rank :][:size], kind)
        elif parameter._hp_mapping is not None:
            place = parameter._hp_mapping.lp_fragment_address
            parameter._hp_mapping.get_hp_fragment(kind).copy_(whole[place.start :][: place.numel])

    def _trained(self) -> dict[str, nn.Parameter]:
        named = self.task.named_parameters()
        return {name.removeprefix("model."): own for name, own in named if own.requires_grad}

    def losses(self, batch: Batch) -> Any:
        """Return what the objective makes of a batch."""
        values = self.engine(batch)  # what gathers parameters for the backward pass hangs on this tensor
        return replace(self.task.losses, values=values)

    def level(self, batches: Sequence[Batch]) -> list[Batch]:
        """Agree with all ranks on which encoders and projectors run in each micro-batch; those that train always do.

        DeepSpeed takes gradients at the last micro-batch of a step, and of no parameter that it leaves out.
        """
        return Presence(self.model, batches, self._total).level(batches, self.always)

    def totals(self, values: Mapping[str, float], parts: Mapping[str, float] = NONE) -> dict[str, float]:
        """Return the sum over the shares by key."""
        return shared_totals(values, parts, copies=self.mesh.sequence, tellers=1)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; they are averaged over ranks, so the loss is multiplied first."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def local(self, tensor: Tensor) -> Tensor:
        """Return a trained parameter's numbers, whole; of others what this rank holds."""
        from deepspeed.utils import safe_get_full_fp32_param

        if not isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.requires_grad:
            return safe_get_full_fp32_param(tensor)
        cut: Any = tensor  # with DeepSpeed's own attributes
        return cut.ds_tensor if self.stage == 3 else tensor

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a parameter's gradient, whole."""
        from deepspeed.utils import safe_get_full_grad

        found: Tensor | None = safe_get_full_grad(parameter)
        return found

    def _piece(self, parameter: Any) -> Tensor:
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_grad

            return safe_get_local_grad(parameter)
        mapping = parameter._hp_mapping
        if mapping is None:
            return torch.zeros(0)
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def norm(self, trained: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of some parameters, over all ranks' pieces of them, ()."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for parameter in trained.values():
            squares += self._piece(parameter).double().square().sum()
        return self._total(squares).sqrt().float()

    def clip(self, trained: Mapping[str, nn.Parameter], norm: Tensor, limit: float) -> None:
        """Leave it to DeepSpeed's step."""

    def step(self) -> None:
        """Update this rank's share of every parameter and clear its gradient."""
        self.engine.step()

    def clear(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Drop the gradients of a step that is not taken."""
        self.engine.optimizer.zero_grad()

    def snapshot(self, trained: Mapping[str, nn.Parameter], *, copied: bool) -> Snapshot:
        """Gather one tensor after the other on rank 0, which has copies then and writes them."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        step = next(iter(self.adam.state.values()))["step"]
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            found = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in _MOMENTS}
            whole = safe_get_full_fp32_param(parameter)
            if self.rank == 0:
                weights[name] = whole.cpu()
                moments |= {f"{name}.{kind}": value.cpu() for kind, value in found.items()}
                moments[f"{name}.step"] = step.clone()
        return _Gathered(weights, moments, self.saving)

    def whole(self) -> Multimodal | None:
        """Return the model as one process has it, on the CPU of rank 0; None on the others."""
        import deepspeed

        found: dict[str, Tensor] = {}
        named = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        for name in self.model.state_dict():
            with deepspeed.zero.GatheredParameters([named[name]], enabled=self.stage == 3):
                if self.rank == 0:
                    found[name] = named[name].detach().cpu().clone()
        return assemble(self.model, found) if self.rank == 0 else None

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier()

    def _total(self, tensor: Tensor) -> Tensor:
        here = tensor.to(self.device)
        dist.all_reduce(here)
        return here


@dataclass(frozen=True)
class _Gathered(Whole):
    """Whole weights and moments, on rank 0 alone."""

    group: dist.ProcessGroup

    def write(self, folder: Path, notes: Mapping[str, str]) -> None:
        if dist.get_rank() == 0:
            super().write(folder, notes)

    def barrier(self) -> None:
        dist.barrier(self.group)


class _Task(nn.Module):
    """Model and objective as one module, which is what DeepSpeed runs."""

    def __init__(self, model: Multimodal, objective: nn.Module) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Tensor:
        self.losses = self.objective.forward(self.model, batch)  # its answer is nothing that hooks know
        values: Tensor = self.losses.values
        return values


def _with_gradient(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let a layer's input have a gradient: by that DeepSpeed tells that those of the parameters are made."""
    hidden, *rest = given
    return (hidden if hidden.requires_grad else hidden.detach().requires_grad_(), *rest)


def _join_items(encoder: nn.Module) -> None:
    """Let an encoder, whose hooks are in place, return all items in one tensor, which is cut behind the hooks.

    DeepSpeed gathers before the backward pass once for each tensor, and ranks have unlike numbers of items.
    """
    plain, sizes = encoder.forward, list[int]()

    def forward(items: list[dict[str, Tensor]]) -> Tensor:
        found = plain(items)
        sizes[:] = map(len, found)
        return torch.cat(found)

    encoder.forward = forward
    encoder.register_forward_hook(lambda module, given, joined: list(joined.split(sizes)))


@dataclass(frozen=True)
class _DeepSpeedCut:
    """Tokens shared by DeepSpeed's own Ulysses; it has no ring.

    It takes shares of one size, which Multimodal's filler makes, and as many key heads as processes: those that several
    need are repeated.
    """

    own: Cut

    @property
    def pieces(self) -> int:
        return self.own.pieces

    def held(self, tokens: int) -> tuple[range, ...]:
        return self.own.held(tokens)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float) -> Tensor:
        from deepspeed.sequence.layer import DistributedAttention

        if (repeat := self.own.heads.size() // k.shape[2]) > 1:
            k, v = (x.repeat_interleave(repeat, 2) for x in (k, v))
        local = partial(attend, mask=mask, scale=scale)
        found: Tensor = DistributedAttention(local, self.own.heads, scatter_idx=2, gather_idx=1)(q, k, v, 0)
        return found


def _deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ModuleNotFoundError:
        raise ConfigError(
            "engine=zero needs DeepSpeed; pip install -e '.[deepspeed]' in your clone, or use engine=fsdp"
        ) from None
    # it calls collectives by the names that torch is about to drop
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    # or the first run on a CPU waits minutes for a compiler; torch's own collectives do as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
