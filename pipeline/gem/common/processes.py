"""Processes: one at a time per task, stop signals as exceptions, and the end of the parent."""

import fcntl
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import psutil

from pipeline.gem.common.errors import InputError, StoppedError
from pipeline.gem.common.files import write_atomically
from pipeline.gem.common.machine_errors import NO_LOCKS

# A stage whose `dvc repro` was killed needs some time to notice it and to end.
LOCK_TIMEOUT_S = 5.0
LEASE_S = 10.0  # a lock that is a file is renewed three times as often
POLL_INTERVAL_S = 0.2  # between two checks of the parent

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SHELLS = ("sh", "ash", "bash", "dash", "ksh", "zsh")


def file_lock(path: Path, timeout: float = -1, reentrant: bool = False) -> filelock.BaseFileLock:
    """A lock that ends with its process; filelock.Timeout after `timeout` seconds, -1 for never.

    `reentrant`: a process that has the lock may take it again.

    On a file system without locks (some Lustre and NFS) it is a file that its holder renews: it is
    free when its process has ended, or when nobody has renewed it for LEASE_S.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if _has_locks(path.parent):
        return filelock.FileLock(path, timeout, is_singleton=reentrant, fallback_to_soft=False)
    longest = timeout if timeout <= 0 else timeout + LEASE_S
    return filelock.SoftFileLease(
        f"{path}.lease", timeout=longest, is_singleton=reentrant, lease_duration=LEASE_S
    )


def _has_locks(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
    return True


@contextmanager
def exclusive(task: str, message: str) -> Iterator[None]:
    """Runs the body while no other process in this folder runs the same task.

    Otherwise InputError with `message`, where `{process}` becomes `process N`. As a stage of DVC
    the process ends when DVC is killed: nobody waits for its results.
    """
    if "DVC_STAGE" in os.environ:
        end_with_parent()
    holder = Path(f".gem/{task}.pid")
    try:
        lock = file_lock(Path(f".gem/{task}.lock"), LOCK_TIMEOUT_S).acquire()
    except filelock.Timeout:
        raise InputError(message.format(process=_name_of(holder))) from None
    with lock:
        write_atomically(holder, f"{os.getpid()} {socket.gethostname()}".encode())
        yield


def _name_of(holder: Path) -> str:
    """The process in a file of `exclusive`; without a number if it has ended."""
    try:
        process, host = holder.read_text().split()
    except (OSError, ValueError):
        return "another process"
    if host != socket.gethostname():
        return f"process {process} on {host}"
    return f"process {process}" if psutil.pid_exists(int(process)) else "another process"


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a StoppedError at the next `check()`.

    An exception in the signal handler itself could be lost: Python ignores it in a destructor.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        self._handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        self.signal = self.signal or signal.Signals(number).name

    def check(self) -> None:
        """StoppedError if a signal has arrived."""
        if self.signal:
            raise StoppedError(f"by {self.signal}")


def end_with_parent() -> None:
    """Sends SIGTERM to this process once its parent has ended: nobody waits for its results."""
    parents = _parents()

    def watch() -> None:
        while _parents() == parents and not _is_adopted(parents[-1]):
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


def _is_adopted(parent: int) -> bool:
    """Whether `parent` is no ancestor, but the process that got this one when its parent ended,
    for example during the imports. A child is in the session of its parent, unless it leads one of
    its own, as those of torchrun do."""
    if os.getsid(0) == os.getpid():
        return False
    try:
        return os.getsid(parent) != os.getsid(0)
    except ProcessLookupError:
        return True
