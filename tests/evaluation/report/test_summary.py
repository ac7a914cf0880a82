"""Sentences about numbers: better only where the paired interval is clear of zero, a loss said as a loss, and nothing where nothing is known."""

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.evaluation.predictors import PREDICTORS
from pipeline.gem.evaluation.report.summary import (
    BETTER,
    MEANING,
    ORDER,
    ROLES,
    UNCLEAR,
    WORSE,
    axis_of,
    between_models,
    condensed,
    listing,
    ordered,
    verdict,
)


def scores_of(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    metric: str = "skill",
    reason: str = "",
    split: str = "test_combination",
):
    rows = [
        ("gem", metric, value, low, high, reason),
        ("oracle_metadata" if metric == "skill" else "replicate", metric, 1.0, 1.0, 1.0, ""),
    ]
    table = pd.DataFrame(rows, columns=["predictor", "metric", "value", "low", "high", "reason"])
    return table.assign(split=split).astype({"value": float, "low": float, "high": float})


def comparisons_of(*rows: tuple, number: int = 26, of: str = "pair") -> pd.DataFrame:
    """Rows of (predictor, against, metric, value, low, high); the verdict follows."""
    table = pd.DataFrame(rows, columns=["predictor", "against", "metric", "value", "low", "high"])
    verdicts = [
        UNCLEAR
        if np.isnan(row.low) or row.low <= 0 <= row.high
        else BETTER
        if row.low > 0
        else WORSE
        for row in table.itertuples()
    ]
    return table.assign(split="test_combination", number=number, of=of, verdict=verdicts)


WINS = comparisons_of(
    ("gem", "additive", "mse", 0.05, 0.04, 0.06), ("gem", "additive", "delta_pearson", 0.2, 0.1, 0.3),
    ("gem", "ridge", "mse", 0.019, 0.013, 0.025), ("gem", "ridge", "delta_pearson", 0.1, 0.05, 0.15),
)  # fmt: skip


def test_a_win_names_the_closest_baseline_and_by_how_much():
    found = verdict("test_combination", "gem", scores_of(0.79, 0.74, 0.83), WINS)
    assert found.tone == BETTER
    assert found.sentence == (
        "On combinations never seen, GEM closes 79 % (74 to 83 %) of the gap between ridge and the ideal predictor; "
        "it beats every baseline in mse and delta_pearson (closest: ridge, mse lower by 0.013 to 0.025 over 26 pairs)."
    )


def test_a_loss_is_said_as_a_loss():
    rows = comparisons_of(
        ("gem", "additive", "mse", 0.05, 0.04, 0.06), ("gem", "ridge", "mse", -0.02, -0.03, -0.01)
    )
    found = verdict("test_combination", "gem", scores_of(-0.16, -0.3, -0.05), rows)
    assert found.tone == WORSE
    assert (
        "GEM is farther from the ideal predictor than ridge, by 16 % (5 to 30 %) of the gap between them;"
        in found.sentence
    )
    assert (
        "in mse it beats 1 of 2 baselines and loses to ridge (higher by 0.010 to 0.030)"
        in found.sentence
    )
    assert "not clearly" not in found.sentence


@pytest.mark.parametrize(
    ("value", "low", "high", "word"),
    [
        (0.2, -0.1, 0.5, "not clearly more than nothing"),
        (-0.2, -0.5, 0.1, "not clearly less than nothing"),
    ],
)
def test_an_interval_over_zero_is_no_win_and_no_loss(value, low, high, word):
    rows = comparisons_of(("gem", "ridge", "mse", value / 10, low / 10, high / 10))
    found = verdict("test_combination", "gem", scores_of(value, low, high), rows)
    assert found.tone == UNCLEAR
    assert (
        word in found.sentence and "in mse it does not differ clearly from ridge" in found.sentence
    )
    assert " beats " not in found.sentence and " loses " not in found.sentence


def test_a_skill_that_is_null_is_not_given_but_explained():
    found = verdict(
        "test_combination",
        "gem",
        scores_of(None, reason="ridge and oracle_metadata do not differ clearly on these samples"),
        WINS,
    )
    assert (
        "cannot be given (ridge and oracle_metadata do not differ clearly on these samples); it beats every baseline"
        in found.sentence
    )


