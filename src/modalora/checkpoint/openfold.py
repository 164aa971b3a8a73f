"""OpenFold's names of Evoformer weights, and ours: one table, read both ways.

OpenFold has one stack in three layouts. "openfold" is what its code has today. "openfold-1" is what its checkpoints of
2022 have, where the pair half of a block, and what feeds it, are called core. "openfold-fused" are its multimer models
of version 3, where a triangle multiplication has one matrix for both edges, the left one above the right one. Shapes
are the same everywhere: a matrix is (out, in).

Every multimer model of OpenFold has the outer product mean first in its blocks (opm_first). Names tell that of version
3 alone; versions 1 and 2 are in the layout "openfold", as the others are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modalora.errors import CheckpointError, ConfigError
from modalora.science.evoformer import Evoformer, GlobalColumnAttention

LAYOUTS = ("openfold", "openfold-1", "openfold-fused")

_QKV = {"q": "linear_q", "k": "linear_k", "v": "linear_v", "gate": "linear_g", "out": "linear_o"}
_ATTENTION = {f"attention.{ours}": f"mha.{theirs}" for ours, theirs in _QKV.items()}
_COLUMN = {"norm": "layer_norm_m", **_ATTENTION}
_GLOBAL = {"norm": "layer_norm_m", **{ours: f"global_attention.{theirs}" for ours, theirs in _QKV.items()}}
_TRANSITION = {"norm": "layer_norm", "up": "linear_1", "down": "linear_2"}
_TRIANGLE = {"norm": "layer_norm", "bias": "linear", **_ATTENTION}
_EDGES = {"left": "linear_a_p", "left_gate": "linear_a_g", "right": "linear_b_p", "right_gate": "linear_b_g"}
_FUSED = {"left": "linear_ab_p", "left_gate": "linear_ab_g", "right": "linear_ab_p", "right_gate": "linear_ab_g"}
_MULTIPLICATION = {"norm": "layer_norm_in", "out_norm": "layer_norm_out", "out": "linear_z", "gate": "linear_g"}

# our part of a block -> (theirs, {our layer: theirs})
_BLOCK = {
    "msa_row": ("msa_att_row", {**_COLUMN, "pair_norm": "layer_norm_z", "pair_bias": "linear_z"}),
    "msa_transition": ("msa_transition", _TRANSITION),
    "outer_product": (
        "outer_product_mean",
        {"norm": "layer_norm", "left": "linear_1", "right": "linear_2", "out": "linear_out"},
    ),
    "triangle_outgoing": ("pair_stack.tri_mul_out", _MULTIPLICATION),
    "triangle_incoming": ("pair_stack.tri_mul_in", _MULTIPLICATION),
    "triangle_starting": ("pair_stack.tri_att_start", _TRIANGLE),
    "triangle_ending": ("pair_stack.tri_att_end", _TRIANGLE),
    "pair_transition": ("pair_stack.pair_transition", _TRANSITION),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of our tensors is in a layout. half: which half of the rows of a tensor of both edges; None: all."""

    name: str
    half: int | None = None

    def read(self, tensor: Tensor) -> Tensor:
        """Return our tensor of theirs."""
        return tensor if self.half is None else tensor.chunk(2)[self.half]


def places(stack: Evoformer, layout: str = "openfold", *, prefix: str = "evoformer.") -> dict[str, Place]:
    """Return where each tensor of a stack is in a layout. The prefix of the stack for extra sequences is
    "extra_msa_stack.". Raises ConfigError for an unknown layout, and for "openfold-fused" of a stack whose blocks have
    another order.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r} is unknown; known are {', '.join(LAYOUTS)}")
    if layout == "openfold-fused" and not stack.config.outer_first:
        raise ConfigError(
            f"{prefix}* in the layout openfold-fused is of a multimer model, whose blocks begin with the outer product "
            "mean, and the stack has outer_first=False; build it with outer_first=True"
        )
    table = {}
    for number, block in enumerate(stack.blocks):
        is_global = isinstance(block.msa_column, GlobalColumnAttention)
        column = ("msa_att_col", _GLOBAL) if is_global else ("msa_att_col._msa_att", _COLUMN)
        for part, (home, layers) in {**_BLOCK, "msa_column": column}.items():
            if layout == "openfold-1" and not part.startswith(("msa_row", "msa_column")):
                home = f"core.{home.removeprefix('pair_stack.')}"
            if layers is _MULTIPLICATION:
                layers = {**layers, **(_FUSED if layout == "openfold-fused" else _EDGES)}
            for ours, theirs in layers.items():
                half = ours.startswith("right") if theirs.startswith("linear_ab") else None
                table[f"blocks.{number}.{part}.{ours}"] = (f"blocks.{number}.{home}.{theirs}", half)
    table["single"] = ("linear", None)
    found = {}
    for name in stack.state_dict():
        layer, kind = name.rsplit(".", 1)
        theirs, half = table[layer]
        found[name] = Place(f"{prefix}{theirs}.{kind}", None if half is None else int(half))
    return found


def to_openfold(stack: Evoformer, layout: str = "openfold", *, prefix: str = "evoformer.") -> dict[str, Tensor]:
    """Return the weights of a stack under OpenFold's names."""
    weights, halves, found = stack.state_dict(), dict[str, list[Tensor]](), {}
    for name, place in places(stack, layout, prefix=prefix).items():
        if place.half is None:
            found[place.name] = weights[name]
        else:
            halves.setdefault(place.name, [weights[name], weights[name]])[place.half] = weights[name]
    return found | {name: torch.cat(both) for name, both in halves.items()}


def load_openfold(stack: Evoformer, tensors: Mapping[str, Tensor], *, prefix: str = "evoformer.") -> str:
    """Copy OpenFold's weights into a stack; returns the layout that they are in.

    tensors: a state dict of OpenFold's model; names may begin with the "module." and "model." of its trainers. What
    does not begin with the prefix belongs to other parts of that model, and is left alone.
    Raises CheckpointError when a tensor is missing, left over, given twice, of another shape or no tensor, ConfigError
    where the blocks of that layout have another order; nothing is copied then.
    """
    given: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("module.").removeprefix("model.")
        if not plain.startswith(prefix):
            continue
        if plain in given:
            raise CheckpointError(f"{plain} stands there twice, also as {name}; leave one of the two out")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name} is a {type(tensor).__name__}; give tensors, torch.from_numpy(...) of arrays")
        given[plain] = tensor
    layout = "openfold"
    if any(".core." in name for name in given):
        layout = "openfold-1"
    elif any(".linear_ab_" in name for name in given):
        layout = "openfold-fused"
    found = places(stack, layout, prefix=prefix)
    wanted = {place.name for place in found.values()}
    for told, names in (("missing", wanted - given.keys()), ("left over", given.keys() - wanted)):
        if names:
            raise CheckpointError(
                f"{len(names)} tensors of {prefix}* are {told} for a stack of {len(stack.blocks)} blocks "
                f"(layout {layout}), among them {', '.join(sorted(names)[:3])}; build the stack with its sizes"
            )
    weights = stack.state_dict()
    for name, place in found.items():
        theirs = place.read(given[place.name])
        if theirs.shape != weights[name].shape:
            raise CheckpointError(
                f"{place.name} is {tuple(given[place.name].shape)}, which makes {name} {tuple(theirs.shape)}, and the "
                f"stack has {tuple(weights[name].shape)}; build the stack with the sizes of the checkpoint"
            )
    stack.load_state_dict({name: place.read(given[place.name]) for name, place in found.items()})
    return layout
