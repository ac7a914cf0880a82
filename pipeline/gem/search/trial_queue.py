"""A queue of trials that any number of processes and machines share, with an exact total.

A worker starts a trial under the lock of the database. A trial is interrupted if its worker died or
was told to stop: it fails without a reason, and the next worker queues it again with the same
parameters. Only trials that ended by themselves count.
"""

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import filelock
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.gem.common.errors import DivergedError, StoppedError
from pipeline.gem.common.processes import StopSignal, file_lock
from pipeline.gem.search.search_config import Values
from pipeline.gem.search.study_db import StudyStorage

logger = logging.getLogger(__name__)

Evaluate = Callable[["RunningTrial"], float | list[float]]
WORKERS = Path(".gem/workers")  # one locked file per running worker of this machine

_POLL_INTERVAL_S = 0.5  # while other workers finish the last trials
_MAX_ATTEMPTS = 4  # workers that may die on one point before it counts as failed

# User attributes of a trial.
POINT = "point"  # of a queued trial, whose parameters Optuna hides until it starts
REASON = "reason"  # why a trial failed
RUN = "mlflow_run"
WORKER = "worker"
RETRY_OF = "retry_of"  # the number of the interrupted trial
ATTEMPTS = "attempts"  # workers that died on this point
RETURNED = "returned"  # the worker was told to stop, and returned the trial to the queue


class RunningTrial:
    """A trial that this process runs: its number and its point of the search space."""

    def __init__(self, trial: Trial, values: Values):
        self._trial, self.number, self.values = trial, trial.number, values

    def report(self, value: float, epoch: int) -> None:
        """Records the value of an epoch. Raises optuna.TrialPruned if the trial should stop."""
        self._trial.report(value, epoch)
        if self._trial.should_prune():
            raise optuna.TrialPruned

    def set_attributes(self, **attributes: object) -> None:
        for name, value in attributes.items():
            self._trial.set_user_attr(name, value)


