"""`modalora ask`: one answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from modalora.cli.loading import Adapters, MediaFiles, ModalityFiles, media_by_name, open_model, typed


def ask(
    model: Annotated[str, typer.Argument(help="A model folder, or a bundled model such as nano.")],
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    image: Annotated[list[Path] | None, typer.Option("--image", help="A picture; may be given several times.")] = None,
    audio: Annotated[
        list[Path] | None, typer.Option("--audio", help="A recording; may be given several times.")
    ] = None,
    media: MediaFiles = None,
    adapter: Adapters = None,
    modality_file: ModalityFiles = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k")] = 0,
    min_p: Annotated[float, typer.Option("--min-p")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same answer.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may be given several times.")
    ] = None,
    route: Annotated[str, typer.Option(help="auto, none, or an adapter such as vision or speech.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as stored.")] = "auto",
    rope: Annotated[str, typer.Option(help="Rotary table: reference, long or short.")] = "reference",
    switch: Annotated[
        str, typer.Option(help="Long rotary table: at the crossing, or planned from prompt and max-tokens.")
    ] = "crossing",
    pack: Annotated[bool, typer.Option("--pack", help="Spend seconds to decode bf16 twice as fast on a CPU.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The question is a whole prompt, control tokens and all.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print text, tokens, finish_reason, route, usage, seconds.")
    ] = False,
) -> None:
    """Answer one question, with pictures and recordings if you like.

    Example: modalora ask nano "How many circles are there?" --image scene.png
    """
    text = typed(question, raw=raw)
    answer = open_model(model, adapter, modality_file, dtype=dtype, rope=cast(Any, rope), pack=pack).ask(
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
    print(json.dumps(asdict(answer), ensure_ascii=False) if as_json else answer.text)
