"""One row per modality: all that modalora must know to read, encode, route, train and store one kind of media.

Pictures and sound are two such rows; a package brings another through the entry point group `modalora.modalities`, and
a single Python file is read when it is named (`load_file`). A package is imported only when a model's config, a recipe
or a user names its modality. docs/modality.md shows how to write one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modalora.config import parse
from modalora.contracts import Rule
from modalora.errors import ConfigError
from modalora.models.multimodal import EncoderConfig, ModelConfig, Multimodal
from modalora.models.router import ROUTES
from modalora.models.speech import SpeechConfig
from modalora.models.vision import VisionConfig
from modalora.nn.lora import LoraConfig
from modalora.processing.audio import AudioConfig, count_audio_tokens, read_audio
from modalora.processing.image import ImageConfig, count_image_tokens, read_image
from modalora.processing.processor import Medium
from modalora.processing.tokenizer import PLACEHOLDERS, TextTokenizer

GROUP = "modalora.modalities"
SPARE = "<|endofprompt|>"  # a control token of Phi's vocabularies that no chat format writes
_TAKEN = (
    "text", "control", "image_url", "input_audio",  # kinds of pieces and parts
    "vision", "speech", "auto", "none", "adapter", "decoder", "objective",  # routes and parts of a model
    "drop", "route", "system", "retry", "reset", "save", "help", "exit",  # commands of chat
    "yes", "no", "on", "off", "y", "n", "true", "false", "null",  # what YAML reads as something else
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One kind of media.

    name: the type of its content parts, {"type": name, name: payload}.
    config: the dataclass of its sizes, which names the projectors and builds the encoder (models/multimodal.py:
    EncoderConfig).
    features: (payload, settings) -> named tensors for the encoder, and the number of tokens that they become.
    count: (payload, settings) -> the number of tokens, where it can be told without the features.
    settings: what `features` takes, made from the sizes; unless told otherwise the sizes themselves.
    adapter: size of its LoRA adapter. routes: what rows use, by all the modalities that they hold; unless told
    otherwise {name}: the adapter `name` and the first projector.
    placeholder: the control token that fills its spans. No text becomes one, and its embedding is never read.
    sources: training data; a recipe calls "NAME.SOURCE", a function (context, **options) -> draw(rng) -> Row, as those
    of data/sources.py. package: what brought it; filled in when it is found.
    """

    name: str
    config: type[Any]
    features: Callable[[Any, Any], tuple[dict[str, Tensor], int]]
    adapter: LoraConfig
    settings: Callable[[Any], Any] = lambda sizes: sizes
    count: Callable[[Any, Any], int] | None = None
    routes: Mapping[frozenset[str], Rule] = field(default_factory=dict)
    placeholder: str = SPARE
    sources: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    package: str = "modalora"

    def __post_init__(self) -> None:
        """Check every rule."""
        check_name(self.name)
        lacks = [name for name in ("encoder", "smallest", "branches", "hidden_size") if name not in _names(self.config)]
        if lacks:
            raise ConfigError(
                f"modality {self.name!r}: config={self.config!r:.60} must be a dataclass of sizes with branches, "
                f"hidden_size, encoder() and smallest(); it has no {', '.join(lacks)}"
            )
        branches = self.config.branches
        if not isinstance(branches, tuple) or not branches:
            raise ConfigError(
                f"modality {self.name!r}: branches={branches!r:.60} must name at least one projector, as a ClassVar of "
                'the config: branches: ClassVar[tuple[str, ...]] = ("NAME",)'
            )
        own = {kinds: rule for kinds, rule in self.routes.items() if self.name in kinds}
        wrong = [rule for rule in own.values() if rule.branches.get(self.name) not in branches]
        if self.routes and (frozenset({self.name}) not in own or wrong):
            raise ConfigError(
                f"modality {self.name!r}: routes must have a rule for {{{self.name!r}}} alone, and every rule with it "
                f"must give it one of its projectors ({', '.join(branches)})"
            )
        if not self.routes:
            rule = Rule(adapter=self.name, branches={self.name: branches[0]})
            object.__setattr__(self, "routes", {frozenset({self.name}): rule})


