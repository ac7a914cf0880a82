"""Confirmation of a search: the best trials and the baseline are fitted again with fresh seeds.

The best of many trials is partly lucky. Another candidate wins only if it beats the baseline by
more than noise: the 95 % interval of the difference, paired over fresh seeds, excludes zero. One
seed has no interval; then the better score wins. Every pair of a candidate and a seed is a trial
of a second Optuna study.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from optuna.trial import FrozenTrial, Trial
from scipy import stats

from pipeline.gem.common.errors import DivergedError
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.search import Search
from pipeline.gem.search.search_config import ConfirmationConfig, Objective, Values
from pipeline.gem.search.trial_queue import Evaluate, TrialQueue

logger = logging.getLogger(__name__)

_CONFIDENCE = 0.95
_MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Decision:
    """The winner, and its difference from the runner-up, paired over seeds.

    The winner is compared with the baseline (trial 0), and the baseline with the best other trial.
    """

    trial: int
    values: Values
    metric: str
    mean: float
    deviation: float | None  # standard deviation over seeds; None for a single seed
    runner_up: int | None  # None if there is no other candidate, or the baseline failed
    difference: float | None
    low: float | None
    high: float | None
    seeds: int
    epochs: int  # of each of these fits
    others: int  # finished trials of the search beside the baseline

    @property
    def is_significant(self) -> bool:
        return self.low is not None and not self.low <= 0 <= self.high

    @property
    def summary(self) -> str:
        """The decision in one sentence."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.4g}"
        plural = "s" if self.seeds > 1 else ""
        score = f"{self._result()}: {self.metric} {self.mean:.6g}{deviation}"
        fits = f"{self.seeds} fresh seed{plural} of {self.epochs} epochs"
        return f"{score} over {fits}; {self._comparison()}"

    def _result(self) -> str:
        if self.trial:
            return f"trial {self.trial} is the best of {self.others + 1} settings"
        if self.runner_up is None:
            return "trial 0, the baseline"
        plural = "s" if self.others > 1 else ""
        return f"the baseline is confirmed against {self.others} other setting{plural}"

    def _comparison(self) -> str:
        if self.runner_up is None and self.trial == 0:
            return "no other candidate was confirmed"
        if self.runner_up is None:
            return "the baseline failed, so there is no comparison"
        other = "the baseline" if self.runner_up == 0 else f"the best other, trial {self.runner_up}"
        difference = f"{self.difference:+.4g} from {other}"
        if self.low is None:
            return f"{difference}; no interval from one seed, run more trials or seeds"
        result = "significant" if self.is_significant else "not significant"
        return f"{difference} (95 % interval {self.low:.4g} to {self.high:.4g}): {result}"


