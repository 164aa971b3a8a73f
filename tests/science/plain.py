"""The Evoformer in plain sums, written from the algorithms of AlphaFold 2's supplement, over OpenFold's weight names.

No line of it is shared with the package. Masks are added as -1e9, as in the paper; run it in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, einsum
from torch.nn.functional import layer_norm, softmax


class Weights:
    """The tensors below one name."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> Weights:
        return Weights(self.tensors, f"{self.prefix}{name}.")

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = einsum("...i,oi->...o", x, self.tensors[f"{self.prefix}{name}.weight"])
        bias = self.tensors.get(f"{self.prefix}{name}.bias")
        return out if bias is None else out + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.tensors[f"{self.prefix}{name}.{kind}"] for kind in ("weight", "bias"))
        return layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def attention(w: Weights, x: Tensor, heads: int, biases: list[Tensor]) -> Tensor:
    """Lines 2 to 7 of algorithm 7. x: (batch, rows, time, width); biases fit (batch, rows, heads, query, key)."""
    q, k, v, g = (w.linear(f"linear_{one}", x).unflatten(-1, (heads, -1)) for one in "qkvg")
    logits = einsum("brihc,brjhc->brhij", q, k) / q.shape[-1] ** 0.5
    weights = softmax(logits + sum(biases), dim=-1)
    out = torch.sigmoid(g) * einsum("brhij,brjhc->brihc", weights, v)
    return w.linear("linear_o", out.flatten(-2))


def msa_row(w: Weights, m: Tensor, z: Tensor, mask: Tensor, heads: int) -> Tensor:
    bias = w.linear("linear_z", w.norm("layer_norm_z", z)).permute(0, 3, 1, 2)
    return attention(w["mha"], w.norm("layer_norm_m", m), heads, [bias[:, None], 1e9 * (mask - 1)[:, :, None, None]])


def msa_column(w: Weights, m: Tensor, mask: Tensor, heads: int) -> Tensor:
    m, mask = m.transpose(1, 2), mask.transpose(1, 2)
    out = attention(w["mha"], w.norm("layer_norm_m", m), heads, [1e9 * (mask - 1)[:, :, None, None]])
    return out.transpose(1, 2)


def msa_column_global(w: Weights, m: Tensor, mask: Tensor, heads: int) -> Tensor:
    m, w = w.norm("layer_norm_m", m), w["global_attention"]
    mean = einsum("bsrc,bsr->brc", m, mask) / mask.sum(1)[..., None].clamp(min=1e-10)
    q = w.linear("linear_q", mean).unflatten(-1, (heads, -1))
    k, v = w.linear("linear_k", m), w.linear("linear_v", m)
    logits = einsum("brhc,bsrc->brhs", q, k) / q.shape[-1] ** 0.5 + 1e9 * (mask.transpose(1, 2) - 1)[:, :, None]
    out = einsum("brhs,bsrc->brhc", softmax(logits, -1), v)[:, None]
    gates = torch.sigmoid(w.linear("linear_g", m)).unflatten(-1, (heads, -1))
    return w.linear("linear_o", (gates * out).flatten(-2))


def transition(w: Weights, x: Tensor) -> Tensor:
    return w.linear("linear_2", w.linear("linear_1", w.norm("layer_norm", x)).clamp(min=0))


def outer_product_mean(w: Weights, m: Tensor, mask: Tensor) -> Tensor:
    m = w.norm("layer_norm", m)
    a, b = (w.linear(name, m) * mask[..., None] for name in ("linear_1", "linear_2"))
    products = w.linear("linear_out", einsum("bsic,bsjd->bijcd", a, b).flatten(-2))
    return products / (einsum("bsi,bsj->bij", mask, mask) + 1e-3)[..., None]


def triangle_multiplication(w: Weights, z: Tensor, mask: Tensor, sums: str) -> Tensor:
    z = w.norm("layer_norm_in", z)
    a, b = (
        mask[..., None] * torch.sigmoid(w.linear(f"linear_{one}_g", z)) * w.linear(f"linear_{one}_p", z) for one in "ab"
    )
    return torch.sigmoid(w.linear("linear_g", z)) * w.linear("linear_z", w.norm("layer_norm_out", einsum(sums, a, b)))


def triangle_starting(w: Weights, z: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Algorithm 13, edge by edge: i-j attends to i-k, with the bias of j-k."""
    z = w.norm("layer_norm", z)
    q, k, v, g = (w["mha"].linear(f"linear_{one}", z).unflatten(-1, (heads, -1)) for one in "qkvg")
    logits = einsum("bijhc,bikhc->bhijk", q, k) / q.shape[-1] ** 0.5
    logits = logits + w.linear("linear", z).permute(0, 3, 1, 2)[:, :, None] + 1e9 * (mask - 1)[:, None, :, None]
    out = einsum("bhijk,bikhc->bijhc", softmax(logits, -1), v)
    return w["mha"].linear("linear_o", (torch.sigmoid(g) * out).flatten(-2))


def triangle_ending(w: Weights, z: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Algorithm 14, edge by edge: i-j attends to k-j, with the bias of k-i."""
    z = w.norm("layer_norm", z)
    q, k, v, g = (w["mha"].linear(f"linear_{one}", z).unflatten(-1, (heads, -1)) for one in "qkvg")
    logits = einsum("bijhc,bkjhc->bhijk", q, k) / q.shape[-1] ** 0.5
    logits = logits + einsum("bkih->bhik", w.linear("linear", z))[:, :, :, None]
    logits = logits + 1e9 * (einsum("bkj->bjk", mask) - 1)[:, None, None]
    out = einsum("bhijk,bkjhc->bijhc", softmax(logits, -1), v)
    return w["mha"].linear("linear_o", (torch.sigmoid(g) * out).flatten(-2))


def block(
    w: Weights, m: Tensor, z: Tensor, msa_mask: Tensor, pair_mask: Tensor, heads: int, pair_heads: int,
    outer_first: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Algorithm 6, one turn, without dropout. outer_first: in the order of AlphaFold-Multimer."""
    if outer_first:
        z = z + outer_product_mean(w["outer_product_mean"], m, msa_mask)
    m = m + msa_row(w["msa_att_row"], m, z, msa_mask, heads)
    if f"{w.prefix}msa_att_col.layer_norm_m.weight" in w.tensors:
        m = m + msa_column_global(w["msa_att_col"], m, msa_mask, heads)
    else:
        m = m + msa_column(w["msa_att_col"]["_msa_att"], m, msa_mask, heads)
    m = m + transition(w["msa_transition"], m)
    if not outer_first:
        z = z + outer_product_mean(w["outer_product_mean"], m, msa_mask)
    w = w["pair_stack"]
    z = z + triangle_multiplication(w["tri_mul_out"], z, pair_mask, "bikc,bjkc->bijc")
    z = z + triangle_multiplication(w["tri_mul_in"], z, pair_mask, "bkic,bkjc->bijc")
    z = z + triangle_starting(w["tri_att_start"], z, pair_mask, pair_heads)
    z = z + triangle_ending(w["tri_att_end"], z, pair_mask, pair_heads)
    return m, z + transition(w["pair_transition"], z)
