"""`modalora ask`: one answer, or one for every row of a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from modalora.cli import options
from modalora.cli.loading import check_used, media_by_name, open_model, typed
from modalora.cli.words import to_json


def ask(
    context: typer.Context,
    model: options.Model,
    question: Annotated[str | None, typer.Argument(help="The question; - reads it from standard input.")] = None,
    image: options.Images = None,
    audio: options.Sounds = None,
    media: options.MediaFiles = None,
    adapter: options.Adapters = None,
    modality_file: options.ModalityFiles = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_p: Annotated[float, typer.Option("--top-p")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k")] = 0,
    min_p: Annotated[float, typer.Option("--min-p")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty")] = 1.0,
    seed: options.Seed = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may be given several times.")
    ] = None,
    route: options.Route = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    rope: options.Rope = "reference",
    switch: options.Switch = "crossing",
    pack: Annotated[bool, typer.Option("--pack", help="Spend seconds to decode bf16 twice as fast on a CPU.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The question is a whole prompt, control tokens and all.")] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print text, tokens, finish_reason, route, usage, seconds, content, tool_calls."),
    ] = False,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows",
            help="Ask every row of a data file instead, row N by seed + N - 1; a JSON line of text, route, usage each.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where the lines of --rows go; a file with some is gone on with.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows answered at a time.")] = 16,
    media_root: options.MediaRoot = None,
    form: options.RowForm = "auto",
    rename: options.RowNames = "{}",
    tags: options.RowTags = "true",
) -> None:
    """Answer one question, with pictures and recordings if you like; or every row of a file.

    Example: modalora ask nano "How many circles are there?" --image scene.png

    Example: modalora ask nano --rows rows.jsonl --output answers.jsonl
    """
    from modalora.cli.rows import Rows, answer_rows, open_answers
    from modalora.data.files import open_records
    from modalora.errors import ConfigError

    given = options.given(context, "rows", "output", "batch", "media_root", "form", "rename", "tags")
    settings: dict[str, Any] = {
        "max_tokens": max_tokens, "route": route, "stop": stop or [], "switch": switch, "temperature": temperature,
        "top_p": top_p, "top_k": top_k, "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "rope": rope, "pack": pack}
    if rows is not None:
        alone = options.given(context, "image", "audio", "media", "raw") + ["--json"] * as_json
        if question is not None or alone:
            raise ConfigError(f"{alone[0] if alone else 'QUESTION'} is for one question; leave it out beside --rows")
        if str(rows) == "-":
            raise ConfigError("--rows - would be standard input, and rows are read more than once; write it to a file")
        told = (model, adapter, modality_file, dtype, rope, media_root, form, rename, tags, settings)
        with TemporaryDirectory() as cache:
            found = Rows(open_records(rows, Path(cache)), media_root or rows.parent, form, rename, tags)
            with open_answers(output, found, told) as answers:
                assistant = open_model(model, adapter, modality_file, **loading)
                check_used(assistant, adapter, route)
                answer_rows(assistant, found, answers, batch, settings)
        if answers.bad:
            raise typer.Exit(1)
        return
    if question is None or given:
        raise ConfigError(f"{given[0]} is for --rows" if given else "give a QUESTION, or --rows FILE with many")
    text = typed(question, raw=raw)
    named = media_by_name(media)
    assistant = open_model(model, adapter, modality_file, **loading)
    kinds = [kind for kind, held in {"image": image, "audio": audio, **named}.items() if held]
    check_used(assistant, adapter, route, kinds)
    answer = assistant.ask(text, raw=raw, image=list(image or []), audio=list(audio or []), media=named, **settings)
    print(to_json(asdict(answer)) if as_json else answer.text)
