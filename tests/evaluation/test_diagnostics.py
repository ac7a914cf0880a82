"""Diagnostics: the right conditions and genes, and a latent table and maps that are as defined."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import balanced_accuracy_score
from support.comparison import SPLITS, rows_of, simple_split

from pipeline.gem.common.config import GROUPS
from pipeline.gem.data.labels import label_texts
from pipeline.gem.evaluation import diagnostics
from pipeline.gem.evaluation.diagnostics import (
    LATENT_COLUMNS,
    extreme_conditions,
    latent_maps,
    latent_table,
    spread_within_conditions,
)
from pipeline.gem.evaluation.evaluation_split import PredictedSplit
from pipeline.gem.model.calibration import calibration_error
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.network import Gaussian

# --- single conditions ---


@pytest.fixture(scope="module")
def tables(evaluation) -> dict[str, pd.DataFrame]:
    return {name: evaluation.result(name).conditions for name in SPLITS}


@pytest.mark.parametrize("name", SPLITS)
def test_extreme_conditions_have_the_numbers_of_the_table(evaluation, tables, name):
    conditions = extreme_conditions(*evaluation.by_split[name], tables[name])
    expected = tables[name].set_index(["predictor", "condition"])["delta_pearson"]
    for condition in conditions:
        for predictor in ("gem", "ridge"):
            value = condition.correlation[predictor]
            assert value == expected[predictor, condition.name]
            # The correlation of a mean over seeds is near the mean of the correlations.
            change = condition.predicted[predictor]
            assert np.corrcoef(condition.observed, change)[0, 1] == pytest.approx(value, abs=0.1)
    best, worst = (
        [condition.correlation["gem"] for condition in conditions if condition.best == side]
        for side in (True, False)
    )
    assert min(best) >= max(worst)
    assert 1 <= len(best) <= diagnostics.EXTREMES
    assert len({condition.name for condition in conditions}) == len(conditions)


def test_conditions_of_one_sample_are_taken_only_without_enough_others(evaluation, tables):
    table = tables["test_random"]
    conditions = extreme_conditions(*evaluation.by_split["test_random"], table)
    replicated = (table.query("predictor == 'gem'")["samples"] >= 2).sum()
    enough = replicated >= 2 * diagnostics.EXTREMES
    assert not enough or all(condition.samples >= 2 for condition in conditions)


def test_without_changes_there_are_no_conditions(evaluation, tables):
    table = tables["test_random"]
    for without in (table.assign(delta_pearson=np.nan), table.iloc[:0]):
        assert extreme_conditions(*evaluation.by_split["test_random"], without) == []


# --- spread ---


def test_spread_is_the_pooled_deviation_within_conditions_of_two_samples_or_more(rng):
    condition = np.repeat(np.arange(3), [4, 3, 1])
    observed = rng.normal(0, 1, (8, 5)) + 10 * condition[:, None]
    draw = rng.normal(0, 2, (8, 5)) - 10 * condition[:, None]
    predictions = {"gem": [PredictedSplit(draw, draw=draw)], "ridge": [PredictedSplit(draw)]}
    spread = spread_within_conditions(simple_split(observed, condition), predictions)
    assert spread.conditions == 2 and list(spread.predicted) == ["gem"]
    for values, deviation in ((observed, spread.observed), (draw, spread.predicted["gem"])):
        squares = 3 * values[:4].var(axis=0, ddof=1) + 2 * values[4:7].var(axis=0, ddof=1)
        assert deviation == pytest.approx(np.sqrt(squares / 5))


def test_without_replicates_or_draws_there_is_no_spread(rng):
    values = rng.normal(0, 1, (3, 5))
    single, together = (simple_split(values, index) for index in (np.arange(3), np.zeros(3, int)))
    assert spread_within_conditions(single, {"gem": [PredictedSplit(values, draw=values)]}) is None
    assert spread_within_conditions(together, {"gem": [PredictedSplit(values)]}) is None


def test_spread_does_not_depend_on_the_order_of_samples(evaluation, rng):
    split, predictions = evaluation.by_split["test_study"]
    first = spread_within_conditions(split, predictions)
    shuffled = rows_of(split, predictions, rng.permutation(len(split.samples)))
    second = spread_within_conditions(*shuffled)
    assert first.observed == pytest.approx(second.observed)
    assert first.predicted["gem"] == pytest.approx(second.predicted["gem"])


# --- latent maps ---


@pytest.fixture(scope="module")
def held_out(evaluation) -> tuple[pd.DataFrame, np.ndarray]:
    names = ["test_random", "test_perturbation", "test_study", "test_control"]
    return evaluation.cohort.rows(names), evaluation.cohort.expression(names)


@pytest.fixture(scope="module")
def gem(evaluation) -> TrainedGEM:
    return evaluation.models["gem"][0]


def test_every_latent_group_is_coloured_by_a_covariate_of_every_group(evaluation, gem, held_out):
    maps = latent_maps(gem, "gem", *held_out, evaluation.cohort.declared, 0)
    covariates = {"technical": "study", "biological": "tissue", "perturbation": "perturbation"}
    expected = [(group, owner, covariates[owner]) for group in GROUPS for owner in GROUPS]
    assert [
        (latent_map.group, latent_map.covariate_group, latent_map.covariate) for latent_map in maps
    ] == expected
    for latent_map in maps:
        assert latent_map.points.shape == (len(held_out[0]), 2) and 0 < latent_map.share <= 1 + 1e-9
        assert set(held_out[0][latent_map.covariate].to_numpy()[latent_map.level == 0]) == {
            latent_map.levels[0]
        }


def test_a_map_of_many_samples_has_some_of_them(evaluation, gem, held_out, monkeypatch):
    monkeypatch.setattr(diagnostics, "MAP_SAMPLES", 20)
    maps = latent_maps(gem, "gem", *held_out, evaluation.cohort.declared, 0)
    assert {(len(latent_map.points), len(latent_map.level)) for latent_map in maps} == {(20, 20)}


def test_levels_are_ordered_by_frequency_and_name_and_a_missing_value_has_none():
    levels, level = diagnostics._frequent_levels(pd.Series(["b", "a", "b", None, *"cdefg"]))
    assert levels == ("b", "a", "c", "d", "e")
    assert level.tolist() == [0, 1, 0, -1, 2, 3, 4, 5, 5]


def test_the_principal_plane_is_that_of_a_pca_with_a_fixed_sign(rng):
    latents = rng.normal(0, 1, (100, 4)) * [1, 5, 0.1, 3]
    points, share = diagnostics._principal_plane(latents)
    pca = PCA(2).fit(latents)
    np.testing.assert_allclose(np.abs(points), np.abs(pca.transform(latents)), atol=1e-8)
    assert share == pytest.approx(pca.explained_variance_ratio_.sum())
    assert diagnostics._principal_plane(latents[::-1])[0][::-1] == pytest.approx(points)
    points, share = diagnostics._principal_plane(np.zeros((5, 1)))
    assert points.shape == (5, 2) and share == 0


# --- the latent table ---


class GivenLatents(TrainedGEM):
    """A GEM whose posterior means are the given expression."""

    def posterior(self, expression: np.ndarray) -> Gaussian:
        return Gaussian(torch.from_numpy(expression).float(), torch.zeros(expression.shape))


def table_of(gem: TrainedGEM, samples: pd.DataFrame, latents: np.ndarray) -> pd.DataFrame:
    return latent_table(GivenLatents(**vars(gem)), "gem", samples, latents, 0)


@pytest.fixture(scope="module")
def table(gem, held_out) -> pd.DataFrame:
    return latent_table(gem, "gem", *held_out, 0)


def rows_of_measure(table: pd.DataFrame, measure: str, *index: str) -> pd.DataFrame:
    return table[table["measure"] == measure].set_index(list(index))


def test_probes_read_a_label_from_the_group_that_holds_it_and_noise_by_chance(gem, held_out, rng):
    samples = held_out[0]
    latents = rng.normal(0, 1, (len(samples), 12))
    codes, tissues = pd.factorize(samples["tissue"])
    start = gem.network.slices()["technical"].start
    latents[:, start : start + len(tissues)] = np.eye(len(tissues))[codes]
    probes = rows_of_measure(table_of(gem, samples, latents), "probe", "group", "covariate")
    assert probes.loc[("technical", "tissue"), "value"] == 1
    assert probes.loc[("technical", "tissue"), "covariate_group"] == "biological"
    for group in ("biological", "perturbation"):
        probe, chance = probes.loc[(group, "tissue")], 1 / len(tissues)
        assert probe["value"] == pytest.approx(chance, abs=0.15) and probe["chance"] == chance
    noise = probes[probes.index.get_level_values("group") != "technical"]
    assert abs((noise["value"] - noise["chance"]).dropna().mean()) < 0.08


def test_every_label_covariate_is_probed_in_every_group(evaluation, table):
    probes = rows_of_measure(table, "probe", "group", "covariate")
    labels = [
        name
        for name, covariate in evaluation.cohort.declared.covariates.all().items()
        if covariate.kind in ("categorical", "embedding")
    ]
    assert set(probes.index) == {(group, name) for group in GROUPS for name in labels}
    assert (probes["value"].notna() | (probes["reason"].str.len() > 0)).all()


def test_heads_are_scored_on_samples_with_a_label_that_training_has(gem, table, held_out):
    samples, expression = held_out
    accuracy = rows_of_measure(table, "accuracy", "covariate")
    with torch.no_grad():
        logits = gem.network.classify(gem.posterior(expression).mean)
    assert set(accuracy.index) == set(logits)
    for head in gem.metadata.heads():
        row, levels = accuracy.loc[head.name], np.array(head.levels)
        texts = label_texts(samples[head.name])
        labelled = texts.isin(levels).to_numpy()
        if not labelled.any():
            assert pd.isna(row["value"]) and row["reason"]
            continue
        truth = texts[labelled].to_numpy(dtype=str)
        predicted = levels[logits[head.name].argmax(dim=1).numpy()][labelled]
        recalls = [np.mean(predicted[truth == label] == label) for label in set(truth)]
        assert row["value"] == pytest.approx(np.mean(recalls))
        assert row["chance"] == pytest.approx(1 / len(set(truth)))
        if set(predicted) <= set(truth):
            assert row["value"] == pytest.approx(balanced_accuracy_score(truth, predicted))


def test_the_calibration_error_of_a_head_is_of_its_calibrated_probabilities(gem, table, held_out):
    samples, expression = held_out
    errors = rows_of_measure(table, "calibration_error", "covariate")["value"]
    probabilities = gem.probabilities(gem.posterior(expression).mean)
    labels = gem.metadata.labels(samples)
    assert set(errors.index) == set(probabilities)
    for name, value in errors.dropna().items():
        assert value == calibration_error(probabilities[name], labels[name])
        assert 0 <= value <= 1


def test_units_of_small_variance_are_not_active(gem, held_out, rng):
    latents = rng.normal(0, 1, (len(held_out[0]), 12))
    latents[:, 1:4] = 0.3 + 0.05 * latents[:, 1:4]  # of the technical group: variance 0.0025
    active = rows_of_measure(table_of(gem, held_out[0], latents), "active_units", "group")["value"]
    assert dict(active) == {"technical": 1, "biological": 4, "perturbation": 4}


def test_a_covariate_without_labels_is_null_with_a_reason(gem, held_out, rng):
    samples = held_out[0].assign(tissue=None)
    table = table_of(gem, samples, rng.normal(0, 1, (len(samples), 12)))
    assert list(table.columns) == LATENT_COLUMNS
    rows = table[table["covariate"] == "tissue"]
    assert len(rows) >= 3
    assert rows["value"].isna().all() and rows["reason"].str.len().gt(0).all()
