"""SIGINT and SIGTERM during training: asked once, it saves and ends; at the second Ctrl-C it ends at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state.

    number: the signal. A process that was told to end by SIGTERM and did so exits with 0, one that was broken off by
    Ctrl-C with 130.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 0 if number == signal.SIGTERM else 128 + signal.SIGINT


class Asked(KeyboardInterrupt):
    """A signal came while work was done that may be thrown away."""


class Stop:
    """Listens to SIGINT and SIGTERM while it is entered.

    asked: the signal that came, or 0. breakable: whether `Asked` is raised where the program stands, so that neither a
    long step nor a wait for data holds up the end; elsewhere a signal is only remembered.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.breakable = False

    def __enter__(self) -> Stop:
        # elsewhere a launcher that runs this in a thread of its own, as Ray does, has the signals
        heard = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
        self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def breaking(self, may: bool = True) -> Iterator[None]:
        """Let what is done inside be broken off by `Asked`, if it may be."""
        self.breakable = may
        try:
            yield
        finally:
            self.breakable = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one is the system's
            raise KeyboardInterrupt("stopped at once; the state saved last is whole, the same command goes on from it")
        self.asked = self.asked or number
        if self.breakable:
            raise Asked
