"""Differences, ranks, wins and losses against numbers made by hand."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.cohorts.figure import draw
from benchmarks.cohorts.table import Comparison, markdown, paired, verdict

# Cohort to predictor to (mse of two folds, correlation of two folds).
FOLDS = {
    "one": {
        "no_change": ((4.0, 6.0), (None, None)),
        "ridge": ((2.0, 2.0), (0.5, 0.7)),
        "gem": ((1.0, 2.0), (0.8, 0.6)),
        "gem_reference": ((3.0, 3.0), (0.4, 0.4)),
        "half": ((0.5, 0.5), (0.9, 0.9)),
    },
    "two": {
        "no_change": ((1.0, 1.0), (None, None)),
        "ridge": ((2.0, 2.0), (0.3, 0.3)),
        "gem": ((1.0, 1.02), (0.2, 0.2)),
        "gem_reference": ((0.9, 0.9), (0.4, 0.4)),
    },
}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    rows = [
        {"cohort": cohort, "fold": fold, "scale": "means", "predictor": name}
        | {"mse": mse[fold], "pearson": pearson[fold], "calibration": 0.1}
        for cohort, predictors in FOLDS.items()
        for name, (mse, pearson) in predictors.items()
        for fold in range(2)
    ]
    sums = [
        {"cohort": "two", "fold": fold, "scale": "sums", "predictor": name, "mse": mse}
        for name, mse in (("ridge", 1.0), ("gem", 9.0))
        for fold in range(2)
    ]
    return Comparison.of(pd.DataFrame(rows + sums), {"one": "means", "two": "means"}, seed=0)


def row(comparison: Comparison, **values) -> pd.Series:
    table = comparison.differences
    for name, value in values.items():
        table = table[table[name] == value]
    (found,) = table.to_dict("records")
    return found


def test_gem_is_compared_with_the_best_simple_predictor_of_the_cohort(comparison):
    one = row(comparison, cohort="one", predictor="gem", score="mse")
    assert (one["against"], one["value"], one["best"]) == ("ridge", 1.5, 2.0)
    assert one["difference"] == -0.5 and one["ratio"] == 0.75 and one["verdict"] == "win"
    two = row(comparison, cohort="two", predictor="gem", score="mse", scale="means")
    assert (two["against"], two["verdict"]) == ("no_change", "near")
    pearson = row(comparison, cohort="two", predictor="gem", score="pearson")
    assert (pearson["against"], pearson["verdict"]) == ("ridge", "loss")


def test_a_scale_that_does_not_count_is_scored_but_neither_ranked_nor_counted(comparison):
    assert not row(comparison, cohort="two", scale="sums", score="mse")["counts"]
    wins = markdown(comparison).split("\n\n")[-1]
    assert f"| gem | mse | x {np.sqrt(0.75 * 1.01):.2f} | 1 | 1 | 0 |" in wins
    assert "| gem | pearson | +0.000 | 1 | 0 | 1 |" in wins
    assert "(two, sums)" in markdown(comparison)


def test_ranks_are_means_over_cohorts_and_no_effect_is_last(comparison):
    ranks = comparison.ranks.set_index("predictor")
    assert ranks["mse"].to_dict() == {
        "no_change": (4 + 2) / 2,
        "ridge": (2 + 4) / 2,
        "gem": (1 + 3) / 2,
        "gem_reference": (3 + 1) / 2,
    }
    assert ranks.loc["no_change", "pearson"] == 4


def test_the_interval_is_of_paired_folds():
    """All folds shift together: the difference has no spread, whatever that of the folds."""
    other = np.arange(1.0, 21.0)
    values = paired(other - 0.5, other, seed=0)
    assert values["difference"] == pytest.approx(-0.5)
    assert values["low"] == pytest.approx(-0.5) and values["high"] == pytest.approx(-0.5)
    assert values["ratio_low"] < values["ratio"] < values["ratio_high"] < 1


def test_the_interval_is_that_of_the_normal_approximation_for_many_folds():
    own = np.random.default_rng(0).normal(size=400)
    values = paired(own, np.zeros(400), seed=0)
    half = 1.96 * own.std() / 20
    assert values["low"] == pytest.approx(own.mean() - half, abs=0.02)
    assert values["high"] == pytest.approx(own.mean() + half, abs=0.02)


def test_folds_without_a_score_on_a_side_are_left_out():
    values = paired(np.array([1.0, np.nan, 3.0]), np.array([2.0, 2.0, np.nan]), seed=0)
    assert (values["value"], values["best"], values["folds"]) == (1.0, 2.0, 1)
    assert values["low"] is None


@pytest.mark.parametrize(
    ("score", "difference", "ratio", "expected"),
    [
        ("mse", -0.1, 0.9, "win"),
        ("mse", 0.1, 1.02, "near"),
        ("mse", 0.1, 1.03, "loss"),
        ("pearson", 0.1, 1.1, "win"),
        ("pearson", -0.1, 0.99, "loss"),
    ],
)
def test_a_verdict_knows_which_direction_is_better(score, difference, ratio, expected):
    assert verdict(score, {"difference": difference, "ratio": ratio}) == expected


def test_the_figure_is_drawn_with_a_missing_ceiling_and_correlation(comparison, tmp_path):
    draw(comparison, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
