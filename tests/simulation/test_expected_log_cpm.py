"""The expected log-CPM against sums over counts and simulation, and its tables against it."""

import numpy as np
import pytest
from scipy.stats import nbinom

from pipeline.gem.simulation.expected_log_cpm import (
    ExpectationCache,
    ExpectationGrid,
    expected_log_cpm,
)
from pipeline.gem.simulation.generator import draw_counts, draw_truth


def sum_over_counts(mean: float, dispersion: float, total: float) -> float:
    """The expectation by its definition, up to a tail of 1e-16."""
    size, success = 1 / dispersion, 1 / (1 + dispersion * mean)
    counts = np.arange(int(nbinom.isf(1e-16, size, success)) + 50)
    return float(np.sum(nbinom.pmf(counts, size, success) * np.log1p(1e6 * counts / total)))


@pytest.mark.parametrize("total", [1e3, 2e4, 1e7])
@pytest.mark.parametrize("dispersion", [1e-3, 0.01, 0.3, 3.0, 50.0])
def test_expectation_is_the_sum_over_negative_binomial_counts(dispersion, total):
    means = np.array([1e-4, 0.01, 0.5, 3.0, 40.0, 1000.0])
    expected = [sum_over_counts(mean, dispersion, total) for mean in means]
    result = expected_log_cpm(means, np.array(dispersion), np.array(total))
    np.testing.assert_allclose(result, expected, atol=1e-8)


def test_expectation_of_a_large_count_is_the_sum_over_counts():
    result = float(expected_log_cpm(np.array(2e5), np.array(0.01), np.array(1e7)))
    assert result == pytest.approx(sum_over_counts(2e5, 0.01, 1e7), abs=1e-8)


def test_expectation_agrees_with_simulated_counts(rng):
    fraction, dispersion = np.array([1e-6, 1e-4, 0.01, 0.3]), np.array([4.0, 0.5, 0.1, 0.02])
    draws, total = 40_000, 1e5
    log_fraction = np.log(np.tile(fraction, (draws, 1)))
    counts = draw_counts(log_fraction, np.full(draws, total), dispersion, rng)
    expression = np.log1p(1e6 * counts / total)
    expected = expected_log_cpm(fraction * total, dispersion, np.array(total))
    error = expression.std(axis=0) / np.sqrt(draws)
    assert (np.abs(expected - expression.mean(axis=0)) < 4.5 * error).all()


def test_expectation_is_below_the_log_cpm_of_the_mean_and_equal_without_noise():
    means, total = np.array([0.1, 10.0, 1000.0]), np.array(1e5)
    log_cpm_of_mean = np.log1p(1e6 * means / total)
    assert (expected_log_cpm(means, np.array(0.2), total) < log_cpm_of_mean).all()  # Jensen
    noiseless = float(expected_log_cpm(np.array(1e8), np.array(1e-10), np.array(1e9)))
    assert noiseless == pytest.approx(np.log1p(1e5), abs=1e-7)
    assert float(expected_log_cpm(np.array(0.0), np.array(0.2), total)) == 0


# tables


@pytest.mark.parametrize(
    "totals", [(7e6, 1.4e7), (9e3, 4.5e4), (1e6, 1e6), (3e5, 3e7), (1e5, 1e8), (2e4, 2e6)]
)
def test_table_agrees_with_the_exact_expectation(rng, totals):
    dispersion = np.exp(rng.uniform(np.log(0.01), np.log(30), 12))
    log_fraction, depth = rng.uniform(-20, 0, (60, 12)), np.exp(rng.uniform(*np.log(totals), 60))
    depth[:2] = totals
    table = ExpectationGrid.build(dispersion, (-20.0, 0.0), totals).table()
    exact = expected_log_cpm(np.exp(log_fraction) * depth[:, None], dispersion, depth[:, None])
    np.testing.assert_allclose(table(log_fraction, depth), exact, atol=1e-4)


def test_table_with_noise_is_the_expectation_over_normal_noise(rng):
    dispersion, noise_sd, depth = np.array([0.01, 0.1, 1.0, 10.0]), 0.24, np.full(30, 1e6)
    log_fraction = rng.uniform(-16, -1, (30, 4))
    table = ExpectationGrid.build(dispersion, (-18.0, 0.0), (1e6, 1e6)).table(noise_sd)
    expected = np.zeros((30, 4))
    for node, weight in zip(*np.polynomial.hermite.hermgauss(60), strict=True):
        mean = np.exp(log_fraction + np.sqrt(2) * noise_sd * node) * 1e6
        expected += weight / np.sqrt(np.pi) * expected_log_cpm(mean, dispersion, np.array(1e6))
    np.testing.assert_allclose(table(log_fraction, depth), expected, atol=1e-4)


def test_noise_beyond_the_range_of_the_tables_is_refused():
    grid = ExpectationGrid.build(np.ones(2), (-5.0, 0.0), (1e6, 1e6))
    with pytest.raises(ValueError, match=r"at most 0\.3"):
        grid.table(0.31)


def test_tables_rebuilt_for_more_library_sizes_agree_with_the_first(params, rng):
    cache = ExpectationCache(draw_truth(params.synthesize, rng))
    few, many = np.array([9e6, 1e7]), np.array([2e6, 9e6, 1e7, 3e7])
    log_fraction = rng.uniform(-15, -1, (4, len(cache.dispersion)))
    first = cache.table(few, 0.2)(log_fraction[1:3], few)
    rebuilt = cache.table(many, 0.2)(log_fraction, many)
    np.testing.assert_allclose(rebuilt[1:3], first, atol=1e-4)
    assert cache.table(few, 0.2) is cache.table(many, 0.2)
