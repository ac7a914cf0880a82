"""Every metric of a split against its definition by loops, and splits with known answers."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import false_discovery_control, rankdata, t
from support.comparison import (
    CohortEvaluation,
    rows_of,
    scores,
    simple_controls,
    simple_split,
    split_context,
)

from pipeline.gem.evaluation.bootstrap import Bootstrap, MetricDraws
from pipeline.gem.evaluation.catalogue import SHARED_CONTROLS
from pipeline.gem.evaluation.evaluation_split import Controls, EvaluationSplit, PredictedSplit
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.scoring import measure, score
from pipeline.gem.evaluation.split_context import MIN_TEST_SAMPLES

PREDICTORS = (
    "no_change",
    "training_mean",
    "ridge",
    "replicate",
    "gem",
    "gem_reference",
    "oracle_metadata",
    "oracle_omniscient",
)

# --- against definitions ---


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    if np.ptp(first) < 1e-9 or np.ptp(second) < 1e-9:
        return 0.0
    return np.corrcoef(first.astype(float), second.astype(float))[0, 1]


def mean_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Over pairs of different samples."""
    pairs = [np.linalg.norm(a - b) for a in x for b in y if a is not b]
    return np.mean(pairs)


class Definitions:
    """The metrics of a prediction over the given conditions, which may be repeated, leaving out
    samples that are not predicted."""

    def __init__(self, evaluation: CohortEvaluation, name: str, predicted: PredictedSplit):
        self.split, self.others = evaluation.by_split[name]
        self.values, self.draw = predicted.values, predicted.draw
        self.predicted, self.axes = predicted, evaluation.axes
        self.observed = self.split.observed.astype(float)
        self.control = self.split.predicted_control
        if predicted.uses_study_controls:
            self.control = self.split.reference_control
        self.changed, self.change = evaluation.predictors.true_change(self.split)

    def rows(self, conditions: list[int], values: np.ndarray | None = None) -> list[int]:
        values = self.values if values is None else values
        predicted = np.isfinite(self.values[:, 0]) & np.isfinite(values[:, 0])
        members = [np.flatnonzero(predicted & (self.split.condition == i)) for i in conditions]
        return list(np.concatenate(members))

    def treated(self, conditions: list[int]) -> list[np.ndarray]:
        """The treated rows of each condition that has any."""
        groups = [np.array(self.rows([index]), dtype=int) for index in conditions]
        treated = [rows[self.split.treated[rows]] for rows in groups]
        return [rows for rows in treated if len(rows)]

    def mse(self, conditions) -> float:
        rows = self.rows(conditions)
        return np.mean((self.observed[rows] - self.values[rows]) ** 2)

    def mae(self, conditions) -> float:
        rows = self.rows(conditions)
        return np.mean(np.abs(self.observed[rows] - self.values[rows]))

    def skill(self, conditions, ceiling: str = "oracle_metadata") -> float:
        ideal, ridge = (self.others[name][0].values for name in (ceiling, "ridge"))
        rows = self.rows(conditions, ideal)
        own, baseline, best = (
            np.mean((self.observed[rows] - values[rows]) ** 2)
            for values in (self.values, ridge, ideal)
        )
        return (baseline - own) / (baseline - best)

    def skill_replicate(self, conditions) -> float:
        return self.skill(conditions, "replicate")

    def sample_pearson(self, conditions) -> float:
        rows = self.rows(conditions)
        return np.mean([pearson(self.observed[row], self.values[row]) for row in rows])

    def gene_pearson(self, conditions) -> float:
        rows = self.rows(conditions)
        pairs = list(zip(self.observed[rows].T, self.values[rows].T, strict=True))
        weights = [observed.var() for observed, _ in pairs]
        return np.average([pearson(*pair) for pair in pairs], weights=weights)

    def changes(self, conditions, observed_reference, reference) -> list[tuple]:
        """(observed, predicted) mean change of each treated condition."""
        observed, predicted = self.observed - observed_reference, self.values - reference
        return [
            (observed[rows].mean(axis=0), predicted[rows].mean(axis=0))
            for rows in self.treated(conditions)
        ]

    def changes_from_control(self, conditions) -> list[tuple]:
        return self.changes(conditions, self.split.observed_control.mean, self.control.mean)

    def delta_pearson(self, conditions) -> float:
        return np.mean([pearson(*pair) for pair in self.changes_from_control(conditions)])

    def delta_pearson_systema(self, conditions) -> float:
        centroid = self.split.perturbed_centroid
        return np.mean([pearson(*pair) for pair in self.changes(conditions, centroid, centroid)])

    def discrimination(self, conditions) -> float:
        observed, predicted = zip(*self.changes_from_control(conditions), strict=True)
        result = []
        for own, change in enumerate(predicted):
            length = np.linalg.norm(change)
            if length < 1e-6:
                result.append(0.5)
                continue
            cosine = [change @ other / length / np.linalg.norm(other) for other in observed]
            rank = rankdata(-np.round(cosine, 12))[own]
            result.append(1 - (rank - 1) / (len(observed) - 1))
        return np.mean(result)

    def true_effect(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.split.condition == index
        return self.changed[rows].mean(axis=0) >= 0.5, self.change[rows].mean(axis=0)

    def de_direction(self, conditions) -> float:
        result = []
        for rows in self.treated(conditions):
            genes, true_change = self.true_effect(self.split.condition[rows[0]])
            change = (self.values - self.control.mean)[rows].mean(axis=0)
            if genes.any():
                signs = np.sign(change[genes]) * np.sign(true_change[genes])
                result.append(np.mean((signs + 1) / 2))
        return np.mean(result) if result else math.nan

    def de_jaccard(self, conditions) -> float:
        result = []
        for rows in self.treated(conditions):
            if len(rows) >= MIN_TEST_SAMPLES:
                genes = self.true_effect(self.split.condition[rows[0]])[0]
                context = self.split.context[rows[0]]
                own = welch_genes(self.draw, self.control, rows, context)
                if (genes | own).any():
                    result.append((genes & own).sum() / (genes | own).sum())
        return np.mean(result) if result else math.nan

    def calibration(self, conditions) -> float:
        pit = self.predicted.pit[self.rows(conditions)]
        counts = np.histogram(pit, bins=10, range=(0, 1))[0]
        return np.abs(counts / pit.size - 0.1).sum()

    def count_log_likelihood(self, conditions) -> float:
        return np.mean(self.predicted.log_likelihood[self.rows(conditions)])

    def e_distance(self, conditions) -> float:
        values = self.values if self.draw is None else self.draw
        result = []
        for rows in self.treated(conditions):
            if len(rows) > 1:
                x, y = (list(side[rows] @ self.axes) for side in (values, self.observed))
                within = mean_distance(x, x) + mean_distance(y, y)
                result.append(2 * mean_distance(x, y) - within)
        return np.mean(result) if result else math.nan

    def spread_pearson(self, conditions) -> float:
        result = [
            pearson(self.observed[rows].std(axis=0), self.draw[rows].std(axis=0))
            for rows in self.treated(conditions)
            if len(rows) > 1
        ]
        return np.mean(result) if result else math.nan

    def target_bias(self, conditions) -> float:
        bias = [
            np.mean([self.values[row, gene] - self.observed[row, gene] for gene in genes])
            for row in self.rows(conditions)
            if len(genes := self.split.target[row][self.split.target[row] >= 0])
        ]
        return np.mean(bias) if bias else math.nan


def welch_genes(values, control: Controls, rows, context: str) -> np.ndarray:
    """(G,) bool by loops: the treated mean against that of the matched controls, whose deviation
    comes from all controls of the context."""
    changes = values[rows].astype(float) - control.mean[rows]
    share = 0.0
    for group in set(control.group[rows]):
        members = control.group[rows] == group
        share += members.mean() ** 2 / control.number[rows][members][0]
    degrees, p = control.degrees_of_freedom[context], []
    for change, deviation in zip(changes.T, control.deviation[context], strict=True):
        parts = change.var(ddof=1) / len(rows), deviation**2 * share
        total = sum(parts) ** 2 / (parts[0] ** 2 / (len(rows) - 1) + parts[1] ** 2 / degrees)
        p.append(2 * t.sf(abs(change.mean()) / math.sqrt(sum(parts)), total))
    return false_discovery_control(p) <= 0.05


def undefined_metrics(predictor: str, predicted: PredictedSplit) -> set[str]:
    """The metrics that may be null for a predictor on the tiny cohort."""
    names = {"skill_replicate", "target_bias", "de_jaccard"}
    if predicted.draw is None:
        names |= {"calibration", "spread_pearson"}
    if not predictor.startswith("gem"):
        names.add("count_log_likelihood")
    own = {
        "no_change": {"delta_pearson"},
        "training_mean": {"gene_pearson"},
        "replicate": {"calibration", "e_distance", "spread_pearson"},
    }
    return names | own.get(predictor, set())


@pytest.mark.parametrize(
    ("name", "predictor"),
    [
        *((name, predictor) for name in ("test_random", "test_study") for predictor in PREDICTORS),
        ("test_combination", "gem"),
        ("test_perturbation", "gem"),
    ],
)
def test_every_metric_is_that_of_its_definition(evaluation, name, predictor):
    split, predictions = evaluation.by_split[name]
    predicted = predictions[predictor][0]
    draws = evaluation.measure(name, predicted)
    definitions = Definitions(evaluation, name, predicted)
    conditions = list(range(split.condition.max() + 1))
    for metric, values in draws.items():
        if values.values is None:
            assert values.reason and metric in undefined_metrics(predictor, predicted), metric
        else:
            expected = getattr(definitions, metric)(conditions)
            assert values.values[0] == pytest.approx(expected, rel=1e-5, abs=1e-5), metric
            assert values.conditions > 0


@pytest.mark.parametrize("name", ["test_random", "test_study"])
@pytest.mark.parametrize(
    "metric", ["mse", "skill", "gene_pearson", "delta_pearson", "calibration", "target_bias"]
)
def test_every_resample_is_the_metric_of_the_repeated_conditions(evaluation, name, metric):
    split, predictions = evaluation.by_split[name]
    values = evaluation.measure(name, predictions["gem"][0])[metric].values
    if values is None:
        assert (name, metric) == ("test_random", "target_bias") or metric == "skill"
        return
    definitions = Definitions(evaluation, name, predictions["gem"][0])
    weights = Bootstrap(split.condition, 12, 0).weights
    for draw in range(1, 4):
        conditions = np.repeat(np.arange(weights.shape[1]), weights[draw].astype(int))
        expected = getattr(definitions, metric)(list(conditions))
        assert values[draw] == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)


