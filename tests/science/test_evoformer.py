"""The Evoformer equals plain sums written from the paper, and what is not real has no influence."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import plain
import pytest
import torch
from torch import Tensor

from modalora.checkpoint.openfold import to_openfold
from modalora.errors import ConfigError, ShapeError
from modalora.nn import recompute
from modalora.science import evoformer
from modalora.science.evoformer import UPDATES, Evoformer, EvoformerBlock, EvoformerConfig, tiny

# worst seen in float64 2e-14 over two blocks; a forgotten term changes 1e-2
EXACT = {"atol": 1e-11, "rtol": 1e-11}
# worst seen in float32 3e-6, in gradients 2e-5 of the largest; a bf16 slip (1e-2) must fail
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

SEQUENCES, RESIDUES = 5, 7
Given = dict[str, Tensor]


def make(config: EvoformerConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Evoformer:
    """A stack all of whose weights matter: published starts have zeros in every residual update."""
    torch.manual_seed(seed)
    stack = Evoformer(config).to(dtype)
    with torch.no_grad():
        for parameter in stack.parameters():
            fan = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.normal_(std=fan**-0.5)
    return stack.eval()


def inputs(config: EvoformerConfig, *, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Given:
    torch.manual_seed(seed)
    return {
        "msa": torch.randn(batch, SEQUENCES, RESIDUES, config.msa_width, dtype=dtype),
        "pair": torch.randn(batch, RESIDUES, RESIDUES, config.pair_width, dtype=dtype),
    }


def padded(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Masks of the second entry's last sequence and last two residues, and of single letters of the first entry."""
    residues = torch.ones(batch, RESIDUES, dtype=torch.bool)
    residues[1, -2:] = False
    sequences = torch.ones(batch, SEQUENCES, dtype=torch.bool)
    sequences[1, -1] = False
    msa_mask = sequences[:, :, None] & residues[:, None]
    msa_mask[0, 1, 3] = msa_mask[0, 4, 0] = False
    return msa_mask, residues[:, :, None] & residues[:, None]


def plainly(stack: Evoformer, given: Given, msa_mask: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor, Given]:
    """The same by `plain`; also the leaves, so that they get gradients."""
    weights = {name: tensor.detach().double().requires_grad_() for name, tensor in to_openfold(stack).items()}
    msa, pair = given["msa"].double(), given["pair"].double()
    for number in range(len(stack.blocks)):
        own = plain.Weights(weights, f"evoformer.blocks.{number}.")
        config = stack.config
        msa, pair = plain.block(
            own, msa, pair, msa_mask.double(), pair_mask.double(), config.msa_heads, config.pair_heads,
            config.outer_first,
        )  # fmt: skip
    return msa, pair, weights


def score(msa: Tensor, pair: Tensor, msa_mask: Tensor, pair_mask: Tensor) -> Tensor:
    """A number that every real output has its own part in."""
    torch.manual_seed(9)
    both = [
        (x * torch.randn(x.shape, dtype=torch.float64).to(x.dtype))[mask].sum()
        for x, mask in ((msa, msa_mask), (pair, pair_mask))
    ]
    return both[0] + both[1]


@pytest.mark.parametrize("columns", ["all", "global"])
@pytest.mark.parametrize("backend", ["eager", "blockwise"])
@pytest.mark.parametrize("outer_first", [False, True])
def test_outputs_and_every_gradient_equal_the_paper_s_sums(columns: str, backend: str, outer_first: bool) -> None:
    config = replace(tiny(), columns=columns, backend=backend, outer_first=outer_first)
    stack, given, (msa_mask, pair_mask) = make(config), inputs(config), padded()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    msa, pair, single = stack(**leaves, msa_mask=msa_mask, pair_mask=pair_mask)
    mine = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    wanted_msa, wanted_pair, weights = plainly(stack, mine, msa_mask, pair_mask)
    torch.testing.assert_close(msa[msa_mask], wanted_msa[msa_mask], **EXACT)
    torch.testing.assert_close(pair[pair_mask], wanted_pair[pair_mask], **EXACT)
    assert single is not None
    assert stack.single is not None
    torch.testing.assert_close(single, stack.single(msa[:, 0]), **EXACT)

    score(msa, pair, msa_mask, pair_mask).backward()
    score(wanted_msa, wanted_pair, msa_mask, pair_mask).backward()
    for name in given:
        torch.testing.assert_close(leaves[name].grad, mine[name].grad, **EXACT)
    for parameter in stack.parameters():  # the same names lead to the gradients
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for name, gradient in to_openfold(stack).items():
        if name.startswith("evoformer.blocks."):
            assert weights[name].grad is not None
            torch.testing.assert_close(gradient, weights[name].grad, **EXACT, msg=lambda told, name=name: name + told)


