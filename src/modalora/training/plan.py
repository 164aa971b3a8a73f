"""What a run needs, told before anything is allocated: a step is carried out on tensors that have no memory.

The model is built of fake tensors (torch._subclasses), which have shapes, dtypes and a device, and no numbers. Forward,
backward and optimiser then run as they will run, with autocast and recompute, while every storage is counted from its
birth to its release. Of loops over like tiles two show what all take (nn/shown.py). So nothing is estimated but what
kernels take for themselves. Bytes are bytes, FLOPs count a multiply-add as two.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from modalora import modality
from modalora.checkpoint.card import read_card
from modalora.checkpoint.find import find_model
from modalora.checkpoint.store import describe
from modalora.config import MediaConfig, MeshConfig, RunConfig
from modalora.contracts import IGNORED, Batch, Media, Route
from modalora.data.reader import LIMITS, check_apart, limited
from modalora.data.sources import MADE, Context
from modalora.errors import CheckpointError, ConfigError, DataError, InputError
from modalora.models.multimodal import ModelConfig, Multimodal, matches, part_of, recompute, start_training
from modalora.models.router import route
from modalora.models.sizes import SIZES
from modalora.nn.lora import LoraConfig
from modalora.nn.shown import few_stand_for_all
from modalora.parallel.engine import step_and_clear
from modalora.parallel.sequence import split_tokens
from modalora.quantize import quantize
from modalora.training.audit import check_preserved, check_settings, check_trained
from modalora.training.dropout import add_dropout
from modalora.training.flops import StepFlops
from modalora.training.held_out import open_held_out
from modalora.training.meter import Meter, size_of
from modalora.training.objectives import OBJECTIVES, Objective, trained_part
from modalora.training.optimizer import Optimizer, freeze, trained_parts
from modalora.training.start import grown, load_modalities, make_mixture, open_context

LOOKED_AT = 4  # steps of each phase of a mixture


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the model, the unit of freezing (models/multimodal.py:part_of); sizes in bytes."""

    name: str
    numbers: int
    trained: int  # of the numbers
    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one training step needs. Sizes in bytes; step: what lives beside weights, gradients and optimiser.

    Where processes share tokens (mesh.sequence), step and peak are of one of them, flops and moved of all.
    """

    parts: tuple[Part, ...]
    rows: int
    tokens: int
    media_tokens: int
    labels: int
    weights: int
    gradients: int
    optimizer: int
    step: int
    peak: int
    flops: int
    moved: int  # bytes that operations read and write
    forward: float  # share of the work that reading alone takes, as rows that are only scored do
    steps: int  # of the run: about as many as the data last for, where these end before

    @property
    def trained(self) -> int:
        """Numbers that train."""
        return sum(part.trained for part in self.parts)

    @property
    def numbers(self) -> int:
        """Numbers in all."""
        return sum(part.numbers for part in self.parts)


def plan_step(config: ModelConfig, run: RunConfig, micro: Sequence[Batch], dtype: torch.dtype = torch.float32) -> Plan:
    """Return what a step of a run over these micro-batches needs.

    dtype: what the weights are stored in. Raises ConfigError when run.train names no part of the model, DataError for
    rows that the run's objective cannot learn from.
    """
    fake = FakeTensorMode()
    with torch.device("meta"):
        model = Multimodal(config)
    decodes = run.objective == "next_token"
    work = StepFlops(model, trained_parts(model, run.train), decodes=decodes)
    reading = StepFlops(model, (), decodes=decodes)
    objective, trained = _make_trainable(model, run, dtype, fake)
    optimizer = Optimizer(trained, run.optim, run.steps)
    optimizer.set_rate(0)
    start_training(model)
    labels = sum(int(batch.labelled.sum()) for batch in micro)
    for batch in micro:
        objective.count(batch)  # refuses rows that it cannot learn from, as training does
    with _shared(model, run.mesh), few_stand_for_all(), Meter(fake) as meter:
        for tensor in [*model.parameters(), *model.buffers(), *objective.parameters()]:
            meter.hold(tensor)
        weights = meter.now
        for moment in optimizer.state().values():
            meter.hold(moment)
        # the two largest, the largest last: others add no memory, and work as formulas tell
        metered = sorted(micro, key=lambda batch: (_tokens(batch), int(batch.lengths.max())))[-2:]
        for batch in metered:
            with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bf16"):
                losses = objective(model, batch)
            mean = losses.values.sum() / max(1, labels)
            if mean.requires_grad:
                mean.backward()
            del losses, mean
        gradients = {name: size_of(parameter.grad) for name, parameter in trained.items() if parameter.grad is not None}
        torch.nn.utils.clip_grad_norm_(list(trained.values()), run.optim.clip_norm)
        step_and_clear(optimizer)
    states = _state_sizes(optimizer)
    parts = _parts(model, objective, gradients, states)
    times = work.of(micro) / work.of(metered)
    total_gradients, total_states = sum(gradients.values()), sum(states.values())
    return Plan(
        parts=parts,
        rows=sum(len(batch.input_ids) for batch in micro),
        tokens=sum(map(_tokens, micro)),
        media_tokens=sum(item.tokens for batch in micro for item in batch.media),
        labels=labels,
        weights=weights,
        gradients=total_gradients,
        optimizer=total_states,
        step=meter.peak - weights - total_gradients - total_states,
        peak=meter.peak,
        flops=round(meter.flops * times) * run.mesh.sequence,
        moved=round(meter.moved * times) * run.mesh.sequence,
        forward=reading.of(micro) / work.of(micro),
        steps=run.steps,
    )


def _make_trainable(
    model: Multimodal, run: RunConfig, dtype: torch.dtype, fake: FakeTensorMode
) -> tuple[Objective, dict[str, torch.nn.Parameter]]:
    """Give a model without memory the fake weights of a run; return its objective, and what trains of both."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    with fake:
        blank = {name: torch.empty(shape, dtype=_dtype(name, run, dtype)) for name, shape in shapes.items()}
        model.load_state_dict(blank, assign=True)
        objective = OBJECTIVES[run.objective](model)
        if run.base_bits is not None:
            quantize(model, run.base_bits)
    if run.recompute:
        recompute(model)  # what is offloaded is counted all the same: it is in some memory
    trained = freeze(model, run.train)
    check_preserved(model, run)
    check_trained(trained, trained, run)
    add_dropout(model, run.dropout)
    return objective, trained | {f"objective.{name}": parameter for name, parameter in objective.named_parameters()}


