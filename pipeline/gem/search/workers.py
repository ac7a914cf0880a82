"""Worker processes of one machine, with one thread each.

They are forked, so that they share the memory of the loaded cohort. Therefore the parent must not
open a database before: two processes cannot use one connection.
"""

import gc
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import wait

import torch
from threadpoolctl import threadpool_limits

from pipeline.gem.common.errors import StoppedError, exit_with
from pipeline.gem.common.processes import StopSignal, end_with_parent

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.5


def prepare_to_fork() -> None:
    """Call this before any computation. A fork would lose the threads of a thread pool."""
    torch.set_num_threads(1)


class Workers:
    """A context that starts `number` processes. No worker outlives its parent."""

    def __init__(self, number: int, work: Callable[[int, StopSignal], None]):
        """`work` receives the number of its process, from 0."""
        # A garbage collection would write to, and so copy, the pages of all inherited objects.
        gc.freeze()
        context = multiprocessing.get_context("fork")
        self._processes = [
            context.Process(target=_run, args=(work, position)) for position in range(number)
        ]

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

    def wait(self, stop: StopSignal) -> None:
        """Waits until all workers ended. Exits with the code of a worker that failed.

        Raises:
            StoppedError: this process was told to stop, or all workers were killed.
        """
        running = {process.sentinel: process for process in self._processes}
        while running:
            stop.check()
            for sentinel in wait(list(running), timeout=_POLL_INTERVAL_S):
                process = running.pop(sentinel)
                process.join()
                self._report(process.exitcode, process.pid)
        if all(process.exitcode for process in self._processes):
            raise StoppedError("every worker was killed; is there enough memory?")

    def _report(self, code: int, pid: int) -> None:
        if code < 0:
            name = signal.Signals(-code).name
            logger.warning("worker %d was ended by %s; its trial is run again", pid, name)
        elif code not in (0, StoppedError.exit_code):
            sys.exit(code)  # the worker has printed the reason


def _run(work: Callable[[int, StopSignal], None], position: int) -> None:
    with StopSignal() as stop, threadpool_limits(1):
        end_with_parent()
        try:
            exit_with(lambda: work(position, stop), quiet=(StoppedError,))
        finally:
            sys.stdout.flush()
