"""Temperatures of label heads: never a worse likelihood where they are fitted, and probabilities that mean what they say."""

import numpy as np
import pytest
import torch

from pipeline.gem import GEM
from pipeline.gem.model.calibration import (
    RANGE,
    calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
)
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import fit


def drawn(
    rng: np.random.Generator, samples: int = 5000, classes: int = 4, factor: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `factor` times too sure, and labels drawn from the right ones."""
    logits = rng.normal(0, 1.5, (samples, classes))
    chances = probabilities(logits, 1.0)
    labels = (chances.cumsum(axis=1) < rng.random((samples, 1))).sum(axis=1)
    return (factor * logits).astype(np.float32), labels


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0, 10.0])
def test_the_temperature_of_a_miscalibrated_head_is_found_and_calibrates_samples_that_it_was_not_fitted_to(
    rng, factor
):
    logits, labels = drawn(rng, factor=factor)
    temperature = fit_temperature(logits[:2500], labels[:2500])
    assert temperature == pytest.approx(factor, rel=0.1)
    after = calibration_error(probabilities(logits[2500:], temperature), labels[2500:])
    assert after < 0.03
    if factor != 1:
        assert after < 0.4 * calibration_error(probabilities(logits[2500:], 1.0), labels[2500:])


def test_it_never_worsens_the_likelihood_where_it_is_fitted(rng):
    for _ in range(50):
        samples, classes = rng.integers(1, 40), rng.integers(2, 6)
        logits, labels = (
            rng.normal(0, rng.uniform(0.01, 20), (samples, classes)),
            rng.integers(-1, classes, samples),
        )
        temperature = fit_temperature(logits, labels)
        assert RANGE[0] <= temperature <= RANGE[1]
        if (labels >= 0).any():
            assert negative_log_likelihood(logits / temperature, labels) <= negative_log_likelihood(
                logits, labels
            )


def test_it_is_the_minimum(rng):
    logits, labels = drawn(rng, 300, factor=2.0)
    best = fit_temperature(logits, labels)
    loss = [
        negative_log_likelihood(logits / (best * factor), labels) for factor in (0.99, 1.0, 1.01)
    ]
    assert loss[1] < min(loss[0], loss[2])


def test_without_labels_it_is_one_and_no_error_is_known(rng):
    nothing = np.full(5, -1)
    assert fit_temperature(rng.normal(size=(5, 3)), nothing) == 1.0
    assert np.isnan(calibration_error(np.full((5, 3), 1 / 3), nothing))


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy():
    sure = np.array([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    labels = np.array([0] * 7 + [1] * 3 + [1] * 10)
    assert calibration_error(sure, labels) == pytest.approx((0.2 * 10 + 0.4 * 10) / 20)


def test_a_fit_calibrates_its_heads_on_the_choice_split_and_not_without_one(cohort, params):
    from dataclasses import replace

    data = TrainingData.load(cohort, torch.device("cpu"))
    short = params.override({"train.epochs": 4})
    gem: GEM = fit(data, short, seed=1).gem
    labels = gem.metadata.labels(cohort.rows([data.selection_split]))
    logits = gem.logits(gem.posterior(cohort.expression([data.selection_split])).mean)
    changed = [name for name, temperature in gem.temperatures.items() if temperature != 1]
    assert changed
    for name in changed:
        assert negative_log_likelihood(
            logits[name] / gem.temperatures[name], labels[name]
        ) < negative_log_likelihood(logits[name], labels[name])
    without = fit(replace(data, validation=None, selection_split=None), short, seed=1).gem
    assert set(without.temperatures.values()) == {1.0}
