"""`modalora extend`: a longer window for a model."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from modalora.cli import options
from modalora.cli.processes import asked_for, ended_by_signals, launch_many
from modalora.cli.words import to_json
from modalora.errors import InputError
from modalora.parallel.stops import is_first


def extend(
    recipe: Annotated[str, typer.Argument(help="A YAML file of kind extend, or a bundled one such as extend-study.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, e.g. target=1024 search.iterations=10.")
    ] = None,
    gpus: options.Gpus = 0,
    processes: options.Processes = 1,
    as_json: options.Json = False,
) -> None:
    """Search rotary factors for a longer window, train with them if the recipe says so, and report (LongRoPE2).

    The same command goes on where it stopped; Ctrl-C saves and exits with 130, SIGTERM with 0. `modalora plan RECIPE`
    tells the cost before anything runs.

    Example: modalora plan extend-phi4-mini

    Example: modalora extend extend-study data=FOLDER

    FOLDER has the books of docs/nano.md; `modalora train window-1-base data=FOLDER` makes what extend-study extends.
    """
    count, settings = asked_for(gpus, processes, overrides)
    with ended_by_signals():
        _extend(recipe, settings, count, as_json)


def _extend(recipe: str, settings: list[str], count: int, as_json: bool) -> None:
    from modalora.cli.recipes import find_recipe
    from modalora.config import load_extension

    config = load_extension(find_recipe(recipe), settings)
    try:
        from modalora.longrope2.extend import extend as carry_out
    except ModuleNotFoundError as missing:
        raise InputError(f"extending needs {missing.name}; pip install -e '.[train]' in your clone") from None

    training = config.run(rope={})  # its rotary factors are still to be searched for
    arguments = ["extend", recipe, *settings, *(["--json"] if as_json else [])]
    if launch_many(arguments, count, {"training": training} if training else {}, "training."):
        return
    found = carry_out(config, _say, _report)
    if is_first():
        print(to_json(found) if as_json else _told(found))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _report(metrics: dict[str, Any]) -> None:
    losses = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key.startswith("loss"))
    _say(f"step {metrics['step']} of {metrics['steps']}  {losses}  {metrics['tokens_per_second']:,} tokens/s")


def _told(found: dict[str, Any]) -> str:
    in_theory, anchor = found["theoretical_critical_pair"], found["anchor"]
    judged = found["search"]
    lines = [
        f"critical pair: {in_theory} in theory; anchor {anchor}, first stretched by s {found['first_stretched_pair']}",
        f"{judged['measure']} {judged['perplexity']:.4g} after {judged['evaluations']:,} candidates",
    ]
    width = max(len(title) for title in found["scores"])
    lengths = [cell["length"] for cell in next(iter(found["scores"].values()))]
    lines.append(f"{'needles found':<{width}}" + "".join(f"{length:>10,}" for length in lengths))
    for title, cells in found["scores"].items():
        lines.append(f"{title:<{width}}" + "".join(f"{cell['accuracy']:>10.1%}" for cell in cells))
    lines.append(f"factors: {found['factors']}")
    if found["trained"]:
        lines.append(f"extended model: {found['trained']}")
    return "\n".join(lines)
