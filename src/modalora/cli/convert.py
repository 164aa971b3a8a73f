"""`modalora convert`: a model folder in another published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modalora.cli import options
from modalora.cli.loading import load_files


def convert(
    context: typer.Context,
    source: options.Model,
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    layout: Annotated[str, typer.Option(help="modalora, phi3, phi3small, phi4mm or phi4_multimodal.")],
    modality_file: options.ModalityFiles = None,
    shard_gb: Annotated[float, typer.Option("--shard-gb", help="Most gigabytes of one weights file.")] = 5.0,
) -> None:
    """Rewrite a model in another layout; every tensor keeps its bits, and none is left out.

    Example: modalora convert Phi-4-multimodal-instruct phi4-native --layout phi4_multimodal
    """
    from modalora.checkpoint.find import find_model
    from modalora.checkpoint.write import convert as rewrite
    from modalora.errors import ConfigError

    if not 0 < shard_gb < 1e6:
        raise ConfigError(f"--shard-gb {shard_gb:g} must be above 0 and below a million; 5 works")
    if layout == "modalora" and options.given(context, "shard_gb"):
        raise ConfigError("--shard-gb: the layout modalora is one weights file; leave it out, or name another --layout")
    load_files(modality_file)
    found = rewrite(find_model(source), target, layout, shard_bytes=int(shard_gb * 1e9))
    print(f"wrote {target}: layout {layout}, {found['tensors']:,} tensors, {found['parameters']:,} parameters")
    for name, lora in found["adapters"].items():
        print(f"adapter {name}: rank {lora['r']}")