class Worker:
    """The name of this process, and a locked file that shows other processes that it is alive."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self._lock = file_lock(WORKERS / self.name)

    def __enter__(self) -> "Worker":
        self._lock.acquire()
        return self

    def __exit__(self, *_) -> None:
        self._lock.release()
        (WORKERS / self.name).unlink(missing_ok=True)

    def is_dead(self, name: str) -> bool:
        """Whether a worker of this machine died. False for other machines: they have heartbeats."""
        path = WORKERS / name
        if name == self.name or not path.exists():
            return False
        try:
            with file_lock(path, timeout=0):
                path.unlink(missing_ok=True)
        except filelock.Timeout:
            return False
        return True


class TrialQueue:
    """An Optuna study whose trials are started one at a time.

    `on_lost` receives the MLflow run of each trial whose worker died.
    """

    def __init__(
        self,
        storage: StudyStorage,
        name: str,
        directions: list[str],
        pruner: optuna.pruners.BasePruner | None = None,
        on_lost: Callable[[str], None] = lambda run: None,
    ):
        self.storage, self.name, self._on_lost = storage, name, on_lost
        self._running_number: int | None = None
        with storage.lock():
            self.study = optuna.create_study(
                storage=storage.storage,
                study_name=name,
                directions=directions,
                load_if_exists=True,
                # Without a pruner Optuna would use the median.
                pruner=pruner or optuna.pruners.NopPruner(),
            )

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    @property
    def active_trials(self) -> list[FrozenTrial]:
        """All trials except the interrupted ones, which their retries replace."""
        return [trial for trial in self._trials() if not _is_interrupted(trial)]

    @property
    def finished(self) -> list[FrozenTrial]:
        """Complete, pruned and failed trials, by number."""
        return [trial for trial in self.active_trials if trial.state.is_finished()]

    @property
    def complete(self) -> list[FrozenTrial]:
        return self._trials(TrialState.COMPLETE)

    def trial(self, number: int) -> FrozenTrial:
        return self._trials()[number]

    def points(self) -> list[Values]:
        """The points of all trials, also of interrupted ones: these will be tried again."""
        return [trial.user_attrs.get(POINT, trial.params) for trial in self._trials()]

    def failure_reasons(self) -> list[str]:
        """The distinct reasons of the failed trials."""
        failed = self._trials(TrialState.FAIL)
        return sorted({failure_reason(trial) for trial in failed if not _is_interrupted(trial)})

    def enqueue(self, points: list[Values]) -> int:
        """Queues the points that no trial has yet. Returns their number."""
        with self.storage.lock():
            existing = self.points()
            new = [point for point in points if point not in existing]
            for point in new:
                self.study.enqueue_trial(point, user_attrs={POINT: point})
            return len(new)

    def run(
        self,
        budget: int | None,
        suggest: Callable[[Trial], Values],
        evaluate: Evaluate,
        stop: StopSignal,
        *,
        sampler: Callable[[int], optuna.samplers.BaseSampler] | None = None,
        on_trial: Callable[[FrozenTrial], None] = lambda trial: None,
        deadline: float | None = None,
    ) -> None:
        """Runs trials until all workers together finished `budget` of them; None: until the queue
        is empty. No trial starts after the `deadline` (time.monotonic).

        Raises:
            StoppedError: the process was told to stop.
        """
        with Worker() as worker:
            while deadline is None or time.monotonic() < deadline:
                stop.check()
                with ExitStack() as start:
                    start.enter_context(self.storage.lock())
                    self._requeue_interrupted(worker)
                    states = [trial.state for trial in self.active_trials]
                    waiting = states.count(TrialState.WAITING)
                    has_next = waiting if budget is None else len(states) - waiting < budget
                    if has_next:
                        if sampler:
                            self.study.sampler = sampler(len(self._trials()))
                        self._run_trial(worker, suggest, evaluate, start.close, on_trial)
                        continue
                if TrialState.RUNNING not in states:
                    return
                time.sleep(_POLL_INTERVAL_S)

    def _run_trial(
        self,
        worker: Worker,
        suggest: Callable[[Trial], Values],
        evaluate: Evaluate,
        release_lock: Callable[[], None],
        on_trial: Callable[[FrozenTrial], None],
    ) -> None:
        def objective(trial: Trial) -> float | list[float]:
            running = RunningTrial(trial, suggest(trial))
            running.set_attributes(**{WORKER: worker.name})
            release_lock()
            self._running_number = trial.number
            try:
                return evaluate(running)
            except DivergedError as error:
                running.set_attributes(**{REASON: str(error)})
                raise
            except StoppedError:
                running.set_attributes(**{RETURNED: True})
                raise

        try:
            self.study.optimize(
                objective,
                n_trials=1,
                catch=(DivergedError,),
                callbacks=[lambda study, trial: on_trial(trial)],
            )
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            # This machine slept longer than the grace period, and another worker has the trial.
            number = self._running_number
            if number is None or not _is_interrupted(self.trial(number)):
                raise
            logger.info(
                "search %s: another worker took over trial %d (%s)", self.name, number, error
            )
        finally:
            self._running_number = None

    def _requeue_interrupted(self, worker: Worker) -> None:
        """Fails trials whose worker is gone, and queues all interrupted trials again.

        The caller holds the lock.
        """
        optuna.storages.fail_stale_trials(self.study)  # by the heartbeats of other machines
        for trial in self._trials(TrialState.RUNNING):
            # A worker sets its name before it releases the lock. So a running trial without one
            # belongs to a process that died while it held the lock.
            name = trial.user_attrs.get(WORKER)
            if name is None or worker.is_dead(name):
                self.study.tell(trial.number, state=TrialState.FAIL)
        trials = self._trials()
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        for trial in trials:
            if _is_interrupted(trial) and trial.number not in retried:
                self._requeue(trial)
                if RUN in trial.user_attrs and not trial.user_attrs.get(RETURNED):
                    self._on_lost(trial.user_attrs[RUN])

    def _requeue(self, trial: FrozenTrial) -> None:
        # A point of which the worker had suggested only a part is suggested anew.
        is_whole = WORKER in trial.user_attrs
        point = trial.params if is_whole else trial.user_attrs.get(POINT, {})
        died = not trial.user_attrs.get(RETURNED)
        attempts = trial.user_attrs.get(ATTEMPTS, 0) + died
        attributes = {RETRY_OF: trial.number, ATTEMPTS: attempts} | (
            {POINT: point} if point else {}
        )
        if attempts < _MAX_ATTEMPTS:
            self.study.enqueue_trial(point, user_attrs=attributes)
            return
        self.study.add_trial(
            optuna.create_trial(
                state=TrialState.FAIL,
                params=trial.params if is_whole else {},
                distributions=trial.distributions if is_whole else {},
                user_attrs=attributes | {REASON: f"its worker died {attempts} times"},
            )
        )


def failure_reason(trial: FrozenTrial) -> str:
    """Why a trial failed, or the empty string."""
    return str(trial.user_attrs.get(REASON, ""))


def _is_interrupted(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs
