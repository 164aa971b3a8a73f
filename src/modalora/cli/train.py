"""`modalora train`: carry out a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from modalora.cli import options
from modalora.cli.processes import asked_for, ended_by_signals, launch_many
from modalora.cli.recipes import find_recipe
from modalora.parallel.stops import is_first


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a bundled recipe such as nano-1-base.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, e.g. steps=100 optim.lr=1e-4.")
    ] = None,
    gpus: options.Gpus = 0,
    processes: options.Processes = 1,
) -> None:
    """Train what a recipe, or each recipe of a chain, names; the same command goes on where it stopped.

    Ctrl-C saves and exits with 130, a second one stops at once; SIGTERM saves and exits with 0.

    Example: modalora train nano-1-base data=../shared/data steps=100
    """
    count, settings = asked_for(gpus, processes, overrides)
    with ended_by_signals():
        _train(recipe, settings, count)


def _train(recipe: str, settings: list[str], count: int) -> None:
    from modalora.checkpoint.resume import states
    from modalora.config import load_stages
    from modalora.training.run import run_recipe

    runs = load_stages(find_recipe(recipe), settings).runs
    if launch_many(["train", recipe, *settings], count, runs):
        return
    for number, (title, run) in enumerate(runs.items(), 1):
        if len(runs) > 1 and is_first():
            print(f"stage {number} of {len(runs)}: {title}")
        told = "finished before, kept" if (Path(run.output) / "model").exists() else "wrote"
        saved = states(Path(run.output))
        with _shown(run.steps, int(saved[-1].name) if saved else 0) as (show, say):
            folder = run_recipe(run, show, say)
        if is_first():
            curves = folder.parent / "loss.png"
            print(f"{told} {folder}" + (f"; curves: {curves}" if curves.exists() else ""))


@contextmanager
def _shown(steps: int, done: int) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[str], None]]]:
    """Give a function that shows metrics and one that shows a line of words; the bar is closed however it ends.

    done: the steps of the state that a run goes on from.
    """
    if not sys.stderr.isatty():
        yield _line, lambda line: print(line, file=sys.stderr, flush=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps, completed=done)

        def show(metrics: dict[str, Any]) -> None:
            if "tokens_per_second" not in metrics:  # scores of what is not trained on
                progress.console.print(_told(metrics), markup=False, highlight=False)
                return
            loss = f"loss {metrics['loss']:.3f}" if "loss" in metrics else "no finite loss"
            text = f"{loss}  {metrics['tokens_per_second']:,} tokens/s"
            progress.update(task, completed=metrics["step"], description=text)

        yield show, lambda line: progress.console.print(line, markup=False, highlight=False)


def _line(metrics: dict[str, Any]) -> None:
    print(_told(metrics), flush=True)


def _told(metrics: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in metrics.items()
    )
