"""The language model: a pre-norm decoder with grouped-query attention and routed adapters (Phi-4-Mini,
arXiv:2503.01743, 2.1).

hidden is (batch, time, width). Rows are padded on the right, so positions count from 0 in every row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from modalora.config import check_sizes
from modalora.contracts import Step
from modalora.errors import ConfigError
from modalora.nn.attend import attend
from modalora.nn.lora import LoraConfig, RoutedLinear
from modalora.nn.mask import Mask
from modalora.nn.norm import RMSNorm
from modalora.nn.rope import LongRope, Plain, rotate, rotation


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Sizes of the decoder (names as in transformers)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-5
    rope: Plain | LongRope = field(default_factory=Plain)

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}; "
                "Phi-4-Mini uses 3072 and 24"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; Phi-4-Mini uses 24 and 8"
            )
        self.rope.frequencies(self.head_dim)  # refuses factors that do not fit the heads

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads


class Attention(nn.Module):
    """Causal attention; the rows of qkv_proj are all queries, then all keys, then all values."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.layer = config.head_dim, layer
        self.qkv_proj = RoutedLinear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.o_proj = RoutedLinear(self.heads * self.head_dim, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """x: (batch, time, width); cos, sin: (batch, time, pairs)."""
        batch, time, _ = x.shape
        packed = self.qkv_proj(x, step.route).view(batch, time, -1, self.head_dim)
        q, k, v = packed.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = Mask(causal=True, padded=step.lengths if batch > 1 else None)
        if step.cache is not None:
            mask = Mask(causal=True, offsets=step.cache.lengths)
            k, v = step.cache.write(self.layer, k, v)
        out = attend(q, k, v, mask=mask).reshape(batch, time, -1)
        result: Tensor = self.o_proj(out, step.route)
        return result


class GatedMLP(nn.Module):
    """SwiGLU; the rows of gate_up_proj are the gate, then the value."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = RoutedLinear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = RoutedLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x: (batch, time, width)."""
        gate, up = self.gate_up_proj(x, step.route).chunk(2, dim=-1)
        result: Tensor = self.down_proj(up * functional.silu(gate), step.route)
        return result


class DecoderLayer(nn.Module):
    """Attention and MLP, each on a normalised copy, added back."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """hidden: (batch, time, width)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, step)
        result: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden), step)
        return result


class Decoder(nn.Module):
    """Embeddings to hidden states; `head` gives logits through the tied embedding."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._reset()

    def _reset(self) -> None:
        # Residual branches start small, so that activations stay near unit scale at any depth.
        shrink = (2 * self.config.num_hidden_layers) ** -0.5
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        with torch.no_grad():
            for name, parameter in self.layers.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(shrink)

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Add a named adapter to the four Linears of every layer."""
        for module in self.modules():
            if isinstance(module, RoutedLinear):
                module.add_adapter(name, config)

    def forward(self, hidden: Tensor, step: Step) -> Tensor:
        """hidden: (batch, time, width) embeddings -> (batch, time, width) after the final norm."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        positions = positions.expand(len(hidden), -1)
        if step.cache is not None:
            positions = positions + step.cache.lengths[:, None]
        cos, sin = rotation(self.config.rope, self.config.head_dim, positions, step.long)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, step)
        if step.cache is not None:
            step.cache.advance(step.lengths)
        normal: Tensor = self.norm(hidden)
        return normal

    def head(self, hidden: Tensor) -> Tensor:
        """hidden: (..., width) -> logits (..., vocab)."""
        return functional.linear(hidden, self.embed_tokens.weight)
