"""The language model: a pre-norm decoder with grouped-query attention and routed adapters (Phi-4-Mini,
arXiv:2503.01743, 2.1).

hidden is (batch, time, width). Rows are padded on the right, so positions count from 0 in every row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from modalora.config import check_sizes
from modalora.contracts import Step
from modalora.errors import ConfigError, ShapeError
from modalora.nn import packed, products
from modalora.nn.attend import attend
from modalora.nn.lora import LoraConfig, Made, RoutedLinear
from modalora.nn.loss import cross_entropy
from modalora.nn.mask import BlockSparse, Mask
from modalora.nn.mlp import swiglu
from modalora.nn.norm import RMSNorm
from modalora.nn.rope import Plain, Rope, rotate, rotation, turned


@dataclass(frozen=True, kw_only=True, slots=True)
class Phi3Small:
    """What sets Phi-3-small apart: muP scales, LayerNorm, biases, a gated GELU and block-sparse attention.

    Source: arXiv:2404.14219, section 2; the released model's code for what the paper leaves open.
    """

    embedding_scale: float = 10.0  # embeddings are multiplied by it [mup_embedding_multiplier]
    attention_scale: float = 1.0  # over head_dim, not its root [mup_attn_multiplier]
    logit_scale: float = 8.0  # logits are divided by it [mup_width_multiplier]
    gegelu_limit: float | None = 20.0  # gate at most, value between plus and minus
    blocks: BlockSparse = field(default_factory=BlockSparse)
    dense_every: int = 2  # each layer whose number, from 1, divides by it attends to everything
    hidden_tokens: tuple[int, ...] = ()  # ids that are never said: their logits are -inf


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
    rope: Rope = field(default_factory=Plain)
    tie_word_embeddings: bool = True
    sliding_window: int | None = None  # keys that a query sees, itself counted; None: all
    phi3_small: Phi3Small | None = None

    def __post_init__(self) -> None:
        check_sizes(self)
        if not 0 < self.rms_norm_eps <= 1:
            raise ConfigError(f"rms_norm_eps={self.rms_norm_eps} must lie in (0, 1]; Phi-4-Mini uses 1e-5")
        if self.phi3_small is not None and self.sliding_window is not None:
            raise ConfigError("phi3_small has block-sparse attention; sliding_window must be None")
        for index in self.phi3_small.hidden_tokens if self.phi3_small else ():
            if not 0 <= index < self.vocab_size:
                raise ConfigError(f"phi3_small.hidden_tokens has {index}; ids lie in [0, vocab_size={self.vocab_size})")
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
        bias = config.phi3_small is not None
        self.qkv_proj = RoutedLinear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.o_proj = RoutedLinear(self.heads * self.head_dim, config.hidden_size, bias=bias)
        self.scale, self.seen = self.head_dim**-0.5, Mask(causal=True, window=config.sliding_window)
        if small := config.phi3_small:
            self.scale = small.attention_scale / self.head_dim
            self.seen = Mask(causal=True, blocks=None if (layer + 1) % small.dense_every == 0 else small.blocks)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step, made: Made) -> Tensor:
        """x: (batch, time, width); cos, sin: (batch, time, pairs)."""
        batch, time, _ = x.shape
        packed = self.qkv_proj(x, step.route, made).view(batch, time, -1, self.head_dim)
        q, k, v = packed.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = replace(self.seen, spans=step.route.spans, padded=step.lengths if batch > 1 else None)
        if step.cache is not None:
            k, v = step.cache.write(self.layer, k, v)
            # a cache that was empty leaves plain causality, which PyTorch's kernels know
            mask = self.seen if k.shape[1] == time else replace(self.seen, offsets=step.cache.lengths)
        longest = k.shape[1] if mask.spans is None else max(mask.spans)
        if mask.window is not None and mask.window >= longest:
            mask = replace(mask, window=None)
        is_simple = mask.window is None and mask.blocks is None
        if time == 1 and is_simple and step.cache is not None and step.cache.is_even:
            mask = Mask()  # the last token of rows of one length sees all
        attended = attend if step.cut is None else step.cut.attend
        out = attended(q, k, v, mask=mask, scale=self.scale).reshape(batch, time, -1)
        result: Tensor = self.o_proj(out, step.route)
        return result


class GatedMLP(nn.Module):
    """SwiGLU, or Phi-3-small's GEGLU; the rows of gate_up_proj are the gate, then the value."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.small, bias = config.phi3_small, config.phi3_small is not None
        self.gate_up_proj = RoutedLinear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down_proj = RoutedLinear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, step: Step, made: Made) -> Tensor:
        """x: (batch, time, width)."""
        both = self.gate_up_proj(x, step.route, made)
        result: Tensor = self.down_proj(self._gate(both), step.route, Made(both, self._gate))
        return result

    def _gate(self, both: Tensor) -> Tensor:
        return swiglu(both) if self.small is None else _gegelu(both, self.small.gegelu_limit)


def _gegelu(both: Tensor, limit: float | None) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def _norm(config: DecoderConfig) -> nn.Module:
    kind = RMSNorm if config.phi3_small is None else nn.LayerNorm
    return kind(config.hidden_size, config.rms_norm_eps)


