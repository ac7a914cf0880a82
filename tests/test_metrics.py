"""Every score against an independent computation, hand-made cases, invariances, and the bootstrap's coverage."""

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import mean_squared_error

from pipeline.gem.metrics import METRICS, Resamples, Score, delta_pearson, gene_pearson, mse, sample_pearson, skill

SAMPLES, GENES, CONDITIONS = 60, 25, 12


@pytest.fixture
def scene(rng):
    """Observed and predicted log-CPM, and the condition of each sample, every condition present."""
    condition = np.concatenate([np.arange(CONDITIONS), rng.integers(0, CONDITIONS, SAMPLES - CONDITIONS)])
    observed = rng.normal(5, 2, (SAMPLES, GENES))
    return observed, observed + rng.normal(0, 1, (SAMPLES, GENES)), condition


def everything(observed, predicted, control_o, control_p, condition, draws=0):
    """All scores of a prediction, by name, on the sample itself."""
    resamples = Resamples(condition, draws, 0)
    return {
        "mse": mse(observed, predicted, resamples)[0],
        "sample_pearson": resamples.mean(sample_pearson(observed, predicted))[0],
        "gene_pearson": gene_pearson(observed, predicted, resamples)[0],
        "delta_pearson": delta_pearson(observed, predicted, control_o, control_p, condition).mean(),
    }


# --- against independent computations -------------------------------------------------------------------------------


def test_mse_is_the_mean_over_genes_and_samples(scene):
    observed, predicted, condition = scene
    assert mse(observed, predicted, Resamples(condition, 5, 0))[0] == pytest.approx(mean_squared_error(observed, predicted), rel=1e-12)


def test_sample_pearson_is_the_correlation_over_genes_of_each_sample(scene):
    observed, predicted, _ = scene
    expected = [pearsonr(o, p).statistic for o, p in zip(observed, predicted, strict=True)]
    np.testing.assert_allclose(sample_pearson(observed, predicted), expected, rtol=1e-10)


def test_gene_pearson_is_the_variance_weighted_correlation_over_samples_of_each_gene(scene):
    observed, predicted, condition = scene
    observed = observed * np.linspace(0.1, 3, GENES)
    per_gene = [pearsonr(observed[:, gene], predicted[:, gene]).statistic for gene in range(GENES)]
    expected = np.average(per_gene, weights=observed.var(axis=0))
    assert gene_pearson(observed, predicted, Resamples(condition, 0, 0))[0] == pytest.approx(expected, rel=1e-10)


def test_delta_pearson_is_the_correlation_of_the_mean_changes_of_each_condition(scene, rng):
    observed, predicted, condition = scene
    controls = rng.normal(5, 2, (2, SAMPLES, GENES))
    expected = []
    for index in range(CONDITIONS):
        inside = condition == index
        change_o = observed[inside].mean(axis=0) - controls[0][inside].mean(axis=0)
        change_p = predicted[inside].mean(axis=0) - controls[1][inside].mean(axis=0)
        expected.append(pearsonr(change_o, change_p).statistic)
    np.testing.assert_allclose(delta_pearson(observed, predicted, *controls, condition), expected, rtol=1e-9)


def test_every_resample_is_the_score_of_the_samples_repeated_by_condition(scene):
    observed, predicted, condition = scene
    resamples = Resamples(condition, 7, 0)
    of_mse, of_genes = mse(observed, predicted, resamples), gene_pearson(observed, predicted, resamples)
    for draw, weights in enumerate(resamples.weights):
        rows = np.repeat(np.arange(SAMPLES), weights[condition].astype(int))
        plain = Resamples(np.zeros(len(rows), dtype=int), 0, 0)
        assert of_mse[draw] == pytest.approx(mean_squared_error(observed[rows], predicted[rows]), rel=1e-10)
        assert of_genes[draw] == pytest.approx(gene_pearson(observed[rows], predicted[rows], plain)[0], rel=1e-9)


# --- hand-made cases ------------------------------------------------------------------------------------------------


def test_a_perfect_prediction_has_the_best_value_of_every_metric(scene, rng):
    observed, _, condition = scene
    control = rng.normal(5, 2, (SAMPLES, GENES))
    for name, value in everything(observed, observed, control, control, condition).items():
        assert value == pytest.approx(METRICS[name].best, abs=1e-12), name


def test_a_mirrored_prediction_has_correlation_minus_one(scene):
    observed, _, condition = scene
    zero = np.zeros_like(observed)
    scores = everything(observed, -observed, zero, zero, condition)
    for name in ("sample_pearson", "gene_pearson", "delta_pearson"):
        assert scores[name] == pytest.approx(-1, abs=1e-12)


def test_correlations_ignore_a_shift_and_a_positive_scale(scene, rng):
    observed, predicted, condition = scene
    zero = np.zeros_like(observed)
    plain, moved = (everything(observed, values, zero, zero, condition) for values in (predicted, 3 * predicted + 7))
    for name in ("sample_pearson", "gene_pearson", "delta_pearson"):
        assert moved[name] == pytest.approx(plain[name], rel=1e-10)


def test_a_shuffled_prediction_scores_about_nothing(rng):
    observed = rng.normal(0, 1, (400, 50))
    shuffled, zero, condition = observed[rng.permutation(400)], np.zeros((400, 50)), np.arange(400) % 100
    scores = everything(observed, shuffled, zero, zero, condition)
    # Standard errors: 1 / sqrt(samples x genes) for the first two, 1 / sqrt(conditions x genes) for the third.
    assert abs(scores["sample_pearson"]) < 5 / np.sqrt(400 * 50)
    assert abs(scores["gene_pearson"]) < 5 / np.sqrt(400 * 50)
    assert abs(scores["delta_pearson"]) < 5 / np.sqrt(100 * 50)
    assert scores["mse"] == pytest.approx(2, rel=0.05)


def test_constant_input_gives_no_number_where_a_correlation_has_none(scene):
    observed, predicted, condition = scene
    constant = np.full_like(observed, 4.2)
    assert np.isnan(sample_pearson(observed, constant)).all()
    assert np.isnan(sample_pearson(constant, predicted)).all()
    assert np.isnan(gene_pearson(observed, constant, Resamples(condition, 3, 0))).all()
    zero = np.zeros_like(observed)
    assert np.isnan(delta_pearson(observed, constant, zero, zero, condition)).all()
    one_row = predicted.copy()
    one_row[3] = 1.0
    assert np.flatnonzero(np.isnan(sample_pearson(observed, one_row))).tolist() == [3]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_that_binary_numbers_cannot_hold_is_still_constant(rng, dtype):
    observed = rng.normal(5, 1, (30, 1000)).astype(dtype)
    constant = np.full((30, 1000), 0.1, dtype=dtype)
    resamples = Resamples(np.arange(30), 3, 0)
    assert np.isnan(sample_pearson(observed, constant)).all()
    assert np.isnan(gene_pearson(observed, constant, resamples)).all()
    per_gene = np.broadcast_to(rng.normal(5, 1, 1000).astype(dtype), (30, 1000))
    assert np.isnan(gene_pearson(observed, per_gene, resamples)).all()


def test_a_gene_predicted_constant_counts_as_no_correlation(scene):
    observed, _, condition = scene
    predicted = observed.copy()
    predicted[:, :5] = 1.0
    variance = observed.var(axis=0)
    expected = variance[5:].sum() / variance.sum()
    assert gene_pearson(observed, predicted, Resamples(condition, 0, 0))[0] == pytest.approx(expected, rel=1e-10)


def test_a_gene_observed_constant_has_no_weight(scene):
    observed, predicted, condition = scene
    observed = observed.copy()
    observed[:, 0] = 3.0
    resamples = Resamples(condition, 0, 0)
    assert gene_pearson(observed, predicted, resamples)[0] == pytest.approx(gene_pearson(observed[:, 1:], predicted[:, 1:], resamples)[0], rel=1e-10)


