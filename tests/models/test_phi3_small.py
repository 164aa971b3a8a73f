"""Phi-3-small against an independent float64 model written from the paper's description, loop by loop."""

from __future__ import annotations

from math import cos, exp, sin, sqrt

import pytest
import torch
from torch import Tensor

from modalora.contracts import Batch, Route
from modalora.models.decoder import DecoderConfig, Phi3Small
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.nn.mask import BlockSparse, Mask
from modalora.nn.rope import Plain

HEADS, GROUPS, DIM, INNER, LAYERS, VOCAB = 6, 2, 8, 20, 3, 40
BLOCKS = BlockSparse(block=3, local=2, stride=3)
SMALL = Phi3Small(embedding_scale=10.0, logit_scale=8.0, gegelu_limit=1.5, blocks=BLOCKS, hidden_tokens=(3, 17))
CONFIG = ModelConfig(
    decoder=DecoderConfig(
        vocab_size=VOCAB, hidden_size=HEADS * DIM, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, rope=Plain(theta=1e6), phi3_small=SMALL,
    )
)  # fmt: skip


def sees(head: int, query: int, key: int, layer: int) -> bool:
    """Whether a query may see a key; every second layer is dense."""
    if key > query:
        return False
    if (layer + 1) % SMALL.dense_every == 0:
        return True
    mine, theirs = query // BLOCKS.block, key // BLOCKS.block
    step = max(1, BLOCKS.stride // HEADS)
    return mine - theirs < BLOCKS.local or (theirs + head * step + 1) % BLOCKS.stride == 0


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / sqrt(float((centred**2).mean()) + 1e-5) * weight + bias


def turned(x: Tensor, position: int) -> Tensor:
    out = x.clone()
    for pair in range(DIM // 2):
        angle = position / 1e6 ** (2 * pair / DIM)
        a, b = x[pair], x[pair + DIM // 2]
        out[pair], out[pair + DIM // 2] = a * cos(angle) - b * sin(angle), b * cos(angle) + a * sin(angle)
    return out


def exact(model: Multimodal, ids: list[int]) -> Tensor:
    w = {name.removeprefix("decoder."): tensor.double() for name, tensor in model.state_dict().items()}
    hidden = [w["embed_tokens.weight"][index] * 10.0 for index in ids]
    for layer in range(LAYERS):
        own = {name.removeprefix(f"layers.{layer}."): tensor for name, tensor in w.items()}
        packed = [
            own["self_attn.qkv_proj.weight"] @ norm(x, own["input_layernorm.weight"], own["input_layernorm.bias"])
            + own["self_attn.qkv_proj.bias"]
            for x in hidden
        ]
        heads = [x.view(HEADS + 2 * GROUPS, DIM) for x in packed]
        after = []
        for at, x in enumerate(hidden):
            said = []
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                q = turned(heads[at][head], at)
                seen = [key for key in range(len(ids)) if sees(head, at, key, layer)]
                raw = [float(q @ turned(heads[key][HEADS + group], key)) / DIM for key in seen]
                weights = [exp(value - max(raw)) for value in raw]
                values = [heads[key][HEADS + GROUPS + group] for key in seen]
                said.append(sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights))
            out = own["self_attn.o_proj.weight"] @ torch.cat(said) + own["self_attn.o_proj.bias"]
            after.append(x + out)
        hidden = []
        for x in after:
            y = norm(x, own["post_attention_layernorm.weight"], own["post_attention_layernorm.bias"])
            y = own["mlp.gate_up_proj.weight"] @ y + own["mlp.gate_up_proj.bias"]
            gate, up = y[:INNER].clamp(max=1.5), y[INNER:].clamp(-1.5, 1.5)
            inner = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
            hidden.append(x + own["mlp.down_proj.weight"] @ inner + own["mlp.down_proj.bias"])
    logits = torch.stack([w["embed_tokens.weight"] @ norm(x, w["norm.weight"], w["norm.bias"]) for x in hidden]) / 8.0
    logits[:, [3, 17]] = -torch.inf
    return logits


@pytest.fixture(scope="module")
def model() -> Multimodal:
    torch.manual_seed(0)
    model = Multimodal(CONFIG).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            wide = name.endswith("embed_tokens.weight")
            tensor.add_((0.1 if wide or tensor.ndim == 1 else 0.5 * tensor.shape[1] ** -0.5) * torch.randn_like(tensor))
    return model


@torch.no_grad()
def test_it_equals_an_independent_float64_model(model: Multimodal) -> None:
    ids = torch.randint(0, VOCAB, (26,), generator=torch.Generator().manual_seed(1))
    told = exact(model, ids.tolist())
    ours = model(Batch(ids[None], torch.tensor([26]), Route((None,))))[0]
    # fp32 against float64, three layers: worst seen 2e-6
    torch.testing.assert_close(ours.double(), told, atol=2e-5, rtol=0)
    cache = model.new_cache(1)
    model.read(Batch(ids[None, :20], torch.tensor([20]), Route((None,))), cache)
    for at in range(20, 26):
        step = model.read_next(ids[at : at + 1], Route((None,)), cache)
        torch.testing.assert_close(step[0].double(), told[at], atol=2e-5, rtol=0)


@torch.no_grad()
def test_losses_are_those_of_logits_without_the_hidden_tokens(model: Multimodal) -> None:
    torch.manual_seed(2)
    hidden, targets = 3 * torch.randn(9, HEADS * DIM), torch.tensor([0, 1, 2, 4, 5, 16, 18, 30, 39])
    told = torch.nn.functional.cross_entropy(model.decoder.head(hidden), targets, reduction="none")
    # float32 sums of 40 terms; two tokens more add 0.03
    torch.testing.assert_close(model.decoder.losses(hidden, targets), told, atol=1e-5, rtol=1e-5)


def test_any_heads_in_a_row_as_many_as_the_stride_see_every_block() -> None:
    at = torch.arange(60)
    seen = BLOCKS.seen(at[None], at, HEADS)[0] & (at[None] <= at[:, None])
    for first in range(HEADS - BLOCKS.stride + 1):
        together = seen[first : first + BLOCKS.stride].any(0)
        assert torch.equal(together, at[None] <= at[:, None])


def test_a_tile_is_a_part_of_the_whole_mask() -> None:
    for mask in (
        Mask(causal=True),
        Mask(causal=True, window=7),
        Mask(causal=True, blocks=BLOCKS),
        Mask(lengths=torch.tensor([13, 30])),
        Mask(causal=True, offsets=torch.tensor([4, 10]), lengths=torch.tensor([13, 30]), window=5),
    ):
        whole = mask.dense(20, 30, torch.device("cpu"), HEADS)
        for row in (0, 1):
            for start, stop in ((0, 20), (5, 9), (12, 20)):
                first, common, last = mask.tile(row, start, stop, 30)
                part = torch.zeros(HEADS, stop - start, 30, dtype=torch.bool)
                part[:, :, first:common] = True
                if last > common:
                    seen = mask.pairs(row, slice(start, stop), slice(common, last), HEADS, torch.device("cpu"))
                    assert seen is not None
                    part[:, :, common:last] = seen[0]
                told = torch.ones(1, 1, 20, 30, dtype=torch.bool) if whole is None else whole
                told = told.expand(-1, HEADS, 20, -1)[row % len(told), :, start:stop]
                assert torch.equal(part, told)
