"""The replicate against its definition by plain loops, and its scores."""

import numpy as np
import pandas as pd
import pytest
from support.comparison import SPLITS, rows_of, scores, simple_split

from pipeline.gem.common.config import Data
from pipeline.gem.evaluation.baselines.simple import replicate
from pipeline.gem.evaluation.evaluation_split import PredictedSplit

CONDITION = ["tissue", "perturbation", "perturbation_dose"]


@pytest.fixture(scope="module")
def data(dosed) -> Data:
    return dosed


@pytest.fixture(scope="module")
def samples() -> pd.DataFrame:
    """Conditions of many sizes; some studies with one sample of a condition, some samples of
    unknown study, one condition of one sample."""
    rng, number = np.random.default_rng(0), 150
    samples = pd.DataFrame(
        {
            "sample_id": [f"s{index:03d}" for index in rng.permutation(number)],
            "study": rng.choice(["a", "b", "c", "d", "e", None], number),
            "tissue": rng.choice(["liver", "lung", None], number),
            "perturbation": rng.choice(["control", "x", "y"], number),
        }
    )
    dose = np.where(samples["perturbation"] == "x", rng.choice(["1 uM", "10 uM"], number), None)
    samples.loc[0, "perturbation"] = "single"
    return samples.assign(perturbation_dose=dose)


@pytest.fixture(scope="module")
def groups(samples) -> list[set[int]]:
    """For each sample the samples of its condition and study; if it is the only one, those of its
    condition that are the only ones of theirs."""
    rows = [tuple(row) for row in samples[[*CONDITION, "study"]].fillna("?").to_numpy()]
    numbers = range(len(rows))

    def of_study(row: int) -> set[int]:
        if rows[row][3] == "?":
            return {row}
        return {other for other in numbers if rows[other] == rows[row]}

    single = {row for row in numbers if len(of_study(row)) == 1}
    return [
        {other for other in single if rows[other][:3] == rows[row][:3]}
        if row in single
        else of_study(row)
        for row in numbers
    ]


def indicators(samples: pd.DataFrame) -> np.ndarray:
    """One gene per sample, 1 in that sample alone: a mean shows which samples it is of."""
    return np.eye(len(samples), dtype=np.float32)


def table(**columns) -> pd.DataFrame:
    defaults = {"study": "a", "tissue": "lung", "perturbation": "x", "perturbation_dose": "1 uM"}
    return pd.DataFrame(columns).assign(
        **{name: value for name, value in defaults.items() if name not in columns}
    )


# --- the halves ---


def test_half_of_each_group_is_predicted_by_the_mean_of_the_other_half(data, samples, groups):
    mean, _ = replicate(samples, indicators(samples), data, 1)
    targets = set(np.flatnonzero(~np.isnan(mean[:, 0])))
    for group in groups:
        assert len(group & targets) == len(group) // 2
        predictors = sorted(group - targets)
        for row in group & targets:
            assert list(np.flatnonzero(mean[row])) == predictors
            np.testing.assert_allclose(mean[row, predictors], 1 / len(predictors))


@pytest.mark.parametrize("seed", range(5))
def test_no_target_predicts_another_target(data, samples, seed):
    for values in replicate(samples, indicators(samples), data, seed):
        targets = ~np.isnan(values[:, 0])
        assert not (values[targets][:, targets] > 0).any()


def test_the_draw_is_a_sample_of_the_predictor_half_and_of_one_target_at_most(data, samples):
    mean, draw = replicate(samples, indicators(samples), data, 3)
    targets = ~np.isnan(mean[:, 0])
    np.testing.assert_array_equal(np.isnan(draw[:, 0]), ~targets)
    np.testing.assert_array_equal(draw[targets].sum(axis=1), 1)
    assert (mean[targets][draw[targets] == 1] > 0).all()
    assert draw[targets].sum(axis=0).max() == 1


def test_every_other_sample_of_a_condition_is_the_draw_under_some_seed(data):
    four = table(sample_id=list("abcd"))
    draws = [replicate(four, indicators(four), data, seed)[1] for seed in range(60)]
    for row in range(4):
        drawn = {int(np.argmax(draw[row])) for draw in draws if not np.isnan(draw[row, 0])}
        assert drawn == {0, 1, 2, 3} - {row}


def test_of_two_samples_of_different_studies_one_predicts_the_other(data):
    two, expression = table(sample_id=["s", "t"], study=["a", "b"]), np.array([[1.0, 2], [3, 5]])
    for values in replicate(two, expression, data, 0):
        target = int(np.isnan(values[0, 0]))
        np.testing.assert_array_equal(values[target], expression[1 - target])
        assert np.isnan(values[1 - target]).all()


