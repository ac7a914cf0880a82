"""Settings against the defaults, from scores with a known answer."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.settings.comparison import compare, left_out, markdown, over_cohorts
from benchmarks.settings.figure import draw

SCALES = {"a": "means", "b": "means", "cells": "sums", "synthetic": "means"}
RATIOS = {"default": [1, 1, 1, 1], "better": [0.5, 0.8, 1.0, 1.1], "worse": [2, 1.01, 1.5, 0.9]}


def table(part: str, power: float) -> pd.DataFrame:
    """Two folds whose mean has the ratio of RATIOS to the defaults, to the `power`."""
    rows = [
        {"setting": setting, "cohort": cohort, "fold": fold, "scale": scale, "predictor": part}
        | {"mse": 4 * ratio**power * share, "pearson": 0.5 + 0.1 * (setting == "better")}
        for setting, ratios in RATIOS.items()
        for cohort, ratio in zip(SCALES, ratios, strict=True)
        for scale in {SCALES[cohort], "means"}
        for fold, share in (("one", 0.5 if scale == SCALES[cohort] else 9.0), ("two", 1.5))
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def comparisons() -> pd.DataFrame:
    folds = pd.concat([table("gem", 1), table("network", 2), table("mixed_model", 0)])
    return compare(folds, SCALES)


def test_ratios_are_of_means_over_folds_on_the_scale_that_counts(comparisons):
    rows = comparisons.set_index(["predictor", "setting"])
    assert set(rows.index) == {
        (part, setting) for part in ("gem", "network") for setting in ("better", "worse")
    }
    better = rows.loc["gem", "better"]
    assert better[list(SCALES)].tolist() == pytest.approx(RATIOS["better"])
    assert better["ratio"] == pytest.approx(0.4 ** (1 / 3))
    assert better["correlation"] == pytest.approx(0.1)
    assert (better["cohorts"], better["lower"], better["higher"]) == (3, 2, 0)
    worse = rows.loc["gem", "worse"]
    assert (worse["lower"], worse["higher"]) == (0, 2)  # 1 % is no difference
    assert rows.loc["network", "worse"]["a"] == pytest.approx(4)


def test_the_interval_is_that_of_a_paired_t_test():
    ratios = np.exp(np.random.default_rng(0).normal(0.1, 0.3, 9))
    found = over_cohorts(ratios)
    interval = stats.ttest_1samp(np.log(ratios), 0).confidence_interval(0.95)
    assert [found["low"], found["high"]] == pytest.approx(np.exp([*interval]))
    assert found["ratio"] == pytest.approx(stats.gmean(ratios))
    one = over_cohorts(np.array([0.7, np.nan]))
    assert (one["cohorts"], one["low"], one["high"]) == (1, None, None)


def test_a_choice_does_not_see_the_cohort_that_it_is_measured_on(comparisons):
    chosen = left_out(comparisons, "gem").set_index("cohort")
    assert list(chosen.index) == ["a", "b", "cells"]  # simulated ones choose nothing
    assert chosen["setting"].tolist() == ["better", "better", "better"]
    assert chosen["ratio"].tolist() == pytest.approx([0.5, 0.8, 1.0])
    only_a = comparisons.assign(b=1.2, cells=1.2)
    only_a = left_out(only_a, "gem").set_index("cohort")
    assert only_a.loc["a"].tolist() == ["default", 1.0]
    assert only_a.loc["b", "setting"] == "better"


def test_the_text_and_the_figure_show_every_setting(comparisons, tmp_path):
    text = markdown(comparisons)
    assert "| better | 0.737 (" in text and "| worse |" in text
    assert text.count("geometric mean |") == 2
    simulated = comparisons[["predictor", "setting", "synthetic"]].assign(correlation=np.nan)
    simulated = simulated.assign(**over_cohorts(np.array([])))
    assert "| better | – | 0, 0 | – | 1.10 |" in markdown(simulated)
    draw(comparisons, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
