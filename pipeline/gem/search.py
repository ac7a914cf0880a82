"""Optuna studies: the only place that knows it. Persistent, continued by a second call, baseline first."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock
import optuna
import pandas as pd
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.gem.config import Params
from pipeline.gem.errors import DivergedError
from pipeline.gem.question import Choice, FloatSpace, IntegerSpace, Question
from pipeline.gem.storage import sha256_of

LOCAL_STORAGE = "sqlite:///.gem/optuna.db"
Pruned = optuna.TrialPruned

_HEARTBEAT, _GRACE = 30, 90      # seconds
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_WHY, _RUN = "reason", "mlflow_run"

optuna.logging.set_verbosity(optuna.logging.WARNING)
# Heartbeats and retries have been "experimental" since 2.8; the version is pinned.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Search:
    """One question asked of one cohort. The study's name hashes both: another question or cohort is another study."""

    def __init__(self, name: str, question: Question, params: Params, data_sha256: str):
        self.question = question
        asked = question.model_dump(mode="json", exclude={"question"})
        fixed = {key: value for key, value in params.flat("model", "train").items() if key not in question.space}
        self.name = f"{name}-{sha256_of(asked, fixed, data_sha256)[:12]}"
        storage = _open_storage()
        known = {study.study_name for study in optuna.get_all_study_summaries(storage)}
        self.is_new, self.others = self.name not in known, sorted(other for other in known if other.startswith(f"{name}-"))
        # Without its state a sampler that is seeded alike proposes its first points again: seed by what is there.
        self.study = optuna.create_study(
            storage=storage, study_name=self.name, direction=question.objective.direction, load_if_exists=True, pruner=_pruner(question)
        )
        self.study.sampler = _sampler(question, len(self.study.trials))
        self.study.enqueue_trial(question.baseline_values, skip_if_exists=True)

    @property
    def run_id(self) -> str | None:
        """The tracker's parent run, so that a continued study continues it."""
        return self.study.user_attrs.get(_RUN)

    @run_id.setter
    def run_id(self, value: str) -> None:
        self.study.set_user_attr(_RUN, value)

    @property
    def finished(self) -> list[FrozenTrial]:
        """Complete, pruned and failed trials, a killed one only by its retry; in order."""
        retried = {number for trial in self.study.trials for number in RetryHeartbeatStaleTrialCallback.retry_history(trial)}
        return [trial for trial in self.study.trials if trial.state in _FINISHED and trial.number not in retried]

    @property
    def complete(self) -> list[FrozenTrial]:
        return [trial for trial in self.finished if trial.state == TrialState.COMPLETE]

    def run(self, budget: int, evaluate: Callable[["Asked"], float], on_trial: Callable[["Search", FrozenTrial], None]) -> None:
        """Runs what is missing to `budget` finished trials. DivergedError with the reasons where none is usable."""
        remaining = budget - len(self.finished)
        if remaining > 0:
            self.study.optimize(
                lambda trial: self._evaluate(trial, evaluate),
                n_trials=remaining,
                catch=(DivergedError,),
                callbacks=[lambda study, trial: on_trial(self, trial)],
            )
        if not self.complete:
            reasons = {str(trial.user_attrs.get(_WHY, trial.state.name.lower())) for trial in self.finished}
            raise DivergedError(f"study {self.name}: none of {len(self.finished)} trials is usable: {'; '.join(sorted(reasons))}")

    def _evaluate(self, trial: Trial, evaluate: Callable[["Asked"], float]) -> float:
        asked = Asked(trial, {name: _suggest(trial, name, space) for name, space in self.question.space.items()})
        try:
            return evaluate(asked)
        except DivergedError as error:
            trial.set_user_attr(_WHY, str(error))
            raise

    def best_values(self) -> dict[str, object]:
        """The winner's values of the searched keys; the baseline's where nothing was searched."""
        return dict(self.study.best_trial.params) if self.complete else self.question.baseline_values

    def trials_table(self) -> pd.DataFrame:
        """One row per finished trial: trial, state, value (of a pruned one when it stopped), epochs, parameters."""
        rows = []
        for trial in self.finished:
            last = trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
            value = trial.value if trial.state == TrialState.COMPLETE else last
            state = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}[trial.state]
            rows.append({"trial": trial.number, "state": state, "value": value, "epochs": len(trial.intermediate_values), **trial.params})
        return pd.DataFrame(rows, columns=["trial", "state", "value", "epochs", *self.question.space])

    def importance_table(self) -> pd.DataFrame:
        """Share of importance per parameter by PED-ANOVA and by fANOVA; empty cells where there are too few trials."""
        table = pd.DataFrame({"parameter": list(self.question.space)})
        evaluators = {"ped_anova": optuna.importance.PedAnovaImportanceEvaluator(), "fanova": optuna.importance.FanovaImportanceEvaluator(seed=0)}
        for name, evaluator in evaluators.items():
            found = {}
            if len(self.complete) >= 4 and len({trial.value for trial in self.complete}) > 1:
                found = optuna.importance.get_param_importances(self.study, evaluator=evaluator)
            table[name] = table["parameter"].map(found).astype(float)
        return table.sort_values(["ped_anova", "parameter"], ascending=[False, True], na_position="last").reset_index(drop=True)


class Asked:
    """One trial: the values to try, and where to report on the way."""

    def __init__(self, trial: Trial, values: dict[str, object]):
        self._trial, self.number, self.values = trial, trial.number, values

    def report(self, value: float, epoch: int) -> None:
        """Raises Pruned where the trial is not worth going on with."""
        self._trial.report(value, epoch)
        if self._trial.should_prune():
            raise Pruned()

    def note_run(self, run_id: str) -> None:
        # A retried trial copies the attributes of the killed one: its run must be its own.
        self._trial.set_user_attr(_RUN, run_id)


def _open_storage() -> RDBStorage:
    """The local database or any server through OPTUNA_STORAGE; the first process makes the schema, the others wait."""
    Path(".gem").mkdir(exist_ok=True)
    url = os.environ.get("OPTUNA_STORAGE", LOCAL_STORAGE)
    with filelock.FileLock(".gem/optuna.lock"):
        return RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 30}} if url.startswith("sqlite") else {},
            heartbeat_interval=_HEARTBEAT,
            grace_period=_GRACE,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )


def _sampler(question: Question, trials: int) -> optuna.samplers.BaseSampler:
    seed = (question.sampler.seed + 1_000_003 * trials) % 2**32
    if question.sampler.name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=question.sampler.startup_trials)


def _pruner(question: Question) -> optuna.pruners.BasePruner:
    if question.pruner.name == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=question.pruner.startup_trials, n_warmup_steps=question.pruner.warmup_epochs)


def _suggest(trial: Trial, name: str, space: IntegerSpace | FloatSpace | Choice) -> object:
    if isinstance(space, IntegerSpace):
        return trial.suggest_int(name, space.low, space.high, log=space.log)
    if isinstance(space, FloatSpace):
        return trial.suggest_float(name, space.low, space.high, log=space.log)
    return trial.suggest_categorical(name, space.choices)
