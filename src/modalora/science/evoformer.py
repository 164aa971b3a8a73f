"""The Evoformer: an alignment and a pair representation that inform each other (AlphaFold 2, algorithms 6 to 15).

Jumper et al. 2021, doi:10.1038/s41586-021-03819-2, supplement, sections 1.6 and 1.7. Paper symbols in brackets.

msa is (batch, sequences, residues, msa_width) [m], pair is (batch, residues, residues, pair_width) [z]. A mask is 1 or
True where something is real, of any dtype: msa_mask (batch, sequences, residues), pair_mask (batch, residues,
residues); None: all real. What comes out at places that are not real means nothing, and nothing real depends on it.

Every attention is the one `attend`: a mask is a key bias of each row, 0 or -inf (`hidden`); the bias from the pair
representation, (batch, heads, residues, residues), is shared by the rows and never repeated for them. Where AlphaFold
adds -1e9 instead, a query without any real key attends to all alike; here it gets zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from modalora.config import check_sizes
from modalora.errors import ConfigError, ShapeError
from modalora.nn.attend import BACKENDS, attend
from modalora.nn.mask import Mask
from modalora.nn.recompute import again

OUTER = 2**22  # numbers of an outer product that are made at once, 16 MiB in float32; what is more is made in pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class EvoformerConfig:
    """Sizes of a stack. The defaults are AlphaFold 2's and OpenFold's main stack."""

    blocks: int = 48  # [N_block]
    msa_width: int = 256  # [c_m]
    pair_width: int = 128  # [c_z]
    single_width: int | None = 384  # [c_s] of the single representation; None: the stack gives none
    msa_heads: int = 8
    msa_head_dim: int = 32
    pair_heads: int = 4
    pair_head_dim: int = 32
    outer_width: int = 32  # of the outer product mean [c]
    triangle_width: int = 128  # of the triangle multiplications [c]
    widening: int = 4  # of the transitions [n]
    msa_dropout: float = 0.15
    pair_dropout: float = 0.25
    columns: str = "all"  # global: one query for each column, as for extra sequences
    outer_first: bool = False  # the outer product mean begins a block, as in AlphaFold-Multimer [opm_first]
    backend: str | None = None  # of every attention; None: the fastest that can

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if str(field.type).startswith("int") and value is not None and type(value) is not int:
                raise ConfigError(f"{field.name}={value!r} must be a whole number, such as {field.default}")
        check_sizes(self)
        for name, rate in (("msa_dropout", self.msa_dropout), ("pair_dropout", self.pair_dropout)):
            if not 0 <= rate < 1:
                raise ConfigError(f"{name}={rate} must lie in [0, 1); AlphaFold 2 has 0.15 and 0.25")
        if self.columns not in ("all", "global"):
            raise ConfigError(f"columns={self.columns!r} is unknown; known are all, global")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ConfigError(f"backend={self.backend!r} is unknown; known are {', '.join(BACKENDS)}, and None")


def extra_msa() -> EvoformerConfig:
    """Return the sizes of AlphaFold 2's stack for extra sequences (algorithm 18)."""
    return EvoformerConfig(blocks=4, msa_width=64, msa_head_dim=8, single_width=None, columns="global")


def tiny() -> EvoformerConfig:
    """Return sizes for tests: two blocks, every width its own."""
    return EvoformerConfig(
        blocks=2,
        msa_width=24,
        pair_width=20,
        single_width=28,
        msa_heads=3,
        msa_head_dim=8,
        pair_heads=2,
        pair_head_dim=12,
        outer_width=6,
        triangle_width=18,
        widening=2,
    )


