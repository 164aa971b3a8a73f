"""What an extension costs, told before anything is allocated: operations of its stages, and hours on GPUs.

A forward pass over T tokens is 2 operations per number of the decoder and token and the causal half of the attention's,
as training/flops.py counts them; only scored tokens go through the output projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modalora.config import ExtendConfig, RunConfig
from modalora.contracts import IGNORED, Batch, Route
from modalora.longrope2.factors import Stretch
from modalora.longrope2.space import space_of
from modalora.models.multimodal import Multimodal
from modalora.training.flops import StepFlops
from modalora.training.machines import machine_rate
from modalora.training.optimizer import trained_parts
from modalora.training.plan import read_size, token_shares

# Documents that racing reads, of those that judging every candidate wholly takes: an assumption for a plan, between the
# 0.12 measured with 48 documents and the 0.92 with 16; a search tells its own (summary.json, share_of_passes).
RACED = 0.5
_ANSWER = 7  # scored tokens of a needle of seven digits


@dataclass(frozen=True, slots=True)
class Hours:
    """Time on some machines. Each in hours."""

    machine: str
    count: int
    search: float
    training: float
    scores: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtensionPlan:
    """Cost of an extension. Operations are single ones, a multiply-add two; short_share is of the training's tokens.

    training_flops: with what is computed again in the backward pass.
    """

    parameters: int
    window: int
    target: int
    pairs: int
    critical: int
    ten_turns: int
    evaluations: int
    documents: int
    document_flops: float
    plain_search_flops: float  # every candidate on every document
    racing_share: float
    search_flops: float
    training_tokens: int
    short_share: float
    training_flops: float
    score_flops: float
    utilisation: float
    hours: tuple[Hours, ...]


def plan_extension(config: ExtendConfig, machines: Sequence[tuple[str, int]], share: float) -> ExtensionPlan:
    """Return what a recipe of kind extend costs on each (machine, count).

    share: of a GPU's peak rate that is reached. Raises ConfigError, CheckpointError.
    """
    size, _ = read_size(config.init)
    stretch = Stretch.of(size.decoder.rope, size.decoder.head_dim, config.target)
    space_of(stretch, config.search)
    with torch.device("meta"):
        model = Multimodal(size)
    forward = StepFlops(model, (), decodes=True)
    answers = config.guide.needles * (_ANSWER if config.guide.style == "digits" else 1)
    scored = config.target if config.guide.score == "text" else answers
    document = forward.of([_row(config.target, scored)])
    search = config.search
    evaluations = search.population + search.iterations * (search.population // 2)
    plain = evaluations * config.guide.documents * document
    racing = RACED if search.racing else 1.0
    run = config.run(rope={})
    trained, short = (0.0, 0.0) if run is None else _training(model, run, stretch)
    lengths = config.score_lengths(stretch.window)
    subjects = len(config.scores.methods) + 2 * (run is not None)
    scores = subjects * config.scores.documents * sum(forward.of([_row(length, answers)]) for length in lengths)
    hours = []
    for machine, count in machines:
        rate = machine_rate(machine, "bf16", share) * count * 3600
        hours.append(Hours(machine, count, racing * plain / rate, trained / rate, scores / rate))
    return ExtensionPlan(
        parameters=sum(own.numel() for own in model.parameters()),
        window=stretch.window,
        target=stretch.target,
        pairs=stretch.pairs,
        critical=stretch.critical,
        ten_turns=stretch.ten_turns,
        evaluations=evaluations,
        documents=config.guide.documents,
        document_flops=document,
        plain_search_flops=plain,
        racing_share=racing,
        search_flops=racing * plain,
        training_tokens=0 if run is None else run.steps * run.step_tokens,
        short_share=short,
        training_flops=trained,
        score_flops=scores,
        utilisation=share,
        hours=tuple(hours),
    )


def _row(length: int, scored: int) -> Batch:
    """Return a blank row of which the last tokens are scored."""
    labels = torch.full((1, length), IGNORED)
    labels[:, -min(scored, length - 1) :] = 0
    return Batch(torch.zeros_like(labels), torch.tensor([length]), Route((None,)), labels=labels)


def _training(model: Multimodal, run: RunConfig, stretch: Stretch) -> tuple[float, float]:
    """Return the operations of a run, and the share of its tokens in rows that the trained window holds.

    A row counts as long as its source's window: documents that are shorter take less attention.
    """
    step = StepFlops(model, trained_parts(model, run.train), decodes=True)
    shares = token_shares(run, stretch.target)

    def of_row(size: int) -> float:
        attention = step.attention * size**2
        again = attention / 2  # of the two products forward, one is made again in tiles: keys times queries
        if run.recompute:
            again += 2 * step.decoder * size + attention
        return step.of([_row(size, size)]) + again

    per_token = sum(share * of_row(size) / size for size, share in shares)
    short = sum(share for size, share in shares if size <= stretch.window)
    return per_token * run.steps * run.step_tokens, short
