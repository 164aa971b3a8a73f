"""Tensor parallelism: each rank computes some attention heads and some channels of every MLP.

Shoeybi et al., arXiv:1909.08053, through DTensor. The rows of a fused matrix are several parts (queries, keys, values;
gate, value), and a rank needs its share of each: the rows are put in such an order that its share is one piece.
Adapters are cut like the matrix that they change: B where it is cut by rows, A where it is cut by columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn.utils.stateless import _reparametrize_module

from modalora.contracts import Route
from modalora.errors import ConfigError
from modalora.models.decoder import Attention, DecoderConfig
from modalora.models.multimodal import Multimodal
from modalora.nn.lora import Made, RoutedLinear


def split_heads(model: Multimodal, mesh: DeviceMesh) -> None:
    """Share out the decoder's attention heads and MLP channels over a mesh of one dimension.

    Raises ConfigError when they do not divide by its size.
    """
    config, degree = model.decoder.config, mesh.size()
    _check(config, degree)
    parts = _parts(config)
    for layer in model.decoder.layers:
        plan: dict[str, ParallelStyle] = {
            "self_attn.qkv_proj": Rows(parts["qkv_proj"]),
            "self_attn.o_proj": Columns(),
            "mlp.gate_up_proj": Rows(parts["gate_up_proj"]),
            "mlp.down_proj": Columns(),
        }
        parallelize_module(layer, mesh, plan)
        attention = layer.get_submodule("self_attn")
        assert isinstance(attention, Attention)
        attention.heads, attention.kv_heads = attention.heads // degree, attention.kv_heads // degree


def rejoin_heads(model: Multimodal, name: str, tensor: Tensor, degree: int) -> Tensor:
    """Return a whole tensor of the model's state dict with its rows back in the published order."""
    pieces = name.split(".")
    for fused, parts in _parts(model.decoder.config).items():
        if degree > 1 and pieces[0] == "decoder" and fused in pieces and "lora_A" not in pieces:
            return regroup(tensor, parts, degree, back=True)
    return tensor


def _parts(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return how many rows each part of a fused matrix has."""
    counts = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    inner = config.intermediate_size
    return {"qkv_proj": tuple(count * config.head_dim for count in counts), "gate_up_proj": (inner, inner)}


def _check(config: DecoderConfig, degree: int) -> None:
    if config.phi3_small is not None:
        raise ConfigError("mesh.tensor: Phi-3-small's heads attend in patterns of their own; use mesh.shard alone")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = getattr(config, name)
        if value % degree:
            raise ConfigError(f"mesh.tensor={degree} must divide {name}={value}")


class Rows(ParallelStyle):
    """A RoutedLinear whose rows are several parts, cut so that each rank has its share of every part."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        self.parts = parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RoutedLinear)
        order = partial(regroup, parts=self.parts, degree=device_mesh.size())
        _cut(module, device_mesh, {"weight": 0, "bias": 0, "lora_B": 0}, order)
        _run_locally(module, device_mesh, cut_rows=True)
        return module


class Columns(ParallelStyle):
    """A RoutedLinear whose input is cut: each rank has a share of the sum, and all add theirs up."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RoutedLinear)
        if module.bias is not None:
            raise ConfigError("mesh.tensor: a bias behind a sum over ranks is not supported; use mesh.shard alone")
        _cut(module, device_mesh, {"weight": 1, "lora_A": 1}, lambda tensor: tensor)
        _run_locally(module, device_mesh, cut_rows=False)
        return module


def regroup(tensor: Tensor, parts: tuple[int, ...], degree: int, *, back: bool = False) -> Tensor:
    """Reorder rows that are several parts into the shares of `degree` ranks, each with its share of every part.

    back: undo it.
    """
    sizes = [size // degree for size in parts]
    if back:
        shares = [share.split(sizes) for share in tensor.chunk(degree)]
        return torch.cat([share[part] for part in range(len(parts)) for share in shares])
    split = [part.chunk(degree) for part in tensor.split(list(parts))]
    return torch.cat([part[rank] for rank in range(degree) for part in split])


def _cut(linear: RoutedLinear, mesh: DeviceMesh, along: dict[str, int], order: Callable[[Tensor], Tensor]) -> None:
    """Replace the parameters by DTensors: those named are cut along a dimension, all others are on every rank."""
    for name, parameter in list(linear.named_parameters()):
        owner, _, key = name.rpartition(".")
        dimension = along.get(owner or key)
        placement: Placement = Replicate() if dimension is None else Shard(dimension)
        full = parameter.detach() if dimension is None else order(parameter.detach()).contiguous()
        cut = nn.Parameter(distribute_tensor(full, mesh, [placement]), requires_grad=parameter.requires_grad)
        if owner:
            held = linear.get_submodule(owner)
            assert isinstance(held, nn.ParameterDict)
            held[key] = cut
        else:
            linear.register_parameter(key, cut)


def _run_locally(linear: RoutedLinear, mesh: DeviceMesh, *, cut_rows: bool) -> None:
    """Let the Linear compute with this rank's pieces, and sum over ranks what each has a share of.

    A matrix that all ranks hold gets from each a share of its gradient.
    """
    plain = linear.forward

    def forward(x: Tensor, route: Route, made: Made | None = None) -> Tensor:
        pieces: dict[str, Tensor] = {}
        for name, parameter in linear.named_parameters():
            assert isinstance(parameter, DTensor)
            whole = isinstance(parameter.placements[0], Replicate)
            pieces[name] = parameter.to_local(grad_placements=[Partial()] if whole else parameter.placements)
        if cut_rows:
            x = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        with _reparametrize_module(linear, pieces):
            y = plain(x, route, made)
        if cut_rows:
            return y
        return (
            DTensor.from_local(y, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
        )

    linear.forward = forward  # type: ignore[method-assign]
