"""One call of a search: runs trials, confirms the best, writes the results, refits the winner."""

import logging
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from optuna.trial import FrozenTrial

from pipeline.gem.common import provenance
from pipeline.gem.common.capacity import available_memory, cores, training_needs
from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import InputError, StoppedError
from pipeline.gem.common.files import sha256_of
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.common.progress import duration
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.search.confirmation import Confirmation, Decision
from pipeline.gem.search.objective import ObjectiveFunction, log10_params
from pipeline.gem.search.results import log_results, write_results
from pipeline.gem.search.search import PARENT_RUN, Search
from pipeline.gem.search.search_config import EXPERIMENTS, SearchConfig, size_problems
from pipeline.gem.search.study_db import StudyStorage
from pipeline.gem.search.trial_queue import RunningTrial, failure_reason
from pipeline.gem.search.workers import Workers, prepare_to_fork
from pipeline.gem.tracking import mlflow_client
from pipeline.gem.tracking.runs import COHORT, FIT_SECTIONS, Run, log_settings
from pipeline.gem.tracking.training_run import TrainingJob
from pipeline.gem.training.checkpoint import FOLDER as CHECKPOINTS
from pipeline.gem.training.dataset import TrainingData, resolve_observation
from pipeline.gem.training.distributed import choose_device, take_gpu
from pipeline.gem.training.expression import memory_for_counts

logger = logging.getLogger(__name__)


class SearchSession:
    """Loads the cohort once, for this process and the workers that it forks."""

    def __init__(self, name: str, config: SearchConfig, params: Params, workers: int | None):
        """`workers`: None for one per core or GPU, as far as the memory allows."""
        self.name, self.config = name, config
        self.folder = EXPERIMENTS / name
        self.trials = config.trials or params.tune.trials
        StudyStorage().close()  # before the cohort is read: it may be unusable
        # The searched keys have the values of the baseline, so a promotion starts no new search.
        params = params.override(config.baseline_values)
        self.device = choose_device(params.train)
        gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
        if workers and workers > gpus > 0:
            raise InputError(
                f"params.yaml: train.device: {workers} workers for {gpus} GPUs on this machine; a "
                "worker has a GPU of its own: set cpu, or fewer WORKERS"
            )
        self.cohort = Cohort(COHORT)
        if problems := size_problems(name, config, params, self.cohort.manifest):
            raise InputError(*problems)
        params = resolve_observation(params, self.cohort)
        self.workers = workers or self._default_workers(gpus or cores(), params)
        if self.workers > 1:
            prepare_to_fork()
        # Workers are forked: they share the counts of this process, but cannot share a GPU, which
        # it must not use before. What it needs itself until then, it reads from the disk.
        self.own_data = gpus > 0 and self.workers > 1  # of each worker
        self._uses_counts = _uses_counts(config, params)
        self._memory_share = params.train.memory_share
        if self.own_data:
            cpu = torch.device("cpu")
            self.data = TrainingData.load(self.cohort, cpu, self._uses_counts, memory=0)
        else:
            self.data = self._load(self.device)
        self.params = self.data.resolve(params)
        self.data_sha256 = self.cohort.train_validation_sha256
        provenance.code_tags()  # before the workers are forked: one warning if git refuses
        self.digest = provenance.data_digest(str(COHORT), self.data_sha256)

    def _load(self, device: torch.device) -> TrainingData:
        memory = memory_for_counts(self._memory_share, device)
        return TrainingData.load(self.cohort, device, self._uses_counts, memory)

    def _default_workers(self, places: int, params: Params) -> int:
        memory, _ = training_needs(self.cohort.manifest, search=True)
        largest = memory.amount(params.override(self.config.largest_values).flat())
        return max(1, min(places, self.trials, int(available_memory() / largest)))

    def run(self, stop: StopSignal) -> None:
        """Runs the search to its budget and writes the results.

        Raises:
            StoppedError: told to stop; the next call continues.
            DivergedError: no trial, or no candidate, is usable.
        """
        # Nothing is opened before the workers are forked.
        workers = Workers(self.workers, self._work) if self.workers > 1 else None
        with workers or nullcontext():
            search = self._open()
            with search.storage.errors():
                self._print_status(search)
                parent = self._parent_run(search)
                with Run.resume(parent, killed_by=(StoppedError,)) as run:
                    if workers:
                        workers.wait(stop)
                        if self.own_data:
                            self.data = self._load(self.device)
                    else:
                        self._run_trials(search, parent, stop)
                    self._finish(search, run, stop)

    def _work(self, number: int, stop: StopSignal) -> None:
        """The search in a worker process."""
        if self.own_data:
            self.data = self._load(take_gpu(number))
        search = self._open()
        with search.storage.errors():
            self._run_trials(search, self._parent_run(search), stop)

    def _open(self) -> Search:
        mlflow_client.connect(self.params.tracking.experiment)
        return Search(self.name, self.config, self.params, self.data_sha256)

    def _parent_run(self, search: Search) -> str:
        def create(key: str) -> None:
            with Run.open(self.name, "tune", key=key) as run:
                run.log_dataset("cohort", self.digest, "training")
                for name, space in self.config.space.items():
                    run.log_params({f"search.{name}": space.model_dump(exclude={"type"})})

        return search.shared_run(PARENT_RUN, create)

    def _info(self, message: str) -> None:
        logger.info("search %s: %s", self.name, message)

    def _print_status(self, search: Search) -> None:
        budget, address = search.budget(self.trials), search.storage.address
        self._info(self.config.description)
        if search.replaces_another:
            self._info(f"definition, parameters or cohort changed: new search {search.name}")
        if budget < self.trials:
            self._info(f"the space has only {budget} points")
        finished = f"{len(search.finished)} of {budget} trials finished"
        self._info(f"{finished}, in {address}; workers: {self.workers}")

    def _run_trials(self, search: Search, parent_run: str, stop: StopSignal) -> None:
        if self.data.validation is None:
            self._info("no validation split: skipping the search, using the baseline")
            return
        # Also of a single worker: then a trial has the same bits with any number of workers. The
        # winner is fitted later, with the threads of params.yaml.
        params = self.params.override({"train.threads": 1})
        objective = ObjectiveFunction(
            self.name,
            self.config,
            params,
            self.data,
            self.digest,
            parent_run,
            stop,
            self._checkpoints(search),
        )
        limit = self.config.time_limit
        deadline = None if limit is None else time.monotonic() + 60 * limit
        printer = TrialPrinter(search, search.budget(self.trials))
        search.run(self.trials, objective.evaluate, stop, printer.print_trial, deadline)
        if not search.finished:
            return
        search.require_usable()
        confirmation = self._confirmation(search)

        def confirm(pair: RunningTrial) -> float | list[float]:
            values = confirmation.values(pair.values["trial"])
            return objective.confirm(pair, values, confirmation.epochs)

        confirmation.run(confirm, stop, printer.print_confirmation)

    def _confirmation(self, search: Search) -> Confirmation:
        return Confirmation(search, self.config.confirm, self.params.train.epochs)

    def _finish(self, search: Search, run: Run, stop: StopSignal) -> None:
        """Writes the results and the model of the winner, and logs them to the parent run."""
        confirmation = decision = None
        if self.data.validation is not None:
            self._check_time_limit(search)
            search.require_usable()
            confirmation = self._confirmation(search)
            decision = confirmation.decide()
            self._info(decision.summary)
        write_results(self.folder, search, confirmation, decision)
        log_results(run, self.folder, search, decision)
        self._refit(search, decision, run.id, stop)
        shutil.rmtree(self._checkpoints(search), ignore_errors=True)

    def _checkpoints(self, search: Search) -> Path:
        """The folder of the interrupted trials of this machine."""
        return CHECKPOINTS / search.name

    def _check_time_limit(self, search: Search) -> None:
        finished, budget = len(search.finished), search.budget(self.trials)
        limit = self.config.time_limit
        if not finished:
            raise StoppedError(f"no trial finished within the time limit of {limit:g} minutes")
        if finished < budget:
            self._info(
                f"time limit of {limit:g} minutes reached after {finished} of {budget} trials; "
                f"to continue: python -m pipeline.tune --search {self.name}"
            )

    def _refit(
        self, search: Search, decision: Decision | None, parent_run: str, stop: StopSignal
    ) -> None:
        values = decision.values if decision else self.config.baseline_values
        params = self.params.override(values)
        name = f"{self.name} winner"

        def create(key: str) -> None:
            with Run.open(name, "tune", parent=parent_run, key=key) as run:
                log_settings(run, params, self.cohort)
                run.log_params(log10_params(self.config, values))

        # Every machine fits the winner into its own folder. MLflow has one run of it.
        version = sha256_of(params.flat(*FIT_SECTIONS), len(search.finished))[:12]
        shared = search.shared_run(f"winner_{version}", create)
        label = f"search {name}"
        job = TrainingJob(self.folder, label, self.cohort, self.data, params, reuse_finished=True)
        with Run.resume(shared, killed_by=(StoppedError,)) as run:
            job.train(run, stop)


