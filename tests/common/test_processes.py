"""Stop signals are raised only where they may be; one process per task."""

import errno
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import filelock
import pytest
from support.settings import ROOT

from pipeline.gem.common import processes
from pipeline.gem.common.errors import InputError, StoppedError
from pipeline.gem.common.processes import StopSignal, exclusive


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_an_exception_at_the_next_check(number):
    with StopSignal() as stop:
        send(number)
        with pytest.raises(StoppedError, match=f"by {signal.Signals(number).name}"):
            stop.check()


def test_a_signal_in_a_destructor_is_not_lost(capfd):
    class Resource:
        def __del__(self):
            send()

    with StopSignal() as stop:
        Resource()
        with pytest.raises(StoppedError):
            stop.check()
    assert capfd.readouterr().err == ""


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_lock_that_the_task_does_not_get_is_no_second_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(filelock.Timeout), exclusive("train", "busy: {process}"):
        raise filelock.Timeout("another.lock")
    with exclusive("train", "the lock is free again"):
        pass


def test_a_second_process_of_a_task_is_an_error_with_the_id_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "LOCK_TIMEOUT_S", 0.1)
    code = (
        "import sys; from pipeline.gem.common.processes import exclusive\n"
        "with exclusive('train', ''): print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with other:
        assert other.stdout.readline() == "locked\n"
        refusal = pytest.raises(InputError, match=f"busy: process {other.pid}$")
        with refusal, exclusive("train", "busy: {process}"):
            pass
        with exclusive("tune", "another task"):
            pass
        other.stdin.close()
    with exclusive("train", "the lock is free again"):
        pass


# A file system without locks: Lustre answers ENOSYS, some NFS ENOLCK.

LOCKED = """
import fcntl, os, sys
from pipeline.gem.common import processes
def flock(*_): raise OSError(int(sys.argv[1]), os.strerror(int(sys.argv[1])))
fcntl.flock = flock
with processes.exclusive('train', ''): print('locked', flush=True); sys.stdin.read()
"""


@pytest.mark.parametrize(
    "number, leftover",
    [
        (errno.ENOSYS, None),
        (errno.ENOLCK, "a lock of an ordinary disk"),
        (errno.EOPNOTSUPP, "a killed process"),
    ],
)
def test_without_locks_of_the_file_system_one_process_runs(tmp_path, monkeypatch, number, leftover):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "LOCK_TIMEOUT_S", 0.1)
    if leftover == "a lock of an ordinary disk":
        with exclusive("train", ""):
            pass
    start = partial(
        subprocess.Popen,
        [sys.executable, "-c", LOCKED, str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if leftover == "a killed process":
        with start() as killed:
            assert killed.stdout.readline() == "locked\n"
            killed.kill()
    with start() as other:
        assert other.stdout.readline() == "locked\n"

        def refuse(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(processes.fcntl, "flock", refuse)
        lease = processes.file_lock(tmp_path / ".gem" / "train.lock", 0)
        with pytest.raises(filelock.Timeout):
            lease.acquire()
        other.stdin.close()
    with exclusive("train", "the lock is free again"):
        pass


def test_a_lock_from_another_machine_is_free_when_nobody_renews_it(tmp_path, monkeypatch):
    """A project that was copied, with .gem, while a stage ran there."""
    monkeypatch.setattr(processes, "_has_locks", lambda _: False)
    monkeypatch.setattr(processes, "LEASE_S", 0.3)
    path = tmp_path / "train.lock"
    with processes.file_lock(path, 0):
        (lease,) = tmp_path.iterdir()
        content = lease.read_bytes().replace(socket.gethostname().encode(), b"elsewhere")
    assert b"elsewhere" in content
    lease.write_bytes(content)
    with pytest.raises(filelock.Timeout), processes.file_lock(path, 0):
        pass
    with processes.file_lock(path, 3):
        pass


@pytest.mark.parametrize(
    "content, name",
    [
        (f"{os.getpid()} {socket.gethostname()}", f"process {os.getpid()}"),
        (f"7 {socket.gethostname()}x", f"process 7 on {socket.gethostname()}x"),
        (f"4194399 {socket.gethostname()}", "another process"),
        ("", "another process"),
        (None, "another process"),
    ],
    # The numbers differ between the processes of pytest-xdist.
    ids=["running", "elsewhere", "ended", "empty", "absent"],
)
def test_the_message_names_only_a_process_that_exists(tmp_path, monkeypatch, content, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "LOCK_TIMEOUT_S", 0)
    with processes.file_lock(Path(".gem/train.lock")):
        if content is not None:
            Path(".gem/train.pid").write_text(content)
        with (
            pytest.raises(InputError, match=f"^busy: {name}$"),
            exclusive("train", "busy: {process}"),
        ):
            pass
