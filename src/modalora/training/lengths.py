"""What a training step needs by sequence length and ranks, in closed form: for lengths that no machine at hand can try.

Two networks: a decoder on one row of T tokens (language or genomes), and the attention of an Evoformer. Bytes count
the tensors that are alive, as kernels take them; FLOPs count a multiply-add as two. `plan_step` counts a step by
running it on tensors without memory; these formulas are checked against it, and against an allocator, at small sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from modalora.errors import ConfigError
from modalora.models.decoder import DecoderConfig
from modalora.science.evoformer import EvoformerConfig

Attention = Literal["exact", "naive"]  # what attention keeps: a number a row, or all weights
_COMPUTED = 2  # bytes of a number that is computed, in bf16


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a step is spread. All counts are of processes, one device each.

    count: of all. sequence: that share one row, a T / sequence part each (parallel/sequence.py); the others hold rows
    of their own. tensor: that share the heads and channels of each layer, every one with the whole row.
    whole_states: processes of a tensor group keep weights and gradients whole, and share the optimiser alone (ZeRO-1);
    else all states are cut over all processes (FSDP2, ZeRO-3).
    recompute: layers keep their input alone. offload: and keep it on the CPU.
    """

    count: int = 1
    sequence: int = 1
    tensor: int = 1
    stream_cut: bool = False
    whole_states: bool = False
    recompute: bool = True
    offload: bool = False
    attention: Attention = "exact"
    stream_bytes: int = 4  # of a number between layers: float32, as embeddings are

    def __post_init__(self) -> None:
        if self.count % (self.sequence * self.tensor):
            raise ConfigError(
                f"sequence={self.sequence} x tensor={self.tensor} must divide the {self.count} devices; "
                f"{self.count} devices can share a row whole, --sequence {self.count}"
            )
        if self.offload and not self.recompute:
            raise ConfigError("offload moves what recompute keeps; it needs recompute")


@dataclass(frozen=True, slots=True)
class Need:
    """What one device needs for a step. Sizes in bytes; kept: inputs of layers; working: of the layer at work."""

    tokens: int
    states: int
    gathered: int
    kept: int
    working: int
    flops: float
    moved: float  # bytes between devices

    @property
    def memory(self) -> int:
        """All of it."""
        return self.states + self.gathered + self.kept + self.working


def layer_numbers(size: DecoderConfig) -> int:
    """Return the numbers of a layer's matrices."""
    heads, groups = size.num_attention_heads, size.num_key_value_heads
    attention = size.hidden_size * size.head_dim * (2 * heads + 2 * groups)
    return attention + 3 * size.hidden_size * size.intermediate_size


def decoder_numbers(size: DecoderConfig) -> int:
    """Return the numbers of a decoder, norms included."""
    width, layers = size.hidden_size, size.num_hidden_layers
    ends = size.vocab_size * width * (1 if size.tie_word_embeddings else 2) + width
    return layers * (layer_numbers(size) + 2 * width) + ends


def _widths(size: DecoderConfig) -> tuple[int, int, int, int]:
    """Return the channels of the stream, of queries, of keys (as many values), and of the MLP."""
    return (
        size.hidden_size,
        size.num_attention_heads * size.head_dim,
        size.num_key_value_heads * size.head_dim,
        size.intermediate_size,
    )


def saved_per_token(size: DecoderConfig, layout: Layout) -> float:
    """Return the bytes that a layer keeps of a token of this device for its backward pass, its input included.

    Both norms keep their inputs, attention its queries, keys, values and output, the MLP its gate and value; the rest
    is made again from these (nn/lora.py:Made). Norms and softmax keep a number a row, in float32.
    """
    _, queries, keys, inner = _widths(size)
    rows = 4 * (2 + size.num_attention_heads / layout.tensor)
    return 2 * _stream(size, layout) + (2 * queries + 2 * keys + 2 * inner) * _unit(layout) + rows


def extra_per_token(size: DecoderConfig, layout: Layout) -> float:
    """Return the bytes that the backward pass of a layer takes of a token beyond what was saved, at its fullest.

    That is in the MLP: the gradient of the stream, that of the gated value and the gated value made again, the
    gradients of gate and value, and two products on the way; or in attention, where queries, keys and values travel
    and return, once the MLP's are gone.
    """
    _, queries, keys, inner = _widths(size)
    around = 2 if layout.sequence > 1 else 1  # what is sent, and what arrives
    pairs = (2 * queries + 2 * keys) * (1 + around) - 2 * inner
    stream = _stream(size, layout)
    return max(stream + 5 * inner * _unit(layout), 2 * stream + pairs * _unit(layout))


