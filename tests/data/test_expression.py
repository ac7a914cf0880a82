"""Counts and log-CPM: the formula, its inverse, and rounding to totals."""

import math

import numpy as np
import pytest
from support.generation import counts_from_log_cpm

from pipeline.gem.data.expression import log_cpm, round_to_totals


def test_log_cpm_is_the_logarithm_of_one_plus_counts_per_million_of_the_total(rng):
    counts = rng.poisson(rng.gamma(0.3, 300, (6, 15)))
    totals = counts.sum(axis=1) + 100  # totals may include other genes
    expected = [
        [math.log1p(1e6 * int(count) / int(total)) for count in row]
        for row, total in zip(counts, totals, strict=True)
    ]
    expression = log_cpm(counts, totals)
    assert expression.dtype == np.float32
    np.testing.assert_array_equal(expression, np.array(expected).astype(np.float32))


def test_log_cpm_does_not_depend_on_the_scale_of_counts_and_total(rng):
    counts = rng.integers(0, 1000, (4, 9))
    scaled = log_cpm(7 * counts, 7 * counts.sum(axis=1))
    np.testing.assert_allclose(scaled, log_cpm(counts, counts.sum(axis=1)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
def test_log_cpm_does_not_depend_on_the_type_of_counts(rng, dtype):
    counts = rng.integers(0, 200, (3, 8))
    totals = counts.sum(axis=1)
    np.testing.assert_array_equal(log_cpm(counts.astype(dtype), totals), log_cpm(counts, totals))


@pytest.mark.parametrize("highest", [2, 30, 1_000, 2**15, 2**20])
def test_counts_below_two_to_the_twenty_are_recovered_exactly_from_log_cpm(rng, highest):
    # Rows of all magnitudes up to the highest, and rows of one magnitude, the hardest to round.
    spread = np.floor(np.exp(rng.uniform(0, np.log(highest), (200, 50)))).astype(np.int64)
    spread *= rng.random((200, 50)) < 0.8
    narrow = rng.integers(highest // 2, highest, (200, 50))
    for counts in (spread, narrow):
        counts[:, 0] = highest - 1
        totals = counts.sum(axis=1)
        np.testing.assert_array_equal(counts_from_log_cpm(log_cpm(counts, totals), totals), counts)


def test_a_sample_without_counts_is_an_error():
    with pytest.raises(ValueError, match="row 1 has no counts"):
        log_cpm(np.array([[1, 2], [0, 0]]), np.array([3, 0]))


@pytest.mark.parametrize(
    ("totals", "message"), [([2.5], "whole numbers"), ([7], "cannot bring to 7")]
)
def test_totals_that_rounding_cannot_reach_are_errors(totals, message):
    with pytest.raises(ValueError, match=message):
        round_to_totals(np.ones((1, 3)), np.array(totals))


def test_the_largest_remainders_are_rounded_up():
    values = np.array([[1.2, 2.7, 0.6, 0.5], [0.1, 0.2, 0.3, 0.4], [2.0, 3.0, 0.0, 1.0]])
    expected = [[1, 3, 1, 0], [0, 0, 0, 1], [2, 3, 0, 1]]
    np.testing.assert_array_equal(round_to_totals(values, np.array([5, 1, 6])), expected)


def test_ties_of_remainders_go_to_the_first_genes():
    rounded = round_to_totals(np.full((1, 4), 0.5), np.array([2]))
    np.testing.assert_array_equal(rounded, [[1, 1, 0, 0]])


def test_rounding_has_the_requested_totals_and_the_least_deviation(rng):
    values = rng.dirichlet(np.ones(6), 100) * 17
    rounded = round_to_totals(values, np.full(100, 17))
    np.testing.assert_array_equal(rounded.sum(axis=1), 17)
    assert (np.abs(rounded - values) < 1).all()
    # By exchange: moving a count from one gene to another never brings a row nearer its values.
    nearest = np.abs(rounded - values).sum(axis=1)
    for source in range(6):
        for target in set(range(6)) - {source}:
            moved = rounded.copy()
            moved[:, source] -= 1
            moved[:, target] += 1
            assert (np.abs(moved - values).sum(axis=1) >= nearest - 1e-9).all()
