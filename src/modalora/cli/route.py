"""`modalora route explain`: what a prompt would be routed to, without answering it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def explain(
    model: Annotated[str, typer.Argument(help="A model folder, or a bundled model such as nano.")],
    question: Annotated[str, typer.Argument(help="The question.")] = "",
    image: Annotated[list[Path] | None, typer.Option("--image", help="A picture; may be given several times.")] = None,
    audio: Annotated[
        list[Path] | None, typer.Option("--audio", help="A recording; may be given several times.")
    ] = None,
    route: Annotated[str, typer.Option(help="auto, none, or an adapter such as vision or speech.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Show adapter, projectors, rotary regime and token ranges of a prompt.

    Example: modalora route explain nano "What is this?" --image scene.png --audio seven.wav
    """
    import modalora
    from modalora.assistant import question_messages

    assistant = modalora.load(model)
    messages = question_messages(question, list(image or []), list(audio or []))
    record = assistant.explain(assistant.processor([messages], route=route))[0]
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
    else:
        print("\n".join(lines(record)))


def lines(record: dict[str, Any]) -> list[str]:
    """Return a route record as lines for people."""
    adapter = (
        f"{record['adapter']} (scale {record['scale']})" if record["adapter"] else "none: the frozen decoder alone"
    )
    shown = [
        f"media      {' + '.join(record['modalities'])}",
        f"adapter    {adapter}",
        f"projectors {', '.join(f'{kind} -> {branch}' for kind, branch in record['projectors'].items()) or '-'}",
        f"rope       {record['rope']}",
        f"tokens     {record['tokens']}",
    ]
    for span in record["spans"]:
        what = repr(span["text"]) if "text" in span else f"{span['stop'] - span['start']} tokens"
        shown.append(f"  {span['start']:>5} - {span['stop'] - 1:<5} {span['kind']:<8} {what}")
    return shown
