"""The sound encoder: lengths, independence of neighbours, segments, and a float64 model of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from modalora.contracts import subsampled
from modalora.errors import ConfigError
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.models.speech import SpeechEncoder
from modalora.nn.mask import Mask

# float32 over two blocks of width 32: worst seen 1.1e-6; a leak of padding shows as 0.2
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def encoder(make_model: Callable[..., Multimodal]) -> SpeechEncoder:
    encoder = make_model().encoders["audio"]
    encoder.global_mean.normal_()
    encoder.global_invstd.uniform_(0.5, 1.5)
    return encoder


def sound(frames: int, seed: int = 0) -> dict[str, Tensor]:
    return {"mel": torch.randn(frames, 80, generator=torch.Generator().manual_seed(seed + frames))}


@given(st.integers(1, 10_000))
def test_three_halvings_that_round_up_are_one_division_by_eight_that_rounds_up(frames: int) -> None:
    halved = frames
    for _ in range(3):
        halved = subsampled(halved, 2)
    assert subsampled(frames) == halved


def test_one_feature_comes_for_every_eight_frames_begun(encoder: SpeechEncoder) -> None:
    frames = [1, 7, 8, 9, 98, 399, 400, 401, 1000]
    with torch.no_grad():
        features = encoder([sound(count) for count in frames])
    assert [len(own) for own in features] == [subsampled(count) for count in frames]
    assert [subsampled(count) for count in (98, 2998, 3998)] == [13, 375, 500]


@pytest.mark.parametrize(
    "frames", [[64, 1, 7, 8, 9, 63], [400, 390, 17], [401, 30], [950, 401, 399, 1], [30, 30], [800, 800, 5]]
)
def test_a_sound_in_a_batch_equals_the_sound_alone(encoder: SpeechEncoder, frames: list[int]) -> None:
    sounds = [sound(count, number) for number, count in enumerate(frames)]
    with torch.no_grad():
        together = encoder(sounds)
        for own, features in zip(sounds, together, strict=True):
            torch.testing.assert_close(encoder([own])[0], features, **TOLERANCE)


def test_sound_over_a_segment_is_cut_into_independent_ones(encoder: SpeechEncoder) -> None:
    mel = sound(8 * 50 * 2 + 77)["mel"]  # 110 features: 50, 50 and 10
    with torch.no_grad():
        features = encoder.embed(((mel - encoder.global_mean) * encoder.global_invstd)[None], [len(mel)])[0]
        assert len(features) == 110
        filled = functional.pad(features, (0, 0, 0, 40))
        bias = encoder._bias(50)
        told = []
        for segment in filled.split(50):
            x = segment[None]
            for block in encoder.blocks:
                x = block(x, Mask(), bias)
            told.append(x[0])
        torch.testing.assert_close(encoder([{"mel": mel}])[0], torch.cat(told)[:110], **TOLERANCE)


def test_each_mel_channel_is_centred_and_scaled(encoder: SpeechEncoder) -> None:
    mel = sound(40)["mel"]
    with torch.no_grad():
        told = encoder([{"mel": mel}])[0]
        normal = (mel - encoder.global_mean) * encoder.global_invstd
        encoder.global_mean.zero_()
        encoder.global_invstd.fill_(1.0)
        assert torch.equal(encoder([{"mel": normal}])[0], told)
        assert not torch.equal(encoder([{"mel": mel}])[0], told)


def test_the_depthwise_convolution_sees_only_the_past(encoder: SpeechEncoder) -> None:
    conv = encoder.blocks[0].conv
    x = torch.randn(1, 12, 32)
    changed = x.clone()
    changed[:, 6] += 1.0
    with torch.no_grad():
        moved = (conv(x) != conv(changed)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [6, 7, 8]


def test_attention_sees_both_ways(encoder: SpeechEncoder) -> None:
    own = sound(160)
    changed = {"mel": own["mel"].clone()}
    changed["mel"][-1] += 1.0
    with torch.no_grad():
        assert bool((encoder([own])[0] != encoder([changed])[0]).any(-1).all())


def test_the_relative_bias_is_shared_beyond_its_reach(encoder: SpeechEncoder) -> None:
    table = encoder.relative_bias.weight
    bias = encoder._bias(120)
    assert bias.shape == (1, 2, 120, 120)
    for query, key, row in ((0, 0, 50), (0, 1, 51), (1, 0, 49), (0, 49, 99), (0, 119, 99), (50, 0, 0), (119, 0, 0)):
        assert torch.equal(bias[0, :, query, key], table[row])


def test_one_block_equals_its_definition_in_float64(encoder: SpeechEncoder) -> None:
    block = encoder.blocks[0].double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    bias = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    weights = dict(block.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].squeeze(-1).T + weights[f"{name}.bias"]

    def swish(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def feed_forward(x: Tensor, name: str) -> Tensor:
        both = linear(norm(x, f"{name}.layer_norm"), f"{name}.gate_up_proj")
        return linear(both[..., :48] * swish(both[..., 48:]), f"{name}.down_proj")  # value first, then gate

    def attention(x: Tensor) -> Tensor:
        heads = []
        for h in range(2):
            own = slice(16 * h, 16 * h + 16)
            q, k, v = (linear(x, f"self_attn.{name}_proj")[..., own] for name in "qkv")
            heads.append((q @ k.mT / 4 + bias[:, h]).softmax(-1) @ v)
        return linear(torch.cat(heads, -1), "self_attn.o_proj")

    def convolution(x: Tensor) -> Tensor:
        both = linear(norm(x, "conv.layer_norm"), "conv.glu")
        b1, b2 = weights["conv.b1"][0, :, 0], weights["conv.b2"][0, :, 0]
        inner = (both[..., :32] + b1) * swish(both[..., 32:] + b2)
        kernel = weights["conv.dw_conv.weight"][:, 0]
        out = torch.zeros_like(inner) + weights["conv.dw_conv.bias"]
        for t in range(inner.shape[1]):
            for back in range(3):
                if t - back >= 0:
                    out[:, t] += kernel[:, 2 - back] * inner[:, t - back]
        return linear(swish(linear(out, "conv.pw_conv")), "conv.ext_pw_conv_1d")

    told = x + 0.5 * feed_forward(x, "feed_forward_in")
    told = told + attention(norm(told, "layer_norm_att"))
    told = told + convolution(told)
    told = told + 0.5 * feed_forward(told, "feed_forward_out")
    told = norm(told, "layer_norm")
    torch.testing.assert_close(block(x, Mask(), bias), told, atol=1e-12, rtol=1e-12)  # float64 rounding


def test_subsampling_flattens_channels_first(encoder: SpeechEncoder) -> None:
    embed = encoder.embed
    mel = torch.randn(1, 24, 80)
    with torch.no_grad():
        x = mel[:, None]
        for number, groups in ((0, 1), (2, 16), (3, 1), (5, 16), (6, 1)):
            layer = embed.conv[number]
            strided = number in (0, 2, 5)
            x = functional.conv2d(x, layer.weight, layer.bias, 2 if strided else 1, 1 if strided else 0, 1, groups)
            if number in (0, 3, 6):
                x = x.clamp(min=0)
        told = torch.stack([torch.cat([x[0, c, t] for c in range(16)]) for t in range(3)])
        told = told @ embed.out.weight.T + embed.out.bias
        torch.testing.assert_close(embed(mel, [24])[0], told, **TOLERANCE)


def test_heads_must_divide_the_width() -> None:
    config = tiny().speech
    assert config is not None
    with pytest.raises(ConfigError, match="num_attention_heads=5"):
        replace(config, num_attention_heads=5)