def test_without_an_interval_none_is_claimed():
    rows = comparisons_of(("gem", "ridge", "mse", 0.02, np.nan, np.nan))
    found = verdict("test_combination", "gem", scores_of(0.5), rows)
    assert found.tone == UNCLEAR
    assert "GEM closes 50 % of the gap" in found.sentence and "nan" not in found.sentence


def test_without_truth_the_gap_is_that_to_a_replicate():
    scores = scores_of(0.6, 0.5, 0.7, metric="skill_replicate")
    assert axis_of(scores) == "skill_replicate"
    assert (
        "GEM closes 60 % (50 to 70 %) of the gap between ridge and a replicate of the experiment"
        in verdict("test_combination", "gem", scores, WINS).sentence
    )


def test_with_a_truth_that_tells_nothing_the_replicate_does_not_take_its_place():
    scores = pd.concat(
        [scores_of(None, reason="no clear difference"), scores_of(0.6, metric="skill_replicate")]
    )
    assert axis_of(scores) == "skill"


def test_without_baselines_nothing_is_compared():
    found = verdict("test_combination", "gem", scores_of(0.5, 0.4, 0.6), WINS.iloc[:0])
    assert found.tone == UNCLEAR and found.sentence.endswith(
        "there is no baseline to compare it with."
    )


def test_metrics_of_which_one_is_won_are_told_apart():
    rows = comparisons_of(
        ("gem", "ridge", "mse", 0.02, 0.01, 0.03),
        ("gem", "ridge", "delta_pearson", -0.1, -0.2, -0.05),
    )
    said = verdict("test_combination", "gem", scores_of(0.5, 0.4, 0.6), rows).sentence
    assert (
        "it beats every baseline in mse (closest: ridge, mse lower by 0.010 to 0.030 over 26 pairs); in delta_pearson it loses to ridge (lower by 0.050 to 0.200)"
        in said
    )


def test_models_are_compared_with_one_another():
    rows = comparisons_of(
        ("gem_tuned", "gem", "mse", 0.002, 0.001, 0.003), ("gem_tuned", "gem", "delta_pearson", 0.0, -0.1, 0.1),
        ("gem_reference", "gem", "mse", -0.01, -0.02, -0.005), ("gem_reference", "gem", "delta_pearson", -0.1, -0.2, -0.05),
    )  # fmt: skip
    assert between_models("test_combination", rows) == [
        "tuned GEM is better (mse lower by 0.001 to 0.003) than GEM; delta_pearson does not differ clearly",
        "GEM with a reference is worse (mse higher by 0.005 to 0.020 and delta_pearson lower by 0.050 to 0.200) than GEM",
    ]
    same = comparisons_of(("gem_tuned", "gem", "mse", 0.0, 0.0, 0.0))
    assert between_models("test_combination", same) == [
        "tuned GEM and GEM do not differ clearly in mse"
    ]


def test_a_line_sums_up_a_model():
    assert (
        condensed("test_combination", "gem", WINS)
        == "beats 2 of 2 baselines in mse and delta_pearson"
    )
    rows = comparisons_of(
        ("gem", "additive", "mse", -0.05, -0.06, -0.04),
        ("gem", "ridge", "mse", 0.0, -0.1, 0.1),
        ("gem_tuned", "gem", "mse", 1.0, 0.5, 2.0),
    )
    assert (
        condensed("test_combination", "gem", rows)
        == "beats 0 of 2 baselines in mse (loses to additive; unclear: ridge)"
    )
    assert condensed("test_combination", "gem_tuned", rows) == "better than gem in mse"
    assert condensed("test_random", "gem", rows) == "nothing to compare with"


def test_every_predictor_has_a_role_a_meaning_and_a_place():
    assert set(ROLES) == set(MEANING) == set(ORDER) == set(PREDICTORS)
    roles = [ROLES[name] for name in ORDER]
    assert roles == sorted(roles, key=["floor", "baseline", "model", "ceiling"].index)
    assert ordered(["oracle_metadata", "gem", "ridge"]) == ["ridge", "gem", "oracle_metadata"]


@pytest.mark.parametrize(
    ("words", "said"),
    [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")],
)
def test_a_listing(words, said):
    assert listing(words) == said
