"""The tables of a split: what is compared with what, over what it is resampled, and cohorts that lack something."""

import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA
from support.comparison import SEEDS, World, rows_of, world_of

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.evaluation.comparison import (
    COMPARED,
    COMPARISONS,
    evaluate_scene,
    nested,
    principal_axes,
    sample_errors,
)
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.predictors import MODELS, PREDICTORS, Predictors
from pipeline.gem.evaluation.test_split import EvaluationSplits

SPLITS = ("test_random", "test_combination", "test_perturbation", "test_study")


@pytest.fixture(scope="module")
def world(cohort, params) -> World:
    return world_of(cohort, params)


@pytest.fixture(scope="module")
def results(world) -> dict:
    return {split: world.result(split) for split in SPLITS}


def assert_honest(scores: pd.DataFrame) -> None:
    """A number with a finite interval, or null with a reason."""
    null = scores["value"].isna()
    assert (scores.loc[null, "reason"].str.len() > 0).all()
    assert scores.loc[null, ["low", "high"]].isna().all(axis=None)
    bare = ~null & scores["low"].isna()
    assert scores.loc[bare, "reason"].str.contains("no interval").all()
    whole = scores[~null & ~bare]
    assert np.isfinite(whole[["value", "low", "high"]].to_numpy(dtype=float)).all()
    assert (whole["low"] <= whole["high"]).all()
    assert (scores.loc[~null, "conditions"] > 0).all()


@pytest.mark.parametrize("split", SPLITS)
def test_every_predictor_has_every_metric_a_number_or_a_reason(results, split):
    scores = results[split].scores
    assert list(scores.columns) == [
        "split",
        "predictor",
        "metric",
        "value",
        "low",
        "high",
        "conditions",
        "reason",
    ]
    assert list(zip(scores["predictor"], scores["metric"], strict=True)) == [
        (name, metric) for name in PREDICTORS for metric in METRICS
    ]
    assert_honest(scores)


def test_metrics_json_has_the_same_numbers_and_null(results):
    scores = pd.concat([result.scores for result in results.values()])
    found = nested(scores)
    assert set(found) == set(SPLITS)
    for row in scores.itertuples():
        value = found[row.split][row.predictor][row.metric]
        assert value is None if pd.isna(row.value) else value == row.value


def test_the_score_of_a_model_is_the_mean_of_its_seeds(results):
    for result in results.values():
        means = result.seeds.groupby(["predictor", "metric"])["value"].agg(["mean", "size"])
        scores = result.scores.dropna(subset=["value"]).set_index(["predictor", "metric"])["value"]
        assert {name for name, _ in means.index} == set(MODELS)
        for key, row in means.iterrows():
            assert row["size"] == len(SEEDS[key[0]])
            assert scores[key] == pytest.approx(row["mean"])


def test_models_are_compared_with_every_floor_and_with_one_another(results):
    for result in results.values():
        found = result.comparisons
        for metric in COMPARED:
            pairs = set(
                map(
                    tuple, found.loc[found["metric"] == metric, ["predictor", "against"]].to_numpy()
                )
            )
            assert pairs == set(COMPARISONS)


@pytest.mark.parametrize("split", SPLITS)
def test_differences_are_those_of_the_scores_resampled_over_what_the_split_holds_out(
    world, results, split
):
    """Conditions of one held-out perturbation share its error: as if they were independent, intervals would be too narrow."""
    scene, said = world.by_split[split]
    found = results[split].comparisons.query("metric == 'mse'").set_index(["predictor", "against"])
    kind, number = {
        "test_random": ("condition", scene.condition.max() + 1),
        "test_combination": ("pair", len(set(scene.pair))),
        "test_perturbation": ("perturbation", len(set(scene.perturbation))),
        "test_study": ("study", len(set(scene.study))),
    }[split]
    assert set(found["of"]) == {kind} and set(found["number"]) == {number}
    errors = {name: sample_errors(scene, said[name]) for name in ("gem", "ridge")}
    difference = errors["ridge"] - errors["gem"]
    row = found.loc[("gem", "ridge")]
    assert row["value"] == pytest.approx(difference.mean())
    if number == 1:
        assert np.isnan(row["low"]) and row["verdict"] == "no clear difference"
        return
    # By hand: entities drawn with replacement, their samples pooled; the same quantiles to the noise of a bootstrap.
    rng, parts = (
        np.random.default_rng(0),
        [difference[scene.entity == entity] for entity in range(number)],
    )
    drawn = [
        np.concatenate([parts[entity] for entity in rng.integers(0, number, number)]).mean()
        for _ in range(2000)
    ]
    assert (row["low"], row["high"]) == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.35 * (np.max(drawn) - np.min(drawn))
    )


