"""OpenFold's names: every tensor is read and written, nothing is left over, shapes are OpenFold's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from modalora.checkpoint.openfold import load_openfold, places, to_openfold
from modalora.errors import CheckpointError, ConfigError
from modalora.science.evoformer import Evoformer, EvoformerConfig, extra_msa, tiny

LAYOUTS = ("openfold", "openfold-1", "openfold-fused")


def linear(name: str, out: int, inner: int, *, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, inner)
    if bias:
        yield f"{name}.bias", (out,)


def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def mha(name: str, width: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for which in "qkv":
        yield from linear(f"{name}.linear_{which}", inner, width, bias=False)
    yield from linear(f"{name}.linear_g", inner, width)
    yield from linear(f"{name}.linear_o", width, inner)


def transition(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from norm(f"{name}.layer_norm", width)
    yield from linear(f"{name}.linear_1", 4 * width, width)
    yield from linear(f"{name}.linear_2", width, 4 * width)


def of_openfold(*, extra: bool, layout: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block, as OpenFold's constructors make them at AlphaFold 2's sizes."""
    m, z, head = (64, 128, 8) if extra else (256, 128, 32)
    core = "core." if layout == "openfold-1" else ""
    pair = "core." if layout == "openfold-1" else "pair_stack."
    found = [
        *norm("msa_att_row.layer_norm_m", m),
        *norm("msa_att_row.layer_norm_z", z),
        *linear("msa_att_row.linear_z", 8, z, bias=False),
        *mha("msa_att_row.mha", m, 8 * head),
        *transition(f"{core}msa_transition", m),
        *norm(f"{core}outer_product_mean.layer_norm", m),
        *linear(f"{core}outer_product_mean.linear_1", 32, m),
        *linear(f"{core}outer_product_mean.linear_2", 32, m),
        *linear(f"{core}outer_product_mean.linear_out", z, 32 * 32),
        *transition(f"{pair}pair_transition", z),
    ]
    if extra:
        found += norm("msa_att_col.layer_norm_m", m)
        found += linear("msa_att_col.global_attention.linear_q", 8 * head, m, bias=False)
        found += linear("msa_att_col.global_attention.linear_k", head, m, bias=False)
        found += linear("msa_att_col.global_attention.linear_v", head, m, bias=False)
        found += linear("msa_att_col.global_attention.linear_g", 8 * head, m)
        found += linear("msa_att_col.global_attention.linear_o", m, 8 * head)
    else:
        found += norm("msa_att_col._msa_att.layer_norm_m", m)
        found += mha("msa_att_col._msa_att.mha", m, 8 * head)
    for end in ("start", "end"):
        found += norm(f"{pair}tri_att_{end}.layer_norm", z)
        found += linear(f"{pair}tri_att_{end}.linear", 4, z, bias=False)
        found += mha(f"{pair}tri_att_{end}.mha", z, 4 * 32)
    for way in ("out", "in"):
        found += norm(f"{pair}tri_mul_{way}.layer_norm_in", z)
        found += norm(f"{pair}tri_mul_{way}.layer_norm_out", 128)
        found += linear(f"{pair}tri_mul_{way}.linear_g", z, z)
        found += linear(f"{pair}tri_mul_{way}.linear_z", z, 128)
        for one in ("ab",) if layout == "openfold-fused" else ("a", "b"):
            for kind in "pg":
                found += linear(f"{pair}tri_mul_{way}.linear_{one}_{kind}", len(one) * 128, z)
    return dict(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("extra", [False, True])
def test_names_and_shapes_at_the_published_sizes_are_openfold_s(layout: str, extra: bool) -> None:
    with torch.device("meta"):
        config = extra_msa() if extra else EvoformerConfig()
        stack = Evoformer(replace(config, blocks=2, outer_first=layout == "openfold-fused"))
    prefix = "extra_msa_stack." if extra else "evoformer."
    block = of_openfold(extra=extra, layout=layout)
    wanted = {f"{prefix}blocks.{number}.{name}": shape for number in range(2) for name, shape in block.items()}
    if not extra:
        wanted |= {"evoformer.linear.weight": (384, 256), "evoformer.linear.bias": (384,)}
    found = {name: tuple(tensor.shape) for name, tensor in to_openfold(stack, layout, prefix=prefix).items()}
    assert found == wanted
    whole = EvoformerConfig() if not extra else extra_msa()
    assert whole.blocks == (4 if extra else 48)
    assert sum(map(prod, block.values())) == (701_312 if extra else 1_829_952)


def random_stack(seed: int, layout: str = "openfold") -> Evoformer:
    torch.manual_seed(seed)
    stack = Evoformer(replace(tiny(), outer_first=layout == "openfold-fused"))
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    return stack


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapped", ["", "model.", "module.model."])
def test_what_is_written_is_read_bit_by_bit_and_its_layout_is_told(layout: str, wrapped: str) -> None:
    one, other = random_stack(0, layout), random_stack(1, layout)
    stored = {f"{wrapped}{name}": tensor.clone() for name, tensor in to_openfold(one, layout).items()}
    stored[f"{wrapped}structure_module.linear_in.weight"] = torch.zeros(3)  # another part of their model
    assert load_openfold(other, stored) == layout
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_of_theirs_comes_from_one_place_of_ours(layout: str) -> None:
    stack, start = random_stack(0, layout), 0
    with torch.no_grad():
        for parameter in stack.parameters():  # every number its own
            parameter.copy_(torch.arange(start, start + parameter.numel()).view_as(parameter))
            start += parameter.numel()
    numbers = torch.cat([tensor.flatten() for tensor in to_openfold(stack, layout).values()])
    assert torch.equal(numbers.sort().values, torch.arange(start).float())
    assert len(places(stack, layout)) == len(stack.state_dict())


def test_multimer_weights_of_version_3_are_refused_by_a_stack_with_another_order() -> None:
    stored, stack = to_openfold(random_stack(0, "openfold-fused"), "openfold-fused"), random_stack(1)
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    with pytest.raises(ConfigError, match="outer_first=False; build it with outer_first=True"):
        load_openfold(stack, stored)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.state_dict().items())
    with pytest.raises(ConfigError, match="outer_first=True"):
        to_openfold(stack, "openfold-fused")


def changed(tensors: dict[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    kept = {one: other for one, other in tensors.items() if one != name}
    return kept if tensor is None else kept | {name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("evoformer.linear.bias", None, "1 tensors of evoformer.* are missing for a stack of 2 blocks"),
        ("evoformer.blocks.2.msa_att_row.linear_z.weight", torch.zeros(2, 2), "are left over for a stack of 2 blocks"),
        ("evoformer.linear.weight", torch.zeros(28, 25), r"evoformer.linear.weight is \(28, 25\)"),
        ("model.evoformer.linear.bias", torch.zeros(28), "evoformer.linear.bias stands there twice"),
        ("evoformer.linear.bias", np.zeros(28), "evoformer.linear.bias is a ndarray; give tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_copied(
    name: str, tensor: Tensor | None, told: str
) -> None:
    stack = random_stack(0)
    before = {one: other.clone() for one, other in stack.state_dict().items()}
    with pytest.raises(CheckpointError, match=told.replace("evoformer.*", r"evoformer\.\*")):
        load_openfold(stack, changed(to_openfold(random_stack(1)), name, tensor))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.state_dict().items())


def test_an_unknown_layout_is_told() -> None:
    with pytest.raises(ConfigError, match="openfold-1, openfold-fused"):
        to_openfold(Evoformer(tiny()), "alphafold")
