"""What all predictors of a test split share, and their changes from control by condition.

N samples, G genes, C conditions, T treated conditions. Expression is log-CPM.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.gem.evaluation import metrics
from pipeline.gem.evaluation.bootstrap import Bootstrap, MetricDraws, condition_sums
from pipeline.gem.evaluation.differential_expression import changed_genes
from pipeline.gem.evaluation.evaluation_split import Controls, EvaluationSplit, PredictedSplit

# At least on either side: with two or three samples, Welch's test against many controls selects
# genes of small variance.
MIN_TEST_SAMPLES = 4

# ((N, G) bool which genes each sample's perturbation changes, (N, G) log fold change)
TrueChange = Callable[[EvaluationSplit], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class SplitContext:
    """What all predictors of a split share, computed once."""

    split: EvaluationSplit
    resamples: Bootstrap
    axes: np.ndarray  # (G, D) principal axes of the visible expression
    errors: Mapping[str, np.ndarray]  # predictor to (N,) squared error, mean over genes and seeds
    true_change: TrueChange | None  # None if the truth is unknown

    @cached_property
    def conditions(self) -> np.ndarray:
        """(T,) indices of the treated conditions."""
        return np.unique(self.split.condition[self.split.treated])

    @cached_property
    def condition(self) -> np.ndarray:
        """(n,) position in `conditions` of each treated sample."""
        return np.searchsorted(self.conditions, self.split.condition[self.split.treated])

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """(T) the rows of each treated condition."""
        rows = np.flatnonzero(self.split.treated)
        return [rows[self.condition == index] for index in range(len(self.conditions))]

    @cached_property
    def effects(self) -> tuple[list[np.ndarray | None], np.ndarray] | None:
        """((T) differential genes (G,) bool, (T, G) changes): true if known, else by Welch's test.

        A gene set is None with too few samples for the test; all is None without controls.
        """
        if self.true_change is not None:
            changed, change = self.true_change(self.split)
            every = np.ones(len(changed), dtype=bool)
            return list(self.mean(changed, every) >= 0.5), self.mean(change, every)
        control = self.split.observed_control
        if control is None:
            return None
        genes = differential_genes_by_condition(self.split.observed, control, self)
        valid = np.isfinite(control.mean[:, 0])
        return genes, self.mean(self.split.observed, valid) - self.mean(control.mean, valid)

    def mean(self, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """(T, G) mean of values (N, G) over the valid (N,) samples of each treated condition.

        NaN rows for conditions without one.
        """
        number, used = len(self.conditions), valid[self.split.treated]
        condition, rows = self.condition[used], np.flatnonzero(self.split.treated & valid)
        counts = np.bincount(condition, minlength=number)[:, None]
        sums = condition_sums(values, condition, number, rows)
        with np.errstate(invalid="ignore"):
            return np.divide(sums, counts, out=sums)

    def mean_of_all(self, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """`mean`, of values that all predictors share: the last result is kept."""
        key = id(values)
        kept = self._means.get(key)
        if kept is None or not np.array_equal(kept[0], valid):
            kept = self._means[key] = valid, self.mean(values, valid)
        return kept[1]

    @cached_property
    def _means(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By the id of values (N, G) of the split."""
        return {}

    @cached_property
    def deltas(self) -> dict[int, np.ndarray | None]:
        """What `condition_deltas` has computed, by the id of a prediction of the split."""
        return {}

    @cached_property
    def observed_moments(self) -> metrics.GeneMoments:
        return metrics.GeneMoments(self.split.observed, self.resamples)

    @cached_property
    def observed_projection(self) -> np.ndarray:
        """(N, D)"""
        return self.split.observed @ self.axes

    def over_conditions(self, values: np.ndarray) -> MetricDraws:
        """The mean of values (T,) of the treated conditions, leaving out NaN."""
        of_all = np.full(self.resamples.number, np.nan)
        of_all[self.conditions] = values
        return MetricDraws(self.resamples.condition_mean(of_all), int(np.isfinite(values).sum()))

    def over_samples(self, values: np.ndarray) -> MetricDraws:
        """The mean of values (N,) of the samples, leaving out NaN."""
        valid = np.isfinite(values)
        sums = self.resamples.sums(np.where(valid, values, 0.0))
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums / self.resamples.sums(valid.astype(float))
        return MetricDraws(means, len(np.unique(self.split.condition[valid])))


def changes(
    predicted: PredictedSplit, context: SplitContext
) -> tuple[np.ndarray, np.ndarray] | None:
    """((T, G) observed, (T, G) predicted) change from control, over the predicted samples.

    NaN rows for conditions without a predicted sample or without controls on a side; None if no
    condition is left.
    """
    split = context.split
    observed_control, own_control = split.observed_control, split.control_of(predicted)
    if not len(context.conditions) or observed_control is None or own_control is None:
        return None
    first = predicted.values, observed_control.mean, own_control.mean
    valid = np.all([np.isfinite(values[:, 0]) for values in first], axis=0)
    if not valid[split.treated].any():
        return None
    observed = context.mean_of_all(split.observed, valid)
    observed = observed - context.mean_of_all(observed_control.mean, valid)
    own = context.mean(predicted.values, valid)
    return observed, own - context.mean_of_all(own_control.mean, valid)


def condition_deltas(predicted: PredictedSplit, context: SplitContext) -> np.ndarray | None:
    """(T,) delta_pearson of the treated conditions; None without controls."""
    key = id(predicted)
    if key not in context.deltas:
        pair = changes(predicted, context)
        context.deltas[key] = None if pair is None else condition_delta_pearson(*pair)
    return context.deltas[key]


def condition_delta_pearson(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(T,) delta_pearson of changes (T, G); NaN if not predicted, 0 if no change is predicted."""
    valid, result = np.isfinite(predicted[:, 0]), np.full(len(predicted), np.nan)
    every = slice(None) if valid.all() else valid
    result[valid] = np.nan_to_num(metrics.delta_pearson(observed[every], predicted[every]))
    return result


def differential_genes_by_condition(
    values: np.ndarray, control: Controls, context: SplitContext
) -> list[np.ndarray | None]:
    """(T) differential genes (G,) bool of values (N, G) against the matched controls.

    None with fewer than MIN_TEST_SAMPLES samples on a side.
    """
    result: list[np.ndarray | None] = []
    for rows in context.rows:
        rows = rows[np.isfinite(values[rows, 0]) & np.isfinite(control.mean[rows, 0])]
        name = context.split.context[rows[0]] if len(rows) else ""
        degrees = control.degrees_of_freedom.get(name, 0)
        if len(rows) < MIN_TEST_SAMPLES or degrees < MIN_TEST_SAMPLES - 1:
            result.append(None)
            continue
        _, first, members = np.unique(control.group[rows], return_index=True, return_counts=True)
        # Variance of the mean of the subtracted control means, in units of one control's.
        share = np.sum((members / len(rows)) ** 2 / control.number[rows[first]])
        change = values[rows] - control.mean[rows]
        result.append(changed_genes(change, control.deviation[name], degrees, share))
    return result