def check_name(name: str) -> None:
    """Refuse what cannot name a modality. Raises ConfigError."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) or name in _TAKEN or name in dir(nn.ModuleDict):
        raise ConfigError(
            f"{name!r:.100} cannot name a modality; use small letters, digits and _, such as 'time_series', and no "
            f"word that is taken ({', '.join(_TAKEN)}, or a method of torch's modules)"
        )


def _names(kind: Any) -> set[str]:
    return {*dir(kind), *kind.__dataclass_fields__} if is_dataclass(kind) and isinstance(kind, type) else set()


IMAGE = Modality(
    name="image",
    config=VisionConfig,
    settings=lambda sizes: ImageConfig(crop=sizes.crop, patch=sizes.patch, max_crops=sizes.max_crops),
    features=read_image,
    count=count_image_tokens,
    adapter=LoraConfig(r=256, lora_alpha=512),
    routes=ROUTES,
    placeholder=PLACEHOLDERS["image"],
)
AUDIO = Modality(
    name="audio",
    config=SpeechConfig,
    settings=lambda sizes: AudioConfig(mels=sizes.mels),
    features=read_audio,
    count=count_audio_tokens,
    adapter=LoraConfig(r=320, lora_alpha=640, lora_dropout=0.01),
    routes=ROUTES,
    placeholder=PLACEHOLDERS["audio"],
)
SHIPPED = {"image": IMAGE, "audio": AUDIO}
_given: dict[str, Modality] = {}  # those of files, which go before packages
_files: dict[str, tuple[Path, Modality]] = {}  # that were run, by name and content


def check_unshipped(name: str, package: str) -> None:
    """Refuse the name of a shipped modality for that of a package. Raises ConfigError."""
    if name in SHIPPED:
        raise ConfigError(f"the modality {name!r} is shipped with modalora; choose another name for {package}")


def register(row: Modality) -> Modality:
    """Make a modality known to this process. Raises ConfigError for the name of a shipped one."""
    check_unshipped(row.name, row.package)
    _given[row.name] = row
    return row


def load_file(path: str | Path) -> Modality:
    """Run a Python file that a user named, and register the Modality that it calls MODALITY. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else f"does not exist (seen from {str(Path.cwd())!r})"
        raise ConfigError(f"the modality file {str(path)!r} {wrong}; give a Python file that sets MODALITY")
    path = path.absolute()  # a link is loaded under its own name, beside its own files
    digest = _digest(path)
    if digest not in _files:  # a second run would make other functions of one name
        _files[digest] = path, _run_file(path, digest)
    row = _files[digest][1]
    for known, (other, held) in _files.items():
        in_use = _given.get(row.name) is held and other != path
        if in_use and other.is_file() and _digest(other) == known and other.read_bytes() != path.read_bytes():
            raise ConfigError(f"the modality {row.name!r} is in {path} and in {other}, loaded before; name one of them")
    return register(row)


def _run_file(path: Path, digest: str) -> Modality:
    # one for each file, and the same in every process: rows are made in others too
    name = f"modalora_file_{path.stem}_{digest[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"the modality file {str(path)!r} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is someone else's code
        raise ConfigError(f"the modality file {str(path)!r} fails with {type(error).__name__}: {error}") from error
    row = module.__dict__.get("MODALITY")
    if not isinstance(row, Modality):
        raise ConfigError(f"the modality file {str(path)!r} must set MODALITY = Modality(...); it has {row!r:.60}")
    return replace(row, package=f"the file {path.name}")


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path) + b"\0" + path.read_bytes()).hexdigest()


def files() -> list[Path]:
    """Return the files whose modalities are in use, for another process to load."""
    return [path for path, row in _files.values() if _given.get(row.name) is row]


def known() -> list[str]:
    """Return the names of the modalities that can be found; no package is imported."""
    return sorted({*SHIPPED, *_given, *(entry.name for entry in importlib.metadata.entry_points(group=GROUP))})


def find(name: str, package: str = "") -> Modality:
    """Return a modality's row, importing the installed package that brings it.

    package: what brought it when a model was saved, for the message. Raises ConfigError when none brings it, several
    do, or the one that does is broken.
    """
    if row := (_given | SHIPPED).get(name):
        return row
    entries = list(importlib.metadata.entry_points(group=GROUP, name=name))
    if not entries:
        file = package.removeprefix("the file ")
        ways = "modality_files=[FILE] (train, plan, data), --modality-file FILE (other verbs) or load(..., modalities=)"
        named = f"name {'its Python file' if file == package else file} with {ways}"
        plain = file == package and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", package)
        mend = f"if you trust the package {package!r}, pip install {package}, or {named}" if plain else named
        raise ConfigError(f"the modality {name!r:.60} is not installed (there are {', '.join(known())}); {mend}")
    origins = [entry.dist.name if entry.dist else entry.value for entry in entries]
    if len(entries) > 1:
        raise ConfigError(f"the modality {name!r} is brought by {' and '.join(sorted(origins))}; uninstall one of them")
    try:
        row = entries[0].load()
    except (Exception, SystemExit) as error:  # it is someone else's code
        raise ConfigError(
            f"the package {origins[0]!r} brings the modality {name!r}, and importing {entries[0].value} fails with "
            f"{type(error).__name__}: {error}; mend the package, or pip uninstall {origins[0]}"
        ) from error
    if not isinstance(row, Modality) or row.name != name:
        raise ConfigError(
            f"the package {origins[0]!r} promises the modality {name!r} at {entries[0].value}, and {row!r:.60} stands "
            "there; it must be a Modality of that name"
        )
    return register(replace(row, package=origins[0]))


