"""Differential genes against scipy and plain loops, the false discovery rate they promise, and sets with known overlap."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control, ttest_ind

from pipeline.gem.evaluation.differential_expression import (
    changed_genes,
    de_direction,
    de_jaccard,
    differential_genes,
)

GENES = 200


@pytest.fixture
def screen(rng):
    """Treated and control samples: 40 of 200 genes moved by 1, variances that differ between genes and sides."""
    moved = np.arange(GENES) < 40
    treated = rng.normal(5 + moved, rng.gamma(4, 0.1, GENES), (7, GENES))
    return treated, rng.normal(5, rng.gamma(4, 0.2, GENES), (15, GENES)), moved


def benjamini_hochberg(p: np.ndarray, fdr: float) -> np.ndarray:
    """The step-up procedure as in the paper: all up to the largest k with p(k) <= k / G x fdr."""
    order = np.argsort(p)
    passed = [k for k in range(1, len(p) + 1) if p[order[k - 1]] <= k / len(p) * fdr]
    rejected = np.zeros(len(p), dtype=bool)
    rejected[order[: max(passed, default=0)]] = True
    return rejected


# --- the test -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fdr", [0.01, 0.05, 0.3])
def test_differential_genes_are_those_of_welch_and_benjamini_hochberg(screen, fdr):
    treated, control, _ = screen
    significant, change = differential_genes(treated, control, fdr)
    np.testing.assert_array_equal(
        significant, benjamini_hochberg(ttest_ind(treated, control, equal_var=False).pvalue, fdr)
    )
    np.testing.assert_allclose(change, treated.mean(axis=0) - control.mean(axis=0), rtol=1e-12)
    assert 0 < significant.sum() < GENES


def test_the_variances_of_the_two_sides_are_not_pooled():
    # Two noisy treated samples against many quiet controls: Student's t would call it, Welch's does not.
    treated = np.array([[0.0], [2.0]])
    control = np.linspace(-0.1, 0.1, 100)[:, None]
    assert ttest_ind(treated, control).pvalue < 0.05
    assert not differential_genes(treated, control)[0][0]


def test_no_more_than_the_promised_share_of_discoveries_is_false(rng):
    moved, wrong, found = np.arange(GENES) < 40, [], []
    for _ in range(200):
        treated, control = rng.normal(1.2 * moved, 1, (10, GENES)), rng.normal(0, 1, (10, GENES))
        significant, _ = differential_genes(treated, control)
        wrong.append((significant & ~moved).sum() / max(significant.sum(), 1))
        found.append((significant & moved).sum() / 40)
    # 0.05 x share of genes without effect = 0.04, Monte-Carlo error 0.003
    assert 0.02 < np.mean(wrong) < 0.05
    assert np.mean(found) > 0.2


def test_a_null_perturbation_has_almost_never_a_differential_gene(rng):
    any_found = [differential_genes(*rng.normal(0, 1, (2, 8, GENES)))[0].any() for _ in range(200)]
    assert np.mean(any_found) < 0.1


def test_very_few_treated_samples_against_many_controls_break_the_promise(rng):
    # Why a caller asks for more than the two samples that the test can be computed with.
    def called_by_mistake(number: int) -> float:
        screens = (
            (rng.normal(0, 1, (number, 1000)), rng.normal(0, 1, (20, 1000))) for _ in range(40)
        )
        return np.mean(
            [differential_genes(treated, control)[0].sum() for treated, control in screens]
        )

    assert called_by_mistake(2) > 20
    assert called_by_mistake(6) < 1


def test_constant_genes_are_differential_exactly_when_the_constants_differ(rng):
    treated, control = rng.normal(0, 1, (5, 6)), rng.normal(0, 1, (5, 6))
    treated[:, 0], control[:, 0] = (
        0.1,
        0.1,
    )  # 0.1 has no exact binary form: means of it carry rounding
    treated[:, 1], control[:, 1] = 0.1, 0.3
    treated[:, 2] = 0.0  # constant on one side only: an ordinary test, without a warning
    significant, change = differential_genes(treated, control)
    assert not significant[0]
    assert significant[1]
    assert change[0] == 0
    assert change[1] == pytest.approx(-0.2)
    assert (
        significant[2]
        == benjamini_hochberg(
            np.r_[1, 0, [ttest_ind_of(treated, control, gene) for gene in range(2, 6)]], 0.05
        )[2]
    )


def ttest_ind_of(treated: np.ndarray, control: np.ndarray, gene: int) -> float:
    """Welch's p from the textbook's formula; scipy warns of a constant side."""
    from scipy.stats import t

    parts = [side[:, gene].var(ddof=1) / len(side) for side in (treated, control)]
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(side) - 1) for part, side in zip(parts, (treated, control), strict=True)
    )
    return 2 * t.sf(
        abs(treated[:, gene].mean() - control[:, gene].mean()) / np.sqrt(sum(parts)), freedom
    )


def test_all_genes_constant_and_equal_is_nothing_found():
    significant, change = differential_genes(np.full((3, 4), 0.1), np.full((2, 4), 0.1))
    assert not significant.any()
    np.testing.assert_array_equal(change, 0)


@pytest.mark.parametrize(("treated", "control"), [(1, 5), (5, 1), (0, 5)])
def test_a_side_with_fewer_than_two_samples_is_refused(rng, treated, control):
    with pytest.raises(ValueError, match=f"got {treated} treated and {control} control samples"):
        differential_genes(rng.normal(0, 1, (treated, 3)), rng.normal(0, 1, (control, 3)))


def test_the_order_of_samples_and_genes_does_not_matter(screen, rng):
    treated, control, _ = screen
    genes = rng.permutation(GENES)
    significant, change = differential_genes(treated, control)
    again, moved = differential_genes(
        treated[rng.permutation(7)][:, genes], control[rng.permutation(15)][:, genes]
    )
    np.testing.assert_array_equal(again, significant[genes])
    np.testing.assert_allclose(moved, change[genes], rtol=1e-12)


def test_single_precision_input_is_tested_in_double(screen):
    treated, control, _ = (array.astype(np.float32) for array in screen)
    far = 4096.0  # a power of two: the shift itself is exact in float32 for values on this grid
    treated, control = np.round(treated * 64) / 64, np.round(control * 64) / 64
    near, shifted = (
        differential_genes(treated, control),
        differential_genes(treated + np.float32(far), control + np.float32(far)),
    )
    np.testing.assert_array_equal(near[0], shifted[0])
    np.testing.assert_allclose(near[1], shifted[1], atol=1e-11)


# --- judged against a truth -----------------------------------------------------------------------------------------


def test_direction_is_the_share_of_the_true_set_with_the_right_sign():
    true_set = np.array([True, True, True, True, False, False])
    true_change = np.array([1.0, 2.0, -1.0, -3.0, 1.0, 1.0])
    assert de_direction(true_set, true_change, np.array([0.1, 5, -9, 2, -1, -1])) == pytest.approx(
        3 / 4
    )
    assert de_direction(true_set, true_change, true_change) == 1
    assert de_direction(true_set, true_change, -true_change) == 0


def test_a_gene_predicted_not_to_change_counts_half_in_direction():
    true_set, true_change = np.array([True, True, False]), np.array([1.0, -1.0, 1.0])
    assert de_direction(true_set, true_change, np.zeros(3)) == 0.5
    assert de_direction(true_set, true_change, np.array([2.0, 0.0, 0.0])) == 0.75


def test_direction_has_no_value_without_true_genes():
    assert np.isnan(de_direction(np.zeros(3, dtype=bool), np.ones(3), np.ones(3)))


def test_jaccard_is_the_overlap_of_sets(rng):
    first, second = rng.random(50) < 0.4, rng.random(50) < 0.4
    a, b = set(np.flatnonzero(first)), set(np.flatnonzero(second))
    assert de_jaccard(first, second) == len(a & b) / len(a | b)
    assert de_jaccard(first, first) == 1
    assert de_jaccard(first, ~first) == 0
    assert de_jaccard(first, np.zeros(50, dtype=bool)) == 0


def test_jaccard_of_two_empty_sets_has_no_value():
    assert np.isnan(de_jaccard(np.zeros(3, dtype=bool), np.zeros(3, dtype=bool)))


# --- changes from matched controls ------------------------------------------------------------------------------------


def test_changes_from_one_set_of_controls_are_tested_as_welch_does(rng):
    treated, control = rng.normal(0.7, 1, (6, 60)), rng.normal(0, 2, (9, 60))
    p = ttest_ind(treated, control, equal_var=False).pvalue
    found = changed_genes(
        treated - control.mean(axis=0), control.std(axis=0, ddof=1), 8, 1 / 9, fdr=0.3
    )
    np.testing.assert_array_equal(found, false_discovery_control(p) <= 0.3)
    assert 0 < found.sum() < 60


def test_the_mean_of_few_controls_is_uncertain_however_well_their_spread_is_known(rng):
    change = rng.normal(1.5, 0.5, (6, 200))
    few, many = (changed_genes(change, np.ones(200), 60, 1 / number).sum() for number in (2, 60))
    assert few < many


def test_genes_constant_on_both_sides_change_or_do_not():
    change = np.zeros((5, 3))
    change[:, 1] = 2.0
    np.testing.assert_array_equal(changed_genes(change, np.zeros(3), 8, 0.1), [False, True, False])


@pytest.mark.parametrize(("samples", "freedom"), [(1, 5), (4, 0)])
def test_a_change_without_a_variance_to_test_it_against_is_refused(samples, freedom):
    with pytest.raises(ValueError, match="expected at least 2 and 1"):
        changed_genes(np.ones((samples, 3)), np.ones(3), freedom, 0.1)
