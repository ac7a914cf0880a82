"""Temperatures of label heads calibrate, and never worsen the likelihood they are fitted to."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.gem.model.calibration import (
    TEMPERATURE_RANGE,
    calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
)
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import fit


def draw(
    rng: np.random.Generator, samples: int, factor: float, classes: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the logits of their distribution multiplied by `factor`."""
    logits = rng.normal(0, 1.5, (samples, classes))
    cumulative = probabilities(logits, 1.0).cumsum(axis=1)
    labels = (cumulative < rng.random((samples, 1))).sum(axis=1)
    return (factor * logits).astype(np.float32), labels


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0, 10.0])
def test_the_temperature_calibrates_samples_that_it_was_not_fitted_to(rng, factor):
    logits, labels = draw(rng, 5000, factor)
    temperature = fit_temperature(logits[:2500], labels[:2500])
    assert temperature == pytest.approx(factor, rel=0.1)
    before, after = (
        calibration_error(probabilities(logits[2500:], t), labels[2500:])
        for t in (1.0, temperature)
    )
    assert after < 0.03
    assert factor == 1 or after < 0.4 * before


def test_the_temperature_never_worsens_the_likelihood(rng):
    for _ in range(50):
        shape = rng.integers(1, 40), rng.integers(2, 6)
        logits = rng.normal(0, rng.uniform(0.01, 20), shape)
        labels = rng.integers(-1, shape[1], shape[0])
        temperature = fit_temperature(logits, labels)
        assert TEMPERATURE_RANGE[0] <= temperature <= TEMPERATURE_RANGE[1]
        before = negative_log_likelihood(logits, labels)
        assert not negative_log_likelihood(logits / temperature, labels) > before


def test_the_temperature_has_the_least_negative_log_likelihood(rng):
    logits, labels = draw(rng, 300, 2.0)
    best = fit_temperature(logits, labels)
    lower, least, higher = (
        negative_log_likelihood(logits / (best * factor), labels) for factor in (0.99, 1.0, 1.01)
    )
    assert least < min(lower, higher)


def test_without_labels_the_temperature_is_one_and_the_error_is_nan(rng):
    missing = np.full(5, -1)
    assert fit_temperature(rng.normal(size=(5, 3)), missing) == 1.0
    assert np.isnan(calibration_error(np.full((5, 3), 1 / 3), missing))


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy():
    probability = np.array([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    labels = np.array([0] * 7 + [1] * 3 + [1] * 10)
    expected = (0.2 * 10 + 0.4 * 10) / 20
    assert calibration_error(probability, labels) == pytest.approx(expected)


def test_a_fit_calibrates_its_heads_on_the_selection_split_if_there_is_one(cohort, params):
    data = TrainingData.load(cohort, torch.device("cpu"))
    short = params.override({"train.epochs": 4})
    gem = fit(data, short, seed=1).gem
    labels = gem.metadata.labels(cohort.rows([data.selection_split]))
    logits = gem.logits(gem.posterior(cohort.expression([data.selection_split])).mean)
    changed = {name: t for name, t in gem.temperatures.items() if t != 1}
    assert changed
    for name, temperature in changed.items():
        before = negative_log_likelihood(logits[name], labels[name])
        assert negative_log_likelihood(logits[name] / temperature, labels[name]) < before
    without = fit(replace(data, validation=None, selection_split=None), short, seed=1).gem
    assert set(without.temperatures.values()) == {1.0}
