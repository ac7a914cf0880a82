"""Every score against an independent computation, hand-made cases, known traps, and invariances."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.stats import energy_distance, kstest, pearsonr, poisson, rankdata
from sklearn.metrics import mean_absolute_error, mean_squared_error

from pipeline.gem.evaluation.bootstrap import Bootstrap
from pipeline.gem.evaluation.differential_expression import (
    de_direction,
    de_jaccard,
    differential_genes,
)
from pipeline.gem.evaluation.metrics import (
    METRICS,
    absolute_error,
    calibration,
    delta_pearson,
    discrimination,
    e_distance,
    gene_pearson,
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
CORRELATIONS = (
    "sample_pearson",
    "gene_pearson",
    "delta_pearson",
    "delta_pearson_systema",
    "spread_pearson",
)


@dataclass(frozen=True)
class EvaluationSplit:
    """A prediction of N samples, and what the scores compare it with."""

    observed: np.ndarray  # (N, G)
    predicted: np.ndarray  # (N, G)
    ideal: np.ndarray  # (N, G) the ideal predictor, and the replicate
    condition: np.ndarray  # (N,)
    target: np.ndarray  # (N,)
    pit: np.ndarray  # (N, G)
    observed_control: np.ndarray  # (M, G)
    predicted_control: np.ndarray  # (M, G)

    def samples(self, order: np.ndarray) -> "EvaluationSplit":
        """The same with the samples in another order, the controls too."""
        moved = {
            name: getattr(self, name)[order]
            for name in ("observed", "predicted", "ideal", "condition", "target", "pit")
        }
        return replace(
            self,
            **moved,
            observed_control=self.observed_control[::-1],
            predicted_control=self.predicted_control[::-1],
        )

    def genes(self, order: np.ndarray) -> "EvaluationSplit":
        """The same with the genes in another order."""
        names = ("observed", "predicted", "ideal", "pit", "observed_control", "predicted_control")
        target = np.where(self.target < 0, -1, np.argsort(order)[self.target])
        return replace(
            self, **{name: getattr(self, name)[:, order] for name in names}, target=target
        )


@pytest.fixture
def scene(rng) -> EvaluationSplit:
    """At least three samples in every condition; a fifth of the samples without a target."""
    condition = rng.permutation(
        np.concatenate(
            [
                np.repeat(np.arange(CONDITIONS), 3),
                rng.integers(0, CONDITIONS, SAMPLES - 3 * CONDITIONS),
            ]
        )
    )
    effect = rng.normal(0, 2, (CONDITIONS, GENES)) * (rng.random((CONDITIONS, GENES)) < 0.4)
    level = rng.normal(5, 2, GENES)
    observed = level + effect[condition] + rng.normal(0, 0.5, (SAMPLES, GENES))
    return EvaluationSplit(
        observed=observed,
        predicted=observed + rng.normal(0, 1, (SAMPLES, GENES)),
        ideal=observed + rng.normal(0, 0.3, (SAMPLES, GENES)),
        condition=condition,
        target=np.where(rng.random(SAMPLES) < 0.2, -1, rng.integers(0, GENES, SAMPLES)),
        pit=rng.random((SAMPLES, GENES)) ** 1.5,
        observed_control=level + rng.normal(0, 0.5, (8, GENES)),
        predicted_control=level + rng.normal(0, 0.5, (8, GENES)),
    )


def condition_means(values: np.ndarray, condition: np.ndarray) -> np.ndarray:
    return np.stack(
        [
            values[condition == index].mean(axis=0, dtype=np.float64)
            for index in range(condition.max() + 1)
        ]
    )


def changes(scene: EvaluationSplit) -> tuple[np.ndarray, np.ndarray]:
    """(C, G) observed and predicted changes, each from its own controls."""
    sides = (scene.observed, scene.observed_control), (scene.predicted, scene.predicted_control)
    return tuple(
        condition_means(values, scene.condition) - control.mean(axis=0, dtype=np.float64)
        for values, control in sides
    )


def per_condition(scene: EvaluationSplit, score) -> np.ndarray:
    """(C,) a score of the observed and the predicted samples of each condition."""
    inside = (scene.condition == index for index in range(int(scene.condition.max()) + 1))
    return np.array([score(scene.observed[rows], scene.predicted[rows]) for rows in inside])


def differential_scores(scene: EvaluationSplit) -> tuple[np.ndarray, np.ndarray]:
    """(C,) direction and (C,) overlap of each condition."""

    def both(observed: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
        found, said = (
            differential_genes(observed, scene.observed_control),
            differential_genes(predicted, scene.predicted_control),
        )
        return de_direction(*found, said[1]), de_jaccard(found[0], said[0])

    return tuple(per_condition(scene, both).T)


def everything(scene: EvaluationSplit, draws: int = 0) -> dict[str, np.ndarray]:
    """(R + 1,) every score of METRICS, in its order."""
    resamples, change = Bootstrap(scene.condition, draws, 0), changes(scene)
    errors = [
        resamples.mean(squared_error(scene.observed, values))
        for values in (scene.predicted, scene.ideal)
    ]
    baseline = resamples.mean(
        squared_error(scene.observed, scene.observed_control.mean(axis=0, dtype=np.float64))
    )
    bias, with_target = (
        target_bias(scene.observed, scene.predicted, scene.target),
        (scene.target >= 0).astype(float),
    )
    direction, jaccard = differential_scores(scene)
    return {
        "mse": errors[0],
        "mae": resamples.mean(absolute_error(scene.observed, scene.predicted)),
        "skill": skill(errors[0], baseline, errors[1]),
        "skill_replicate": skill(errors[0], baseline, errors[1]),
        "sample_pearson": resamples.mean(sample_pearson(scene.observed, scene.predicted)),
        "gene_pearson": gene_pearson(scene.observed, scene.predicted, resamples),
        "delta_pearson": resamples.condition_mean(delta_pearson(*change)),
        "delta_pearson_systema": resamples.condition_mean(
            delta_pearson(*(side - side.mean(axis=0) for side in change))
        ),
        "discrimination": resamples.condition_mean(discrimination(*change)),
        "de_direction": resamples.condition_mean(direction),
        "de_jaccard": resamples.condition_mean(jaccard),
        "calibration": calibration(pit_histogram(scene.pit, scene.condition), resamples.weights),
        "count_log_likelihood": resamples.mean(
            np.log(scene.pit).sum(axis=1)
        ),  # any log probability of a sample
        "e_distance": resamples.condition_mean(per_condition(scene, e_distance)),
        "spread_pearson": resamples.condition_mean(per_condition(scene, spread_pearson)),
        "target_bias": resamples.sums(np.nan_to_num(bias)) / resamples.sums(with_target),
    }


# --- the declarations -----------------------------------------------------------------------------------------------


def test_every_metric_declares_unit_direction_best_value_and_meaning(scene):
    assert list(METRICS) == list(everything(scene))
    lower, zero = {"mse", "mae", "calibration", "e_distance"}, {"target_bias"}
    for name, metric in METRICS.items():
        assert metric.unit, name
        assert metric.meaning, name
        assert metric.direction == (
            "lower" if name in lower else "zero" if name in zero else "higher"
        ), name
        # A probability of 1 has the logarithm 0.
        assert metric.best == (0.0 if name in lower | zero | {"count_log_likelihood"} else 1.0), (
            name
        )


# --- against independent computations -------------------------------------------------------------------------------


def test_errors_are_means_over_genes_and_samples(scene):
    observed, predicted = scene.observed, scene.predicted
    assert squared_error(observed, predicted).mean() == pytest.approx(
        mean_squared_error(observed, predicted), rel=1e-12
    )
    assert absolute_error(observed, predicted).mean() == pytest.approx(
        mean_absolute_error(observed, predicted), rel=1e-12
    )
    np.testing.assert_allclose(
        squared_error(observed, predicted),
        [mean_squared_error(*pair) for pair in zip(observed, predicted, strict=True)],
        rtol=1e-12,
    )


def test_sample_pearson_is_the_correlation_over_genes_of_each_sample(scene):
    expected = [
        pearsonr(o, p).statistic for o, p in zip(scene.observed, scene.predicted, strict=True)
    ]
    np.testing.assert_allclose(
        sample_pearson(scene.observed, scene.predicted), expected, rtol=1e-10
    )


def test_gene_pearson_is_the_variance_weighted_correlation_over_samples_of_each_gene(scene):
    observed, predicted = scene.observed * np.linspace(0.1, 3, GENES), scene.predicted
    per_gene = [pearsonr(observed[:, gene], predicted[:, gene]).statistic for gene in range(GENES)]
    expected = np.average(per_gene, weights=observed.var(axis=0))
    assert gene_pearson(observed, predicted, Bootstrap(scene.condition, 0, 0))[0] == pytest.approx(
        expected, rel=1e-10
    )


def test_delta_pearson_is_the_correlation_over_genes_of_each_condition(scene):
    expected = [pearsonr(o, p).statistic for o, p in zip(*changes(scene), strict=True)]
    np.testing.assert_allclose(delta_pearson(*changes(scene)), expected, rtol=1e-10)


def test_discrimination_is_the_mid_rank_of_the_cosine_distance(rng):
    # Few values, so that cosines tie often and exactly.
    observed, predicted = rng.integers(-1, 2, (2, 30, 3)).astype(float)
    expected, ties = [], 0
    for own, change in enumerate(predicted):
        lengths = [np.sqrt((change @ change) * (other @ other)) for other in observed]
        distances = [
            -(change @ other) / length if length else 0.0
            for other, length in zip(observed, lengths, strict=True)
        ]
        distances = np.round(distances, 9)
        ties += (distances == distances[own]).sum() > 1
        expected.append(1 - (rankdata(distances, method="average")[own] - 1) / 29)
    assert ties > 20
    np.testing.assert_allclose(discrimination(observed, predicted), expected, atol=1e-12)


def test_e_distance_is_that_of_plain_loops_over_different_samples(rng):
    x, y = rng.normal(0, 1, (7, 4)), rng.normal(0.5, 2, (5, 4))
    between = np.mean([np.linalg.norm(a - b) for a in x for b in y])
    within = [
        np.mean(
            [
                np.linalg.norm(a - b)
                for i, a in enumerate(side)
                for j, b in enumerate(side)
                if i != j
            ]
        )
        for side in (x, y)
    ]
    assert e_distance(x, y) == pytest.approx(2 * between - sum(within), rel=1e-12)


def test_e_distance_of_many_samples_is_that_of_scipy(rng):
    # In one dimension scipy has its square root over 2, with samples paired with themselves: equal for many samples.
    x, y = rng.normal(0, 1, 3000), rng.normal(1, 1.5, 2000)
    assert e_distance(x[:, None], y[:, None]) == pytest.approx(energy_distance(x, y) ** 2, rel=0.02)


def test_spread_pearson_is_the_correlation_of_standard_deviations(rng):
    observed, predicted = (
        rng.normal(0, rng.gamma(2, 1, GENES), (9, GENES)),
        rng.normal(0, 1, (6, GENES)),
    )
    expected = pearsonr(np.std(observed, axis=0), np.std(predicted, axis=0)).statistic
    assert spread_pearson(observed, predicted) == pytest.approx(expected, rel=1e-10)


def test_target_bias_is_of_the_samples_own_gene_and_of_no_other(scene):
    bias = target_bias(scene.observed, scene.predicted, scene.target)
    for sample, target in enumerate(scene.target):
        if target < 0:
            assert np.isnan(bias[sample])
        else:
            assert bias[sample] == scene.predicted[sample, target] - scene.observed[sample, target]
    assert np.isnan(bias).sum() == (scene.target < 0).sum() > 0


def test_histogram_and_calibration_are_those_of_plain_loops(scene):
    histogram, weights = (
        pit_histogram(scene.pit, scene.condition),
        Bootstrap(scene.condition, 5, 0).weights,
    )
    for index in range(CONDITIONS):
        np.testing.assert_array_equal(
            histogram[index],
            np.histogram(scene.pit[scene.condition == index], bins=10, range=(0, 1))[0],
        )
    for found, weight in zip(calibration(histogram, weights), weights, strict=True):
        drawn = np.concatenate(
            [
                scene.pit[scene.condition == index]
                for index, times in enumerate(weight)
                for _ in range(int(times))
            ]
        )
        shares = np.histogram(drawn, bins=10, range=(0, 1))[0] / drawn.size
        assert found == pytest.approx(np.abs(shares - 0.1).sum(), rel=1e-10)


def test_every_resample_is_the_score_of_the_conditions_repeated(scene):
    resamples = Bootstrap(scene.condition, 7, 0)
    found = everything(scene, draws=7)
    for draw, weights in enumerate(resamples.weights):
        rows = np.concatenate(
            [
                np.flatnonzero(scene.condition == index)
                for index, times in enumerate(weights)
                for _ in range(int(times))
            ]
        )
        together = replace(scene.samples(rows), condition=np.zeros(len(rows), dtype=int))
        expected = {
            "mse": mean_squared_error(together.observed, together.predicted),
            "mae": mean_absolute_error(together.observed, together.predicted),
            "gene_pearson": gene_pearson(
                together.observed, together.predicted, Bootstrap(together.condition, 0, 0)
            )[0],
            "delta_pearson": np.average(delta_pearson(*changes(scene)), weights=weights),
            "e_distance": np.average(per_condition(scene, e_distance), weights=weights),
            "target_bias": np.nanmean(
                target_bias(together.observed, together.predicted, together.target)
            ),
        }
        for name, value in expected.items():
            assert found[name][draw] == pytest.approx(value, rel=1e-9), name


# --- the probability integral transform -----------------------------------------------------------------------------


def test_transforms_of_counts_from_the_stated_distribution_are_uniform(rng):
    mean = rng.gamma(
        1, 2, (100, 40)
    )  # many zeros: a transform that is not randomised would pile up
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
def test_ranks_among_draws_of_the_same_distribution_are_uniform_ties_or_not(rng, draws):
    for sample in (rng.standard_normal, lambda shape: rng.poisson(0.7, shape)):
        values = sample((draws + 1, 100, 40))
        pit = rank_pit(values[0], values[1:], rng)
        assert ((pit >= 0) & (pit < 1)).all()
        assert kstest(pit.ravel(), "uniform").pvalue > 0.01


def test_a_rank_counts_the_draws_below_and_shares_the_places_of_ties(rng):
    draws = np.repeat(np.array([1.0, 2.0, 2.0, 5.0]), 3000).reshape(4, 1, 3000)
    below = rank_pit(np.full((1, 3000), 0.0), draws, rng)
    tied = rank_pit(np.full((1, 3000), 2.0), draws, rng)
    above = rank_pit(np.full((1, 3000), 9.0), draws, rng)
    assert 0 <= below.min() < below.max() < 0.2
    assert 0.8 <= above.min() < above.max() < 1
    # One below, two tied: uniform over the second to fourth of five places.
    assert kstest((tied.ravel() - 0.2) / 0.6, "uniform").pvalue > 0.01


def test_ranks_can_be_taken_from_draws_that_come_one_at_a_time(rng):
    observed, draws = rng.poisson(2, (5, 6)), rng.poisson(2, (7, 5, 6))
    seeds = np.random.default_rng(1), np.random.default_rng(1)
    np.testing.assert_array_equal(
        rank_pit(observed, draws, seeds[0]), rank_pit(observed, iter(draws), seeds[1])
    )


def test_overconfidence_timidity_and_bias_are_seen_in_calibration(rng):
    observed, condition = rng.standard_normal((50, 40)), np.zeros(50, dtype=int)
    found = {}
    for name, scale, shift in (
        ("right", 1, 0),
        ("overconfident", 0.5, 0),
        ("timid", 2, 0),
        ("biased", 1, 0.5),
    ):
        pit = rank_pit(observed, shift + scale * rng.standard_normal((99, 50, 40)), rng)
        found[name] = calibration(pit_histogram(pit, condition), np.ones((1, 1)))[0]
    assert found["right"] < 0.1
    assert min(found[name] for name in ("overconfident", "timid", "biased")) > 0.3


def test_the_edges_of_the_unit_interval_are_in_the_outer_bins():
    np.testing.assert_array_equal(
        pit_histogram(np.array([[0.0, 1.0, 0.99]]), np.array([0])), [[1, 0, 0, 0, 0, 0, 0, 0, 0, 2]]
    )
    assert calibration(np.array([[7, 0, 0, 0, 0, 0, 0, 0, 0, 0]]), np.ones((1, 1)))[
        0
    ] == pytest.approx(1.8)
    assert calibration(np.full((2, 10), 3), np.ones((1, 2)))[0] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("wrong", [-0.01, 1.01, np.nan])
def test_a_transform_outside_the_unit_interval_is_refused(wrong):
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        pit_histogram(np.array([[0.5, wrong]]), np.array([0]))


def test_a_resample_without_any_transform_has_no_calibration():
    weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    assert np.isnan(calibration(np.array([[0, 0], [3, 3]]), weights)).tolist() == [
        False,
        True,
        False,
    ]


# --- hand-made cases ------------------------------------------------------------------------------------------------


def test_a_perfect_prediction_has_the_best_value_of_every_metric(scene):
    grid = np.broadcast_to(
        (np.arange(GENES * 2) % 10 + 0.5) / 10, (SAMPLES, GENES * 2)
    )  # every bin equally often
    perfect = replace(
        scene,
        predicted=scene.observed,
        ideal=scene.observed,
        predicted_control=scene.observed_control,
        pit=grid,
    )
    scores = everything(perfect)
    del scores["e_distance"]  # best for other samples of the same distribution: see below
    del scores["count_log_likelihood"]  # best for one that is certain, which is not calibrated
    for name, value in scores.items():
        assert value[0] == pytest.approx(METRICS[name].best, abs=1e-12), name


def test_e_distance_of_samples_of_one_distribution_is_zero_on_average_however_few(rng):
    for number in (2, 5, 20):
        found = [e_distance(*rng.normal(0, 1, (2, number, 10))) for _ in range(400)]
        assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(400)
        assert min(found) < 0
    far = e_distance(rng.normal(0, 1, (20, 10)), rng.normal(1, 1, (20, 10)))
    assert far > 1


def test_a_mirrored_prediction_has_correlation_minus_one_and_is_told_apart_least(scene):
    observed, condition = scene.observed, scene.condition
    change = changes(scene)[0]
    assert sample_pearson(observed, -observed).max() == pytest.approx(-1, abs=1e-12)
    assert gene_pearson(observed, -observed, Bootstrap(condition, 0, 0))[0] == pytest.approx(
        -1, abs=1e-12
    )
    assert delta_pearson(change, -change).max() == pytest.approx(-1, abs=1e-12)
    np.testing.assert_array_equal(discrimination(change, -change), 0)


def test_correlations_ignore_a_shift_and_a_positive_scale(scene):
    moved = replace(
        scene, predicted=3 * scene.predicted + 7, predicted_control=3 * scene.predicted_control + 7
    )
    plain, scaled = everything(scene), everything(moved)
    for name in (*CORRELATIONS, "discrimination", "de_direction", "de_jaccard"):
        assert scaled[name][0] == pytest.approx(plain[name][0], rel=1e-10), name


def test_a_shuffled_prediction_scores_about_nothing(rng):
    observed, condition = rng.normal(0, 1, (400, 50)), np.arange(400) % 100
    shuffled = observed[rng.permutation(400)]
    change = [condition_means(values, condition) for values in (observed, shuffled)]
    # Standard errors: 1 / sqrt(samples x genes) for the first two, 1 / sqrt(conditions x genes) for the third.
    assert abs(sample_pearson(observed, shuffled).mean()) < 5 / np.sqrt(400 * 50)
    assert abs(gene_pearson(observed, shuffled, Bootstrap(condition, 0, 0))[0]) < 5 / np.sqrt(
        400 * 50
    )
    assert abs(delta_pearson(*change).mean()) < 5 / np.sqrt(100 * 50)
    # A rank uniform on [0, 1] has standard deviation 0.29.
    assert discrimination(*change).mean() == pytest.approx(0.5, abs=4 * 0.29 / np.sqrt(100))
    assert squared_error(observed, shuffled).mean() == pytest.approx(2, rel=0.05)


def test_constant_input_gives_no_number_where_a_correlation_has_none(scene):
    observed, predicted = scene.observed, scene.predicted
    constant = np.full_like(observed, 4.2)
    assert np.isnan(sample_pearson(observed, constant)).all()
    assert np.isnan(sample_pearson(constant, predicted)).all()
    assert np.isnan(gene_pearson(observed, constant, Bootstrap(scene.condition, 3, 0))).all()
    assert np.isnan(delta_pearson(observed, constant)).all()
    assert np.isnan(delta_pearson(constant, predicted)).all()
    assert np.isnan(spread_pearson(observed, constant))
    one_row = predicted.copy()
    one_row[3] = 1.0
    assert np.flatnonzero(np.isnan(sample_pearson(observed, one_row))).tolist() == [3]


@pytest.mark.parametrize("score", [spread_pearson, e_distance])
def test_fewer_than_two_samples_have_no_distribution(rng, score):
    two, one = rng.normal(0, 1, (2, 5)), rng.normal(0, 1, (1, 5))
    assert np.isfinite(score(two, two + one))
    assert np.isnan(score(two, one))
    assert np.isnan(score(one, two))
    assert np.isnan(score(one[:0], two))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_that_binary_numbers_cannot_hold_is_still_constant(rng, dtype):
    observed = rng.normal(5, 1, (30, 1000)).astype(dtype)
    constant = np.full((30, 1000), 0.1, dtype=dtype)
    resamples = Bootstrap(np.arange(30), 3, 0)
    assert np.isnan(sample_pearson(observed, constant)).all()
    assert np.isnan(gene_pearson(observed, constant, resamples)).all()
    assert np.isnan(spread_pearson(observed, constant))
    per_gene = np.broadcast_to(rng.normal(5, 1, 1000).astype(dtype), (30, 1000))
    assert np.isnan(gene_pearson(observed, per_gene, resamples)).all()
    assert np.isnan(spread_pearson(observed, per_gene))


def test_a_gene_predicted_constant_counts_as_no_correlation(scene):
    predicted = scene.observed.copy()
    predicted[:, :5] = 1.0
    variance = scene.observed.var(axis=0)
    expected = variance[5:].sum() / variance.sum()
    assert gene_pearson(scene.observed, predicted, Bootstrap(scene.condition, 0, 0))[
        0
    ] == pytest.approx(expected, rel=1e-10)


def test_a_gene_observed_constant_has_no_weight(scene):
    observed, resamples = scene.observed.copy(), Bootstrap(scene.condition, 0, 0)
    observed[:, 0] = 3.0
    expected = gene_pearson(observed[:, 1:], scene.predicted[:, 1:], resamples)[0]
    assert gene_pearson(observed, scene.predicted, resamples)[0] == pytest.approx(
        expected, rel=1e-10
    )


# --- known traps ----------------------------------------------------------------------------------------------------


def test_a_null_perturbation_scores_about_nothing_with_disjoint_controls_and_much_with_shared_ones(
    rng,
):
    conditions, genes = 200, 100
    level = rng.normal(5, 2, genes)
    treated = level + rng.normal(0, 1, (conditions, genes))
    first, second = level + rng.normal(0, 1, (2, conditions, genes))
    disjoint = delta_pearson(
        treated - first, level - second
    )  # the level is the perfect prediction of no effect
    shared = delta_pearson(treated - first, level - first)
    assert abs(disjoint.mean()) < 0.1
    # One control on both sides: variance 1 of 2 is common, correlation 1 / sqrt(2).
    assert shared.mean() == pytest.approx(np.sqrt(0.5), abs=0.05)


def test_a_replicate_of_other_samples_scores_nothing_on_a_null_perturbation_and_one_resampled_from_the_same_much(
    rng,
):
    conditions, genes, size = 100, 100, 40
    samples, others = rng.normal(0, 1, (2, conditions, size, genes))
    first, second = rng.normal(0, 1, (2, conditions, 20 * size, genes)).mean(axis=2)
    again = np.stack([cells[rng.integers(0, size, size)] for cells in samples])
    observed = samples.mean(axis=1) - first
    assert abs(delta_pearson(observed, others.mean(axis=1) - second).mean()) < 0.05
    # The samples' noise 1 / size is common, beside as much from drawing again and 1 / (20 size) from each control.
    expected = 1 / np.sqrt((1 + 1 / 20) * (2 + 1 / 20))
    assert delta_pearson(observed, again.mean(axis=1) - second).mean() == pytest.approx(
        expected, abs=0.05
    )


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_prediction_of_nothing_is_told_apart_by_chance_and_not_by_the_order_of_labels(rng, order):
    observed = rng.normal(0, 1, (20, 50))
    predicted = observed.copy()
    predicted[:3] = 0
    found = discrimination(observed[order], predicted[order])[order]
    # The position in a sort would give the first labels 1, the last ones 0.
    np.testing.assert_array_equal(found[:3], 0.5)
    np.testing.assert_array_equal(found[3:], 1)


def test_one_answer_for_all_conditions_is_worth_half_on_average(rng):
    observed = rng.normal(0, 1, (21, 50))
    assert discrimination(
        observed, np.broadcast_to(rng.normal(0, 1, 50), (21, 50))
    ).mean() == pytest.approx(0.5, abs=1e-12)


def test_conditions_of_the_same_truth_share_their_ranks(rng):
    observed = rng.normal(0, 1, (10, 50))
    observed[4] = 3 * observed[7]  # the same direction: cosines equal but for rounding
    np.testing.assert_allclose(discrimination(observed, observed)[[4, 7]], 1 - 0.5 / 9, rtol=1e-12)


def test_a_truth_of_nothing_is_like_everything_and_nothing(rng):
    observed, predicted = np.zeros((3, 4)), np.eye(3, 4)
    np.testing.assert_array_equal(discrimination(observed, predicted), 0.5)


def test_one_condition_cannot_be_told_from_others(rng):
    assert np.isnan(discrimination(*rng.normal(0, 1, (2, 1, 5)))).tolist() == [True]
    assert discrimination(*np.zeros((2, 0, 5))).shape == (0,)


@pytest.mark.parametrize("side", [0, 1])
def test_a_change_that_is_not_finite_cannot_win_a_rank(rng, side):
    arrays = list(rng.normal(0, 1, (2, 4, 5)))
    arrays[side][2, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        discrimination(*arrays)


def test_the_systematic_effect_shared_by_all_perturbations_does_not_count_for_systema(rng):
    common, own = rng.normal(0, 2, 100), rng.normal(0, 1, (30, 100))
    observed = common + own
    predicted = np.broadcast_to(common, observed.shape) + rng.normal(
        0, 0.1, observed.shape
    )  # knows only what all share
    assert delta_pearson(observed, predicted).mean() > 0.8
    assert abs(delta_pearson(observed - common, predicted - common).mean()) < 0.1


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


@pytest.mark.parametrize("name", METRICS)
def test_no_score_depends_on_the_order_of_samples(scene, rng, name):
    shuffled = everything(scene.samples(rng.permutation(SAMPLES)), draws=20)
    np.testing.assert_allclose(shuffled[name], everything(scene, draws=20)[name], rtol=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_no_score_depends_on_the_numbering_of_conditions(scene, rng, name):
    renumbered = replace(scene, condition=rng.permutation(CONDITIONS)[scene.condition])
    assert everything(renumbered)[name][0] == pytest.approx(everything(scene)[name][0], rel=1e-10)


@pytest.mark.parametrize("name", METRICS)
def test_no_score_depends_on_the_order_of_genes(scene, rng, name):
    moved = scene.genes(rng.permutation(GENES))
    assert everything(moved)[name][0] == pytest.approx(everything(scene)[name][0], rel=1e-10)


@pytest.mark.parametrize("score", [delta_pearson, discrimination])
def test_scores_of_conditions_move_with_them(scene, rng, score):
    order, change = rng.permutation(CONDITIONS), changes(scene)
    np.testing.assert_allclose(
        score(*(side[order] for side in change)), score(*change)[order], rtol=1e-10
    )


def test_single_precision_input_far_from_zero_loses_nothing(scene):
    # Offsets a hundred thousand times the variation: sums of squares in float32 would keep no digit of it.
    offset = 10_000.0
    arrays = ("observed", "predicted", "ideal", "observed_control", "predicted_control")
    single = replace(
        scene, **{name: (offset + 0.1 * getattr(scene, name)).astype(np.float32) for name in arrays}
    )
    double = replace(single, **{name: getattr(single, name).astype(np.float64) for name in arrays})
    centred = replace(double, **{name: getattr(double, name) - offset for name in arrays})
    found = everything(single)
    for exact in (everything(double), everything(centred)):
        for name, value in exact.items():
            assert found[name][0] == pytest.approx(value[0], rel=1e-6), name


def test_scores_leave_their_input_alone(scene):
    before = {name: value.copy() for name, value in vars(scene).items()}
    everything(scene, draws=2)
    assert all(np.array_equal(vars(scene)[name], copy) for name, copy in before.items())
