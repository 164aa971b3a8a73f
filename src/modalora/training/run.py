"""A recipe from start to end: weights, tokenizer, data, training, and the folder that comes out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalora.assistant import BUNDLED, check_device, find_model, make_processor
from modalora.checkpoint.adapters import fingerprint, save_adapter
from modalora.checkpoint.files import weights_digest
from modalora.checkpoint.preserve import CERTIFICATE, preservation
from modalora.checkpoint.store import load_model, read_card, read_texts, rounded_by_int8, save_model
from modalora.config import MediaConfig, RunConfig, load_run, parse
from modalora.contracts import IGNORED, Batches
from modalora.data.mixture import Mixture
from modalora.data.quarantine import Quarantine
from modalora.data.sources import Context
from modalora.data.text import learnt_tokenizer
from modalora.errors import CheckpointError, ConfigError, DataError
from modalora.modality import add as add_modality
from modalora.modality import load_file
from modalora.models.multimodal import ModelConfig, Multimodal, part_of
from modalora.models.recompute import recompute
from modalora.models.sizes import SIZES
from modalora.models.speech import SpeechEncoder
from modalora.nn.lora import LoraConfig
from modalora.nn.mlp import Projector
from modalora.nn.rope import read_rope
from modalora.parallel.engine import Engine
from modalora.parallel.launch import engine_for
from modalora.parallel.ranks import explained, has_joined, leave
from modalora.processing.chat import FORMATS, ChatFormat
from modalora.processing.processor import Processor
from modalora.processing.tokenizer import TextTokenizer
from modalora.quantize import quantize, restore
from modalora.science import codons
from modalora.training.loop import Metrics, train
from modalora.training.report import plot_metrics
from modalora.training.states import FREE


def run_recipe(
    run: RunConfig,
    report: Callable[[Metrics], None] = lambda metrics: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Carry out a run and return the model folder that it wrote, run.output/model.

    Where the decoder was frozen, its certificate lies in the folder, and each adapter that trained stands with one
    beside it as a PEFT folder, run.output/NAME-lora. A finished run is returned as it is. Raises ConfigError when it
    was one of other settings.
    """
    check_device(run.device)
    target = Path(run.output) / "model"
    if target.exists():
        _check_finished(run, target)
        return target
    joined_before = has_joined()
    engine = engine_for(run)
    try:
        with explained():
            _carry_out(run, engine, target, report, say)
            engine.barrier()
    finally:
        if not joined_before:
            leave()
    return target


def _carry_out(
    run: RunConfig, engine: Engine, target: Path, report: Callable[[Metrics], None], say: Callable[[str], None]
) -> None:
    if engine.rank:  # one process speaks
        report, say = lambda metrics: None, lambda line: None
    parts = (*run.train, *run.take)
    if run.init in SIZES and run.objective == "next_token" and not any(fnmatchcase("decoder", own) for own in parts):
        trained = f", and the trained one is bundled/{run.init}" if (BUNDLED / run.init).is_dir() else ""
        say(
            f"init={run.init} names a size, so the decoder is random, and frozen; a folder has trained weights{trained}"
        )
    start = _start(run)
    model, tokenizer, chat = open_start(run)
    context = _context(run, model.config, tokenizer, chat)
    _widen(model, run.train)
    if any(fnmatchcase("audio.encoder", own) for own in run.train):
        _set_mel_statistics(model, make_mixture(run, context))
    said = _said(make_mixture(run, context), model.config.decoder.vocab_size) if run.objective == "ctc" else None
    for modality in run.whiten:
        _whiten_projectors(model, modality, run.train, make_mixture(run, context))
    if run.recompute:
        recompute(model, offload=run.recompute == "offload")
    if run.base_bits is not None:
        quantize(model, run.base_bits)
    # an engine of many processes moves what a process keeps
    model = model.to(run.device) if engine.world == 1 else model
    own = "quarantine.jsonl" if engine.rank == 0 else f"quarantine-{engine.rank:05d}.jsonl"
    quarantine = Quarantine(Path(run.output) / own, run.quarantine_most)
    batches = make_mixture(run, context, engine.share, workers=run.workers, quarantine=quarantine)
    try:
        metrics = train(run, model, batches, report, engine=engine, say=say, said=said)
    finally:
        batches.close()
    notes = {"trained": run.model_dump(mode="json"), "start": start, "last": metrics}
    if run.base_bits is not None:  # what was trained belongs to the plain weights
        restore(model.cpu(), open_start(run)[0])
    if whole := engine.whole():
        plot_metrics(target.parent / "metrics.jsonl", target.parent / "loss.png")
        _write(run, whole, tokenizer, chat, target, notes, say)


