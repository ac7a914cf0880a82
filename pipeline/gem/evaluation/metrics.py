"""Metrics of a prediction: pure functions of arrays, described in METRICS. NaN if undefined.

Intervals are in `bootstrap.py`; `de_direction` and `de_jaccard` in `differential_expression.py`.
N samples, G genes, C conditions, R resamples, K draws, n and m samples of one condition,
D principal components. Expression is log-CPM.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from scipy.spatial.distance import cdist, pdist

from pipeline.gem.evaluation.bootstrap import Bootstrap

# Sums of squares, and differences of cosines, that are rounding of float64 and not signal.
ROUNDING = 1e-12
# Transforms of more values tell nothing more, and take most of the time of a prediction.
PIT_VALUES, LEAST_PIT_GENES = 2**20, 256


@dataclass(frozen=True)
class Metric:
    """A row of METRICS. Direction "zero": the closer to zero, from either side, the better."""

    unit: str
    direction: Literal["lower", "higher", "zero"]
    best: float
    meaning: str


_share, _correlation = (partial(Metric, unit, "higher", 1.0) for unit in ("share", "correlation"))
METRICS = {
    "mse": Metric("log-CPM squared", "lower", 0.0, "mean squared error over genes and samples"),
    "mae": Metric("log-CPM", "lower", 0.0, "mean absolute error over genes and samples"),
    "skill": _share("mse on a scale from ridge regression (0) to the ideal predictor (1)"),
    "skill_replicate": _share("mse on a scale from ridge regression (0) to a replicate (1)"),
    "sample_pearson": _correlation("per sample over genes, averaged"),
    "gene_pearson": _correlation("per gene over samples, weighted by the gene's variance"),
    "delta_pearson": _correlation("of changes from control over genes, per treated condition"),
    "delta_pearson_systema": _correlation("of changes from the mean of visible perturbations"),
    "discrimination": _share("conditions less like a prediction than its own one (chance 0.5)"),
    "de_direction": _share("differential genes predicted with the right sign (chance 0.5)"),
    "de_jaccard": _share("overlap of predicted and observed (or true) differential genes"),
    "calibration": Metric(
        "share", "lower", 0.0, "deviation from uniform of the PIT of the counts, over ten bins"
    ),
    "count_log_likelihood": Metric(
        "nats a sample", "higher", 0.0, "log probability of all counts of a sample, given its total"
    ),
    "e_distance": Metric(
        "log-CPM", "lower", 0.0, "energy distance within a condition, on principal components"
    ),
    "spread_pearson": _correlation("of standard deviations within a condition, over genes"),
    "target_bias": Metric(
        "log-CPM", "zero", 0.0, "predicted minus observed expression of the perturbed gene itself"
    ),
}


# --- errors -------------------------------------------------------------------------------------


def squared_error(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(N,) mean over genes of the squared error of (N, G), log-CPM squared, in float64."""
    error = np.subtract(observed, predicted, dtype=np.float64)
    return np.einsum("ng,ng->n", error, error) / error.shape[1]