class DecoderLayer(nn.Module):
    """Attention and MLP, each on a normalised copy, added back."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = _norm(config)
        self.mlp = GatedMLP(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """hidden: (batch, time, width)."""
        norm = self.input_layernorm
        hidden = hidden + self.self_attn(norm(hidden), cos, sin, step, Made(hidden, norm))
        norm = self.post_attention_layernorm
        result: Tensor = hidden + self.mlp(norm(hidden), step, Made(hidden, norm))
        return result


class Decoder(nn.Module):
    """Token ids to embeddings (`embed`), to hidden states, to logits (`head`)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self._head: Tensor | None = None
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        """Add a named adapter to the Linears that it targets. Raises ConfigError when it targets none."""
        linears = {place: module for place, module in self.routed().items() if config.targets(f"model.{place}")}
        if not linears:
            raise ConfigError(f"adapter {name!r}: target_modules={config.target_modules} name no Linear of the decoder")
        for place, linear in linears.items():
            linear.add_adapter(name, config.at(f"model.{place}"))

    def routed(self) -> dict[str, RoutedLinear]:
        """Return the Linears that hold adapters, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, RoutedLinear)}

    def pack(self, done: Callable[[Tensor], None] = lambda weight: None) -> None:
        """Keep the matrices in the order that bf16 products on this CPU read them, twice as fast for a row.

        The decoder then only reads: it cannot be trained, merged or saved.
        done: called with each plain matrix that is no longer needed. Raises ConfigError where nothing is gained.
        """
        weight = self.embed_tokens.weight
        if not packed.can_pack(weight):
            raise ConfigError(
                f"pack rearranges bfloat16 for a CPU that multiplies it; this model is {weight.dtype} on "
                f"{weight.device}, or the CPU cannot: leave pack out, or load with dtype='bfloat16'"
            )
        self._head = packed.pack(self.output.weight)
        done(self.output.weight.data)  # tied: rows of embeddings are still read
        for linear in self.routed().values():
            linear.pack(done)

    @property
    def output(self) -> nn.Linear | nn.Embedding:
        """What holds the output matrix: a head of its own, or the embeddings that are tied to it."""
        return self.lm_head or self.embed_tokens

    @property
    def is_packed(self) -> bool:
        """Whether `pack` changed the decoder."""
        return self._head is not None

    @property
    def is_quantised(self) -> bool:
        """Whether a Linear keeps its matrix in fewer bits."""
        return any(linear.quantised is not None for linear in self.routed().values())

    def embed(self, ids: Tensor) -> Tensor:
        """ids: (batch, time) -> (batch, time, width)."""
        hidden: Tensor = self.embed_tokens(ids)
        small = self.config.phi3_small
        return hidden if small is None else hidden * small.embedding_scale

    def forward(self, hidden: Tensor, step: Step) -> Tensor:
        """hidden: (batch, time, width) embeddings -> (batch, time, width) after the final norm."""
        positions, long = torch.arange(hidden.shape[1], device=hidden.device)[None], step.long[:, None]
        row: Tensor | None = None
        if step.route.spans is not None:  # each row counts from 0
            tokens, starts = step.route.tokens.to(hidden.device), step.lengths.cumsum(0) - step.lengths
            row = torch.searchsorted(starts, tokens, right=True) - 1
            positions, long = (tokens - starts[row])[None], step.long[row][None]
        positions = positions.expand(len(hidden), -1)
        if step.cache is not None:
            positions = positions + step.cache.lengths[:, None]
        if step.rotations is None:
            cos, sin = rotation(self.config.rope, self.config.head_dim, positions, long)
        else:
            cos, sin = turned(positions, *self._own_tables(step, row))
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, step)
        if step.cache is not None:
            step.cache.advance(step.lengths)
        normal: Tensor = self.norm(hidden)
        return normal

    def _own_tables(self, step: Step, row: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the frequencies, (batch, 1 or time, pairs), and scales, (batch, 1 or time, 1), that a step brings.

        row: of each token, (time,), where rows lie end to end.
        """
        assert step.rotations is not None
        frequencies, scale = step.rotations.frequencies, step.rotations.scale
        rows, most = len(step.lengths), self.config.head_dim // 2
        if len(frequencies) != rows or scale.shape != (rows,) or not 1 <= frequencies.shape[-1] <= most:
            raise ShapeError(
                f"rotations of {rows} rows need frequencies ({rows}, 1 to {most} pairs) and scale ({rows},); given "
                f"{tuple(frequencies.shape)} and {tuple(scale.shape)}"
            )
        if row is None:
            return frequencies[:, None], scale[:, None, None]
        return frequencies[row][None], scale[row][None, :, None]

    def head(self, hidden: Tensor) -> Tensor:
        """hidden: (..., width) -> logits (..., vocab)."""
        if self._head is not None:
            logits = packed.linear(hidden, self._head)
        else:
            logits = products.linear(hidden, self.output.weight)
        if small := self.config.phi3_small:
            logits = logits / small.logit_scale
            if small.hidden_tokens:
                logits[..., list(small.hidden_tokens)] = -torch.inf
        return logits

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each target under `head`, (tokens,) float32; no logits are kept.

        hidden: (tokens, width); targets: (tokens,) ids.
        """
        weight, small = self.output.weight, self.config.phi3_small
        if small is None:
            return cross_entropy(hidden, weight, targets)
        return cross_entropy(hidden, weight, targets, scale=1 / small.logit_scale, unsaid=small.hidden_tokens)
