"""`modalora adapter`: LoRA folders looked at, checked, added together and merged."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from modalora.cli import options
from modalora.cli.loading import load_files, open_model
from modalora.cli.words import to_json

adapters = typer.Typer(help="LoRA adapters: new, list, verify, compose, merge.", no_args_is_help=True)


@adapters.command()
def new(
    modality: Annotated[str, typer.Option("--modality", help="Name of the new modality, such as time_series.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; modalora-NAME unless given.")] = None,
) -> None:
    """Write a small package that adds a modality: one module, a recipe, a test, a model card. It works as it stands.

    Example: modalora adapter new --modality time_series
    """
    from modalora.scaffold import new_package

    folder = out or Path(f"modalora-{modality.replace('_', '-')}")
    print(f"wrote {folder}: {', '.join(new_package(modality, folder))}")
    where, recipe = shlex.quote(str(folder)), shlex.quote(str(folder / "recipe.yaml"))
    print(f"next: pip install -e {where} && modalora train {recipe}")
    print("then replace what is marked CHANGE with your own")


@adapters.command("list")
def list_adapters(
    model: options.Model, modality_file: options.ModalityFiles = None, as_json: options.Json = False
) -> None:
    """List a model's adapters with their sizes.

    Example: modalora adapter list nano
    """
    from modalora.checkpoint.find import find_model
    from modalora.checkpoint.store import describe

    load_files(modality_file)
    found = describe(find_model(model))["adapters"]
    if as_json:
        print(to_json(found))
        return
    for name, lora in found.items():
        where = ", ".join(lora["target_modules"]) or "every Linear of the decoder"
        print(f"{name}: rank {lora['r']}, alpha {lora['lora_alpha']:g}, on {where}")
    if not found:
        print("no adapters")


@adapters.command()
def verify(
    model: options.Model,
    folder: Annotated[
        Path | None, typer.Argument(help="A PEFT folder; without one the model's own certificate.")
    ] = None,
    modality_file: options.ModalityFiles = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Load an adapter and tell what was found: tensors, base, idle Linears, which logits change and which do not.

    Where training left a certificate beside the adapter or the model, every tensor that was frozen is compared with
    it: one bit that differs ends with an error that names the tensor. So are the logits of fixed texts, where the
    certificate is of this version of torch and this kind of processor, or of GPU with --device cuda.

    Example: modalora adapter verify nano my-lora
    """
    from modalora.assistant import check_device
    from modalora.checkpoint.find import find_model
    from modalora.checkpoint.verify import verify_base

    load_files(modality_file)
    check_device(device)
    preserved = verify_base(find_model(model), folder, device)
    if folder is None:
        print(to_json({"preserved": preserved}) if as_json else f"base       {preserved}")
        return
    assistant = open_model(model, device=device)
    probe = "The quick brown fox jumps over the lazy dog."
    before = assistant.logits(probe)
    found = asdict(assistant.load_adapter(folder, "verified"))
    found["text_bits_changed"] = int((before != assistant.logits(probe)).sum())
    found["preserved"] = preserved
    if as_json:
        print(to_json(found))
        return
    used, linears = found["linears"]
    named = f" (it names {found['base']})" if found["base"] else ""
    base = "the one it was trained on" if found["matched"] else f"the adapter does not tell{named}"
    idle = found["zero"]
    print(f"tensors    {found['consumed']} used, none missing, none left over; {used} of {linears} Linears")
    print(f"modules    {', '.join(found['modules']) or 'none'} come along")
    print(f"preserved  {preserved}")
    print(f"base       {base}; this model has the fingerprint {found['fingerprint']}")
    print(f"idle       {len(idle)} Linears that it leaves as they are{': ' + idle[0] if idle else ''}")
    print(f"logits     change by up to {found['logit_change']:.3g} on a probe where the adapter is on")
    print(f"text       {found['text_bits_changed']} of {before.numel():,} logits change where it is off")


@adapters.command()
def compose(
    model: options.Model,
    route: Annotated[str, typer.Argument(help="A weighted sum, such as vision+mine@0.7.")],
    target: Annotated[Path, typer.Argument(help="The PEFT folder to write; it must not exist.")],
    adapter: options.Adapters = None,
    modality_file: options.ModalityFiles = None,
) -> None:
    """Write one adapter that is the sum of several, exactly: their ranks side by side.

    Example: modalora adapter compose nano vision+mine@0.7 both --adapter mine=my-lora
    """
    from modalora.checkpoint.adapters import save_adapter
    from modalora.checkpoint.card import read_card
    from modalora.checkpoint.sums import compose as add_up
    from modalora.contracts import terms
    from modalora.modality import brought_by

    assistant = open_model(model, adapter, modality_file)
    taken = assistant.model.adapters
    name = next(name for name in (f"sum-{number}" for number in range(len(taken) + 1)) if name not in taken)
    config = add_up(assistant.model, route, name)
    base = assistant.folder
    if base and read_card(base, check=False).layout == "modalora":  # PEFT cannot open it
        base = None
    save_adapter(assistant.model, name, target, base=base)
    print(f"wrote {target}: {route} as one adapter of rank {config.r}")
    folders = dict(one.split("=", 1) for one in adapter or [])
    for part, _ in terms(route):
        for kind in brought_by(assistant.model.config, part):
            print(f"the encoder of {kind} stays in {folders.get(part, model)}: rows with {kind} need that beside it")


@adapters.command()
def merge(
    model: options.Model,
    route: Annotated[str, typer.Argument(help="An adapter or a weighted sum, such as mine@0.7.")],
    target: Annotated[Path, typer.Argument(help="The model folder to write; it must not exist.")],
    adapter: options.Adapters = None,
    modality_file: options.ModalityFiles = None,
    layout: Annotated[str, typer.Option(help="Layout of the result.")] = "modalora",
) -> None:
    """Add an adapter to the decoder's own weights, for good; the model's other adapters are left out.

    Example: modalora adapter merge nano mine merged --adapter mine=my-lora
    """
    from modalora.checkpoint.sums import merge as add_for_good
    from modalora.contracts import terms

    assistant = open_model(model, adapter, modality_file)
    dropped = set(assistant.model.adapters) - {name for name, _ in terms(route)}
    found = add_for_good(assistant.model, route)
    assistant.save(target, layout)
    kind = str(assistant.model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    print(f"wrote {target}: {route} merged into {found.linears} Linears")
    print(f"rounding to {kind} loses {found.error:.2%} of the change (worst: {found.worst}, {found.worst_error:.2%})")
    if dropped:
        print(f"left out, as they were trained on the decoder as it was: {', '.join(sorted(dropped))}")
    if media := sorted(assistant.model.config.modalities):
        print(f"no adapter is left for {', '.join(media)}: ask about them with --route none")
