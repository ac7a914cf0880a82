"""Drawn counts and parameters: moments, shares, reproducibility."""

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.simulation.expected_log_cpm import ExpectationCache
from pipeline.gem.simulation.generator import SparseEffects, draw_counts, draw_truth
from pipeline.gem.simulation.oracle import MetadataOracle, OmniscientOracle
from pipeline.gem.simulation.study_design import draw_design
from pipeline.gem.simulation.truth import Truth


def test_counts_have_negative_binomial_mean_and_variance(rng):
    log_fraction = np.log(np.array([[0.6, 0.3, 0.09, 0.01]]))
    dispersion, draws = np.array([0.01, 0.1, 0.5, 2.0]), 40_000
    repeated = np.repeat(log_fraction, draws, axis=0)
    counts = draw_counts(repeated, np.full(draws, 1000.0), dispersion, rng)
    mean = 1000 * np.exp(log_fraction[0])
    variance = mean + dispersion * mean**2
    assert np.issubdtype(counts.dtype, np.integer)
    assert (np.abs(counts.mean(axis=0) - mean) < 4.5 * np.sqrt(variance / draws)).all()
    kurtosis = ((counts - counts.mean(axis=0)) ** 4).mean(axis=0) / counts.var(axis=0) ** 2
    error = np.sqrt((kurtosis - 1) / draws)
    assert (np.abs(counts.var(axis=0) / variance - 1) < 4.5 * error).all()


def test_counts_are_proportional_to_the_library_size(rng):
    sizes = np.repeat([100.0, 10_000.0], 5000)
    counts = draw_counts(np.full((10_000, 10), -np.log(10)), sizes, np.full(10, 0.1), rng)
    np.testing.assert_allclose(counts[5000:].mean() / counts[:5000].mean(), 100, rtol=0.02)


@pytest.mark.parametrize(
    ("preset", "degrees"), [("bulk", 60.0), ("single_cell", 60.0), ("bulk", 3.0)]
)
def test_dispersion_follows_the_formula_of_splatter(params, preset, degrees):
    changes = {"genes": 3000, "preset": preset, "dispersion_degrees": degrees}
    settings = params.synthesize.model_copy(update=changes)
    truth = draw_truth(settings, np.random.default_rng(0))
    depth = {"bulk": 1e7, "single_cell": 2e4 * 3000 / 20_000}[preset]
    trend = 0.1 + 1 / np.sqrt(depth * np.exp(truth.baseline))
    # dispersion / trend^2 = n / chi2_n: its inverse has mean 1 and variance 2 / n.
    inverse = trend**2 / truth.dispersion
    assert inverse.mean() == pytest.approx(1, abs=4.5 * np.sqrt(2 / degrees / 3000))
    assert inverse.var() == pytest.approx(2 / degrees, rel=0.2)


@pytest.mark.parametrize("largest", [0.1, 0.6])
def test_programs_have_the_declared_share_of_genes(params, rng, largest):
    changes = {"genes": 2000, "mechanisms": 300, "program_share": largest}
    truth = draw_truth(params.synthesize.model_copy(update=changes), rng)
    shares = (truth.mechanism != 0).mean(axis=1)
    assert largest / 20 < shares.min() < largest / 5
    assert shares.max() == pytest.approx(largest, rel=0.15)
    assert shares.mean() == pytest.approx(0.55 * largest, rel=0.1)


def test_contexts_respond_with_the_declared_spread_and_silence(params, rng):
    changes = {"tissues": 40, "cell_types_per_tissue": 20, "genes": 20, "contexts_per_study": 2}
    changes |= {"response_spread": 0.3, "silent_share": 0.1}
    response = draw_truth(params.synthesize.model_copy(update=changes), rng).response
    assert (response == 0).mean() == pytest.approx(0.1, abs=0.03)
    assert np.log(response[response > 0]).std() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("unit", [False, True])
def test_sparse_effects_have_the_moments_of_their_quadrature(rng, unit):
    effects = SparseEffects(0.2, (1.2, 5.0), unit)
    drawn, (nodes, weights) = effects.draw((400, 500), rng), effects.quadrature()
    assert weights.sum() == pytest.approx(1)
    assert (drawn != 0).mean() == pytest.approx(0.2, abs=0.005)
    for power in (1, 2, 3, 4):
        error = 4.5 * (drawn**power).std() / np.sqrt(drawn.size)
        # Two nodes are exact for the cubic on each side; of degree four to a percent.
        expected = weights @ nodes**power
        assert (drawn**power).mean() == pytest.approx(expected, abs=error + 0.02 * abs(expected))
    if unit:
        assert weights @ nodes**2 == pytest.approx(1)


def test_expected_shares_sum_to_one(params, rng):
    truth = draw_truth(params.synthesize, rng)
    design = draw_design(params.synthesize, truth, rng)
    shares = np.exp(design.log_fractions(truth, slice(0, 200)))
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-12)
    assert np.exp(truth.baseline).sum() == pytest.approx(1)


def test_share_of_inactive_perturbations_is_the_declared_one(params, rng):
    settings = params.synthesize.model_copy(update={"perturbations": 4000, "genes": 20})
    inactive = (draw_truth(settings, rng).active[1:] == 0).mean()
    error = np.sqrt(0.15 * 0.85 / 4000)
    assert inactive == pytest.approx(settings.null_share, abs=4.5 * error)


def test_the_same_seed_gives_the_same_bits(params):
    def draw(seed: int):
        rng = np.random.default_rng(seed)
        truth = draw_truth(params.synthesize, rng)
        design = draw_design(params.synthesize, truth, rng)
        log_fraction = design.log_fractions(truth)
        return truth, design, draw_counts(log_fraction, design.library_size, truth.dispersion, rng)

    first, again, other = draw(5), draw(5), draw(6)
    for field in fields(Truth):
        np.testing.assert_array_equal(getattr(first[0], field.name), getattr(again[0], field.name))
    pd.testing.assert_frame_equal(first[1].samples, again[1].samples)
    np.testing.assert_array_equal(first[2], again[2])
    assert not np.array_equal(first[2], other[2])


def test_metadata_and_omniscient_oracle_agree_where_nothing_is_hidden(params, rng):
    """With one stratum of one donor, metadata determine the effects that counts are drawn from."""
    changes = {"strata_per_study": 1, "donors_per_stratum": 1, "samples": 200}
    settings = params.synthesize.model_copy(update=changes)
    truth = draw_truth(settings, rng)
    design = draw_design(settings, truth, rng)
    metadata = MetadataOracle(truth, set(truth.studies), set(truth.perturbations))
    omniscient = OmniscientOracle(ExpectationCache(truth))
    np.testing.assert_allclose(
        metadata.predict(design.samples, design.library_size),
        omniscient.predict(design.log_fractions(truth), design.library_size),
        atol=1e-4,
    )
