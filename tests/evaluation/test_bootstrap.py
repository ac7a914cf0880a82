"""The bootstrap: what is resampled, coverage of intervals, pairing, and values that are missing."""

import numpy as np
import pytest

from pipeline.gem.evaluation.bootstrap import Bootstrap, Score, condition_sums

CONDITIONS = 12
NO_INTERVAL = "one condition: no interval"


@pytest.fixture
def condition(rng) -> np.ndarray:
    """The condition of each of 60 samples, every condition present."""
    return np.concatenate([np.arange(CONDITIONS), rng.integers(0, CONDITIONS, 48)])


def test_conditions_are_resampled_and_not_samples():
    # One condition of a thousand samples, nine of one.
    condition = np.concatenate([np.zeros(1000, dtype=int), np.arange(1, 10)])
    resamples = Bootstrap(condition, 200, 0)
    weights = resamples.weights
    assert weights.shape == (201, 10)
    np.testing.assert_array_equal(weights[0], 1)
    np.testing.assert_array_equal(weights.sum(axis=1), 10)
    np.testing.assert_array_equal(resamples.sums(np.ones(1009)), weights @ np.bincount(condition))
    # The variance of a multinomial: n p (1 - p).
    np.testing.assert_allclose(weights[1:].var(axis=0).mean(), 0.9, rtol=0.15)


def test_resamples_are_set_by_the_seed(condition):
    weights = [Bootstrap(condition, 30, seed).weights for seed in (5, 5, 6)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_intervals_cover_the_truth_if_samples_of_a_condition_are_alike(rng):
    # Errors vary between 40 conditions of 5 samples; their mean over all conditions is 2.
    units = {"condition": np.repeat(np.arange(40), 5), "sample": np.arange(200)}
    covered = dict.fromkeys(units, 0)
    for trial in range(300):
        values = np.repeat(rng.gamma(2, 1, 40), 5) * rng.uniform(0.95, 1.05, 200)
        for unit, index in units.items():
            resamples = Bootstrap(index, 200, trial)
            score = resamples.score(resamples.mean(values))
            covered[unit] += score.low <= 2 <= score.high
    assert covered["condition"] / 300 > 0.89
    # If every sample is taken as a condition, intervals are far too narrow.
    assert covered["sample"] / 300 < 0.75


def test_paired_differences_have_narrower_intervals_than_scores(rng):
    difficulty, resamples = rng.gamma(2, 1, 50), Bootstrap(np.arange(50), 300, 0)
    first = resamples.mean(difficulty)
    second = resamples.mean(difficulty - 0.1 + rng.normal(0, 0.05, 50))
    difference, single = resamples.score(first - second), resamples.score(first)
    assert difference.low > 0
    assert difference.high - difference.low < 0.2 * (single.high - single.low)


def test_a_score_without_a_finite_value_is_null_with_a_reason(condition):
    score = Bootstrap(condition, 10, 0).score(np.full(11, np.nan))
    assert score.value is None and score.low is None and score.reason


def test_resamples_without_a_finite_value_are_left_out(condition):
    score = Bootstrap(condition, 4, 0).score(np.array([2.0, 1.0, np.nan, 3.0, np.inf]))
    assert (score.value, score.conditions) == (2.0, CONDITIONS)
    assert 1 <= score.low < score.high <= 3


def test_a_score_of_one_condition_has_no_interval(condition):
    resamples = Bootstrap(np.zeros(4, dtype=int), 10, 0)
    score = resamples.score(resamples.mean(np.arange(4.0)))
    assert score == Score(1.5, None, None, 1, NO_INTERVAL)
    resamples, values = Bootstrap(condition, 4, 0), np.array([2.0, 1.0, 2.0, 3.0, 2.5])
    assert resamples.score(values, conditions=3).conditions == 3
    assert resamples.score(values, conditions=1) == Score(2.0, None, None, 1, NO_INTERVAL)


# --- means and sums over conditions ---


def test_the_mean_over_conditions_leaves_out_those_without_a_value(condition, rng):
    resamples, values = Bootstrap(condition, 50, 0), rng.normal(0, 1, CONDITIONS)
    values[[2, 7]] = np.nan
    means = resamples.condition_mean(values)
    for mean, weights in zip(means, resamples.weights, strict=True):
        rows = np.repeat(np.arange(CONDITIONS), weights.astype(int))
        assert mean == pytest.approx(np.nanmean(values[rows]), rel=1e-12)


def test_a_resample_of_conditions_without_a_value_has_no_mean(condition):
    values, resamples = np.full(CONDITIONS, np.nan), Bootstrap(condition, 100, 0)
    assert np.isnan(resamples.condition_mean(values)).all()
    values[4] = 3.0
    present = resamples.weights[:, 4] > 0
    assert 10 < (~present).sum() < 90
    expected = np.where(present, 3, np.nan)
    np.testing.assert_array_equal(resamples.condition_mean(values), expected)


@pytest.mark.parametrize("shape", [(60,), (60, 4), (60, 4, 3)])
def test_sums_by_condition_are_those_of_a_loop(condition, rng, shape):
    values = rng.normal(0, 1, shape).astype(np.float32)
    # The last condition has no samples.
    expected = [
        values[condition == index].sum(axis=0, dtype=np.float64) for index in range(CONDITIONS + 1)
    ]
    sums = condition_sums(values, condition, CONDITIONS + 1)
    np.testing.assert_allclose(sums, expected, rtol=1e-12, atol=1e-12)
