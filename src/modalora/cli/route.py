"""`modalora route explain`: what a prompt would be routed to, without answering it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from modalora.cli import options
from modalora.cli.loading import media_by_name, open_model, typed
from modalora.cli.words import to_json

if TYPE_CHECKING:
    from modalora.processing.processor import Processor, Row


_URL = re.compile(r"[a-z][a-z\d+.-]+:", re.IGNORECASE)


def explain(
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
            help="More prompts of the same batch: a JSON list of messages a line, or what /save of chat wrote."
        ),
    ] = None,
    rope: options.Rope = "reference",
    switch: options.Switch = "crossing",
    max_tokens: options.MaxTokens = 128,
    compat: Annotated[str, typer.Option(help="official: one mode for the whole batch, as the released code.")] = "",
    as_json: options.Json = False,
) -> None:
    """Show adapter, projectors, rotary table and token ranges of a prompt, and where the released code differs.

    Example: modalora route explain nano "What is this?" --image scene.png --audio seven.wav
    """
    from modalora.assistant import question_messages
    from modalora.generation.engine import check_max_tokens

    assistant = open_model(model, adapter, modality_file, rope=cast(Any, rope), compat=cast(Any, compat or None))
    own = question_messages(typed(question), list(image or []), list(audio or []), media_by_name(media))
    rows = [assistant.processor.row(own), *(_more(batch, assistant.processor) if batch else [])]
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


def _more(path: Path, processor: Processor) -> list[Row]:
    from modalora.errors import InputError, PromptError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} is not a file of JSON lines, a list of messages each: {error}") from None
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            held = json.loads(line)
            messages = held["messages"] if isinstance(held, dict) and "messages" in held else held
            rows.append(processor.row(_seen_from(path.parent, messages)))
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}, line {number} is not JSON: {error}; write a list of messages") from None
        except InputError as error:
            raise type(error)(f"{path}, line {number}: {error}") from None
    return rows


def _seen_from(folder: Path, messages: Any) -> Any:
    """Return messages with the paths of their media seen from a folder; what is wrong with them is told elsewhere."""
    if isinstance(messages, list):
        return [_seen_from(folder, one) for one in messages]
    if not isinstance(messages, dict):
        return messages
    if isinstance(messages.get("content"), list):
        return {**messages, "content": _seen_from(folder, messages["content"])}
    kind = messages.get("type")
    payload = messages.get(kind) if isinstance(kind, str) and kind != "text" else None
    if isinstance(payload, dict) and [*payload] == ["path"]:
        payload = payload["path"]
    elif kind not in ("image", "audio"):
        return messages
    return (
        {**messages, kind: str(folder / payload)} if isinstance(payload, str) and not _URL.match(payload) else messages
    )


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
