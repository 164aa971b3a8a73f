"""The sound encoder: a conformer over log-mel frames, eight frames to one token (Phi-4-Multimodal,
arXiv:2503.01743, 2.2).

mel is (batch, frames, mels) at 100 frames a second; tokens are 80 ms. Frames behind a row's length are kept at zero
through the subsampling, so that a row in a batch gives what it gives alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from modalora.config import check_sizes
from modalora.contracts import subsampled
from modalora.errors import ConfigError
from modalora.nn.attend import attend
from modalora.nn.dense import Dense, Pointwise1d, Pointwise2d
from modalora.nn.mask import Mask


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeechConfig:
    """Sizes of the conformer. The defaults are Phi-4-Multimodal's."""

    branches: ClassVar[tuple[str, ...]] = ("speech", "vision")  # its projectors: for sound alone, for sound + picture

    mels: int = 80
    hidden_size: int = 1024
    intermediate_size: int = 1536
    num_blocks: int = 24
    num_attention_heads: int = 16
    kernel_size: int = 3
    subsampling_channels: int = 1024
    bias_max_distance: int = 500
    segment: int = 500  # encoder frames attended together; longer sound is cut into independent segments

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}; "
                "Phi-4-Multimodal uses 1024 and 16"
            )

    def encoder(self) -> SpeechEncoder:
        """Return the networks, with fresh weights."""
        return SpeechEncoder(self)

    def smallest(self) -> tuple[dict[str, Tensor], int]:
        """Return the features of 80 ms of silence, and its token."""
        return {"mel": torch.zeros(8, self.mels)}, 1


class Subsampling(nn.Module):
    """Three stride-2 convolutions over time and frequency, the last two depthwise-separable."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        channels = config.subsampling_channels
        self.conv = nn.Sequential(
            Pointwise2d(1, channels, 3, 2, 1, activation="relu"),
            nn.Identity(),  # where the published layout has the activation
            nn.Conv2d(channels, channels, 3, 2, 1, groups=channels),
            Pointwise2d(channels, channels, 1, activation="relu"),
            nn.Identity(),
            nn.Conv2d(channels, channels, 3, 2, 1, groups=channels),
            Pointwise2d(channels, channels, 1, activation="relu"),
            nn.Identity(),
        )
        self.out = Dense(channels * subsampled(config.mels), config.hidden_size)

    def forward(self, mel: Tensor, lengths: list[int]) -> Tensor:
        """mel: (batch, frames, mels), normalised, zero behind lengths -> (batch, ceil(frames / 8), width)."""
        # On a CPU, float32 convolutions train 2.5 times faster than bf16 ones.
        with torch.autocast(mel.device.type, enabled=False):
            out: Tensor = self.out(self._convolve(mel, lengths).transpose(2, 3).flatten(2))
        return out

    def _convolve(self, mel: Tensor, lengths: list[int]) -> Tensor:
        """Return (batch, ceil(frames / 8), ceil(mels / 8), channels); with channels last, most of it are products."""
        layers: list[Any] = list(self.conv)
        first, _, *separable = layers
        seen = functional.pad(mel, (1, 1, 1, 1)).unfold(1, 3, 2).unfold(2, 3, 2).flatten(3)  # 3 x 3 of each place
        x = first(seen)
        for depthwise, pointwise in (separable[:2], separable[3:5]):
            x, lengths = _silenced(x, lengths)
            x = depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = pointwise(x)
        return x


class SpeechMLP(nn.Module):
    """Half-step feed-forward; the first half of gate_up_proj is the value, the second the gate."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.gate_up_proj = Dense(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Dense(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width)."""
        up, gate = self.gate_up_proj(self.layer_norm(x)).chunk(2, dim=-1)
        out: Tensor = self.down_proj(up * functional.silu(gate))
        return out


class SpeechAttention(nn.Module):
    """Attention both ways, with a relative bias added to the logits."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj = Dense(width, width), Dense(width, width)
        self.v_proj, self.o_proj = Dense(width, width), Dense(width, width)

    def forward(self, x: Tensor, mask: Mask, bias: Tensor) -> Tensor:
        """x: (batch, time, width); bias: (1, heads, time, time)."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.o_proj(attend(q, k, v, mask=mask, pair_bias=bias).flatten(2))
        return out


