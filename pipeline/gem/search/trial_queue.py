"""A queue of trials that any number of processes and machines share, with an exact total.

A worker starts a trial under the lock of the database, and holds a lock of its own while the trial
runs. A trial whose worker died or was told to stop waits again under the same number with the same
point. So the numbers, points and results of a search by one worker do not depend on interruptions.
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.gem.common.errors import DivergedError, StoppedError
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.search_config import Values
from pipeline.gem.search.study_db import StudyStorage

logger = logging.getLogger(__name__)

Evaluate = Callable[["RunningTrial"], float | list[float]]

_POLL_INTERVAL_S = 0.5  # while other workers finish the last trials
_MAX_LOST_WORKERS = 4  # in one epoch of a trial, until it counts as failed

# User attributes of a trial.
POINT = "point"  # saved before the parameters, which Optuna saves one by one
REASON = "reason"  # why a trial failed
RUN = "mlflow_run"  # its key
EPOCHS_TRAINED, EPOCHS_PLANNED = "epochs_trained", "epochs_planned"  # of all seeds
_WORKER = "worker"  # set when the trial has all its parameters
_LOST_WORKERS = "lost_workers"  # [number of workers that died, epoch in which they died]


class RunningTrial:
    """A trial that this process runs: its number and its point of the search space. It may repeat
    epochs of an attempt that was interrupted."""

    def __init__(self, trial: Trial, values: Values, last_epoch: int):
        """`last_epoch`: the last that an interrupted attempt reported, else 0."""
        self._trial, self.number, self.values = trial, trial.number, values
        self._last_epoch = last_epoch
        self._trained_before: int = trial.user_attrs.get(EPOCHS_TRAINED, 0)

    @property
    def run(self) -> str | None:
        """The key of the MLflow run of an interrupted attempt, which may have opened it."""
        return self._trial.user_attrs.get(RUN)

    def report(self, value: float, epoch: int) -> None:
        """Records the value of an epoch. Raises optuna.TrialPruned if the trial should stop."""
        if epoch > self._last_epoch:
            self._trial.report(value, epoch)
        # Pruners look at the last reported epoch only. Earlier ones did not end the trial.
        if epoch >= self._last_epoch and self._trial.should_prune():
            raise optuna.TrialPruned

    def record_epochs(self, trained: int, planned: int) -> None:
        """Records the number of epochs so far, and of all that are planned."""
        if trained > self._trained_before:
            self.set_attributes(**{EPOCHS_TRAINED: trained, EPOCHS_PLANNED: planned})

    def set_attributes(self, **attributes: object) -> None:
        for name, value in attributes.items():
            self._trial.set_user_attr(name, value)


class TrialQueue:
    """An Optuna study whose trials are started one at a time."""

    def __init__(
        self,
        storage: StudyStorage,
        name: str,
        directions: list[str],
        pruner: optuna.pruners.BasePruner | None = None,
    ):
        self.storage, self.name = storage, name
        with storage.lock():
            self.study = optuna.create_study(
                storage=storage.storage,
                study_name=name,
                directions=directions,
                load_if_exists=True,
                # Without a pruner Optuna would use the median.
                pruner=pruner or optuna.pruners.NopPruner(),
            )

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in one of `states`, by number."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    @property
    def finished(self) -> list[FrozenTrial]:
        """Complete, pruned and failed trials, by number."""
        return [trial for trial in self.trials() if trial.state.is_finished()]

    @property
    def complete(self) -> list[FrozenTrial]:
        return self.trials(TrialState.COMPLETE)

    def points(self) -> list[Values]:
        """The points of all trials."""
        return [trial.user_attrs.get(POINT, trial.params) for trial in self.trials()]

    def failure_reasons(self) -> list[str]:
        """The distinct reasons of the failed trials."""
        return sorted({failure_reason(trial) for trial in self.trials(TrialState.FAIL)})

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
        on_trial: Callable[[FrozenTrial], None] = lambda trial: None,
        deadline: float | None = None,
    ) -> None:
        """Runs trials until all workers together finished `budget` of them; None: until the queue
        is empty. No trial starts after the `deadline` (time.monotonic).

        Raises:
            StoppedError: the process was told to stop.
        """
        while deadline is None or time.monotonic() < deadline:
            stop.check()
            with ExitStack() as attempt:
                with self.storage.lock():
                    self._requeue_interrupted()
                    states = [trial.state for trial in self.trials()]
                    waiting = states.count(TrialState.WAITING)
                    has_next = waiting if budget is None else len(states) - waiting < budget
                    if has_next:
                        worker = attempt.enter_context(self.storage.worker())
                        trial = self._start(suggest, worker)
                if has_next:
                    self._run_trial(trial, evaluate, worker)
                    on_trial(self._trial(trial.number))
                    continue
            if TrialState.RUNNING not in states:
                return
            time.sleep(_POLL_INTERVAL_S)

    def _trial(self, number: int) -> FrozenTrial:
        return self.trials()[number]

    def _start(self, suggest: Callable[[Trial], Values], worker: str) -> RunningTrial:
        """The next trial. The caller holds the lock."""
        trial = self.study.ask()
        if POINT not in trial.user_attrs:
            trial.set_user_attr(POINT, trial.relative_params)
        running = RunningTrial(trial, suggest(trial), self._trial(trial.number).last_step or 0)
        running.set_attributes(**{_WORKER: worker})
        return running

    def _run_trial(self, trial: RunningTrial, evaluate: Evaluate, worker: str) -> None:
        try:
            try:
                values, state = evaluate(trial), TrialState.COMPLETE
            except optuna.TrialPruned:
                values, state = None, TrialState.PRUNED
            except DivergedError as error:
                trial.set_attributes(**{REASON: str(error)})
                values, state = None, TrialState.FAIL
            except StoppedError:
                self._set_waiting(trial.number)
                raise
            self.study.tell(trial.number, values, state)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            stored = self._trial(trial.number)
            if stored.state == TrialState.RUNNING and stored.user_attrs[_WORKER] == worker:
                raise
            # The server lost this worker for a time, and another worker has the trial.
            message = "search %s: another worker took over trial %d (%s)"
            logger.info(message, self.name, trial.number, error)

    def _id(self, number: int) -> int:
        storage = self.storage.storage
        study = storage.get_study_id_from_name(self.name)
        return storage.get_trial_id_from_study_id_trial_number(study, number)

    def _set_waiting(self, number: int) -> None:
        self.storage.storage.set_trial_state_values(self._id(number), TrialState.WAITING)

    def _set_attribute(self, number: int, name: str, value: object) -> None:
        self.storage.storage.set_trial_user_attr(self._id(number), name, value)

    def _requeue_interrupted(self) -> None:
        """Returns the trials whose worker is gone to the queue. The caller holds the lock."""
        if not self.trials(TrialState.RUNNING):
            return
        # Before the trials: a worker may finish its trial, and go, at any moment.
        running = self.storage.running_workers()
        for trial in self.trials(TrialState.RUNNING):
            # A worker sets its name before it releases the lock. So a running trial without one
            # belongs to a process that died while it held the lock.
            if trial.user_attrs.get(_WORKER) not in running:
                with suppress(optuna.exceptions.UpdateFinishedTrialError):
                    self._requeue(trial)

    def _requeue(self, trial: FrozenTrial) -> None:
        # Only deaths without progress in between count: the point may exceed the memory.
        epoch = trial.user_attrs.get(EPOCHS_TRAINED, 0)
        lost, epoch_before = trial.user_attrs.get(_LOST_WORKERS, (0, epoch))
        lost = lost + 1 if epoch == epoch_before else 1
        if lost < _MAX_LOST_WORKERS:
            self._set_waiting(trial.number)
            self._set_attribute(trial.number, _LOST_WORKERS, [lost, epoch])
        else:
            self._set_attribute(trial.number, REASON, f"its worker died {lost} times")
            self.study.tell(trial.number, state=TrialState.FAIL)


def failure_reason(trial: FrozenTrial) -> str:
    """Why a trial failed, or the empty string."""
    return str(trial.user_attrs.get(REASON, ""))
