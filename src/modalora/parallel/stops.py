"""What a process and the launcher that started it tell each other by files; no torch is loaded for it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # the interface of processes on one machine
STORE = "MODALORA_STORE"  # a file by which the processes of one machine find each other


def is_one_of_many() -> bool:
    """Tell whether a launcher (torchrun, Slurm through torchrun, Ray) started this process as one of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_first() -> bool:
    """Tell whether this process is the one that speaks: the first of several, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def told(store: Path, rank: int) -> str:
    """Return what a process last told its launcher: "training", "stopped", or nothing."""
    path = _file(store, rank)
    return path.read_text() if path.exists() else ""


def tell_training() -> None:
    """Tell the launcher, if there is one, that from now on this process has work to lose."""
    _tell("training")


def tell_stopped() -> None:
    """Tell the launcher, if there is one, that this process has saved what there was to save."""
    _tell("stopped")


def is_said(line: str) -> bool:
    """Tell whether another process of this launcher has asked so of the same line and says it: many fail alike."""
    if STORE in os.environ and is_one_of_many():
        own = Path(os.environ[STORE]).with_name(f"said-{hashlib.sha256(line.encode()).hexdigest()}")
        with suppress(FileNotFoundError):  # the launcher is gone
            try:
                own.touch(exist_ok=False)
            except FileExistsError:
                return True
    return False


def end_with_launcher() -> None:
    """Let the system end this process as SIGTERM does when the launcher is killed and cannot tell it to (Linux)."""
    if STORE in os.environ and is_one_of_many() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _tell(what: str) -> None:
    if STORE in os.environ and is_one_of_many():
        _file(Path(os.environ[STORE]), int(os.environ["RANK"])).write_text(what)


def _file(store: Path, rank: int) -> Path:
    return store.with_name(f"told-{rank}")