def _tokens(batch: Batch) -> int:
    return int(batch.lengths.sum())


@contextmanager
def _shared(model: Multimodal, mesh: MeshConfig) -> Iterator[None]:
    """Let a model share tokens with processes that are not there: what these would send is of no numbers anyway."""
    if mesh.tensor > 1:
        raise ConfigError(f"mesh.tensor={mesh.tensor} is not planned; plan without it (mesh.tensor=1)")
    if mesh.sequence == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=mesh.sequence, store=FakeStore())
    try:
        places = init_device_mesh("cpu", (mesh.ring, mesh.sequence // mesh.ring), mesh_dim_names=("ring", "heads"))
        split_tokens(model, places["ring"], places["heads"])
        yield
    finally:
        dist.destroy_process_group()


def shaped_batch(
    config: ModelConfig,
    shapes: Sequence[str],
    rows: int,
    limits: MediaConfig | None = None,
    routes: Sequence[str] = ("auto",),
) -> Batch:
    """Return a batch of blank rows of given shapes and routes, each taken in turn, every text token labelled.

    A shape is text=TOKENS, image=WIDTHxHEIGHT and audio=SECONDS, in any number, with commas: "text=200,image=1344x896".
    Raises ConfigError for another shape, RouteError where the model has no route for the media.
    """
    blanks = [_blank(config, shape, limits or MediaConfig()) for shape in islice(cycle(shapes), rows)]
    lengths = torch.tensor([sum(item[2] for item in media) + text for media, text in blanks])
    if (longest := int(lengths.max())) > config.decoder.rope.window:
        raise ConfigError(
            f"a row of {longest:,} tokens: the model reads at most {config.decoder.rope.window:,}; give shorter rows"
        )
    labels = torch.full((rows, int(lengths.max())), IGNORED)
    found, adapters = [], []
    for row, ((media, text), asked) in enumerate(zip(blanks, cycle(routes), strict=False)):
        rule = route({kind for kind, *_ in media}, asked, tuple(config.adapters), modality.routes(config))
        adapters.append(rule.adapter)
        at = 0
        for kind, features, tokens in media:
            found.append(Media(kind, features, row, at, tokens, rule.branches[kind]))
            at += tokens
        labels[row, at : at + text] = 0
    return Batch(torch.zeros_like(labels), lengths, Route(tuple(adapters)), tuple(found), labels)


def _blank(
    config: ModelConfig, shape: str, limits: MediaConfig
) -> tuple[list[tuple[str, dict[str, Tensor], int]], int]:
    media: list[tuple[str, dict[str, Tensor], int]] = []
    text = 0
    for piece in shape.split(","):
        kind, _, size = piece.strip().partition("=")
        if kind == "text" and re.fullmatch(r"\d{1,12}", size):
            text += int(size)
        elif kind in config.modalities and (payload := _blank_payload(kind, size, config)) is not None:
            row = modality.find(kind)
            settings = limited(kind, row.settings(config.modalities[kind]), limits)
            media.append((kind, *row.features(payload, settings)))
        else:
            raise ConfigError(
                f"row shape {piece.strip()!r}: write text=TOKENS, image=WIDTHxHEIGHT or audio=SECONDS, of media that "
                "the model takes, e.g. text=200,image=1344x896"
            )
    return media, max(1, text)


def _blank_payload(kind: str, size: str, config: ModelConfig) -> Any:
    settings = modality.find(kind).settings(config.modalities[kind])
    if kind == "image" and (sides := re.fullmatch(r"(\d{1,9})x(\d{1,9})", size)):
        width, height = int(sides[1]), int(sides[2])
        if width * height > settings.max_pixels:
            raise ConfigError(f"row shape image={size:.60}: at most {settings.max_pixels:,} pixels are read")
        return Image.new("RGB", (width, height))
    if kind == "audio" and re.fullmatch(r"\d{1,12}(\.\d+)?", size):
        if float(size) > settings.max_seconds:
            raise ConfigError(f"row shape audio={size:.60}: at most {settings.max_seconds:,.0f} s are read")
        return np.zeros(int(float(size) * 16_000), np.float32), 16_000
    return None


def _dtype(name: str, run: RunConfig, stored: torch.dtype) -> torch.dtype:
    """Return what a tensor is kept in: what trains, in float32 (training/start.py:widen)."""
    return torch.float32 if matches(part_of(name), *run.train) else stored


def _state_sizes(optimizer: Optimizer) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for part in optimizer.parts:
        for parameter, moments in part.state.items():
            sizes[optimizer.names[id(parameter)]] += sum(size_of(value) for value in moments.values())
    return sizes


def _parts(
    model: Multimodal, objective: torch.nn.Module, gradients: Mapping[str, int], states: Mapping[str, int]
) -> tuple[Part, ...]:
    own = [*model.named_parameters(), *((f"objective.{name}", value) for name, value in objective.named_parameters())]
    totals: dict[str, list[int]] = defaultdict(lambda: [0] * 5)
    for name, parameter in own:
        part = trained_part(name)
        trained = parameter.numel() if parameter.requires_grad else 0
        stored = parameter.untyped_storage().nbytes()  # of a matrix in few bits, next to nothing
        added = (parameter.numel(), trained, stored, gradients.get(name, 0), states.get(name, 0))
        totals[part] = [a + b for a, b in zip(totals[part], added, strict=True)]
    for name, buffer in model.named_buffers():  # and these bits, among others
        totals[part_of(name)][2] += buffer.untyped_storage().nbytes()
    return tuple(Part(name, *numbers) for name, numbers in totals.items())


def plan_run(run: RunConfig, shapes: Sequence[str] = (), size: str | None = None) -> tuple[Plan, str]:
    """Plan a step of a run, and tell where its rows come from.

    shapes: rows as `shaped_batch` takes them; without them the run's own data, or where these cannot be opened, texts
    as long as their sources' windows, in their shares. size: what stands in for run.init while that is not there, such
    as phi4-multimodal for the stages of a chain. Raises ConfigError, CheckpointError.
    """
    check_settings(run)
    load_modalities(run)
    start = run.init
    try:
        config, dtype = read_size(start)
    except CheckpointError:
        if size is None:
            raise
        start, (config, dtype) = size, read_size(size)
    config = grown(config, run)
    check_apart(run.mixture, run.scored)
    if shapes:
        return plan_step(config, run, _filled(config, run, shapes), dtype), "rows of " + " and ".join(shapes)
    try:
        if start != run.init and start in SIZES:  # without a tokenizer
            raise CheckpointError(f"{start} stands in for {run.init}")
        context = open_context(run.model_copy(update={"init": start}))
        micro, source = _fullest(run, context), "the fullest of a few steps of its data"
        steps = min(run.steps, make_mixture(run, context).lasts() or run.steps)
    except ConfigError:
        raise
    except InputError as error:
        if run.objective != "next_token":  # texts cannot stand in
            raise ConfigError(
                f"objective={run.objective} is planned from its own data, and they were not opened: {error}"
            ) from None
        micro, told = _stand_ins(config, run)
        source = f"{told}, as its data were not opened: {error}"
        steps = run.steps
    else:
        open_held_out(run, context)  # refuses what training would
    return replace(plan_step(config, run, micro, dtype), steps=steps), source


def _fullest(run: RunConfig, context: Context) -> list[Batch]:
    """Return the micro-batches of a step, the one with most in a micro-batch of the first few of each phase."""
    starts = {start for own in run.mixture if isinstance(own.weight, dict) for start in own.weight}
    steps: list[list[Batch]] = []
    for start in sorted({0.0, *starts}):
        phase = [own.model_copy(update={"weight": own.weight_at(start)}) for own in run.mixture if own.weight_at(start)]
        # without any source, the whole mixture is what says so
        mixture = make_mixture(run.model_copy(update={"mixture": phase or run.mixture}), context)
        steps += [micro for _ in range(LOOKED_AT) if (micro := mixture.take())]
    if not steps:
        raise DataError("they hold no row that can be used; `modalora data check` tells why")
    return max(steps, key=lambda micro: max(_numbers(batch) for batch in micro))


def _numbers(batch: Batch) -> int:
    features = (tensor.numel() for item in batch.media for tensor in item.features.values())
    return batch.input_ids.numel() + sum(features)


def _filled(config: ModelConfig, run: RunConfig, shapes: Sequence[str]) -> list[Batch]:
    """Return the micro-batches of a step made of rows of given shapes: as many as run.rows, or as fill run.tokens."""
    if run.objective != "next_token":
        raise ConfigError(
            f"objective={run.objective} learns from what its own sources write beside a sound or picture, and rows of "
            f"{' and '.join(shapes)} have none of that; leave --row out, and the rows are made from data={run.data}"
        )
    rows, routes = run.rows, [source.route or "auto" for source in run.mixture]
    limits = _widest(config, run)
    if run.tokens:
        lengths = shaped_batch(config, shapes, len(shapes), limits).lengths.tolist()
        rows = max(1, round(len(lengths) * run.tokens / sum(lengths)))
    return [shaped_batch(config, shapes, rows, limits, routes)] * run.accumulate


def _widest(config: ModelConfig, run: RunConfig) -> MediaConfig:
    """Return the limits on media of the source that allows most."""
    found: dict[str, Any] = {}
    for kind, key in LIMITS.items():
        if kind in config.modalities:
            settings = limited(kind, modality.find(kind).settings(config.modalities[kind]), run.media)
            holding = [source.media for source in run.mixture if kind in MADE.get(source.source, LIMITS)]
            found[key] = max(getattr(limited(kind, settings, own), key) for own in holding or [run.media])
    return MediaConfig(**found)


def token_shares(run: RunConfig, window: int) -> list[tuple[int, float]]:
    """Return the length of each source's rows and its share of the run's first tokens. window: the model's.

    Rows count as long as their source's window, or where it has none, as long as fill the micro-batch.
    """
    most = min(window, run.tokens or window)
    sizes = [min(source.window or run.tokens or run.window, most) for source in run.mixture]
    weights = [source.weight_at(0) for source in run.mixture]
    if run.weigh == "rows":
        weights = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    return [(size, weight / sum(weights)) for size, weight in zip(sizes, weights, strict=True)]


def _stand_ins(config: ModelConfig, run: RunConfig) -> tuple[list[Batch], str]:
    """Return the micro-batches of a step of texts in place of a run's data, and what they are."""
    shares: dict[int, float] = defaultdict(float)
    for size, share in token_shares(run, config.decoder.rope.window):
        shares[size] += share
    *longer, least = sorted((size for size, share in shares.items() if share), reverse=True)
    if not longer:
        return _filled(config, run, [f"text={least}"]), f"rows of text={least}"
    micro: list[list[int]] = [[] for _ in range(run.accumulate)]
    most, cost = (run.tokens, int) if run.tokens else (run.rows, bool)  # of a micro-batch: tokens, or rows
    whole = sum(share * cost(size) / size for size, share in shares.items())
    for size in longer:
        for _ in range(round(run.accumulate * most * shares[size] / size / whole)):
            room = [own for own in micro if sum(map(cost, own)) + cost(size) <= most]
            if room:
                room[0].append(size)
    for own in micro:
        own += [least] * ((most - sum(map(cost, own))) // cost(least))
    routes = [source.route or "auto" for source in run.mixture]
    told = " and ".join(f"text={size}" for size in (*longer, least))
    shapes = [[f"text={size}" for size in own] for own in micro]
    return [shaped_batch(config, own, len(own), run.media, routes) for own in shapes], f"rows of {told} in their shares"


def read_size(init: str) -> tuple[ModelConfig, torch.dtype]:
    """Return the sizes of a named size or of a model folder, and the dtype of its matrices, without its weights.

    Raises CheckpointError where there is neither.
    """
    if init in SIZES:
        return SIZES[init](), torch.bfloat16 if init.startswith("phi4") else torch.float32  # as published
    try:
        folder = find_model(init)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or name a size to plan with, init={' or init='.join(SIZES)}") from None
    found = describe(folder)
    adapters = {name: LoraConfig(**fields) for name, fields in found["adapters"].items()}
    kind = torch.bfloat16 if "BF16" in found["dtypes"] else torch.float32
    return replace(read_card(folder).config, adapters=adapters), kind