def _unit(layout: Layout) -> float:
    """Return the bytes that a channel inside a layer takes of a token on one device."""
    return _COMPUTED / layout.tensor


def _stream(size: DecoderConfig, layout: Layout) -> float:
    """Return the bytes that the stream between layers takes of a token on one device."""
    return size.hidden_size * layout.stream_bytes / (layout.tensor if layout.stream_cut else 1)


def decoder_need(size: DecoderConfig, tokens: int, layout: Layout) -> Need:
    """Return what one device needs for a step of one row of `tokens` for each group that shares one.

    Weights, gradients and two moments are float32, 16 bytes a number, and layers are gathered in the dtype that is
    computed in, two at a time, with one layer's gradient before it is shared out. Logits are never held whole
    (nn/loss.py).
    """
    numbers, layers, unit = decoder_numbers(size), size.num_hidden_layers, _COMPUTED
    own = tokens / layout.sequence
    if layout.whole_states:  # fp16 weights and gradients, and twelve bytes of optimiser
        states = numbers * (4 / layout.tensor + 12 / layout.count)
        gathered = 0.0
    else:
        states = 16 * numbers / layout.count
        gathered = layer_numbers(size) / layout.tensor * (2 * unit + 4) if layout.count > 1 else 0.0
    saved = saved_per_token(size, layout) * own
    naive = 0.0
    if layout.attention == "naive":  # all weights, kept, and two like them on the way back (science.md: 3P)
        shared = layout.tensor * layout.sequence
        naive = size.num_attention_heads / shared * tokens**2 * unit
    stream = _stream(size, layout) * own
    if layout.recompute:
        kept, at_work = stream * (2 if layout.offload else layers), saved - stream + 3 * naive
    else:
        kept, at_work = (saved + naive) * layers, 2 * naive
    working = at_work + extra_per_token(size, layout) * own + stream  # and what the last norm reads
    return Need(
        tokens=tokens,
        states=round(states),
        gathered=round(gathered),
        kept=round(kept),
        working=round(working),
        flops=step_flops(size, tokens, layout.recompute) / (layout.sequence * layout.tensor),
        moved=_moved(size, tokens, layout),
    )


def step_flops(size: DecoderConfig, tokens: int, recompute: bool) -> float:
    """Return the operations of a step over one row: products of matrices, and the causal half of attention.

    A pass back is two passes of products; of attention 2.5, as the weights are computed again (science.md, 2.4).
    """
    width = size.num_attention_heads * size.head_dim
    head = 2.0 * size.vocab_size * size.hidden_size * tokens
    products = 2.0 * layer_numbers(size) * size.num_hidden_layers * tokens
    attention = 2.0 * width * size.num_hidden_layers * float(tokens) ** 2
    again = 1 if recompute else 0
    return products * (3 + again) + attention * (3.5 + again) + 3 * head


def _moved(size: DecoderConfig, tokens: int, layout: Layout) -> float:
    """Return the bytes that a device sends in a step: states, and what attention exchanges."""
    numbers, layers = decoder_numbers(size), size.num_hidden_layers
    unit, passes = _COMPUTED, 3 if layout.recompute else 2
    sent = 0.0
    others = (layout.count - 1) / layout.count
    if layout.whole_states:
        sent += 2 * 2 * numbers / layout.tensor * others
    else:
        sent += numbers * (2 * unit + 4) * others  # gathered for each pass, gradients shared out in float32
    if layout.sequence > 1:
        _, queries, keys, _ = _widths(size)
        share = tokens / layout.sequence * (layout.sequence - 1) / layout.sequence
        sent += layers * passes * share * (2 * queries + 2 * keys) * unit
    if layout.tensor > 1:
        sent += layers * passes * 4 * tokens * size.hidden_size * unit * (layout.tensor - 1) / layout.tensor
    return sent


def longest(size: DecoderConfig, layout: Layout, capacity: float) -> int:
    """Return the most tokens, in thousands of 1,024, whose step fits in the bytes of one device; 0: none does."""
    low, high = 0, 1
    while high < 2**20 and decoder_need(size, 1024 * high, layout).memory <= capacity:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = decoder_need(size, 1024 * middle, layout).memory <= capacity
        low, high = (middle, high) if fits else (low, middle)
    return 1024 * low


# --------------------------------------------------------------------------------- what was published, to stand beside

# Longest sequences of arXiv:2310.04610 (plot data of its repository), tokens, 128 A100 of 40 GB: by model, before
# (its Megatron-DeepSpeed), with NVIDIA's Megatron-LM, and after.
PUBLISHED = {"25b": (32_000, 52_000, 448_000), "33b": (42_000, 52_000, 512_000)}


