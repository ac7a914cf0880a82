"""The scores of a held-out condition: pure functions of observed and predicted expression.

n samples of a condition, G genes. Expression is log-CPM; an effect is a difference of log-CPM.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from pipeline.gem.data.expression import CPM

TOP = 50  # genes that change most
NO_EFFECT = 1e-4  # log-CPM, the largest of rounding: predictions are float32
# Name, unit, and whether more is better.
SCORES = {
    "mse": ("log-CPM squared", False),
    "pearson": ("correlation", True),
    "top_pearson": ("correlation", True),
    "top_direction": ("share", True),
    "calibration": ("share", False),
}

Scores = dict[str, float | None]


def condition_scores(
    observed: np.ndarray, predicted: np.ndarray, control: np.ndarray | None
) -> Scores:
    """Of the expression (G,) of a condition, and that of its controls, None without any.

    `mse`            mean over genes of the squared error
    `pearson`        correlation of predicted and observed effect over genes
    `top_pearson`    the same on the TOP genes whose observed effect is largest
    `top_direction`  the share of these whose predicted effect has the observed sign

    None without controls, and for an effect that is zero or the same in every gene.
    """
    observed, predicted = observed.astype(np.float64), predicted.astype(np.float64)
    scores: Scores = {"mse": float(np.square(predicted - observed).mean())}
    if control is None:
        return scores | dict.fromkeys(("pearson", "top_pearson", "top_direction"))
    effect, own = observed - control, predicted - control
    top = np.argsort(-np.abs(effect), kind="stable")[:TOP]
    has_effect = np.abs(own).max() > NO_EFFECT
    return scores | {
        "pearson": correlation(effect, own),
        "top_pearson": correlation(effect[top], own[top]),
        "top_direction": float(np.mean(effect[top] * own[top] > 0)) if has_effect else None,
    }


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's, over genes; None if a side does not vary."""
    first, second = first - first.mean(), second - second.mean()
    if min(np.abs(first).max(), np.abs(second).max()) <= NO_EFFECT:
        return None
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def half_scores(
    samples: np.ndarray,
    control: np.ndarray | None,
    combine: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> Scores | None:
    """Of one half of the samples (n, ...) predicted by the other; None with fewer than two.

    `combine` gives the expression (G,) of samples. Half the samples are a noisy ceiling.
    """
    if len(samples) < 2:
        return None
    order = rng.permutation(len(samples))
    half = len(samples) // 2
    parts = samples[order[:half]], samples[order[half:]]
    return condition_scores(combine(parts[0]), combine(parts[1]), control)


def log_cpm_of_sum(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(G,) of the sum of counts (n, G) with totals (n,) over all genes of the source."""
    return np.log1p(counts.sum(axis=0, dtype=np.float64) * (CPM / totals.sum(dtype=np.float64)))


def mean_scores(rows: Iterable[Mapping[str, float | None]]) -> Scores:
    """The mean of each score over those that have it; None if none has."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: float(np.mean(found)) if found else None for name, found in values.items()}
