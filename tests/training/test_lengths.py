from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from modalora.config import RunConfig, parse
from modalora.errors import ConfigError
from modalora.models.decoder import DecoderConfig
from modalora.models.multimodal import ModelConfig, Multimodal, parameter_counts
from modalora.models.sizes import genome_25b, genome_33b
from modalora.nn.rope import Plain
from modalora.science.evoformer import EvoformerConfig
from modalora.training.lengths import (
    BiasedAttention,
    Layout,
    decoder_need,
    decoder_numbers,
    evoformer_need,
    longest,
    parse_lengths,
    published_layouts,
    step_flops,
)
from modalora.training.plan import plan_step, shaped_batch

SMALL = DecoderConfig(
    vocab_size=66, hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, rope=Plain(window=8192),
)  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
def test_the_formula_says_what_a_step_counts_at_several_lengths(recompute: bool) -> None:
    # Two micro-batches, so that gradients are there while the second one runs, as the formula has them. What a step
    # counts is checked against an allocator in test_plan.py.
    fields = {"init": "x", "output": "x", "train": ["decoder"], "mixture": [{"source": "codons"}], "steps": 2}
    run = parse(RunConfig, fields | {"recompute": recompute, "accumulate": 2}, "test")
    layout, counted = Layout(recompute=recompute), []
    for tokens in (1024, 1536):
        batch = shaped_batch(ModelConfig(decoder=SMALL), [f"text={tokens}"], 1)
        plan = plan_step(ModelConfig(decoder=SMALL), run, [batch, batch])
        need = decoder_need(SMALL, tokens, layout)
        assert need.states == pytest.approx(plan.weights + plan.gradients + plan.optimizer, rel=1e-4)
        # seen: 4 % above; attention in tiles on a CPU holds a few of them besides, which no kernel of a GPU does
        assert need.kept + need.working == pytest.approx(plan.step, rel=0.08)
        # tiles reach over the diagonal, and a pass back computes the weights again
        assert 2 * need.flops == pytest.approx(plan.flops, rel=0.15)
        counted.append(plan.step)
    assert counted[1] / counted[0] == pytest.approx(1.5, rel=0.05)


def test_numbers_are_those_of_the_networks() -> None:
    for size in (SMALL, replace(SMALL, tie_word_embeddings=False), genome_25b().decoder):
        with torch.device("meta"):
            assert decoder_numbers(size) == parameter_counts(Multimodal(ModelConfig(decoder=size)))["decoder"]
    assert decoder_numbers(genome_25b().decoder) == pytest.approx(25.5e9, rel=0.01)
    assert decoder_numbers(genome_33b().decoder) == pytest.approx(31.9e9, rel=0.01)


def test_exact_attention_is_linear_in_the_row_and_naive_is_quadratic() -> None:
    size, layout = genome_25b().decoder, Layout(count=128, sequence=128)

    def taken(tokens: int, one: Layout) -> int:
        need = decoder_need(size, tokens, one)
        return need.kept + need.working

    assert taken(2**20, layout) == pytest.approx(2 * taken(2**19, layout), rel=1e-6)
    naive = replace(layout, attention="naive")
    assert taken(2**20, naive) == pytest.approx(4 * taken(2**19, naive), rel=0.02)
    # 64 heads, a row of 2^20, 128 devices, two bytes: three tables of weights of half a head each
    assert taken(2**20, naive) - taken(2**20, layout) == pytest.approx(3 * 2**40)


def test_twice_the_ranks_take_half_of_what_a_row_needs_and_the_states_stay() -> None:
    size = genome_25b().decoder
    one, two = (decoder_need(size, 2**18, Layout(count=128, sequence=ranks)) for ranks in (32, 64))
    assert two.kept + two.working == pytest.approx((one.kept + one.working) / 2, rel=1e-6)
    assert two.states == one.states == pytest.approx(16 * decoder_numbers(size) / 128, abs=1)
    assert two.flops == pytest.approx(one.flops / 2)
    kept = decoder_need(size, 2**18, Layout(count=128, sequence=64, offload=True)).kept
    assert kept == pytest.approx(two.kept / 32)  # two of 64 layers on their way


def test_the_operations_of_a_layer_are_six_a_number_and_eight_with_recompute() -> None:
    size = genome_25b().decoder
    numbers = decoder_numbers(size) - 66 * 5760 - 129 * 5760  # embeddings are read, norms are no products
    for recompute, factor in ((False, 6), (True, 8)):
        assert step_flops(size, 1, recompute) == pytest.approx(factor * numbers, rel=1e-3)
    ratio = step_flops(size, 2**24, False) / step_flops(size, 2**23, False)
    assert ratio == pytest.approx(4, rel=0.05)  # attention is nearly all


def test_what_was_published_before_is_told_within_a_factor_of_two() -> None:
    layouts = published_layouts(Layout(count=128, sequence=128))
    for size, before, after in ((genome_25b(), 32_000, 448_000), (genome_33b(), 42_000, 512_000)):
        told = {name: longest(size.decoder, layout, 0.9 * 40e9) for name, layout in layouts.items()}
        assert before / 2 < told["before"] < 2 * before
        assert told["after"] > after  # a bound from above: nothing that fits on paper may have been passed
        assert told["ours"] > told["after"]


