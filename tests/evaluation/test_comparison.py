"""The tables of a split: scores, paired comparisons, and cohorts that lack something."""

import shutil

import numpy as np
import pandas as pd
import pytest
from support.comparison import SEEDS, SPLITS, rows_of

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.evaluation.catalogue import (
    BETTER,
    MODELS,
    PREDICTORS,
    SHARED_CONTROLS,
    UNCLEAR,
    WORSE,
)
from pipeline.gem.evaluation.comparison import (
    COMPARISONS,
    SCORE_COLUMNS,
    evaluate_split,
    nested_scores,
    sample_errors,
)
from pipeline.gem.evaluation.evaluation_split import EvaluationSplits
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.predictors import Predictors


@pytest.fixture(scope="module")
def results(evaluation) -> dict:
    return {name: evaluation.result(name) for name in SPLITS}


def assert_marked(result) -> None:
    """Every biased value, and no other, has its mark in every table and in metrics.json."""
    biased = {"delta_pearson", "discrimination", "de_direction", "de_jaccard"}
    reasons = result.scores.set_index(["predictor", "metric"])["reason"]
    assert result.conditions["biased"].all() and len(result.conditions)
    assert (result.seeds["biased"] == result.seeds["metric"].isin(biased)).all()
    (of_split,) = nested_scores(result.scores).values()
    for predictor, metrics in of_split.items():
        marks = {name.removesuffix("_biased") for name in metrics if name.endswith("_biased")}
        assert marks == {name for name in biased if metrics[name] is not None}
        assert all(metrics[f"{name}_biased"] == 1 for name in marks)
        assert all(SHARED_CONTROLS in reasons[predictor, name] for name in marks)
    assert "delta_pearson_biased" in of_split["gem"]


def assert_numbers_or_reasons(scores: pd.DataFrame) -> None:
    """Every row has a number with a finite interval, or null with a reason."""
    null = scores["value"].isna()
    assert (scores.loc[null, "reason"].str.len() > 0).all()
    assert scores.loc[null, ["low", "high"]].isna().all(axis=None)
    no_interval = ~null & scores["low"].isna()
    assert scores.loc[no_interval, "reason"].str.contains("no interval").all()
    complete = scores[~null & ~no_interval]
    assert np.isfinite(complete[["value", "low", "high"]].to_numpy(dtype=float)).all()
    assert (complete["low"] <= complete["high"]).all()
    assert (scores.loc[~null, "conditions"] > 0).all()


@pytest.mark.parametrize("name", SPLITS)
def test_every_predictor_has_every_metric_as_a_number_or_a_reason(results, name):
    scores = results[name].scores
    assert list(scores.columns) == SCORE_COLUMNS
    pairs = list(zip(scores["predictor"], scores["metric"], strict=True))
    assert pairs == [(predictor, metric) for predictor in PREDICTORS for metric in METRICS]
    assert_numbers_or_reasons(scores)


def test_nested_scores_have_the_same_numbers_and_null(results):
    scores = pd.concat([result.scores for result in results.values()])
    nested = nested_scores(scores)
    assert set(nested) == set(SPLITS)
    assert all(list(each) == list(METRICS) for split in nested.values() for each in split.values())
    for result in results.values():
        assert not result.conditions["biased"].any() and not result.seeds["biased"].any()
    for row in scores.itertuples():
        value = nested[row.split][row.predictor][row.metric]
        assert value is None if pd.isna(row.value) else value == row.value


def test_the_score_of_a_model_is_the_mean_of_its_seeds(results):
    for result in results.values():
        means = result.seeds.groupby(["predictor", "metric"])["value"].agg(["mean", "size"])
        scores = result.scores.dropna(subset=["value"]).set_index(["predictor", "metric"])["value"]
        assert {name for name, _ in means.index} == set(MODELS)
        for key, row in means.iterrows():
            assert row["size"] == len(SEEDS[key[0]])
            assert scores[key] == pytest.approx(row["mean"])


# --- paired comparisons ---