def test_another_dose_or_context_is_no_replicate(data):
    three = table(
        sample_id=list("stu"),
        tissue=["lung", "lung", "liver"],
        perturbation_dose=["1 uM", "10 uM", "1 uM"],
    )
    assert np.isnan(replicate(three, indicators(three), data, 0)).all()


def test_halves_depend_on_the_seed_and_not_on_the_order_of_rows(data, samples, rng):
    expression = rng.normal(size=(len(samples), 3)).astype(np.float32)
    order = rng.permutation(len(samples))
    first = np.stack(replicate(samples, expression, data, 4))
    shuffled = replicate(samples.iloc[order], expression[order], data, 4)
    np.testing.assert_array_equal(shuffled, first[:, order])
    other = np.stack(replicate(samples, expression, data, 5))
    assert not np.array_equal(first, other, equal_nan=True)


@pytest.mark.parametrize("case", ["no study", "no dose", "no context columns", "no samples"])
def test_unusual_cohorts_have_replicates(data, samples, case):
    if case == "no study":
        data = data.model_copy(update={"study_column": None})
    if case == "no dose":
        samples = samples.drop(columns="perturbation_dose")
    if case == "no context columns":
        data = data.model_copy(update={"context_columns": ()})
    if case == "no samples":
        samples = samples.iloc[:0]
    mean, draw = replicate(samples, indicators(samples), data, 0)
    assert mean.shape == draw.shape == (len(samples), len(samples))
    assert 0.4 * len(samples) <= (~np.isnan(mean[:, :1])).sum() <= 0.5 * len(samples)
    assert not np.nansum(np.diag(mean))


# --- scores ---

REPLICATES = 8


@pytest.fixture
def no_effect(rng):
    """A split of 60 perturbations without effect."""
    condition, level = np.repeat(np.arange(60), REPLICATES), rng.normal(5, 2, 50)
    observed = level + rng.normal(0, 0.5, (len(condition), 50))
    return simple_split(observed, condition, level + rng.normal(0, 0.5, (80, 50)))


def test_the_replicate_of_a_perturbation_without_effect_has_no_signal(data, no_effect):
    columns = {"study": "a", "tissue": "lung", "perturbation": no_effect.condition.astype(str)}
    samples = no_effect.samples.assign(**columns)
    mean, draw = replicate(samples, no_effect.observed, data, 0)
    result = scores(no_effect, PredictedSplit(mean, draw=draw, uses_study_controls=True))
    assert result["delta_pearson"].conditions == 60
    assert result["delta_pearson"].low < 0.05 and abs(result["delta_pearson"].value) < 0.1
    assert result["discrimination"].value == pytest.approx(0.5, abs=0.1)
    assert result["e_distance"].value == pytest.approx(0, abs=0.15)
    assert result["mse"].value == pytest.approx(0.25 * (1 + 1 / 4), rel=0.03)


def test_halves_that_predict_each_other_would_have_a_signal_without_effect(no_effect):
    """The trap that the one-sided replicate avoids: predictions and observations of a condition
    would have the same mean."""
    halves = no_effect.observed.reshape(60, REPLICATES // 2, 2, 50)
    other_half = np.broadcast_to(halves.mean(axis=1, keepdims=True)[:, :, ::-1], halves.shape)
    both = PredictedSplit(other_half.reshape(-1, 50), uses_study_controls=True)
    assert scores(no_effect, both)["delta_pearson"].value > 0.6


def test_the_replicate_is_not_above_the_omniscient_oracle_on_the_same_samples(evaluation):
    gains = {"delta_pearson": [], "mse": [], "discrimination": []}
    for name in SPLITS:
        split, predictions = evaluation.by_split[name]
        rows = np.flatnonzero(~np.isnan(predictions["replicate"][0].values[:, 0]))
        part, predictions = rows_of(split, predictions, rows)
        oracle, own = (
            scores(part, predictions[predictor][0])
            for predictor in ("oracle_omniscient", "replicate")
        )
        for metric, values in gains.items():
            values.append(oracle[metric].value - own[metric].value)
    assert max(gains["mse"]) < 0
    assert np.mean(gains["delta_pearson"]) > 0 and min(gains["delta_pearson"]) > -0.1
    assert np.mean(gains["discrimination"]) > -0.02
