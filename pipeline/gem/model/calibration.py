"""Probabilities of a classifier that mean what they say: one temperature per head (Guo et al., ICML 2017).

N samples, K classes. Labels are integers, -1 where missing; a sample without a label counts nowhere. Losses in nats.
"""

import numpy as np
from scipy.special import log_softmax, softmax

RANGE = (
    0.2,
    20.0,
)  # of temperatures: a head that names every sample right would become certain without the first
_HALVINGS = 60
BINS = 15  # of confidence, in the calibration error


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the negative log likelihood of labels (N,) under logits (N, K); 1 without any label.

    The loss is convex in the inverse temperature, so that its slope is halved down to the minimum; the same bits every time.
    """
    logits, labels = logits[labels >= 0].astype(np.float64), labels[labels >= 0]
    if not len(labels):
        return 1.0
    of_label = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        return float(((softmax(inverse * logits, axis=1) * logits).sum(axis=1) - of_label).mean())

    low, high = 1 / RANGE[1], 1 / RANGE[0]
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    found = 2 / (low + high)
    return (
        found
        if negative_log_likelihood(logits / found, labels) < negative_log_likelihood(logits, labels)
        else 1.0
    )


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the samples with a label, in nats; NaN where none has one."""
    known = labels >= 0
    if not known.any():
        return float("nan")
    return float(
        -log_softmax(logits[known].astype(np.float64), axis=1)[
            np.arange(known.sum()), labels[known]
        ].mean()
    )


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """(N, K) calibrated probabilities of logits (N, K)."""
    return softmax(logits.astype(np.float64) / temperature, axis=1)


def calibration_error(probability: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error of probabilities (N, K): mean over samples of |share that is right - confidence|, in BINS
    bins of equal width of the confidence in the named class. NaN where no sample has a label."""
    known = labels >= 0
    if not known.any():
        return float("nan")
    confidence, right = (
        probability[known].max(axis=1),
        probability[known].argmax(axis=1) == labels[known],
    )
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / known.sum())
