"""`modalora route explain`: what a prompt would be routed to, without answering it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from modalora.cli import options
from modalora.cli.loading import media_by_name, open_model, typed
from modalora.cli.words import to_json

if TYPE_CHECKING:
    from modalora.processing.processor import Processor, Row


def explain(
    context: typer.Context,
    model: options.Model,
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")] = "",
    image: options.Images = None,
    audio: options.Sounds = None,
    media: options.MediaFiles = None,
    adapter: options.Adapters = None,
    modality_file: options.ModalityFiles = None,
    route: options.Route = "auto",
    batch: Annotated[
        Path | None,
        typer.Option(
            help="A data file with more prompts of the same batch, read as by ask --rows; what /save of chat wrote."
        ),
    ] = None,
    media_root: options.MediaRoot = None,
    form: options.RowForm = "auto",
    rename: options.RowNames = "{}",
    tags: options.RowTags = "true",
    rope: options.Rope = "reference",
    switch: options.Switch = "crossing",
    max_tokens: options.MaxTokens = 128,
    compat: Annotated[str, typer.Option(help="official: one mode for the whole batch, as the released code.")] = "",
    as_json: options.Json = False,
) -> None:
    """Show adapter, projectors, rotary table and token ranges of a prompt, and where the released code differs.

    Example: modalora route explain nano "What is this?" --image scene.png --audio seven.wav
    """
    from modalora.errors import ConfigError
    from modalora.generation.engine import check_max_tokens
    from modalora.processing.questions import question_messages

    if batch is None and (given := options.given(context, "media_root", "form", "rename", "tags")):
        raise ConfigError(f"{given[0]} is for --batch; leave it out, or add a file")
    assistant = open_model(model, adapter, modality_file, rope=cast(Any, rope), compat=cast(Any, compat or None))
    own = question_messages(typed(question), list(image or []), list(audio or []), media_by_name(media))
    rows = [
        assistant.processor.row(own),
        *(_more(batch, assistant.processor, media_root or batch.parent, form, rename, tags) if batch else []),
    ]
    prompts = assistant.processor.collate(rows, route=route, labelled=False)
    check_max_tokens(max_tokens)
    assistant.check_room(int(prompts.lengths.max()), max_tokens)
    records = assistant.explain(prompts, max_tokens=max_tokens, switch=cast(Any, switch))
    for number, (record, official) in enumerate(
        zip(records, assistant.explain_official(prompts), strict=True), start=1
    ):
        record["official"] = official
        if as_json:
            print(to_json(record))
            continue
        if len(records) > 1:
            print(f"row {number}")
        print("\n".join(lines(record)))
        print(f"released   {_official(record)}")


def _more(path: Path, processor: Processor, root: Path, *how: str) -> list[Row]:
    from modalora.cli.rows import Rows
    from modalora.data.files import open_records
    from modalora.errors import InputError

    found: list[Row] = []
    with TemporaryDirectory() as cache:
        rows = Rows(open_records(path, Path(cache)), root, *how)
        rows.suit(processor)
        for number in range(len(rows)):
            try:
                found.append(processor.row(rows.read(number)))
            except InputError as error:
                raise type(error)(f"{rows.where(number)}: {error}") from None
    rows.tell_unread()
    return found


def _official(record: dict[str, Any]) -> str:
    theirs = record["official"]
    if theirs is None:
        return "the released code has no mode for this batch"
    if (theirs["adapter"], theirs["projectors"]) == (record["adapter"], record["projectors"]):
        return "the same"
    branches = ", ".join(f"{kind} -> {branch}" for kind, branch in theirs["projectors"].items())
    return f"adapter {theirs['adapter'] or 'none'}, projectors {branches or '-'}: one mode for the whole batch"


def lines(record: dict[str, Any]) -> list[str]:
    """Return a route record as lines for people."""
    adapter = (
        f"{record['adapter']} (scale {record['scale']})" if record["adapter"] else "none: the frozen decoder alone"
    )
    crosses = record["rope_crosses"]
    table = f"{record['rope']}: {record['rope_why']}" + (f"; at {crosses} tokens it is read again" if crosses else "")
    shown = [
        f"media      {' + '.join(record['modalities'])}",
        f"adapter    {adapter}",
        f"projectors {', '.join(f'{kind} -> {branch}' for kind, branch in record['projectors'].items()) or '-'}",
        f"rope       {table}",
        f"tokens     {record['tokens']}",
    ]
    for span in record["spans"]:
        what = repr(span["text"]) if "text" in span else f"{span['stop'] - span['start']} tokens"
        shown.append(f"  {span['start']:>5} - {span['stop'] - 1:<5} {span['kind']:<8} {what}")
    return shown
