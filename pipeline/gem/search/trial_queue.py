"""Trials claimed one at a time by any number of processes and machines: the total is exact, and no trial is lost.

A trial is claimed under the lock of its database. One that was interrupted (its worker killed or told to stop) fails
without a reason; the next claim queues it again with the same parameters. Only trials that ended by themselves count.
"""

import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import filelock
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.gem.common.errors import DivergedError, StoppedError
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.samplers import Values
from pipeline.gem.search.study_db import StudyStorage

Pruned = optuna.TrialPruned
WORKERS = Path(".gem/workers")  # a locked file for every live worker of this machine

_POLL = 0.5  # seconds between two looks while others finish the last trials
_ATTEMPTS = 3  # kills of its worker that a point survives: the fourth might be its own fault
_REASON, _RUN, _WORKER, _RETRY_OF, _KILLS, _HANDED_BACK = (
    "reason",
    "mlflow_run",
    "worker",
    "retry_of",
    "kills",
    "handed_back",
)


class RunningTrial:
    """One trial: the values to try, and where to report on the way."""

    def __init__(self, trial: Trial, values: Values):
        self._trial, self.number, self.values = trial, trial.number, values

    def report(self, value: float, epoch: int) -> None:
        """Raises Pruned where the trial is not worth going on with."""
        self._trial.report(value, epoch)
        if self._trial.should_prune():
            raise Pruned()

    def note(self, **what: object) -> None:
        for name, value in what.items():
            self._trial.set_user_attr(name, value)

    def note_run(self, run_id: str) -> None:
        """The tracker's run of this trial: closed by whoever finds that the worker died."""
        self.note(**{_RUN: run_id})


class Worker:
    """A name for this process; the locked file tells others on this machine whether it lives, without waiting."""

    def __init__(self) -> None:
        WORKERS.mkdir(parents=True, exist_ok=True)
        self.name = uuid.uuid4().hex
        self._lock = filelock.FileLock(WORKERS / self.name)

    def __enter__(self) -> "Worker":
        self._lock.acquire()
        return self

    def __exit__(self, *_) -> None:
        self._lock.release()
        (WORKERS / self.name).unlink(missing_ok=True)

    def knows_dead(self, name: str) -> bool:
        """False where another machine's worker is meant: its heartbeat must tell."""
        path = WORKERS / name
        if name == self.name or not path.exists():
            return False
        try:
            with filelock.FileLock(path, timeout=0):
                path.unlink(missing_ok=True)
        except filelock.Timeout:
            return False
        return True


