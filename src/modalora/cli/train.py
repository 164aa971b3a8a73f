"""`modalora train`: carry out a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

RECIPES = Path(__file__).parents[1] / "recipes"


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a bundled recipe such as nano-1-base.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, e.g. steps=100 optim.lr=1e-4.")
    ] = None,
) -> None:
    """Train what a recipe, or each recipe of a chain, names; the same command goes on where it stopped.

    Example: modalora train nano-1-base data=../shared/data steps=100
    """
    from modalora.config import load_stages
    from modalora.errors import InputError

    try:
        from modalora.training.run import run_recipe
    except ModuleNotFoundError as missing:
        raise InputError(f"training needs {missing.name}; pip install 'modalora[train]'") from None

    runs = load_stages(find_recipe(recipe) or Path(recipe), RECIPES, overrides or [])
    for number, (title, run) in enumerate(runs.items(), 1):
        if len(runs) > 1:
            print(f"stage {number} of {len(runs)}: {title}")
        show = _bar(run.steps) if sys.stderr.isatty() else _line
        folder = run_recipe(run, show)
        print(f"wrote {folder}; loss curve: {folder.parent / 'loss.png'}")


def find_recipe(name: str) -> Path | None:
    """Return the file of a bundled recipe or of a path to one; None where there is no such file."""
    found = [path for path in (RECIPES / f"{name}.yaml", Path(name)) if path.is_file()]
    return found[0] if found else None


def _line(metrics: dict[str, Any]) -> None:
    print(
        "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in metrics.items()
        )
    )


def _bar(steps: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    task = progress.add_task("", total=steps)
    progress.start()

    def show(metrics: dict[str, Any]) -> None:
        text = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,} tokens/s"
        progress.update(task, completed=metrics["step"], description=text)
        if metrics["step"] == steps:
            progress.stop()

    return show
