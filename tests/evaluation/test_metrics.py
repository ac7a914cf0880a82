"""Metrics against independent computations, at extremes, known traps, and invariances."""

import numpy as np
import pytest
from scipy.stats import energy_distance, kstest, pearsonr, poisson, rankdata
from sklearn.metrics import mean_absolute_error, mean_squared_error

from pipeline.gem.evaluation.bootstrap import Bootstrap
from pipeline.gem.evaluation.metrics import (
    METRICS,
    GeneMoments,
    absolute_error,
    calibration,
    delta_pearson,
    discrimination,
    e_distance,
    gene_pearson,
    pit_genes,
    pit_histogram,
    randomised_pit,
    rank_pit,
    sample_pearson,
    skill,
    spread_pearson,
    squared_error,
    target_bias,
)

SAMPLES, GENES, CONDITIONS = 60, 25, 12
CONDITION = np.arange(SAMPLES) % CONDITIONS
# Metrics of an observed and a predicted array (N, G).
OF_ARRAYS = {
    "mse": squared_error,
    "mae": absolute_error,
    "sample_pearson": sample_pearson,
    "gene_pearson": lambda first, second: gene_pearson(
        GeneMoments(first, Bootstrap(CONDITION, 5, 0)), second
    ),
    "delta_pearson": delta_pearson,
    "discrimination": discrimination,
    "e_distance": e_distance,
    "spread_pearson": spread_pearson,
}


@pytest.fixture
def pair(rng) -> tuple[np.ndarray, np.ndarray]:
    """(N, G) observed and predicted log-CPM."""
    effect = rng.normal(0, 2, (CONDITIONS, GENES)) * (rng.random((CONDITIONS, GENES)) < 0.4)
    observed = rng.normal(5, 2, GENES) + effect[CONDITION] + rng.normal(0, 0.5, (SAMPLES, GENES))
    return observed, observed + rng.normal(0, 1, (SAMPLES, GENES))


def test_every_metric_has_a_unit_a_direction_a_best_value_and_a_meaning():
    lower = {"mse", "mae", "calibration", "e_distance"}
    # A probability of 1 has the logarithm 0.
    best_is_zero = lower | {"target_bias", "count_log_likelihood"}
    for name, metric in METRICS.items():
        assert metric.unit and metric.meaning, name
        expected = "lower" if name in lower else "higher"
        assert metric.direction == ("zero" if name == "target_bias" else expected), name
        assert metric.best == (0.0 if name in best_is_zero else 1.0), name


# --- against independent computations ---


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        (squared_error, mean_squared_error),
        (absolute_error, mean_absolute_error),
        (sample_pearson, lambda *rows: pearsonr(*rows).statistic),
        (delta_pearson, lambda *rows: pearsonr(*rows).statistic),
    ],
)
def test_errors_and_correlations_of_rows_are_those_of_scikit_learn_and_scipy(
    pair, metric, reference
):
    expected = [reference(*rows) for rows in zip(*pair, strict=True)]
    np.testing.assert_allclose(metric(*pair), expected, rtol=1e-10)


def test_gene_pearson_is_the_variance_weighted_correlation_over_samples(pair):
    observed, predicted = pair[0] * np.linspace(0.1, 3, GENES), pair[1]
    resamples = Bootstrap(CONDITION, 7, 0)
    values = gene_pearson(GeneMoments(observed, resamples), predicted)
    for value, weights in zip(values, resamples.weights, strict=True):
        rows = np.repeat(np.arange(SAMPLES), weights[CONDITION].astype(int))
        genes = zip(observed[rows].T, predicted[rows].T, strict=True)
        per_gene = [pearsonr(*gene).statistic for gene in genes]
        expected = np.average(per_gene, weights=observed[rows].var(axis=0))
        assert value == pytest.approx(expected, rel=1e-9)


def test_discrimination_is_the_mid_rank_of_the_cosine_distance(rng):
    # Few values, so that cosines tie often and exactly.
    observed, predicted = rng.integers(-1, 2, (2, 30, 3)).astype(float)
    expected, ties = [], 0
    for own, change in enumerate(predicted):
        lengths = np.linalg.norm(change) * np.linalg.norm(observed, axis=1)
        cosine = np.divide(observed @ change, lengths, out=np.zeros(30), where=lengths > 0)
        distance = np.round(-cosine, 9)
        ties += (distance == distance[own]).sum() > 1
        expected.append(1 - (rankdata(distance, method="average")[own] - 1) / 29)
    assert ties > 20
    np.testing.assert_allclose(discrimination(observed, predicted), expected, atol=1e-12)


def test_e_distance_is_that_of_loops_over_pairs_of_different_samples(rng):
    x, y = list(rng.normal(0, 1, (7, 4))), list(rng.normal(0.5, 2, (5, 4)))

    def mean_distance(first: list, second: list) -> float:
        return np.mean([np.linalg.norm(a - b) for a in first for b in second if a is not b])

    expected = 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)
    assert e_distance(np.array(x), np.array(y)) == pytest.approx(expected, rel=1e-12)


def test_e_distance_of_many_samples_is_that_of_scipy(rng):
    # In one dimension scipy has its square root over 2, with samples paired with themselves.
    x, y = rng.normal(0, 1, 3000), rng.normal(1, 1.5, 2000)
    assert e_distance(x[:, None], y[:, None]) == pytest.approx(energy_distance(x, y) ** 2, rel=0.02)


def test_e_distance_of_one_distribution_is_zero_on_average_for_any_number_of_samples(rng):
    for number in (2, 5, 20):
        values = [e_distance(*rng.normal(0, 1, (2, number, 10))) for _ in range(400)]
        assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(400)
        assert min(values) < 0
    assert e_distance(rng.normal(0, 1, (20, 10)), rng.normal(1, 1, (20, 10))) > 1


def test_spread_pearson_is_the_correlation_of_standard_deviations(rng):
    observed = rng.normal(0, rng.gamma(2, 1, GENES), (9, GENES))
    predicted = rng.normal(0, 1, (6, GENES))
    expected = pearsonr(np.std(observed, axis=0), np.std(predicted, axis=0)).statistic
    assert spread_pearson(observed, predicted) == pytest.approx(expected, rel=1e-10)


def test_target_bias_is_the_mean_over_the_target_genes_of_each_sample(pair, rng):
    target = rng.permuted(np.tile(np.arange(GENES), (SAMPLES, 1)), axis=1)[:, :2]
    target[rng.random(SAMPLES) < 0.4, 1] = -1
    target[rng.random(SAMPLES) < 0.2] = -1
    expected = [
        np.mean([predicted[g] - observed[g] for g in genes if g >= 0])
        if max(genes) >= 0
        else np.nan
        for observed, predicted, genes in zip(*pair, target, strict=True)
    ]
    np.testing.assert_allclose(target_bias(*pair, target), expected, rtol=1e-6)


# --- the probability integral transform ---


def test_transforms_of_counts_from_the_predictive_distribution_are_uniform(rng):
    # Many zeros: a transform that is not randomised would pile up.
    mean = rng.gamma(1, 2, (100, 40))
    counts = rng.poisson(mean)
    pit = randomised_pit(poisson.cdf(counts - 1, mean), poisson.cdf(counts, mean), rng)
    assert kstest(pit.ravel(), "uniform").pvalue > 0.01
    histogram = pit_histogram(pit, np.zeros(100, dtype=int))
    # Chance: each share varies by 0.3 / sqrt(4000) = 0.005.
    assert calibration(histogram, np.ones((1, 1)))[0] < 10 * 0.3 / np.sqrt(4000)


def test_a_transform_lies_between_the_two_sides_of_the_jump(rng):
    lower = rng.random((20, 30)) * 0.5
    upper = lower + rng.random((20, 30)) * 0.5
    pit = randomised_pit(lower, upper, rng)
    assert ((lower <= pit) & (pit <= upper)).all()
    np.testing.assert_array_equal(randomised_pit(lower, lower, rng), lower)


@pytest.mark.parametrize("draws", [1, 4, 19])
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_among_draws_of_the_same_distribution_are_uniform(rng, draws, ties):
    shape = draws + 1, 100, 40
    values = rng.poisson(0.7, shape) if ties else rng.standard_normal(shape)
    pit = rank_pit(values[0], iter(values[1:]), rng)
    assert ((pit >= 0) & (pit < 1)).all()
    assert kstest(pit.ravel(), "uniform").pvalue > 0.01


def test_a_rank_counts_the_draws_below_and_is_uniform_among_ties(rng):
    draws = np.repeat(np.array([1.0, 2.0, 2.0, 5.0]), 3000).reshape(4, 1, 3000)
    # (value, draws below, draws tied): uniform over the ranks from `below` to `below + tied`.
    for value, below, tied in ((0.0, 0, 0), (2.0, 1, 2), (9.0, 4, 0)):
        pit = rank_pit(np.full((1, 3000), value), draws, rng).ravel()
        assert kstest((5 * pit - below) / (tied + 1), "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("scale", "shift", "calibrated"),
    [(1, 0, True), (0.5, 0, False), (2, 0, False), (1, 0.5, False)],
)
def test_calibration_detects_a_wrong_scale_and_a_bias(rng, scale, shift, calibrated):
    observed, draws = rng.standard_normal((50, 40)), rng.standard_normal((99, 50, 40))
    pit = rank_pit(observed, shift + scale * draws, rng)
    deviation = calibration(pit_histogram(pit, np.zeros(50, dtype=int)), np.ones((1, 1)))[0]
    assert deviation < 0.1 if calibrated else deviation > 0.3


def test_every_resample_of_calibration_is_that_of_the_repeated_conditions(rng):
    pit, resamples = rng.random((SAMPLES, GENES)) ** 1.5, Bootstrap(CONDITION, 5, 0)
    values = calibration(pit_histogram(pit, CONDITION), resamples.weights)
    for value, weights in zip(values, resamples.weights, strict=True):
        rows = np.repeat(np.arange(SAMPLES), weights[CONDITION].astype(int))
        shares = np.histogram(pit[rows], bins=10, range=(0, 1))[0] / pit[rows].size
        assert value == pytest.approx(np.abs(shares - 0.1).sum(), rel=1e-10)


def test_calibration_is_zero_for_a_uniform_histogram_and_largest_for_one_bin():
    histogram = pit_histogram(np.array([[0.0, 1.0, 0.99]]), np.array([0]))
    np.testing.assert_array_equal(histogram, [[1, 0, 0, 0, 0, 0, 0, 0, 0, 2]])
    one_bin = calibration(np.array([[7, *[0] * 9]]), np.ones((1, 1)))
    assert one_bin[0] == pytest.approx(1.8)
    uniform = calibration(np.full((2, 10), 3), np.ones((1, 2)))
    assert uniform[0] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan])
def test_a_transform_outside_the_unit_interval_is_refused(value):
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        pit_histogram(np.array([[0.5, value]]), np.array([0]))


def test_a_resample_without_transforms_has_no_calibration():
    weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    values = calibration(np.array([[0, 0], [3, 3]]), weights)
    assert np.isnan(values).tolist() == [False, True, False]


# --- extremes ---


def test_a_mirrored_prediction_has_correlation_minus_one_and_the_lowest_rank(pair):
    change = pair[0] - pair[0].mean(axis=0)
    resamples = Bootstrap(CONDITION, 0, 0)
    assert gene_pearson(GeneMoments(change, resamples), -change)[0] == pytest.approx(-1, abs=1e-12)
    assert delta_pearson(change, -change) == pytest.approx(-1, abs=1e-12)
    np.testing.assert_array_equal(discrimination(change, -change), 0)


def test_a_shuffled_prediction_scores_as_by_chance(rng):
    observed, condition = rng.normal(0, 1, (400, 50)), np.arange(400) % 100
    shuffled = observed[rng.permutation(400)]
    # A standard error is 1 / sqrt(values), that of a uniform rank 0.29 / sqrt(values).
    assert abs(sample_pearson(observed, shuffled).mean()) < 5 / np.sqrt(400 * 50)
    resamples = Bootstrap(condition, 0, 0)
    assert abs(gene_pearson(GeneMoments(observed, resamples), shuffled)[0]) < 5 / np.sqrt(400 * 50)
    rank = discrimination(observed, shuffled).mean()
    assert rank == pytest.approx(0.5, abs=4 * 0.29 / np.sqrt(400))
    assert squared_error(observed, shuffled).mean() == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_has_no_correlation_even_if_binary_numbers_cannot_hold_it(rng, dtype):
    observed = rng.normal(5, 1, (30, 1000)).astype(dtype)
    constant = np.full((30, 1000), 0.1, dtype=dtype)
    per_gene = np.broadcast_to(rng.normal(5, 1, 1000).astype(dtype), (30, 1000))
    resamples = Bootstrap(np.arange(30), 3, 0)
    for metric in (sample_pearson, delta_pearson, spread_pearson):
        assert np.isnan(metric(observed, constant)).all()
        assert np.isnan(metric(constant, observed)).all()
    for predicted in (constant, per_gene):
        assert np.isnan(gene_pearson(GeneMoments(observed, resamples), predicted)).all()
        assert np.isnan(spread_pearson(observed, predicted))
    one_row = observed.copy()
    one_row[3] = 1.0
    assert np.flatnonzero(np.isnan(sample_pearson(observed, one_row))).tolist() == [3]


@pytest.mark.parametrize("metric", [spread_pearson, e_distance])
def test_fewer_than_two_samples_have_no_distribution(rng, metric):
    two, single = rng.normal(0, 1, (2, 5)), rng.normal(0, 1, (1, 5))
    assert np.isfinite(metric(two, two + single))
    for pair in ((two, single), (single, two), (single[:0], two)):
        assert np.isnan(metric(*pair))


def test_a_gene_predicted_constant_has_correlation_zero(pair):
    predicted, variance = pair[0].copy(), pair[0].var(axis=0)
    predicted[:, :5] = 1.0
    values = gene_pearson(GeneMoments(pair[0], Bootstrap(CONDITION, 0, 0)), predicted)
    assert values[0] == pytest.approx(variance[5:].sum() / variance.sum(), rel=1e-10)


def test_a_gene_observed_constant_has_no_weight(pair):
    observed, resamples = pair[0].copy(), Bootstrap(CONDITION, 0, 0)
    observed[:, 0] = 3.0
    expected = gene_pearson(GeneMoments(observed[:, 1:], resamples), pair[1][:, 1:])[0]
    values = gene_pearson(GeneMoments(observed, resamples), pair[1])
    assert values[0] == pytest.approx(expected, rel=1e-10)


# --- known traps ---


def test_without_effect_delta_pearson_is_zero_with_disjoint_and_high_with_shared_controls(rng):
    level = rng.normal(5, 2, 100)  # the perfect prediction of no effect
    treated, first, second = level + rng.normal(0, 1, (3, 200, 100))
    assert abs(delta_pearson(treated - first, level - second).mean()) < 0.1
    # One control on both sides: variance 1 of 2 is common, correlation 1 / sqrt(2).
    shared = delta_pearson(treated - first, level - first).mean()
    assert shared == pytest.approx(np.sqrt(0.5), abs=0.05)


def test_a_replicate_resampled_from_the_same_cells_has_a_signal_without_effect(rng):
    size, controls = 40, 20
    cells, others = rng.normal(0, 1, (2, 100, size, 100))
    first, second = rng.normal(0, 1, (2, 100, controls * size, 100)).mean(axis=2)
    observed = cells.mean(axis=1) - first
    assert abs(delta_pearson(observed, others.mean(axis=1) - second).mean()) < 0.05
    again = np.stack([row[rng.integers(0, size, size)] for row in cells]).mean(axis=1)
    # The cells' noise 1 / size is common; resampling adds as much, each control 1 / (20 size).
    expected = 1 / np.sqrt((1 + 1 / controls) * (2 + 1 / controls))
    assert delta_pearson(observed, again - second).mean() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_prediction_of_no_change_has_discrimination_half_in_any_order_of_labels(rng, order):
    observed = rng.normal(0, 1, (20, 50))
    predicted = observed.copy()
    predicted[:3] = 0
    # The position in a sort would give the first labels 1, the last ones 0.
    values = discrimination(observed[order], predicted[order])[order]
    np.testing.assert_array_equal(values, [0.5] * 3 + [1] * 17)


def test_the_same_prediction_for_all_conditions_has_discrimination_half_on_average(rng):
    observed, predicted = rng.normal(0, 1, (21, 50)), np.tile(rng.normal(0, 1, 50), (21, 1))
    assert discrimination(observed, predicted).mean() == pytest.approx(0.5, abs=1e-12)
    np.testing.assert_array_equal(discrimination(np.zeros((3, 4)), np.eye(3, 4)), 0.5)


