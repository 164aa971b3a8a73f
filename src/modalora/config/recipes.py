"""Recipes: YAML files of settings with "optim.lr=1e-4" overrides, read and written."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from modalora.config import yaml
from modalora.config.extend import ExtendConfig
from modalora.config.run import ChainConfig, RunConfig
from modalora.config.strict import parse
from modalora.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "recipes"
_FILES = "modality_files"  # of a recipe: paths seen from its folder


def load_extension(path: Path, overrides: Sequence[str] = ()) -> ExtendConfig:
    """Read a recipe of kind extend and apply "key.sub=value" overrides (values are YAML)."""
    fields = _read(path)
    if fields.get("kind") != "extend":
        raise ConfigError(f"{path} is no recipe of kind extend; `modalora train` carries out the others")
    for override in overrides:
        _set(fields, *_override(override))
    return parse(ExtendConfig, fields, str(path))


def is_extension(path: Path) -> bool:
    """Tell whether a file is a recipe of kind extend."""
    return path.is_file() and _read(path).get("kind") == "extend"


def load_run(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, a file or the name of a bundled one, and apply "key.sub=value" overrides (values are YAML)."""
    path = RECIPES / f"{recipe}.yaml"
    path = path if path.is_file() else Path(recipe)
    fields = _read(path)
    if fields.get("kind") == "extend":
        raise ConfigError(f"{path} extends a model's window; `modalora extend` carries it out")
    if "stages" in fields:
        raise ConfigError(f"{path} is a chain of recipes; this takes one of its stages: a recipe with its settings")
    for override in overrides:
        _set(fields, *_override(override))
    return parse(RunConfig, fields, str(path))


class Stages(NamedTuple):
    """The runs of a recipe by name, in order. start: what the first of a chain starts from; None: it is no chain."""

    start: str | None
    runs: dict[str, RunConfig]


def load_stages(path: Path, overrides: Sequence[str] = ()) -> Stages:
    """Read a recipe or a chain of recipes, bundled ones or files beside it.

    An override holds for every stage, or for one of a chain where its name comes first: "vision-2-joint.steps=10".
    init and output are the chain's: where its first stage starts from, and the folder of all stages' folders, which
    settings of stages call {output}.
    """
    fields = _read(path)
    if "stages" not in fields:
        return Stages(None, {path.stem: load_run(path, overrides)})
    of_chain = [override for override in overrides if override.startswith(("init=", "output="))]
    for override in of_chain:
        _set(fields, *_override(override))
    chain = parse(ChainConfig, fields, str(path))
    titles = [stage.title for stage in chain.stages]
    if len(set(titles)) < len(titles):
        raise ConfigError(f"{path}: two stages have one name ({', '.join(titles)}); give one of them another `name`")
    given: dict[str, list[str]] = {title: [] for title in titles}
    for override in [override for override in overrides if override not in of_chain]:
        first, _, rest = override.partition(".")
        for title in [first] if first in given else titles:
            given[title].append(rest if first in given else override)
    runs: dict[str, RunConfig] = {}
    before = chain.init
    for stage in chain.stages:
        found = [own for own in (RECIPES / f"{stage.recipe}.yaml", path.parent / stage.recipe) if own.is_file()]
        if not found:
            raise ConfigError(f"{path}: stage {stage.title!r}: there is no recipe {stage.recipe!r}")
        own = _read(found[0])
        own |= {"init": before, "output": f"{chain.output}/{stage.title}"}
        where = f"{path}, stage {stage.title}"
        for key, value in (chain.set | stage.set).items():
            value = _within(deepcopy(value), chain.output)
            _set(own, key.split("."), _beside(path, value) if key == _FILES else value, f"{where}: {key}")
        for override in given[stage.title]:
            _set(own, *_override(override))
        runs[stage.title] = parse(RunConfig, own, where)
        before = f"{runs[stage.title].output}/model"
    return Stages(chain.init, runs)


def _beside(path: Path, files: Any) -> Any:
    """Return the modality files that a recipe names, those of its own folder before those of the current one."""
    if not isinstance(files, list):
        return files
    seen = [path.parent / one if isinstance(one, str) else Path() for one in files]
    return [
        str(own) if isinstance(one, str) and (own.exists() or not Path(one).exists()) else one
        for one, own in zip(files, seen, strict=True)
    ]


def _within(value: Any, output: str) -> Any:
    """Return a setting with the folder of its chain in the place of {output}."""
    if isinstance(value, dict):
        return {key: _within(own, output) for key, own in value.items()}
    if isinstance(value, list):
        return [_within(own, output) for own in value]
    return value.replace("{output}", output) if isinstance(value, str) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        written = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist; bundled ones are named by `modalora train --help`") from None
    except IsADirectoryError:
        raise ConfigError(f"recipe {path} is a folder; give a YAML file in it, or a bundled recipe's name") from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path} is a binary file; give a YAML file, or a bundled recipe's name") from None
    fields = yaml.read(written, f"recipe {path}")
    if fields is None:
        raise ConfigError(f"recipe {path} is empty; write settings, such as init: bundled/nano (docs/settings.md)")
    if not isinstance(fields, dict):
        raise ConfigError(f"recipe {path} must be a mapping of settings; it holds {type(fields).__name__}")
    for group in (fields, fields.get("training")):  # of an extension
        if isinstance(group, dict) and _FILES in group:
            group[_FILES] = _beside(path, group[_FILES])
    return fields


def _override(text: str) -> tuple[list[str], Any, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} must look like key=value, e.g. optim.lr=1e-4")
    try:
        return key.split("."), yaml.read(value, "it"), text
    except ConfigError as error:
        raise ConfigError(f"override {text!r:.200}: {error}; quote text that holds symbols") from None


def dump(settings: BaseModel) -> str:
    """Return the settings as YAML."""
    return yaml.write(settings.model_dump(mode="json"))


def _set(fields: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    inner: Any = fields
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        if isinstance(inner, list) and key.isdecimal() and key.isascii() and int(key) < len(inner):
            place: Any = int(key)  # mixture.0.weight=2
        elif isinstance(inner, dict):
            place = key
        else:
            raise ConfigError(f"override {override!r}: nothing can be set at {key!r}")
        if following is None:
            inner[place] = value
        elif isinstance(inner, dict):
            inner = inner.setdefault(place, {})
        else:
            inner = inner[place]
