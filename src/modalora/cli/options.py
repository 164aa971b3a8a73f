"""The options that several verbs have, each once, so that they are spelled and explained alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A model folder, or a bundled model such as nano.")]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", help="NAME=FOLDER, a PEFT folder to load first; may be given again.")
]
ModalityFiles = Annotated[
    list[Path] | None,
    typer.Option("--modality-file", help="A Python file that sets MODALITY; it is run. Installed ones need none."),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as stored.")]
Device = Annotated[str, typer.Option(help="A torch device to run on: cpu, cuda, cuda:1.")]

Images = Annotated[list[Path] | None, typer.Option("--image", help="A picture; may be given several times.")]
Sounds = Annotated[list[Path] | None, typer.Option("--audio", help="A recording; may be given several times.")]
MediaFiles = Annotated[
    list[str] | None, typer.Option("--media", help="NAME=FILE, for a modality besides image and audio; again for more.")
]
Route = Annotated[str, typer.Option(help="auto, none, or an adapter such as vision or speech.")]
Rope = Annotated[str, typer.Option(help="Rotary table: reference, long or short.")]
Switch = Annotated[str, typer.Option(help="Long rotary table: at the crossing, or planned from prompt and max-tokens.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Most tokens of the answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]

RowForm = Annotated[
    str,
    typer.Option("--form", help="The form of the rows of a file, e.g. alpaca; auto: each by its keys (docs/data.md)."),
]
RowNames = Annotated[
    str, typer.Option("--rename", help="Names of the fields of rows: '{question: instruction, answer: output}'.")
]
RowTags = Annotated[str, typer.Option("--tags", help="false: <image> and <audio> in the texts of rows are mere text.")]
MediaRoot = Annotated[
    Path | None, typer.Option(help="The folder that media paths of rows start from and may not leave; else the file's.")
]

Gpus = Annotated[int, typer.Option(min=0, help="GPUs of this machine to work on, one process each.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes on the CPU, for trying many-process runs.")]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def given(context: typer.Context, *names: str) -> list[str]:
    """Return which of these options the command line has, as they are written there."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        f"--{name.replace('_', '-')}"
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    ]
