"""Sentences: a difference is claimed only if the paired interval excludes zero."""

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.evaluation.catalogue import BETTER, PREDICTOR_ROLES, PREDICTORS, UNCLEAR, WORSE
from pipeline.gem.evaluation.report.summary import (
    ModelSummary,
    compare_models,
    difference,
    headline,
    listing,
    main_metrics,
    ordered,
    overall_verdict,
    skill_scale,
    summarise_model,
    summary_line,
)

SPLIT = "test_combination"


def score_table(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    metric: str = "skill",
    reason: str = "",
) -> pd.DataFrame:
    """The skill of GEM and of the ceiling."""
    ceiling = "oracle_metadata" if metric == "skill" else "replicate"
    rows = [("gem", metric, value, low, high, reason), (ceiling, metric, 1.0, 1.0, 1.0, "")]
    table = pd.DataFrame(rows, columns=["predictor", "metric", "value", "low", "high", "reason"])
    return table.assign(split=SPLIT).astype({"value": float, "low": float, "high": float})


def comparison_table(*rows: tuple) -> pd.DataFrame:
    """Rows of (predictor, against, metric, value, low, high) with their verdicts."""
    table = pd.DataFrame(rows, columns=["predictor", "against", "metric", "value", "low", "high"])
    verdict = np.where(table["low"] > 0, BETTER, np.where(table["high"] < 0, WORSE, UNCLEAR))
    return table.assign(split=SPLIT, number=26, of="pair", verdict=verdict)


BETTER_THAN_ALL = comparison_table(
    ("gem", "additive", "mse", 0.05, 0.04, 0.06),
    ("gem", "additive", "delta_pearson", 0.2, 0.1, 0.3),
    ("gem", "ridge", "mse", 0.019, 0.013, 0.025),
    ("gem", "ridge", "delta_pearson", 0.1, 0.05, 0.15),
)
MIXED = comparison_table(
    ("gem", "additive", "mse", 0.05, 0.04, 0.06),
    ("gem", "bilinear", "mse", -0.02, -0.03, -0.01),
    ("gem", "no_change", "mse", -0.01, -0.02, -0.005),
    ("gem", "ridge", "mse", 0.0, -0.1, 0.1),
)


def text(scores: pd.DataFrame, comparisons: pd.DataFrame = BETTER_THAN_ALL) -> str:
    return summarise_model(SPLIT, "gem", scores, comparisons).text


def test_a_better_model_is_described_with_its_smallest_differences():
    assert text(score_table(0.79, 0.74, 0.83)) == (
        "GEM closes 79 % (95 % interval 74 to 83 %) of the gap in mse between ridge and the ideal "
        "predictor. It has a lower mse than 2 of 2 baselines (smallest difference: 0.013 to 0.025 "
        "to ridge, over 26 pairs). It has a higher delta_pearson than 2 of 2 baselines (smallest "
        "difference: 0.050 to 0.150 to ridge, over 26 pairs)."
    )


@pytest.mark.parametrize(
    ("skill", "sentence"),
    [
        (
            (-0.16, -0.3, -0.05),
            "the gap in mse between ridge and the ideal predictor by 16 % (95 % interval 5 to "
            "30 %). ",
        ),
        ((0.2, -0.1, 0.5), " and the ideal predictor, no clear difference from ridge. "),
        (
            (-0.2, -0.5, 0.1),
            "20 % (95 % interval −10 to 50 %), no clear difference from ridge. ",
        ),
        ((0.5, None, None), "GEM closes 50 % of the gap "),
        ((None, None, None, "skill", "ridge is ideal"), "GEM has no skill (ridge is ideal). "),
        (
            (0.6, 0.5, 0.7, "skill_replicate"),
            "of the gap in mse between ridge and a replicate of the experiment. ",
        ),
    ],
)
def test_the_skill_is_described_with_its_interval(skill, sentence):
    assert sentence in text(score_table(*skill))


def test_mixed_comparisons_list_the_baselines_that_are_not_worse():
    summary = summarise_model(SPLIT, "gem", score_table(0.5), MIXED)
    assert summary.verdict == WORSE and summary.verdicts == {"mse": WORSE}
    assert summary.text.endswith(
        "It has a lower mse than 1 of 4 baselines, and a higher mse than 2 of 4 baselines (largest "
        "difference: 0.010 to 0.030 to bilinear), and no clear difference from ridge."
    )
    unclear = summarise_model(SPLIT, "gem", score_table(0.5), MIXED[3:])
    assert unclear.verdict == UNCLEAR
    assert unclear.text.endswith("It has no clear difference in mse from any of 1 baseline.")