class TrialQueue:
    """An Optuna study whose trials are claimed."""

    def __init__(
        self,
        storage: StudyStorage,
        name: str,
        directions: list[str],
        pruner: optuna.pruners.BasePruner | None = None,
    ):
        """Without a `pruner` nothing is pruned; Optuna itself would use the median."""
        self.storage, self.name = storage, name
        self._number: int | None = None  # of the trial that runs here
        with storage.lock():
            pruner = pruner or optuna.pruners.NopPruner()
            self.study = optuna.create_study(
                storage=storage.storage,
                study_name=name,
                directions=directions,
                load_if_exists=True,
                pruner=pruner,
            )

    # what is there

    @property
    def live(self) -> list[FrozenTrial]:
        """Every trial but those that were interrupted: they live on in their retry."""
        return [
            trial for trial in self.study.get_trials(deepcopy=False) if not _was_interrupted(trial)
        ]

    @property
    def finished(self) -> list[FrozenTrial]:
        """Complete, pruned and failed trials, in order."""
        return [trial for trial in self.live if trial.state.is_finished()]

    @property
    def complete(self) -> list[FrozenTrial]:
        return [trial for trial in self.finished if trial.state == TrialState.COMPLETE]

    def points(self) -> list[Values]:
        """Of every trial: one that was interrupted is on its way back."""
        return [
            trial.system_attrs.get("fixed_params", trial.params)
            for trial in self.study.get_trials(deepcopy=False)
        ]

    def reasons(self) -> list[str]:
        """Why trials failed, each reason once."""
        return sorted(
            {
                str(trial.user_attrs[_REASON])
                for trial in self.finished
                if trial.state == TrialState.FAIL
            }
        )

    # what is to be done

    def enqueue(self, points: list[Values]) -> int:
        """Points to be tried before any other; the number of those that were not there already."""
        with self.storage.lock():
            there = self.points()
            new = [point for point in points if point not in there]
            for point in new:
                self.study.enqueue_trial(point)
            return len(new)

    def run(
        self,
        budget: int | None,
        suggest: Callable[[Trial], Values],
        evaluate: Callable[[RunningTrial], float | list[float]],
        *,
        interruption: StopSignal,
        sampler: Callable[[int], optuna.samplers.BaseSampler] | None = None,
        on_trial: Callable[[FrozenTrial], None] = lambda trial: None,
        on_lost: Callable[[str], None] = lambda run: None,
        deadline: float | None = None,
    ) -> None:
        """Claims trials until `budget` are finished by this or any other worker; None: until the queue is empty.

        `deadline` (time.monotonic) starts no more trials. StoppedError where the process was told to stop.
        """
        with Worker() as worker:
            while deadline is None or time.monotonic() < deadline:
                interruption.check()
                with ExitStack() as claim:
                    claim.enter_context(self.storage.lock())
                    self._queue_interrupted(worker, on_lost)
                    states = [trial.state for trial in self.live]
                    waiting, running = (
                        states.count(TrialState.WAITING),
                        states.count(TrialState.RUNNING),
                    )
                    if waiting if budget is None else len(states) - waiting < budget:
                        if sampler:
                            self.study.sampler = sampler(len(self.study.get_trials(deepcopy=False)))
                        self._run_one(
                            lambda trial, free=claim.close: self._evaluate(
                                trial, worker, free, suggest, evaluate
                            ),
                            on_trial,
                        )
                        continue
                if not running:
                    return
                time.sleep(_POLL)

    def _run_one(
        self,
        evaluate: Callable[[Trial], float | list[float]],
        on_trial: Callable[[FrozenTrial], None],
    ) -> None:
        try:
            self.study.optimize(
                evaluate,
                n_trials=1,
                catch=(DivergedError,),
                callbacks=[lambda study, trial: on_trial(trial)],
            )
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            # A machine that slept longer than its grace: another worker has the trial.
            if self._number is None or not _was_interrupted(
                self.study.get_trials(deepcopy=False)[self._number]
            ):
                raise
            print(
                f"{self.name}: trial {self._number} was taken over by another worker ({error})",
                flush=True,
            )
        finally:
            self._number = None

    def _evaluate(
        self, trial: Trial, worker: Worker, free: Callable[[], None], suggest, evaluate
    ) -> float | list[float]:
        asked = RunningTrial(trial, suggest(trial))
        asked.note(**{_WORKER: worker.name})
        free()
        self._number = trial.number
        try:
            return evaluate(asked)
        except DivergedError as error:
            trial.set_user_attr(_REASON, str(error))
            raise
        except StoppedError:
            trial.set_user_attr(_HANDED_BACK, True)
            raise

    def _queue_interrupted(self, worker: Worker, on_lost: Callable[[str], None]) -> None:
        """Under the lock: trials whose worker is gone fail, and whatever was interrupted waits once more."""
        optuna.storages.fail_stale_trials(self.study)  # of other machines, by their heartbeat
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # Whoever claims holds the lock until the worker is noted: a trial without one was claimed by a process that died.
            if _WORKER not in trial.user_attrs or worker.knows_dead(trial.user_attrs[_WORKER]):
                self.study.tell(trial.number, state=TrialState.FAIL)
        trials = self.study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(_RETRY_OF) for trial in trials}
        for trial in trials:
            if _was_interrupted(trial) and trial.number not in retried:
                self._queue_again(trial)
                if _RUN in trial.user_attrs and not trial.user_attrs.get(_HANDED_BACK):
                    on_lost(trial.user_attrs[_RUN])

    def _queue_again(self, trial: FrozenTrial) -> None:
        kills = trial.user_attrs.get(_KILLS, 0) + (not trial.user_attrs.get(_HANDED_BACK))
        given_up = kills > _ATTEMPTS
        attributes = {_RETRY_OF: trial.number, _KILLS: kills} | (
            {_REASON: f"its worker died {kills} times"} if given_up else {}
        )
        drawn = _WORKER in trial.user_attrs  # half a point is drawn anew
        self.study.add_trial(
            optuna.create_trial(
                state=TrialState.FAIL if given_up else TrialState.WAITING,
                params=trial.params if drawn else {},
                distributions=trial.distributions if drawn else {},
                user_attrs=attributes,
                system_attrs=trial.system_attrs,
            )
        )


def reason_of(trial: FrozenTrial) -> str:
    """Why a trial failed; empty where it did not."""
    return str(trial.user_attrs.get(_REASON, ""))


def _was_interrupted(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and _REASON not in trial.user_attrs