def test_models_are_compared_with_every_baseline_and_with_one_another(results):
    for result in results.values():
        assert set(result.comparisons["metric"]) == {"mse", "delta_pearson"}
        for _, rows in result.comparisons.groupby("metric"):
            pairs = zip(rows["predictor"], rows["against"], strict=True)
            assert set(pairs) == set(COMPARISONS)


@pytest.mark.parametrize("name", SPLITS)
def test_differences_of_mse_are_resampled_over_the_held_out_entities(evaluation, results, name):
    """Conditions of one held-out perturbation share its error; taking them as independent would
    give too narrow intervals."""
    split, predictions = evaluation.by_split[name]
    comparisons = results[name].comparisons.query("metric == 'mse'")
    kind, number = {
        "test_random": ("condition", split.condition.max() + 1),
        "test_combination": ("pair", len(set(split.pair))),
        "test_perturbation": ("perturbation", len(set(split.perturbation))),
        "test_study": ("study", len(set(split.study))),
    }[name]
    assert set(comparisons["of"]) == {kind} and set(comparisons["number"]) == {number}
    errors = {name: sample_errors(split, predictions[name]) for name in ("gem", "ridge")}
    difference = errors["ridge"] - errors["gem"]
    row = comparisons.set_index(["predictor", "against"]).loc[("gem", "ridge")]
    assert row["value"] == pytest.approx(difference.mean())
    if number == 1:
        assert np.isnan(row["low"]) and row["verdict"] == UNCLEAR
        return
    # Entities drawn with replacement, their samples pooled: the same quantiles up to noise.
    rng = np.random.default_rng(0)
    parts = [difference[split.entity == entity] for entity in range(number)]
    means = [
        np.concatenate([parts[entity] for entity in rng.integers(0, number, number)]).mean()
        for _ in range(2000)
    ]
    assert (row["low"], row["high"]) == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.35 * np.ptp(means)
    )


def test_delta_pearson_counts_a_condition_once_per_entity(evaluation, results):
    split, predictions = evaluation.by_split["test_study"]
    comparisons = results["test_study"].comparisons.query("metric == 'delta_pearson'")
    row = comparisons.set_index(["predictor", "against"]).loc[("gem_tuned", "ridge")]
    pairs = zip(split.entity[split.treated], split.condition[split.treated], strict=True)
    gains = []
    for entity, condition in sorted(set(pairs)):
        rows = (split.entity == entity) & (split.condition == condition) & split.treated
        observed = (split.observed - split.observed_control.mean)[rows].mean(axis=0)
        correlations = []
        for name in ("gem_tuned", "ridge"):
            change = predictions[name][0].values - split.predicted_control.mean
            correlations.append(np.corrcoef(observed, change[rows].mean(axis=0))[0, 1])
        gains.append(correlations[0] - correlations[1])
    assert row["value"] == pytest.approx(np.mean(gains))
    assert row["number"] == len(set(split.study))


def test_a_verdict_is_clear_only_if_the_paired_interval_excludes_zero(results):
    for result in results.values():
        for row in result.comparisons.itertuples():
            clear = np.isfinite(row.low) and not row.low <= 0 <= row.high
            expected = (BETTER if row.low > 0 else WORSE) if clear else UNCLEAR
            assert row.verdict == expected


def test_a_model_does_not_differ_from_itself(evaluation):
    predictions = evaluation.by_split["test_random"][1]
    result = evaluation.result("test_random", predictions | {"gem_tuned": predictions["gem"]})
    rows = result.comparisons.query("predictor == 'gem_tuned' and against == 'gem'")
    assert (rows["value"] == 0).all() and (rows["verdict"] == UNCLEAR).all()


# --- tables for figures ---


def test_the_table_of_conditions_averages_to_the_scores(evaluation, results):
    split, predictions = evaluation.by_split["test_study"]
    table = results["test_study"].conditions
    assert set(table["predictor"]) == {*MODELS, "ridge", "oracle_metadata"}
    scores = results["test_study"].scores.set_index(["predictor", "metric"])["value"]
    for name, rows in table.groupby("predictor"):
        assert rows["delta_pearson"].mean() == pytest.approx(scores[(name, "delta_pearson")])
        assert rows["samples"].sum() == split.treated.sum()
        error = sample_errors(split, predictions[name])[split.treated].mean()
        assert np.average(rows["mse"], weights=rows["samples"]) == pytest.approx(error)
        assert set(rows["condition"]) == set(split.condition_name[split.treated])


