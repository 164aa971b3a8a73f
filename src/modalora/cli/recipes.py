"""Recipes as they are named on the command line: bundled ones, and files."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill

from modalora.errors import InputError

RECIPES = Path(__file__).parents[1] / "recipes"  # as config/recipes.py has it, which help would wait for


def bundled_recipes() -> list[str]:
    """Return the names of the recipes that come along."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def names_of(*, extending: bool) -> str:
    """Return the bundled recipes that `extend`, or `train`, carries out, in lines that help shows as they are."""
    names = [one for one in bundled_recipes() if extending == ("\nkind: extend\n" in _written(one))]
    return "\b\n" + fill(f"Bundled recipes: {', '.join(names)}.", 78, break_on_hyphens=False)


def _written(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def find_recipe(name: str, sizes: Iterable[str] = ()) -> Path:
    """Return the file of a recipe: a bundled one by its name, else a path.

    sizes: what else the caller would have taken. Raises InputError for a data file, and where there is no file.
    """
    from modalora.data.files import is_data

    bundled = RECIPES / f"{name}.yaml"
    if bundled.exists():
        return bundled
    if not Path(name).exists():
        close = get_close_matches(name, [*bundled_recipes(), *sizes], n=1)
        named = "`modalora train --help` names the recipes" + (f", sizes are {', '.join(sizes)}" if sizes else "")
        hint = f"did you mean {close[0]}?" if close else named
        raise InputError(f"{name} is neither a file nor a bundled recipe{' nor a model' * bool(sizes)}; {hint}")
    if not name.endswith((".yaml", ".yml")) and is_data(Path(name)):
        raise InputError(
            f"{name} holds data, and a recipe is asked for; give finetune-text "
            f"mixture.0.options.path={name}, or finetune-media where rows have pictures or sounds; "
            f"`modalora data check {name}` looks at it"
        )
    return Path(name)
