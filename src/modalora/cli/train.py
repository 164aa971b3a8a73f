"""`modalora train`: carry out a recipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from modalora.errors import InputError
from modalora.parallel.stops import end_with_launcher, is_first, is_one_of_many, tell_stopped

RECIPES = Path(__file__).parents[1] / "recipes"


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a bundled recipe such as nano-1-base.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, e.g. steps=100 optim.lr=1e-4.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of this machine to train on, one process each.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Processes on the CPU, for trying many-process runs.")] = 1,
) -> None:
    """Train what a recipe, or each recipe of a chain, names; the same command goes on where it stopped.

    Ctrl-C saves and exits with 130, a second one stops at once; SIGTERM saves and exits with 0.

    Example: modalora train nano-1-base data=../shared/data steps=100
    """
    before = signal.signal(signal.SIGTERM, _end)  # training listens itself, and saves
    end_with_launcher()
    try:
        _train(recipe, overrides or [], gpus, processes)
    except KeyboardInterrupt:
        tell_stopped()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(recipe: str, overrides: list[str], gpus: int, processes: int) -> None:
    from modalora.config import load_stages

    if gpus and processes > 1:
        raise InputError("--gpus N starts N processes by itself; leave --processes out")
    if gpus:
        overrides = [*overrides, "device=cuda"]

    from modalora.parallel.launch import check_processes, launch
    from modalora.training.run import run_recipe
    from modalora.training.signals import Interrupted

    runs = load_stages(find_recipe(recipe), RECIPES, overrides)
    if max(gpus, processes) > 1 and not is_one_of_many():
        for title, run in runs.items():
            shares = max(1, max(gpus, processes) // run.mesh.copies)
            if run.accumulate % shares:
                raise InputError(
                    f"{title}: accumulate={run.accumulate} micro-batches cannot be shared by {shares} "
                    f"{'processes' if run.mesh.copies == 1 else 'groups of processes'}; make it a multiple of it"
                )
            check_processes(run, max(gpus, processes))
        code = launch(["train", recipe, *overrides], max(gpus, processes))
        if code:
            raise typer.Exit(code)
        return
    for number, (title, run) in enumerate(runs.items(), 1):
        if len(runs) > 1 and is_first():
            print(f"stage {number} of {len(runs)}: {title}")
        told = "finished before, kept" if (Path(run.output) / "model").exists() else "wrote"
        try:
            with _shown(run.steps) as (show, say):
                folder = run_recipe(run, show, say)
        except Interrupted as stopped:
            tell_stopped()
            if is_first():
                print(f"modalora: {stopped}", file=sys.stderr)
            raise typer.Exit(stopped.exit_code) from None
        if is_first():
            curves = folder.parent / "loss.png"
            print(f"{told} {folder}" + (f"; curves: {curves}" if curves.exists() else ""))


def _end(number: int, frame: FrameType | None) -> None:
    tell_stopped()
    if is_first():
        print("modalora: ended outside of training; what was saved is whole", file=sys.stderr)
    raise SystemExit(0)


@contextmanager
def _shown(steps: int) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[str], None]]]:
    """Give a function that shows metrics and one that shows a line of words; the bar is closed however it ends."""
    if not sys.stderr.isatty():
        yield _line, lambda line: print(line, file=sys.stderr, flush=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps)

        def show(metrics: dict[str, Any]) -> None:
            loss = f"loss {metrics['loss']:.3f}" if "loss" in metrics else "no finite loss"
            text = f"{loss}  {metrics['tokens_per_second']:,} tokens/s"
            progress.update(task, completed=metrics["step"], description=text)

        yield show, lambda line: progress.console.print(line, markup=False, highlight=False)


def bundled_recipes() -> list[str]:
    """Return the names of the recipes that come along."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


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


def _line(metrics: dict[str, Any]) -> None:
    print(
        "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in metrics.items()
        ),
        flush=True,
    )