# --- skill and seeds ---


def test_the_interval_is_of_quantiles_of_the_resamples(evaluation):
    split, predictions = evaluation.by_split["test_study"]
    context = split_context(split, predictions, evaluation.axes, draws=200)
    draws = measure(predictions["ridge"][0], context)["mse"]
    result = score([draws], context.resamples)
    expected = np.quantile(draws.values[1:], [0.025, 0.975])
    assert (result.low, result.high) == pytest.approx(expected)
    assert result.low < result.value < result.high


def test_skill_is_zero_for_ridge_one_for_the_ideal_and_null_if_they_do_not_differ(evaluation):
    split, predictions = evaluation.by_split["test_study"]
    for name, expected in (("ridge", 0), ("oracle_metadata", 1)):
        assert evaluation.measure("test_study", predictions[name][0])["skill"].values[0] == expected
    for ceiling in ("ridge", "training_mean"):
        others = predictions | {"oracle_metadata": predictions[ceiling]}
        skill = measure(predictions["gem"][0], split_context(split, others))["skill"]
        assert "oracle_metadata is not clearly better than ridge" in skill.reason


def test_skill_with_a_sample_of_the_study_notes_that_one_is_not_its_limit(evaluation):
    predictions = evaluation.by_split["test_study"][1]
    reasons = [
        evaluation.measure("test_study", predictions[name][0])["skill"].reason
        for name in ("oracle_reference", "gem")
    ]
    assert "can tell more" in reasons[0] and reasons[1] == ""


