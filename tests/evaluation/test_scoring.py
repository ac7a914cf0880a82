"""Every metric as it is wired, recomputed by slow loops from the arrays of a scene; and scenes made by hand with known answers."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, t
from support.comparison import World, made_controls, made_scene, rows_of, scores, truths, world_of

from pipeline.gem.evaluation.bootstrap import Bootstrap
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.predictors import Prediction
from pipeline.gem.evaluation.scoring import TESTABLE, MetricDraws, SplitContext, measure, score
from pipeline.gem.evaluation.test_split import Controls, EvaluationSplit

SPLITS = ("test_random", "test_combination", "test_perturbation", "test_study")
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


@pytest.fixture(scope="module")
def world(cohort, params) -> World:
    return world_of(cohort, params)


# --- by plain loops -----------------------------------------------------------------------------------------------------


def pearson(first, second) -> float:
    first, second = (np.asarray(side, dtype=float) for side in (first, second))
    return (
        0.0 if np.ptp(first) < 1e-9 or np.ptp(second) < 1e-9 else np.corrcoef(first, second)[0, 1]
    )


class Loops:
    """The metrics of a prediction by definition. Rows without a prediction are left out first; conditions may be repeated."""

    def __init__(self, world: World, split: str, said: Prediction):
        self.scene, predictions = world.by_split[split]
        self.said, self.axes, self.truth = said, world.axes, world.predictors.true_change
        self.baseline, self.ideal, self.replicate = (
            predictions[name][0].values for name in ("ridge", "oracle_metadata", "replicate")
        )
        self.own = (
            self.scene.reference_control
            if said.uses_study_controls
            else self.scene.predicted_control
        )

    def rows(self, conditions: list[int]) -> list[int]:
        condition = self.scene.condition.tolist()
        return [
            row
            for index in conditions
            for row in range(len(condition))
            if condition[row] == index and self.known(row)
        ]

    def known(self, row: int) -> bool:
        return not math.isnan(self.said.values[row, 0])

    def mse(self, conditions, predicted=None, also=None) -> float:
        predicted = self.said.values if predicted is None else predicted
        rows = [
            row for row in self.rows(conditions) if also is None or not math.isnan(also[row, 0])
        ]
        return (
            np.mean(
                [
                    np.mean((self.scene.observed[row].astype(float) - predicted[row]) ** 2)
                    for row in rows
                ]
            )
            if rows
            else math.nan
        )

    def mae(self, conditions) -> float:
        return np.mean(
            [
                np.mean(np.abs(self.scene.observed[row].astype(float) - self.said.values[row]))
                for row in self.rows(conditions)
            ]
        )

    def skill(self, conditions, ideal=None) -> float:
        ideal = self.ideal if ideal is None else ideal
        mine, ridge, best = (
            self.mse(conditions, values, ideal)
            for values in (self.said.values, self.baseline, ideal)
        )
        return (ridge - mine) / (ridge - best)

    def skill_replicate(self, conditions) -> float:
        return self.skill(conditions, self.replicate)

    def sample_pearson(self, conditions) -> float:
        return np.mean(
            [
                pearson(self.scene.observed[row], self.said.values[row])
                for row in self.rows(conditions)
            ]
        )

    def gene_pearson(self, conditions) -> float:
        rows = self.rows(conditions)
        total, weight = 0.0, 0.0
        for gene in range(self.scene.observed.shape[1]):
            observed, predicted = (
                self.scene.observed[rows, gene].astype(float),
                self.said.values[rows, gene].astype(float),
            )
            total += observed.var() * pearson(observed, predicted)
            weight += observed.var()
        return total / weight

    def treated(self, conditions) -> list[tuple[int, list[int]]]:
        groups = [
            (index, [row for row in self.rows([index]) if self.scene.treated[row]])
            for index in conditions
        ]
        return [(index, rows) for index, rows in groups if rows]

    def change(self, rows, values, reference) -> np.ndarray:
        return np.mean([values[row].astype(float) - reference[row] for row in rows], axis=0)

    def delta_pearson(self, conditions) -> float:
        return np.mean(
            [
                pearson(
                    self.change(rows, self.scene.observed, self.scene.observed_control.mean),
                    self.change(rows, self.said.values, self.own.mean),
                )
                for _, rows in self.treated(conditions)
            ]
        )

    def delta_pearson_systema(self, conditions) -> float:
        centre = self.scene.perturbed_centre
        return np.mean(
            [
                pearson(
                    self.change(rows, self.scene.observed, centre),
                    self.change(rows, self.said.values, centre),
                )
                for _, rows in self.treated(conditions)
            ]
        )

    def discrimination(self, conditions) -> float:
        groups = [rows for _, rows in self.treated(conditions)]
        real = [
            self.change(rows, self.scene.observed, self.scene.observed_control.mean)
            for rows in groups
        ]
        found = []
        for own, rows in enumerate(groups):
            said = self.change(rows, self.said.values, self.own.mean)
            if np.linalg.norm(said) < 1e-6:
                found.append(0.5)
                continue
            cosine = [said @ other / np.linalg.norm(said) / np.linalg.norm(other) for other in real]
            rank = sum(
                other > cosine[own] + 1e-12 for index, other in enumerate(cosine) if index != own
            )
            rank += (
                sum(
                    abs(other - cosine[own]) <= 1e-12
                    for index, other in enumerate(cosine)
                    if index != own
                )
                / 2
            )
            found.append(1 - rank / (len(groups) - 1))
        return np.mean(found)

    def true_sets(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        changed, change = self.truth(self.scene)
        of = {
            index: [
                row
                for row in range(len(self.scene.condition))
                if self.scene.condition[row] == index
            ]
            for index in set(self.scene.condition)
        }
        return {
            index: (np.mean(changed[rows], axis=0) >= 0.5, np.mean(change[rows], axis=0))
            for index, rows in of.items()
        }

    def de_direction(self, conditions) -> float:
        real, found = self.true_sets(), []
        for index, rows in self.treated(conditions):
            genes, change = real[index]
            said = self.change(rows, self.said.values, self.own.mean)
            signs = [
                (np.sign(said[gene]) * np.sign(change[gene]) + 1) / 2
                for gene in np.flatnonzero(genes)
            ]
            found += [np.mean(signs)] if signs else []
        return np.mean(found) if found else math.nan

    def de_jaccard(self, conditions) -> float:
        if self.said.drawn is None:
            return math.nan
        real, found = self.true_sets(), []
        for index, rows in self.treated(conditions):
            if len(rows) < TESTABLE:
                continue
            said = set(
                np.flatnonzero(welch(self.said.drawn, self.own, rows, self.scene.context[rows[0]]))
            )
            true = set(np.flatnonzero(real[index][0]))
            found += [len(said & true) / len(said | true)] if said | true else []
        return np.mean(found) if found else math.nan

    def calibration(self, conditions) -> float:
        if self.said.pit is None:
            return math.nan
        values = [value for row in self.rows(conditions) for value in self.said.pit[row]]
        shares = [
            sum(
                edge / 10 <= value < (edge + 1) / 10 or (edge == 9 and value == 1)
                for value in values
            )
            / len(values)
            for edge in range(10)
        ]
        return sum(abs(share - 0.1) for share in shares)

    def count_log_likelihood(self, conditions) -> float:
        given = self.said.log_likelihood
        return (
            math.nan
            if given is None
            else float(np.mean([given[row] for row in self.rows(conditions)]))
        )

    def e_distance(self, conditions) -> float:
        spoken, found = self.said.values if self.said.drawn is None else self.said.drawn, []
        for _, rows in self.treated(conditions):
            if len(rows) > 1:
                x, y = (
                    np.stack([values[row].astype(float) @ self.axes for row in rows])
                    for values in (spoken, self.scene.observed)
                )
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
                found.append(2 * between - sum(within))
        return np.mean(found) if found else math.nan

    def spread_pearson(self, conditions) -> float:
        if self.said.drawn is None:
            return math.nan
        sides = self.scene.observed, self.said.drawn
        found = [
            pearson(*(values[rows].astype(float).std(axis=0, ddof=1) for values in sides))
            for _, rows in self.treated(conditions)
            if len(rows) > 1
        ]
        return np.mean(found) if found else math.nan

    def target_bias(self, conditions) -> float:
        rows = [row for row in self.rows(conditions) if self.scene.target[row] >= 0]
        return (
            np.mean(
                [
                    self.said.values[row, self.scene.target[row]]
                    - self.scene.observed[row, self.scene.target[row]]
                    for row in rows
                ]
            )
            if rows
            else math.nan
        )


def welch(values: np.ndarray, control: Controls, rows: list[int], context: str) -> np.ndarray:
    """Genes found by loops: the treated mean against that of the matched controls, whose spread all controls of the context tell."""
    changes = np.stack([values[row].astype(float) - control.mean[row] for row in rows])
    share = sum(
        (np.mean(control.group[rows] == group)) ** 2
        / control.number[rows][control.group[rows] == group][0]
        for group in set(control.group[rows])
    )
    p = []
    for gene in range(changes.shape[1]):
        parts = (
            changes[:, gene].var(ddof=1) / len(rows),
            control.deviation[context][gene] ** 2 * share,
        )
        freedom = sum(parts) ** 2 / (
            parts[0] ** 2 / (len(rows) - 1) + parts[1] ** 2 / control.freedom[context]
        )
        p.append(2 * t.sf(abs(changes[:, gene].mean()) / math.sqrt(sum(parts)), freedom))
    return false_discovery_control(p) <= 0.05


@pytest.mark.parametrize(
    ("split", "predictor"),
    [
        (split, name)
        for split in SPLITS
        for name in PREDICTORS
        if split[-3:] != "ion" or name == "gem"
    ],
)
def test_every_metric_is_what_loops_over_samples_and_genes_give(world, split, predictor):
    scene, said = world.by_split[split]
    found = measured(world, split, said[predictor][0])
    loops, everything = (
        Loops(world, split, said[predictor][0]),
        list(range(scene.condition.max() + 1)),
    )
    for name in METRICS:
        if found[name].values is None:
            assert found[name].reason
        else:
            assert found[name].values[0] == pytest.approx(
                getattr(loops, name)(everything), rel=1e-5, abs=1e-5
            ), name
            assert found[name].conditions > 0
    null = {name for name in METRICS if found[name].values is None}
    may = (
        {"calibration", "de_jaccard", "spread_pearson"}
        if said[predictor][0].drawn is None
        else set()
    )
    may |= set() if predictor.startswith("gem") else {"count_log_likelihood"}
    may |= {"skill_replicate", "target_bias", "de_jaccard"} | (
        {"delta_pearson"} if predictor == "no_change" else set()
    )
    may |= (
        {"gene_pearson"}
        if predictor == "training_mean"
        else {"calibration", "e_distance", "spread_pearson"}
        if predictor == "replicate"
        else set()
    )
    assert null <= may


def measured(world: World, split: str, said: Prediction) -> dict[str, MetricDraws]:
    scene, predictions = world.by_split[split]
    return measure(
        said, truths(scene, predictions, world.axes, world.predictors.true_change, draws=12)
    )


@pytest.mark.parametrize("split", ["test_random", "test_study"])
@pytest.mark.parametrize(
    "metric", ["mse", "skill", "gene_pearson", "delta_pearson", "calibration", "target_bias"]
)
def test_every_resample_is_the_metric_of_the_conditions_drawn_each_as_often_as_it_is(
    world, split, metric
):
    scene, said = world.by_split[split]
    prediction = said["gem"][0]
    found = measured(world, split, prediction)[metric].values
    if found is None:
        assert (split, metric) == ("test_random", "target_bias") or metric == "skill"
        return
    loops, weights = Loops(world, split, prediction), Bootstrap(scene.condition, 12, 0).weights
    for draw in range(1, 4):
        drawn = [index for index, times in enumerate(weights[draw]) for _ in range(int(times))]
        assert found[draw] == pytest.approx(
            getattr(loops, metric)(drawn), rel=1e-5, abs=1e-6, nan_ok=True
        )


def test_the_interval_holds_the_middle_of_the_resamples(world):
    scene, said = world.by_split["test_study"]
    known = truths(scene, said, world.axes, draws=200)
    one = measure(said["ridge"][0], known)["mse"]
    found = score([one], known.resamples)
    assert (found.low, found.high) == pytest.approx(np.quantile(one.values[1:], [0.025, 0.975]))
    assert found.low < found.value < found.high


def test_skill_is_zero_for_the_baseline_one_for_the_ideal_and_null_where_the_two_do_not_differ_clearly(
    world,
):
    scene, said = world.by_split["test_study"]
    assert measured(world, "test_study", said["ridge"][0])["skill"].values[0] == 0
    assert measured(world, "test_study", said["oracle_metadata"][0])["skill"].values[0] == 1
    for ideal in ("ridge", "training_mean"):
        same = truths(scene, said | {"oracle_metadata": said[ideal]}, world.axes)
        assert (
            "oracle_metadata is not clearly better than ridge"
            in measure(said["gem"][0], same)["skill"].reason
        )


def test_skill_of_a_predictor_that_sees_the_study_says_that_one_is_not_its_limit(world):
    said = world.by_split["test_study"][1]
    assert (
        "can tell more"
        in measured(world, "test_study", said["oracle_reference"][0])["skill"].reason
    )
    assert measured(world, "test_study", said["gem"][0])["skill"].reason == ""


def test_a_score_over_seeds_is_the_mean_and_null_where_one_seed_has_none():
    resamples = Bootstrap(np.arange(3), 4, 0)
    first, second = MetricDraws(np.arange(5.0), 3), MetricDraws(np.arange(5.0) + 2, 3)
    assert score([first, second], resamples).value == 1
    assert score([first], resamples).high - score([first, second], resamples).high == -1
    found = score([first, MetricDraws.null("constant")], resamples)
    assert (found.value, found.low, found.reason) == (
        None,
        None,
        "of 1 of 2 training seeds: constant",
    )
    assert score([MetricDraws.null("constant")] * 2, resamples).reason == "constant"


# --- scenes made by hand ------------------------------------------------------------------------------------------------


@pytest.fixture
def made(rng) -> tuple[EvaluationSplit, np.ndarray, np.ndarray]:
    """(scene, (N, G) true expectation, (m, G) controls): 12 conditions of 6 samples, 40 genes, a third changed."""
    level, condition = rng.normal(5, 2, 40), np.repeat(np.arange(12), 6)
    effect = rng.normal(0, 1.5, (12, 40)) * (rng.random((12, 40)) < 0.3)
    control = level + rng.normal(0, 0.2, (60, 40))
    expected = level + effect[condition]
    target = np.abs(effect).argmax(axis=1)[condition]
    changed = (effect != 0)[condition], effect[condition]
    centre = np.tile(effect.mean(axis=0) + level, (72, 1))
    scene = made_scene(
        expected + rng.normal(0, 0.2, expected.shape),
        condition,
        control,
        target=target,
        perturbed_centre=centre,
    )
    return scene, expected, changed


def test_a_perfect_prediction_has_the_best_value_of_every_metric(made):
    scene, _, changed = made
    pit = np.broadcast_to((np.arange(40) + 0.5) / 40, scene.observed.shape)
    perfect = Prediction(
        scene.observed, drawn=scene.observed, pit=pit, log_likelihood=np.zeros(len(pit))
    )
    worse = Prediction(scene.observed + 1)
    known = truths(
        scene,
        {"ridge": [worse], "oracle_metadata": [perfect], "replicate": [perfect]},
        true_change=lambda _: changed,
    )
    found = {name: one.values[0] for name, one in measure(perfect, known).items()}
    for name in ("mse", "mae", "target_bias", "calibration", "count_log_likelihood"):
        assert found[name] == pytest.approx(0, abs=1e-9)
    for name in (
        "skill",
        "skill_replicate",
        "sample_pearson",
        "gene_pearson",
        "spread_pearson",
        "discrimination",
        "delta_pearson_systema",
    ):
        assert found[name] == pytest.approx(1, abs=1e-9)
    # The two sides have controls of their own, so these are only nearly perfect.
    assert (
        found["delta_pearson"] > 0.99
        and found["de_direction"] > 0.95
        and found["de_jaccard"] > 0.75
    )
    assert found["e_distance"] < 0


def test_a_constant_prediction_has_no_correlation_and_says_why(made):
    scene = made[0]
    found = scores(scene, Prediction(np.full(scene.observed.shape, 3.0)))
    assert "constant over genes" in found["sample_pearson"].reason
    assert "constant over the samples" in found["gene_pearson"].reason
    assert found["discrimination"].value is not None and 0 <= found["discrimination"].value <= 1


def test_a_prediction_of_no_change_has_no_direction_and_ties_with_everything(made):
    scene = made[0]
    found = scores(scene, Prediction(scene.predicted_control.mean), true_change=lambda _: made[2])
    assert found["delta_pearson"].reason == "no change is predicted in any condition"
    assert found["discrimination"].value == 0.5
    assert found["de_direction"].value == 0.5


def test_conditions_of_equal_truth_share_their_ranks(made):
    scene, expected, _ = made
    twins = made_scene(np.tile(scene.observed[:6], (2, 1)), np.repeat([0, 1], 6))
    twins = made_scene(twins.observed, twins.condition, scene.observed[-20:] - expected[-20:] + 5)
    assert scores(twins, Prediction(twins.observed))["discrimination"].value == 0.5


def test_a_shuffled_predictor_scores_about_nothing(made, rng):
    scene, expected, changed = made
    values = []
    for _ in range(20):
        order = rng.permutation(12)
        found = scores(
            scene,
            Prediction(expected[np.argsort(order, kind="stable")[scene.condition] * 6]),
            true_change=lambda _: changed,
            draws=1,
        )
        values.append(
            [found[name].value for name in ("delta_pearson", "discrimination", "de_direction")]
        )
    assert np.mean(values, axis=0) == pytest.approx([1 / 12, 0.5, 0.5], abs=0.09)


def test_a_perturbation_without_effect_scores_about_nothing_with_disjoint_controls_and_much_with_shared_ones(
    rng,
):
    level, condition = rng.normal(5, 2, 60), np.repeat(np.arange(80), 3)
    deltas = {"disjoint": [], "shared": []}
    for _ in range(10):
        control = level + rng.normal(0, 0.3, (12, 60))
        scene = made_scene(level + rng.normal(0, 0.3, (240, 60)), condition, control)
        own = {"disjoint": scene.predicted_control, "shared": scene.observed_control}
        for name, controls in own.items():
            shown = made_scene(scene.observed, condition, control, predicted_control=controls)
            deltas[name].append(
                scores(shown, Prediction(np.tile(level, (240, 1))), draws=1)["delta_pearson"].value
            )
    assert abs(np.mean(deltas["disjoint"])) < 3 * np.std(deltas["disjoint"]) / np.sqrt(10) + 0.03
    assert np.mean(deltas["shared"]) > 0.4


def test_predictors_that_see_the_study_are_measured_from_its_controls_and_the_others_from_those_they_knew(
    made, rng
):
    """A new study shifts all that is measured in it: who cannot know the shift must not be charged with it as an effect."""
    scene, expected, _ = made
    shift = rng.normal(0, 1, 40)
    new = made_scene(
        scene.observed + shift,
        scene.condition,
        observed_control=shifted(scene.observed_control, shift),
        predicted_control=scene.predicted_control,
        reference_control=shifted(scene.reference_control, shift),
    )
    assert scores(new, Prediction(expected))["delta_pearson"].value > 0.9
    assert (
        scores(new, Prediction(expected + shift, uses_study_controls=True))["delta_pearson"].value
        > 0.9
    )
    assert scores(new, Prediction(expected + shift))["delta_pearson"].value < 0.8


def shifted(control: Controls, shift: np.ndarray) -> Controls:
    return Controls(
        control.mean + shift, control.number, control.group, control.deviation, control.freedom
    )


def test_conditions_without_controls_are_left_out_and_counted(made):
    scene, expected, _ = made
    gone = scene.condition < 5
    part = Controls(
        np.where(gone[:, None], np.nan, scene.observed_control.mean),
        scene.observed_control.number,
        scene.observed_control.group,
        scene.observed_control.deviation,
        scene.observed_control.freedom,
    )
    found = scores(
        made_scene(
            scene.observed,
            scene.condition,
            observed_control=part,
            predicted_control=scene.predicted_control,
        ),
        Prediction(expected),
    )
    left, _ = rows_of(scene, {}, np.flatnonzero(~gone))
    assert found["delta_pearson"].conditions == 7
    for name in ("delta_pearson", "discrimination"):
        assert found[name].value == pytest.approx(
            scores(left, Prediction(expected[~gone]))[name].value
        )


def test_without_the_truth_differential_genes_are_those_that_welch_finds_against_controls(made):
    scene, _, changed = made
    sets, change = truths(scene).effects
    for index, genes in enumerate(sets):
        rows = np.flatnonzero(scene.condition == index)
        np.testing.assert_array_equal(
            genes, welch(scene.observed, scene.observed_control, list(rows), "x")
        )
        np.testing.assert_allclose(
            change[index], (scene.observed - scene.observed_control.mean)[rows].mean(axis=0)
        )
    real = np.stack([changed[0][scene.condition == index][0] for index in range(12)])
    found = np.stack(sets)
    assert (found & ~real).sum() / found.sum() < 0.1
    assert (found & real).sum() / real.sum() > 0.8


@pytest.mark.parametrize("matched", [2, 40])
def test_genes_without_effect_are_rarely_called_however_few_controls_are_matched(rng, matched):
    """Four samples of a treatment, two controls of its study, forty of other studies that tell how much controls vary."""
    called = 0
    for _ in range(30):
        control = made_controls(rng.normal(0, 1, (matched, 200)), 8)
        others = rng.normal(0, 1, (41, 200)).std(axis=0, ddof=1)
        control = Controls(control.mean, control.number, control.group, {"x": others}, {"x": 40})
        scene = made_scene(
            rng.normal(0, 1, (8, 200)),
            np.repeat([0, 1], 4),
            observed_control=control,
            predicted_control=control,
        )
        called += sum(int(genes.sum()) for genes in truths(scene).effects[0])
    assert (
        called / 60 < 2
    )  # of 200 genes, and of a condition; with the mean of two controls taken as certain: 6


def test_conditions_too_small_to_test_have_no_differential_genes_and_not_none_of_them(made):
    scene, expected, _ = made
    few, said = rows_of(
        scene,
        {"x": [Prediction(expected, drawn=scene.observed)]},
        np.flatnonzero((np.arange(72) % 6 < 3) | (scene.condition == 0)),
    )
    sets = truths(few).effects[0]
    assert [genes is not None for genes in sets] == [True] + [False] * 11
    found = scores(few, said["x"][0])
    assert (found["de_direction"].conditions, found["de_jaccard"].conditions) == (1, 1)
    smaller, said = rows_of(
        scene,
        {"x": [Prediction(expected, drawn=scene.observed)]},
        np.flatnonzero(np.arange(72) % 6 < 3),
    )
    found = scores(smaller, said["x"][0])
    assert found["de_direction"].reason == found["de_jaccard"].reason
    assert f"{TESTABLE} samples each" in found["de_direction"].reason


def test_both_sides_of_a_distribution_are_of_the_samples_that_are_predicted(made, rng):
    scene = made[0]
    heard = np.arange(72) % 2 == 0
    drawn = np.where(
        heard[:, None], scene.observed + rng.normal(0, 0.1, scene.observed.shape), np.nan
    )
    part, _ = rows_of(scene, {}, np.flatnonzero(heard))
    whole = scores(scene, Prediction(drawn, drawn=drawn), true_change=lambda _: made[2])
    half = scores(
        part,
        Prediction(drawn[heard], drawn=drawn[heard]),
        true_change=lambda _: tuple(values[heard] for values in made[2]),
    )
    for name in METRICS:
        assert whole[name].value == pytest.approx(half[name].value), name
    assert whole["mse"].reason == "on the 36 of 72 samples that it predicts"


@pytest.mark.parametrize(
    "lacking", ["controls", "treated", "replicates", "second condition", "treated predictions"]
)
def test_what_a_scene_lacks_is_null_with_a_reason_and_never_nan(made, lacking):
    scene, expected, _ = made
    prediction, count = Prediction(expected, drawn=expected, pit=np.full(expected.shape, 0.5)), 72
    if lacking == "controls":
        scene = made_scene(scene.observed, scene.condition)
    if lacking == "treated":
        scene = made_scene(
            scene.observed, scene.condition, expected[:20], treated=np.zeros(72, dtype=bool)
        )
    if lacking == "replicates":
        count = 12
        scene, said = rows_of(scene, {"x": [prediction]}, np.arange(0, 72, 6))
        prediction = said["x"][0]
    if lacking == "second condition":
        count = 6
        scene, said = rows_of(scene, {"x": [prediction]}, np.arange(6))
        prediction = said["x"][0]
    if lacking == "treated predictions":
        scene = made_scene(
            scene.observed, scene.condition, expected[:20], treated=scene.condition > 3
        )
        prediction = Prediction(np.where(scene.treated[:, None], np.nan, expected))
    found = scores(scene, prediction)
    assert list(found) == list(METRICS)
    for name, one in found.items():
        assert one.reason if one.value is None else np.isfinite(one.value), name
    expected_null = {
        "controls": {"delta_pearson", "discrimination", "de_direction", "de_jaccard"},
        "treated": {
            "delta_pearson",
            "delta_pearson_systema",
            "discrimination",
            "de_direction",
            "de_jaccard",
            "e_distance",
            "spread_pearson",
        },
        "replicates": {"de_direction", "de_jaccard", "e_distance", "spread_pearson"},
        "second condition": {"discrimination", "spread_pearson"},
        "treated predictions": {
            "delta_pearson",
            "discrimination",
            "de_direction",
            "e_distance",
            "target_bias",
        },
    }[lacking]
    assert expected_null <= {name for name, one in found.items() if one.value is None}
    if lacking == "second condition":
        assert found["mse"].low is None and found["mse"].reason == "one condition: no interval"
    assert len(scene.samples) == count


def test_a_cohort_without_hidden_controls_still_has_what_needs_none(world):
    scene, said = world.by_split["test_study"]
    bare = pd.Series(
        {name: getattr(scene, name) for name in scene.__dataclass_fields__}
    ).to_dict() | {"observed_control": None}
    known = SplitContext(
        EvaluationSplit(**bare),
        Bootstrap(scene.condition, 5, 0),
        world.axes,
        {},
        world.predictors.true_change,
    )
    found = measure(said["gem"][0], known)
    whole = measured(world, "test_study", said["gem"][0])
    assert {name for name in METRICS if found[name].values is None} >= {
        "delta_pearson",
        "discrimination",
    }
    for name in ("delta_pearson_systema", "de_direction", "de_jaccard"):
        assert found[name].values[0] == whole[name].values[0]
