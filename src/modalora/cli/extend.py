"""`modalora extend`: a longer window for a model."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from modalora.parallel.stops import end_with_launcher, is_first, is_one_of_many, tell_stopped


def extend(
    recipe: Annotated[str, typer.Argument(help="A YAML file of kind extend, or a bundled one such as extend-study.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, e.g. target=1024 search.iterations=10.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of this machine to search and train on.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Processes on the CPU.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Search rotary factors for a longer window, train with them if the recipe says so, and report (LongRoPE2).

    The same command goes on where it stopped; Ctrl-C saves and exits with 130. `modalora plan RECIPE` tells the cost
    before anything runs.

    Example: modalora extend extend-study target=512 search.iterations=5
    """
    from modalora.cli.train import find_recipe
    from modalora.config import load_extension
    from modalora.errors import InputError

    if gpus and processes > 1:
        raise InputError("--gpus N starts N processes by itself; leave --processes out")
    end_with_launcher()
    changes = [*(overrides or []), *(["device=cuda"] if gpus else [])]
    config = load_extension(find_recipe(recipe), changes)
    try:
        from modalora.longrope2.extend import extend as carry_out
        from modalora.parallel.launch import launch
        from modalora.training.signals import Interrupted
    except ModuleNotFoundError as missing:
        raise InputError(f"extending needs {missing.name}; pip install 'modalora[train]'") from None

    if max(gpus, processes) > 1 and not is_one_of_many():
        code = launch(["extend", recipe, *changes, *(["--json"] if as_json else [])], max(gpus, processes))
        if code:
            raise typer.Exit(code)
        return
    try:
        found = carry_out(config, _say, _report)
    except Interrupted as stopped:
        tell_stopped()
        if is_first():
            print(f"modalora: {stopped}", file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        tell_stopped()
        raise
    if not is_first():
        return
    print(json.dumps(found, ensure_ascii=False) if as_json else _told(found))


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
        f"needle perplexity {judged['perplexity']:.4g} after {judged['evaluations']:,} candidates",
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
