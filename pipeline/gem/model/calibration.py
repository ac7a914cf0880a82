"""Calibration of classifiers: one temperature per head (Guo et al., ICML 2017).

N samples, K classes. Labels are integers, -1 where missing; samples without a label are left out.
"""

import numpy as np
from scipy.special import log_softmax, softmax

# Of temperatures: a head without errors would become certain without the lower limit.
TEMPERATURE_RANGE = (0.2, 20.0)
BINS = 15  # of confidence, in the calibration error
_BISECTIONS = 60


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the least negative log likelihood of labels (N,) under logits (N, K); 1
    without labels.

    The loss is convex in the inverse temperature. Bisection of its slope gives the same bits on
    every run.
    """
    logits, labels = logits[labels >= 0].astype(np.float64), labels[labels >= 0]
    if not len(labels):
        return 1.0
    logits_of_labels = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        expected = (softmax(inverse * logits, axis=1) * logits).sum(axis=1)
        return float((expected - logits_of_labels).mean())

    low, high = 1 / TEMPERATURE_RANGE[1], 1 / TEMPERATURE_RANGE[0]
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    temperature = 2 / (low + high)
    before = negative_log_likelihood(logits, labels)
    return temperature if negative_log_likelihood(logits / temperature, labels) < before else 1.0


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the samples with a label, in nats; NaN without any."""
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        return float("nan")
    log_probabilities = log_softmax(logits[rows].astype(np.float64), axis=1)
    return float(-log_probabilities[np.arange(len(rows)), labels[rows]].mean())


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """(N, K) calibrated probabilities from logits (N, K)."""
    return softmax(logits.astype(np.float64) / temperature, axis=1)


def calibration_error(probability: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error of probabilities (N, K): the mean over samples of |accuracy -
    confidence| in BINS bins of equal width of the confidence. NaN without labels."""
    probability, labels = probability[labels >= 0], labels[labels >= 0]
    if not len(labels):
        return float("nan")
    confidence, correct = probability.max(axis=1), probability.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))
