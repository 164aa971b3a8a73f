"""Processes that measure and make the rows of a mixture ahead."""

from __future__ import annotations

import pickle
import signal
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, cast

import numpy as np
import torch

from modalora import modality
from modalora.config import SourceConfig
from modalora.data.reader import Made, Name, Reader, open_reader
from modalora.data.sources import Context
from modalora.errors import ConfigError, TrainingError
from modalora.processing.processor import Row

WORKER_ENDED = TrainingError(
    "a worker that prepares rows ended by itself, most likely for want of memory; set fewer workers, or smaller media; "
    "a script of your own must train under `if __name__ == '__main__':`, since workers run it too"
)
_READER: list[Reader] = []  # of a worker process


def start_workers(context: Context, sources: Sequence[SourceConfig], seed: int, count: int) -> ProcessPoolExecutor:
    """Start so many processes that open the sources of a mixture.

    Raises ConfigError when a modality's functions cannot be told to another process.
    """
    try:
        told = pickle.dumps((context, tuple(sources), seed))
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise ConfigError(
            f"workers={count}: what reads the rows cannot be sent to other processes ({error}); a modality's features "
            "and count must be functions at the top of its file, or set workers: 0"
        ) from None
    # a file, as Python waits for ever where a process ends before it has read more than a pipe holds
    file = NamedTemporaryFile(prefix="modalora-workers-")  # noqa: SIM115  open as long as the workers
    file.write(told)
    file.flush()
    workers = ProcessPoolExecutor(
        count,
        mp_context=get_context("spawn"),  # a fork would inherit torch's threads in an unknown state
        initializer=_begin,
        initargs=(modality.files(), Path(file.name)),
    )
    weakref.finalize(workers, file.close)
    return workers


def _begin(files: Sequence[Path], told: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    for file in files:  # before what is told names their functions
        modality.load_file(file)
    _READER.append(open_reader(*pickle.loads(told.read_bytes())))  # noqa: S301  (from the main process)


def _leave_with_parent() -> None:
    """End this worker when the main process was killed and cannot tell it to."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGKILL)


def look_there(name: Name) -> Any:
    """`Reader.look` in a worker; `landed` reads what comes back."""
    return _shipped(_READER[0].look(name))


def make_there(name: Name) -> Any:
    """`Reader.make` in a worker; `landed` reads what comes back."""
    return _shipped(_READER[0].make(name))


def _shipped(made: int | Made) -> Any:
    """Turn tensors into arrays: between processes torch would send tensors as open files, of which there are few."""
    if isinstance(made, Row):
        made.media = [
            item._replace(features=cast(Any, {name: value.numpy() for name, value in item.features.items()}))
            for item in made.media
        ]
    return made


def landed(made: Any) -> int | Made:
    """Return what a worker sent, arrays as tensors again."""
    if isinstance(made, Row):
        made.media = [
            item._replace(features={name: torch.from_numpy(np.asarray(value)) for name, value in item.features.items()})
            for item in made.media
        ]
    return made