def test_conditions_of_the_same_direction_share_their_ranks(rng):
    observed = rng.normal(0, 1, (10, 50))
    observed[4] = 3 * observed[7]  # cosines are equal up to rounding
    np.testing.assert_allclose(discrimination(observed, observed)[[4, 7]], 1 - 0.5 / 9, rtol=1e-12)


def test_fewer_than_two_conditions_have_no_discrimination(rng):
    assert np.isnan(discrimination(*rng.normal(0, 1, (2, 1, 5)))).tolist() == [True]
    assert discrimination(*np.zeros((2, 0, 5))).shape == (0,)


@pytest.mark.parametrize("side", [0, 1])
def test_discrimination_of_a_change_that_is_not_finite_is_refused(rng, side):
    changes = rng.normal(0, 1, (2, 4, 5))
    changes[side, 2, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        discrimination(*changes)


def test_the_effect_shared_by_all_perturbations_does_not_count_for_systema(rng):
    common, own = rng.normal(0, 2, 100), rng.normal(0, 1, (30, 100))
    observed, predicted = common + own, common + rng.normal(0, 0.1, (30, 100))
    assert delta_pearson(observed, predicted).mean() > 0.8
    assert abs(delta_pearson(observed - common, predicted - common).mean()) < 0.1


# --- skill ---


@pytest.mark.parametrize(
    ("error", "baseline", "ideal", "expected"),
    [
        (0.5, 0.5, 0.3, 0),
        (0.3, 0.5, 0.3, 1),
        (0.7, 0.5, 0.3, -1),
        (0.1, 0.6, 0.2, 1.25),
        (0.4, 0.3, 0.3, np.nan),  # the baseline is not above the ideal
        (0.4, 0.2, 0.3, np.nan),
    ],
)
def test_skill_is_zero_at_the_baseline_one_at_the_ideal_and_not_clipped(
    error, baseline, ideal, expected
):
    values = skill(*(np.array([value]) for value in (error, baseline, ideal)))
    assert values[0] == pytest.approx(expected, nan_ok=True)


# --- invariances and precision ---


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_no_metric_depends_on_the_order_of_genes(pair, rng, name):
    order, metric = rng.permutation(GENES), OF_ARRAYS[name]
    shuffled = metric(*(side[:, order] for side in pair))
    np.testing.assert_allclose(shuffled, metric(*pair), rtol=1e-10)


@pytest.mark.parametrize("name", [name for name in OF_ARRAYS if "pearson" in name])
def test_correlations_ignore_a_shift_and_a_positive_scale(pair, name):
    scaled = OF_ARRAYS[name](pair[0], 3 * pair[1] + 7)
    np.testing.assert_allclose(scaled, OF_ARRAYS[name](*pair), rtol=1e-10)


@pytest.mark.parametrize(
    "name", ["mse", "mae", "sample_pearson", "delta_pearson", "discrimination"]
)
def test_values_are_in_the_order_of_rows(pair, rng, name):
    order, metric = rng.permutation(SAMPLES), OF_ARRAYS[name]
    np.testing.assert_allclose(metric(*(side[order] for side in pair)), metric(*pair)[order])


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_single_precision_input_far_from_zero_loses_no_digits(pair, name):
    # An offset of 100,000 times the variation: sums of squares in float32 would keep no digit.
    metric, offset = OF_ARRAYS[name], 10_000.0
    single = [(offset + 0.1 * side).astype(np.float32) for side in pair]
    double = [side.astype(np.float64) for side in single]
    np.testing.assert_allclose(metric(*single), metric(*double), rtol=1e-6)
    if name != "discrimination":  # the cosine depends on the offset
        centred = [side - offset for side in double]
        np.testing.assert_allclose(metric(*single), metric(*centred), rtol=1e-6)


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_metrics_leave_their_inputs_unchanged(pair, name):
    before = [side.copy() for side in pair]
    OF_ARRAYS[name](*pair)
    np.testing.assert_array_equal(pair, before)


@pytest.mark.parametrize(
    ("samples", "number", "expected"),
    [(7, 1, 1), (7, 30_000, 30_000), (1_000, 2_000, 1_048), (1_000_000, 2_000, 256), (0, 3, 3)],
)
def test_transforms_are_of_genes_spread_over_all(samples, number, expected):
    genes = pit_genes(samples, number)
    assert len(genes) == expected and genes[0] == 0 and genes[-1] == number - 1
    assert len(genes) == 1 or np.ptp(np.diff(genes)) <= 1
