"""What trials are judged by: figures of the choice split, each against what it must be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.gem.common.errors import DivergedError, InputError
from pipeline.gem.model.network import Gaussian
from pipeline.gem.search.objectives import figures_of, mean_leakage
from pipeline.gem.search.search_config import BETTER
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import FitResult, fit


@pytest.fixture(scope="module")
def data(cohort) -> TrainingData:
    return TrainingData.load(cohort, torch.device("cpu"))


@pytest.fixture(scope="module")
def fitted(data, params) -> FitResult:
    return fit(data, params, 1)


def test_every_metric_on_offer_is_a_number_and_the_same_every_time(fitted, data):
    found = figures_of(fitted, data, tuple(BETTER))
    assert list(found) == list(BETTER) and all(np.isfinite(value) for value in found.values())
    assert figures_of(fitted, data, tuple(BETTER)) == found
    assert found["predictive_log_likelihood"] == fitted.best.validation_predictive_log_likelihood
    assert 0 <= found["leakage"] <= 1


def test_reconstruction_is_the_bound_before_the_divergence_is_taken_off(fitted, data):
    """One posterior draw each, so about."""
    found = figures_of(fitted, data, ("reconstruction_log_likelihood", "evidence_lower_bound"))
    assert found["reconstruction_log_likelihood"] > found["evidence_lower_bound"]
    posterior = fitted.gem.posterior(data.validation.expression.numpy())
    prior = fitted.gem.network.joint_prior(data.validation.metadata, data.validation.index)
    divergence = (
        0.5
        * (
            prior.log_variance
            - posterior.log_variance
            - 1
            + (posterior.log_variance.exp() + (posterior.mean - prior.mean) ** 2)
            / prior.log_variance.exp()
        )
        .sum(dim=1)
        .mean()
    )
    assert found["reconstruction_log_likelihood"] - found["evidence_lower_bound"] == pytest.approx(
        float(divergence.detach()), abs=3.0
    )


def test_latents_that_spell_out_another_groups_label_leak_and_noise_does_not(
    fitted, data, monkeypatch
):
    """One label, in the biological group; given means in place of the posterior's: half of the two other groups tells it, then none."""
    samples = len(data.validation.expression)
    label = torch.arange(samples) % 2
    none = {
        group: torch.zeros_like(rows[:1]).repeat(samples, 1)
        for group, rows in data.validation.metadata.items()
    }
    assert data.encoder.groups["biological"][0].size >= 2
    none["biological"][torch.arange(samples), label] = 1.0
    rows = dict.fromkeys(none, torch.arange(samples))
    labelled = replace(data, validation=replace(data.validation, metadata=none, index=rows))
    noise = torch.randn(
        samples, sum(fitted.gem.network.sizes.values()), generator=torch.Generator().manual_seed(0)
    )
    telling = noise.clone()
    telling[:, fitted.gem.network.slices()["technical"].start] = 10.0 * label

    def leak_of(means: torch.Tensor) -> float:
        monkeypatch.setattr(
            type(fitted.gem),
            "posterior",
            lambda self, expression: Gaussian(means, torch.zeros_like(means)),
        )
        return mean_leakage(fitted, labelled)

    assert leak_of(telling) == pytest.approx(0.5 + leak_of(noise) / 2, abs=0.15)
    assert leak_of(noise) < 0.2


def test_a_cohort_without_labels_to_tell_apart_cannot_be_judged_by_leakage(fitted, data):
    none = {group: torch.zeros_like(rows) for group, rows in data.validation.metadata.items()}
    with pytest.raises(InputError, match="leakage cannot be measured"):
        mean_leakage(fitted, replace(data, validation=replace(data.validation, metadata=none)))


def test_a_figure_that_is_not_finite_fails_its_trial(fitted, data):
    broken = replace(fitted, best=replace(fitted.best, validation_mse=float("inf")))
    with pytest.raises(DivergedError, match="mse of the choice split is not finite"):
        figures_of(broken, data, ("mse",))
