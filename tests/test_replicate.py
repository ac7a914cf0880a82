"""The replicate against its definition by plain loops: who may speak for whom."""

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.config import Covariates, Data
from pipeline.gem.replicate import replicate


@pytest.fixture(scope="module")
def data(params) -> Data:
    covariates = {
        "technical": {"study": {"kind": "categorical"}},
        "biological": {"tissue": {"kind": "categorical"}},
        "perturbation": {"perturbation": {"kind": "categorical"}, "perturbation_dose": {"kind": "numeric", "scale": "log"}},
    }
    return params.data.model_copy(update={"covariates": Covariates.model_validate(covariates), "context_columns": ("tissue",)})


@pytest.fixture(scope="module")
def samples() -> pd.DataFrame:
    """Conditions of many sizes, some studies with one sample of a condition, some samples of unknown study, one condition of one sample."""
    rng = np.random.default_rng(0)
    number = 150
    made = pd.DataFrame({
        "sample_id": [f"s{index:03d}" for index in rng.permutation(number)],
        "study": rng.choice(["a", "b", "c", "d", "e", None], number),
        "tissue": rng.choice(["liver", "lung", None], number),
        "perturbation": rng.choice(["control", "x", "y"], number),
    })
    made["perturbation_dose"] = np.where(made["perturbation"] == "x", rng.choice(["1 uM", "10 uM"], number), None)
    made.loc[0, "perturbation"] = "alone"
    return made


def indicators(samples: pd.DataFrame) -> np.ndarray:
    """One gene per sample, 1 in it alone: a mean shows who contributed, and how much."""
    return np.eye(len(samples), dtype=np.float32)


@pytest.fixture(scope="module")
def allowed(samples) -> list[set[int]]:
    """Per sample all that it is a replicate of or with, itself among them: of its study if that has two, else of every study."""
    rows = [tuple("?" if pd.isna(value) else value for value in row) for row in samples[["tissue", "perturbation", "perturbation_dose", "study"]].to_numpy()]
    groups = []
    for row in rows:
        same = {index for index, other in enumerate(rows) if other[:3] == row[:3]}
        within = {index for index in same if row[3] != "?" and rows[index][3] == row[3]}
        groups.append(within if len(within) > 1 else same)
    return groups


def test_a_sample_never_contributes_to_its_own_prediction(data, samples):
    for seed in range(5):
        for said in replicate(samples, indicators(samples), data, seed):
            assert (np.diag(said)[~np.isnan(said[:, 0])] == 0).all()


def test_the_prediction_is_the_mean_of_a_half_of_the_condition_within_the_study_where_that_has_two(data, samples, allowed):
    predicted, _ = replicate(samples, indicators(samples), data, 1)
    for row in range(len(samples)):
        group = allowed[row]
        if len(group) < 2:
            assert np.isnan(predicted[row]).all()
            continue
        others = np.flatnonzero(predicted[row])
        assert set(others) <= group - {row}
        assert len(others) in (len(group) // 2, -(-len(group) // 2))
        np.testing.assert_allclose(predicted[row, others], 1 / len(others))


def test_the_two_halves_of_a_condition_within_a_study_are_disjoint_and_speak_for_each_other(data, samples, allowed):
    predicted, _ = replicate(samples, indicators(samples), data, 2)
    for row in range(len(samples)):
        group = allowed[row]
        if len(group) > 1 and all(allowed[other] == group for other in group):
            other_half = set(np.flatnonzero(predicted[row]))
            own_half = group - other_half
            for member in own_half:
                assert set(np.flatnonzero(predicted[member])) == other_half
            for member in other_half:
                assert set(np.flatnonzero(predicted[member])) == own_half


def test_the_drawn_sample_is_one_of_the_other_half(data, samples):
    expression = indicators(samples)
    predicted, drawn = replicate(samples, expression, data, 3)
    known = ~np.isnan(predicted[:, 0])
    np.testing.assert_array_equal(np.isnan(drawn[:, 0]), ~known)
    np.testing.assert_array_equal(drawn[known].sum(axis=1), 1)
    assert (predicted[known][drawn[known] == 1] > 0).all()


def test_every_other_sample_of_a_condition_is_drawn_by_some_seed(data):
    four = pd.DataFrame({"sample_id": list("abcd"), "study": "a", "tissue": "lung", "perturbation": "x", "perturbation_dose": None})
    drawn = {tuple(np.argmax(replicate(four, indicators(four), data, seed)[1], axis=1)) for seed in range(60)}
    for row in range(4):
        assert {draw[row] for draw in drawn} == {0, 1, 2, 3} - {row}


def test_two_samples_predict_each_other_over_studies_too(data):
    two = pd.DataFrame({"sample_id": ["s", "t"], "study": ["a", "b"], "tissue": "lung", "perturbation": "x", "perturbation_dose": "1 uM"})
    expression = np.array([[1.0, 2.0], [3.0, 5.0]])
    for said in replicate(two, expression, data, 0):
        np.testing.assert_array_equal(said, expression[::-1])


def test_another_dose_or_context_is_no_replicate(data):
    rows = [("s", "a", "lung", "x", "1 uM"), ("t", "a", "lung", "x", "10 uM"), ("u", "a", "liver", "x", "1 uM")]
    table = pd.DataFrame(rows, columns=["sample_id", "study", "tissue", "perturbation", "perturbation_dose"])
    for said in replicate(table, indicators(table), data, 0):
        assert np.isnan(said).all()


def test_the_same_seed_gives_the_same_halves_whatever_the_order_of_rows_and_another_seed_others(data, samples, rng):
    expression = rng.normal(size=(len(samples), 3)).astype(np.float32)
    order = rng.permutation(len(samples))
    first, shuffled = replicate(samples, expression, data, 4), replicate(samples.iloc[order], expression[order], data, 4)
    for one, other in zip(first, shuffled, strict=True):
        np.testing.assert_array_equal(other, one[order])
    assert not np.array_equal(first[0], replicate(samples, expression, data, 5)[0], equal_nan=True)


@pytest.mark.parametrize("kind", ["no study", "no dose", "no context columns", "no samples"])
def test_odd_cohorts_have_replicates(data, samples, kind):
    if kind == "no study":
        data = data.model_copy(update={"study_column": None})
    if kind == "no dose":
        samples = samples.drop(columns="perturbation_dose")
    if kind == "no context columns":
        data = data.model_copy(update={"context_columns": ()})
    if kind == "no samples":
        samples = samples.iloc[:0]
    predicted, drawn = replicate(samples, indicators(samples), data, 0)
    assert predicted.shape == drawn.shape == (len(samples), len(samples))
    assert np.isnan(predicted[:, :1]).mean() < 0.1 if len(samples) else True
    np.testing.assert_array_equal(np.diag(predicted)[~np.isnan(np.diag(predicted))], 0)