def _uses_counts(config: SearchConfig, params: Params) -> bool:
    """Whether any trial has an observation model of counts."""
    space = config.space.get("model.observation")
    names = space.choices if space else [params.model.observation]
    return any(params.override({"model.observation": name}).model.uses_counts for name in names)


class TrialPrinter:
    """Logs a line per finished trial: its value, the best so far, the time left."""

    def __init__(self, search: Search, budget: int):
        self.search, self.budget = search, budget
        self.started, self.finished_before = time.monotonic(), len(search.finished)

    def print_trial(self, trial: FrozenTrial) -> None:
        finished, ranked = len(self.search.finished), self.search.ranked()
        best = "none complete"
        if ranked:
            best = f"best {_numbers(ranked[0].values)} (trial {ranked[0].number})"
        seconds = (time.monotonic() - self.started) / max(1, finished - self.finished_before)
        left = duration(seconds * max(self.budget - finished, 0))
        state, epochs = trial.state.name.lower(), self.search.epochs_of(trial)
        result = f"trial {trial.number} {state} after {epochs} epochs{_result(trial)}"
        progress = f"{finished} of {self.budget}, {left} left"
        logger.info("%s: %s; %s; %s", self.search.label, result, best, progress)

    def print_confirmation(self, pair: FrozenTrial) -> None:
        result = f"confirmed with seed {pair.params['seed']}{_result(pair)}"
        logger.info("%s: trial %d %s", self.search.label, pair.params["trial"], result)


def _result(trial: FrozenTrial) -> str:
    if trial.values:
        return f", {_numbers(trial.values)}"
    reason = failure_reason(trial)
    return f" ({reason})" if reason else ""


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
