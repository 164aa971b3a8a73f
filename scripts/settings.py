"""Write docs/settings.md: every setting of a recipe, with its default and the comment that stands beside it.

python scripts/settings.py > docs/settings.md
"""

from __future__ import annotations

import ast
import inspect
import re

from modalora.config import extend, run

HEAD = """\
# Settings

Every key of a recipe, from the comments in `src/modalora/config/` (`python scripts/settings.py` writes this page; a
test holds it equal). A key can be given on the command line as `key=value`, one of a group with a dot,
`optim.lr=1e-4`, one of a list with its place, `mixture.0.weight=2`. An unknown key is refused; None is `null` in
YAML. What a recipe comes to, `modalora plan RECIPE` tells before it runs.
"""
TITLES = {
    "RunConfig": "A run",
    "SourceConfig": "mixture: a source",
    "OptimConfig": "optim",
    "FittedRate": "optim.fitted",
    "MediaConfig": "media",
    "MeshConfig": "mesh",
    "ChainConfig": "A chain of recipes",
    "StageConfig": "stages: a stage",
    "ExtendConfig": "An extension (`kind: extend`)",
    "SearchConfig": "search",
    "NeedleConfig": "guide and scores",
    "GuideConfig": "guide, beside those",
    "ScoresConfig": "scores, beside those",
}


def page() -> str:
    """Return the page."""
    classes = {name: own for module in (run, extend) for name, own in _classes(inspect.getsource(module)).items()}
    return HEAD + "".join(f"\n## {title}\n\n{classes[name]}" for name, title in TITLES.items())


def _classes(source: str) -> dict[str, str]:
    """Return the table of each class of a module."""
    lines = source.splitlines()
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        rows = [
            f"| `{one.target.id}` | {_kind(one.annotation)} | {_default(one.value)} | {_comment(lines, one)} |"
            for one in node.body
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        ]
        told = inspect.cleandoc(ast.get_docstring(node) or "")
        found[node.name] = f"{told}\n\n| key | kind | default | what |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    return found


def _kind(annotation: ast.expr) -> str:
    kind = re.sub(r"Annotated\[(\w+), Field\(.*?\)\]", r"\1", ast.unparse(annotation))  # the rule is told by the error
    kind = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace("'", "").replace(", ", " | "), kind)
    return "`" + kind.replace("|", "\\|") + "`"


def _default(value: ast.expr | None) -> str:
    """Return what a setting is unless it is given; "needed" where it must be."""
    if value is None:
        return "needed"
    if isinstance(value, ast.Call):  # Field(default, rules)
        given = {one.arg: one.value for one in value.keywords}
        if "default_factory" in given:
            factory = ast.unparse(given["default_factory"])
            return {"list": "`[]`", "dict": "`{}`"}.get(factory, "see below")
        if not value.args and "default" not in given:
            return "needed"
        value = value.args[0] if value.args else given["default"]
    return f"`{ast.unparse(value)}`".replace("None", "null").replace("True", "true").replace("False", "false")


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    """Return the comment behind a setting, and the lines of comment above it."""
    above: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().removeprefix("#").strip())
    _, _, behind = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :].partition("#")
    return " ".join([*above, behind.strip()]).strip().replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
