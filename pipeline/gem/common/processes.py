"""SIGTERM and SIGINT as an exception, only at moments that can bear one; and a process that ends when its parent is gone."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from pipeline.gem.common.errors import StoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK = 1.0  # seconds between two looks at the parent
_SHELLS = ("sh", "ash", "bash", "dash", "ksh", "zsh")


class StopSignal:
    """Notes the first of the signals; StoppedError is raised within `allowed()`, at its ends, and by `check()`."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._open = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.signal = self.signal or signal.Signals(number).name
        if self._open:
            self._open = False
            self.check()

    def check(self) -> None:
        if self.signal:
            raise StoppedError(f"by {self.signal}")

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Long work that may be left anywhere."""
        with self._turned(True):
            yield

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within `allowed()`: work to be finished first, as a record in a database."""
        with self._turned(False):
            yield

    @contextmanager
    def _turned(self, to: bool) -> Iterator[None]:
        before = self._open
        self.check()
        try:
            self._open = to
            yield
        finally:
            self._open = before
        self.check()


def end_with_parent() -> None:
    """Sends SIGTERM to this process when the one that started it is gone: whoever waited for its results does no longer."""
    started_by = _started_by()

    def watch() -> None:
        while _started_by() == started_by:
            time.sleep(_LOOK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _started_by() -> list[int]:
    """The parent; and of a shell, which outlives whoever had it run a command, the parent too."""
    found, process = [], psutil.Process()
    with suppress(psutil.Error):
        while (process := process.parent()) is not None:
            found.append(process.pid)
            if process.name() not in _SHELLS:
                break
    return found