def test_a_null_perturbation_scores_about_nothing_with_disjoint_controls_and_much_with_shared_ones(rng):
    conditions, genes = 200, 100
    level = rng.normal(5, 2, genes)
    condition = np.arange(conditions)
    treated = level + rng.normal(0, 1, (conditions, genes))
    halves = [np.repeat(level + rng.normal(0, 1, (20, genes)), 10, axis=0) for _ in range(2)]
    nothing = np.broadcast_to(level, treated.shape)  # the perfect prediction of no effect
    disjoint = delta_pearson(treated, nothing, halves[0], halves[1], condition)
    shared = delta_pearson(treated, nothing, halves[0], halves[0], condition)
    assert abs(disjoint.mean()) < 0.1
    # One control on both sides: variance 1 of 2 is common, correlation 1 / sqrt(2).
    assert shared.mean() == pytest.approx(np.sqrt(0.5), abs=0.05)


# --- skill ----------------------------------------------------------------------------------------------------------


def test_skill_is_zero_at_the_baseline_one_at_the_ideal_and_clipped_nowhere():
    baseline, ideal = np.array([0.5, 0.6]), np.array([0.3, 0.2])
    np.testing.assert_array_equal(skill(baseline, baseline, ideal), 0)
    np.testing.assert_allclose(skill(ideal, baseline, ideal), 1)
    np.testing.assert_allclose(skill(np.array([0.7, 0.1]), baseline, ideal), [-1.0, 1.25])


def test_skill_has_no_value_where_the_baseline_is_not_above_the_ideal():
    values = skill(np.array([0.4, 0.4, 0.4]), np.array([0.3, 0.2, 0.5]), np.array([0.3, 0.3, 0.3]))
    assert np.isnan(values[:2]).all()
    assert values[2] == pytest.approx(0.5)


# --- invariances and precision --------------------------------------------------------------------------------------


def test_no_score_depends_on_the_order_of_samples(scene, rng):
    observed, predicted, condition = scene
    controls, order = rng.normal(5, 2, (2, SAMPLES, GENES)), rng.permutation(SAMPLES)
    plain = everything(observed, predicted, *controls, condition)
    shuffled = everything(observed[order], predicted[order], controls[0][order], controls[1][order], condition[order])
    for name, value in plain.items():
        assert shuffled[name] == pytest.approx(value, rel=1e-10), name
    first, second = Resamples(condition, 20, 3), Resamples(condition[order], 20, 3)
    np.testing.assert_allclose(mse(observed, predicted, first), mse(observed[order], predicted[order], second), rtol=1e-10)
    np.testing.assert_allclose(gene_pearson(observed, predicted, first), gene_pearson(observed[order], predicted[order], second), rtol=1e-9)


def test_no_score_depends_on_the_numbering_of_conditions_or_the_order_of_genes(scene, rng):
    observed, predicted, condition = scene
    controls, renumbered, genes = rng.normal(5, 2, (2, SAMPLES, GENES)), rng.permutation(CONDITIONS), rng.permutation(GENES)
    plain = everything(observed, predicted, *controls, condition)
    moved = everything(observed[:, genes], predicted[:, genes], controls[0][:, genes], controls[1][:, genes], renumbered[condition])
    for name, value in plain.items():
        assert moved[name] == pytest.approx(value, rel=1e-10), name
    of_conditions = delta_pearson(observed, predicted, *controls, condition)
    np.testing.assert_allclose(delta_pearson(observed, predicted, *controls, renumbered[condition])[renumbered], of_conditions, rtol=1e-10)


def test_single_precision_input_far_from_zero_loses_nothing(rng):
    # Offsets a hundred thousand times the variation: sums of squares in float32 would keep no digit of it.
    offset = 10_000.0
    observed = (offset + rng.normal(0, 0.1, (500, 40))).astype(np.float32)
    predicted = (observed + rng.normal(0, 0.05, observed.shape)).astype(np.float32)
    control = np.full_like(observed, offset)
    condition = np.arange(500) % 50
    single = everything(observed, predicted, control, control, condition)
    double = everything(*(values.astype(np.float64) for values in (observed, predicted, control, control)), condition)
    for name, value in double.items():
        assert single[name] == pytest.approx(value, rel=1e-6), name
    centred = everything(*(values.astype(np.float64) - offset for values in (observed, predicted, control, control)), condition)
    for name, value in centred.items():
        assert single[name] == pytest.approx(value, rel=1e-6), name


