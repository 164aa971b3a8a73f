"""A recipe from start to end: weights, tokenizer, data, training, and the folder that comes out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from modalora.assistant import find_model, make_processor
from modalora.checkpoint.adapters import fingerprint, save_adapter
from modalora.checkpoint.preserve import preservation
from modalora.checkpoint.store import load_model, rounded_by_int8, save_model
from modalora.config import RunConfig, load_run
from modalora.contracts import Batches
from modalora.data.mixture import Context, Mixture
from modalora.data.text import tokenizer_corpus
from modalora.errors import CheckpointError, ConfigError
from modalora.models.multimodal import Multimodal, part_of
from modalora.models.recompute import recompute
from modalora.models.sizes import SIZES
from modalora.models.speech import SpeechEncoder
from modalora.nn.mlp import Projector
from modalora.parallel.engine import Engine
from modalora.parallel.launch import engine_for
from modalora.parallel.ranks import explained, has_joined, leave
from modalora.processing.tokenizer import TextTokenizer
from modalora.quantize import quantize, restore
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
    model, tokenizer = _start(run)
    processor = make_processor(model.config, tokenizer)
    context = Context(folder=Path(run.data), cache=Path(run.cache), processor=processor, window=run.window)

    def batches(rank: int = 0, world: int = 1) -> Mixture:
        return Mixture(
            context, run.mixture, rows=run.rows, accumulate=run.accumulate, seed=run.seed, rank=rank, world=world
        )

    if "audio.encoder" in run.train:
        _set_mel_statistics(model, batches())
    for modality in run.whiten:
        _whiten_projectors(model, modality, run.train, batches())
    if run.recompute:
        recompute(model)
    if run.base_bits is not None:
        quantize(model, run.base_bits)
    # an engine of many processes moves what a process keeps
    model = model.to(run.device) if engine.world == 1 else model
    metrics = train(run, model, batches(*engine.share), report, engine=engine, say=say)
    notes = {"trained": run.model_dump(mode="json"), "last": metrics}
    if run.base_bits is not None:  # what was trained belongs to the plain weights
        restore(model.cpu(), _start(run)[0])
    if whole := engine.whole():
        plot_metrics(target.parent / "metrics.jsonl", target.parent / "loss.png")
        _write(run, whole, tokenizer, target, notes, say)


def _check_finished(run: RunConfig, target: Path) -> None:
    before, now = load_run(target.parent / "run.yaml"), run
    changed = sorted(key for key in RunConfig.model_fields if getattr(before, key) != getattr(now, key))
    changed = [key for key in changed if key not in FREE or key == "steps"]
    if changed:
        raise ConfigError(
            f"{target} is the finished model of a run with other settings ({', '.join(changed)}); give another output, "
            f"or remove {target} to train on"
        )


def _write(
    run: RunConfig,
    model: Multimodal,
    tokenizer: TextTokenizer,
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
        if kind == "adapter" and certificate and not (folder := target.parent / f"{name}-lora").exists():
            save_adapter(model, name, folder, certificate)
    save_model(model, tokenizer, target, int8=run.int8, notes=notes, certificate=certificate)


def _start(run: RunConfig) -> tuple[Multimodal, TextTokenizer]:
    """Return the weights that a run starts from, the same at each call, and their tokenizer."""
    torch.manual_seed(run.seed)
    if run.init in SIZES:
        model = Multimodal(SIZES[run.init]())
        tokenizer = _fresh_tokenizer(Path(run.data), Path(run.cache), model.config.decoder.vocab_size)
    else:
        loaded = load_model(find_model(run.init))
        model, tokenizer = loaded.model, loaded.tokenizer
    _take_parts(model, run.take)
    return model, tokenizer


def _fresh_tokenizer(data: Path, cache: Path, vocab_size: int) -> TextTokenizer:
    path = cache / f"bpe-{vocab_size}.json"
    if not path.exists():
        tokenizer = TextTokenizer.train(tokenizer_corpus(data), vocab_size)
        cache.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.draft")
        draft.write_text(tokenizer.definition, encoding="utf-8")
        draft.replace(path)
    return TextTokenizer(path.read_text(encoding="utf-8"))


def _take_parts(model: Multimodal, take: dict[str, str]) -> None:
    """Copy the parts that match a pattern from other model folders."""
    tensors = model.state_dict()
    for pattern, folder in take.items():
        other = load_model(find_model(folder)).model
        given = other.state_dict()
        chosen = [name for name in given if fnmatchcase(part_of(name), pattern)]
        if not chosen:
            raise CheckpointError(f"take: {folder} has no part that matches {pattern!r}")
        if any(part_of(name).startswith("adapter.") for name in chosen) and "decoder" not in take:
            _check_base(model, other, pattern, folder)
        for name in chosen:
            if name not in tensors or tensors[name].shape != given[name].shape:
                raise CheckpointError(f"take: {name} of {folder} does not fit this model; both must be of one size")
            with torch.no_grad():
                tensors[name].copy_(given[name])


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
    features = torch.cat(model.encoders[modality]([dict(item.features) for item in media]))
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-3)
    for branch, projector in model.projectors.get_submodule(modality).named_children():
        if not any(fnmatchcase(f"{modality}.projector.{branch}", pattern) for pattern in patterns):
            continue
        assert isinstance(projector, Projector)
        projector.up.weight.div_(deviation)
        projector.up.bias.copy_(-projector.up.weight @ mean)
        given = projector(features)
        size = model.decoder.embed_tokens.weight.square().mean().sqrt()
        projector.down.weight.mul_(4 * size / given.std())
        projector.down.bias.sub_(projector(features).mean(0))
