"""Settings that refuse unknown keys, and one clear line for what is wrong with a value."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError

from modalora.errors import ConfigError, InputError, listed

T = TypeVar("T")


class Settings(BaseModel):
    """Base of every group of settings: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Strict(Settings, Generic[T]):
    """Holds a value to be read: the plain dataclasses in it inherit that unknown keys are refused."""

    fields: T


def parse(kind: type[T], fields: Any, where: str) -> T:
    """Return `fields` as a `kind` (dataclass or Settings), strictly. Raises ConfigError naming key, value and rule."""
    try:
        wrong = _booleans(fields, kind)  # which pydantic reads as 0 and 1
    except RecursionError:
        raise ConfigError(f"{where}: a setting holds itself; write it out") from None
    if wrong:
        raise ConfigError(f"{where}: {', '.join(wrong)} must be a number, and true and false are none")
    try:
        return _Strict[kind].model_validate({"fields": fields}).fields  # type: ignore[valid-type]
    except ValidationError as error:
        raise ConfigError(f"{where}: {listed(_explain(error, kind))}") from None
    except InputError as error:  # a rule of the values' own, which knows no file
        raise type(error)(f"{where}: {error}") from None


def check_sizes(config: Any) -> None:
    """Refuse whole numbers of a dataclass outside 1 .. 2^31 - 1. Raises ConfigError naming the field."""
    for field in fields(config):
        if field.type in ("float", float):  # which may be given as a whole number
            continue
        value = getattr(config, field.name)
        if type(value) is int and value < 1:
            raise ConfigError(f"{field.name}={value} must be at least 1")
        if type(value) is int and value >= 2**31:
            raise ConfigError(f"{field.name}={str(value)[:20]} must be below 2^31")


def _explain(error: ValidationError, kind: Any) -> list[str]:
    lines: dict[tuple[str, ...], list[str]] = {}  # by the members of unions that an error went through
    for item in error.errors():
        # of what is no group of settings, the names are those of a union's members
        *path, last = (item["loc"][1:] if _groups(kind) else ()) or ("",)
        groups, taken, keys = _groups(kind), [], []
        for piece in path:
            named = [group for group in groups if group.__name__ == piece]
            if len(groups) > 1 and named:
                groups = named
                taken.append(str(piece))
            else:
                groups = [inner for group in groups for inner in _groups(_keys(group).get(str(piece)))] or groups
                keys.append(str(piece))
        key = ".".join([*keys, str(last)])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = sorted({name for group in groups for name in _keys(group)})
            close = get_close_matches(str(last), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            line = f"unknown key {key!r}; {hint}"
        elif item["type"] in ("missing", "missing_argument"):
            line = f"{key} is missing"
        else:
            line = f"{key}{'=' if key else ''}{item['input']!r:.60}: {item['msg']}"
            if item["type"] == "string_type" and isinstance(item["input"], int | float):
                line += "; put it into quotes"
        lines.setdefault(tuple(taken), []).append(line)
    # Of a union, the member that was meant is the one that knows the most of the keys.
    members = [own for taken, own in lines.items() if taken]
    members.sort(key=lambda own: (sum(line.startswith("unknown") for line in own), len(own)))
    return lines.get((), [])[: None if _groups(kind) else 1] + (members[0] if members else [])


def _booleans(value: Any, kind: Any, key: str = "") -> list[str]:
    """Return the keys of true and false where a number is asked for."""
    leaves = _leaves(kind)
    if isinstance(value, bool):
        return [f"{key}={value}"] if leaves & {int, float} and not leaves & {bool, Any} else []
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return []
    known = {name: hint for group in _groups(kind) for name, hint in _keys(group).items()}
    return [
        wrong
        for name, own in value.items()
        for wrong in _booleans(own, known.get(name, kind), f"{key}.{name}" if key else str(name))
    ]


def _leaves(kind: Any) -> set[Any]:
    """Return the plain types in a type, such as int in list[int | None]; groups of settings say themselves."""
    if get_origin(kind) is Literal:
        return {type(value) for value in get_args(kind)}
    inner = get_args(kind)
    return set().union(*map(_leaves, inner)) if inner else {kind}


def _groups(kind: Any) -> list[type]:
    """Return the groups of settings that a value of this type may hold: X in X | None, list[X], Mapping[str, X]."""
    if isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, BaseModel)):
        return [kind]
    return [group for inner in get_args(kind) for group in _groups(inner)]


def _keys(group: Any) -> dict[str, Any]:
    if issubclass(group, BaseModel):
        return {name: field.annotation for name, field in group.model_fields.items()}
    types = get_type_hints(group)
    return {field.name: types[field.name] for field in fields(group)}