def source(name: str) -> Callable[..., Any] | None:
    """Return the training source "MODALITY.SOURCE" of a modality, None for a name without a dot. Raises ConfigError."""
    modality, dot, own = name.partition(".")
    if not dot:
        return None
    row = find(modality)
    if own not in row.sources:
        raise ConfigError(
            f"the modality {modality!r} has no source {own!r}; it has {', '.join(sorted(row.sources)) or 'none'}"
        )
    return row.sources[own]


def add(model: Multimodal, name: str, sizes: Mapping[str, Any] | None = None, adapter: str | None = None) -> None:
    """Add a modality with fresh networks and a fresh adapter to a model, whose decoder keeps every bit.

    sizes: fields of the modality's config. adapter: the name of the adapter; unless given, the one that its route
    names. Raises ConfigError; shipped modalities are part of a model's sizes and cannot be added.
    """
    row = find(name)
    if name in SHIPPED and name not in model.config.modalities:
        raise ConfigError(
            f"the modality {name!r} is shipped with modalora and cannot be added to a model that was made without; "
            "start from one that has it (in a recipe init: phi4-multimodal, with take: {decoder: FOLDER})"
        )
    model.add_modality(name, parse(row.config, dict(sizes or {}), f"modality {name!r}"))
    routed = row.routes[frozenset({name})].adapter
    if routed is None:
        return
    model.add_adapter(adapter or routed, row.adapter)
    if adapter not in (None, routed):
        model.config = replace(model.config, aliases={**model.config.aliases, routed: adapter})


def routes(config: ModelConfig) -> dict[frozenset[str], Rule]:
    """Return which adapter and projectors a model's rows use, by the modalities that a row holds.

    Raises ConfigError when two modalities disagree about rows that hold both.
    """
    found = dict(ROUTES)
    for name in config.encoders:
        row = find(name)
        for kinds, rule in row.routes.items():
            rule = replace(rule, adapter=config.aliases.get(rule.adapter or "", rule.adapter))
            if name not in kinds or found.get(kinds, rule) != rule:
                raise ConfigError(
                    f"the modality {name!r} of {row.package} has a route for {' + '.join(sorted(kinds))} that is not "
                    "its own to give, or that another modality gives otherwise"
                )
            found[kinds] = rule
    return found


def brought_by(config: ModelConfig, adapter: str) -> list[str]:
    """Return the further modalities whose rows use an adapter; they are stored with it."""
    table = routes(config)
    return [name for name in config.encoders if table[frozenset({name})].adapter == adapter]


def media(config: ModelConfig, tokenizer: TextTokenizer) -> dict[str, Medium]:
    """Return how a model's modalities are read. Raises ConfigError when no token is left to stand for one."""
    found: dict[str, Medium] = {}
    for number, (name, sizes) in enumerate(config.modalities.items()):
        row = find(name)
        placeholder = _placeholder(row, tokenizer, config.decoder.vocab_size, number)
        found[name] = Medium(placeholder, row.features, row.settings(sizes), row.count)
    return found


def _placeholder(row: Modality, tokenizer: TextTokenizer, vocab_size: int, number: int) -> tuple[str, int]:
    """Return name and id: the control token of the row, else one of the ids that the embedding has beyond the words."""
    if tokenizer.has_control(row.placeholder):
        return row.placeholder, tokenizer.control(row.placeholder)
    spare = tokenizer.last_id + 1 + number
    if row.name in SHIPPED or spare >= vocab_size:  # a published model means one token, and no other
        raise ConfigError(
            f"modality {row.name!r}: this tokenizer has no control token {row.placeholder!r}, and no id of the model's "
            f"{vocab_size} is free for it; name as the placeholder a control token that no chat format writes"
        )
    return f"<|{row.name}|>", spare


def write_encoders(config: ModelConfig) -> dict[str, Any]:
    """Return the JSON of a model's further modalities: the package that brought each, and its sizes."""
    return {name: {"package": find(name).package, "sizes": asdict(sizes)} for name, sizes in config.encoders.items()}


def read_encoders(fields: Any, where: str) -> dict[str, EncoderConfig]:
    """Return the sizes of further modalities from their JSON. Raises ConfigError, naming a package that is missing."""
    if not isinstance(fields, dict) or not all(
        isinstance(told, dict) and isinstance(told.get("package"), str) and isinstance(told.get("sizes"), dict)
        for told in fields.values()
    ):
        raise ConfigError(f"{where}: encoders must give each modality a package and sizes; it is {fields!r:.80}")
    found: dict[str, EncoderConfig] = {}
    for name, told in fields.items():
        if name in SHIPPED:
            raise ConfigError(
                f"{where}: encoders holds {name!r}, which is shipped; its sizes stand in a field of their own"
            )
        try:
            row = find(name, told["package"])
        except ConfigError as error:
            raise ConfigError(f"{where} needs the modality {name!r:.60} of {told['package']!r:.60}: {error}") from error
        found[name] = parse(row.config, told["sizes"], f"{where}: {name}")
    return found