def test_without_baselines_nothing_is_claimed():
    summary = summarise_model(SPLIT, "gem", score_table(0.5), BETTER_THAN_ALL[:0])
    assert summary.verdict == UNCLEAR
    assert summary.text.endswith("There is no baseline to compare it with.")


@pytest.mark.parametrize(
    ("verdicts", "overall"),
    [
        ([BETTER, BETTER], BETTER),
        ([BETTER, UNCLEAR], UNCLEAR),
        ([BETTER, UNCLEAR, WORSE], WORSE),
        ([], UNCLEAR),
    ],
)
def test_a_model_is_better_only_if_it_is_better_in_all(verdicts, overall):
    assert overall_verdict(verdicts) == overall


def test_models_are_compared_with_one_another():
    rows = comparison_table(
        ("gem_tuned", "gem", "mse", 0.002, 0.001, 0.003),
        ("gem_tuned", "gem", "delta_pearson", 0.0, -0.1, 0.1),
        ("gem_reference", "gem", "mse", -0.01, -0.02, -0.005),
        ("gem_reference", "gem", "delta_pearson", -0.1, -0.2, -0.05),
        ("gem_tuned_reference", "gem_tuned", "mse", 0.0, 0.0, 0.0),
    )
    assert compare_models(SPLIT, rows) == [
        "Tuned GEM has a lower mse (by 0.001 to 0.003) than GEM; no clear difference in "
        "delta_pearson.",
        "GEM with a reference has a higher mse (by 0.005 to 0.020) and a lower delta_pearson "
        "(by 0.050 to 0.200) than GEM.",
        "No clear difference between tuned GEM with a reference and tuned GEM in mse.",
    ]


def test_a_line_summarises_a_model():
    tuned = comparison_table(("gem_tuned", "gem", "mse", 1.0, 0.5, 2.0))
    rows = pd.concat([MIXED, tuned])
    assert summary_line(SPLIT, "gem", BETTER_THAN_ALL) == (
        "mse lower than 2 of 2 baselines; delta_pearson higher than 2 of 2 baselines"
    )
    assert summary_line(SPLIT, "gem", rows) == (
        "mse lower than 1 of 4 baselines (higher than bilinear and no_change; no clear difference "
        "from ridge)"
    )
    assert summary_line(SPLIT, "gem_tuned", rows) == "mse lower than gem"
    assert summary_line("test_random", "gem", rows) == "nothing to compare with"


def test_the_headline_counts_splits_and_names_what_was_lost():
    summaries = {
        "test_random": ModelSummary("", {"mse": BETTER}),
        "test_study": ModelSummary("", {"mse": BETTER, "delta_pearson": WORSE}),
        "test_combination": ModelSummary("", {"mse": UNCLEAR}),
    }
    assert headline(summaries, "gem") == (
        "GEM is clearly better than all baselines on 1 of 3 test splits.",
        "On test_study, a baseline is clearly better in delta_pearson. On test_combination, no "
        "clear difference from at least one baseline.",
    )


def test_the_ceiling_is_a_replicate_only_if_the_truth_is_unknown():
    measured = score_table(0.6, metric="skill_replicate")
    assert skill_scale(measured).metric == main_metrics(measured)[1] == "skill_replicate"
    both = pd.concat([score_table(None), measured])
    assert skill_scale(both).metric == main_metrics(both)[1] == "skill"


def test_predictors_are_ordered_from_floor_to_ceiling():
    names = ordered(reversed(PREDICTORS))
    roles = [PREDICTORS[name].role for name in names]
    assert set(names) == set(PREDICTORS)
    assert roles == sorted(roles, key=PREDICTOR_ROLES.index)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0131, 0.0252, "0.013 to 0.025"),
        (-0.03, -0.01, "0.010 to 0.030"),
        (0.00012, 0.00034, "0.0001 to 0.0003"),
        (0.05012, 0.05043, "0.0501 to 0.0504"),
        (np.nan, np.nan, "0.020"),
    ],
)
def test_a_difference_has_digits_that_separate_its_bounds(low, high, expected):
    row = pd.Series({"value": -0.02, "low": low, "high": high})
    assert difference(row) == expected


@pytest.mark.parametrize(
    ("words", "text"),
    [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")],
)
def test_a_listing(words, text):
    assert listing(words) == text
