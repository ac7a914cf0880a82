"""Processes of one thread each for the jobs of a benchmark, which end with it."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from threadpoolctl import threadpool_limits

from pipeline.gem.common.errors import StoppedError
from pipeline.gem.common.processes import StopSignal, end_with_parent

_POLL_INTERVAL_S = 0.5

Check = Callable[[], None]  # raises StoppedError after a signal


class Job(Protocol):
    """What a process runs; it is pickled."""

    @property
    def label(self) -> str: ...


AnyJob = TypeVar("AnyJob", bound=Job)


@dataclass(frozen=True)
class Workers:
    """Processes, and the signal that stops them."""

    pool: ProcessPoolExecutor
    stop: StopSignal

    def finished(
        self, run: Callable[[AnyJob, Check], None], jobs: list[AnyJob]
    ) -> Iterator[AnyJob]:
        """The jobs in the order in which they end. The exception of one ends all; StoppedError
        after a signal, or if a process was killed."""
        running = {self.pool.submit(_run, run, job): job for job in jobs}
        while running:
            self.stop.check()
            done, _ = wait(running, _POLL_INTERVAL_S, FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    raise StoppedError(
                        f"{job.label}: its process was killed; is there enough memory?"
                    ) from None
                yield job


@contextmanager
def worker_pool(number: int) -> Iterator[Workers]:
    """`number` processes until the end of the context."""
    # Not forked: the parent has threads, and connections to the tracking store.
    context = multiprocessing.get_context("spawn")
    with StopSignal() as stop:
        pool = ProcessPoolExecutor(number, mp_context=context, initializer=_start_process)
        try:
            yield Workers(pool, stop)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # its job ends at the next step
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_stop = StopSignal()  # of a process of the pool


def _start_process() -> None:
    end_with_parent()
    _stop.__enter__()


def _run(run: Callable[[AnyJob, Check], None], job: AnyJob) -> None:
    with threadpool_limits(1):
        run(job, _stop.check)
