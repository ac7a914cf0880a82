"""One fit per training seed: side by side in processes of their own where there are cores, one after another where not.

Each fit has `train.threads` threads either way, so that where it ran does not change its bits.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Empty, Queue

import torch

from pipeline.gem.common.config import Params
from pipeline.gem.common.processes import end_with_parent
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import EpochMetrics, FitResult, fit

_PATIENCE = 0.2  # seconds between two looks at whether a process has ended


def fit_seeds(
    data: TrainingData,
    params: Params,
    folder: Path,
    report: Callable[[int, EpochMetrics], None],
    checkpoints: Mapping[int, Checkpoint],
) -> list[FitResult]:
    """The fits of `train.seeds` in their order; `report` sees (seed, epoch) as they come. DivergedError as in `fit`.

    `data` is what `TrainingData.load` makes of the cohort in `folder`: other processes load it again. `checkpoints` by seed.
    """
    seeds, device = params.train.seeds, data.train.expression.device
    processes = min(len(seeds), max(1, (os.cpu_count() or 1) // params.train.threads))
    if processes == 1 or device.type != "cpu":
        return [
            fit(
                data,
                params,
                seed,
                lambda epoch, seed=seed: report(seed, epoch),
                checkpoints.get(seed),
            )
            for seed in seeds
        ]
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(_as_helper)
    with (
        manager,
        ProcessPoolExecutor(processes, mp_context=context, initializer=_as_helper) as pool,
    ):
        epochs = manager.Queue()
        running = [
            pool.submit(_fit_elsewhere, folder, params, seed, epochs, checkpoints.get(seed))
            for seed in seeds
        ]
        try:
            _relay(epochs, running, report)
        except BaseException:
            # A fit that cannot tell of its epoch ends: it is not waited for.
            pool.shutdown(wait=False, cancel_futures=True)
            manager.shutdown()
            raise
        return [one.result() for one in running]


def _as_helper() -> None:
    """Ctrl-C is for the parent to answer; and no fit goes on without it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _fit_elsewhere(
    folder: Path, params: Params, seed: int, epochs: Queue, checkpoint: Checkpoint | None
) -> FitResult:
    data = TrainingData.load(Cohort(folder), torch.device("cpu"), params.model.counted)
    return fit(data, params, seed, lambda epoch: epochs.put((seed, epoch)), checkpoint)


def _relay(
    epochs: Queue, running: list[Future], report: Callable[[int, EpochMetrics], None]
) -> None:
    """Reports until every process has ended, in the order in which epochs end."""
    while True:
        ended = all(one.done() for one in running)
        try:
            while True:
                report(*epochs.get(timeout=0 if ended else _PATIENCE))
        except Empty:
            if ended:
                return
