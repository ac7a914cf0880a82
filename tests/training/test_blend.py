"""The average of network and mixed model: its weight, its variance, its file."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.gem.data.splits import TRAIN
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.mixed.mixed_model import MixedModel
from pipeline.gem.model.observation import LatentSource
from pipeline.gem.model.query import decode
from pipeline.gem.training import blend
from pipeline.gem.training.blend import blend_with_mixed_model, mixed_samples, network_weight
from pipeline.gem.training.trainer import fit


@pytest.fixture(scope="module")
def fitted(data, params):
    return fit(data, params.override({"train.epochs": 3, "train.min_steps": 0}), seed=1)


@pytest.fixture(scope="module")
def mixed(data, cohort) -> MixedModel:
    samples = mixed_samples(data.train, data.encoder)
    return MixedModel.fit(data.encoder, cohort.declared, samples, len(data.genes))


def mean_prediction(gem: TrainedGEM, samples) -> np.ndarray:
    """(N, G) at the mean of the prior."""
    query = gem.decoder_input(samples, unknown="missing")
    with torch.no_grad():
        return decode(gem.network, query, query.latents.mean).numpy()


def test_weight_minimises_the_error_on_the_selection_split_but_for_its_shrinkage(
    fitted, mixed, data, cohort
):
    samples = cohort.rows([data.selection_split])
    observed = cohort.expression([data.selection_split])
    network = mean_prediction(fitted.gem, samples)
    linear = mean_prediction(replace(fitted.gem, mixed=mixed, network_weight=0.0), samples)
    grid = np.linspace(0, 1, 1001)
    errors = [((w * network + (1 - w) * linear - observed) ** 2).mean() for w in grid]
    best = grid[int(np.argmin(errors))]
    groups = ["tissue", "cell_type", "disease", "sex", "age_years"]
    groups += ["perturbation", "perturbation_type", "perturbation_dose", "perturbation_time"]
    conditions = len(samples[groups].astype(str).drop_duplicates())
    expected = best * conditions / (conditions + blend.PRIOR_CONDITIONS)
    assert network_weight(fitted.gem, mixed, data.validation) == pytest.approx(expected, abs=2e-3)


def test_weight_lies_between_zero_and_one(fitted, mixed, data, monkeypatch):
    observed = lambda gem, samples: samples.observed.expression  # noqa: E731
    monkeypatch.setattr(blend, "_network_mean", observed)
    assert 0.5 < network_weight(fitted.gem, mixed, data.validation) < 1
    opposite = lambda gem, samples: -samples.observed.expression  # noqa: E731
    monkeypatch.setattr(blend, "_network_mean", opposite)
    assert network_weight(fitted.gem, mixed, data.validation) == 0


def test_prediction_is_the_average_and_the_file_keeps_it(fitted, data, cohort, tmp_path):
    (blended,) = blend_with_mixed_model([fitted], data, cohort.declared)
    gem, samples = blended.gem, cohort.rows(["test_combination"])
    weight = gem.network_weight
    network = mean_prediction(replace(gem, mixed=None), samples)
    linear = mean_prediction(replace(gem, network_weight=0.0), samples)
    averaged = mean_prediction(gem, samples)
    np.testing.assert_allclose(averaged, weight * network + (1 - weight) * linear, atol=1e-5)
    gem.save(tmp_path / "model.safetensors")
    loaded = TrainedGEM.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(mean_prediction(loaded, samples), averaged)
    assert loaded.network_weight == weight and loaded.to_bytes() == gem.to_bytes()


def test_effects_are_fitted_again_with_the_selection_split(fitted, mixed, data, cohort):
    (blended,) = blend_with_mixed_model([fitted], data, cohort.declared)
    train, selection = cohort.rows([TRAIN]), cohort.rows([data.selection_split])
    final, first = blended.gem.mixed, mixed
    assert final.design == first.design and final.noise_variance == first.noise_variance

    def error(model, samples, split):
        gem = replace(blended.gem, mixed=model, network_weight=0.0)
        return ((mean_prediction(gem, samples) - cohort.expression([split])) ** 2).mean()

    assert error(final, selection, data.selection_split) < error(
        first, selection, data.selection_split
    )
    assert error(final, train, TRAIN) == pytest.approx(error(first, train, TRAIN), rel=0.05)


def test_without_a_selection_split_the_prediction_is_the_mixed_model_with_its_variance(
    fitted, data, cohort
):
    alone = replace(data, validation=None, selection_split=None)
    (blended,) = blend_with_mixed_model([fitted], alone, cohort.declared)
    assert blended.gem.network_weight == 0
    observation = blended.gem.network.observation
    variance = observation.log_variance(LatentSource.PRIOR).exp().detach()
    floor = float(np.exp(observation.min_log_variance))
    expected = blended.gem.mixed.variance.clamp_min(1.1 * floor)
    np.testing.assert_allclose(variance, expected, rtol=1e-3)


def test_models_of_counts_stay_as_they_are(fitted, data, cohort):
    params = fitted.gem.params.model_copy(update={"observation": "negative_binomial"})
    counts = replace(fitted, gem=replace(fitted.gem, params=params))
    assert blend_with_mixed_model([counts], data, cohort.declared) == [counts]