def open_context(run: RunConfig) -> Context:
    """Return what the sources of a run are made from, without loading a weight.

    Raises CheckpointError, ConfigError, DataError.
    """
    if run.init in SIZES:
        config, chat = SIZES[run.init](), FORMATS["phi4"]
        tokenizer = _fresh_tokenizer(run, config.decoder.vocab_size)
    else:
        card, tokenizer, chat = read_texts(find_model(run.init))
        config = card.config
    return _context(run, grown(config, run), tokenizer, chat)


def grown(config: ModelConfig, run: RunConfig) -> ModelConfig:
    """Return the sizes that a model has once a run set its rope and added its modalities and adapters."""
    if not run.modalities and not run.adapters and run.rope is None:
        return config
    with torch.device("meta"):
        model = Multimodal(config)
        _grow(model, run)
    return model.config


def _context(run: RunConfig, config: ModelConfig, tokenizer: TextTokenizer, chat: ChatFormat) -> Context:
    processor = make_processor(config, tokenizer, chat)
    if run.window > processor.window and "window" in run.model_fields_set:
        raise ConfigError(
            f"window={run.window}: the model reads at most {processor.window} tokens; lower it, or give the run a rope "
            "with a longer window"
        )
    _limit_media(processor, run.media)
    return Context(
        folder=Path(run.data), cache=Path(run.cache), processor=processor, window=min(run.window, processor.window),
        most=run.tokens,
    )  # fmt: skip


def _grow(model: Multimodal, run: RunConfig) -> None:
    """Set the rope, and add the modalities and adapters that a run adds."""
    if run.rope is not None:
        model.set_rope(read_rope(run.rope, "recipe"))
    for file in run.modality_files:
        load_file(file)
    for name, sizes in run.modalities.items():
        add_modality(model, name, sizes)
    for name, size in run.adapters.items():
        model.add_adapter(name, parse(LoraConfig, size, f"adapter {name!r}"))


def make_mixture(
    run: RunConfig,
    context: Context,
    share: tuple[int, int] = (0, 1),
    *,
    workers: int = 0,
    quarantine: Quarantine | None = None,
) -> Mixture:
    """Return the data of a run, from its first step on. share: which share of them, of how many."""
    rank, world = share
    return Mixture(
        context, run.mixture, rows=run.rows, tokens=run.tokens, accumulate=run.accumulate, seed=run.seed,
        steps=run.steps, weigh=run.weigh, rank=rank, world=world, workers=workers,
        quarantine=quarantine or Quarantine(None, run.quarantine_most),
    )  # fmt: skip


def _check_finished(run: RunConfig, target: Path) -> None:
    before, now = load_run(target.parent / "run.yaml"), run
    changed = sorted(key for key in RunConfig.model_fields if getattr(before, key) != getattr(now, key))
    changed = [key for key in changed if key not in FREE or key == "steps"]
    if changed:
        raise ConfigError(
            f"{target} is the finished model of a run with other settings ({', '.join(changed)}); give another output, "
            f"or remove {target} to train on"
        )

    start, told = _start(run), read_card(target).notes.get("start")
    if None not in (start, told) and start != told:
        raise ConfigError(
            f"{target} was trained from {run.init} as it was, and that has other weights now; remove {target.parent} "
            "to train it anew, or give another output"
        )


def _start(run: RunConfig) -> str | None:
    """Return what tells the weights that a run starts from; None where nothing does."""
    try:
        return None if run.init in SIZES else weights_digest(find_model(run.init))
    except CheckpointError:  # the stage before may have been removed when it was done with
        return None


