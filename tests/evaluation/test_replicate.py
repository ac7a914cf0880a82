"""The replicate against its definition by plain loops: who may speak for whom, and that nobody gains by it."""

import numpy as np
import pandas as pd
import pytest
from support.comparison import made_scene, rows_of, scores, world_of

from pipeline.gem.common.config import Data
from pipeline.gem.evaluation.predictors import Prediction
from pipeline.gem.evaluation.replicate import replicate


@pytest.fixture(scope="module")
def data(dosed) -> Data:
    return dosed


@pytest.fixture(scope="module")
def samples() -> pd.DataFrame:
    """Conditions of many sizes, some studies with one sample of a condition, some samples of unknown study, one condition of one sample."""
    rng = np.random.default_rng(0)
    number = 150
    made = pd.DataFrame(
        {
            "sample_id": [f"s{index:03d}" for index in rng.permutation(number)],
            "study": rng.choice(["a", "b", "c", "d", "e", None], number),
            "tissue": rng.choice(["liver", "lung", None], number),
            "perturbation": rng.choice(["control", "x", "y"], number),
        }
    )
    made["perturbation_dose"] = np.where(
        made["perturbation"] == "x", rng.choice(["1 uM", "10 uM"], number), None
    )
    made.loc[0, "perturbation"] = "alone"
    return made


@pytest.fixture(scope="module")
def groups(samples) -> list[set[int]]:
    """By sample, itself among them: the samples of its condition and study; where it is alone there, those of its condition that are too."""
    rows = [
        tuple("?" if pd.isna(value) else value for value in row)
        for row in samples[["tissue", "perturbation", "perturbation_dose", "study"]].to_numpy()
    ]

    def mates(row: int) -> set[int]:
        return (
            {row}
            if rows[row][3] == "?"
            else {other for other in range(len(rows)) if rows[other] == rows[row]}
        )

    alone = {row for row in range(len(rows)) if len(mates(row)) == 1}
    return [
        {other for other in alone if rows[other][:3] == rows[row][:3]}
        if row in alone
        else mates(row)
        for row in range(len(rows))
    ]


def indicators(samples: pd.DataFrame) -> np.ndarray:
    """One gene per sample, 1 in it alone: a mean shows who contributed, and how much."""
    return np.eye(len(samples), dtype=np.float32)


def test_half_of_each_group_is_spoken_for_by_the_mean_of_the_other_half(data, samples, groups):
    predicted, _ = replicate(samples, indicators(samples), data, 1)
    spoken_for = set(np.flatnonzero(~np.isnan(predicted[:, 0])))
    for group in groups:
        heard = group & spoken_for
        assert len(heard) == len(group) // 2
        for row in heard:
            assert set(np.flatnonzero(predicted[row])) == group - heard
            np.testing.assert_allclose(
                predicted[row, sorted(group - heard)], 1 / len(group - heard)
            )


def test_nobody_who_is_spoken_for_speaks(data, samples):
    for seed in range(5):
        for said in replicate(samples, indicators(samples), data, seed):
            spoken_for = ~np.isnan(said[:, 0])
            assert not (spoken_for & (said[spoken_for] > 0).any(axis=0)).any()


def test_the_drawn_sample_is_one_of_those_that_speak_and_each_is_drawn_once_at_most(data, samples):
    predicted, drawn = replicate(samples, indicators(samples), data, 3)
    known = ~np.isnan(predicted[:, 0])
    np.testing.assert_array_equal(np.isnan(drawn[:, 0]), ~known)
    np.testing.assert_array_equal(drawn[known].sum(axis=1), 1)
    assert (predicted[known][drawn[known] == 1] > 0).all()
    assert drawn[known].sum(axis=0).max() == 1


def test_every_other_sample_of_a_condition_speaks_under_some_seed(data):
    four = pd.DataFrame(
        {
            "sample_id": list("abcd"),
            "study": "a",
            "tissue": "lung",
            "perturbation": "x",
            "perturbation_dose": None,
        }
    )
    said = [replicate(four, indicators(four), data, seed)[1] for seed in range(60)]
    for row in range(4):
        assert {int(np.argmax(drawn[row])) for drawn in said if not np.isnan(drawn[row, 0])} == {
            0,
            1,
            2,
            3,
        } - {row}


