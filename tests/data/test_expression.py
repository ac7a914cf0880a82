"""Counts and log-CPM: the formula, the way back, and rounding to totals."""

import math

import numpy as np
import pytest

from pipeline.gem.data.expression import counts_from_log_cpm, log_cpm, round_to_totals


def test_log_cpm_is_the_logarithm_of_one_plus_counts_per_million_of_the_total(rng):
    counts = rng.poisson(rng.gamma(0.3, 300, (6, 15)))
    totals = counts.sum(axis=1) + 100  # totals may span genes that are not shown
    expected = [
        [math.log1p(1e6 * int(c) / int(total)) for c in row]
        for row, total in zip(counts, totals, strict=True)
    ]
    found = log_cpm(counts, totals)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected).astype(np.float32))


def test_log_cpm_does_not_depend_on_the_scale_of_counts_and_total(rng):
    counts = rng.integers(0, 1000, (4, 9))
    np.testing.assert_allclose(
        log_cpm(7 * counts, 7 * counts.sum(axis=1)), log_cpm(counts, counts.sum(axis=1)), rtol=1e-6
    )


def test_log_cpm_takes_unsigned_counts_of_every_width(rng):
    counts = rng.integers(0, 200, (3, 8))
    expected = log_cpm(counts, counts.sum(axis=1))
    for dtype in (np.uint8, np.uint16, np.uint32, np.float32):
        np.testing.assert_array_equal(log_cpm(counts.astype(dtype), counts.sum(axis=1)), expected)


@pytest.mark.parametrize("highest", [2, 30, 1_000, 2**15, 2**20])
def test_the_way_back_is_exact_for_counts_below_two_to_the_twenty(rng, highest):
    # Log-uniform, so that a row holds every magnitude up to the highest; and rows of one magnitude, the hardest to round.
    spread = np.floor(np.exp(rng.uniform(0, np.log(highest), (200, 50)))).astype(np.int64) * (
        rng.random((200, 50)) < 0.8
    )
    narrow = rng.integers(highest // 2, highest, (200, 50))
    for counts in (spread, narrow):
        counts[:, 0] = highest - 1
        totals = counts.sum(axis=1)
        np.testing.assert_array_equal(counts_from_log_cpm(log_cpm(counts, totals), totals), counts)


def test_the_way_back_is_exact_for_a_row_of_one_gene_and_for_a_row_that_one_gene_fills():
    counts = np.array([[0, 0, 5], [2**20 - 1, 0, 0], [2**20 - 1, 1, 0], [1, 1, 2**20 - 2]])
    np.testing.assert_array_equal(
        counts_from_log_cpm(log_cpm(counts, counts.sum(axis=1)), counts.sum(axis=1)), counts
    )
    one_gene = np.array([[3], [1_000_003]])
    np.testing.assert_array_equal(
        counts_from_log_cpm(log_cpm(one_gene, one_gene[:, 0]), one_gene[:, 0]), one_gene
    )


def test_generated_counts_have_exactly_the_requested_totals(rng):
    expression = rng.normal(4, 3, (300, 40))
    totals = np.floor(np.exp(rng.uniform(0, np.log(1e9), 300))).astype(np.int64)
    totals[:3] = [0, 1, 2]
    counts = counts_from_log_cpm(expression, totals)
    assert counts.dtype == np.int64
    assert (counts >= 0).all()
    np.testing.assert_array_equal(counts.sum(axis=1), totals)


def test_generated_counts_are_in_proportion_to_expression(rng):
    expression, totals = rng.uniform(0, 9, (5, 30)), np.full(5, 10**9)
    share = np.expm1(expression) / np.expm1(expression).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(counts_from_log_cpm(expression, totals), share * 1e9, atol=1.0)


def test_negative_expression_counts_as_none():
    expression = np.array([[-3.0, 2.0, -1e-9, 1.0]])
    clipped = np.array([[0.0, 2.0, 0.0, 1.0]])
    found = counts_from_log_cpm(expression, np.array([1000]))
    np.testing.assert_array_equal(found, counts_from_log_cpm(clipped, np.array([1000])))
    assert found[0, 0] == found[0, 2] == 0


def test_an_empty_row_is_refused_by_its_number():
    with pytest.raises(ValueError, match="row 1 has no counts"):
        log_cpm(np.array([[1, 2], [0, 0]]), np.array([3, 0]))
    with pytest.raises(ValueError, match="row 2 has no expression"):
        counts_from_log_cpm(np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]), np.array([5, 5, 5]))


def test_fractional_totals_are_refused():
    with pytest.raises(ValueError, match="whole numbers"):
        counts_from_log_cpm(np.ones((2, 3)), np.array([5.0, 5.5]))
    with pytest.raises(ValueError, match="whole numbers"):
        round_to_totals(np.ones((1, 3)), np.array([2.5]))


def test_the_largest_remainders_are_rounded_up():
    values = np.array([[1.2, 2.7, 0.6, 0.5], [0.1, 0.2, 0.3, 0.4], [2.0, 3.0, 0.0, 1.0]])
    np.testing.assert_array_equal(
        round_to_totals(values, np.array([5, 1, 6])), [[1, 3, 1, 0], [0, 0, 0, 1], [2, 3, 0, 1]]
    )


def test_ties_of_remainders_go_to_the_first_genes():
    np.testing.assert_array_equal(
        round_to_totals(np.full((1, 4), 0.5), np.array([2])), [[1, 1, 0, 0]]
    )


def test_rounding_moves_no_value_by_one_or_more_and_minimises_the_total_deviation(rng):
    values = rng.dirichlet(np.ones(6), 100) * 17
    rounded = round_to_totals(values, np.full(100, 17))
    np.testing.assert_array_equal(rounded.sum(axis=1), 17)
    assert (np.abs(rounded - values) < 1).all()
    # By exchange: taking a count from one gene and giving it to another never brings a row nearer to its values.
    nearest = np.abs(rounded - values).sum(axis=1)
    for giver in range(6):
        for taker in range(6):
            if giver != taker:
                moved = rounded.copy()
                moved[:, giver] -= 1
                moved[:, taker] += 1
                assert (np.abs(moved - values).sum(axis=1) >= nearest - 1e-9).all()
