"""The best trials of a search and its baseline once more, with fresh seeds: who wins, and whether by more than noise.

A winner of many trials is partly lucky; of fresh seeds it is not. Every pair of a candidate and a seed is a trial of a study of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from pipeline.gem.common.errors import DivergedError
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.samplers import Values
from pipeline.gem.search.search import Search
from pipeline.gem.search.search_config import Confirm
from pipeline.gem.search.trial_queue import RunningTrial, TrialQueue

_CONFIDENCE = 0.95
_LARGEST = 2**32 - 1  # of a seed


@dataclass(frozen=True)
class Decision:
    """The winner of a confirmation: values, mean and standard deviation over seeds, difference from its rival (paired over seeds).

    The rival is the baseline (trial 0), and of the baseline the best other candidate.
    """

    trial: int
    values: Values
    metric: str
    mean: float
    deviation: float | None  # None: one seed has no spread
    rival: int | None  # None: there is none, or a baseline that failed
    difference: float | None
    low: float | None
    high: float | None
    seeds: int

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.4g}"
        who = "trial 0, the baseline" if self.trial == 0 else f"trial {self.trial}"
        said = f"{who}: {self.metric} {self.mean:.6g}{spread} over {self.seeds} fresh seed{'s' if self.seeds > 1 else ''}"
        if self.rival is None:
            return f"{said}; " + (
                "nothing else was confirmed"
                if self.trial == 0
                else "the baseline failed: nothing to compare with"
            )
        against = "the baseline" if self.rival == 0 else f"the best other, trial {self.rival}"
        said += f"; {self.difference:+.4g} from {against}"
        if self.low is None:
            return f"{said}: one seed cannot tell a difference from noise: ask for more trials, or for more seeds in `confirm`"
        within = self.low <= 0 <= self.high
        return f"{said} (95 % interval {self.low:.4g} to {self.high:.4g}): {'within noise' if within else 'more than noise'}"


class Confirmation:
    """The pairs of candidate and seed that a search still owes, run by the same workers, continued by every call."""

    def __init__(self, search: Search, how: Confirm, epochs: int):
        """`epochs` of each fit where `how` does not say them."""
        self.search, self.how, self.epochs = search, how, how.epochs or epochs
        question = search.question
        self.claims = TrialQueue(
            search.storage,
            f"{search.name}.confirm-{self.epochs}",
            [objective.direction for objective in question.objectives],
        )

    def candidates(self) -> dict[int, Values]:
        """Number of a trial to the values of all searched keys: the baseline, then the best others."""
        others = [trial for trial in self.search.ranked() if trial.params != self.search.baseline][
            : self.how.top
        ]
        return {0: self.search.question.baseline_values} | {
            trial.number: self.search.values_of(trial) for trial in others
        }

    def pairs(self) -> list[dict[str, int]]:
        return [
            {"trial": trial, "seed": seed} for seed in self.how.seeds for trial in self.candidates()
        ]

    def run(
        self,
        evaluate: Callable[[RunningTrial], float | list[float]],
        interruption: StopSignal,
        on_trial,
        on_lost: Callable[[str], None],
    ) -> None:
        """Takes part until every pair is there; `asked.values` holds trial and seed."""
        if new := self.claims.enqueue(self.pairs()):
            candidates = ", ".join(
                "the baseline" if trial == 0 else f"trial {trial}" for trial in self.candidates()
            )
            print(
                f"tune: {candidates} once more, with fresh seeds: {new} fit{'s' if new > 1 else ''} of {self.epochs} epochs",
                flush=True,
            )
        self.claims.run(
            None,
            lambda trial: {
                "trial": trial.suggest_int("trial", 0, _LARGEST),
                "seed": trial.suggest_int("seed", 0, _LARGEST),
            },
            evaluate,
            interruption=interruption,
            on_trial=on_trial,
            on_lost=on_lost,
        )

    def table(self) -> pd.DataFrame:
        """A row per confirmed pair: trial, seed, the objectives; in the order of candidates and seeds, a failed one without values."""
        names = [objective.metric for objective in self.search.question.objectives]
        found = {
            (trial.params["trial"], trial.params["seed"]): trial.values
            for trial in self.claims.finished
        }
        rows = []
        for trial in self.candidates():
            for seed in self.how.seeds:
                values = found.get((trial, seed)) or [None] * len(names)
                rows.append({"trial": trial, "seed": seed, **dict(zip(names, values, strict=True))})
        return pd.DataFrame(rows, columns=["trial", "seed", *names]).astype(
            dict.fromkeys(names, float)
        )

    def decide(self) -> Decision:
        """DivergedError where no candidate came to its end with every seed."""
        objective = self.search.question.objectives[0]
        candidates, table = self.candidates(), self.table()
        winner = best_mean(table, objective.metric, objective.direction)
        if winner is None:
            raise DivergedError(
                f"study {self.claims.name}: no candidate was confirmed with every seed: {'; '.join(self.claims.reasons())}"
            )
        return compare(table, objective.metric, objective.direction, winner, candidates[winner])


def best_mean(table: pd.DataFrame, metric: str, direction: str) -> int | None:
    """The trial of the best mean over seeds, of those that ended with every seed; the first of equals, None of none."""
    means = (
        table.groupby("trial", sort=False)[metric]
        .agg(lambda values: values.mean(skipna=False))
        .dropna()
    )
    if means.empty:
        return None
    return int(means.idxmax() if direction == "maximize" else means.idxmin())


def compare(
    table: pd.DataFrame, metric: str, direction: str, winner: int, values: Values
) -> Decision:
    """The winner beside its rival: a t interval of the differences, paired over seeds."""
    wide = table.pivot(index="seed", columns="trial", values=metric)
    scores = wide[winner].to_numpy()
    deviation = float(scores.std(ddof=1)) if len(scores) > 1 else None
    rival = best_mean(
        table[table["trial"] != winner] if winner == 0 else table[table["trial"] == 0],
        metric,
        direction,
    )
    found = (None, None, None)
    if rival is not None:
        differences = (wide[winner] - wide[rival]).to_numpy()
        found = (float(differences.mean()), *_interval(differences))
    return Decision(
        winner, values, metric, float(scores.mean()), deviation, rival, *found, len(scores)
    )


def _interval(differences: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    if len(differences) < 2:
        return None, None
    mean, half = (
        differences.mean(),
        student.ppf((1 + _CONFIDENCE) / 2, len(differences) - 1)
        * differences.std(ddof=1)
        / math.sqrt(len(differences)),
    )
    return float(mean - half), float(mean + half)
