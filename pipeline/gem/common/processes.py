"""Processes: one at a time per task, stop signals as exceptions, and the end of the parent."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import psutil

from pipeline.gem.common.errors import InputError, StoppedError

# A stage whose `dvc repro` was killed needs some seconds to notice it and to end.
LOCK_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 1.0  # between two checks of the parent

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SHELLS = ("sh", "ash", "bash", "dash", "ksh", "zsh")


@contextmanager
def exclusive(task: str, message: str) -> Iterator[None]:
    """Runs the body while no other process in this folder runs the same task.

    Otherwise InputError with `message`, where `{process}` becomes the id of the other process.
    """
    Path(".gem").mkdir(exist_ok=True)
    pid_file = Path(f".gem/{task}.pid")
    try:
        with filelock.FileLock(f".gem/{task}.lock", timeout=LOCK_TIMEOUT_S):
            pid_file.write_text(str(os.getpid()))
            yield
    except filelock.Timeout:
        raise InputError(message.format(process=pid_file.read_text())) from None


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a StoppedError at points that can handle it.

    It is raised within `interruptible()`, at both of its ends, and by `check()`.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._interruptible = False
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        self._handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        self.signal = self.signal or signal.Signals(number).name
        if self._interruptible:
            self._interruptible = False
            self.check()

    def check(self) -> None:
        """StoppedError if a signal has arrived."""
        if self.signal:
            raise StoppedError(f"by {self.signal}")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Long work that may stop anywhere."""
        with self._set_interruptible(True):
            yield

    @contextmanager
    def uninterruptible(self) -> Iterator[None]:
        """Within `interruptible()`: work to finish first, such as a write to a database."""
        with self._set_interruptible(False):
            yield

    @contextmanager
    def _set_interruptible(self, value: bool) -> Iterator[None]:
        before = self._interruptible
        self.check()
        try:
            self._interruptible = value
            yield
        finally:
            self._interruptible = before
        self.check()


def end_with_parent() -> None:
    """Sends SIGTERM to this process once its parent has ended: nobody waits for its results."""
    parents = _parents()

    def watch() -> None:
        while _parents() == parents:
            time.sleep(POLL_INTERVAL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _parents() -> list[int]:
    """Ids of the parent and, for a shell, of its parent too: a shell outlives its own parent."""
    parents, process = [], psutil.Process()
    with suppress(psutil.Error):
        while (process := process.parent()) is not None:
            parents.append(process.pid)
            if process.name() not in _SHELLS:
                break
    return parents