def published_layouts(layout: Layout) -> dict[str, Layout]:
    """Return the layouts to compare: as published before and after, told by scripts and prose, and the one given."""
    before = Layout(
        count=layout.count, tensor=min(32, layout.count), whole_states=True, attention="naive", stream_bytes=2
    )
    after = replace(before, stream_cut=True, attention="exact")
    return {"before": before, "after": after, "ours": layout}


# ----------------------------------------------------------------------------------------------------------- Evoformer


@dataclass(frozen=True, slots=True)
class BiasedAttention:
    """One attention of an Evoformer block: `rows` share a pair bias, `length` is attended."""

    name: str
    rows: int
    length: int
    heads: int
    head_dim: int
    bias: bool = True

    def one(self, unit: int) -> float:
        """Return the bytes of queries alone [T]."""
        return float(self.rows * self.length * self.heads * self.head_dim * unit)

    def scores(self, unit: int = 1) -> float:
        """Return how many scores there are [S], or their bytes [P]."""
        return float(self.rows * self.heads) * self.length**2 * unit

    def peak(self, attention: Attention, unit: int = 2, ranks: int = 1) -> float:
        """Return the bytes at the fullest of its backward pass, inputs and incoming gradient included.

        exact: 8 T, the float32 gradient of the bias, and two numbers a query. naive: 3 P + 10 T. ranks: that share the
        rows; the bias is whole on each.
        """
        own = replace(self, rows=-(-self.rows // ranks))
        if attention == "naive":
            return 3 * own.scores(unit) + 10 * own.one(unit)
        biases = (4 + 2 * unit) * self.heads * self.length**2 if self.bias else 0
        return 8 * own.one(unit) + biases + 8 * own.rows * own.heads * own.length

    def flops(self) -> float:
        """Return operations forward, again and back: 4, 4 and 18 S D, the bias's gradient without atomics."""
        return 26 * self.scores() * self.head_dim

    def exponentials(self) -> float:
        """Return exponentials forward, again and back: S, S and 3 S."""
        return 5 * self.scores()


def attentions(size: EvoformerConfig, residues: int, sequences: int) -> tuple[BiasedAttention, ...]:
    """Return the four attentions of a block (Jumper et al. 2021)."""
    return (
        BiasedAttention("rows", sequences, residues, size.msa_heads, size.msa_head_dim),
        BiasedAttention("columns", residues, sequences, size.msa_heads, size.msa_head_dim, bias=False),
        BiasedAttention("triangle, starting", residues, residues, size.pair_heads, size.pair_head_dim),
        BiasedAttention("triangle, ending", residues, residues, size.pair_heads, size.pair_head_dim),
    )


@dataclass(frozen=True, slots=True)
class EvoformerNeed:
    """What one device needs for the attention of a stack. Sizes in bytes."""

    residues: int
    kept: float  # alignment and pairs of each block
    naive: float  # of the largest attention
    exact: float
    flops: float
    seconds: float


def evoformer_need(
    size: EvoformerConfig,
    residues: int,
    sequences: int,
    ranks: int,
    rate: float,
    exponential_rate: float,
) -> EvoformerNeed:
    """Return what a stack with recomputed blocks needs in bf16: kept inputs of all blocks, and its largest attention.

    ranks: that share the rows of every attention. rate: FLOP/s of one device. exponential_rate: exp/s.
    """
    calls = attentions(size, residues, sequences)
    kept = size.blocks * 2 * residues * (sequences * size.msa_width + residues * size.pair_width) / ranks
    peaks = {kind: max(one.peak(kind, ranks=ranks) for one in calls) for kind in ("naive", "exact")}
    flops = size.blocks * sum(one.flops() for one in calls) / ranks
    exponentials = size.blocks * sum(one.exponentials() for one in calls) / ranks
    return EvoformerNeed(
        residues, kept, peaks["naive"], peaks["exact"], flops, max(flops / rate, exponentials / exponential_rate)
    )


LONGEST = 2**40  # tokens: beyond it no plan says anything


def parse_lengths(text: str) -> list[int]:
    """Return lengths of "2048,4096", or doubled from one to the other of "2k:1M". Raises ConfigError."""
    try:
        if ":" in text:
            first, last = (_whole(one) for one in text.split(":"))
            found = [first << times for times in range(41) if first << times <= last] if first > 0 else []
        else:
            found = [_whole(one) for one in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or max(found) > LONGEST:
        raise ConfigError(
            f"lengths {text!r:.80} must be whole numbers of 1 to {LONGEST:,}, such as 2048,4096, or a range that "
            "doubles, 2k:1M"
        )
    return found


def _whole(text: str) -> int:
    units = {"k": 2**10, "K": 2**10, "M": 2**20}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)
