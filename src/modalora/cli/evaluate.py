"""`modalora eval`: scores of a model by length, with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from modalora.cli import options
from modalora.cli.loading import check_used, open_model
from modalora.cli.words import to_json

if TYPE_CHECKING:
    from modalora.evaluation.needle import Cell, Grid
    from modalora.evaluation.perplexity import LengthBits
    from modalora.evaluation.ruler import Report


# Options that belong to one task; given without it they would have no effect.
_OWN = {"needle": ("depths", "style", "needles", "distractors"), "ruler": ("only", "form", "example", "threshold")}


def evaluate(
    context: typer.Context,
    model: options.Model,
    tasks: Annotated[list[str], typer.Argument(help="needle, ruler or perplexity; one or several.")],
    lengths: Annotated[
        str,
        typer.Option(
            help="Tokens, with commas between; else a quarter, a half and the whole of the window, where tasks fit."
        ),
    ] = "",
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A UTF-8 file, or a folder with books/validation.parquet; again for more."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Questions per length and depth, or task, or passages.")] = 30,
    depths: Annotated[str, typer.Option(help="Where needles lie: 0 the start, 1 the end of the text.")] = (
        "0,0.25,0.5,0.75,1"
    ),
    style: Annotated[str, typer.Option(help="Needles: digits, or words (for models of the window study).")] = "digits",
    needles: Annotated[int, typer.Option(help="Needles of one document, each asked for.")] = 1,
    distractors: Annotated[int, typer.Option(help="Further facts of a document that nobody asks for.")] = 0,
    rope: Annotated[
        list[str] | None,
        typer.Option("--rope", help="Rotary table: reference, long or short; again to compare them."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="A task of ruler; again for more.")] = None,
    form: Annotated[str, typer.Option(help="Prompts of ruler: plain, or chat for tuned models.")] = "plain",
    example: Annotated[bool, typer.Option("--example", help="Put a solved example in front of ruler's tasks.")] = False,
    threshold: Annotated[float, typer.Option(help="Average of ruler that a length must reach to be effective.")] = (
        0.856
    ),
    adapter: options.Adapters = None,
    modality_file: options.ModalityFiles = None,
    route: options.Route = "auto",
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Find hidden facts (needle), solve RULER-style tasks (ruler), or read text (perplexity) at several lengths.

    Example: modalora eval nano needle --text book.txt --lengths 256,1024
    """
    from modalora.assistant import set_regime
    from modalora.errors import ConfigError
    from modalora.evaluation.documents import check_lengths, grid_documents, load_texts
    from modalora.evaluation.needle import measure_grid
    from modalora.evaluation.perplexity import bits_by_length
    from modalora.evaluation.puzzles import TASKS
    from modalora.evaluation.ruler import Report, least_length, run_tasks

    _check(context, tasks, samples, threshold)
    assistant = open_model(model, adapter, modality_file, dtype=dtype, device=device)
    for regime in reversed(rope or ["reference"]):  # all before the first is measured, which is set again
        set_regime(assistant.model, cast(Any, regime))
    own = assistant.processor.router((), route).adapter
    check_used(assistant, adapter, route, ())
    window, tokenizer = assistant.processor.window, assistant.processor.tokenizer
    chosen = [window // 4, window // 2, window]
    if asked := options.given(context, "lengths"):
        chosen = _numbers(lengths, int, "--lengths", "256,1024")
    check_lengths(chosen, window)
    places = _numbers(depths, float, "--depths", "0,0.5,1")
    texts = [one for path in text or [] for one in load_texts(path)]
    if not texts and {"needle", "perplexity"} & set(tasks):
        raise ConfigError("needle and perplexity read running text; give --text, a file or a folder of books")
    names = [*dict.fromkeys(only or [])] or [name for name, task in TASKS.items() if texts or not task.needs_text]
    if "ruler" in tasks and not asked:
        how: dict[str, Any] = {"texts": texts, "form": form, "example": example, "seed": seed}
        fit = [
            length
            for length in chosen
            if all(least_length(assistant.processor, name, length, samples, **how) <= length for name in names)
        ]
        chosen = fit or chosen  # where no task fits, it says what it needs
    documents = []
    if "needle" in tasks:
        documents = grid_documents(
            tokenizer, texts, chosen, samples, part="evaluation", style=style, needles=needles,
            depths=places, distractors=distractors, seed=seed,
        )  # fmt: skip
    found: dict[str, Any] = {"model": model, "adapter": own, "seed": seed, "lengths": chosen, "results": []}
    for regime in dict.fromkeys(rope or ["reference"]):
        set_regime(assistant.model, cast(Any, regime))
        result: dict[str, Any] = {"rope": regime}
        found["results"].append(result)
        shown = [f"rotary table: {regime}"] if rope else []
        shown += [f"adapter: {own or 'none'}"] if route != "auto" else []
        if "needle" in tasks:
            (grid,) = measure_grid(assistant.model, documents, regimes=[cast(Any, regime)], adapter=own)
            result["needle"] = {"style": style, "needles": needles, "distractors": distractors} | grid.as_json()
            shown += _needle_lines(grid)
        if "ruler" in tasks:
            cells = run_tasks(
                assistant, names, chosen, samples=samples, texts=texts, form=form, example=example, seed=seed,
                adapter=own,
            )  # fmt: skip
            report = Report(tuple(cells))
            result["ruler"] = {"form": form, "example": example} | report.as_json(threshold)
            shown += _ruler_lines(report, threshold)
            if not texts and not only:
                shown.append("tasks in book text were left out: they need --text")
        if "perplexity" in tasks:
            bits = bits_by_length(assistant.model, tokenizer, texts, chosen, passages=samples, seed=seed, adapter=own)
            result["perplexity"] = [one.as_json() for one in bits]
            shown += _bits_lines(bits)
        if not as_json:
            print("\n".join(shown))
    if as_json:
        print(to_json(found))


def _check(context: typer.Context, tasks: list[str], samples: int, threshold: float) -> None:
    from modalora.errors import ConfigError

    known = ("needle", "ruler", "perplexity")
    for task in tasks:
        if task not in known:
            raise ConfigError(f"task {task!r} must be one of {', '.join(known)}")
    for task, own in _OWN.items():
        for option in options.given(context, *own) if task not in tasks else []:
            raise ConfigError(f"{option} is a setting of {task}, which is not among the tasks; leave it out")
    if samples < 1:
        raise ConfigError(f"--samples {samples} must be at least 1")
    if samples < 2 and "perplexity" in tasks:
        raise ConfigError(f"--samples {samples}: perplexity compares passages and needs at least 2")
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold {threshold} must lie in 0 to 1, such as 0.856")


def _numbers(text: str, kind: type[int] | type[float], option: str, example: str) -> list[Any]:
    from modalora.errors import ConfigError

    try:
        return [*dict.fromkeys(kind(part) for part in text.split(","))]  # each once
    except ValueError:
        raise ConfigError(f"{option} {text!r} must be numbers with commas between, such as {example}") from None


def _share(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * cell.accuracy:5.1f} [{100 * low:5.1f} {100 * high:5.1f}]"


def _needle_lines(grid: Grid) -> list[str]:
    depths = sorted({cell.depth for cell in grid.cells if cell.depth is not None})
    lines = [f"needle: exact answers in %, of {grid.tokens:.1f} tokens on average [95 % interval]"]
    lines.append("length  questions  all depths           " + "".join(f"at {one:<18g}" for one in depths))
    for total in grid.by_length:
        row = "  ".join(_share(cell) for cell in grid.cells if cell.length == total.length)
        lines.append(f"{total.length:>6}  {total.count:>9}  {_share(total)}  {row}")
    return [line.rstrip() for line in lines]


def _ruler_lines(report: Report, threshold: float) -> list[str]:
    lines = ["ruler: score in % [95 % interval]", "task             length  samples  score"]
    for cell in report.cells:
        low, high = cell.interval
        lines.append(
            f"{cell.task:<16} {cell.length:>6}  {cell.count:>7}  {100 * cell.score:5.1f} "
            f"[{100 * low:5.1f} {100 * high:5.1f}]"
        )
    lines += [f"{'average':<16} {length:>6}           {100 * score:5.1f}" for length, score in report.averages.items()]
    lines.append(f"effective length at {100 * threshold:g}: {report.effective_length(threshold) or 'none of these'}")
    return lines


def _bits_lines(found: list[LengthBits]) -> list[str]:
    from modalora.evaluation.perplexity import bits_gained

    lines = ["perplexity: bits per token of the same tokens behind ever more text [95 % interval]"]
    lines.append("length   tokens  bits                     more than the shortest window")
    base = min(found, key=lambda one: one.length)
    for one in found:
        low, high = one.interval
        more, least, most = bits_gained(base, one)
        lines.append(
            f"{one.length:>6}  {one.tokens:>7}  {one.bits:.3f} [{low:6.3f} {high:6.3f}]  "
            f"{more:+.3f} [{least:+.3f} {most:+.3f}]"
        )
    return lines
