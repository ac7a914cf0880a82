"""The comparison of predictors: what is scored, by whom it was seen, and that floors and ceilings are where they belong."""

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.evaluation import COMPARISONS, Evaluation, score_split
from pipeline.gem.references import choose_references, reference_lists
from pipeline.gem.training import TrainingData, fit


@pytest.fixture(scope="module")
def evaluation(cohort, params) -> Evaluation:
    return Evaluation(cohort, params.evaluate)


@pytest.fixture(scope="module")
def scenes(evaluation) -> dict:
    return {scene.name: scene for scene in evaluation.scenes()}


@pytest.fixture(scope="module")
def gem(cohort, params):
    import torch

    short = params.override({"train.epochs": 25, "train.learning_rate": 5e-3, "train.batch_size": 16})
    return fit(TrainingData.load(cohort, torch.device("cpu")), short, seed=1).gem


@pytest.fixture(scope="module")
def predictions(evaluation, scenes, gem) -> dict:
    predictors = evaluation.predictors({"gem": gem, "gem_tuned": gem})
    return {split: {name: predict(scene) for name, predict in predictors.items()} for split, scene in scenes.items()}


def table(scene, predictions, params) -> pd.DataFrame:
    return score_split(scene, predictions, params.evaluate)[0].set_index(["predictor", "metric"])


def test_every_test_split_of_the_cohort_is_a_scene(scenes):
    assert list(scenes) == ["test_random", "test_combination", "test_perturbation", "test_study"]


def test_observed_and_predicted_side_use_disjoint_controls_and_no_predictor_saw_the_observed_ones(evaluation, scenes, cohort):
    reserved = cohort.expression(["test_control"])
    train = cohort.expression(["train"])
    scene = scenes["test_random"]
    # Means of disjoint sets: neither side can be a mean of the other's samples.
    low, high = reserved.min(axis=0), reserved.max(axis=0)
    assert ((scene.observed_control >= low - 1e-5) & (scene.observed_control <= high + 1e-5)).all()
    assert not {row.tobytes() for row in reserved} & {row.tobytes() for row in train}


def test_the_controls_given_away_as_references_in_a_new_study_are_not_scored(cohort, scenes):
    scene, rows = scenes["test_study"], cohort.rows(["test_study"])
    given = rows[~rows["sample_id"].isin(scene.samples["sample_id"])]
    assert len(given) > 0
    assert (given["perturbation"] == "control").all()
    scored = {row.tobytes() for row in scene.observed}
    assert not scored & {row.tobytes() for row in scene.reference}


def test_a_reference_is_a_control_of_the_same_study_and_context_where_there_is_one(cohort):
    rows, train = cohort.rows(["test_random"]), cohort.rows(["train"])
    chosen = train.iloc[choose_references(rows, train, cohort.declared, seed=3)]
    assert (chosen["perturbation"] == "control").all()
    place = [frame["study"] + frame["tissue"] + frame["cell_type"] for frame in (rows, chosen, train[train["perturbation"] == "control"])]
    possible = place[0].isin(place[2]).to_numpy()
    assert (place[0].to_numpy() == place[1].to_numpy())[possible].all()


def test_a_reference_matches_the_biology_too_where_it_can(cohort):
    train = cohort.rows(["train"]).reset_index(drop=True)
    control = train[train["perturbation"] == "control"].iloc[[0]]
    found = train.iloc[reference_lists(control, train, cohort.declared)[0]]
    assert control["sample_id"].iloc[0] in set(found["sample_id"])
    assert len(found[["sex", "age_years", "disease"]].astype(str).drop_duplicates()) == 1


def test_no_predictor_beats_the_ideal_on_any_split(scenes, predictions, params):
    for split, scene in scenes.items():
        scores = table(scene, predictions[split], params)
        errors = scores.xs("mse", level="metric")["value"]
        assert list(errors.sort_values().index[:2]) == ["oracle_omniscient", "oracle_metadata"], split
        assert scores.loc[("ridge", "skill"), "value"] == 0
        assert scores.loc[("oracle_metadata", "skill"), "value"] == 1


def test_skill_is_null_where_the_ideal_is_not_clearly_better_than_ridge(scenes, predictions, params):
    """A share of a gap that may be nothing says nothing, however large a number it gives."""
    said = predictions["test_random"]
    same = said | {"oracle_metadata": said["ridge"]}
    scores = table(scenes["test_random"], same, params)
    assert scores.loc[("gem", "skill"), "value"] is None or np.isnan(scores.loc[("gem", "skill"), "value"])
    assert "do not differ clearly" in scores.loc[("gem", "skill"), "reason"]
    assert table(scenes["test_random"], said, params).loc[("gem", "skill"), "reason"] == ""


def test_floors_are_floors(scenes, predictions, params):
    errors = table(scenes["test_random"], predictions["test_random"], params).xs("mse", level="metric")["value"]
    assert errors["oracle_metadata"] < errors["ridge"] < errors["training_mean"]
    assert errors["gem"] < errors["training_mean"]