def test_a_treated_condition_counts_once_for_each_entity_it_was_measured_in(world, results):
    scene, said = world.by_split["test_study"]
    row = (
        results["test_study"]
        .comparisons.query("metric == 'delta_pearson'")
        .set_index(["predictor", "against"])
        .loc[("gem_tuned", "ridge")]
    )
    values = []
    for pair in sorted(
        {
            (entity, condition)
            for entity, condition in zip(
                scene.entity[scene.treated], scene.condition[scene.treated], strict=True
            )
        }
    ):
        rows = (scene.entity == pair[0]) & (scene.condition == pair[1]) & scene.treated
        real = (scene.observed - scene.observed_control.mean)[rows].mean(axis=0)
        deltas = [
            np.corrcoef(
                real, (said[name][0].values - scene.predicted_control.mean)[rows].mean(axis=0)
            )[0, 1]
            for name in ("gem_tuned", "ridge")
        ]
        values.append(deltas[0] - deltas[1])
    assert row["value"] == pytest.approx(np.mean(values))
    assert row["number"] == len(set(scene.study))


def test_better_is_said_only_where_the_paired_interval_is_clear_of_zero(results):
    for result in results.values():
        for row in result.comparisons.itertuples():
            clear = np.isfinite(row.low) and not row.low <= 0 <= row.high
            assert row.verdict == (
                ("better" if row.low > 0 else "worse") if clear else "no clear difference"
            )


def test_a_model_against_itself_is_no_clear_difference(world):
    said = world.by_split["test_random"][1]
    found = world.result("test_random", said | {"gem_tuned": said["gem"]}).comparisons.query(
        "predictor == 'gem_tuned' and against == 'gem'"
    )
    assert (found["value"] == 0).all() and (found["verdict"] == "no clear difference").all()


def test_the_table_of_conditions_averages_to_the_scores(world, results):
    scene = world.by_split["test_study"][0]
    table = results["test_study"].conditions
    assert set(table["predictor"]) == {*MODELS, "ridge", "oracle_metadata"}
    scores = results["test_study"].scores.set_index(["predictor", "metric"])["value"]
    for name, rows in table.groupby("predictor"):
        assert rows["delta_pearson"].mean() == pytest.approx(scores[(name, "delta_pearson")])
        assert rows["samples"].sum() == scene.treated.sum()
        errors = sample_errors(scene, world.by_split["test_study"][1][name])
        assert np.average(rows["mse"], weights=rows["samples"]) == pytest.approx(
            errors[scene.treated].mean()
        )
        assert set(rows["condition"]) == set(scene.condition_name[scene.treated])


def test_the_table_of_calibration_has_the_shares_behind_the_score(results):
    result = results["test_random"]
    scores = result.scores.set_index(["predictor", "metric"])["value"]
    assert set(result.calibration["predictor"]) == {
        *MODELS,
        "oracle_metadata",
        "oracle_reference",
        "oracle_omniscient",
    }
    for name, rows in result.calibration.groupby("predictor"):
        assert list(rows["bin"]) == list(range(1, 11))
        assert rows["share"].sum() == pytest.approx(1)
        if len(SEEDS.get(name, [1])) == 1:
            assert (rows["share"] - 0.1).abs().sum() == pytest.approx(scores[(name, "calibration")])