def test_the_score_over_seeds_is_their_mean_and_null_if_one_is_null():
    resamples, null = Bootstrap(np.arange(3), 4, 0), MetricDraws.null("constant")
    first, second = MetricDraws(np.arange(5.0), 3), MetricDraws(np.arange(5.0) + 2, 3)
    both = score([first, second], resamples)
    assert both.value == 1 and both.high == score([first], resamples).high + 1
    one_null = score([first, null], resamples)
    assert one_null.value is one_null.low is None
    assert one_null.reason == "of 1 of 2 training seeds: constant"
    assert score([null, null], resamples).reason == "constant"


# --- splits with known answers ---

GENES, CONDITIONS, REPLICATES = 40, 12, 6
SAMPLES = CONDITIONS * REPLICATES


@pytest.fixture
def simulated(rng) -> tuple[EvaluationSplit, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(split, (N, G) expectation, (changed, change) of each sample); a third of the genes of a
    condition are changed."""
    level, condition = rng.normal(5, 2, GENES), np.repeat(np.arange(CONDITIONS), REPLICATES)
    effect = rng.normal(0, 1.5, (CONDITIONS, GENES)) * (rng.random((CONDITIONS, GENES)) < 0.3)
    control = level + rng.normal(0, 0.2, (60, GENES))
    expected = level + effect[condition]
    split = simple_split(
        expected + rng.normal(0, 0.2, expected.shape),
        condition,
        control,
        target=np.abs(effect).argmax(axis=1)[condition][:, None],
        perturbed_centroid=np.tile(effect.mean(axis=0) + level, (SAMPLES, 1)),
    )
    return split, expected, ((effect != 0)[condition], effect[condition])


def test_a_perfect_prediction_has_the_best_value_of_every_metric(simulated):
    split, _, true_change = simulated
    pit = np.broadcast_to((np.arange(GENES) + 0.5) / GENES, split.observed.shape)
    perfect = PredictedSplit(split.observed, split.observed, pit, np.zeros(SAMPLES))
    others = {
        "ridge": [PredictedSplit(split.observed + 1)],
        "oracle_metadata": [perfect],
        "replicate": [perfect],
    }
    draws = measure(perfect, split_context(split, others, true_change=lambda _: true_change))
    values = {name: metric.values[0] for name, metric in draws.items()}
    # The two sides have their own controls or draws, so these are only nearly perfect.
    assert values.pop("delta_pearson") > 0.99
    assert values.pop("de_direction") > 0.95
    assert values.pop("de_jaccard") > 0.75
    assert values.pop("e_distance") < 0
    best = {name: METRICS[name].best for name in values}
    assert values == pytest.approx(best, abs=1e-9)


def test_a_constant_prediction_has_no_correlation_and_a_reason(simulated):
    result = scores(simulated[0], PredictedSplit(np.full((SAMPLES, GENES), 3.0)))
    assert "constant over genes" in result["sample_pearson"].reason
    assert "constant over the samples" in result["gene_pearson"].reason
    assert 0 <= result["discrimination"].value <= 1


def test_a_prediction_of_no_change_has_no_direction_and_ties(simulated):
    split, _, true_change = simulated
    no_change = PredictedSplit(split.predicted_control.mean)
    result = scores(split, no_change, true_change=lambda _: true_change)
    assert result["delta_pearson"].reason == "no change is predicted in any condition"
    assert result["discrimination"].value == result["de_direction"].value == 0.5


def test_a_prediction_of_no_effect_is_rewarded_by_shared_controls_alone_and_this_is_said(rng):
    """Its change is minus the noise of its control; so is that of the observed side, if shared."""
    level, condition = rng.normal(5, 2, 400), np.arange(CONDITIONS)
    noise = rng.normal(0, 0.2, (CONDITIONS + 4, 400))
    split = simple_split(level + noise[4:], condition, level + noise[:4])  # two on each side
    shared = replace(split, observed_control=split.predicted_control, shared_control=True)
    predicted = PredictedSplit(np.tile(level, (CONDITIONS, 1)))
    own, biased = (scores(each, predicted)["delta_pearson"] for each in (split, shared))
    assert own.value == pytest.approx(0, abs=0.15) and not own.reason
    assert biased.value == pytest.approx(np.sqrt(1 / 3), abs=0.1)
    assert biased.reason == SHARED_CONTROLS


@pytest.mark.parametrize("truth", [True, False])
def test_scores_of_genes_are_marked_for_shared_controls_unless_the_truth_is_known(simulated, truth):
    split, expected, true_change = simulated
    split = replace(split, observed_control=split.predicted_control, shared_control=True)
    change = (lambda _: true_change) if truth else None
    result = scores(split, PredictedSplit(expected), true_change=change)
    assert np.isfinite(result["de_direction"].value)
    assert (result["de_direction"].reason == SHARED_CONTROLS) == (not truth)
    assert result["discrimination"].reason == SHARED_CONTROLS
    assert not result["mse"].reason and not result["delta_pearson_systema"].reason


def test_a_predictor_with_shuffled_conditions_scores_as_by_chance(simulated, rng):
    split, expected, true_change = simulated
    names, values = ("delta_pearson", "discrimination", "de_direction"), []
    for _ in range(20):
        first_row = rng.permutation(CONDITIONS)[split.condition] * REPLICATES
        predicted = PredictedSplit(expected[first_row])
        result = scores(split, predicted, true_change=lambda _: true_change, draws=1)
        values.append([result[name].value for name in names])
    assert np.mean(values, axis=0) == pytest.approx([1 / 12, 0.5, 0.5], abs=0.09)


def test_changes_are_taken_from_the_controls_that_a_predictor_used(simulated, rng):
    """A new study shifts all of its samples: a predictor without its controls must not be charged
    with the shift as an effect."""
    split, expected, _ = simulated
    shift = rng.normal(0, 1, GENES)

    def shifted(control: Controls) -> Controls:
        return replace(control, mean=control.mean + shift)

    new_study = replace(
        split,
        observed=split.observed + shift,
        observed_control=shifted(split.observed_control),
        reference_control=shifted(split.reference_control),
    )
    cases = (
        (expected, False, True),
        (expected + shift, True, True),
        (expected + shift, False, False),
    )
    for values, uses_study_controls, high in cases:
        predicted = PredictedSplit(values, uses_study_controls=uses_study_controls)
        delta = scores(new_study, predicted)["delta_pearson"].value
        assert delta > 0.9 if high else delta < 0.8


def test_conditions_without_controls_are_left_out(simulated):
    split, expected, _ = simulated
    without = split.condition < 5
    control = split.observed_control
    mean = np.where(without[:, None], np.nan, control.mean)
    part = replace(split, observed_control=replace(control, mean=mean))
    result = scores(part, PredictedSplit(expected))
    rest, _ = rows_of(split, {}, np.flatnonzero(~without))
    expected_result = scores(rest, PredictedSplit(expected[~without]))
    assert result["delta_pearson"].conditions == 7
    for name in ("delta_pearson", "discrimination"):
        assert result[name].value == pytest.approx(expected_result[name].value)


# --- differential genes ---


def test_without_a_known_truth_differential_genes_are_those_of_welch(simulated):
    split, _, (changed, _) = simulated
    sets, change = split_context(split).effects
    for index, genes in enumerate(sets):
        rows = np.flatnonzero(split.condition == index)
        expected = welch_genes(split.observed, split.observed_control, rows, "x")
        np.testing.assert_array_equal(genes, expected)
        difference = (split.observed - split.observed_control.mean)[rows]
        np.testing.assert_allclose(change[index], difference.mean(axis=0))
    genes, truth = np.stack(sets), changed[::REPLICATES]
    assert (genes & ~truth).sum() / genes.sum() < 0.1
    assert (genes & truth).sum() / truth.sum() > 0.8


@pytest.mark.parametrize("matched", [2, 40])
def test_genes_without_effect_are_rarely_called_with_few_matched_controls(rng, matched):
    """Four treated samples, two controls of their study, 41 of other studies that determine the
    deviation. With the mean of two controls taken as certain, 6 of 200 genes would be called."""
    called = 0
    for _ in range(30):
        others = rng.normal(0, 1, (41, 200)).std(axis=0, ddof=1)
        control = simple_controls(rng.normal(0, 1, (matched, 200)), 8)
        control = replace(control, deviation={"x": others}, degrees_of_freedom={"x": 40})
        sides = {"observed_control": control, "predicted_control": control}
        split = simple_split(rng.normal(0, 1, (8, 200)), np.repeat([0, 1], 4), **sides)
        called += sum(int(genes.sum()) for genes in split_context(split).effects[0])
    assert called / 60 < 2


def test_conditions_of_few_samples_are_not_tested(simulated):
    split, expected, _ = simulated
    predictions = {"x": [PredictedSplit(expected, draw=split.observed)]}
    first_three = np.arange(SAMPLES) % REPLICATES < 3
    rows = np.flatnonzero(first_three | (split.condition == 0))
    part, part_predictions = rows_of(split, predictions, rows)
    tested = [genes is not None for genes in split_context(part).effects[0]]
    assert tested == [True] + [False] * 11
    result = scores(part, part_predictions["x"][0])
    assert result["de_direction"].conditions == result["de_jaccard"].conditions == 1
    part, part_predictions = rows_of(split, predictions, np.flatnonzero(first_three))
    result = scores(part, part_predictions["x"][0])
    assert result["de_direction"].reason == result["de_jaccard"].reason
    assert f"the {MIN_TEST_SAMPLES} samples each" in result["de_direction"].reason


# --- partial predictions and missing parts ---


def test_metrics_are_of_the_predicted_samples_on_both_sides(simulated, rng):
    split, _, true_change = simulated
    rows = np.arange(SAMPLES) % 2 == 0
    noisy = split.observed + rng.normal(0, 0.1, split.observed.shape)
    draw = np.where(rows[:, None], noisy, np.nan)
    part, _ = rows_of(split, {}, np.flatnonzero(rows))
    partial = scores(split, PredictedSplit(draw, draw=draw), true_change=lambda _: true_change)
    part_change = tuple(values[rows] for values in true_change)
    predicted = PredictedSplit(draw[rows], draw=draw[rows])
    expected = scores(part, predicted, true_change=lambda _: part_change)
    for name in METRICS:
        assert partial[name].value == pytest.approx(expected[name].value), name
    assert partial["mse"].reason == "on the 36 of 72 samples that it predicts"


CHANGES = {"delta_pearson", "discrimination", "de_direction", "de_jaccard"}
PER_CONDITION = {"e_distance", "spread_pearson"}


@pytest.mark.parametrize(
    ("missing", "null"),
    [
        ("controls", CHANGES),
        ("treated", CHANGES | PER_CONDITION | {"delta_pearson_systema"}),
        ("replicates", PER_CONDITION | {"de_direction", "de_jaccard"}),
        ("second condition", {"discrimination", "spread_pearson"}),
        ("treated predictions", CHANGES - {"de_jaccard"} | {"e_distance", "target_bias"}),
    ],
)
def test_metrics_that_a_split_cannot_have_are_null_with_a_reason(simulated, missing, null):
    split, expected, _ = simulated
    predicted = PredictedSplit(expected, draw=expected, pit=np.full(expected.shape, 0.5))
    if missing == "controls":
        split = simple_split(split.observed, split.condition)
    if missing == "treated":
        split = replace(split, treated=np.zeros(SAMPLES, dtype=bool))
    if missing in ("replicates", "second condition"):
        rows = np.arange(0, SAMPLES, REPLICATES) if missing == "replicates" else np.arange(6)
        split, predictions = rows_of(split, {"x": [predicted]}, rows)
        predicted = predictions["x"][0]
    if missing == "treated predictions":
        treated = split.condition > 3
        split = replace(split, treated=treated, target=np.where(treated[:, None], split.target, -1))
        predicted = PredictedSplit(np.where(treated[:, None], np.nan, expected))
    result = scores(split, predicted)
    assert list(result) == list(METRICS)
    for name, metric in result.items():
        assert metric.reason if metric.value is None else np.isfinite(metric.value), name
    assert null <= {name for name, metric in result.items() if metric.value is None}
    if missing == "second condition":
        assert result["mse"].low is None and result["mse"].reason == "one condition: no interval"


def test_without_hidden_controls_other_metrics_are_the_same(evaluation):
    split, predictions = evaluation.by_split["test_study"]
    truth = evaluation.predictors.true_change
    without, complete = (
        measure(predictions["gem"][0], split_context(part, {}, evaluation.axes, truth, 5))
        for part in (replace(split, observed_control=None), split)
    )
    null = {name for name, draws in without.items() if draws.values is None}
    assert null >= {"delta_pearson", "discrimination"}
    for name in ("delta_pearson_systema", "de_direction", "de_jaccard"):
        assert without[name].values[0] == complete[name].values[0]
