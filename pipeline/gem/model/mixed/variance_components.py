"""Variance components of a linear mixed model, by restricted maximum likelihood.

    y_g ~ Normal(mu_g 1, V),  V = sum_k v_k K_k + known,  for all genes g alike

R rows, G genes, K kernels. The mean is projected out (Patterson & Thompson, Biometrika 1971), so
the likelihood depends on the data through their mean second moment alone.
"""

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

_LOG_RANGE = (-16.0, 4.0)  # of a component relative to the mean variance
_RIDGE = 1e-7  # of the mean variance, added to V
_STEPS = 60


def contrasts(matrix: np.ndarray) -> np.ndarray:
    """(R - 1, R - 1) of a symmetric matrix (R, R), in an orthonormal basis of the vectors that sum
    to zero: a Householder reflection that maps the constant vector to the first axis."""
    size = len(matrix)
    normal = np.full(size, size**-0.5)
    normal[0] -= 1
    normal /= np.linalg.norm(normal)
    half = matrix - 2 * np.outer(normal, normal @ matrix)
    return (half - 2 * np.outer(half @ normal, normal))[1:, 1:]


def fit_variances(
    kernels: Sequence[np.ndarray], moment: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """(K,) the components v of kernels (R, R) for the second moment (R, R) of the data: the mean
    over genes of y y'. `known` (R, R) is covariance that is not fitted. Zero for a kernel that is
    constant over the rows."""
    result = np.zeros(len(kernels))
    if len(moment) < 2:
        return result
    moment, projected = contrasts(moment), [contrasts(kernel) for kernel in kernels]
    scale = np.array([kernel.trace() / len(kernel) for kernel in projected])
    variance = moment.trace() / len(moment)
    used = np.flatnonzero(scale > 1e-9)
    if not len(used) or variance <= 0:
        return result
    # The unit of each component is the mean variance that its kernel gives a row.
    stack = np.stack([projected[k] / scale[k] for k in used])
    start = np.full(len(used), -np.log(len(used)))
    best = minimize(
        deviance,
        start,
        (stack, moment / variance, contrasts(known) / variance),
        method="L-BFGS-B",
        jac=True,
        bounds=[_LOG_RANGE] * len(used),
        options={"maxiter": _STEPS},
    )
    result[used] = np.exp(best.x) * variance / scale[used]
    return result


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
