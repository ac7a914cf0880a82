"""The terminal's table: from floor to ceiling, the right direction of every metric, a line per model."""

import pandas as pd
import pytest

from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.report import console


def shown(capsys, scores: pd.DataFrame, comparisons: pd.DataFrame) -> str:
    console.show_results(scores, comparisons)
    return capsys.readouterr().out


def scores_of(*predictors: str, **values: float) -> pd.DataFrame:
    rows = [
        {
            "split": "test_random",
            "predictor": name,
            "metric": metric,
            "value": values.get(metric, 0.5),
            "low": 0.4,
            "high": 0.6,
        }
        for name in predictors
        for metric in METRICS
    ]
    return pd.DataFrame(rows)


COLUMNS = [
    "split",
    "predictor",
    "against",
    "metric",
    "value",
    "low",
    "high",
    "number",
    "of",
    "verdict",
]
BETTER = pd.DataFrame(
    [["test_random", "gem", "ridge", "mse", 0.2, 0.1, 0.3, 9, "condition", "better"]],
    columns=COLUMNS,
)


def test_predictors_stand_from_floor_to_ceiling_with_their_roles(capsys):
    said = shown(capsys, scores_of("oracle_metadata", "gem", "ridge", "no_change"), BETTER)
    assert [
        said.index(name) for name in ("no_change", "ridge", "gem", "oracle_metadata")
    ] == sorted(said.index(name) for name in ("no_change", "ridge", "gem", "oracle_metadata"))
    for role in ("floor", "baseline", "model", "ceiling"):
        assert role in said
    assert "test_random  gem: beats 1 of 1 baselines in mse" in said


def test_the_metrics_worth_seeing_are_shown_with_their_direction(capsys, monkeypatch):
    said = shown(capsys, scores_of("oracle_metadata", "gem"), BETTER)
    for metric in ("mse", "skill", "delta_pearson", "discrimination", "calibration"):
        assert metric in said
    assert "lower is better" in said and "higher is better" in said
    monkeypatch.setattr(console, "SHOWN", ("target_bias",))
    said = shown(capsys, scores_of("oracle_metadata", "gem"), BETTER)
    assert "nearest to 0 is best" in said and "higher is better" not in said


def test_without_a_truth_the_replicate_is_the_ceiling(capsys):
    said = shown(capsys, scores_of("ridge", "gem", "replicate"), BETTER)
    assert "skill_replicate" in said


def test_a_missing_number_is_a_dash_and_no_nan(capsys):
    table = scores_of("gem", "oracle_metadata").assign(value=None, low=None, high=None)
    said = shown(capsys, table, BETTER.iloc[:0])
    assert "nan" not in said and "None" not in said
    assert "gem: nothing to compare with" in said


@pytest.mark.parametrize(("value", "digits"), [(0.04512, "0.045"), (-1.5, "-1.500")])
def test_an_interval_stands_beside_its_number(capsys, value, digits):
    assert f"{digits} (0.400 to 0.600)" in shown(
        capsys, scores_of("gem", "oracle_metadata", mse=value), BETTER
    )


def test_no_line_of_a_table_is_cut(capsys):
    names = ("gem_tuned_reference", "oracle_omniscient", "oracle_metadata", "additive_nearest")
    table = scores_of(*names).assign(value=-4.278, low=-9.19, high=-2.48)
    said = shown(capsys, table, BETTER)
    assert "…" not in said and "..." not in said
    assert all(name in said for name in names)
