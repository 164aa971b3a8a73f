"""YAML as recipes have it: YAML 1.2's plain values, and no key twice.

PyYAML reads YAML 1.1, where `on` is true, 1:40 is 100, 1_0 is 10, 2024-01-02 is a date, and 1e-4 is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from modalora.errors import ConfigError

_PLAIN = {  # tag -> what is read so, and the letters that it may begin with (YAML 1.2.2, section 10.3.2)
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {key.start_mark.line + 1} has a list or a mapping for a key")
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise ConfigError(f"line {key.start_mark.line + 1} sets {key.value!r} for the second time")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads back as it was: text that looks like a value gets quotes."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


for _kind in (_Loader, _Dumper):
    for _tag, (_pattern, _first) in _PLAIN.items():
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
    _kind.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read(text: str, where: str) -> Any:
    """Return what a YAML text says. Raises ConfigError in one line, `where` first."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  made from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}: " if mark else ""
        tab = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise ConfigError(f"{where} is not YAML: {place}{error.problem or error.context}{tab}") from None
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"{where} is not YAML: {error}".replace("\n", " ")) from None
    except (ValueError, RecursionError, KeyError, AttributeError) as error:  # 5,000 digits, !!int abc, [[[[...
        raise ConfigError(f"{where} is not YAML that settings are made of: {error}") from None


def write(value: Any) -> str:
    """Return a value as YAML, which `read` returns."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
