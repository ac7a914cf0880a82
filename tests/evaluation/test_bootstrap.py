"""The bootstrap: what is drawn, that intervals cover the truth, that differences are paired, what has no value."""

import numpy as np
import pytest

from pipeline.gem.evaluation.bootstrap import Bootstrap, Score, condition_sums

CONDITIONS = 12


@pytest.fixture
def condition(rng) -> np.ndarray:
    """The condition of each of 60 samples, every condition present."""
    return np.concatenate([np.arange(CONDITIONS), rng.integers(0, CONDITIONS, 48)])


def test_resamples_draw_conditions_and_not_samples():
    # One condition with a thousand samples, nine with one: a bootstrap over samples would see the thousand vary.
    condition = np.concatenate([np.zeros(1000, dtype=int), np.arange(1, 10)])
    resamples = Bootstrap(condition, 200, 0)
    assert resamples.weights.shape == (201, 10)
    np.testing.assert_array_equal(resamples.weights[0], 1)
    np.testing.assert_array_equal(resamples.weights.sum(axis=1), 10)
    np.testing.assert_array_equal(
        resamples.sums(np.ones(1009)), resamples.weights @ np.bincount(condition)
    )
    np.testing.assert_allclose(
        resamples.weights[1:].var(axis=0).mean(), 0.9, rtol=0.15
    )  # multinomial: n p (1 - p)


def test_the_same_seed_gives_the_same_resamples(condition):
    np.testing.assert_array_equal(
        Bootstrap(condition, 30, 5).weights, Bootstrap(condition, 30, 5).weights
    )
    assert (Bootstrap(condition, 30, 5).weights != Bootstrap(condition, 30, 6).weights).any()


def test_intervals_cover_the_truth_where_samples_of_a_condition_are_alike(rng):
    # Errors vary between 40 conditions with 5 samples each; the mean squared error over all conditions is 2.
    covered, covered_by_samples, trials = 0, 0, 300
    condition, alone = np.repeat(np.arange(40), 5), np.arange(200)
    for trial in range(trials):
        values = np.repeat(rng.gamma(2, 1, 40), 5) * rng.uniform(0.95, 1.05, 200)
        for number, codes in enumerate((condition, alone)):
            resamples = Bootstrap(codes, 200, trial)
            score = resamples.score(resamples.mean(values))
            inside = score.low <= 2 <= score.high
            covered += inside and number == 0
            covered_by_samples += inside and number == 1
    assert covered / trials > 0.89
    # As if every sample were a condition: far too narrow, so the choice of unit matters.
    assert covered_by_samples / trials < 0.75


def test_paired_differences_are_sharper_than_the_scores_themselves(rng):
    condition = np.arange(50)
    difficulty = rng.gamma(2, 1, 50)
    resamples = Bootstrap(condition, 300, 0)
    first, second = (
        resamples.mean(difficulty),
        resamples.mean(difficulty - 0.1 + rng.normal(0, 0.05, 50)),
    )
    difference, alone = resamples.score(first - second), resamples.score(first)
    assert difference.low > 0
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)


def test_a_score_without_a_finite_value_is_null_with_a_reason(condition):
    resamples = Bootstrap(condition, 10, 0)
    score = resamples.score(np.full(11, np.nan))
    assert score.value is None
    assert score.low is None
    assert score.reason


def test_resamples_without_a_finite_value_are_left_out(condition):
    resamples = Bootstrap(condition, 4, 0)
    score = resamples.score(np.array([2.0, 1.0, np.nan, 3.0, np.inf]))
    assert (score.value, score.conditions) == (2.0, CONDITIONS)
    assert 1 <= score.low < score.high <= 3


def test_one_condition_has_a_value_and_no_interval():
    resamples = Bootstrap(np.zeros(4, dtype=int), 10, 0)
    score = resamples.score(resamples.mean(np.arange(4.0)))
    assert score == Score(1.5, None, None, 1, "one condition: no interval")


def test_few_scored_conditions_are_counted_and_one_of_them_has_no_interval(condition):
    resamples = Bootstrap(condition, 4, 0)
    values = np.array([2.0, 1.0, 2.0, 3.0, 2.5])
    assert resamples.score(values, conditions=3).conditions == 3
    assert resamples.score(values, conditions=1) == Score(
        2.0, None, None, 1, "one condition: no interval"
    )


# --- means over conditions ------------------------------------------------------------------------------------------


def test_the_mean_over_conditions_weighs_conditions_and_leaves_out_those_without_a_value(
    condition, rng
):
    resamples, values = Bootstrap(condition, 50, 0), rng.normal(0, 1, CONDITIONS)
    values[[2, 7]] = np.nan
    found = resamples.condition_mean(values)
    assert found[0] == pytest.approx(np.nanmean(values), rel=1e-12)
    for draw, weights in enumerate(resamples.weights):
        rows = np.repeat(np.arange(CONDITIONS), weights.astype(int))
        assert found[draw] == pytest.approx(np.nanmean(values[rows]), rel=1e-12)


def test_a_resample_that_draws_no_condition_with_a_value_has_no_mean(condition):
    values = np.full(CONDITIONS, np.nan)
    values[4] = 3.0
    resamples = Bootstrap(condition, 100, 0)
    found, drawn = resamples.condition_mean(values), resamples.weights[:, 4] > 0
    assert 10 < (~drawn).sum() < 90
    np.testing.assert_array_equal(found[drawn], 3)
    assert np.isnan(found[~drawn]).all()
    assert np.isnan(resamples.condition_mean(np.full(CONDITIONS, np.nan))).all()


@pytest.mark.parametrize("shape", [(60,), (60, 4), (60, 4, 3)])
def test_sums_by_condition_are_those_of_a_loop(condition, rng, shape):
    values = rng.normal(0, 1, shape).astype(np.float32)
    expected = np.stack(
        [values[condition == index].sum(axis=0, dtype=np.float64) for index in range(CONDITIONS)]
    )
    np.testing.assert_allclose(
        condition_sums(values, condition, CONDITIONS), expected, rtol=1e-12, atol=1e-12
    )


def test_a_condition_without_samples_has_the_sum_zero():
    np.testing.assert_array_equal(
        condition_sums(np.array([1.0, 2.0]), np.array([0, 2]), 4), [1, 0, 2, 0]
    )
