"""Figures of scores."""

from pathlib import Path

import pandas as pd
import pytest

from pipeline.gem.evaluation.report.figures import draw_figures, draw_scores
from pipeline.gem.evaluation.report.summary import MAIN_METRICS


def score_table(metric: str = "skill", **gem) -> pd.DataFrame:
    row = {"split": "test_random", "metric": metric, "value": 0.5, "low": 0.4, "high": 0.6}
    others = {"ridge": {"value": 0.0}, "gem": gem, "oracle_metadata": {"value": 1.0}}
    return pd.DataFrame([row | {"predictor": name} | own for name, own in others.items()])


def drawn(path: Path, **gem) -> bytes:
    draw_scores(score_table(**gem), "skill", path)
    return path.read_bytes()


def test_a_figure_is_reproducible_and_shows_its_values(tmp_path):
    first = drawn(tmp_path / "first.png")
    assert first.startswith(b"\x89PNG")
    assert first == drawn(tmp_path / "second.png") != drawn(tmp_path / "other.png", value=0.55)


@pytest.mark.parametrize(
    "gem",
    [{"value": None, "low": None, "high": None}, {"value": -9.0}, {"low": None, "high": None}],
    ids=["missing", "far below", "without interval"],
)
def test_scores_that_are_no_dot_with_an_interval_are_drawn(tmp_path, gem):
    assert drawn(tmp_path / "odd.png", **gem) != drawn(tmp_path / "plain.png")


def test_every_main_metric_gets_a_figure_and_those_of_an_earlier_evaluation_are_removed(tmp_path):
    (tmp_path / "earlier.png").touch()
    draw_figures(pd.concat([score_table(metric) for metric in MAIN_METRICS]), tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(MAIN_METRICS)
