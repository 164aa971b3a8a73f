"""The decoder: its size, its cache, its padding, and an independent float64 model of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import cos, sin, sqrt

import pytest
import torch
from torch import Tensor

from modalora.contracts import IGNORED, Batch, Route, Step
from modalora.errors import ConfigError, ShapeError
from modalora.models.decoder import Decoder, DecoderConfig
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import phi4_mini, tiny
from modalora.nn.cache import KVCache
from modalora.nn.lora import LoraConfig
from modalora.nn.rope import DynamicNtk

# float32 over two layers of width 64: worst seen 1e-6; a bf16 slip (1e-2) must fail
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def step(
    lengths: list[int], adapters: tuple[str | None, ...] = (), cache: KVCache | None = None, long: int = 256
) -> Step:
    return Step(
        lengths=torch.tensor(lengths),
        route=Route(adapters or (None,) * len(lengths)),
        long=torch.tensor([length > long for length in lengths]),
        cache=cache,
    )


def stay(value: Step, lengths: list[int]) -> Step:
    """Go on with a cache: other lengths, the same tables."""
    return replace(value, lengths=torch.tensor(lengths))


def by_hand(decoder: Decoder, hidden: Tensor, adapters: tuple[str | None, ...], long: list[bool]) -> Tensor:
    """The same mathematics in float64, one row and one head at a time, from the tensors and the description alone."""
    config, weights = decoder.config, {name: tensor.double() for name, tensor in decoder.state_dict().items()}
    rope, size, heads = config.rope, config.head_dim, config.num_attention_heads
    scale = {"vision": 2.0, "speech": 2.0}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / ((x**2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def linear(x: Tensor, name: str, adapter: str | None) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        if adapter:
            y = y + scale[adapter] * (x @ weights[f"{name}.lora_A.{adapter}"].T @ weights[f"{name}.lora_B.{adapter}"].T)
        return y

    def turn(x: Tensor, position: int, is_long: bool) -> Tensor:
        factors = rope.long_factor if is_long else rope.short_factor
        pairs, out = len(factors), x.clone()
        for i, factor in enumerate(factors):
            angle = position / (factor * rope.theta ** (2 * i / (2 * pairs)))
            a, b = x[i], x[i + pairs]
            out[i] = (a * cos(angle) - b * sin(angle)) * rope.attention_factor()
            out[i + pairs] = (a * sin(angle) + b * cos(angle)) * rope.attention_factor()
        return out

    rows = []
    for x, adapter, is_long in zip(hidden.double(), adapters, long, strict=True):
        for layer in range(config.num_hidden_layers):
            at = f"layers.{layer}"
            packed = linear(norm(x, f"{at}.input_layernorm.weight"), f"{at}.self_attn.qkv_proj", adapter)
            kv = config.num_key_value_heads
            q, k, v = packed.split((heads * size, kv * size, kv * size), dim=1)
            seen = torch.zeros(len(x), heads * size, dtype=torch.float64)
            for h in range(heads):
                g = h // (heads // kv)
                qs = [turn(q[t, h * size : (h + 1) * size], t, is_long) for t in range(len(x))]
                ks = [turn(k[t, g * size : (g + 1) * size], t, is_long) for t in range(len(x))]
                for t in range(len(x)):
                    logits = torch.stack([qs[t] @ ks[j] / sqrt(size) for j in range(t + 1)])
                    seen[t, h * size : (h + 1) * size] = logits.softmax(0) @ v[: t + 1, g * size : (g + 1) * size]
            x = x + linear(seen, f"{at}.self_attn.o_proj", adapter)
            both = linear(norm(x, f"{at}.post_attention_layernorm.weight"), f"{at}.mlp.gate_up_proj", adapter)
            gate, up = both[:, : config.intermediate_size], both[:, config.intermediate_size :]
            x = x + linear(up * gate / (1 + (-gate).exp()), f"{at}.mlp.down_proj", adapter)
        rows.append(norm(x, "norm.weight"))
    return torch.stack(rows)


def test_phi4_mini_has_3836021760_parameters_in_194_tensors() -> None:
    with torch.device("meta"):
        decoder = Decoder(phi4_mini().decoder)
    tensors = decoder.state_dict()
    assert len(tensors) == 194
    assert sum(tensor.numel() for tensor in tensors.values()) == 3_836_021_760
    assert tensors["embed_tokens.weight"].shape == (200_064, 3072)
    assert tensors["layers.31.self_attn.qkv_proj.weight"].shape == (5120, 3072)
    assert tensors["layers.0.mlp.gate_up_proj.weight"].shape == (16_384, 3072)


def test_it_equals_an_independent_float64_model(make_model: Callable[..., Multimodal]) -> None:
    decoder = make_model().decoder
    hidden = torch.randn(4, 7, 64)
    adapters = (None, "vision", "speech", "vision")
    long = [False, False, True, True]
    given = replace(step([7] * 4, adapters), long=torch.tensor(long))
    with torch.no_grad():
        told = by_hand(decoder, hidden, adapters, long)
        torch.testing.assert_close(decoder(hidden, given).double(), told, **TOLERANCE)
        # in float64 only the float32 rotation tables remain
        exact = decoder.double()(hidden.double(), given)
    torch.testing.assert_close(exact, told, atol=1e-6, rtol=0)
    assert float((told[0] - told[3]).abs().max()) > 1e-2


def test_a_token_changes_nothing_before_it(make_model: Callable[..., Multimodal]) -> None:
    decoder = make_model().decoder
    hidden = torch.randn(1, 12, 64)
    changed = hidden.clone()
    changed[:, 8] += 1.0
    with torch.no_grad():
        before, after = decoder(hidden, step([12])), decoder(changed, step([12]))
    assert torch.equal(before[:, :8], after[:, :8])
    assert bool((before[:, 8:] != after[:, 8:]).any(-1).all())


def test_padded_rows_equal_rows_alone_and_padding_has_no_influence(make_model: Callable[..., Multimodal]) -> None:
    decoder = make_model().decoder
    lengths = [11, 4, 1, 7]
    adapters = ("vision", None, "speech", None)
    hidden = torch.randn(4, 11, 64)
    with torch.no_grad():
        together = decoder(hidden, step(lengths, adapters))
        for row, length in enumerate(lengths):
            alone = decoder(hidden[row : row + 1, :length], step([length], adapters[row : row + 1]))
            torch.testing.assert_close(together[row, :length], alone[0], **TOLERANCE)
        other = hidden.clone()
        for row, length in enumerate(lengths):
            other[row, length:] = 100.0
        changed = decoder(other, step(lengths, adapters))
    for row, length in enumerate(lengths):
        assert torch.equal(changed[row, :length], together[row, :length])


def test_cached_decoding_of_unequal_rows_equals_no_cache(make_model: Callable[..., Multimodal]) -> None:
    decoder = make_model().decoder
    prompt, steps = [9, 3, 6], 5
    adapters = ("speech", None, "vision")
    hidden = torch.randn(3, 9 + steps, 64)  # row r holds prompt[r] + steps real tokens
    cache = KVCache(layers=2, batch=3)
    with torch.no_grad():
        given = step(prompt, adapters, cache)
        first = decoder(hidden[:, :9], given)
        seen = [first[row, length - 1] for row, length in enumerate(prompt)]
        for row, length in enumerate(prompt):
            whole = decoder(hidden[row : row + 1, :length], step([length], adapters[row : row + 1]))
            torch.testing.assert_close(seen[row], whole[0, -1], **TOLERANCE)
        for number in range(steps):
            new = torch.stack([hidden[row, length + number] for row, length in enumerate(prompt)])[:, None]
            out = decoder(new, stay(given, [1, 1, 1]))
            assert cache.lengths.tolist() == [length + number + 1 for length in prompt]
            for row, length in enumerate(prompt):
                total = length + number + 1
                whole = decoder(hidden[row : row + 1, :total], step([total], adapters[row : row + 1]))
                torch.testing.assert_close(out[row, 0], whole[0, -1], **TOLERANCE)


def test_several_tokens_at_once_may_follow_a_cache(make_model: Callable[..., Multimodal]) -> None:
    decoder = make_model().decoder
    hidden = torch.randn(1, 10, 64)
    cache = KVCache(layers=2, batch=1)
    with torch.no_grad():
        given = step([6], cache=cache)
        decoder(hidden[:, :6], given)
        torch.testing.assert_close(
            decoder(hidden[:, 6:], stay(given, [4])), decoder(hidden, step([10]))[:, 6:], **TOLERANCE
        )


def test_a_row_over_the_original_window_uses_the_long_table_and_its_neighbour_does_not(
    make_model: Callable[..., Multimodal],
) -> None:
    model = make_model(ModelConfig(decoder=tiny().decoder))
    decoder = model.decoder
    hidden = torch.randn(2, 257, 64)
    with torch.no_grad():
        together = decoder(hidden, step([257, 40]))
        short = decoder(hidden[1:, :40], step([40]))
        torch.testing.assert_close(together[1, :40], short[0], **TOLERANCE)
        at_window = decoder(hidden[:1, :256], step([256]))
        # one token more, and every position of that row is turned by the other table
        assert bool(((together[0, 1:256] - at_window[0, 1:]).abs().amax(-1) > 1e-4).all())


def test_tokens_reach_the_tables_through_the_batch(make_model: Callable[..., Multimodal]) -> None:
    model = make_model(ModelConfig(decoder=tiny().decoder))
    ids = torch.randint(0, 320, (2, 300))
    batch = Batch(input_ids=ids, lengths=torch.tensor([300, 200]), route=Route((None, None)))
    with torch.no_grad():
        together = model(batch)
        for row in range(2):
            alone = model(batch.select([row]))
            torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], **TOLERANCE)


def test_every_row_has_the_dynamic_table_of_its_own_length(make_model: Callable[..., Multimodal]) -> None:
    rope = DynamicNtk(factor=2.0, rotated=0.75, window=512, original_window=24)
    model = make_model(ModelConfig(decoder=replace(tiny().decoder, rope=rope)))
    ids = torch.randint(0, 320, (3, 40))
    lengths = [40, 20, 33]
    labels = ids.masked_fill(torch.arange(40) >= torch.tensor(lengths)[:, None], IGNORED)
    batch = Batch(input_ids=ids, lengths=torch.tensor(lengths), route=Route((None,) * 3), labels=labels)
    with torch.no_grad():
        together = model(batch)
        losses, rows = model.loss(batch)
        for row, length in enumerate(lengths):
            fixed = Multimodal(ModelConfig(decoder=replace(tiny().decoder, rope=rope.at(length)))).eval()
            fixed.load_state_dict(model.state_dict())
            alone = fixed(batch.select([row]))[0]
            torch.testing.assert_close(together[row, :length], alone, **TOLERANCE)
            told = torch.nn.functional.cross_entropy(alone[:-1], ids[row, 1:length], reduction="none")
            torch.testing.assert_close(losses[rows == row], told, **TOLERANCE)
        other = Multimodal(ModelConfig(decoder=replace(tiny().decoder, rope=rope.at(33)))).eval()
        other.load_state_dict(model.state_dict())
        assert float((other(batch)[0] - together[0]).abs().max()) > 1e-3  # the length tells
    with pytest.raises(ConfigError, match="a table for every length: give each row its own"):
        model.decoder(torch.randn(1, 3, 64), step([3]))


def test_text_keeps_every_bit_when_adapters_are_loaded(make_model: Callable[..., Multimodal]) -> None:
    full = make_model()
    bare = Multimodal(ModelConfig(decoder=tiny().decoder)).eval()
    bare.load_state_dict({name: value for name, value in full.state_dict().items() if name in bare.state_dict()})
    hidden = torch.randn(2, 9, 64)
    with torch.no_grad():
        told = bare.decoder.head(bare.decoder(hidden, step([9, 5])))
        assert torch.equal(full.decoder.head(full.decoder(hidden, step([9, 5]))), told)
        one = make_model(ModelConfig(decoder=tiny().decoder, adapters={"speech": tiny().adapters["speech"]}))
        one.load_state_dict({name: value for name, value in full.state_dict().items() if name in one.state_dict()})
        assert torch.equal(one.decoder.head(one.decoder(hidden, step([9, 5]))), told)


def test_the_head_is_the_embedding(make_model: Callable[..., Multimodal]) -> None:
    decoder = make_model().decoder
    assert "head.weight" not in decoder.state_dict()
    hidden = torch.randn(2, 64)
    torch.testing.assert_close(decoder.head(hidden), hidden @ decoder.embed_tokens.weight.T, **TOLERANCE)


@pytest.mark.parametrize(
    ("field", "value"), [("num_attention_heads", 5), ("num_key_value_heads", 3), ("hidden_size", 66)]
)
def test_heads_that_do_not_divide_are_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        replace(tiny().decoder, **{field: value})


@pytest.mark.parametrize("field", ["vocab_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"])
def test_sizes_below_one_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}=0"):
        replace(tiny().decoder, **{field: 0})


def test_a_config_whose_factors_do_not_fit_its_heads_is_refused() -> None:
    with pytest.raises(ShapeError, match="6 rope factors for 12 rotated pairs"):
        DecoderConfig(
            vocab_size=8,
            hidden_size=64,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope=tiny().decoder.rope,
        )


def test_every_linear_of_an_adapter_has_its_dropout_and_its_scaling(make_model: Callable[..., Multimodal]) -> None:
    decoder = make_model().decoder
    decoder.add_adapter("own", LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, use_rslora=True))
    own = [linear.adapters["own"] for linear in decoder.routed().values()]
    assert len(own) == 8
    assert {(config.lora_dropout, config.scaling) for config in own} == {(0.3, 4.0)}  # 8 / sqrt(4)


def test_the_token_behind_a_window_no_longer_sees_the_first(make_model: Callable[..., Multimodal]) -> None:
    config = replace(tiny().decoder, num_hidden_layers=1, sliding_window=6)
    decoder = make_model(ModelConfig(decoder=config)).decoder
    hidden = torch.randn(1, 7, 64)
    other = torch.cat((torch.randn(1, 1, 64), hidden[:, 1:]), dim=1)
    with torch.no_grad():
        away = (decoder(hidden, step([7])) - decoder(other, step([7]))).abs().amax(-1)[0]
    assert float(away[6]) == 0
    assert float(away[:6].min()) > 1e-4
