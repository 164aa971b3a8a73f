"""A recipe from start to end: weights, tokenizer, data, training, and the folder that comes out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modalora.assistant import check_device
from modalora.checkpoint.adapters import save_adapter
from modalora.checkpoint.card import read_card
from modalora.checkpoint.find import BUNDLED, find_model
from modalora.checkpoint.preserve import CERTIFICATE, preservation
from modalora.checkpoint.write import check_target, rounded_by_int8, save_model
from modalora.config import RunConfig, load_run
from modalora.errors import ConfigError
from modalora.models.multimodal import Multimodal, matches, part_of, recompute
from modalora.models.sizes import SIZES
from modalora.parallel.engine import Engine
from modalora.parallel.launch import engine_for
from modalora.parallel.ranks import joined
from modalora.processing.chat import ChatFormat
from modalora.processing.tokenizer import TextTokenizer
from modalora.quantize import quantize, restore
from modalora.training.fresh import count_said, set_mel_statistics, whiten_projectors
from modalora.training.held_out import open_held_out
from modalora.training.loop import Metrics, train
from modalora.training.report import plot_metrics
from modalora.training.start import (
    changed_data,
    context_of,
    digest_of_start,
    load_modalities,
    make_mixture,
    open_quarantine,
    open_start,
    widen,
)
from modalora.training.states import FREE


def run_recipe(
    run: RunConfig,
    report: Callable[[Metrics], None] = lambda metrics: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Carry out a run and return the model folder that it wrote, run.output/model.

    Where the decoder was frozen, its certificate lies in the folder, and each adapter that trained stands with one
    beside it as a PEFT folder, run.output/NAME-lora. Tokenizer and generation files of run.init go along. A finished
    run is returned as it is. Raises ConfigError when it was one of other settings, CheckpointError when run.output
    lies within run.init.
    """
    load_modalities(run)
    target = Path(run.output) / "model"
    if target.exists():
        _check_finished(run, target)
        if changed := changed_data(run, target / "config.json"):
            say(f"{changed:.200} has changed since; remove {target.parent} to train on it anew")
        return target
    check_target(target, _folder_of(run))
    check_device(run.device)
    with joined():
        engine = engine_for(run)
        _carry_out(run, engine, target, report, say)
        engine.barrier()
    return target


def _carry_out(
    run: RunConfig, engine: Engine, target: Path, report: Callable[[Metrics], None], say: Callable[[str], None]
) -> None:
    if engine.rank:  # one process speaks
        report, say = lambda metrics: None, lambda line: None
    parts = (*run.train, *run.take)
    if run.init in SIZES and run.objective == "next_token" and not matches("decoder", *parts):
        trained = f", and the trained one is bundled/{run.init}" if (BUNDLED / run.init).is_dir() else ""
        say(
            f"init={run.init} names a size, so the decoder is random, and frozen; a folder has trained weights{trained}"
        )
    start = digest_of_start(run)  # before it may be trained anew beside this run
    model, tokenizer, chat = open_start(run)
    context = context_of(run, model.config, tokenizer, chat)
    held_out = open_held_out(run, context, engine.share)
    widen(model, run.train)
    if matches("audio.encoder", *run.train):
        set_mel_statistics(model, make_mixture(run, context))
    said = count_said(make_mixture(run, context), model.config.decoder.vocab_size) if run.objective == "ctc" else None
    device = run.device if engine.world == 1 else "cpu"  # an engine of many processes moves what a process keeps
    for modality in run.whiten:
        whiten_projectors(model, modality, run.train, make_mixture(run, context), device)
    if run.recompute:
        recompute(model, offload=run.recompute == "offload")
    if run.base_bits is not None:
        quantize(model, run.base_bits)
    model = model.to(device)
    quarantine = open_quarantine(run, "quarantine", engine.rank)
    batches = make_mixture(run, context, engine.share, workers=run.workers, quarantine=quarantine)
    try:
        metrics = train(run, model, batches, report, engine=engine, say=say, said=said, held_out=held_out)
    finally:
        batches.close()
    if quarantine.count:
        say(f"draws of bad rows that were left out: {quarantine.count:,}, see {quarantine.path}")
    notes = {"trained": run.model_dump(mode="json"), "start": start, "last": metrics}
    if run.base_bits is not None:  # what was trained belongs to the plain weights
        restore(model.cpu(), open_start(run)[0])
    if whole := engine.whole():
        _write(run, whole, tokenizer, chat, target, notes, say)
        if not plot_metrics(target.parent / "metrics.jsonl", target.parent / "loss.png"):
            say(
                "no picture of the curves, which stand in metrics.jsonl: pip install -e '.[train]' in your clone "
                "draws it"
            )


def _folder_of(run: RunConfig) -> Path | None:
    """Return the model folder that a run starts from; None for fresh weights. Raises CheckpointError."""
    return None if run.init in SIZES else find_model(run.init)


def _check_finished(run: RunConfig, target: Path) -> None:
    if not (target.parent / "run.yaml").exists():
        raise ConfigError(
            f"{target} has no run.yaml beside it, so what made it is not known; give another output, or remove it"
        )
    before, now = load_run(target.parent / "run.yaml"), run
    changed = sorted(key for key in RunConfig.model_fields if getattr(before, key) != getattr(now, key))
    changed = [key for key in changed if key not in FREE or key == "steps"]
    if changed:
        raise ConfigError(
            f"{target} is the finished model of a run with other settings ({', '.join(changed)}); give another output, "
            f"or remove {target} to train on"
        )

    start, told = digest_of_start(run), read_card(target).notes.get("start")
    if None not in (start, told) and start != told:
        raise ConfigError(
            f"{target} was trained from {' and '.join((run.init, *run.take.values()))} as it was, and that has other "
            f"weights now; remove {target.parent} to train it anew, or give another output"
        )


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
    start = _folder_of(run)
    published = start is not None and read_card(start).layout != "modalora"
    same = published and run.rope is None and not matches("decoder", *run.take)
    for part in sorted(parts):
        kind, _, name = part.partition(".")
        if kind == "adapter" and certificate:
            folder = target.parent / f"{name}-lora"
            if (folder / CERTIFICATE).exists():  # of a model that was removed to train on
                shutil.rmtree(folder)
            if folder.exists():
                say(f"{folder} is none that training wrote, and stays; the adapter is in {target} alone")
            else:
                save_adapter(model, name, folder, certificate, base=start if same else None)
    save_model(model, tokenizer, target, int8=run.int8, chat=chat, notes=notes, beside=start, certificate=certificate)