def test_scores_leave_their_input_alone(scene, rng):
    observed, predicted, condition = scene
    controls = rng.normal(5, 2, (2, SAMPLES, GENES))
    arrays = (observed, predicted, *controls, condition)
    before = [array.copy() for array in arrays]
    everything(*arrays)
    assert all(np.array_equal(array, copy) for array, copy in zip(arrays, before, strict=True))


# --- the bootstrap --------------------------------------------------------------------------------------------------


def test_resamples_draw_conditions_and_not_samples():
    # One condition with a thousand samples, nine with one: a bootstrap over samples would see the thousand vary.
    condition = np.concatenate([np.zeros(1000, dtype=int), np.arange(1, 10)])
    resamples = Resamples(condition, 200, 0)
    assert resamples.weights.shape == (201, 10)
    np.testing.assert_array_equal(resamples.weights[0], 1)
    np.testing.assert_array_equal(resamples.weights.sum(axis=1), 10)
    np.testing.assert_array_equal(resamples.sums(np.ones(1009)), resamples.weights @ np.bincount(condition))
    np.testing.assert_allclose(resamples.weights[1:].var(axis=0).mean(), 0.9, rtol=0.15)  # multinomial: n p (1 - p)


def test_the_same_seed_gives_the_same_resamples(scene):
    condition = scene[2]
    np.testing.assert_array_equal(Resamples(condition, 30, 5).weights, Resamples(condition, 30, 5).weights)
    assert (Resamples(condition, 30, 5).weights != Resamples(condition, 30, 6).weights).any()


def test_intervals_cover_the_truth_where_samples_of_a_condition_are_alike(rng):
    # Errors vary between 40 conditions with 5 samples each; the mean squared error over all conditions is 2.
    covered, covered_by_samples, trials = 0, 0, 300
    condition, alone = np.repeat(np.arange(40), 5), np.arange(200)
    for trial in range(trials):
        values = np.repeat(rng.gamma(2, 1, 40), 5) * rng.uniform(0.95, 1.05, 200)
        for number, codes in enumerate((condition, alone)):
            resamples = Resamples(codes, 200, trial)
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
    resamples = Resamples(condition, 300, 0)
    first, second = resamples.mean(difficulty), resamples.mean(difficulty - 0.1 + rng.normal(0, 0.05, 50))
    difference, alone = resamples.score(first - second), resamples.score(first)
    assert difference.low > 0
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)


def test_a_score_without_a_finite_value_is_null_with_a_reason(scene):
    resamples = Resamples(scene[2], 10, 0)
    score = resamples.score(np.full(11, np.nan))
    assert score.value is None
    assert score.low is None
    assert score.reason


def test_resamples_without_a_finite_value_are_left_out(scene):
    resamples = Resamples(scene[2], 4, 0)
    score = resamples.score(np.array([2.0, 1.0, np.nan, 3.0, np.inf]))
    assert (score.value, score.conditions) == (2.0, CONDITIONS)
    assert 1 <= score.low < score.high <= 3


def test_one_condition_has_a_value_and_no_interval():
    resamples = Resamples(np.zeros(4, dtype=int), 10, 0)
    score = resamples.score(resamples.mean(np.arange(4.0)))
    assert score == Score(1.5, None, None, 1, "one condition: no interval")


def test_every_metric_declares_unit_direction_best_value_and_meaning():
    for name, metric in METRICS.items():
        assert metric.unit, name
        assert metric.direction == ("lower" if name == "mse" else "higher"), name
        assert metric.best == (0.0 if name == "mse" else 1.0), name
        assert metric.meaning, name