def test_the_longest_row_fits_and_the_next_one_does_not() -> None:
    size, layout = genome_25b().decoder, Layout(count=8, sequence=8)
    tokens = longest(size, layout, 80e9)
    assert decoder_need(size, tokens, layout).memory <= 80e9 < decoder_need(size, tokens + 1024, layout).memory
    assert longest(size, Layout(), 80e9) == 0  # 408 GB of states


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="sequence=3 x tensor=1 must divide the 8 devices"):
        Layout(count=8, sequence=3)
    with pytest.raises(ConfigError, match="offload moves what recompute keeps"):
        Layout(recompute=False, offload=True)


@pytest.mark.parametrize(
    ("rows", "length", "heads", "head_dim", "naive", "exact"),
    [  # bf16, bytes: the fact sheet's figures for MSA rows, extra-MSA rows and a triangle of 384
        (512, 384, 8, 32, 4.6e9, 0.81e9),
        (5120, 384, 8, 8, 39e9, 2.0e9),
        (384, 384, 4, 32, 1.7e9, 0.31e9),
    ],
)
def test_an_attention_with_biases_takes_the_published_peaks(
    rows: int, length: int, heads: int, head_dim: int, naive: float, exact: float
) -> None:
    call = BiasedAttention("one", rows, length, heads, head_dim)
    assert call.peak("naive") == pytest.approx(naive, rel=0.03)
    # the sheet leaves out two numbers a query and the bias itself
    assert call.peak("exact") == pytest.approx(exact, rel=0.10)
    ratio = (10 + 3 * length / head_dim) / 8
    assert call.peak("naive") / call.peak("exact") == pytest.approx(ratio, rel=0.10)


def test_naive_attention_counts_three_score_tables_on_real_tensors() -> None:
    rows, length, heads, head_dim = 4, 256, 2, 8
    call = BiasedAttention("one", rows, length, heads, head_dim)
    q, k, v = (torch.randn(rows, heads, length, head_dim, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, heads, length, length, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = torch.softmax(q @ k.transpose(-1, -2) * head_dim**-0.5 + bias, dim=-1) @ v
        out.backward(torch.ones_like(out))
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    inputs = 3 * call.one(4)
    # L / D = 32, so P dominates: plain softmax makes 3 T fewer than a network that scales and transposes
    assert peak + inputs == pytest.approx(call.peak("naive", 4), rel=0.10)


def test_ranks_share_rows_and_not_the_bias() -> None:
    call = BiasedAttention("one", 512, 384, 8, 32)
    whole, part = call.peak("exact"), call.peak("exact", ranks=4)
    bias = 8 * 8 * 384**2  # two copies in bf16, one gradient in float32
    assert part - bias == pytest.approx((whole - bias) / 4)
    need = evoformer_need(EvoformerConfig(), 384, 512, 4, 1e14, 1e12)
    assert need.exact < need.naive
    assert need.seconds == pytest.approx(max(need.flops / 1e14, need.flops / (26 * 32) * 5 / 1e12))


def test_lengths_are_listed_or_doubled() -> None:
    assert parse_lengths("2k:16k") == [2048, 4096, 8192, 16384]
    assert parse_lengths("100,1M") == [100, 2**20]
    for text in ("", "2k:1k", "many", "0", "1:2:3", "0:4", "-1:5", "9" * 400, f"1,{2**40 + 1}"):
        with pytest.raises(ConfigError, match="must be whole numbers"):
            parse_lengths(text)


def test_the_command_prints_a_table_its_assumptions_and_the_paper(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("plan", "genome-33b", "--lengths", "2k:1M", "--machine", "a100-40gb", "--count", "128")
    assert code == 0
    assert out.count("\n") == 10 + 3 + 7 + 3
    assert "the paper has 512,000" in out
    assert "assumed: 128 of 128 devices share a row" in out
    code, out, _ = run("plan", "evoformer", "--lengths", "256,512", "--machine", "h100")
    assert code == 0
    assert "left out" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["genome", "--lengths", "2k"], "--lengths plans for GPUs by name"),
        (["evoformer", "--lengths", "256", "--machine", "a100", "--sequence", "2"], "--count shares"),
        (["genome", "steps=2", "--lengths", "2k", "--machine", "a100"], "--lengths is for planning a size"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments: list[str], told: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = run("plan", *arguments)
    assert code == 2
    assert told in " ".join(err.replace("│", " ").split())


def test_the_table_can_be_had_as_json(run: Callable[..., tuple[int, str, str]]) -> None:
    import json

    code, out, _ = run("plan", "genome", "--lengths", "1k", "--machine", "h100", "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 0
    assert found["lines"][0]["fits"] is True
    assert found["lines"][0]["memory"] == sum(
        found["lines"][0][key] for key in ("states", "gathered", "kept", "working")
    )