def test_of_two_samples_of_different_studies_one_speaks_for_the_other(data):
    two = pd.DataFrame(
        {
            "sample_id": ["s", "t"],
            "study": ["a", "b"],
            "tissue": "lung",
            "perturbation": "x",
            "perturbation_dose": "1 uM",
        }
    )
    expression = np.array([[1.0, 2.0], [3.0, 5.0]])
    for said in replicate(two, expression, data, 0):
        row = int(np.isnan(said[0, 0]))
        np.testing.assert_array_equal(said[row], expression[1 - row])
        assert np.isnan(said[1 - row]).all()


def test_another_dose_or_context_is_no_replicate(data):
    rows = [
        ("s", "a", "lung", "x", "1 uM"),
        ("t", "a", "lung", "x", "10 uM"),
        ("u", "a", "liver", "x", "1 uM"),
    ]
    table = pd.DataFrame(
        rows, columns=["sample_id", "study", "tissue", "perturbation", "perturbation_dose"]
    )
    for said in replicate(table, indicators(table), data, 0):
        assert np.isnan(said).all()


def test_the_same_seed_gives_the_same_halves_whatever_the_order_of_rows_and_another_seed_others(
    data, samples, rng
):
    expression = rng.normal(size=(len(samples), 3)).astype(np.float32)
    order = rng.permutation(len(samples))
    first, shuffled = (
        replicate(samples, expression, data, 4),
        replicate(samples.iloc[order], expression[order], data, 4),
    )
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
    assert 0.4 < (~np.isnan(predicted[:, :1])).mean() <= 0.5 if len(samples) else True
    np.testing.assert_array_equal(np.diag(predicted)[~np.isnan(np.diag(predicted))], 0)


# --- what it scores ---------------------------------------------------------------------------------------------------


def nothing_happens(
    rng: np.random.Generator, data: Data, conditions: int = 60, replicates: int = 8, genes: int = 50
):
    """A scene of perturbations without effect, and its replicate."""
    condition = np.repeat(np.arange(conditions), replicates)
    level = rng.normal(5, 2, genes)
    observed, control = (
        level + rng.normal(0, 0.5, (number, genes)) for number in (len(condition), 80)
    )
    names = [f"s{row:04d}" for row in range(len(condition))]
    samples = pd.DataFrame(
        {"sample_id": names, "study": "a", "tissue": "lung", "perturbation": condition.astype(str)}
    )
    mean, drawn = replicate(samples, observed, data, 0)
    return made_scene(observed, condition, control), Prediction(
        mean, drawn=drawn, uses_study_controls=True
    )


def test_the_replicate_of_a_perturbation_without_effect_scores_about_nothing(data, rng):
    scene, prediction = nothing_happens(rng, data)
    found = scores(scene, prediction)
    assert found["delta_pearson"].conditions == 60
    assert found["delta_pearson"].low < 0.05 and abs(found["delta_pearson"].value) < 0.1
    assert found["discrimination"].value == pytest.approx(0.5, abs=0.1)
    assert found["e_distance"].value == pytest.approx(0, abs=0.15)
    assert found["mse"].value == pytest.approx(0.25 * (1 + 1 / 4), rel=0.03)


def test_halves_that_spoke_for_each_other_would_score_nearly_one_on_nothing(data, rng):
    """The trap that the one-sided replicate avoids: predictions and observations of a condition would have the same mean."""
    scene, _ = nothing_happens(rng, data)
    half = np.arange(len(scene.condition)) % 2
    means = np.stack(
        [
            scene.observed[scene.condition == index][half[scene.condition == index] == side].mean(
                axis=0
            )
            for index in range(60)
            for side in (0, 1)
        ]
    )
    both = Prediction(means[2 * scene.condition + 1 - half], uses_study_controls=True)
    assert scores(scene, both)["delta_pearson"].value > 0.6


def test_the_replicate_is_not_above_the_omniscient_oracle_on_the_same_samples(cohort, params):
    world = world_of(cohort, params)
    gains = {"delta_pearson": [], "mse": [], "discrimination": []}
    for scene, said in world.by_split.values():
        rows = np.flatnonzero(~np.isnan(said["replicate"][0].values[:, 0]))
        part, spoken = rows_of(scene, said, rows)
        for metric, sign in (("delta_pearson", 1), ("mse", -1), ("discrimination", 1)):
            pair = [
                scores(part, spoken[name][0])[metric].value
                for name in ("oracle_omniscient", "replicate")
            ]
            gains[metric].append(sign * (pair[0] - pair[1]))
    assert min(gains["mse"]) > 0
    assert np.mean(gains["delta_pearson"]) > 0 and min(gains["delta_pearson"]) > -0.1
    assert np.mean(gains["discrimination"]) > -0.02
