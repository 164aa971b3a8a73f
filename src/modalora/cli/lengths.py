"""`modalora plan SIZE --lengths`: what a step needs by sequence length, a table; and the attention of an Evoformer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from modalora.cli.words import lasting, sized, to_json

if TYPE_CHECKING:
    from modalora.models.decoder import DecoderConfig
    from modalora.training.lengths import Layout, Need


@dataclass(frozen=True, slots=True)
class Devices:
    """What the rows of a table are planned for. share: of the peak rate. link: GB/s that a device sends."""

    machine: str
    count: int
    share: float
    link: float


def decoder_table(name: str, lengths: str, where: Devices, sequence: int, offload: bool, as_json: bool) -> None:
    """Print memory and time of a training step by tokens of a row; sequence: devices that share one, 0: all."""
    from modalora.training.lengths import Layout, decoder_need, decoder_numbers, parse_lengths
    from modalora.training.machines import machine_of
    from modalora.training.plan import read_size

    machine = machine_of(where.machine)
    peak, capacity = machine.peak, machine.memory
    size = read_size(name)[0].decoder
    layout = Layout(count=where.count, sequence=sequence or where.count, offload=offload)
    rows = [
        (decoder_need(size, tokens, layout), decoder_need(size, tokens, replace(layout, attention="naive")))
        for tokens in parse_lengths(lengths)
    ]
    seconds = [(own.flops / (where.share * peak), own.moved / (where.link * 1e9)) for own, _ in rows]
    if as_json:
        lines = [
            {**asdict(own), "memory": own.memory, "naive_memory": naive.memory, "compute_seconds": busy,
             "transfer_seconds": sent, "fits": own.memory <= capacity}
            for (own, naive), (busy, sent) in zip(rows, seconds, strict=True)
        ]  # fmt: skip
        found = {"size": name, "numbers": decoder_numbers(size), "layout": asdict(layout), "lines": lines}
        print(to_json(found | {"longest": _longest(name, size, layout, capacity)}))
        return
    shape = f"{size.num_hidden_layers} layers of width {size.hidden_size}"
    print(f"{name}: {decoder_numbers(size) / 1e9:.3g}e9 numbers, {shape}, {size.num_attention_heads} heads")
    print(f"bytes on the fullest of {where.count} {where.machine}, {capacity / 1e9:.0f} GB each")
    print(f"{'tokens':>9} {'states':>9} {'gathered':>9} {'kept':>9} {'working':>9} {'in all':>9} {'fits':>4} "
          f"{'naive':>9} {'fits':>4} {'compute':>9} {'transfer':>9}")  # fmt: skip
    for (own, naive), (busy, sent) in zip(rows, seconds, strict=True):
        print(_line(own, naive, capacity) + f" {lasting(busy):>9} {lasting(sent):>9}")
    for line in _assumptions(layout, where, peak, size.num_key_value_heads):
        print(line)
    for title, (tokens, told) in _longest(name, size, layout, capacity).items():
        beside = f"; the paper has {told:,}" if told else ""
        print(f"longest, {title}: {tokens:,} tokens{beside}")


def _line(own: Need, naive: Need, capacity: float) -> str:
    sizes = "".join(f" {sized(size):>9}" for size in (own.states, own.gathered, own.kept, own.working, own.memory))
    fits, fits_naive = ("yes" if need.memory <= capacity else "no" for need in (own, naive))
    return f"{own.tokens:>9,}{sizes} {fits:>4} {sized(naive.memory):>9} {fits_naive:>4}"


def _assumptions(layout: Layout, where: Devices, peak: float, heads: int) -> list[str]:
    kept = "on the CPU" if layout.offload else "on the device"
    rows = layout.count // layout.sequence
    text = f"""\
assumed: {layout.sequence} of {layout.count} devices share a row, {rows} row{"s" * (rows > 1)} at a time;
  weights, gradients and two moments in float32, cut over all; two layers gathered in bf16, a gradient in float32;
  every layer recomputed from its input, kept in float32 {kept}; products in bf16;
  exact attention keeps queries, keys, values and output, no table of weights; naive: three tables at once;
  attention exchanged as in Ulysses; more devices than the {heads} heads share a row as Ulysses x ring;
  no allocator's gaps, no library's buffers: leave a tenth free, as "longest" does;
  time: {where.share:.0%} of {peak / 1e12:.0f} TFLOP/s, {where.link:g} GB/s sent by each device, perhaps at once."""
    return text.splitlines()


def _longest(name: str, size: DecoderConfig, layout: Layout, capacity: float) -> dict[str, tuple[int, int]]:
    """Return by layout the most tokens of a row, and what the paper has for it (0: nothing)."""
    from modalora.training.lengths import PUBLISHED, longest, published_layouts

    before, _, after = PUBLISHED.get(name.removeprefix("genome-"), (0, 0, 0))
    told = {"before": before, "after": after, "ours": 0}
    cut = min(32, layout.count)
    titles = {
        "before": f"{cut} devices cut each layer, each has the whole row, naive attention (published, before)",
        "after": f"{cut} devices cut each layer and the stream, exact attention (published, after)",
        "ours": f"{layout.sequence} devices share a row, states cut over {layout.count}",
    }
    if layout.count != 128 or capacity > 40e9:
        told = dict.fromkeys(told, 0)  # the paper's figures are those of 128 devices of 40 GB
    return {
        titles[key]: (longest(size, one, 0.9 * capacity), told[key]) for key, one in published_layouts(layout).items()
    }


def evoformer_table(lengths: str, sequences: int, where: Devices, as_json: bool) -> None:
    """Print memory and time of the attention of AlphaFold2's 48 blocks by residues, `sequences` deep."""
    from modalora.science.evoformer import EvoformerConfig
    from modalora.training.lengths import evoformer_need, parse_lengths
    from modalora.training.machines import machine_of

    machine = machine_of(where.machine)
    peak, capacity = machine.peak, machine.memory
    size, rate = EvoformerConfig(), where.share * peak
    needs = [
        evoformer_need(size, residues, sequences, where.count, rate, machine.exponentials)
        for residues in parse_lengths(lengths)
    ]
    if as_json:
        print(to_json([asdict(one) for one in needs]))
        return
    print(f"48 blocks, {sequences} sequences, on each of {where.count} {where.machine}, {capacity / 1e9:.0f} GB")
    print(f"{'residues':>8} {'kept':>9} {'naive':>9} {'in all':>9} {'exact':>9} {'in all':>9} {'ratio':>6} {'time':>9}")
    for one in needs:
        sizes: list[Any] = [one.kept, one.naive, one.kept + one.naive, one.exact, one.kept + one.exact]
        told = "".join(f" {sized(own):>9}" for own in sizes)
        print(f"{one.residues:>8,}{told} {one.naive / one.exact:>6.2f} {lasting(one.seconds):>9}")
    print("assumed: bf16; each block recomputed from its alignment and pairs, kept on the device; of a block, the")
    print(
        "  largest of its four attentions, backward (naive 3 P + 10 T, exact 8 T and the bias's gradient in float32);"
    )
    print("  transitions, triangle products and the outer product are left out: they are as large for both;")
    print("  rows of each attention are shared by all devices, the pair bias is whole on each;")
    print(f"  time of attention alone: {where.share:.0%} of the peak rate of products, or its exponentials.")
