"""Components of variance against ANOVA, an explicit likelihood, explicit predictions without a row
and finite differences."""

import numpy as np
import pytest
from scipy.linalg import null_space

from pipeline.gem.model.mixed.variance_components import (
    contrasts,
    deviance,
    fit_variances,
    left_out_error,
)

NO_TARGETS = np.arange(0)


@pytest.fixture
def kernels(rng) -> np.ndarray:
    features = rng.normal(size=(3, 9, 4))
    return features @ features.transpose(0, 2, 1)


def test_contrasts_are_those_of_any_basis_of_the_vectors_that_sum_to_zero(kernels):
    basis = null_space(np.ones((1, 9)))
    for kernel in kernels:
        expected = np.linalg.eigvalsh(basis.T @ kernel @ basis)
        np.testing.assert_allclose(np.linalg.eigvalsh(contrasts(kernel)), expected, atol=1e-9)
    together = np.linalg.eigvalsh(contrasts(kernels[0]) + contrasts(kernels[1]))
    np.testing.assert_allclose(together, np.linalg.eigvalsh(contrasts(kernels[0] + kernels[1])))


def test_deviance_is_the_restricted_likelihood_and_its_gradient_that_of_finite_differences(
    kernels, rng
):
    """REML after Harville (JASA 1974): log |V| + log |1' V^-1 1| + y' P y."""
    expression = rng.normal(size=(9, 50))
    moment = expression @ expression.T / 50
    stack, components = np.stack([*kernels, np.eye(9)]), np.array([0.5, 0.1, 2.0, 0.3])
    projected = np.stack([contrasts(kernel) for kernel in stack])
    known = 0.2 * np.diag(rng.uniform(1, 2, 9))
    arguments = projected, contrasts(moment), contrasts(known)
    value, gradient = deviance(np.log(components), *arguments)
    covariance = np.tensordot(components, stack, 1) + known
    inverse, ones = np.linalg.inv(covariance), np.ones(9)
    information = ones @ inverse @ ones
    projection = inverse - np.outer(inverse @ ones, ones @ inverse) / information
    expected = np.linalg.slogdet(covariance)[1] + np.log(information)
    expected += (projection * moment).sum() - np.log(9)
    assert value == pytest.approx(expected, rel=1e-5)
    for k in range(4):
        shift = np.eye(4)[k] * 1e-5
        values = [deviance(np.log(components) + sign * shift, *arguments)[0] for sign in (-1, 1)]
        assert gradient[k] == pytest.approx((values[1] - values[0]) / 2e-5, rel=1e-4, abs=1e-6)


def test_components_of_a_balanced_design_are_those_of_the_analysis_of_variance(rng):
    """One-way layout: noise is the mean square within, groups (between - within) / size."""
    groups, size, genes = 12, 5, 2000
    effect = rng.normal(0, 1.5, (groups, genes)).repeat(size, axis=0)
    expression = effect + rng.normal(0, 0.7, (groups * size, genes))
    same = np.kron(np.eye(groups), np.ones((size, size)))
    moment, nothing = expression @ expression.T / genes, np.zeros((groups * size,) * 2)
    fitted = fit_variances([same, np.eye(groups * size)], moment, nothing, NO_TARGETS)
    means = expression.reshape(groups, size, genes).mean(axis=1)
    between = size * means.var(axis=0, ddof=1).mean()
    within = expression.reshape(groups, size, genes).var(axis=1, ddof=1).mean()
    np.testing.assert_allclose(fitted, [(between - within) / size, within], rtol=1e-3)
    (of_groups,) = fit_variances([same], moment, within * np.eye(groups * size), NO_TARGETS)
    assert of_groups == pytest.approx((between - within) / size, rel=1e-3)


def test_a_kernel_without_contrasts_and_constant_data_have_no_variance():
    nothing, kernels = np.zeros((4, 4)), [np.ones((4, 4)), np.eye(4)]
    assert not fit_variances(kernels, nothing, nothing, NO_TARGETS).any()
    constant, noise = fit_variances(kernels, np.eye(4), nothing, NO_TARGETS)
    assert constant == 0 and noise == pytest.approx(1, rel=1e-3)


def test_left_out_error_is_that_of_predictions_from_all_other_rows_and_its_gradient_is_exact(
    kernels, rng
):
    expression = rng.normal(size=(9, 40))
    stack, components = np.stack([*kernels, np.eye(9)]), np.array([0.5, 0.1, 2.0, 0.3])
    known, targets = 0.2 * np.diag(rng.uniform(1, 2, 9)), np.array([1, 4, 5, 8])
    arguments = stack, expression @ expression.T / 40, known, targets
    value, gradient = left_out_error(np.log(components), *arguments)
    covariance, errors = np.tensordot(components, stack, 1) + known, []
    for row in targets:
        rest = np.arange(9) != row
        inverse = np.linalg.inv(covariance[np.ix_(rest, rest)])
        mean = inverse.sum(axis=0) @ expression[rest] / inverse.sum()
        predicted = mean + covariance[row, rest] @ inverse @ (expression[rest] - mean)
        errors.append((predicted - expression[row]) ** 2)
    assert value == pytest.approx(np.mean(errors), rel=1e-5)
    for k in range(4):
        shift = np.eye(4)[k] * 1e-5
        values = [
            left_out_error(np.log(components) + sign * shift, *arguments)[0] for sign in (-1, 1)
        ]
        assert gradient[k] == pytest.approx((values[1] - values[0]) / 2e-5, rel=1e-4, abs=1e-6)


def test_components_with_target_rows_predict_them_better_than_the_likelihood_alone(rng):
    """Data whose covariance is none of the kernels': a product of the two, and noise that differs
    between rows."""
    factors = [np.kron(np.eye(6), np.ones((5, 5))), np.kron(np.ones((6, 6)), np.eye(5))]
    spread = np.diag(rng.uniform(0.2, 3.0, 30))
    root = np.linalg.cholesky(factors[0] * 0.3 + factors[1] ** 2 + spread)
    expression = root @ rng.normal(size=(30, 400))
    expression -= expression.mean(axis=0)
    moment, nothing = expression @ expression.T / 400, np.zeros((30, 30))
    kernels, targets = np.stack([*factors, np.eye(30)]), np.flatnonzero(spread.diagonal() < 1)
    errors = {}
    for name, rows in (("likelihood", NO_TARGETS), ("targets", targets)):
        fitted = fit_variances(kernels, moment, nothing, rows)
        errors[name], _ = left_out_error(
            np.log(fitted), np.stack(kernels), moment, nothing, targets
        )
    assert errors["targets"] < errors["likelihood"]
