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
    """Train what a recipe names; the same command goes on where it stopped.

    Example: modalora train nano-1-base data=../shared/data steps=100
    """
    from modalora.config import load_run
    from modalora.errors import InputError

    try:
        from modalora.training.run import run_recipe
    except ModuleNotFoundError as missing:
        raise InputError(f"training needs {missing.name}; pip install 'modalora[train]'") from None

    run = load_run(find_recipe(recipe), overrides or [])
    show = _bar(run.steps) if sys.stderr.isatty() else _line
    folder = run_recipe(run, show)
    print(f"wrote {folder}; loss curve: {folder.parent / 'loss.png'}")


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a bundled one by its name, else a path."""
    bundled = RECIPES / f"{name}.yaml"
    return bundled if bundled.exists() else Path(name)


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
