"""What a run starts from: weights, tokenizer, and its data as its model reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from modalora.assistant import make_processor
from modalora.checkpoint.adapters import fingerprint
from modalora.checkpoint.card import read_texts
from modalora.checkpoint.files import weights_digest
from modalora.checkpoint.find import find_model
from modalora.checkpoint.store import load_model
from modalora.config import RunConfig, parse
from modalora.data.files import find_files
from modalora.data.mixture import Mixture
from modalora.data.quarantine import Quarantine
from modalora.data.reader import limit_media
from modalora.data.sources import Context
from modalora.data.text import learnt_tokenizer
from modalora.errors import CheckpointError, ConfigError, DataError
from modalora.modality import add as add_modality
from modalora.modality import load_file
from modalora.models.multimodal import ModelConfig, Multimodal, matches, part_of
from modalora.models.sizes import SIZES
from modalora.nn.lora import LoraConfig
from modalora.nn.rope import read_rope
from modalora.processing.chat import FORMATS, ChatFormat
from modalora.processing.tokenizer import TextTokenizer
from modalora.science import codons
from modalora.training.objectives import OBJECTIVES


def load_modalities(run: RunConfig) -> None:
    """Run the files of a run's own modalities, before a model that may have them is read. Raises ConfigError."""
    for file in run.modality_files:
        load_file(file)


def digest_of_start(run: RunConfig) -> str | None:
    """Return what tells the weights that a run starts from, and takes; None where one of them tells nothing."""
    found = []
    for start in (run.init, *run.take.values()):
        try:
            found.append("" if start in SIZES else weights_digest(find_model(start)))
        except CheckpointError:  # the stage before may have been removed when it was done with
            return None
    return None if None in found else hashlib.sha256("\n".join(map(str, found)).encode()).hexdigest()


def open_start(run: RunConfig) -> tuple[Multimodal, TextTokenizer, ChatFormat]:
    """Return the weights that a run starts from, the same at each call, their tokenizer and chat format."""
    load_modalities(run)
    torch.manual_seed(run.seed)
    if run.init in SIZES:
        model, chat = Multimodal(SIZES[run.init]()), FORMATS["phi4"]
        tokenizer = _fresh_tokenizer(run, model.config.decoder.vocab_size)
    else:
        loaded = load_model(find_model(run.init), as_stored=True)
        model, tokenizer, chat = loaded.model, loaded.tokenizer, loaded.chat
    _grow(model, run)
    _take_parts(model, tokenizer, run.take)
    _copy_parts(model, run.copy_parts)
    return model, tokenizer, chat


def open_context(run: RunConfig) -> Context:
    """Return what the sources of a run are made from, without loading a weight.

    Raises CheckpointError, ConfigError, DataError.
    """
    load_modalities(run)
    if run.init in SIZES:
        config, chat = SIZES[run.init](), FORMATS["phi4"]
        tokenizer = _fresh_tokenizer(run, config.decoder.vocab_size)
    else:
        card, tokenizer, chat = read_texts(find_model(run.init))
        config = card.config
    return context_of(run, grown(config, run), tokenizer, chat)


def grown(config: ModelConfig, run: RunConfig) -> ModelConfig:
    """Return the sizes that a model has once a run set its rope and added its modalities and adapters."""
    if not run.modalities and not run.adapters and run.rope is None:
        return config
    with torch.device("meta"):
        model = Multimodal(config)
        _grow(model, run)
    return model.config


def context_of(run: RunConfig, config: ModelConfig, tokenizer: TextTokenizer, chat: ChatFormat) -> Context:
    """Return what the sources of a run are made from, for a model of these sizes. Raises ConfigError."""
    processor = limit_media(make_processor(config, tokenizer, chat), run.media)
    return Context(
        folder=Path(run.data),
        cache=Path(run.cache),
        processor=processor,
        window=run.window,
        most=run.tokens,
        labelled=run.objective == "next_token",
        suits=OBJECTIVES[run.objective].check,
    )


def changed_data(run: RunConfig, since: Path) -> str:
    """Return the data files of a run that are newer than another file, for a message; "" where none is."""
    found: list[str] = []
    for path in [source.options.get("path", []) for source in run.mixture]:
        with suppress(DataError, TypeError):  # what is no file is told where files are opened
            found += [str(file) for file in find_files(path) if file.stat().st_mtime > since.stat().st_mtime]
    return ", ".join(dict.fromkeys(found))


def _grow(model: Multimodal, run: RunConfig) -> None:
    """Set the rope, and add the modalities and adapters that a run adds."""
    if run.rope is not None:
        model.set_rope(read_rope(run.rope, "recipe"))
    for name, sizes in run.modalities.items():
        add_modality(model, name, sizes)
    for name, size in run.adapters.items():
        model.add_adapter(name, parse(LoraConfig, size, f"adapter {name!r}"))


def _fresh_tokenizer(run: RunConfig, vocab_size: int) -> TextTokenizer:
    if vocab_size == codons.VOCAB_SIZE:  # BPE needs more for its letters alone
        return TextTokenizer(codons.definition())
    try:
        return learnt_tokenizer(Path(run.data), vocab_size, Path(run.cache))
    except DataError as error:
        raise DataError(f"init={run.init} has no tokenizer, and learns one from books: {error}") from None


def _take_parts(model: Multimodal, tokenizer: TextTokenizer, take: dict[str, str]) -> None:
    """Copy the parts that match a pattern from other model folders."""
    tensors, decoder_too = model.state_dict(), matches("decoder", *take)
    for pattern, folder in take.items():
        loaded = load_model(find_model(folder), as_stored=True)
        other, given = loaded.model, loaded.model.state_dict()
        chosen = [name for name in given if matches(part_of(name), pattern)]
        if not chosen:
            raise CheckpointError(f"take: {folder} has no part that matches {pattern!r}")
        if matches("decoder", pattern) and loaded.tokenizer.definition != tokenizer.definition:
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


def _check_base(model: Multimodal, other: Multimodal, pattern: str, folder: str) -> None:
    """Refuse an adapter that was trained on another decoder: on this one it means nothing."""
    own, told = fingerprint(model), fingerprint(other)
    if own != told:
        raise CheckpointError(
            f"take: {pattern!r} of {folder} was trained on another base model: its decoder has the fingerprint {told}, "
            f"this one {own}; start from the decoder that it was trained on, or take that too"
        )


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


def widen(model: Multimodal, patterns: Sequence[str]) -> None:
    """Keep in float32 what trains: of bf16's eight bits, a step of the learning rate's size would be rounded away."""
    for name, parameter in model.named_parameters():
        if matches(part_of(name), *patterns):
            parameter.data = parameter.data.float()


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


def open_quarantine(run: RunConfig, name: str, rank: int) -> Quarantine:
    """Return the file of a process's bad rows; the first has the plain name."""
    own = f"{name}.jsonl" if rank == 0 else f"{name}-{rank:05d}.jsonl"
    return Quarantine(Path(run.output) / own, run.quarantine_most)
