"""The expectation over count noise against sums over counts and simulation, and its tables against the expectation."""

import numpy as np
import pytest
from scipy.stats import nbinom

from pipeline.gem.simulation.expected_log_cpm import ExpectationGrid, Tables, expected_log_cpm
from pipeline.gem.simulation.generator import draw_counts, draw_truth

# --- the expectation over count noise -------------------------------------------------------------------------------


def brute_force(mean: float, dispersion: float, total: float) -> float:
    """The sum over counts, up to a tail of 1e-16 and beyond it by the largest term."""
    size, success = 1 / dispersion, 1 / (1 + dispersion * mean)
    counts = np.arange(int(nbinom.isf(1e-16, size, success)) + 50)
    return float(np.sum(nbinom.pmf(counts, size, success) * np.log1p(1e6 * counts / total)))


@pytest.mark.parametrize("total", [1e3, 2e4, 1e7])
@pytest.mark.parametrize("dispersion", [1e-3, 0.01, 0.3, 3.0, 50.0])
def test_the_expectation_is_the_sum_over_negative_binomial_counts(dispersion, total):
    means = np.array([1e-4, 0.01, 0.5, 3.0, 40.0, 1000.0])
    expected = [brute_force(mean, dispersion, total) for mean in means]
    np.testing.assert_allclose(
        expected_log_cpm(means, np.array(dispersion), np.array(total)), expected, atol=1e-8
    )


def test_the_expectation_of_a_large_count_is_the_sum_over_counts():
    assert float(expected_log_cpm(np.array(2e5), np.array(0.01), np.array(1e7))) == pytest.approx(
        brute_force(2e5, 0.01, 1e7), abs=1e-8
    )


def test_the_expectation_agrees_with_simulated_counts(rng):
    fraction, dispersion, total = (
        np.array([1e-6, 1e-4, 0.01, 0.3]),
        np.array([4.0, 0.5, 0.1, 0.02]),
        1e5,
    )
    counts = draw_counts(
        np.log(np.tile(fraction, (40_000, 1))), np.full(40_000, total), dispersion, rng
    )
    expression = np.log1p(1e6 * counts / total)
    error = expression.std(axis=0) / np.sqrt(40_000)
    assert (
        np.abs(
            expected_log_cpm(fraction * total, dispersion, np.array(total))
            - expression.mean(axis=0)
        )
        < 4.5 * error
    ).all()


def test_the_expectation_is_below_the_log_cpm_of_the_mean_and_meets_it_without_noise():
    means, total = np.array([0.1, 10.0, 1000.0]), np.array(1e5)
    plain = np.log1p(1e6 * means / total)
    assert (expected_log_cpm(means, np.array(0.2), total) < plain).all()  # Jensen
    assert float(expected_log_cpm(np.array(1e8), np.array(1e-10), np.array(1e9))) == pytest.approx(
        np.log1p(1e5), abs=1e-7
    )
    assert float(expected_log_cpm(np.array(0.0), np.array(0.2), total)) == 0


# --- its table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("totals", [(7e6, 1.4e7), (9e3, 4.5e4), (1e6, 1e6)])
def test_the_table_agrees_with_the_exact_expectation(rng, totals):
    dispersion = np.exp(rng.uniform(np.log(0.01), np.log(30), 12))
    log_fraction, depth = rng.uniform(-20, 0, (60, 12)), np.exp(rng.uniform(*np.log(totals), 60))
    depth[:2] = totals
    table = ExpectationGrid.build(dispersion, -20.0, 0.0, *totals).table()
    exact = expected_log_cpm(np.exp(log_fraction) * depth[:, None], dispersion, depth[:, None])
    np.testing.assert_allclose(table(log_fraction, depth), exact, atol=1e-4)


def test_a_blurred_table_is_the_expectation_over_normal_noise(rng):
    dispersion, blur, depth = np.array([0.01, 0.1, 1.0, 10.0]), 0.24, np.full(30, 1e6)
    log_fraction = rng.uniform(-16, -1, (30, 4))
    table = ExpectationGrid.build(dispersion, -18.0, 0.0, 1e6, 1e6).table(blur)
    nodes, weights = np.polynomial.hermite.hermgauss(60)
    expected = sum(
        weight
        / np.sqrt(np.pi)
        * expected_log_cpm(
            np.exp(log_fraction + np.sqrt(2) * blur * node) * 1e6, dispersion, np.array(1e6)
        )
        for node, weight in zip(nodes, weights, strict=True)
    )
    np.testing.assert_allclose(table(log_fraction, depth), expected, atol=1e-4)


def test_noise_wider_than_the_tables_reach_is_refused():
    with pytest.raises(ValueError, match=r"at most 0\.3"):
        ExpectationGrid.build(np.ones(2), -5.0, 0.0, 1e6, 1e6).table(0.31)


def test_tables_built_again_for_more_library_sizes_agree_with_the_first(params, rng):
    tables = Tables(draw_truth(params.synthesize, rng))
    few, many = np.array([9e6, 1e7]), np.array([2e6, 9e6, 1e7, 3e7])
    log_fraction = rng.uniform(-15, -1, (4, len(tables.dispersion)))
    first = tables.of(few, 0.2)(log_fraction[1:3], few)
    again = tables.of(many, 0.2)(log_fraction, many)
    np.testing.assert_allclose(again[1:3], first, atol=1e-4)
    assert tables.of(few, 0.2) is tables.of(many, 0.2)
