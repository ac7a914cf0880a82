"""Differential genes against scipy and plain loops, their false discovery rate, and gene sets."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control, t, ttest_ind

from pipeline.gem.evaluation.differential_expression import (
    changed_genes,
    de_direction,
    de_jaccard,
    differential_genes,
)

GENES = 200


@pytest.fixture
def screen(rng):
    """Treated and control samples: 40 of 200 genes shifted by 1, variances that differ between
    genes and sides."""
    shifted = np.arange(GENES) < 40
    treated = rng.normal(5 + shifted, rng.gamma(4, 0.1, GENES), (7, GENES))
    return treated, rng.normal(5, rng.gamma(4, 0.2, GENES), (15, GENES))


def benjamini_hochberg(p: np.ndarray, fdr: float) -> np.ndarray:
    """The step-up procedure of the paper: all up to the largest k with p(k) <= k / G x fdr."""
    order = np.argsort(p)
    passed = [k for k in range(1, len(p) + 1) if p[order[k - 1]] <= k / len(p) * fdr]
    rejected = np.zeros(len(p), dtype=bool)
    rejected[order[: max(passed, default=0)]] = True
    return rejected


def welch_p(treated: np.ndarray, control: np.ndarray) -> float:
    """Welch's p of one gene by the textbook's formula; scipy warns of a constant side."""
    sides = treated, control
    parts = [side.var(ddof=1) / len(side) for side in sides]
    correction = [part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True)]
    statistic = abs(treated.mean() - control.mean()) / np.sqrt(sum(parts))
    return 2 * t.sf(statistic, sum(parts) ** 2 / sum(correction))


# --- the test ---


@pytest.mark.parametrize("fdr", [0.01, 0.05, 0.3])
def test_differential_genes_are_those_of_welch_and_benjamini_hochberg(screen, fdr):
    treated, control = screen
    significant, change = differential_genes(treated, control, fdr)
    p = ttest_ind(treated, control, equal_var=False).pvalue
    np.testing.assert_array_equal(significant, benjamini_hochberg(p, fdr))
    np.testing.assert_allclose(change, treated.mean(axis=0) - control.mean(axis=0), rtol=1e-12)
    assert 0 < significant.sum() < GENES


def test_the_variances_of_the_two_sides_are_not_pooled():
    # Two noisy treated samples against many quiet controls: significant by Student's t only.
    treated, control = np.array([[0.0], [2.0]]), np.linspace(-0.1, 0.1, 100)[:, None]
    assert ttest_ind(treated, control).pvalue < 0.05
    assert not differential_genes(treated, control)[0][0]


def test_the_false_discovery_rate_is_controlled(rng):
    shifted, false, power = np.arange(GENES) < 40, [], []
    for _ in range(200):
        treated, control = rng.normal(1.2 * shifted, 1, (10, GENES)), rng.normal(0, 1, (10, GENES))
        significant, _ = differential_genes(treated, control)
        false.append((significant & ~shifted).sum() / max(significant.sum(), 1))
        power.append((significant & shifted).sum() / 40)
    # 0.05 x share of genes without effect = 0.04, Monte-Carlo error 0.003
    assert 0.02 < np.mean(false) < 0.05
    assert np.mean(power) > 0.2


def test_a_perturbation_without_effect_rarely_has_a_differential_gene(rng):
    any_gene = [differential_genes(*rng.normal(0, 1, (2, 8, GENES)))[0].any() for _ in range(200)]
    assert np.mean(any_gene) < 0.1


@pytest.mark.parametrize(("treated", "low", "high"), [(2, 20, 100), (6, 0, 1)])
def test_two_treated_samples_against_many_controls_give_many_false_genes(rng, treated, low, high):
    """Why callers need more than the two samples that the test can be computed with."""
    false = [
        differential_genes(rng.normal(0, 1, (treated, 1000)), rng.normal(0, 1, (20, 1000)))[0].sum()
        for _ in range(40)
    ]
    assert low <= np.mean(false) < high


def test_constant_genes_are_differential_exactly_if_the_constants_differ(rng):
    treated, control = rng.normal(0, 1, (2, 5, 6))
    # 0.1 has no exact binary form: means of it carry rounding.
    treated[:, 0] = control[:, 0] = treated[:, 1] = 0.1
    control[:, 1] = 0.3
    treated[:, 2] = 0.0  # constant on one side only: an ordinary test, without a warning
    significant, change = differential_genes(treated, control)
    p = [1.0, 0.0, *(welch_p(treated[:, gene], control[:, gene]) for gene in range(2, 6))]
    np.testing.assert_array_equal(significant, benjamini_hochberg(np.array(p), 0.05))
    assert change[0] == 0 and change[1] == pytest.approx(-0.2)
    significant, change = differential_genes(np.full((3, 4), 0.1), np.full((2, 4), 0.1))
    assert not significant.any() and not change.any()


@pytest.mark.parametrize(("treated", "control"), [(1, 5), (5, 1), (0, 5)])
def test_a_side_with_fewer_than_two_samples_is_refused(rng, treated, control):
    with pytest.raises(ValueError, match=f"got {treated} treated and {control} control samples"):
        differential_genes(rng.normal(0, 1, (treated, 3)), rng.normal(0, 1, (control, 3)))


def test_the_order_of_samples_and_genes_does_not_matter(screen, rng):
    treated, control = screen
    genes = rng.permutation(GENES)
    significant, change = differential_genes(treated, control)
    shuffled, shuffled_change = differential_genes(
        treated[rng.permutation(7)][:, genes], control[rng.permutation(15)][:, genes]
    )
    np.testing.assert_array_equal(shuffled, significant[genes])
    np.testing.assert_allclose(shuffled_change, change[genes], rtol=1e-12)


def test_single_precision_input_is_tested_in_double(screen):
    # A power of two: the shift is exact in float32 for values on this grid.
    treated, control = (np.round(side.astype(np.float32) * 64) / 64 for side in screen)
    shift = np.float32(4096)
    near = differential_genes(treated, control)
    far = differential_genes(treated + shift, control + shift)
    np.testing.assert_array_equal(near[0], far[0])
    np.testing.assert_allclose(near[1], far[1], atol=1e-11)


# --- changes from matched controls ---


def test_changes_from_one_set_of_controls_are_tested_by_welch(rng):
    treated, control = rng.normal(0.7, 1, (6, 60)), rng.normal(0, 2, (9, 60))
    change, deviation = treated - control.mean(axis=0), control.std(axis=0, ddof=1)
    genes = changed_genes(change, deviation, 8, 1 / 9, fdr=0.3)
    p = ttest_ind(treated, control, equal_var=False).pvalue
    np.testing.assert_array_equal(genes, false_discovery_control(p) <= 0.3)
    assert 0 < genes.sum() < 60


def test_the_mean_of_few_controls_is_uncertain_even_if_their_deviation_is_known(rng):
    change = rng.normal(1.5, 0.5, (6, 200))
    few, many = (changed_genes(change, np.ones(200), 60, 1 / number).sum() for number in (2, 60))
    assert few < many


def test_genes_constant_on_both_sides_are_changed_if_the_change_is_not_zero():
    change = np.zeros((5, 3))
    change[:, 1] = 2.0
    np.testing.assert_array_equal(changed_genes(change, np.zeros(3), 8, 0.1), [False, True, False])


@pytest.mark.parametrize(("samples", "degrees"), [(1, 5), (4, 0)])
def test_a_change_without_a_variance_to_test_it_against_is_refused(samples, degrees):
    with pytest.raises(ValueError, match="expected at least 2 and 1"):
        changed_genes(np.ones((samples, 3)), np.ones(3), degrees, 0.1)


# --- scores of a gene set ---

CHANGE = np.array([1.0, 2.0, -1.0, -3.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("genes", "predicted", "expected"),
    [
        (4, [0.1, 5, -9, 2, -1, -1], 3 / 4),
        (4, CHANGE, 1),
        (4, -CHANGE, 0),
        (4, np.zeros(6), 0.5),  # a predicted change of 0 counts half
        (2, [2.0, 0, 0, 0, 0, 0], 0.75),
        (0, CHANGE, np.nan),
    ],
)
def test_direction_is_the_share_of_the_true_set_with_the_right_sign(genes, predicted, expected):
    value = de_direction(np.arange(6) < genes, CHANGE, np.array(predicted))
    assert value == pytest.approx(expected, nan_ok=True)


def test_jaccard_is_the_overlap_of_two_sets(rng):
    first, second = rng.random((2, 50)) < 0.4
    a, b = set(np.flatnonzero(first)), set(np.flatnonzero(second))
    assert de_jaccard(first, second) == len(a & b) / len(a | b)
    assert de_jaccard(first, first) == 1
    empty = np.zeros(50, dtype=bool)
    assert de_jaccard(first, ~first) == de_jaccard(first, empty) == 0
    assert np.isnan(de_jaccard(empty, empty))
