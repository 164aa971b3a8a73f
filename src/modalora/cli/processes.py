"""What `train` and `extend` share: in how many processes they run, and how signals end them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer

from modalora.errors import InputError
from modalora.parallel.stops import end_with_launcher, is_first, is_one_of_many, tell_stopped
from modalora.training.signals import Interrupted

if TYPE_CHECKING:
    from modalora.config import RunConfig

AGAIN_SECONDS = 5.0


def asked_for(gpus: int, processes: int, overrides: Sequence[str] | None) -> tuple[int, list[str]]:
    """Return how many processes --gpus and --processes mean, and the settings with the device. Raises InputError."""
    if gpus and processes > 1:
        raise InputError("--gpus N starts N processes by itself; leave --processes out")
    return max(gpus, processes), [*(overrides or []), *(["device=cuda"] if gpus else [])]


def launch_many(arguments: Sequence[str], count: int, runs: Mapping[str, RunConfig], prefix: str = "") -> bool:
    """Carry out `modalora ARGUMENTS` in so many processes; tell whether it was: not for one, nor within one of many.

    runs: what they will train, by title, refused here where so many cannot; prefix: of its settings among overrides.
    Raises InputError, TrainingError.
    """
    if count == 1 or is_one_of_many():
        return False
    from modalora.parallel.launch import check_processes, launch

    for title, run in runs.items():
        shares = max(1, count // run.mesh.copies)
        if run.accumulate % shares:
            raise InputError(
                f"{title}: accumulate={run.accumulate} micro-batches cannot be shared by {shares} "
                f"{'processes' if run.mesh.copies == 1 else 'groups of processes'}; make it a multiple of it, such as "
                f"{prefix}accumulate={-(-run.accumulate // shares) * shares}"
            )
        check_processes(run, count)
    if code := launch(arguments, count):
        raise typer.Exit(code)
    return True


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Give the exit codes of docs/stopping.md, whether work listens to signals itself and has saved, or nothing does.

    A launcher is told that this process was stopped, and did not fail.
    """
    heard = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored by what runs in the background
        heard.append(signal.SIGINT)
    before = {number: signal.signal(number, _end) for number in heard}
    end_with_launcher()
    try:
        yield
    except KeyboardInterrupt as stopped:  # which typer would end without a word
        tell_stopped()
        if is_first():
            print(f"modalora: {str(stopped) or 'interrupted'}", file=sys.stderr)
        raise typer.Exit(stopped.exit_code if isinstance(stopped, Interrupted) else 130) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


_asked: list[int] = []  # the signals that came


def _end(number: int, frame: FrameType | None) -> None:
    # a library in C may drop the exception, as numpy does where torch imports it: it is raised again until it is heard
    if number != signal.SIGALRM:
        _asked.append(number)
    elif not _asked or isinstance(sys.exc_info()[1], SystemExit | KeyboardInterrupt):
        return  # it is on its way, and what cleans up behind it is left alone
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    if _asked[-1] == signal.SIGINT:
        raise KeyboardInterrupt
    tell_stopped()
    if is_first() and number == signal.SIGTERM:
        print("modalora: ended at once; what was saved is whole", file=sys.stderr)
    raise SystemExit(0)
