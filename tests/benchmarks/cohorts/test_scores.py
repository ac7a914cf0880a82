"""The scores of a held-out condition against numbers made by hand."""

import numpy as np
import pytest

from benchmarks.cohorts.scores import (
    TOP,
    condition_scores,
    correlation,
    half_scores,
    log_cpm_of_sum,
    mean_scores,
)

CONTROL = np.array([1.0, 1.0, 1.0, 1.0])
OBSERVED = np.array([2.0, 1.0, 0.0, 1.0])  # effect 1, 0, -1, 0
PREDICTED = np.array([3.0, 1.0, 0.0, 3.0])  # effect 2, 0, -1, 2


def test_scores_of_four_genes_are_those_made_by_hand():
    scores = condition_scores(OBSERVED, PREDICTED, CONTROL)
    assert scores["mse"] == pytest.approx((1 + 0 + 0 + 4) / 4)
    # Predicted effects less their mean of 0.75: 1.25, -0.75, -1.75, 1.25.
    product, norm = 1.25 + 1.75, np.sqrt(2 * (1.25**2 * 2 + 0.75**2 + 1.75**2))
    assert scores["pearson"] == pytest.approx(product / norm)
    assert scores["top_direction"] == 0.5  # genes without an observed effect have no sign


def test_the_top_genes_are_those_that_change_most_in_either_direction():
    rng = np.random.default_rng(0)
    effect = np.concatenate([rng.choice([-2.0, 2.0], TOP) + rng.normal(0, 0.1, TOP), np.zeros(200)])
    own = np.concatenate([effect[:TOP], rng.normal(0, 5, 200)])  # wrong elsewhere
    scores = condition_scores(effect + 3, own + 3, np.full(len(effect), 3.0))
    assert scores["top_pearson"] == pytest.approx(1) and scores["top_direction"] == 1
    assert scores["pearson"] < 0.5


def test_a_prediction_without_effect_has_an_error_but_no_correlation_or_direction():
    rounded = CONTROL.astype(np.float32) + np.float32(1e-6)
    scores = condition_scores(OBSERVED, rounded, CONTROL)
    assert scores["mse"] == pytest.approx(0.5, abs=1e-5)
    assert [scores[name] for name in ("pearson", "top_pearson", "top_direction")] == [None] * 3


def test_without_controls_only_the_error_is_scored():
    scores = condition_scores(OBSERVED, PREDICTED, None)
    assert {name for name, value in scores.items() if value is not None} == {"mse"}


def test_correlation_is_that_of_numpy():
    first, second = np.random.default_rng(1).normal(size=(2, 30))
    assert correlation(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert correlation(first, np.ones(30)) is None


def test_the_halves_of_a_condition_are_disjoint_and_cover_it():
    seen = []

    def combine(part: np.ndarray) -> np.ndarray:
        seen.append(part[:, 0].tolist())
        return part.mean(axis=0)

    samples = np.arange(5.0)[:, None] * np.ones(4)
    half_scores(samples, CONTROL, combine, np.random.default_rng(0))
    assert sorted(map(len, seen)) == [2, 3] and sorted([*seen[0], *seen[1]]) == [0, 1, 2, 3, 4]
    assert half_scores(samples[:1], CONTROL, combine, np.random.default_rng(0)) is None


def test_the_sum_of_cells_weighs_a_cell_by_its_depth():
    counts, totals = np.array([[1, 0], [0, 30]]), np.array([10, 90])
    expected = np.log1p(1e6 * np.array([0.01, 0.30]))
    assert log_cpm_of_sum(counts, totals) == pytest.approx(expected)


def test_means_leave_out_what_has_no_score():
    rows = [{"mse": 1.0, "pearson": None}, {"mse": 3.0, "pearson": 0.5}, {"mse": 2.0}]
    assert mean_scores(iter(rows)) == {"mse": 2.0, "pearson": 0.5}
    assert mean_scores([{"pearson": None}]) == {"pearson": None}