def test_principal_axes_are_those_of_scikit_learn_and_as_many_as_there_can_be(rng):
    expression = (
        rng.normal(0, 1, (300, 4)) @ rng.normal(0, 3, (4, 70)) + rng.normal(0, 0.1, (300, 70))
    ).astype(np.float32)
    axes = principal_axes(expression)
    assert axes.shape == (70, 50)
    np.testing.assert_allclose(axes.T @ axes, np.eye(50), atol=1e-4)
    reference = PCA(4, svd_solver="full").fit(expression.astype(float)).components_
    np.testing.assert_allclose(np.abs(np.sum(reference * axes[:, :4].T, axis=1)), 1, atol=1e-4)
    assert principal_axes(expression[:20, :8]).shape == (8, 8)


# --- cohorts that lack something ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lacking", ["truth", "control", "studies", "everything", "hidden controls"]
)
def test_what_a_cohort_lacks_is_null_with_a_reason_or_absent_and_nothing_fails(
    world, tmp_path, lacking, monkeypatch
):
    shutil.copytree(world.cohort.folder, tmp_path / "cohort")
    if lacking != "control":
        shutil.rmtree(tmp_path / "cohort" / "truth")
    plain = Cohort(tmp_path / "cohort")
    changes = {
        "control": {"control": None},
        "studies": {"study_column": None},
        "everything": {"control": None, "study_column": None},
    }
    plain.declared = plain.declared.model_copy(update=changes.get(lacking, {}))
    scenes = EvaluationSplits(plain, world.params.evaluate)
    if lacking == "hidden controls":
        monkeypatch.setattr(
            scenes,
            "_hidden_controls",
            lambda name, samples, expression, own: (samples[:0], expression[:0]),
        )
    predictors = Predictors(scenes, {"gem": world.predictors.by_name["gem"].args[0]})
    for split in ("test_random", "test_study"):
        scene = scenes.scene(split)
        result = evaluate_scene(
            scene,
            predictors(scene),
            {"gem": [1, 2], "gem_reference": [1, 2]},
            world.axes,
            predictors.true_change,
            world.params.evaluate,
        )
        assert_honest(result.scores)
        of_gem = result.scores.set_index(["predictor", "metric"]).loc["gem"]
        assert np.isfinite(of_gem.loc["mse", "value"])
        if lacking != "control":
            assert "truth" in of_gem.loc["skill", "reason"] and result.regret.empty
        if lacking in ("control", "everything", "hidden controls"):
            assert (
                of_gem.loc["delta_pearson", "reason"]
                == "no two disjoint sets of controls of the same context"
            )
            assert set(result.comparisons["metric"]) == {"mse"}
        if lacking in ("truth", "studies"):
            assert np.isfinite(of_gem.loc["delta_pearson", "value"])


@pytest.mark.parametrize("rows", ["one condition", "one sample", "controls only"])
def test_a_split_of_almost_nothing_is_evaluated(world, rows):
    scene, said = world.by_split["test_study"]
    treated = np.flatnonzero(scene.treated)
    chosen = {
        "one condition": np.flatnonzero(scene.condition == scene.condition[treated[0]]),
        "one sample": treated[:1],
        "controls only": np.flatnonzero(~scene.treated),
    }[rows]
    result = world.result("test_study", *rows_of(scene, said, chosen)[::-1])
    assert_honest(result.scores)
    scores = result.scores.set_index(["predictor", "metric"])
    if rows == "controls only":
        assert scores.loc[("gem", "delta_pearson"), "reason"] == "no treated sample in this split"
        assert result.conditions.empty
    else:
        assert scores.loc[("gem", "mse"), "reason"] == "one condition: no interval"
        assert np.isfinite(scores.loc[("ridge", "delta_pearson"), "value"])
        assert len(result.conditions) == 6
    assert (result.comparisons["verdict"] == "no clear difference").all()