class ConvModule(nn.Module):
    """Gated pointwise, causal depthwise and two pointwise convolutions."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm = nn.LayerNorm(width)
        self.glu = Pointwise1d(width, 2 * width, 1)
        self.b1, self.b2 = nn.Parameter(torch.zeros(1, width, 1)), nn.Parameter(torch.zeros(1, width, 1))
        self.dw_conv = nn.Conv1d(width, width, config.kernel_size, groups=width)
        self.pw_conv = Pointwise1d(width, width, 1, activation="silu")
        self.ext_pw_conv_1d = Pointwise1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, time, width); frame t sees frames t - 2 .. t."""
        value, gate = self.glu(self.layer_norm(x)).chunk(2, dim=-1)
        x = (value + self.b1.transpose(1, 2)) * functional.silu(gate + self.b2.transpose(1, 2))
        reach = self.dw_conv.kernel_size[0] - 1
        x = self.dw_conv(functional.pad(x.transpose(1, 2), (reach, 0))).transpose(1, 2)
        return self.ext_pw_conv_1d(self.pw_conv(x))


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm (Conformer, arXiv:2005.08100)."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.feed_forward_in = SpeechMLP(config)
        self.layer_norm_att = nn.LayerNorm(config.hidden_size)
        self.self_attn = SpeechAttention(config)
        self.conv = ConvModule(config)
        self.feed_forward_out = SpeechMLP(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, mask: Mask, bias: Tensor) -> Tensor:
        """x: (batch, time, width)."""
        x = x + 0.5 * self.feed_forward_in(x)
        x = x + self.self_attn(self.layer_norm_att(x), mask, bias)
        x = x + self.conv(x)
        x = x + 0.5 * self.feed_forward_out(x)
        out: Tensor = self.layer_norm(x)
        return out


class SpeechEncoder(nn.Module):
    """Log-mel frames to one feature per 80 ms."""

    global_mean: Tensor
    global_invstd: Tensor

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("global_mean", torch.zeros(config.mels))
        self.register_buffer("global_invstd", torch.ones(config.mels))
        self.embed = Subsampling(config)
        self.relative_bias = nn.Embedding(2 * config.bias_max_distance, config.num_attention_heads)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_blocks))
        nn.init.zeros_(self.relative_bias.weight)

    def forward(self, sounds: list[dict[str, Tensor]]) -> list[Tensor]:
        """Each sound: mel (frames, mels) float32. Returns per sound (ceil(frames / 8), width)."""
        lengths = [len(sound["mel"]) for sound in sounds]
        mel = nn.utils.rnn.pad_sequence([sound["mel"] for sound in sounds], batch_first=True)
        mel = (mel.to(self.global_mean.dtype) - self.global_mean) * self.global_invstd
        mel = mel * _real(lengths, mel.shape[1], mel)[..., None]
        features = self.embed(mel, lengths)
        return self._blocks(features, [subsampled(length) for length in lengths])

    def _blocks(self, features: Tensor, lengths: list[int]) -> list[Tensor]:
        # A sound over the segment length is cut; its last segment is filled with zeros that are attended to, as
        # published.
        segment = self.config.segment
        pieces: list[Tensor] = []
        real: list[int] = []
        for row, length in zip(features, lengths, strict=True):
            if length <= segment:
                pieces.append(row[:length])
                real.append(length)
                continue
            count = -(-length // segment)
            whole = functional.pad(row[:length], (0, 0, 0, count * segment - length))
            pieces.extend(whole.split(segment))
            real.extend([segment] * count)
        x = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        # An even time makes all tensors whole vectors of 32 numbers at widths of 16 n. Torch rounds a rest in another
        # way: a sound would get other last bits alone than in a batch.
        x = functional.pad(x, (0, 0, 0, x.shape[1] % 2))
        uneven = set(real) != {x.shape[1]}
        mask = Mask(padded=torch.tensor(real, device=x.device)) if uneven else Mask()
        bias = self._bias(x.shape[1])
        for block in self.blocks:
            x = block(x, mask, bias)
        out, at = [], 0
        for length in lengths:
            count = 1 if length <= segment else -(-length // segment)
            out.append(x[at : at + count].flatten(0, 1)[:length])
            at += count
        return out

    def _bias(self, time: int) -> Tensor:
        reach = self.config.bias_max_distance
        at = torch.arange(time, device=self.relative_bias.weight.device)
        distance = (at[None] - at[:, None]).clamp(-reach, reach - 1) + reach
        bias: Tensor = self.relative_bias(distance)
        return bias.permute(2, 0, 1)[None].contiguous()  # read in every block


def _silenced(x: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
    """Return (batch, time, ...) with zeros behind the rows' ends, halved `lengths`, and these: padding must stay zero,
    as a row alone ends there too."""
    lengths = [subsampled(length, 2) for length in lengths]
    if set(lengths) != {x.shape[1]}:
        x = x * _real(lengths, x.shape[1], x)[:, :, None, None]
    return x, lengths


def _real(lengths: list[int], size: int, like: Tensor) -> Tensor:
    """Return 1 for frames before each length and 0 behind, (batch, size)."""
    ends = torch.tensor(lengths, device=like.device)[:, None]
    return (torch.arange(size, device=like.device)[None] < ends).to(like.dtype)
