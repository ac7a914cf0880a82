"""The tables on the terminal."""

import pandas as pd
import pytest

from pipeline.gem.evaluation.catalogue import BETTER, SHARED_CONTROLS
from pipeline.gem.evaluation.comparison import COMPARISON_COLUMNS
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.report.console import show_results
from pipeline.gem.evaluation.report.summary import SHARED_MARK, SHARED_NOTE

COMPARISONS = pd.DataFrame(
    [["test_random", "gem", "ridge", "mse", 0.2, 0.1, 0.3, 9, "condition", BETTER]],
    columns=COMPARISON_COLUMNS,
)


def score_table(*predictors: str, **values: float) -> pd.DataFrame:
    rows = [
        ("test_random", name, metric, values.get(metric, 0.5), 0.4, 0.6, "")
        for name in predictors
        for metric in METRICS
    ]
    return pd.DataFrame(
        rows, columns=["split", "predictor", "metric", "value", "low", "high", "reason"]
    )


@pytest.fixture
def printed(capsys):
    def show(scores: pd.DataFrame, comparisons: pd.DataFrame = COMPARISONS) -> str:
        show_results(scores, comparisons)
        return capsys.readouterr().out

    return show


def test_predictors_are_listed_from_floor_to_ceiling_with_their_roles(printed):
    text = printed(score_table("oracle_metadata", "gem", "ridge", "no_change"))
    for order in (
        ("no_change", "ridge", "gem", "oracle_metadata"),
        ("floor", "baseline", "model", "ceiling"),
    ):
        positions = [text.index(f" {word} ") for word in order]
        assert positions == sorted(positions)
    assert "test_random  gem: mse lower than 1 of 1 baseline\n" in text


def test_main_metrics_are_listed_with_their_direction(printed):
    text = printed(score_table("oracle_metadata", "gem"))
    for words in ("mse", "skill", "delta_pearson", "discrimination", "calibration"):
        assert words in text
    assert "lower is better" in text and "higher is better" in text
    assert "skill_replicate" not in text
    assert "skill_replicate" in printed(score_table("ridge", "gem", "replicate"))


def test_scores_from_shared_controls_are_marked_and_explained_once_for_each_split(printed):
    scores = score_table("gem", "oracle_metadata")
    for without in ("", None):  # before a table is written, and after it is read
        assert SHARED_MARK not in printed(scores.assign(reason=without))
    scores.loc[scores["metric"] == "delta_pearson", "reason"] = SHARED_CONTROLS
    text = printed(scores)
    assert text.count(f"(0.40 to 0.60) {SHARED_MARK}") == 2
    assert text.count(f"{SHARED_NOTE}\n") == 1 and "biased upwards" in SHARED_NOTE


def test_missing_values_are_dashes(printed):
    scores = score_table("gem", "oracle_metadata").assign(value=None, low=None, high=None)
    text = printed(scores, COMPARISONS[:0])
    assert "nan" not in text and "None" not in text
    assert "gem: nothing to compare with" in text


@pytest.mark.parametrize(("value", "digits"), [(0.04512, "0.045"), (-1.5, "-1.500")])
def test_a_value_is_followed_by_its_interval(printed, value, digits):
    assert f"{digits} (0.400 to 0.600)" in printed(score_table("gem", "ridge", mse=value))


def test_no_line_is_truncated(printed):
    names = ("gem_tuned_reference", "oracle_omniscient", "oracle_metadata", "additive_nearest")
    text = printed(score_table(*names).assign(value=-4.278, low=-9.19, high=-2.48))
    assert "…" not in text and "..." not in text
    assert all(name in text for name in names)
