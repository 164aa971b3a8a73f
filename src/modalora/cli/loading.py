"""Opening a model as its options ask: with adapters and modalities; media given as NAME=FILE."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalora.assistant import Assistant


def load_files(files: Sequence[Path] | None) -> None:
    """Run the Python files of modalities, before a model that may have them is looked at. Raises ConfigError."""
    from modalora.modality import load_file

    for file in files or []:
        load_file(file)


def open_model(
    model: str, adapters: Sequence[str] | None = None, files: Sequence[Path] | None = None, **settings: Any
) -> Assistant:
    """Return a model with adapters, "NAME=FOLDER" each. settings: of modalora.load. Raises ConfigError."""
    import modalora

    assistant = modalora.load(model, modalities=list(files or []), **settings)
    for one in adapters or []:
        name, folder = pair(one, "--adapter", "NAME=FOLDER, such as mine=my-lora")
        assistant.load_adapter(folder, name)
    return assistant


def unused(
    assistant: Assistant, adapters: Sequence[str] | None, route: str, kinds: Collection[str] | None = None
) -> list[str]:
    """Return the names of the adapters, "NAME=FOLDER" each, that no row of these modalities uses by this route.

    One that brought a modality of the rows is used by any route. kinds: None for rows of whatever modalities.
    """
    from modalora import modality
    from modalora.contracts import terms

    config = assistant.model.config
    rules = modality.routes(config).items() if route == "auto" else ()
    used = {rule.adapter for held, rule in rules if kinds is None or held == frozenset(kinds)}
    if route not in ("auto", "none"):
        used |= {name for name, _ in terms(route)}
    read = set(config.encoders if kinds is None else kinds)
    names = [one.partition("=")[0] for one in adapters or []]
    return [name for name in names if name not in used and not read.intersection(modality.brought_by(config, name))]


def check_used(
    assistant: Assistant, adapters: Sequence[str] | None, route: str, kinds: Collection[str] | None = None
) -> None:
    """Refuse media that the model does not read, and adapters that would change nothing. Raises ConfigError."""
    from modalora.errors import ConfigError

    reads = assistant.processor.media
    if foreign := [kind for kind in kinds or () if kind not in (*reads, "image", "audio")]:
        raise ConfigError(
            f"--media {foreign[0]}=... cannot be read: this model reads {', '.join(reads) or 'text'}; name one of "
            f"them, or give the model or the --adapter that brings the encoder of {foreign[0]}"
        )
    if left := unused(assistant, adapters, route, kinds):
        rows = "such rows" if kinds is None else f"rows of {' + '.join(sorted(kinds)) or 'text'}"
        add = "" if unused(assistant, adapters, left[0], kinds) else f"add --route {left[0]}, or "
        raise ConfigError(
            f"--adapter {left[0]}=... would change nothing: --route {route} does not use it for {rows}; {add}leave "
            "the adapter out"
        )


def media_by_name(given: Sequence[str] | None) -> dict[str, list[str]]:
    """Return files by modality, of "NAME=FILE" each. Raises ConfigError."""
    found: dict[str, list[str]] = {}
    for one in given or []:
        name, path = pair(one, "--media", "NAME=FILE, such as dna=gene.fasta")
        found.setdefault(name, []).append(path)
    return found


def pair(text: str, option: str, form: str) -> tuple[str, str]:
    """Return both sides of the first "="."""
    from modalora.errors import ConfigError

    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ConfigError(f"{option} {text!r} must be {form}")
    return name, value


def typed(question: str, *, raw: bool = False) -> str:
    """Return the question, - for standard input's."""
    if question != "-":
        return question
    text = sys.stdin.read()
    return text if raw else text.removesuffix("\n").removesuffix("\r")  # that of echo is no part of a question