def test_the_table_of_calibration_has_the_shares_behind_the_score(results):
    result = results["test_random"]
    scores = result.scores.set_index(["predictor", "metric"])["value"]
    oracles = {"oracle_metadata", "oracle_reference", "oracle_omniscient"}
    assert set(result.calibration["predictor"]) == {*MODELS, *oracles}
    for name, rows in result.calibration.groupby("predictor"):
        assert list(rows["bin"]) == list(range(1, 11))
        assert rows["share"].sum() == pytest.approx(1)
        if len(SEEDS.get(name, [1])) == 1:
            deviation = (rows["share"] - 0.1).abs().sum()
            assert deviation == pytest.approx(scores[(name, "calibration")])


# --- cohorts that lack something ---


@pytest.mark.parametrize("missing", ["truth", "control", "study", "both", "hidden controls"])
def test_scores_that_a_cohort_cannot_have_are_null_with_a_reason(
    evaluation, tmp_path, missing, monkeypatch
):
    shutil.copytree(evaluation.cohort.folder, tmp_path / "cohort")
    if missing != "control":
        shutil.rmtree(tmp_path / "cohort" / "truth")
    cohort = Cohort(tmp_path / "cohort")
    columns = {"control": ["control"], "study": ["study_column"]}
    columns["both"] = columns["control"] + columns["study"]
    changes = dict.fromkeys(columns.get(missing, []))
    cohort.declared = cohort.declared.model_copy(update=changes)
    splits = EvaluationSplits(cohort, evaluation.params.evaluate)
    if missing == "hidden controls":
        monkeypatch.setattr(splits, "_hidden_controls", lambda _: None)
    predictors = Predictors(splits, {"gem": evaluation.models["gem"]})
    for name in ("test_random", "test_study"):
        split = splits.split(name)
        result = evaluate_split(
            split,
            predictors(split),
            {"gem": [1, 2], "gem_reference": [1, 2]},
            evaluation.axes,
            predictors.true_change,
            evaluation.params.evaluate,
        )
        assert_numbers_or_reasons(result.scores)
        scores = result.scores.set_index(["predictor", "metric"]).loc["gem"]
        assert np.isfinite(scores.loc["mse", "value"])
        if missing != "control":
            assert "truth" in scores.loc["skill", "reason"]
            assert result.error_decomposition.empty
        delta = scores.loc["delta_pearson"]
        if missing in ("truth", "study"):
            assert np.isfinite(delta["value"]) and not delta["reason"]
            continue
        if missing == "hidden controls":
            assert np.isfinite(delta["value"]) and delta["reason"] == SHARED_CONTROLS
            assert_marked(result)
        else:
            assert delta["reason"] == "no control of the same context"
        assert set(result.comparisons["metric"]) == {"mse"}


@pytest.mark.parametrize("subset", ["one condition", "one sample", "controls only"])
def test_a_split_of_very_few_samples_is_evaluated(evaluation, subset):
    split, predictions = evaluation.by_split["test_study"]
    treated = np.flatnonzero(split.treated)
    rows = {
        "one condition": np.flatnonzero(split.condition == split.condition[treated[0]]),
        "one sample": treated[:1],
        "controls only": np.flatnonzero(~split.treated),
    }[subset]
    part, part_predictions = rows_of(split, predictions, rows)
    result = evaluation.result("test_study", part_predictions, part)
    assert_numbers_or_reasons(result.scores)
    scores = result.scores.set_index(["predictor", "metric"])
    if subset == "controls only":
        assert scores.loc[("gem", "delta_pearson"), "reason"] == "no treated sample in this split"
        assert result.conditions.empty
    else:
        assert scores.loc[("gem", "mse"), "reason"] == "one condition: no interval"
        assert np.isfinite(scores.loc[("ridge", "delta_pearson"), "value"])
        assert len(result.conditions) == 6
    assert (result.comparisons["verdict"] == UNCLEAR).all()
