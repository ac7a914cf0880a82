"""Scores of a prediction: pure functions of arrays, each with an interval by bootstrap over conditions.

N samples, G genes, C conditions, R resamples. Expression is log-CPM. A score that does not apply is null with a reason.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Metric:
    """What a score means."""

    unit: str
    direction: Literal["lower", "higher"]
    best: float
    meaning: str


METRICS = {
    "mse": Metric("log-CPM squared", "lower", 0.0, "mean squared error over genes and samples"),
    "skill": Metric("share", "higher", 1.0, "share of the way from ridge regression (0) to the ideal predictor (1), by mse"),
    "sample_pearson": Metric("correlation", "higher", 1.0, "per sample over genes, averaged"),
    "gene_pearson": Metric("correlation", "higher", 1.0, "per gene over samples, weighted by the gene's variance"),
    "delta_pearson": Metric("correlation", "higher", 1.0, "per treated condition, predicted against observed change from control over genes, averaged"),
}


@dataclass(frozen=True)
class Score:
    """A value with its 95 % interval, or null with a reason."""

    value: float | None
    low: float | None = None
    high: float | None = None
    conditions: int = 0
    reason: str = ""

    @classmethod
    def null(cls, reason: str) -> "Score":
        return cls(None, reason=reason)


class Resamples:
    """Bootstrap weights over conditions, shared by all predictors of a split so that differences are paired."""

    def __init__(self, condition: np.ndarray, draws: int, seed: int):
        """`condition` (N,) index from 0 to C - 1 of each sample."""
        self.condition = condition
        self.number = int(condition.max()) + 1 if len(condition) else 0
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(self.number, np.full(self.number, 1 / max(self.number, 1)), draws) if self.number else np.zeros((draws, 0))
        # The first row is the sample itself.
        self.weights = np.concatenate([np.ones((1, self.number)), drawn])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(R + 1, ...) weighted sums of per-sample values (N, ...) over conditions."""
        per_condition = np.zeros((self.number, *values.shape[1:]))
        np.add.at(per_condition, self.condition, values)
        return np.tensordot(self.weights, per_condition, axes=1)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """(R + 1,) weighted means of per-sample values (N,)."""
        return self.sums(values) / self.sums(np.ones(len(values)))

    def score(self, values: np.ndarray) -> Score:
        """From (R + 1,) values, the first on the sample itself. Resamples without a finite value are left out."""
        if not np.isfinite(values[0]):
            return Score.null("not finite on these samples")
        resampled = values[1:][np.isfinite(values[1:])]
        if self.number < 2 or not len(resampled):
            reason = "one condition: no interval" if self.number < 2 else "no resample of the conditions has a finite value: no interval"
            return Score(float(values[0]), None, None, self.number, reason)
        low, high = np.quantile(resampled, [0.025, 0.975])
        return Score(float(values[0]), float(low), float(high), self.number)


def mse(observed: np.ndarray, predicted: np.ndarray, resamples: Resamples) -> np.ndarray:
    """(R + 1,) mean squared error over genes and samples."""
    return resamples.mean(np.square(observed - predicted, dtype=np.float64).mean(axis=1))


def skill(error: np.ndarray, baseline: np.ndarray, ideal: np.ndarray) -> np.ndarray:
    """(R + 1,) share of the baseline's excess error that is gone. NaN where baseline and ideal do not differ. Not clipped."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(baseline - ideal > 1e-12, (baseline - error) / (baseline - ideal), np.nan)


def sample_pearson(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(N,) correlation over genes; NaN for a constant row."""
    return _correlation(observed, predicted, axis=1)


def gene_pearson(observed: np.ndarray, predicted: np.ndarray, resamples: Resamples) -> np.ndarray:
    """(R + 1,) correlation per gene over samples, averaged with the gene's observed variance as weight.

    A gene predicted constant counts as 0; NaN where every gene is. Centred sums in float64.
    """
    observed = observed - observed.mean(axis=0, dtype=np.float64)
    predicted = predicted - predicted.mean(axis=0, dtype=np.float64)
    number = resamples.sums(np.ones(len(observed)))[:, None]
    mean_o, mean_p = resamples.sums(observed) / number, resamples.sums(predicted) / number
    variance_o = resamples.sums(observed**2) / number - mean_o**2
    variance_p = resamples.sums(predicted**2) / number - mean_p**2
    covariance = resamples.sums(observed * predicted) / number - mean_o * mean_p
    varies = variance_p > 1e-12 * np.maximum(variance_o, 1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = np.where(varies & (variance_o > 0), covariance / np.sqrt(variance_o * variance_p), 0.0)
        result = (correlation * variance_o).sum(axis=1) / variance_o.sum(axis=1)
    return np.where(varies.any(axis=1), result, np.nan)


def delta_pearson(
    observed: np.ndarray,
    predicted: np.ndarray,
    observed_control: np.ndarray,
    predicted_control: np.ndarray,
    condition: np.ndarray,
) -> np.ndarray:
    """(C,) per condition, correlation over genes of predicted and observed change from control, all (N, G).

    The two controls must be disjoint: a shared one correlates with itself. NaN where a change is constant over genes.
    """
    number = int(condition.max()) + 1
    changes = []
    for values in (observed - observed_control, predicted - predicted_control):
        total = np.zeros((number, values.shape[1]))
        np.add.at(total, condition, values)
        changes.append(total / np.bincount(condition, minlength=number)[:, None])
    return _correlation(*changes, axis=1)


def _correlation(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
    """Pearson correlation along an axis, in float64; NaN where a side is constant to rounding."""
    first = first - first.mean(axis=axis, keepdims=True, dtype=np.float64)
    second = second - second.mean(axis=axis, keepdims=True, dtype=np.float64)
    squares = (first**2).sum(axis=axis), (second**2).sum(axis=axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = (first * second).sum(axis=axis) / np.sqrt(squares[0] * squares[1])
    return np.where((squares[0] > 1e-12) & (squares[1] > 1e-12), correlation, np.nan)