@pytest.mark.parametrize("mask", ["bool", "float", "none"])
def test_float32_is_close_to_float64(mask: str) -> None:
    stack, given = make(tiny(), dtype=torch.float32), inputs(tiny(), dtype=torch.float32)
    msa_mask, pair_mask = padded() if mask != "none" else (torch.ones(2, 5, 7).bool(), torch.ones(2, 7, 7).bool())
    masks = {"bool": (msa_mask, pair_mask), "float": (msa_mask.float(), pair_mask.float()), "none": (None, None)}[mask]
    msa, pair, _ = stack(given["msa"], given["pair"], *masks)
    wanted_msa, wanted_pair, _ = plainly(stack, given, msa_mask, pair_mask)
    torch.testing.assert_close(msa[msa_mask].double(), wanted_msa[msa_mask], **CLOSE)
    torch.testing.assert_close(pair[pair_mask].double(), wanted_pair[pair_mask], **CLOSE)


@pytest.mark.parametrize("columns", ["all", "global"])
def test_padding_changes_no_real_place_and_gets_no_gradient(columns: str) -> None:
    config = replace(tiny(), columns=columns)
    stack, given, (msa_mask, pair_mask) = make(config), inputs(config, batch=1), padded()
    msa_mask, pair_mask = msa_mask[1:], pair_mask[1:]
    short = stack(given["msa"][:, :-1, :-2], given["pair"][:, :-2, :-2])
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    leaves["msa"].data[~msa_mask] = 1e3  # whatever stands there
    leaves["pair"].data[~pair_mask] = -1e3
    msa, pair, single = stack(**leaves, msa_mask=msa_mask, pair_mask=pair_mask)
    torch.testing.assert_close(msa[:, :-1, :-2], short[0], **EXACT)
    torch.testing.assert_close(pair[:, :-2, :-2], short[1], **EXACT)
    torch.testing.assert_close(single[:, :-2], short[2], **EXACT)
    score(msa, pair, msa_mask, pair_mask).backward()
    for name, mask in (("msa", msa_mask), ("pair", pair_mask)):
        assert not leaves[name].grad[~mask].any()
        assert leaves[name].grad[mask].any()


