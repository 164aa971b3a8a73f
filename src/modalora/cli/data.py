"""`modalora data`: look at a training set before a model is trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modalora.cli import options
from modalora.cli.recipes import find_recipe
from modalora.cli.words import to_json

if TYPE_CHECKING:
    from modalora.config import RunConfig
    from modalora.data.sources import Context

data = typer.Typer(help="Prove that data fit a model, and look at them.", no_args_is_help=True)

Recipe = Annotated[str, typer.Argument(help="A data file (.jsonl, .parquet, .tar, ...), or a recipe that names some.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change, e.g. tokens=4096 or init=FOLDER.")]


@data.command("check")
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: options.Json = False,
) -> None:
    """Make every row of data files: counts, lengths, labels, media. Lists every bad one; exit code 1 if any.

    Example: modalora data check rows.jsonl

    Example: modalora data check recipe.yaml tokens=4096
    """
    run, context = _open(recipe, overrides)
    from modalora.data.check import check_data
    from modalora.data.reader import check_apart
    from modalora.data.sources import SCORED

    check_apart(run.mixture, run.scored)
    found = check_data(context, run.mixture, run.seed) + check_data(context, run.scored, SCORED)
    if as_json:
        print(to_json([one.summary() for one in found]))
    else:
        _print([one.summary() for one in found])
    if any(one.bad for one in found):
        raise typer.Exit(1)


@data.command("preview")
def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each source.")] = 3,
    page: Annotated[Path | None, typer.Option("--html", help="Write a page with pictures and sounds.")] = None,
) -> None:
    """Show the first rows of each source as the model reads them, the trained text coloured.

    Example: modalora data preview rows.jsonl --rows 5 --html rows.html
    """
    run, context = _open(recipe, overrides)
    from rich.console import Console

    from modalora.data.preview import as_page, as_terminal
    from modalora.data.preview import preview as shown_rows

    shown = list(shown_rows(context, run.mixture, rows, run.seed))
    if page is None:
        console = Console(soft_wrap=True)
        for one in shown:
            console.print(as_terminal(one))
        return
    page.write_text(as_page(shown, f"Rows of {recipe}", context.processor), encoding="utf-8")
    print(f"wrote {page}, {len(shown)} rows")


@data.command("genomes")
def genomes(
    cache: Annotated[Path, typer.Option(help="The cache folder of a recipe.")] = Path("runs/cache"),
) -> None:
    """Fetch the genome files of Biopython's source archive, 20 MB through pip, checked by their hashes.

    Example: modalora data genomes --cache runs/cache
    """
    from modalora.data.genomes import fetch_genomes

    for path in fetch_genomes(cache):
        print(path)


def _open(recipe: str, overrides: list[str] | None) -> tuple[RunConfig, Context]:
    from modalora.config import load_run
    from modalora.data.files import find_files, is_data
    from modalora.training.start import open_context

    settings = overrides or []
    if is_data(Path(recipe)):
        find_files(recipe)
        recipe, settings = "finetune-media", [f"mixture.0.options.path={json.dumps(recipe)}", *settings]
    run = load_run(find_recipe(recipe), settings)
    return run, open_context(run)


def _print(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from modalora.data.sources import Place

    console = Console(soft_wrap=True)
    for one in found:
        for line in one["read"]:
            console.print(f"{one['source']}: {line}", markup=False, highlight=False)
    lines = [_figures(one) for one in found]
    table = Table(*lines[0])
    for line in lines:
        table.add_row(*line.values())
    needed = console.measure(table, options=console.options.update(width=10_000)).maximum
    if console.is_terminal and needed <= console.width:
        console.print(table)
    else:  # a table would leave figures out, and nobody reads its frame
        for line in lines:
            print("\n".join(f"{name}  {figure}" for name, figure in line.items()))
    for one in found:
        if one["control_tokens"]:
            print(
                f"{one['source']}: the text of {one['control_tokens']:,} rows spells out control tokens, read as "
                "mere text; if a chat template rendered the records, give the words alone"
            )
        if one["dropped_tokens"] or one["texts_left_out"]:
            print(f"{one['source']}: {one['dropped_tokens']:,} tokens of an epoch are in no row; "
                  f"{one['texts_left_out']:,} texts or paragraphs are empty or of another length")  # fmt: skip
        if one["unread_fields"]:
            listed = ", ".join(f"{name} ({count:,})" for name, count in one["unread_fields"].items())
            print(f"{one['source']}: fields that are not read: {listed}")
        for bad in one["bad"]:
            where = Place(bad["file"], bad["line"], bad["key"]) if bad["file"] else bad["sample"]
            print(f"bad  {where}  {bad['reason']}\n     -> {bad['mend'] or 'see the message'}")
    bad_rows = sum(len(one["bad"]) for one in found)
    print(f"{bad_rows:,} bad row{'s' * (bad_rows > 1)}" if bad_rows else "every row is good")


def _figures(one: dict[str, Any]) -> dict[str, str]:
    """Return what is told of a source, by the names of its columns."""
    return {
        "source": one["source"],
        "rows": f"{one['rows']:,}{' looked at, no end' if one['endless'] else ''}",
        **{f"tokens {key}": f"{one['tokens'][key]:,}" for key in ("min", "median", "max")},
        "trained": f"{one['trained_share']:.0%}",
        "media": ", ".join(f"{count:,} {kind}" for kind, count in one["media"].items()) or "-",
        "truncated": f"{one['truncated']:,}",
        "bad": f"{len(one['bad']):,}",
    }
