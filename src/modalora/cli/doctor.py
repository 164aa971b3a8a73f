"""`modalora doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import typer

from modalora.cli import options
from modalora.cli.words import to_json
from modalora.errors import ModaloraError


@dataclass
class Check:
    """One finding; mend is the command or step that helps, empty when all is well."""

    name: str
    ok: bool
    detail: str
    mend: str = ""
    needed: bool = True


def doctor(as_json: options.Json = False) -> None:
    """Check Python, torch, decoders, optional programs and the bundled model; say how to mend what is missing.

    Example: modalora doctor
    """
    found = _checks()
    if as_json:
        print(to_json([vars(check) for check in found]))
    else:
        for check in found:
            mark = "ok  " if check.ok else "miss" if check.needed else "opt."
            print(f"{mark} {check.name:<16} {check.detail}" + (f"\n       mend: {check.mend}" if check.mend else ""))
    if any(check.needed and not check.ok for check in found):
        raise typer.Exit(1)


def _checks() -> list[Check]:
    """Look at this machine."""
    import torch

    found = [
        Check(
            "python",
            sys.version_info >= (3, 11),
            platform.python_version(),
            "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer",
        ),
        Check("cpu", True, _cpu()),
    ]
    for package in ("torch", "tokenizers", "safetensors", "numpy", "pillow", "soundfile", "soxr"):
        found.append(_package(package, "pip install modalora"))
    for package, extra in (("pyarrow", "train"), ("matplotlib", "train")):
        found.append(_package(package, f"pip install -e '.[{extra}]' in your clone", needed=False))
    gpu = torch.cuda.is_available()
    found.append(
        Check("cuda", gpu, torch.cuda.get_device_name() if gpu else "no CUDA device; the CPU is used", needed=False)
    )
    found.append(_formats())
    espeak = shutil.which("espeak-ng")
    mend = "" if espeak else "install espeak-ng with your system's package manager (only training nano needs it)"
    found.append(Check("espeak-ng", bool(espeak), espeak or "not found", mend, needed=False))
    found.append(_bundled())
    return found


def _cpu() -> str:
    import torch

    from modalora.checkpoint.preserve import device_name
    from modalora.nn.products import gains

    name = device_name(torch.device("cpu"))
    by = "; float32 products by oneDNN, but for single tokens" if gains() else ""
    return f"{name}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads{by}"


def _package(name: str, mend: str, *, needed: bool = True) -> Check:
    try:
        return Check(name, True, version(name), needed=needed)
    except PackageNotFoundError:
        return Check(name, False, "not installed", mend, needed)


def _formats() -> Check:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile itself is missing
        return Check(
            "sound formats", False, f"soundfile does not load: {error}", "pip install --force-reinstall soundfile"
        )
    wanted = {"WAV", "FLAC", "OGG", "MP3"}
    have = wanted & set(soundfile.available_formats())
    mend = "" if have == wanted else "pip install --upgrade soundfile"
    return Check("sound formats", have == wanted, ", ".join(sorted(have)), mend)


def _bundled() -> Check:
    from modalora.checkpoint.card import CONFIG, TOKENIZER, WEIGHTS
    from modalora.checkpoint.files import check_manifest
    from modalora.checkpoint.find import find_model

    try:
        folder = find_model("nano")
        check_manifest(folder, (CONFIG, WEIGHTS, TOKENIZER))
    except ModaloraError as error:
        return Check("nano", False, str(error), "pip install --force-reinstall modalora")
    return Check("nano", True, "bundled model is whole")
