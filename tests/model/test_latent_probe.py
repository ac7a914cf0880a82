"""Scores of latents against scikit-learn, and a probe that finds what is there and only that."""

import time

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from pipeline.gem.model.latent_probe import (
    PROBE_CLASS_SAMPLES,
    active_units,
    balanced_accuracy,
    leakage,
    majority_accuracy,
)


def latents_of(
    labels: np.ndarray, strength: float, rng: np.random.Generator, size: int = 8
) -> np.ndarray:
    """(N, L) standard normal latents, moved by class."""
    return (
        rng.normal(0, 1, (len(labels), size))
        + strength * rng.normal(0, 1, (labels.max() + 1, size))[labels]
    )


# --- accuracy -------------------------------------------------------------------------------------------------------


def test_balanced_accuracy_is_that_of_scikit_learn(rng):
    labels = rng.choice(5, 300, p=[0.6, 0.2, 0.1, 0.05, 0.05])
    predicted = np.where(rng.random(300) < 0.5, labels, rng.integers(0, 5, 300))
    assert balanced_accuracy(labels, predicted) == pytest.approx(
        balanced_accuracy_score(labels, predicted), rel=1e-12
    )


def test_samples_without_a_label_count_nowhere(rng):
    labels = rng.integers(-1, 4, 200)
    predicted, known = rng.integers(0, 4, 200), labels >= 0
    assert balanced_accuracy(labels, predicted) == balanced_accuracy(
        labels[known], predicted[known]
    )
    assert majority_accuracy(labels) == 0.25


def test_naming_the_commonest_class_has_the_majority_accuracy(rng):
    labels = rng.choice(3, 100, p=[0.8, 0.1, 0.1])
    assert balanced_accuracy(labels, np.zeros(100, dtype=int)) == pytest.approx(
        majority_accuracy(labels)
    )


def test_a_prediction_outside_the_present_classes_is_wrong_and_a_class_that_is_absent_is_not_averaged():
    labels = np.array([0, 0, 3, 3])
    assert balanced_accuracy(labels, np.array([0, 7, 3, 3])) == 0.75
    assert majority_accuracy(labels) == 0.5


def test_accuracies_without_any_label_have_no_value():
    nothing = np.full(3, -1)
    assert np.isnan(balanced_accuracy(nothing, np.zeros(3, dtype=int)))
    assert np.isnan(majority_accuracy(nothing))


# --- active units ---------------------------------------------------------------------------------------------------


def test_active_units_are_those_whose_means_vary_by_more_than_a_hundredth(rng):
    deviations = np.array([0.0, 0.05, 0.2, 1.0, 3.0])  # variances 0, 0.0025, 0.04, 1, 9
    means = rng.normal(0, 1, (2000, 5)) * deviations + 7
    assert active_units(means) == 3
    assert active_units(means.astype(np.float32)) == 3
    assert active_units(np.full((10, 4), 2.5)) == 0


# --- leakage --------------------------------------------------------------------------------------------------------


def test_a_probe_reads_a_label_that_is_there(rng):
    labels = rng.integers(0, 4, 400)
    found = leakage(latents_of(labels, 3.0, rng), labels, 0)
    assert found.accuracy > 0.95
    assert (found.chance, found.classes, found.reason) == (0.25, 4, "")


def test_a_probe_of_independent_latents_is_at_chance_on_average(rng):
    labels = rng.choice(4, 400, p=[0.7, 0.1, 0.1, 0.1])
    found = [leakage(latents_of(labels, 0.0, rng), labels, seed).accuracy for seed in range(20)]
    # One probe varies by about 0.03 around 0.25.
    assert np.mean(found) == pytest.approx(0.25, abs=0.03)


def test_a_collapsed_latent_leaks_nothing():
    labels = np.arange(60) % 3
    assert leakage(np.zeros((60, 5)), labels, 0).accuracy == pytest.approx(1 / 3)


def test_leakage_does_not_depend_on_the_scale_of_a_latent(rng):
    labels = rng.integers(0, 3, 200)
    latents = latents_of(labels, 0.7, rng)
    scaled = latents * np.geomspace(1e-4, 1e4, latents.shape[1]) + 5
    assert leakage(scaled, labels, 0).accuracy == pytest.approx(
        leakage(latents, labels, 0).accuracy, abs=0.02
    )


def test_leakage_is_judged_on_samples_that_the_probe_was_not_fitted_to(rng):
    # As many latents as samples: a probe judged on its own samples would read any label.
    labels = np.arange(60) % 2
    assert leakage(rng.normal(0, 1, (60, 60)), labels, 0).accuracy < 0.75


def test_the_order_and_the_names_of_classes_do_not_matter(rng):
    labels = rng.integers(0, 3, 300)
    latents, order = latents_of(labels, 0.7, rng), rng.permutation(300)
    plain = leakage(latents, labels, 0).accuracy
    # Another order is other folds: equal to their noise.
    assert leakage(latents[order], labels[order], 0).accuracy == pytest.approx(plain, abs=0.06)
    assert leakage(latents, np.array([7, 2, 40])[labels], 0).accuracy == pytest.approx(
        plain, abs=0.06
    )
    assert leakage(latents, labels, 0).accuracy == plain


def test_missing_labels_and_rare_classes_are_left_out_of_the_probe(rng):
    labels = np.concatenate(
        [np.arange(200) % 2, np.full(PROBE_CLASS_SAMPLES - 1, 2), np.full(50, -1)]
    )
    found = leakage(rng.normal(0, 1, (len(labels), 3)), labels, 0)
    assert (found.classes, found.chance) == (2, 0.5)
    enough = np.append(labels, 2)
    assert leakage(rng.normal(0, 1, (len(enough), 3)), enough, 0).classes == 3


@pytest.mark.parametrize(
    "labels", [np.full(20, -1), np.zeros(20, dtype=int), np.r_[np.zeros(20, dtype=int), 1, 1]]
)
def test_fewer_than_two_classes_is_null_with_a_reason(rng, labels):
    found = leakage(rng.normal(0, 1, (len(labels), 3)), labels, 0)
    assert found.accuracy is None
    assert "a probe needs two" in found.reason


def test_a_probe_takes_well_under_a_second_however_many_samples(rng):
    labels = rng.integers(0, 12, 20_000)
    latents = latents_of(labels, 0.5, rng, size=20)
    leakage(latents[:100], labels[:100], 0)  # imports and thread pools
    start = time.perf_counter()
    leakage(latents, labels, 0)
    assert time.perf_counter() - start < 2  # 0.3 s alone; this machine may be shared
