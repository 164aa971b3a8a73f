"""The states of a training run on disk, RUN/resume/STEP: each is whole, or it is not there.

A state is written into a draft, hashed, synced and renamed; older ones go only then. Which is the newest is found by
checking manifests, not read from a pointer that could be torn. One process at a time may write into a run.
"""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from modalora.checkpoint.files import check_manifest, seal, sync
from modalora.disk import is_draft
from modalora.errors import CheckpointError, ConfigError

STATE = "state.json"
_HALF = re.compile(r"\.\d{8}\.(draft|old)")  # a state being written or removed


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run for this process alone and remove the drafts of killed ones; the system lets go when the process ends.

    Raises ConfigError when another process holds it. The lock is POSIX's, which children do not inherit: one that
    outlives a killed run does not block the next.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"another process trains into {run}; wait for it, or give another output") from None
        half = [path for path in (run / "resume").glob(".*") if _HALF.fullmatch(path.name)]
        for path in (*filter(is_draft, run.glob(".*")), *half):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield


def states(run: Path) -> list[Path]:
    """Return the state folders of a run, oldest first."""
    folder = run / "resume"
    return sorted(path for path in folder.glob("*") if re.fullmatch(r"\d{8}", path.name)) if folder.is_dir() else []


def newest(run: Path, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """Return the newest whole state of a run, or None when there are no states.

    One that is not whole is passed over for the one before, and `say` is told. Raises CheckpointError when none is.
    """
    problems: list[str] = []
    for folder in reversed(states(run)):
        try:
            check_manifest(folder, [STATE])
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            say(f"passed over a state that is not whole, for {folder.name}: {problem}")
        return folder
    if problems:
        raise CheckpointError(
            f"no state under {run / 'resume'} is whole: {problems[0]}; remove the folder to start anew"
        )
    return None


def draft_of(run: Path, step: int) -> Path:
    """Return where the state of a step is written before it is whole; the same on every rank."""
    return run / "resume" / f".{step:08d}.draft"


def begin(draft: Path) -> None:
    """Make an empty draft."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)


def commit(draft: Path) -> Path:
    """Make a filled draft the state of its step; return its folder."""
    seal(draft)
    folder = draft.with_name(draft.name[1:9])
    if folder.exists():  # passed over when the run resumed, as it was not whole
        _remove(folder)
    draft.rename(folder)
    sync(folder.parent)
    return folder


def retire(folder: Path, keep: int) -> None:
    """Keep a state that was just written and the newest before it, `keep` in all; remove every other.

    Later ones go too: the run did not resume from them, so they were not whole.
    """
    before = [path for path in states(folder.parents[1]) if path.name < folder.name]
    kept = {folder, *before[max(0, len(before) - keep + 1) :]}
    for path in states(folder.parents[1]):
        if path not in kept:
            _remove(path)


def _remove(folder: Path) -> None:
    """Remove a state; killed on the way, what is left does not look like one."""
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)
