"""Worker processes of one machine: forked, so that what was loaded before is in memory once; one thread each.

The parent must not have opened a database before: a connection that two processes share is broken for both.
"""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import wait

from threadpoolctl import threadpool_limits

from pipeline.gem.common.errors import StoppedError, exit_with
from pipeline.gem.common.processes import StopSignal, end_with_parent

_LOOK = 0.5  # seconds between two looks at signals


class Workers:
    """Started by `with`; `wait` ends when all have ended. None outlives the parent."""

    def __init__(self, number: int, work: Callable[[StopSignal], None]):
        # Collecting would write to the pages of every object, and so copy them.
        gc.freeze()
        context = multiprocessing.get_context("fork")
        self._processes = [context.Process(target=_as_worker, args=(work,)) for _ in range(number)]

    def __enter__(self) -> "Workers":
        sys.stdout.flush()
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
        for process in self._processes:
            process.join()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def wait(self, interruption: StopSignal) -> None:
        """StoppedError where this process was told to stop or every worker was killed; exits as a worker that failed."""
        running = list(self._processes)
        while running:
            interruption.check()
            for process in [
                process
                for process in running
                if process.sentinel in wait([one.sentinel for one in running], timeout=_LOOK)
            ]:
                process.join()
                running.remove(process)
                self._report(process.exitcode, process.pid)
        if all(process.exitcode not in (0,) for process in self._processes):
            raise StoppedError("every worker was killed: is there enough memory?")

    def _report(self, code: int, pid: int) -> None:
        if code < 0:
            print(
                f"tune: worker {pid} was ended by {signal.Signals(-code).name}; its trial is run again",
                flush=True,
            )
        elif code not in (0, StoppedError.exit_code):
            sys.exit(code)  # it has said why


def _as_worker(work: Callable[[StopSignal], None]) -> None:
    with StopSignal() as interruption, threadpool_limits(1):
        end_with_parent()
        try:
            exit_with(lambda: work(interruption), quiet=(StoppedError,))
        finally:
            sys.stdout.flush()