def hidden(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the bias of masked keys, 0 where the mask is 1 or True and -inf elsewhere, in the dtype of `like`.

    The one place where masks in AlphaFold's style, numbers or bool, become attention's.
    """
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(mask == 0, -torch.inf)


class GatedAttention(nn.Module):
    """Attention of each row to itself, its output gated by the row (lines 2 to 7 of algorithms 7, 8, 13 and 14)."""

    def __init__(self, width: int, heads: int, head_dim: int, backend: str | None) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.gate = nn.Linear(width, heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)
        _start_gated(self.gate, self.out, self.q, self.k, self.v)

    def forward(self, x: Tensor, key_bias: Tensor | None, pair_bias: Tensor | None) -> Tensor:
        """x: (batch, rows, time, width); key_bias: (batch, rows, time); pair_bias: (batch, heads, time, time)."""
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.q, self.k, self.v))
        found = attend(q, k, v, mask=Mask(), key_bias=key_bias, pair_bias=pair_bias, backend=self.backend)
        out: Tensor = self.out(torch.sigmoid(self.gate(x)) * found.flatten(-2))
        return out


class RowAttention(nn.Module):
    """Each sequence attends along its residues; the pair representation tells it where to look (algorithm 7)."""

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.msa_width)
        self.pair_norm = nn.LayerNorm(config.pair_width)
        self.pair_bias = nn.Linear(config.pair_width, config.msa_heads, bias=False)
        self.attention = GatedAttention(config.msa_width, config.msa_heads, config.msa_head_dim, config.backend)
        nn.init.normal_(self.pair_bias.weight, std=config.pair_width**-0.5)

    def forward(self, msa: Tensor, pair: Tensor, msa_mask: Tensor | None) -> Tensor:
        """Return what is added to msa."""
        bias = self.pair_bias(self.pair_norm(pair)).permute(0, 3, 1, 2)
        out: Tensor = self.attention(self.norm(msa), hidden(msa_mask, msa), bias)
        return out


class ColumnAttention(nn.Module):
    """Each column of the alignment attends along its sequences (algorithm 8)."""

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.msa_width)
        self.attention = GatedAttention(config.msa_width, config.msa_heads, config.msa_head_dim, config.backend)

    def forward(self, msa: Tensor, msa_mask: Tensor | None) -> Tensor:
        """Return what is added to msa."""
        columns = self.norm(msa).transpose(1, 2)
        bias = hidden(None if msa_mask is None else msa_mask.transpose(1, 2), msa)
        out: Tensor = self.attention(columns, bias, None)
        return out.transpose(1, 2)


class GlobalColumnAttention(nn.Module):
    """Each column asks once, by the mean of its sequences; all heads share one key and one value (algorithm 19)."""

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        width, self.heads, self.backend = config.msa_width, config.msa_heads, config.backend
        inner = config.msa_heads * config.msa_head_dim
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, inner, bias=False)
        self.k, self.v = (nn.Linear(width, config.msa_head_dim, bias=False) for _ in range(2))
        self.gate, self.out = nn.Linear(width, inner), nn.Linear(inner, width)
        _start_gated(self.gate, self.out, self.q, self.k, self.v)

    def forward(self, msa: Tensor, msa_mask: Tensor | None) -> Tensor:
        """Return what is added to msa."""
        columns = self.norm(msa).transpose(1, 2)  # (batch, residues, sequences, width)
        mask = None if msa_mask is None else msa_mask.transpose(1, 2)
        if mask is None:
            mean = columns.mean(2, keepdim=True)
        else:
            real = mask.to(columns.dtype)[..., None]
            mean = (columns * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
        q = self.q(mean).unflatten(-1, (self.heads, -1))
        k, v = self.k(columns)[..., None, :], self.v(columns)[..., None, :]
        found = attend(q, k, v, mask=Mask(), key_bias=hidden(mask, msa), backend=self.backend)
        out: Tensor = self.out(torch.sigmoid(self.gate(columns)) * found.flatten(-2))
        return out.transpose(1, 2)


class Transition(nn.Module):
    """A two-layer perceptron at every place (algorithms 9 and 15)."""

    def __init__(self, width: int, widening: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, widening * width), nn.Linear(widening * width, width)
        nn.init.kaiming_normal_(self.up.weight, nonlinearity="relu")
        _zero(self.up.bias, self.down.weight, self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width). Returns what is added to it."""
        out: Tensor = self.down(functional.relu_(self.up(self.norm(x))))
        return out


class OuterProductMean(nn.Module):
    """What two residues have in common over the sequences, for the pair representation (algorithm 10).

    The products of a pair of residues are outer_width squared numbers, more than all else in a block: beyond OUTER they
    are made for some residues at a time, and again in the backward pass.
    """

    EPS = 1e-3  # real sequences that a pair without any is divided by

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.msa_width)
        self.left, self.right = (nn.Linear(config.msa_width, config.outer_width) for _ in range(2))
        self.out = nn.Linear(config.outer_width**2, config.pair_width)
        _zero(self.left.bias, self.right.bias, self.out.weight, self.out.bias)

    def forward(self, msa: Tensor, msa_mask: Tensor | None) -> Tensor:
        """Return what is added to pair."""
        x = self.norm(msa)
        left, right = self.left(x), self.right(x)
        if msa_mask is None:
            count = torch.tensor(float(msa.shape[1]), dtype=x.dtype, device=x.device)
        else:
            real = msa_mask.to(x.dtype)
            left, right = left * real[..., None], right * real[..., None]
            count = (real.transpose(1, 2) @ real)[..., None]
        batch, _, residues, width = left.shape
        at_once = max(1, OUTER // (batch * residues * width**2))
        if at_once >= residues:
            sums = self.some(left, right)
        else:
            sums = torch.cat([again(self.some, part, right) for part in left.split(at_once, dim=2)], dim=1)
        return sums / (count + self.EPS)

    def some(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the update, not divided, of some residues with all: (batch, some, residues, pair_width)."""
        found: Tensor = self.out(torch.einsum("bsic,bsjd->bijcd", left, right).flatten(-2))
        return found


class TriangleMultiplication(nn.Module):
    """An edge i-j of a triangle from its two other edges (algorithms 11 and 12).

    Outgoing: from i-k and j-k. Incoming: from k-i and k-j.
    """

    def __init__(self, config: EvoformerConfig, *, outgoing: bool) -> None:
        super().__init__()
        pair_width, width, self.outgoing = config.pair_width, config.triangle_width, outgoing
        self.norm, self.out_norm = nn.LayerNorm(pair_width), nn.LayerNorm(width)
        self.left, self.left_gate = nn.Linear(pair_width, width), nn.Linear(pair_width, width)
        self.right, self.right_gate = nn.Linear(pair_width, width), nn.Linear(pair_width, width)
        self.out, self.gate = nn.Linear(width, pair_width), nn.Linear(pair_width, pair_width)
        _start_gated(self.gate, self.out, self.left, self.right)
        for gate in (self.left_gate, self.right_gate):
            _start_gated(gate)
        _zero(self.left.bias, self.right.bias)

    def forward(self, pair: Tensor, pair_mask: Tensor | None) -> Tensor:
        """Return what is added to pair."""
        x = self.norm(pair)
        real = None if pair_mask is None else pair_mask.to(x.dtype)[..., None]
        left = again(self.edges, self.left, self.left_gate, x, real)
        right = again(self.edges, self.right, self.right_gate, x, real)
        if not self.outgoing:
            left, right = left.transpose(-1, -2), right.transpose(-1, -2)
        found = left @ right.transpose(-1, -2)
        out: Tensor = self.out(self.out_norm(found.permute(0, 2, 3, 1))) * torch.sigmoid(self.gate(x))
        return out

    def edges(self, linear: nn.Module, gate: nn.Module, x: Tensor, real: Tensor | None) -> Tensor:
        """Return one of the other edges, (batch, triangle_width, residues, residues)."""
        found: Tensor = linear(x) * torch.sigmoid(gate(x))
        if real is not None:
            found = found * real
        return found.permute(0, 3, 1, 2).contiguous()


class TriangleAttention(nn.Module):
    """Edges i-j attend to the edges i-k, told by the third edge j-k where to look (algorithms 13 and 14).

    Starting node: edges that start at one residue. Ending node: the same of the transposed pair representation.
    """

    def __init__(self, config: EvoformerConfig, *, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.norm = nn.LayerNorm(config.pair_width)
        self.bias = nn.Linear(config.pair_width, config.pair_heads, bias=False)
        self.attention = GatedAttention(config.pair_width, config.pair_heads, config.pair_head_dim, config.backend)
        nn.init.normal_(self.bias.weight, std=config.pair_width**-0.5)

    def forward(self, pair: Tensor, pair_mask: Tensor | None) -> Tensor:
        """Return what is added to pair."""
        if not self.starting:
            pair = pair.transpose(1, 2)
            pair_mask = None if pair_mask is None else pair_mask.transpose(1, 2)
        x = self.norm(pair)
        out: Tensor = self.attention(x, hidden(pair_mask, x), self.bias(x).permute(0, 3, 1, 2))
        return out if self.starting else out.transpose(1, 2)


class EvoformerBlock(nn.Module):
    """One block: the alignment is updated from the pair representation, and that from the alignment (algorithm 6).

    AlphaFold-Multimer (doi:10.1101/2021.10.04.463034) updates the pair representation first: `outer_first`.
    """

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.outer_first = config.outer_first
        self.msa_dropout, self.pair_dropout = config.msa_dropout, config.pair_dropout
        self.msa_row = RowAttention(config)
        self.msa_column = ColumnAttention(config) if config.columns == "all" else GlobalColumnAttention(config)
        self.msa_transition = Transition(config.msa_width, config.widening)
        self.outer_product = OuterProductMean(config)
        self.triangle_outgoing = TriangleMultiplication(config, outgoing=True)
        self.triangle_incoming = TriangleMultiplication(config, outgoing=False)
        self.triangle_starting = TriangleAttention(config, starting=True)
        self.triangle_ending = TriangleAttention(config, starting=False)
        self.pair_transition = Transition(config.pair_width, config.widening)

    def forward(
        self, msa: Tensor, pair: Tensor, msa_mask: Tensor | None, pair_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return both representations, updated."""
        if self.outer_first:
            pair = pair + self.outer_product(msa, msa_mask)
        msa = msa + self._dropped(self.msa_row(msa, pair, msa_mask), self.msa_dropout, shared=1)
        msa = msa + self.msa_column(msa, msa_mask)
        msa = msa + self.msa_transition(msa)
        if not self.outer_first:
            pair = pair + self.outer_product(msa, msa_mask)
        for update, shared in (
            (self.triangle_outgoing, 1),
            (self.triangle_incoming, 1),
            (self.triangle_starting, 1),
            (self.triangle_ending, 2),
        ):
            pair = pair + self._dropped(update(pair, pair_mask), self.pair_dropout, shared=shared)
        return msa, pair + self.pair_transition(pair)

    def _dropped(self, x: Tensor, rate: float, *, shared: int) -> Tensor:
        """Drop the same numbers all along one axis: 1 for DropoutRowwise, 2 for DropoutColumnwise (section 1.11.6)."""
        if not self.training or rate == 0:
            return x
        shape = list(x.shape)
        shape[shared] = 1
        return x * functional.dropout(x.new_ones(shape), rate)


class Evoformer(nn.Module):
    """A stack of blocks, and the single representation from its first sequence (algorithm 6).

    Memory: `recompute(stack, (EvoformerBlock,))` of nn/recompute.py keeps two tensors of each block; with UPDATES
    besides, what one update of one block computes is the most that is held at a time.
    """

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(EvoformerBlock(config) for _ in range(config.blocks))
        self.single = None if config.single_width is None else nn.Linear(config.msa_width, config.single_width)

    def forward(
        self, msa: Tensor, pair: Tensor, msa_mask: Tensor | None = None, pair_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return msa, pair and single, (batch, residues, single_width); None for a config without single_width.

        Raises ShapeError when the shapes do not belong together.
        """
        self._check(msa, pair, msa_mask, pair_mask)
        for block in self.blocks:
            msa, pair = block(msa, pair, msa_mask, pair_mask)
        return msa, pair, None if self.single is None else self.single(msa[:, 0])

    def _check(self, msa: Tensor, pair: Tensor, msa_mask: Tensor | None, pair_mask: Tensor | None) -> None:
        config, sizes = self.config, tuple(msa.shape[:3])
        if msa.dim() != 4 or msa.shape[-1] != config.msa_width:
            raise ShapeError(f"msa {tuple(msa.shape)} is not (batch, sequences, residues, {config.msa_width})")
        if 0 in sizes:
            raise ShapeError(f"msa {tuple(msa.shape)} holds nothing; give at least one row, sequence and residue")
        batch, _, residues = sizes
        for name, given, wanted in (
            ("pair", pair, (batch, residues, residues, config.pair_width)),
            ("msa_mask", msa_mask, sizes),
            ("pair_mask", pair_mask, (batch, residues, residues)),
        ):
            if given is not None and tuple(given.shape) != wanted:
                raise ShapeError(f"{name} {tuple(given.shape)} does not fit msa {tuple(msa.shape)}; make it {wanted}")


UPDATES = (
    RowAttention,
    ColumnAttention,
    GlobalColumnAttention,
    Transition,
    OuterProductMean,
    TriangleMultiplication,
    TriangleAttention,
)


def _start_gated(gate: nn.Linear, out: nn.Linear | None = None, *inner: nn.Linear) -> None:
    """Start as the supplement does (1.11.4): gates about open, residual updates at zero, the rest at unit scale."""
    nn.init.zeros_(gate.weight)
    nn.init.ones_(gate.bias)
    if out is not None:
        _zero(out.weight, out.bias)
    for linear in inner:
        nn.init.xavier_uniform_(linear.weight)


def _zero(*tensors: Tensor) -> None:
    for tensor in tensors:
        nn.init.zeros_(tensor)
