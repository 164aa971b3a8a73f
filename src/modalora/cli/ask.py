"""`modalora ask`: one answer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, cast

import typer

from modalora.cli import options
from modalora.cli.loading import media_by_name, open_model, typed
from modalora.cli.words import to_json


def ask(
    model: options.Model,
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
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
        bool, typer.Option("--json", help="Print text, tokens, finish_reason, route, usage, seconds, tool_calls.")
    ] = False,
) -> None:
    """Answer one question, with pictures and recordings if you like.

    Example: modalora ask nano "How many circles are there?" --image scene.png
    """
    text = typed(question, raw=raw)
    answer = open_model(model, adapter, modality_file, dtype=dtype, device=device, rope=cast(Any, rope), pack=pack).ask(
        text,
        raw=raw,
        image=list(image or []),
        audio=list(audio or []),
        media=media_by_name(media),
        max_tokens=max_tokens,
        route=route,
        stop=stop or [],
        switch=cast(Any, switch),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    print(to_json(asdict(answer)) if as_json else answer.text)