class Confirmation:
    """The fits that confirm a search. All workers share them, and every call continues them."""

    def __init__(self, search: Search, config: ConfirmationConfig, epochs: int):
        """`epochs` of a fit, unless `config` sets them."""
        self.search, self.config, self.epochs = search, config, config.epochs or epochs
        self.queue = TrialQueue(
            search.storage,
            f"{search.name}.confirm-{self.epochs}",
            [objective.direction for objective in search.config.objective],
        )

    def candidates(self) -> list[int]:
        """Trial numbers: the baseline (0), then the best others."""
        ranked = self.search.ranked()
        others = [trial.number for trial in ranked if trial.number != 0]
        return [0, *others[: self.config.top]]

    def values(self, number: int) -> Values:
        """The values of all searched keys in a trial; 0 is the baseline."""
        if number == 0:
            return self.search.config.baseline_values
        return self.search.values_of(self.search.queue.trials()[number])

    def pairs(self) -> list[dict[str, int]]:
        candidates = self.candidates()
        return [
            {"trial": trial, "seed": seed} for seed in self.config.seeds for trial in candidates
        ]

    def run(
        self, evaluate: Evaluate, stop: StopSignal, on_trial: Callable[[FrozenTrial], None]
    ) -> None:
        """Runs the missing pairs. The values of a running trial are `trial` and `seed`."""

        def suggest(trial: Trial) -> Values:
            return {name: trial.suggest_int(name, 0, _MAX_SEED) for name in ("trial", "seed")}

        if new := self.queue.enqueue(self.pairs()):
            trials = ", ".join(map(str, self.candidates()))
            fits = f"{new} fits of {self.epochs} epochs"
            logger.info("%s: confirming trials %s: %s", self.search.label, trials, fits)
        self.queue.run(None, suggest, evaluate, stop, on_trial=on_trial)

    def table(self) -> pd.DataFrame:
        """A row per candidate and seed: trial, seed, the objectives (missing if the fit failed)."""
        names = list(self.search.config.metrics)
        values = {
            (trial.params["trial"], trial.params["seed"]): trial.values
            for trial in self.queue.complete
        }
        missing = [None] * len(names)
        rows = [
            (trial, seed, *values.get((trial, seed), missing))
            for trial in self.candidates()
            for seed in self.config.seeds
        ]
        return pd.DataFrame(rows, columns=["trial", "seed", *names]).astype(
            dict.fromkeys(names, float)
        )

    def decide(self) -> Decision:
        """Raises DivergedError if no candidate has a value for every seed."""
        table, others = self.table(), sum(trial.number > 0 for trial in self.search.finished)
        decision = decide(table, self.search.config.primary, self.values, self.epochs, others)
        if decision is None:
            reasons = "; ".join(self.queue.failure_reasons())
            label = self.search.label
            raise DivergedError(f"{label}: every candidate failed with some seed: {reasons}")
        return decision


def best_trial(table: pd.DataFrame, objective: Objective) -> int | None:
    """The trial with the best mean over seeds among those without a missing value; the first of
    equals. None if every trial misses a value."""
    by_trial = table.groupby("trial", sort=False)[objective.metric]
    means = by_trial.agg(lambda values: values.mean(skipna=False)).dropna()
    if means.empty:
        return None
    return int(means.idxmax() if objective.maximize else means.idxmin())


def decide(
    table: pd.DataFrame,
    objective: Objective,
    values: Callable[[int], Values],
    epochs: int,
    others: int,
) -> Decision | None:
    """The trial with the best mean; the baseline, if that does not beat it by more than noise."""
    best = best_trial(table, objective)
    if best is None:
        return None
    decision = compare(table, objective, best, values(best), epochs, others)
    if decision.runner_up == 0 and decision.low is not None and not decision.is_significant:
        return compare(table, objective, 0, values(0), epochs, others)
    return decision


def compare(
    table: pd.DataFrame,
    objective: Objective,
    winner: int,
    values: Values,
    epochs: int,
    others: int,
) -> Decision:
    """The winner and its runner-up, with a t interval of the differences paired over seeds."""
    wide = table.pivot(index="seed", columns="trial", values=objective.metric)
    scores = wide[winner].to_numpy()
    rivals = table[table["trial"] != 0] if winner == 0 else table[table["trial"] == 0]
    runner_up = best_trial(rivals, objective)
    difference = low = high = None
    if runner_up is not None:
        differences = (wide[winner] - wide[runner_up]).to_numpy()
        difference = float(differences.mean())
        low, high = _interval(differences)
    return Decision(
        trial=winner,
        values=values,
        metric=objective.metric,
        mean=float(scores.mean()),
        deviation=float(scores.std(ddof=1)) if len(scores) > 1 else None,
        runner_up=runner_up,
        difference=difference,
        low=low,
        high=high,
        seeds=len(scores),
        epochs=epochs,
        others=others,
    )


def _interval(differences: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    if len(differences) < 2:
        return None, None
    quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, len(differences) - 1)
    half = quantile * differences.std(ddof=1) / math.sqrt(len(differences))
    return float(differences.mean() - half), float(differences.mean() + half)