def absolute_error(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(N,) mean over genes of the absolute error of (N, G), log-CPM, in float64."""
    error = np.subtract(observed, predicted, dtype=np.float64)
    return np.abs(error, out=error).mean(axis=1)


def skill(error: np.ndarray, baseline: np.ndarray, ideal: np.ndarray) -> np.ndarray:
    """(R + 1,) reduction of the baseline's excess error over the ideal, as a share. Not clipped.

    NaN where the baseline is not above the ideal.
    """
    gap = baseline - ideal
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap > ROUNDING, (baseline - error) / gap, np.nan)


def target_bias(observed: np.ndarray, predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(N,) predicted minus observed log-CPM (N, G), mean over the genes with indices `target`
    (N, K), -1 for none. NaN for a sample without a target.
    """
    rows = np.arange(len(target))[:, None]
    # Index -1 reads the last gene, whose value is discarded.
    bias = np.subtract(predicted[rows, target], observed[rows, target], dtype=np.float64)
    number = (target >= 0).sum(axis=1)
    sums = np.where(target < 0, 0.0, bias).sum(axis=1)
    return np.divide(sums, number, out=np.full(len(target), np.nan), where=number > 0)


# --- correlations of levels and changes ---------------------------------------------------------


def sample_pearson(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(N,) correlation over genes; NaN for a constant row."""
    return _row_correlation(observed, predicted)


class GeneMoments:
    """Centred values (N, G) of genes in float64, and their means and variances in resamples, each
    (R + 1, G)."""

    def __init__(self, values: np.ndarray, resamples: Bootstrap):
        number = resamples.sums(np.ones(len(values)))[:, None]
        self.resamples = resamples
        self.weight = np.divide(1, number, out=np.zeros_like(number), where=number > 0)
        self.values = values - values.mean(axis=0, dtype=np.float64)
        self.mean = self.of(self.values)
        self.variance = self.of(np.square(self.values)) - np.square(self.mean)

    def of(self, values: np.ndarray) -> np.ndarray:
        """(R + 1, G) means of values (N, G); 0 for a resample without a sample."""
        return self.resamples.sums(values) * self.weight


def gene_pearson(observed: GeneMoments, predicted: np.ndarray) -> np.ndarray:
    """(R + 1,) correlation per gene over samples, averaged with the observed variance as weight.

    A gene predicted constant counts as 0. NaN where every gene is, or a resample has no sample.
    """
    moments = GeneMoments(predicted, observed.resamples)
    covariance = observed.of(observed.values * moments.values) - observed.mean * moments.mean
    variance_o, variance_p = observed.variance, moments.variance
    varies = variance_p > 1e-12 * np.maximum(variance_o, 1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = np.where(
            varies & (variance_o > 0), covariance / np.sqrt(variance_o * variance_p), 0.0
        )
        result = (correlation * variance_o).sum(axis=1) / variance_o.sum(axis=1)
    return np.where(varies.any(axis=1), result, np.nan)


def delta_pearson(observed_change: np.ndarray, predicted_change: np.ndarray) -> np.ndarray:
    """(C,) correlation over genes of predicted and observed changes (C, G).

    Changes are from the control, or from the mean of the centroids of visible perturbations
    (Systema, Nature Biotechnology 2025). The controls of the two sides must be disjoint samples: a
    shared control correlates with itself (0.7 for the perfect prediction of no effect). Scores from
    shared controls are marked (`EvaluationSplit.shared_control`).
    NaN where a change is constant over genes.
    """
    return _row_correlation(observed_change, predicted_change)


def spread_pearson(observed: np.ndarray, predicted: np.ndarray) -> float:
    """Correlation over genes of the standard deviations of two sets of samples (n, G), (m, G).

    NaN with fewer than two samples on a side, or if all deviations of a side are equal.
    """
    if len(observed) < 2 or len(predicted) < 2:
        return float("nan")
    observed_spread = observed.std(axis=0, ddof=1, dtype=np.float64)
    predicted_spread = predicted.std(axis=0, ddof=1, dtype=np.float64)
    return float(_row_correlation(observed_spread[None], predicted_spread[None])[0])


def _row_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row, in float64; NaN where a side is constant to rounding."""
    first = first - first.mean(axis=1, keepdims=True, dtype=np.float64)
    second = second - second.mean(axis=1, keepdims=True, dtype=np.float64)
    squares = [np.einsum("ng,ng->n", side, side) for side in (first, second)]
    with np.errstate(divide="ignore", invalid="ignore"):
        product = np.einsum("ng,ng->n", first, second)
        correlation = product / np.sqrt(squares[0] * squares[1])
    return np.where((squares[0] > ROUNDING) & (squares[1] > ROUNDING), correlation, np.nan)


# --- discrimination of conditions ---------------------------------------------------------------


def discrimination(observed_change: np.ndarray, predicted_change: np.ndarray) -> np.ndarray:
    """(C,) 1 - rank / (C - 1) of a condition's observed change among all observed changes (C, G),
    by cosine similarity with its predicted change (C, G).

    The perturbation discrimination score of Arc Institute's Virtual Cell Challenge, with mid-ranks:
    ties share their ranks, otherwise the order of the labels would decide. A change of zero (to
    rounding) has cosine 0 with all; predicted, it scores 0.5. NaN with fewer than two conditions.
    Raises ValueError for a change that is not finite: every cosine would compare as lower than NaN,
    which gives the best rank.
    """
    if not (np.isfinite(observed_change).all() and np.isfinite(predicted_change).all()):
        raise ValueError(
            "a change is not finite; leave out the conditions without a change, on both sides"
        )
    number = len(observed_change)
    if number < 2:
        return np.full(number, np.nan)
    cosine = _unit(predicted_change) @ _unit(observed_change).T  # (C predicted, C observed)
    advantage = cosine - np.diag(cosine)[:, None]
    closer = (advantage > ROUNDING).sum(axis=1)
    tied = (np.abs(advantage) <= ROUNDING).sum(axis=1) - 1  # without itself
    return 1 - (closer + tied / 2) / (number - 1)


def _unit(change: np.ndarray) -> np.ndarray:
    """(C, G) float64 rows of length 1, and of length 0 where a row is zero to rounding."""
    length = np.linalg.norm(change.astype(np.float64), axis=1, keepdims=True)
    return np.divide(change, length, out=np.zeros(change.shape), where=length**2 > ROUNDING)


# --- distributions ------------------------------------------------------------------------------


def pit_genes(samples: int, genes: int) -> np.ndarray:
    """Positions of the genes whose transforms are computed: all if they have at most PIT_VALUES
    values, else fewer, spread over all."""
    used = max(LEAST_PIT_GENES, PIT_VALUES // max(samples, 1))
    return np.unique(np.linspace(0, genes - 1, min(genes, used)).astype(int))


def randomised_pit(lower: np.ndarray, upper: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, G) uniform in [F(c - 1), F(c)] for observed counts c and predictive distribution F.

    The probability integral transform of a count (Smith 1985; Czado, Gneiting & Held, Biometrics
    65, 2009): exactly uniform on [0, 1] if counts are drawn from F.
    """
    return lower + rng.random(lower.shape) * (upper - lower)


def rank_pit(
    observed: np.ndarray, draws: Iterable[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """(N, G) rank of the observed (N, G) among K predictive draws (K, N, G), in [0, 1).

    (draws below + a uniform rank among the tied draws + U) / (K + 1): exactly uniform if observed
    and draws are exchangeable. `draws` is read once, one (N, G) at a time.
    """
    below, tied = np.zeros((2, *observed.shape), dtype=np.int64)
    number = 0
    for draw in draws:
        below += draw < observed
        tied += draw == observed
        number += 1
    rank = below + rng.integers(0, tied, endpoint=True) + rng.random(observed.shape)
    return rank / (number + 1)


def pit_histogram(pit: np.ndarray, condition: np.ndarray, bins: int = 10) -> np.ndarray:
    """(C, bins) counts of transforms (N, G) in equal bins of [0, 1], by condition (N,).

    Raises ValueError outside [0, 1].
    """
    if not ((pit >= 0) & (pit <= 1)).all():  # false for NaN also
        raise ValueError(
            "a probability integral transform is outside [0, 1]: not finite, "
            "or the two sides of the distribution are swapped"
        )
    number = int(condition.max()) + 1
    index = np.minimum((pit * bins).astype(np.int64), bins - 1)  # 1 belongs to the last bin
    cell = (condition[:, None] * bins + index).ravel()
    return np.bincount(cell, minlength=number * bins).reshape(number, bins)


def calibration(histogram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R + 1,) sum over bins of |share - 1 / bins| of histograms (C, bins), weighted (R + 1, C).

    From 0 (uniform) to 2 - 2 / bins (all in one bin); chance adds about sqrt(bins / values).
    NaN for a resample without values.
    """
    bins, counts = histogram.shape[1], weights @ histogram  # (R + 1, bins)
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    return np.abs(share - 1 / bins).sum(axis=1)


def e_distance(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples (n, D) and (m, D), Euclidean, in log-CPM.

    Szekely & Rizzo's energy distance (J. Stat. Plan. Inference 143, 2013). X and X' are two
    different samples: pairing a sample with itself, as in scPerturb, gives two sets of one
    distribution a positive distance that grows as the sets shrink. This unbiased form is 0 on
    average for them, so negative half of the time, and comparable between sets of different size.
    NaN with fewer than two samples on a side.
    """
    if len(x) < 2 or len(y) < 2:
        return float("nan")
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(2 * cdist(x, y).mean() - pdist(x).mean() - pdist(y).mean())
