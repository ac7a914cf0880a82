"""A search of one cohort: its Optuna study, which every call continues, and its tables."""

from collections.abc import Callable

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import DivergedError
from pipeline.gem.common.files import sha256_of
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.importance import importance_table, win_rates
from pipeline.gem.search.samplers import UniquePointSampler, make_pruner, suggest
from pipeline.gem.search.search_config import NOT_SEARCHABLE, SearchConfig, Values
from pipeline.gem.search.study_db import StudyStorage
from pipeline.gem.search.trial_queue import (
    EPOCHS_PLANNED,
    EPOCHS_TRAINED,
    Evaluate,
    TrialQueue,
)
from pipeline.gem.tracking import runs

PARENT_RUN = "mlflow_run"  # attribute of the study: the key of the run

_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


class Search:
    """The name of the study hashes the definition, the parameters that are not searched, and the
    cohort. A change of any of them starts a new study. Trial 0 is the baseline.
    """

    def __init__(self, name: str, config: SearchConfig, params: Params, data_sha256: str):
        self.label, self.config = f"search {name}", config
        settings = with_epochs(params, config.epochs).flat("model", "train")
        fixed = {
            key: value
            for key, value in settings.items()
            if key not in config.space and key not in NOT_SEARCHABLE
        }
        self.name = f"{name}-{sha256_of(config.fingerprint_fields, fixed, data_sha256)[:12]}"
        self.storage = StudyStorage()
        studies = optuna.get_all_study_names(self.storage.storage)
        # A "." separates the name of a search from the suffix of its confirmation.
        searches = [study for study in studies if study.startswith(f"{name}-") and "." not in study]
        self.replaces_another = self.name not in searches and bool(searches)
        directions = [objective.direction for objective in config.objective]
        self.queue = TrialQueue(self.storage, self.name, directions, make_pruner(config))
        self.queue.study.sampler = UniquePointSampler(config, self.queue.points)
        self.queue.enqueue([self.baseline])

    @property
    def baseline(self) -> Values:
        """The active keys of the baseline."""
        values: Values = {}
        for name in self.config.space:
            if self.config.is_active(name, values):
                values[name] = self.config.baseline_values[name]
        return values

    @property
    def finished(self) -> list[FrozenTrial]:
        return self.queue.finished

    @property
    def complete(self) -> list[FrozenTrial]:
        return self.queue.complete

    def budget(self, trials: int) -> int:
        """`trials`, or the number of points of a smaller space."""
        points = self.config.points()
        return trials if points is None else min(trials, len(points))

    def shared_run(self, attribute: str, create: Callable[[str], None]) -> str:
        """The key of an MLflow run that all workers, machines and calls share. `create` makes it
        once, and again if it was killed meanwhile or the tracking server lost the run."""
        created = f"{attribute}_created"
        with self.storage.lock():
            study = self.queue.study
            key = study.user_attrs.get(attribute)
            key = runs.kept_key(key, lambda key: study.set_user_attr(attribute, key))
            if study.user_attrs.get(created) != key or not runs.exists(key):
                create(key)
                study.set_user_attr(created, key)
            return key

    def run(
        self,
        trials: int,
        evaluate: Evaluate,
        stop: StopSignal,
        on_trial: Callable[[FrozenTrial], None] = lambda trial: None,
        deadline: float | None = None,
    ) -> None:
        """Runs trials until all workers together finished `trials` of them."""
        self.queue.run(
            self.budget(trials),
            lambda trial: suggest(trial, self.config),
            evaluate,
            stop,
            on_trial=on_trial,
            deadline=deadline,
        )

    def require_usable(self) -> None:
        """Raises DivergedError with the reasons if no trial is complete."""
        if not self.complete:
            reasons = "; ".join(self.queue.failure_reasons()) or "all were pruned"
            number = len(self.finished)
            raise DivergedError(f"{self.label}: none of {number} trials is usable: {reasons}")

    def ranked(self) -> list[FrozenTrial]:
        """Complete trials by the first objective, best first. With several objectives only the
        Pareto-optimal ones."""
        sign = -1 if self.config.primary.maximize else 1
        multiple = len(self.config.objective) > 1
        trials = self.queue.study.best_trials if multiple else self.complete
        return sorted(trials, key=lambda trial: (sign * trial.values[0], trial.number))

    def values_of(self, trial: FrozenTrial) -> Values:
        """The values of all searched keys; an inactive key has the value of the baseline."""
        return self.config.baseline_values | trial.params

    def counts(self) -> dict[str, int]:
        """The number of finished trials by state."""
        states = [_STATES[trial.state] for trial in self.finished]
        return {state: states.count(state) for state in _STATES.values()}

    @staticmethod
    def epochs_of(trial: FrozenTrial) -> int:
        """Epochs that a trial trained, over all its seeds."""
        return int(trial.user_attrs.get(EPOCHS_TRAINED, len(trial.intermediate_values)))

    def epochs(self) -> tuple[int, int]:
        """(epochs that all trials trained, epochs that pruning saved)."""
        trained = sum(self.epochs_of(trial) for trial in self.finished)
        planned = self.config.epochs * len(self.config.seeds)
        pruned = [trial for trial in self.finished if trial.state == TrialState.PRUNED]
        saved = [
            trial.user_attrs.get(EPOCHS_PLANNED, planned) - self.epochs_of(trial)
            for trial in pruned
        ]
        return trained, sum(saved)

    def trials_table(self) -> pd.DataFrame:
        """A row per finished trial: trial, state, value, epochs, win_rate, the searched keys.

        The value of a pruned trial is the last one that it reported. A search with several
        objectives has a column for each instead of value, and pareto_optimal instead of win_rate.
        """
        trials = self.finished
        if len(self.config.objective) == 1:
            names, quality = ["value"], "win_rate"
            qualities = list(win_rates(trials, self.config.primary.maximize))
        else:
            names, quality = list(self.config.metrics), "pareto_optimal"
            optimal = {trial.number for trial in self.ranked()}
            qualities = [trial.number in optimal for trial in trials]
        rows = []
        for trial, value in zip(trials, qualities, strict=True):
            row = {
                "trial": trial.number,
                "state": _STATES[trial.state],
                "epochs": self.epochs_of(trial),
                quality: value,
            }
            rows.append(row | dict(zip(names, _values(trial, len(names)), strict=True)))
            rows[-1] |= trial.params
        columns = ["trial", "state", *names, "epochs", quality, *self.config.space]
        return pd.DataFrame(rows, columns=columns)

    def importance_table(self) -> pd.DataFrame:
        """Importance per searched key. With several objectives a block of rows for each, and the
        column objective first."""
        trials, tables = self.finished, []
        for index, objective in enumerate(self.config.objective):
            table = importance_table(trials, list(self.config.space), objective.maximize, index)
            table.insert(0, "objective", objective.metric)
            tables.append(table)
        if len(tables) == 1:
            return tables[0].drop(columns="objective")
        return pd.concat(tables)


def _values(trial: FrozenTrial, number: int) -> list[float | None]:
    """Final values of a complete trial; the last reported one of any other."""
    if trial.state == TrialState.COMPLETE:
        return trial.values
    reported = trial.intermediate_values
    return [reported[max(reported)] if reported else None] * number


def with_epochs(params: Params, epochs: int) -> Params:
    """The same fit with other epochs, and min_steps in proportion."""
    min_steps = params.train.min_steps * epochs // params.train.epochs
    return params.override({"train.epochs": epochs, "train.min_steps": min_steps})
