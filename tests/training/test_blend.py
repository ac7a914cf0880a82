"""The average of network and mixed model: its weight, its variance, its file."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from support.settings import ROOT

from pipeline.gem.data.splits import TRAIN
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.mixed import fit as mixed_fit
from pipeline.gem.model.mixed import terms, variance_components
from pipeline.gem.model.mixed.mixed_model import MixedModel
from pipeline.gem.model.observation import LatentSource
from pipeline.gem.model.query import decode
from pipeline.gem.training import blend
from pipeline.gem.training.blend import (
    blend_with_mixed_model,
    fit_mixed_model,
    network_weight,
    smallest_weight,
)
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.multi_seed import fit_and_refit
from pipeline.gem.training.trainer import fit


@pytest.fixture(scope="module")
def fitted(data, params):
    return fit(data, params.override({"train.epochs": 3, "train.min_steps": 0}), seed=1)


@pytest.fixture(scope="module")
def mixed(data, cohort) -> MixedModel:
    return fit_mixed_model(cohort, data.train, data.encoder, pooled=False)


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
    grid = np.linspace(0, 1, blend.WEIGHTS)
    groups = ["tissue", "cell_type", "disease", "sex", "age_years"]
    groups += ["perturbation", "perturbation_type", "perturbation_dose", "perturbation_time"]
    condition = samples[groups].astype(str).agg("|".join, axis=1).to_numpy()
    errors = pd.DataFrame(
        {w: ((w * network + (1 - w) * linear - observed) ** 2).sum(axis=1) for w in grid}
    )
    errors = errors.groupby(condition).sum()
    best = errors.sum().idxmin()
    weight = network_weight(fitted.gem, mixed, data.validation, at_random=False)
    assert weight == pytest.approx(best * len(errors) / (len(errors) + 2), abs=2e-3)
    more = errors.sub(errors[best], axis=0)
    within = more.mean() <= more.sem()
    weight = network_weight(fitted.gem, mixed, data.validation, at_random=True)
    smallest = within[within].index[0]
    assert weight == pytest.approx(smallest * len(errors) / (len(errors) + 32), abs=2e-3)


def test_weight_is_the_smallest_within_one_standard_error_of_the_best(rng):
    clear = rng.uniform(1, 2, (30, 1)) + np.array([9.0, 4.0, 0.0])
    assert smallest_weight(clear) == 2
    assert smallest_weight(clear[:1]) == 0
    unclear = np.array([[1.0, 0.0], [0.0, 0.9]] * 5)  # the second is better by a tenth of its noise
    assert smallest_weight(unclear) == 0


def test_weight_lies_between_zero_and_one(fitted, mixed, data, monkeypatch):
    observed = lambda gem, samples: samples.observed.expression  # noqa: E731
    monkeypatch.setattr(blend, "_network_mean", observed)
    assert 0.5 < network_weight(fitted.gem, mixed, data.validation, False) < 1
    opposite = lambda gem, samples: -samples.observed.expression  # noqa: E731
    monkeypatch.setattr(blend, "_network_mean", opposite)
    assert network_weight(fitted.gem, mixed, data.validation, False) == 0


def test_prediction_is_the_average_and_the_file_keeps_it(fitted, data, cohort, tmp_path):
    (blended,) = blend_with_mixed_model([fitted], data, cohort)
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


def test_after_a_refit_network_and_mixed_model_have_the_validation_samples(
    fitted, mixed, data, cohort, params
):
    changed = params.override({"train.epochs": 3, "train.min_steps": 0, "train.refit": 0.5})
    refitted = fit_and_refit(data, changed, cohort, seed=1)
    (before,) = blend_with_mixed_model([fitted], data, cohort)
    (after,) = blend_with_mixed_model([refitted], data, cohort)
    assert after.gem.network is refitted.refit.gem.network and after.gem.refit
    assert after.gem.network_weight == before.gem.network_weight  # chosen without these samples
    visible = TrainingData.load_visible(cohort, data.encoder, torch.device("cpu"))
    expected = fit_mixed_model(cohort, visible.train, visible.encoder, pooled=False)
    assert torch.equal(after.gem.mixed.coefficients, expected.coefficients)
    assert torch.equal(before.gem.mixed.coefficients, mixed.coefficients)
    for split in ("validation_perturbation", "validation_study"):
        samples, observed = cohort.rows([split]), cohort.expression([split])
        errors = [
            ((mean_prediction(each.gem, samples) - observed) ** 2).mean()
            for each in (before, after)
        ]
        assert errors[1] < errors[0]


def test_without_a_selection_split_the_prediction_is_the_mixed_model_with_its_variance(
    fitted, data, cohort
):
    alone = replace(data, validation=None, selection_split=None)
    (blended,) = blend_with_mixed_model([fitted], alone, cohort)
    assert blended.gem.network_weight == 0
    observation = blended.gem.network.observation
    variance = observation.log_variance(LatentSource.PRIOR).exp().detach()
    floor = float(np.exp(observation.min_log_variance))
    expected = blended.gem.mixed.variance.clamp_min(1.1 * floor)
    np.testing.assert_allclose(variance, expected, rtol=1e-3)


@pytest.fixture(scope="module")
def count_data(cohort):
    return TrainingData.load(cohort, torch.device("cpu"), with_counts=True)


@pytest.fixture(scope="module")
def counted(count_data, params):
    changes = {"model.observation": "negative_binomial", "train.epochs": 2, "train.min_steps": 0}
    return fit(count_data, params.override(changes), seed=1)


def test_models_of_counts_average_logits_and_choose_by_the_expected_log_cpm(
    counted, count_data, cohort
):
    (blended,) = blend_with_mixed_model([counted], count_data, cohort)
    gem, samples = blended.gem, cohort.rows(["test_combination"])
    network = mean_prediction(replace(gem, mixed=None), samples)
    linear = mean_prediction(replace(gem, network_weight=0.0), samples)
    weight = gem.network_weight
    expected = weight * network + (1 - weight) * linear
    np.testing.assert_allclose(mean_prediction(gem, samples), expected, atol=1e-4)
    selection = cohort.rows([count_data.selection_split])
    observed = cohort.expression([count_data.selection_split])
    totals = torch.from_numpy(selection["total"].to_numpy())

    def error(one: float) -> float:
        decoded = torch.from_numpy(mean_prediction(replace(gem, network_weight=one), selection))
        expected = gem.network.observation.expected_log_cpm(decoded, totals, LatentSource.PRIOR)
        return float(((expected.detach().numpy() - observed) ** 2).mean())

    assert error(weight) < min(error(1.0), 1.1 * error(0.0))


def test_pooled_counts_are_the_logarithm_of_all_counts_of_a_row(count_data, cohort):
    pooled = blend._pooled_samples(count_data.train, count_data.encoder)
    counts = cohort.counts([TRAIN]).astype(float)
    ((_, values),) = pooled.blocks()
    index = pooled_index(count_data)
    fractions = counts.sum(axis=0) / counts.sum()
    for row in (0, len(values) - 1):
        of_row = counts[index == row].sum(axis=0)
        prior = blend.PRIOR_COUNTS * len(fractions) * fractions
        expected = np.log((of_row + prior) / (of_row + prior).sum() * 1e6)
        np.testing.assert_allclose(values[row], expected, rtol=1e-6)
        size = of_row.sum() / counts.sum(axis=1).mean()
        assert pooled.numbers[row] == pytest.approx(size)


def pooled_index(data) -> np.ndarray:
    return blend._samples(data.train, data.encoder).index


def test_counts_that_do_not_fit_into_memory_leave_the_network_alone(
    counted, count_data, cohort, monkeypatch
):
    monkeypatch.setattr(blend, "_POOLED", 100)
    assert blend_with_mixed_model([counted], count_data, cohort) == [counted]


def test_the_mixed_model_can_be_left_out(fitted, data, cohort):
    params = fitted.gem.params.model_copy(update={"mixed_model": False})
    alone = replace(fitted, gem=replace(fitted.gem, params=params))
    assert blend_with_mixed_model([alone], data, cohort) == [alone]


def test_the_page_of_the_model_has_the_numbers_of_the_code():
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    assert f"at most {mixed_fit.VARIANCE_ROWS} metadata rows" in page
    assert f"at most {terms.MAX_COLUMNS:,} columns" in page
    assert f"for 3 to {terms.MAX_SIMILAR} contexts" in page
    assert f"of {blend.WEIGHTS} values" in page
    assert mixed_fit.GENE_CLASSES == 4 and "four classes" in page
    assert f"fewer than {2 * mixed_fit.CLASS_GENES} genes" in page
    assert variance_components.REML_SHARE == 0.1 and "one tenth is the likelihood" in page
    assert f"C / (C + {blend.PRIOR_CONDITIONS:g})" in page