def _write(
    run: RunConfig,
    model: Multimodal,
    tokenizer: TextTokenizer,
    chat: ChatFormat,
    target: Path,
    notes: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Write the model, its adapters that trained, and the certificate of what did not train."""
    parts = {part_of(name) for name, own in model.named_parameters() if own.requires_grad}
    trained = {name for name, own in model.named_parameters() if own.requires_grad}
    certificate = preservation(model, trained) if "decoder" not in parts else None
    if certificate and run.int8 and (rounded := rounded_by_int8(model, certificate.frozen)):
        say(f"int8=true rounds what was frozen, first {rounded}: the model is written without a certificate")
        certificate = None
    for part in sorted(parts):
        kind, _, name = part.partition(".")
        if kind == "adapter" and certificate:
            folder = target.parent / f"{name}-lora"
            if (folder / CERTIFICATE).exists():  # of a model that was removed to train on
                shutil.rmtree(folder)
            if folder.exists():
                say(f"{folder} is none that training wrote, and stays; the adapter is in {target} alone")
            else:
                save_adapter(model, name, folder, certificate)
    save_model(model, tokenizer, target, int8=run.int8, chat=chat, notes=notes, certificate=certificate)


def open_start(run: RunConfig) -> tuple[Multimodal, TextTokenizer, ChatFormat]:
    """Return the weights that a run starts from, the same at each call, their tokenizer and chat format."""
    torch.manual_seed(run.seed)
    if run.init in SIZES:
        model, chat = Multimodal(SIZES[run.init]()), FORMATS["phi4"]
        tokenizer = _fresh_tokenizer(run, model.config.decoder.vocab_size)
    else:
        loaded = load_model(find_model(run.init))
        model, tokenizer, chat = loaded.model, loaded.tokenizer, loaded.chat
    _grow(model, run)
    _take_parts(model, tokenizer, run.take)
    _copy_parts(model, run.copy_parts)
    return model, tokenizer, chat


def _fresh_tokenizer(run: RunConfig, vocab_size: int) -> TextTokenizer:
    if vocab_size == codons.VOCAB_SIZE:  # BPE needs more for its letters alone
        return TextTokenizer(codons.definition())
    try:
        return learnt_tokenizer(Path(run.data), vocab_size, Path(run.cache))
    except DataError as error:
        raise DataError(f"init={run.init} has no tokenizer, and learns one from books: {error}") from None


def _take_parts(model: Multimodal, tokenizer: TextTokenizer, take: dict[str, str]) -> None:
    """Copy the parts that match a pattern from other model folders."""
    tensors, decoder_too = model.state_dict(), any(fnmatchcase("decoder", own) for own in take)
    for pattern, folder in take.items():
        loaded = load_model(find_model(folder))
        other, given = loaded.model, loaded.model.state_dict()
        chosen = [name for name in given if fnmatchcase(part_of(name), pattern)]
        if not chosen:
            raise CheckpointError(f"take: {folder} has no part that matches {pattern!r}")
        if fnmatchcase("decoder", pattern) and loaded.tokenizer.definition != tokenizer.definition:
            raise CheckpointError(
                f"take: the decoder of {folder} was trained on other tokens than those of `init`; "
                f"give init={folder}, or another with its tokenizer"
            )
        if any(part_of(name).startswith("adapter.") for name in chosen) and not decoder_too:
            _check_base(model, other, pattern, folder)
        for name in chosen:
            if name not in tensors or tensors[name].shape != given[name].shape:
                raise CheckpointError(f"take: {name} of {folder} does not fit this model; both must be of one size")
            with torch.no_grad():
                tensors[name].copy_(given[name])


def _copy_parts(model: Multimodal, copies: dict[str, str]) -> None:
    """Let parts start as other parts of the same model."""
    tensors = model.state_dict()
    for part, source in copies.items():
        own = {name: tensor for name, tensor in tensors.items() if part_of(name) == part}
        given = [tensor for name, tensor in tensors.items() if part_of(name) == source]
        if not own or [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in given]:
            parts = ", ".join(sorted({part_of(name) for name in tensors}))
            raise ConfigError(
                f"copy_parts: {part!r} cannot start as {source!r}; both must be parts of this model ({parts}), and of "
                "one shape"
            )
        for tensor, start in zip(own.values(), given, strict=True):
            tensor.copy_(start)


def _widen(model: Multimodal, patterns: Sequence[str]) -> None:
    """Keep in float32 what trains: of bf16's eight bits, a step of the learning rate's size would be rounded away."""
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(part_of(name), pattern) for pattern in patterns):
            parameter.data = parameter.data.float()


def _limit_media(processor: Processor, limits: MediaConfig) -> None:
    """Let training media be smaller than those that the model may read."""
    for modality, medium in processor.media.items():
        processor.media[modality] = replace(medium, settings=limited(modality, medium.settings, limits))
    for modality in LIMITS:
        if modality not in processor.media and (told := _limits(modality, limits)):
            raise ConfigError(f"media: {told} is for a model that takes {modality}; leave it out")


LIMITS = {"image": "max_crops", "audio": "max_seconds"}


def _limits(modality: str, limits: MediaConfig) -> dict[str, Any]:
    key = LIMITS.get(modality, "")
    value = getattr(limits, key, None)
    return {} if value is None else {key: value}


def limited(modality: str, settings: Any, limits: MediaConfig) -> Any:
    """Return how a medium is read within the limits of a run."""
    own = _limits(modality, limits)
    return replace(settings, **own) if own else settings


def _check_base(model: Multimodal, other: Multimodal, pattern: str, folder: str) -> None:
    """Refuse an adapter that was trained on another decoder: on this one it means nothing."""
    own, told = fingerprint(model), fingerprint(other)
    if own != told:
        raise CheckpointError(
            f"take: {pattern!r} of {folder} was trained on another base model: its decoder has the fingerprint {told}, "
            f"this one {own}; start from the decoder that it was trained on, or take that too"
        )


def _set_mel_statistics(model: Multimodal, batches: Batches, steps: int = 20) -> None:
    """Give a fresh sound encoder the mean and inverse deviation of each mel channel, from the first batches with
    sound."""
    if "audio" not in model.encoders:
        return
    encoder = model.encoders["audio"]
    assert isinstance(encoder, SpeechEncoder)
    if not torch.equal(encoder.global_mean, torch.zeros_like(encoder.global_mean)):
        return
    media = [item for _ in range(steps) for batch in batches.take() for item in batch.media if item.modality == "audio"]
    if media:
        mel = torch.cat([item.features["mel"] for item in media])
        encoder.global_mean.copy_(mel.mean(0))
        encoder.global_invstd.copy_(1 / mel.std(0).clamp(min=1.0))


def _said(batches: Batches, vocab_size: int, steps: int = 20) -> Tensor:
    """Return how often the answers of the first batches hold each token, (vocab,)."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    labels = [batch.labels for _ in range(steps) for batch in batches.take() if batch.labels is not None]
    for row in (row for own in labels for row in own):
        counts += torch.bincount(row[row != IGNORED][:-1], minlength=vocab_size)  # without the end tag
    return counts


@torch.no_grad()
def _whiten_projectors(
    model: Multimodal, modality: str, patterns: Sequence[str], batches: Batches, steps: int = 8
) -> None:
    """Let the trained projectors of a modality start on features of mean 0 and deviation 1, at the scale of embeddings.

    An encoder's features share a large mean, which leaves all media tokens nearly parallel: the decoder then sees
    their average only. The statistics go into the first layer, so the projector stays what it was.
    """
    if modality not in model.encoders:
        raise ConfigError(f"whiten: this model has no {modality!r} encoder; it has {', '.join(model.encoders)}")
    media = [
        item for _ in range(steps) for batch in batches.take() for item in batch.media if item.modality == modality
    ]
    chosen = [
        projector
        for branch, projector in model.projectors.get_submodule(modality).named_children()
        if any(fnmatchcase(f"{modality}.projector.{branch}", pattern) for pattern in patterns)
    ]
    if not chosen or not media:
        raise ConfigError(
            f"whiten: {modality!r} needs a projector that trains, and rows with {modality}; "
            + ("train: names none of its projectors" if not chosen else f"the first {steps} steps have none")
            + ", so add it there, or leave it out of whiten:"
        )
    features = torch.cat(model.encoders[modality]([dict(item.features) for item in media]))
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-3)
    for projector in chosen:
        assert isinstance(projector, Projector)
        projector.up.weight.div_(deviation)
        projector.up.bias.copy_(-projector.up.weight @ mean)
        given = projector(features)
        size = model.decoder.embed_tokens.weight.square().mean().sqrt()
        projector.down.weight.mul_(4 * size / given.std())
        projector.down.bias.sub_(projector(features).mean(0))