def test_column_attention_is_row_attention_without_a_bias_of_the_transposed_alignment() -> None:
    config = replace(tiny(), pair_width=tiny().msa_width)
    torch.manual_seed(0)
    row, column = evoformer.RowAttention(config).double(), evoformer.ColumnAttention(config).double()
    for parameter in column.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    row.load_state_dict(column.state_dict(), strict=False)
    torch.nn.init.zeros_(row.pair_bias.weight)
    msa, mask = torch.randn(2, 5, 7, config.msa_width, dtype=torch.float64), torch.rand(2, 5, 7) > 0.2
    pair = torch.randn(2, 5, 5, config.pair_width, dtype=torch.float64)
    wanted = row(msa.transpose(1, 2), pair, mask.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(column(msa, mask), wanted, **EXACT)


def test_the_ending_node_is_the_starting_node_of_the_transposed_pairs() -> None:
    given, (_, mask) = inputs(tiny()), padded()
    torch.manual_seed(0)
    starting, ending = (evoformer.TriangleAttention(tiny(), starting=one).double() for one in (True, False))
    for parameter in starting.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ending.load_state_dict(starting.state_dict())
    wanted = starting(given["pair"].transpose(1, 2), mask.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(ending(given["pair"], mask), wanted, **EXACT)


def test_the_incoming_multiplication_is_the_outgoing_one_of_the_transposed_pairs() -> None:
    given, (_, mask) = inputs(tiny()), padded()
    stack = make(tiny())
    outgoing, incoming = stack.blocks[0].triangle_outgoing, stack.blocks[0].triangle_incoming
    incoming.load_state_dict(outgoing.state_dict())
    x = given["pair"]
    # gates at i-j are of the edge i-j itself, so a pair representation that equals its transposed has one gate for both
    x = x + x.transpose(1, 2)
    torch.testing.assert_close(incoming(x, mask), outgoing(x, mask), **EXACT)


def test_the_order_of_sequences_does_not_matter_but_for_the_first() -> None:
    stack, given = make(tiny()), inputs(tiny())
    order = torch.tensor([0, 3, 1, 4, 2])
    msa, pair, single = stack(**given)
    moved = stack(given["msa"][:, order], given["pair"])
    torch.testing.assert_close(moved[0], msa[:, order], **EXACT)
    torch.testing.assert_close(moved[1], pair, **EXACT)
    torch.testing.assert_close(moved[2], single, **EXACT)


def gradients(stack: Evoformer, given: Given) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in given.values()]
    torch.manual_seed(4)  # dropout
    msa, pair, single = stack(*leaves)
    (msa.square().sum() + pair.square().sum() + single.square().sum()).backward()
    return [*(leaf.grad for leaf in leaves), *(parameter.grad for parameter in stack.parameters())]


def test_an_outer_product_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(make(tiny()), inputs(tiny()))
    monkeypatch.setattr(evoformer, "OUTER", 3 * 2 * RESIDUES * tiny().outer_width ** 2)  # three residues at a time
    for found, wanted in zip(gradients(make(tiny()), inputs(tiny())), whole, strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("kinds", [(EvoformerBlock,), (EvoformerBlock, *UPDATES)])
def test_recompute_gives_the_same_bits_with_dropout_and_keeps_two_tensors_of_each_block(
    kinds: tuple[type[torch.nn.Module], ...],
) -> None:
    config, found, kept = replace(tiny(), blocks=3), [], []
    for is_again in (False, True):
        stack, given = make(config).train(), inputs(config)
        if is_again:
            recompute.recompute(stack, kinds)
        own = {parameter.data_ptr() for parameter in stack.parameters()}
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, own: set[int] = own, sizes: dict[int, int] = sizes) -> Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(gradients(stack, given))
        kept.append(sum(sizes.values()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert kept[1] < kept[0]


def test_dropout_drops_whole_rows_and_columns_and_only_in_training() -> None:
    block = EvoformerBlock(tiny()).train()
    x = torch.ones(2, 6, 8, 10)
    row, column = block._dropped(x, 0.5, shared=1), block._dropped(x, 0.5, shared=2)
    assert torch.equal(row, row[:, :1].expand_as(row))
    assert torch.equal(column, column[:, :, :1].expand_as(column))
    assert 0 < (row == 0).float().mean() < 1
    assert 0 < (column == 0).float().mean() < 1
    assert set(row.unique().tolist()) == {0.0, 2.0}
    assert block.eval()._dropped(x, 0.5, shared=1) is x


@pytest.mark.parametrize(
    ("name", "axis", "kept"),
    [
        ("msa_row", 1, 1.25),
        ("triangle_outgoing", 1, 2.0),
        ("triangle_incoming", 1, 2.0),
        ("triangle_starting", 1, 2.0),
        ("triangle_ending", 2, 2.0),
    ],
)
def test_each_update_drops_at_its_own_rate_and_the_ending_node_whole_columns(
    name: str, axis: int, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, given = EvoformerBlock(replace(tiny(), msa_dropout=0.2, pair_dropout=0.5)).double().train(), inputs(tiny())
    monkeypatch.setattr(block.get_submodule(name), "forward", lambda x, *others: torch.ones_like(x))
    msa, pair = block(given["msa"], given["pair"], None, None)  # fresh, the others add nothing
    added = msa - given["msa"] if name == "msa_row" else pair - given["pair"]
    torch.testing.assert_close(added, added.narrow(axis, 0, 1).expand_as(added))
    other = 3 - axis
    assert not torch.allclose(added, added.narrow(other, 0, 1).expand_as(added))
    assert {round(value, 6) for value in added.unique().tolist()} == {0.0, kept}


def test_gates_begin_open_and_what_pairs_tell_attention_at_unit_scale() -> None:
    stack = Evoformer(replace(tiny(), pair_width=256))
    gates = [module for name, module in stack.named_modules() if name.rpartition(".")[2].startswith("gate")]
    assert gates
    assert all(bool((gate.bias == 1).all()) and not gate.weight.any() for gate in gates)
    for row in (module for module in stack.modules() if isinstance(module, evoformer.RowAttention)):
        told = row.pair_bias(torch.randn(4000, 256))
        assert 0.8 < float(told.detach().std()) < 1.2  # drawn from some hundred weights; nn.Linear's own start: 0.58


def test_a_fresh_block_leaves_both_representations_as_they_are() -> None:
    given = inputs(tiny())  # the published start: every residual update is zero
    msa, pair, _ = Evoformer(tiny()).double().eval()(**given)
    assert torch.equal(msa, given["msa"])
    assert torch.equal(pair, given["pair"])


def test_bf16_autocast_stays_near_float32() -> None:
    stack, given, masks = make(tiny(), dtype=torch.float32), inputs(tiny(), dtype=torch.float32), padded()
    wanted = stack(given["msa"], given["pair"], *masks)
    with torch.autocast("cpu", torch.bfloat16):
        found = stack(given["msa"], given["pair"], *masks)
    for one, other, mask in zip(found[:2], wanted[:2], masks, strict=True):
        # a bf16 number has 8 bits: 4e-3 of its own size for each of some dozens of operations
        assert (one.float() - other)[mask].norm() < 0.05 * other[mask].norm()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"msa": torch.zeros(2, 5, 7, 23)}, r"msa \(2, 5, 7, 23\) is not \(batch, sequences, residues, 24\)"),
        ({"pair": torch.zeros(2, 7, 6, 20)}, r"pair \(2, 7, 6, 20\) does not fit .* make it \(2, 7, 7, 20\)"),
        ({"msa_mask": torch.ones(2, 7, 5)}, r"msa_mask \(2, 7, 5\) does not fit"),
        ({"pair_mask": torch.ones(7, 7)}, r"pair_mask \(7, 7\) does not fit"),
        *(({"msa": torch.zeros(*sizes, 24)}, "holds nothing") for sizes in ((0, 5, 7), (2, 0, 7), (2, 5, 0))),
    ],
)
def test_shapes_that_do_not_belong_together_are_told(change: Given, told: str) -> None:
    with pytest.raises(ShapeError, match=told):
        make(tiny())(**(inputs(tiny()) | change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"msa_heads": 0}, "msa_heads=0"),
        ({"pair_dropout": 1.0}, "pair_dropout"),
        ({"columns": "some"}, "all, global"),
        ({"backend": "zz"}, "backend='zz' is unknown; known are eager, sdpa, blockwise, fused, and None"),
    ],
)
def test_sizes_that_cannot_be_are_told(change: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(tiny(), **change)


def test_sizes_that_are_no_whole_numbers_are_told() -> None:
    for name, value, like in (("msa_heads", 2.5, 8), ("single_width", "28", 384), ("blocks", True, 48)):
        config = tiny()
        object.__setattr__(config, name, value)  # the type checks of tests would be faster
        with pytest.raises(ConfigError, match=f"{name}={value!r} must be a whole number, such as {like}"):
            config.__post_init__()


def test_exact_attention_keeps_no_tensor_of_the_size_of_its_logits() -> None:
    sequences, residues, most = 16, 64, {}
    logits = sequences * tiny().msa_heads * residues**2  # of row attention; a triangle's are 2.7 times as many
    for backend in ("eager", "blockwise"):
        stack = make(replace(tiny(), blocks=1, backend=backend), dtype=torch.float32)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.untyped_storage().nbytes() // 4)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stack(torch.randn(1, sequences, residues, 24), torch.randn(1, residues, residues, 20))
        most[backend] = max(sizes)
    assert most["blockwise"] < logits < most["eager"]


def test_the_examples_of_the_page_run() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evoformer.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M):
        exec(code, names)
    assert isinstance(names["single"], Tensor)
