"""One fit per training seed, in parallel processes where there are cores for them, or several GPUs;
of several ranks one after the other, each by all of them.

Each fit has `train.threads` threads either way, so the bits do not depend on where it ran.
"""

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from pipeline.gem.common.capacity import cores
from pipeline.gem.common.config import Params, Train
from pipeline.gem.common.errors import GemError, InputError, StoppedError
from pipeline.gem.common.machine_errors import machine_problem
from pipeline.gem.common.processes import end_with_parent
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.splits import VALIDATIONS
from pipeline.gem.training import distributed
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.expression import memory_for_counts
from pipeline.gem.training.trainer import EpochMetrics, FitResult, fit

_POLL_INTERVAL_S = 0.2

OnEpoch = Callable[[int, EpochMetrics], None]  # seed, epoch


def fit_seeds(
    data: TrainingData,
    params: Params,
    cohort: Cohort,
    on_epoch: OnEpoch,
    checkpoints: Mapping[int, Checkpoint],
    on_step: Callable[[], None] = lambda: None,
) -> list[FitResult]:
    """The fits of `train.seeds` with their refits, in this order. DivergedError as in `fit`.

    `data` is loaded from the cohort; other processes load it again. `checkpoints` are
    by seed. `on_epoch` receives the epochs of all seeds in the order in which they end. `on_step`
    is called before every step, or often while other processes train; its exceptions end the fits.
    """
    seeds, device = params.train.seeds, data.train.expression.device
    limit = parallel_fits(params.train, device)
    if limit > 1:
        jobs = [
            _Job(cohort.folder, params, seed, checkpoints.get(seed), device.type) for seed in seeds
        ]
        return _fit_in_processes(jobs, limit, on_epoch, on_step)
    return [
        fit_and_refit(
            data,
            params,
            cohort,
            seed,
            lambda epoch, seed=seed: on_epoch(seed, epoch),
            checkpoints.get(seed),
            on_step,
        )
        for seed in seeds
    ]


def fit_and_refit(
    data: TrainingData,
    params: Params,
    cohort: Cohort,
    seed: int,
    on_epoch: Callable[[EpochMetrics], None] = lambda epoch: None,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> FitResult:
    """A fit and, if `train.refit` is positive and there are validation samples, its refit."""
    result = fit(data, params, seed, on_epoch, checkpoint, on_step)
    if not params.train.refit or not any(map(cohort.has, VALIDATIONS)):
        return result
    device, gem = data.train.expression.device, result.gem
    memory, with_counts = memory_of_each(params.train, device), gem.params.uses_counts
    visible = TrainingData.load_visible(cohort, gem.metadata, device, with_counts, memory)
    fitted = params.model_copy(update={"model": gem.params})
    of_refit = checkpoint.of_refit() if checkpoint else None
    refit = fit(visible, fitted, seed, on_epoch, of_refit, on_step, start=gem)
    return replace(result, refit=refit)


def parallel_fits(params: Train, device: torch.device) -> int:
    """How many seeds are fitted side by side: as many as cores allow, or one on each GPU."""
    if distributed.size() > 1:
        return 1
    places = cores() // params.threads if device.type == "cpu" else torch.cuda.device_count()
    return min(len(params.seeds), max(1, places))


def processes_of(params: Train, device: torch.device) -> int:
    """The processes of a training on this machine: ranks, or parallel fits and this one."""
    if distributed.size() > 1:
        return distributed.local_size()
    fits = parallel_fits(params, device)
    return fits + (fits > 1)


def memory_of_each(params: Train, device: torch.device) -> float:
    """Bytes for the counts of each process: they share the memory of the machine, not a GPU."""
    sharing = processes_of(params, device) if device.type == "cpu" else 1
    return memory_for_counts(params.memory_share, device, sharing)


@dataclass(frozen=True)
class _Job:
    folder: Path  # of the cohort
    params: Params
    seed: int
    checkpoint: Checkpoint | None
    device: str  # its type


def _fit_in_processes(
    jobs: list[_Job], limit: int, on_epoch: OnEpoch, on_step: Callable[[], None]
) -> list[FitResult]:
    """Runs at most `limit` fits at a time, each in a place (GPU) of its own. All end with the first
    error here; StoppedError if a signal ended one of them."""
    context = multiprocessing.get_context("spawn")
    queue, running, processes, places = list(jobs), {}, [], list(range(limit))
    results: dict[int, FitResult] = {}
    try:
        while queue or running:
            while queue and places:
                job, place = queue.pop(0), places.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run_job, args=(job, place, sender), daemon=True)
                process.start()
                sender.close()  # so that the end of the process ends the connection
                processes.append(process)
                running[receiver] = job.seed, process, place
            on_step()
            for receiver in wait(list(running), _POLL_INTERVAL_S):
                seed, process, place = running[receiver]
                message = _receive(receiver, seed, process)
                if isinstance(message, EpochMetrics):
                    on_epoch(seed, message)
                elif isinstance(message, FitResult):
                    del running[receiver]
                    places.append(place)
                    results[seed] = message
                else:
                    raise message
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return [results[job.seed] for job in jobs]


def _receive(
    receiver: Connection, seed: int, process: BaseProcess
) -> EpochMetrics | FitResult | GemError:
    try:
        return pickle.loads(receiver.recv_bytes())
    except (EOFError, OSError):  # the process ended, perhaps in the middle of a message
        process.join()
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        raise StoppedError(
            f"the process of seed {seed} was ended by {name}; is there enough memory?"
        )
    raise RuntimeError(f"the process that fits seed {seed} ended without a result")


def _run_job(job: _Job, place: int, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    end_with_parent()

    def send(message: object) -> None:
        # Not `send`, which would share tensors through files of a process that ends.
        sender.send_bytes(pickle.dumps(message))

    try:
        params = job.params
        device = distributed.take_gpu(place) if job.device == "cuda" else torch.device("cpu")
        memory = memory_of_each(params.train, device)
        cohort = Cohort(job.folder)
        data = TrainingData.load(cohort, device, params.model.uses_counts, memory)
        send(fit_and_refit(data, params, cohort, job.seed, send, job.checkpoint))
    except GemError as error:
        send(error)
    except Exception as error:
        if (problem := machine_problem(error)) is None:
            raise
        send(InputError(problem))
