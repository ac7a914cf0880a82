"""Stop signals are raised only where they may be; one process per task."""

import os
import signal
import subprocess
import sys

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


def test_a_signal_stops_interruptible_work_at_once():
    with StopSignal() as stop, pytest.raises(StoppedError), stop.interruptible():
        send()
        pytest.fail("not interrupted")


def test_a_signal_waits_for_the_end_of_uninterruptible_work():
    done = []
    with StopSignal() as stop, pytest.raises(StoppedError), stop.interruptible():
        with stop.uninterruptible():
            send()
            done.append("write")
        done.append("after")
    assert done == ["write"]


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


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
        refusal = pytest.raises(InputError, match=f"busy: {other.pid}")
        with refusal, exclusive("train", "busy: {process}"):
            pass
        with exclusive("tune", "another task"):
            pass
        other.stdin.close()
    with exclusive("train", "the lock is free again"):
        pass
