"""One question asked of one cohort: its study is continued by every call, its baseline is tried first."""

from collections.abc import Callable

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import DivergedError
from pipeline.gem.common.files import sha256_of
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.importance import importance_table, wins
from pipeline.gem.search.samplers import Distinct, Values, pruner, suggest
from pipeline.gem.search.search_config import OWN_TO_A_FIT, SearchConfig
from pipeline.gem.search.study_db import StudyStorage
from pipeline.gem.search.trial_queue import RunningTrial, TrialQueue

_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
_PARENT, _EPOCHS, _PLANNED = "mlflow_run", "epochs_spent", "epochs_planned"


class Search:
    """The study's name hashes question and cohort: another question or cohort is another study."""

    def __init__(
        self,
        name: str,
        question: SearchConfig,
        params: Params,
        data_sha256: str,
        storage: StudyStorage | None = None,
    ):
        self.question = question
        everything = shortened(params, question.epochs).flat("model", "train")
        fixed = {
            key: value
            for key, value in everything.items()
            if key not in question.space and key not in OWN_TO_A_FIT
        }
        self.name = f"{name}-{sha256_of(question.decisive, fixed, data_sha256)[:12]}"
        self.storage = storage or StudyStorage()
        known = set(optuna.get_all_study_names(self.storage.storage))
        self.is_new, self.others = (
            self.name not in known,
            sorted(other for other in known if other.startswith(f"{name}-") and "." not in other),
        )
        self.claims = TrialQueue(
            self.storage,
            self.name,
            [objective.direction for objective in question.objectives],
            pruner(question),
        )
        self.claims.enqueue([self.baseline])

    @property
    def baseline(self) -> Values:
        """The keys of the baseline that its own values ask for."""
        values: Values = {}
        for name in self.question.space:
            if self.question.is_asked(name, values):
                values[name] = self.question.baseline_values[name]
        return values

    @property
    def finished(self) -> list[FrozenTrial]:
        return self.claims.finished

    @property
    def complete(self) -> list[FrozenTrial]:
        return self.claims.complete

    def budget(self, trials: int) -> int:
        """Not more than there are points."""
        points = self.question.points()
        return trials if points is None else min(trials, len(points))

    def parent_run(self, exists: Callable[[str], bool], create: Callable[[], str]) -> str:
        """The tracker's run of the study."""
        return self.run_once(_PARENT, exists, create)

    def run_once(self, what: str, exists: Callable[[str], bool], create: Callable[[], str]) -> str:
        """A run of the tracker, made once for all workers, machines and calls; again where its store lost it."""
        with self.storage.lock():
            run = self.claims.study.user_attrs.get(what)
            if run is None or not exists(run):
                run = create()
                self.claims.study.set_user_attr(what, run)
            return run

    def run(
        self,
        trials: int,
        evaluate: Callable[[RunningTrial], float | list[float]],
        interruption: StopSignal,
        on_trial: Callable[["Search", FrozenTrial], None] = lambda search, trial: None,
        on_lost: Callable[[str], None] = lambda run: None,
        deadline: float | None = None,
    ) -> None:
        """Takes part until `trials` are finished; others may take part elsewhere."""
        self.claims.run(
            self.budget(trials),
            lambda trial: suggest(trial, self.question),
            evaluate,
            interruption=interruption,
            sampler=lambda number: Distinct(self.question, number, self.claims.points),
            on_trial=lambda trial: on_trial(self, trial),
            on_lost=on_lost,
            deadline=deadline,
        )

    def require_usable(self) -> None:
        """DivergedError with the reasons where no trial came to its end."""
        if not self.complete:
            reasons = "; ".join(self.claims.reasons()) or "all were pruned"
            raise DivergedError(
                f"study {self.name}: none of {len(self.finished)} trials is usable: {reasons}"
            )

    def ranked(self) -> list[FrozenTrial]:
        """Complete trials, best first; with several objectives those that none beats in all, best first by the first."""
        upwards = self.question.objectives[0].direction == "maximize"
        chosen = (
            self.complete if len(self.question.objectives) == 1 else self.claims.study.best_trials
        )
        return sorted(
            chosen,
            key=lambda trial: (-trial.values[0] if upwards else trial.values[0], trial.number),
        )

    def values_of(self, trial: FrozenTrial) -> Values:
        """All searched keys: those that a trial does not ask keep the baseline's value."""
        return self.question.baseline_values | trial.params

    def counts(self) -> dict[str, int]:
        states = [_STATES[trial.state] for trial in self.finished]
        return {state: states.count(state) for state in _STATES.values()}

    @staticmethod
    def epochs_of(trial: FrozenTrial) -> int:
        """Epochs that a trial trained, over all its seeds."""
        return int(trial.user_attrs.get(_EPOCHS, len(trial.intermediate_values)))

    def epochs(self) -> tuple[int, int]:
        """(spent, spared): what trials that were pruned would still have cost at the full budget."""
        full = self.question.epochs * len(self.question.seeds)
        spent = sum(self.epochs_of(trial) for trial in self.finished)
        pruned = [trial for trial in self.finished if trial.state == TrialState.PRUNED]
        return spent, sum(
            trial.user_attrs.get(_PLANNED, full) - self.epochs_of(trial) for trial in pruned
        )

    def trials_table(self) -> pd.DataFrame:
        """A row per finished trial: trial, state, value (of a pruned one when it stopped), epochs, wins, keys that it asked.

        `wins` is the share of the other trials that it beats, as in `importance.wins`. With several objectives a column for each instead of
        value, and `front`, whether no other beats it in all, instead of wins.
        """
        several = len(self.question.objectives) > 1
        names = (
            [objective.metric for objective in self.question.objectives] if several else ["value"]
        )
        front = {trial.number for trial in self.ranked()} if several else set()
        shares = wins(self.finished, self.question.objectives[0].direction == "maximize")
        rows = []
        for trial, share in zip(self.finished, shares, strict=True):
            last = (
                trial.intermediate_values[max(trial.intermediate_values)]
                if trial.intermediate_values
                else None
            )
            values = trial.values if trial.state == TrialState.COMPLETE else [last] * len(names)
            row = {
                "trial": trial.number,
                "state": _STATES[trial.state],
                **dict(zip(names, values, strict=True)),
                "epochs": self.epochs_of(trial),
            }
            rows.append(
                row
                | ({"front": trial.number in front} if several else {"wins": share})
                | trial.params
            )
        return pd.DataFrame(
            rows,
            columns=[
                "trial",
                "state",
                *names,
                "epochs",
                "front" if several else "wins",
                *self.question.space,
            ],
        )

    def importance_table(self) -> pd.DataFrame:
        """Share of importance per parameter; with several objectives a block of rows for each, named in the first column."""
        objectives, keys = self.question.objectives, list(self.question.space)
        tables = [
            importance_table(self.finished, keys, objective.direction == "maximize", index)
            for index, objective in enumerate(objectives)
        ]
        if len(tables) == 1:
            return tables[0]
        named = [
            table.assign(objective=objective.metric)
            for table, objective in zip(tables, objectives, strict=True)
        ]
        return pd.concat(named)[["objective", *tables[0].columns]]


def note_epochs(asked: RunningTrial, spent: int, planned: int) -> None:
    asked.note(**{_EPOCHS: spent, _PLANNED: planned})


def shortened(params: Params, epochs: int) -> Params:
    """The same fit with other epochs, and with its share of the steps that it has at least."""
    return params.override(
        {
            "train.epochs": epochs,
            "train.min_steps": params.train.min_steps * epochs // params.train.epochs,
        }
    )
