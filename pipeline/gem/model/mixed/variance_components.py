"""Variance components of a linear mixed model, by the error of rows that are left out.

    y_g ~ Normal(mu_g 1, V),  V = sum_k v_k K_k + known,  for all genes g alike

R rows, G genes, K kernels. Restricted maximum likelihood comes first. The mean is projected out
(Patterson & Thompson, Biometrika 1971), so the likelihood depends on the data through their mean
second moment alone. No real cohort has exactly these kernels. Therefore the components move on, to
where the squared error of each target row, predicted from all other rows, is smallest (Allen,
Technometrics 1974). This error has no scale, and few rows leave directions open: REML_SHARE of the
likelihood remains.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

_LOG_RANGE = (-16.0, 4.0)  # of a component relative to the mean variance
_RIDGE = 1e-7  # of the mean variance, added to V
_STEPS = 60
REML_SHARE = 0.1  # of the objective with target rows
_START, _RISE = -6.0, 3.0  # of that objective: least component at its start, largest growth; log


def contrasts(matrix: np.ndarray) -> np.ndarray:
    """(R - 1, R - 1) of a symmetric matrix (R, R), in an orthonormal basis of the vectors that sum
    to zero: a Householder reflection that maps the constant vector to the first axis."""
    size = len(matrix)
    normal = np.full(size, size**-0.5)
    normal[0] -= 1
    normal /= np.linalg.norm(normal)
    half = matrix - 2 * np.outer(normal, normal @ matrix)
    return (half - 2 * np.outer(half @ normal, normal))[1:, 1:]


def projection(covariance: np.ndarray) -> np.ndarray:
    """(R, R) P = V^-1 - V^-1 1 (1' V^-1 1)^-1 1' V^-1: (P y)_r / P_rr is the error of row r, when
    all others predict it."""
    inverse = cho_solve(cho_factor(covariance, lower=True), np.eye(len(covariance)))
    ones = inverse.sum(axis=1)
    return inverse - np.outer(ones, ones) / ones.sum()


def fit_variances(
    kernels: Sequence[np.ndarray], moment: np.ndarray, known: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """(K,) the components v of kernels (R, R) for the second moment (R, R) of the data: the mean
    over genes of y y'. `known` (R, R) is covariance that is not fitted. `targets`: the rows whose
    error decides; the likelihood alone without any. Zero for a kernel that is constant over the
    rows."""
    result = np.zeros(len(kernels))
    if len(moment) < 2:
        return result
    projected = [contrasts(kernel) for kernel in kernels]
    scale = np.array([kernel.trace() / len(kernel) for kernel in projected])
    variance = contrasts(moment).trace() / (len(moment) - 1)
    used = np.flatnonzero(scale > 1e-9)
    if not len(used) or variance <= 0:
        return result
    # The unit of each component is the mean variance that its kernel gives a row.
    stack = np.stack([projected[k] / scale[k] for k in used])
    likelihood = stack, contrasts(moment) / variance, contrasts(known) / variance
    start, bounds = np.full(len(used), -np.log(len(used))), [_LOG_RANGE] * len(used)
    best = _minimum(lambda logs: deviance(logs, *likelihood), start, bounds)
    if len(targets):
        rows = np.stack([kernels[k] / scale[k] for k in used])
        errors = rows, moment / variance, known / variance, targets
        start = best.clip(_START)
        bounds = [(_LOG_RANGE[0], value + _RISE) for value in start]
        best = _minimum(lambda logs: _objective(logs, likelihood, errors), start, bounds)
    result[used] = np.exp(best) * variance / scale[used]
    return result


def _minimum(function: Callable, start: np.ndarray, bounds: list[tuple]) -> np.ndarray:
    """Of a function that gives its value and gradient."""
    options = {"maxiter": _STEPS}
    return minimize(function, start, method="L-BFGS-B", jac=True, bounds=bounds, options=options).x


def _objective(
    log_components: np.ndarray, likelihood: tuple, errors: tuple
) -> tuple[float, np.ndarray]:
    """(value, gradient (K,)): a Gaussian log likelihood of the errors at their best scale, and
    REML_SHARE of the deviance."""
    value, slope = deviance(log_components, *likelihood)
    error, error_slope = left_out_error(log_components, *errors)
    number, share = len(errors[-1]), 1 - REML_SHARE
    total = share * number * np.log(error) + REML_SHARE * value
    return total, share * number * error_slope / error + REML_SHARE * slope


def left_out_error(
    log_components: np.ndarray,
    kernels: np.ndarray,
    moment: np.ndarray,
    known: np.ndarray,
    targets: np.ndarray,
) -> tuple[float, np.ndarray]:
    """(mean squared error of the target rows, each predicted from all other rows; its gradient
    (K,)). With W = P S P it is the mean of W_rr / P_rr^2, and dP = -P dV P."""
    components = np.exp(log_components)
    covariance = np.tensordot(components, kernels, 1) + known
    covariance[np.diag_indices_from(covariance)] += _RIDGE
    projected = projection(covariance)
    residual = projected @ moment @ projected
    precision, square = np.diag(projected)[targets], np.diag(residual)[targets]
    value = np.mean(square / precision**2)
    own, other = projected[:, targets], residual[:, targets]
    slope = (own * (square / precision**3)) @ own.T - (other / precision**2) @ own.T
    slope = (slope + slope.T) / len(targets)
    return float(value), components * np.tensordot(kernels, slope, 2)


def deviance(
    log_components: np.ndarray, kernels: np.ndarray, moment: np.ndarray, known: np.ndarray
) -> tuple[float, np.ndarray]:
    """(-2 log likelihood of a gene up to a constant, its gradient (K,)): log |V| + trace(V^-1 S)
    of kernels (K, R, R), `known` covariance and second moment S (R, R)."""
    components = np.exp(log_components)
    covariance = np.tensordot(components, kernels, 1) + known
    covariance[np.diag_indices_from(covariance)] += _RIDGE
    factor = cho_factor(covariance, lower=True)
    inverse = cho_solve(factor, np.eye(len(covariance)))
    fitted = inverse @ moment
    value = 2 * np.log(np.diag(factor[0])).sum() + fitted.trace()
    slope = inverse - fitted @ inverse
    return float(value), components * np.tensordot(kernels, slope, 2)
