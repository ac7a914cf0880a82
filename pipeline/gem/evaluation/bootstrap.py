"""Bootstrap over conditions: a score, its interval, and the weights that all predictors of a split share.

N samples, C conditions, R resamples. Conditions, not samples, are drawn: samples of a condition share their errors.
"""

import math
from copy import copy
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix


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


class Bootstrap:
    """Bootstrap weights over conditions, shared by all predictors of a split so that differences are paired."""

    def __init__(self, condition: np.ndarray, draws: int, seed: int):
        """`condition` (N,) index from 0 to C - 1 of each sample."""
        self.condition = condition
        self.number = int(condition.max()) + 1 if len(condition) else 0
        rng = np.random.default_rng(seed)
        drawn = (
            rng.multinomial(self.number, np.full(self.number, 1 / max(self.number, 1)), draws)
            if self.number
            else np.zeros((draws, 0))
        )
        # The first row is the sample itself.
        self.weights = np.concatenate([np.ones((1, self.number)), drawn])

    def of_rows(self, rows: np.ndarray) -> "Bootstrap":
        """The same resamples of the conditions for some of the samples, a mask (N,)."""
        part = copy(self)
        part.condition = self.condition[rows]
        return part

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(R + 1, ...) weighted sums of per-sample values (N, ...) over conditions."""
        return np.tensordot(
            self.weights, condition_sums(values, self.condition, self.number), axes=1
        )

    def mean(self, values: np.ndarray) -> np.ndarray:
        """(R + 1,) weighted means of per-sample values (N,)."""
        return self.sums(values) / self.sums(np.ones(len(values)))

    def condition_mean(self, values: np.ndarray) -> np.ndarray:
        """(R + 1,) weighted means of per-condition values (C,) over the conditions that have one; NaN in `values` is "none".

        NaN where a resample draws no condition with a value.
        """
        given = ~np.isnan(values)
        weight = self.weights @ given.astype(float)
        total = self.weights @ np.where(given, values, 0.0)
        return np.divide(total, weight, out=np.full(len(weight), np.nan), where=weight > 0)

    def score(self, values: np.ndarray, conditions: int | None = None) -> Score:
        """From (R + 1,) values, the first on the sample itself. Resamples without a finite value are left out.

        `conditions`: how many conditions the values rest on, where that is not all of them; with one there is no interval.
        """
        number = self.number if conditions is None else conditions
        if not np.isfinite(values[0]):
            return Score.null("not finite on these samples")
        resampled = values[1:][np.isfinite(values[1:])]
        if number < 2 or not len(resampled):
            reason = (
                "one condition: no interval"
                if number < 2
                else "no resample of the conditions has a finite value: no interval"
            )
            return Score(float(values[0]), None, None, number, reason)
        low, high = np.quantile(resampled, [0.025, 0.975])
        return Score(float(values[0]), float(low), float(high), number)


def condition_sums(values: np.ndarray, condition: np.ndarray, number: int) -> np.ndarray:
    """(C, ...) float64 sums of per-sample values (N, ...) by condition (N,); `number` is C."""
    samples = len(condition)
    # A sparse product: ten times as fast as np.add.at.
    member = csr_matrix(
        (np.ones(samples), (condition, np.arange(samples))), shape=(number, samples)
    )
    flat = values.reshape(samples, math.prod(values.shape[1:])).astype(np.float64, copy=False)
    return (member @ flat).reshape(number, *values.shape[1:])
