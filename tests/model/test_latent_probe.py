"""Probes of latents: they find the information that is there, and no other."""

import time

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from pipeline.gem.model.latent_probe import (
    PROBE_CLASS_SAMPLES,
    active_units,
    balanced_accuracy,
    linear_probe,
    majority_accuracy,
)


def latents_of(
    labels: np.ndarray, strength: float, rng: np.random.Generator, size: int = 8
) -> np.ndarray:
    """(N, L) standard normal latents, shifted by class."""
    shift = rng.normal(0, 1, (labels.max() + 1, size))
    return rng.normal(0, 1, (len(labels), size)) + strength * shift[labels]


# --- accuracy ---


def test_balanced_accuracy_is_that_of_scikit_learn_over_the_labelled_samples(rng):
    labels = rng.choice(5, 300, p=[0.6, 0.2, 0.1, 0.05, 0.05])
    predicted = np.where(rng.random(300) < 0.5, labels, rng.integers(0, 5, 300))
    expected = balanced_accuracy_score(labels, predicted)
    assert balanced_accuracy(labels, predicted) == pytest.approx(expected, rel=1e-12)
    with_missing = np.append(labels, [-1, -1]), np.append(predicted, [0, 1])
    assert balanced_accuracy(*with_missing) == balanced_accuracy(labels, predicted)
    assert majority_accuracy(with_missing[0]) == 0.2


def test_majority_accuracy_is_the_balanced_accuracy_of_the_most_frequent_class(rng):
    labels = rng.choice(3, 100, p=[0.8, 0.1, 0.1])
    expected = pytest.approx(majority_accuracy(labels))
    assert balanced_accuracy(labels, np.zeros(100, dtype=int)) == expected


def test_a_prediction_of_an_absent_class_is_wrong(rng):
    assert balanced_accuracy(np.array([0, 0, 3, 3]), np.array([0, 7, 3, 3])) == 0.75


def test_accuracies_without_labels_are_nan():
    assert np.isnan(balanced_accuracy(np.full(3, -1), np.zeros(3, dtype=int)))
    assert np.isnan(majority_accuracy(np.full(3, -1)))


# --- active units ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_active_units_have_means_with_a_variance_above_a_hundredth(rng, dtype):
    deviations = np.array([0.0, 0.05, 0.2, 1.0, 3.0])  # variances 0, 0.0025, 0.04, 1, 9
    means = rng.normal(0, 1, (2000, 5)) * deviations + 7
    assert active_units(means.astype(dtype)) == 3


# --- linear probes ---


def test_a_probe_predicts_labels_that_the_latents_encode(rng):
    labels = rng.integers(0, 4, 400)
    result = linear_probe(latents_of(labels, 3.0, rng), labels, 0)
    assert result.accuracy > 0.95
    assert (result.chance, result.classes, result.reason) == (0.25, 4, "")


def test_probes_of_independent_latents_are_at_chance_on_average(rng):
    labels = rng.choice(4, 400, p=[0.7, 0.1, 0.1, 0.1])
    probes = [linear_probe(latents_of(labels, 0.0, rng), labels, seed) for seed in range(20)]
    # One probe varies by about 0.03 around 0.25.
    assert np.mean([probe.accuracy for probe in probes]) == pytest.approx(0.25, abs=0.03)


def test_a_probe_of_collapsed_latents_is_at_chance():
    assert linear_probe(np.zeros((60, 5)), np.arange(60) % 3, 0).accuracy == pytest.approx(1 / 3)


def test_a_probe_is_tested_on_samples_that_it_was_not_fitted_to(rng):
    # As many latents as samples: tested on its own samples, a probe would predict any label.
    labels = np.arange(60) % 2
    assert linear_probe(rng.normal(0, 1, (60, 60)), labels, 0).accuracy < 0.75


def test_a_probe_does_not_depend_on_scales_or_on_the_order_of_samples_and_classes(rng):
    labels = rng.integers(0, 3, 300)
    latents, order = latents_of(labels, 0.7, rng), rng.permutation(300)
    accuracy = linear_probe(latents, labels, 0).accuracy
    assert linear_probe(latents, labels, 0).accuracy == accuracy
    scaled = latents * np.geomspace(1e-4, 1e4, latents.shape[1]) + 5
    assert linear_probe(scaled, labels, 0).accuracy == pytest.approx(accuracy, abs=0.02)
    # Another order gives other folds, and so another accuracy within their noise.
    others = (latents[order], labels[order]), (latents, np.array([7, 2, 40])[labels])
    for other in others:
        assert linear_probe(*other, 0).accuracy == pytest.approx(accuracy, abs=0.06)


def test_missing_labels_and_rare_classes_are_left_out(rng):
    rare = np.full(PROBE_CLASS_SAMPLES - 1, 2)
    labels = np.concatenate([np.arange(200) % 2, rare, np.full(50, -1)])
    result = linear_probe(rng.normal(0, 1, (len(labels), 3)), labels, 0)
    assert (result.classes, result.chance) == (2, 0.5)
    labels = np.append(labels, 2)
    assert linear_probe(rng.normal(0, 1, (len(labels), 3)), labels, 0).classes == 3


@pytest.mark.parametrize("counts", [{-1: 20}, {0: 20}, {0: 20, 1: 2}])
def test_fewer_than_two_classes_is_none_with_a_reason(rng, counts):
    labels = np.repeat(list(counts), list(counts.values()))
    result = linear_probe(rng.normal(0, 1, (len(labels), 3)), labels, 0)
    assert result.accuracy is None
    assert "a probe needs two" in result.reason


def test_the_time_of_a_probe_does_not_grow_with_the_samples(rng):
    labels = rng.integers(0, 12, 20_000)
    latents = latents_of(labels, 0.5, rng, size=20)
    linear_probe(latents[:100], labels[:100], 0)  # imports and thread pools
    start = time.perf_counter()
    linear_probe(latents, labels, 0)
    assert time.perf_counter() - start < 2  # 0.3 s on an idle machine