def test_a_null_perturbation_scores_about_zero_in_delta_pearson(evaluation, scenes, cohort, params):
    """A perfect prediction of nothing: the controls of one side against controls of the other."""
    from pipeline.gem.metrics import delta_pearson

    controls = cohort.rows(["test_control"])
    expression = cohort.expression(["test_control"])
    rng = np.random.default_rng(0)
    values = []
    for _ in range(40):
        order = rng.permutation(len(controls))
        third = len(order) // 3
        observed, first, second = expression[order[:third]], expression[order[third : 2 * third]].mean(0), expression[order[2 * third : 3 * third]].mean(0)
        prediction = np.broadcast_to(expression.mean(0), observed.shape)
        values.append(
            delta_pearson(observed, prediction, np.broadcast_to(first, observed.shape), np.broadcast_to(second, observed.shape), np.zeros(third, dtype=int))[0]
        )
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values)) + 0.15


def test_scores_do_not_depend_on_the_order_of_samples(scenes, predictions, params):
    from dataclasses import fields, replace

    scene, said = scenes["test_combination"], predictions["test_combination"]
    order = np.random.default_rng(1).permutation(len(scene.samples))
    moved = {field.name: getattr(scene, field.name)[order] for field in fields(scene) if isinstance(getattr(scene, field.name), np.ndarray)}
    shuffled = replace(scene, samples=scene.samples.iloc[order], **moved)
    other = {name: replace(prediction, values=prediction.values[order]) for name, prediction in said.items()}
    pd.testing.assert_frame_equal(table(scene, said, params), table(shuffled, other, params), rtol=1e-6)


def test_better_is_said_only_where_the_paired_interval_is_clear_of_zero(scenes, predictions, params):
    differences = score_split(scenes["test_random"], predictions["test_random"], params.evaluate)[1].set_index(["predictor", "against"])
    assert set(differences.index) == set(COMPARISONS)
    same = differences.loc[("gem_tuned", "gem")]
    assert (same["value"], same["verdict"]) == (0, "no clear difference")
    for row in differences.itertuples():
        assert row.verdict == ("no clear difference" if row.low <= 0 <= row.high else "better" if row.low > 0 else "worse")


def test_differences_are_resampled_over_what_the_split_holds_out(scenes, predictions, params):
    """Conditions of one held-out perturbation share its error: as if they were independent, intervals would be too narrow."""
    for split, kind, column in (("test_perturbation", "perturbation", "perturbation"), ("test_study", "study", "study")):
        scene = scenes[split]
        differences = score_split(scene, predictions[split], params.evaluate)[1]
        assert set(differences["of"]) == {kind}
        assert set(differences["number"]) == {scene.samples[column].nunique()}
    assert score_split(scenes["test_random"], predictions["test_random"], params.evaluate)[1]["of"].unique().tolist() == ["condition"]


def test_one_treated_condition_has_a_delta_but_no_interval(scenes, predictions, params):
    from dataclasses import fields, replace

    scene, said = scenes["test_random"], predictions["test_random"]
    first = scene.condition == scene.condition[scene.treated][0]
    chosen = np.flatnonzero(first | ~scene.treated)
    moved = {field.name: getattr(scene, field.name)[chosen] for field in fields(scene) if isinstance(getattr(scene, field.name), np.ndarray)}
    moved["condition"] = pd.factorize(moved["condition"])[0]
    small = replace(scene, samples=scene.samples.iloc[chosen], **moved)
    scores = table(small, {"ridge": replace(said["ridge"], values=said["ridge"].values[chosen])}, params)
    row = scores.loc[("ridge", "delta_pearson")]
    assert np.isfinite(row["value"])
    assert (row["conditions"], row["reason"]) == (1, "one treated condition: no interval")
    assert row["low"] is None or np.isnan(row["low"])


def test_a_score_that_does_not_apply_is_null_with_a_reason(scenes, predictions, params):
    scores = table(scenes["test_random"], predictions["test_random"], params)
    assert np.isnan(scores.loc[("training_mean", "gene_pearson"), "value"] or np.nan)
    assert "constant" in scores.loc[("training_mean", "gene_pearson"), "reason"]
    assert scores["value"].isna().sum() == (scores["reason"].str.contains("[a-z]") & scores["value"].isna()).sum()


def test_without_controls_the_predictors_that_need_them_are_absent(cohort, params, gem, tmp_path):
    import shutil

    from pipeline.gem.cohort import Cohort

    shutil.copytree(cohort.folder, tmp_path / "cohort")
    plain = Cohort(tmp_path / "cohort")
    plain.declared = plain.declared.model_copy(update={"control": None})
    evaluation = Evaluation(plain, params.evaluate)
    predictors = evaluation.predictors({"gem": gem})
    assert "additive" not in predictors
    scene = next(evaluation.scenes())
    assert scene.reference is None
    scores = table(scene, {name: predict(scene) for name, predict in predictors.items()}, params)
    assert "no control" in scores.loc[("gem_reference", "mse"), "reason"]
    assert "controls" in scores.loc[("gem", "delta_pearson"), "reason"]
