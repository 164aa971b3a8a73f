"""`modalora inspect`: what is in a model folder."""

from __future__ import annotations

from modalora.cli import options
from modalora.cli.loading import load_files
from modalora.cli.words import to_json


def inspect(
    model: options.Model,
    modality_file: options.ModalityFiles = None,
    as_json: options.Json = False,
) -> None:
    """Show layout, sizes, parameters by part, adapters, window and integrity; runs no code from the folder.

    Example: modalora inspect nano
    """
    from modalora.checkpoint.find import find_model
    from modalora.checkpoint.store import describe

    load_files(modality_file)
    found = describe(find_model(model))
    if as_json:
        print(to_json(found))
        return
    print(f"{found['folder']}: layout {found['layout']}, {found['bytes']:,} bytes of {', '.join(found['dtypes'])}")
    if len(found["dtypes"]) > 1:
        print(f"runs in    {', '.join(f'{kind} ({part})' for part, kind in found['runs_in'].items())}")
    print(f"integrity  {found['integrity']}")
    print(f"window     {found['window']:,} tokens, vocabulary {found['vocab_size']:,}")
    for name, lora in found["adapters"].items():
        print(f"adapter    {name}: rank {lora['r']}, alpha {lora['lora_alpha']:g}, dropout {lora['lora_dropout']:g}")
    print(f"parameters {found['parameters']:,} in {found['tensors']:,} tensors")
    for part, count in found["parts"].items():
        print(f"  {part:<26} {count:>15,}")
