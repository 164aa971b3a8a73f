"""The habits that no tool checks: the error tree, docstrings, `__all__`, and commands that documents name."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

import modalora
from modalora import errors

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "modalora").rglob("*.py"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def drawn_tree(text: str) -> dict[str, tuple[str | None, str]]:
    """Return {class: (its parent, what it is said to mean)} of the tree in a docstring."""
    found: dict[str, tuple[str | None, str]] = {}
    above: list[str] = []
    for line in text.splitlines():
        match = re.match(r"([│├└─ ]*)([A-Z]\w*Error)\s*(.*)$", line)
        if match:
            depth = len(match[1]) // 4
            above[depth:] = [match[2]]
            found[match[2]] = (
                above[depth - 1] if depth else None,
                re.sub(r"\s*\(command line.*|\s*\(exit code.*", "", match[3]),
            )
    return found


def public(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Return every public class, function and method of a module; what is inside functions is nobody else's."""
    found: list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef] = []
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                waiting += node.body
    return found


def test_the_rooms_are_drawn_as_the_linter_has_them() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    drawing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("```\ncli ")[2].partition("```")[0]
    drawn = [line.split("  ")[0].strip() for line in f"cli {drawing}".splitlines()]
    assert drawn == contracts[0]["layers"]


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawn = drawn_tree(errors.__doc__ or "")
    classes = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert set(drawn) == set(classes)
    for name, (parent, meaning) in drawn.items():
        bases = [base.__name__ for base in classes[name].__bases__]
        assert bases == [parent or "Exception"]
        if meaning:
            assert (classes[name].__doc__ or "").rstrip(".").casefold() == meaning.casefold()


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_the_exit_code_tells_wrong_input_from_failed_work(kind: type[errors.ModaloraError]) -> None:
    assert kind.exit_code == (2 if issubclass(kind, errors.InputError) else 1)


@pytest.mark.parametrize("path", SOURCES, ids=where)
def test_everything_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{where(path)} has no docstring"
    bare = [f"{where(path)}:{node.lineno} {node.name}" for node in public(tree) if not ast.get_docstring(node)]
    assert not bare, "no docstring: " + ", ".join(bare)


@pytest.mark.parametrize("path", SOURCES, ids=where)
def test_errors_raised_on_purpose_belong_to_the_tree(path: Path) -> None:
    known = set(drawn_tree(errors.__doc__ or ""))
    outside = {
        "AttributeError",
        "KeyboardInterrupt",
        "Interrupted",
        "NotImplementedError",
        "StopIteration",
        "SystemExit",
        "ValueError",  # of pydantic's validators, which `parse` makes a ConfigError
    }
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            assert name in known | outside or not name[0].isupper() or name in {"Exit", "BadParameter"}, (
                f"{where(path)}:{node.lineno} raises {name}, which errors.py does not draw"
            )


def test_every_public_name_can_be_had() -> None:
    assert sorted(modalora.__all__) == modalora.__all__
    for name in modalora.__all__:
        assert getattr(modalora, name) is not None


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="Assistant"):
        _ = modalora.helper  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", DOCUMENTS, ids=where)
def test_documents_name_only_make_targets_and_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = set(
        re.findall(r"\bmake (?:-j\d+ )?([a-z]+)\b", "\n".join(re.findall(r"`[^`]+`|^```.*?^```", text, re.S | re.M)))
    )
    assert named <= TARGETS, f"{where(path)} names make targets that do not exist: {named - TARGETS}"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (path.parent / link).exists(), f"{where(path)} links to {link}, which does not exist"


@pytest.mark.parametrize("path", [ROOT / "docs" / "tour.md", ROOT / "docs" / "papers.md"], ids=where)
def test_names_in_the_tour_and_the_paper_table_are_in_the_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    references = re.findall(r"`([a-z0-9_]+(?:/[a-z0-9_]+)*)\.py:([A-Za-z0-9_.]+)`", text)
    assert len(references) == text.count(".py:") > 0
    for module, name in references:
        thing = importlib.import_module("modalora." + module.replace("/", "."))
        for piece in name.split("."):
            thing = getattr(thing, piece)
