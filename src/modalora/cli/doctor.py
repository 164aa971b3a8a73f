"""`modalora doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import typer

from modalora.cli import options
from modalora.cli.words import to_json


def doctor(as_json: options.Json = False) -> None:
    """Check Python, torch, decoders, optional programs and the bundled model; say how to mend what is missing.

    Example: modalora doctor
    """
    from modalora.cli.checks import checks

    found = checks()
    if as_json:
        print(to_json([vars(check) for check in found]))
    else:
        for check in found:
            mark = "ok  " if check.ok else "miss" if check.needed else "opt."
            print(f"{mark} {check.name:<16} {check.detail}" + (f"\n       mend: {check.mend}" if check.mend else ""))
    if any(check.needed and not check.ok for check in found):
        raise typer.Exit(1)
