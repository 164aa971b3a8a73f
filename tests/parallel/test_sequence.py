"""Processes that share the tokens of a sequence compute what one process does: attention, losses, every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from modalora.errors import ConfigError, ShapeError
from modalora.nn.attend import attend
from modalora.nn.mask import BlockSparse, Mask
from modalora.parallel.sequence import Cut, gather, held_in_ring, reshard, shares

Ranks = Callable[..., list[Any]]

CAUSAL = Mask(causal=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention call over a whole sequence."""

    mask: Mask = CAUSAL
    heads: int = 4
    kv_heads: int = 4
    tokens: int = 37
    lead: tuple[int, ...] = (1,)
    key_bias: bool = False
    pair_bias: bool = False
    dtype: torch.dtype = torch.float64
    backend: str | None = None
    real: Tensor | None = field(default=None)  # (batch,) queries that mean something

    def tensors(self) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        q, k, v = (draw(*self.lead, self.tokens, heads, 8) for heads in (self.heads, self.kv_heads, self.kv_heads))
        key = draw(*self.lead, self.tokens) if self.key_bias else None
        pair = draw(self.lead[0], self.heads, self.tokens, self.tokens) if self.pair_bias else None
        return [q, k, v, key, pair]

    def upstream(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (*self.lead, self.tokens, self.heads, 8)
        given = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
        if self.real is not None:
            given[torch.arange(self.tokens) >= self.real[:, None]] = 0.0
        return given.transpose(-1, -2).contiguous().transpose(-1, -2)  # gradients need not be contiguous


CASES = {
    "causal": Case(),
    "full": Case(mask=Mask()),
    "blockwise": Case(backend="blockwise"),
    "float32": Case(dtype=torch.float32),
    "grouped heads": Case(heads=8, kv_heads=4),
    "fewer key heads than processes": Case(heads=8, kv_heads=2),
    "one key head": Case(kv_heads=1),
    "three documents": Case(mask=Mask(causal=True, spans=(5, 21, 11))),
    "a document per token or so": Case(mask=Mask(causal=True, spans=(1, 2, 1, 17, 1, 3, 12))),
    "full documents": Case(mask=Mask(spans=(19, 18))),
    "window": Case(mask=Mask(causal=True, window=6)),
    "window longer than a share": Case(mask=Mask(causal=True, window=23)),
    "window and documents": Case(mask=Mask(causal=True, window=9, spans=(14, 23))),
    "window alone": Case(mask=Mask(window=9)),
    "padded rows": Case(
        mask=Mask(causal=True, padded=torch.tensor([37, 4, 20])), lead=(3,), real=torch.tensor([37, 4, 20])
    ),
    "real keys": Case(mask=Mask(lengths=torch.tensor([30, 3])), lead=(2,)),
    "key bias": Case(key_bias=True),
    "pair bias": Case(mask=Mask(), pair_bias=True),
    "both biases and documents": Case(mask=Mask(causal=True, spans=(20, 17)), key_bias=True, pair_bias=True),
    "rows that share a pair bias": Case(mask=Mask(), lead=(2, 3), key_bias=True, pair_bias=True),
    "fewer tokens than processes": Case(tokens=3),
}


def attended(case: Case, cut: Cut | None) -> list[tuple[Tensor, int]]:
    """Return output and gradients, of what this process holds, and along which dimension it is cut."""
    held = cut.held(case.tokens) if cut else (range(case.tokens),)
    index = torch.tensor([token for piece in held for token in piece], dtype=torch.long)
    given = []
    for x, dim in zip(case.tensors(), (-3, -3, -3, -1, -2), strict=True):
        given.append(None if x is None else x.index_select(dim, index).requires_grad_())
    q, k, v, key, pair = given
    settings = dict(mask=case.mask, key_bias=key, pair_bias=pair, backend=case.backend)
    out = cut.attend(q, k, v, tokens=case.tokens, **settings) if cut else attend(q, k, v, **settings)  # type: ignore[arg-type]
    out.backward(case.upstream().index_select(-3, index))
    gradients = [(x.grad, dim) for x, dim in zip(given, (-3, -3, -3, -1, -2), strict=True) if x is not None]
    return [(out.detach(), -3), *gradients]  # type: ignore[list-item]


def differences(ring: int, heads: int, world: int, names: list[str]) -> dict[str, float]:
    """Return how far each case is from one process, at most."""
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (world // (ring * heads), ring, heads), mesh_dim_names=("other", "ring", "heads"))
    cut = Cut(ring=mesh["ring"].get_group(), heads=mesh["heads"].get_group())
    found = {}
    for name in names:
        case = CASES[name]
        index = torch.tensor([token for piece in cut.held(case.tokens) for token in piece], dtype=torch.long)
        worst = 0.0
        whole = attended(case, None)
        for (own, dim), (told, _) in zip(attended(case, cut), whole, strict=True):
            expected = told.index_select(dim, index)
            if case.real is not None:
                ends = case.real[:, None] > index
                own, expected = own[ends], expected[ends]
            worst = max(worst, float((own - expected).abs().max()) if own.numel() else 0.0)
        found[name] = worst
    return found


@pytest.mark.parametrize(
    ("world", "meshes"), [(4, [(1, 4), (4, 1), (2, 2), (1, 2)]), (3, [(3, 1)]), (2, [(2, 1)])], ids=["4", "3", "2"]
)
def test_attention_over_shared_tokens_is_that_of_one_process(
    ranks: Ranks, world: int, meshes: list[tuple[int, int]]
) -> None:
    for told in ranks(world, all_differences, world, meshes):
        for place, worst in told.items():
            # sums in another order: worst seen 2e-15 and 1e-6
            assert worst <= (2e-6 if place[1] == "float32" else 1e-13), place


def all_differences(world: int, meshes: list[tuple[int, int]]) -> dict[tuple[Any, str], float]:
    found: dict[tuple[Any, str], float] = {}
    for ring, heads in meshes:
        own = differences(ring, heads, world, list(CASES))
        found |= {((ring, heads), name): worst for name, worst in own.items()}
    return found
