"""Ridge regression of expression on one-hot metadata, from sums over samples.

N samples, G genes, D columns of the design. Expression is log-CPM.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array, hstack
from scipy.sparse.linalg import LinearOperator, cg

from pipeline.gem.common.config import GROUPS
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.evaluation.baselines.profiles import SparseSums

RIDGE_PENALTIES = tuple(10.0**power for power in np.arange(-2, 4.5, 0.5))
DEFAULT_PENALTY = 1.0  # without a selection split
CLOSED_FORM_COLUMNS = 2048  # above, a decomposition takes longer than conjugate gradients
CG_TOLERANCE, CG_GENES = 1e-6, 64


@dataclass(frozen=True)
class Ridge:
    """Ridge regression on one-hot metadata (numeric covariates standardised).

    An unknown level is encoded as missing.
    """

    encoder: MetadataEncoder
    coefficients: np.ndarray  # (D, G)
    intercept: np.ndarray  # (G,)
    penalty: float

    @classmethod
    def fit(
        cls,
        encoder: MetadataEncoder,
        equations: "NormalEquations",
        penalty: float = DEFAULT_PENALTY,
    ) -> "Ridge":
        """`equations` of the design of `encoder`."""
        coefficients = least_squares(equations).solve(penalty)
        intercept = equations.mean - equations.centre @ coefficients
        return cls(encoder, coefficients, intercept, penalty)

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        design = Design(self.encoder, samples).rows(slice(None))
        return design @ self.coefficients + self.intercept


def best_penalty(
    encoder: MetadataEncoder,
    equations: "NormalEquations",
    samples: pd.DataFrame,
    expression: np.ndarray,
) -> float:
    """Of RIDGE_PENALTIES the one with the least mse on samples (N, ...) and their expression
    (N, G), by a fit to `equations` of other samples."""
    design = Design(encoder, samples).rows(slice(None))
    return least_squares(equations).best_penalty(design, expression)


class Design:
    """The one-hot rows of N samples. Each distinct row is stored once."""

    def __init__(self, encoder: MetadataEncoder, samples: pd.DataFrame):
        self._encoded = encoder.encode(samples, unknown="missing")
        self.columns = sum(group.distinct.shape[1] for group in self._encoded.values())

    def rows(self, rows: slice) -> csr_array:
        """(B, D) float64"""
        parts = [self._encoded[name] for name in GROUPS]
        matrices = [part.distinct[part.index[rows]] for part in parts]
        return hstack(matrices, format="csr", dtype=np.float64)


@dataclass(frozen=True)
class NormalEquations:
    """The sums that a ridge regression on a centred design needs."""

    samples: int
    gram: csr_array  # (D, D) of the design, not centred
    centre: np.ndarray  # (D,) mean of the design
    mean: np.ndarray  # (G,) mean expression
    products: np.ndarray  # (D, G) design times expression, not centred

    @classmethod
    def of(
        cls, rows: Callable[[slice], csr_array], columns: int, blocks: Iterable[np.ndarray]
    ) -> "NormalEquations":
        """`rows`: those (B, D) of the design, of the next block (B, G) of expression."""
        sums = None
        for block in blocks:
            sums = sums or NormalSums(rows, columns, block.shape[1])
            sums.add(block)
        return sums.equations()

    def right(self, genes: slice | np.ndarray = slice(None)) -> np.ndarray:
        """(D, g) centred design times centred expression of some genes."""
        return self.products[:, genes] - np.outer(self.samples * self.centre, self.mean[genes])


class NormalSums:
    """The sums of `NormalEquations`, block after block of expression."""

    def __init__(self, rows: Callable[[slice], csr_array], columns: int, genes: int):
        self._products = SparseSums(rows, columns, genes)
        self._gram = csr_array((columns, columns))
        self._design, self._expression = np.zeros(columns), np.zeros(genes)

    def add(self, block: np.ndarray) -> None:
        """The next rows (B, G)."""
        design = self._products.add(block)
        self._gram = self._gram + design.T @ design
        self._design += design.sum(axis=0)
        self._expression += block.sum(axis=0, dtype=np.float64)

    def equations(self) -> NormalEquations:
        """Of the samples that were added. To save memory they share `products` with the sums, so
        they are valid until others are added."""
        samples = self._products.samples
        centre, mean = self._design / samples, self._expression / samples
        return NormalEquations(samples, self._gram.tocsr(), centre, mean, self._products.values)


def least_squares(equations: NormalEquations) -> "ClosedForm | ConjugateGradients":
    """In closed form up to CLOSED_FORM_COLUMNS columns, by conjugate gradients above."""
    is_wide = len(equations.centre) > CLOSED_FORM_COLUMNS
    return (ConjugateGradients if is_wide else ClosedForm)(equations)


class ClosedForm:
    """Ridge regression for all penalties, from one decomposition of the Gram matrix."""

    def __init__(self, equations: NormalEquations):
        self.centre, self.mean = equations.centre, equations.mean
        gram = equations.gram.toarray()
        gram -= equations.samples * np.outer(self.centre, self.centre)
        self.values, self.vectors = np.linalg.eigh(gram)
        self.projected = self.vectors.T @ equations.right()

    def solve(self, penalty: float) -> np.ndarray:
        """(D, G) coefficients"""
        return self.vectors @ (self.projected / (self.values.clip(0) + penalty)[:, None])

    def best_penalty(self, design: csr_array, expression: np.ndarray) -> float:
        """The penalty with the least mse on other samples."""

        def mse(penalty: float) -> float:
            coefficients = self.solve(penalty)
            intercept = self.mean - self.centre @ coefficients
            return float(np.mean((design @ coefficients + intercept - expression) ** 2))

        return min(RIDGE_PENALTIES, key=mse)


class ConjugateGradients:
    """As ClosedForm, by conjugate gradients with the inverse diagonal as preconditioner.

    Time grows with the pairs of columns that occur together: the Gram matrix is sparse. The systems
    of several genes are solved as one. Relative to the right side, the residual is at most
    CG_TOLERANCE.
    """

    def __init__(self, equations: NormalEquations):
        self.equations, self.centre = equations, equations.centre
        self.squares = equations.gram.diagonal() - equations.samples * self.centre**2

    def solve(self, penalty: float) -> np.ndarray:
        """(D, G) float32 coefficients"""
        coefficients = np.empty(self.equations.products.shape, dtype=np.float32)
        for start in range(0, coefficients.shape[1], CG_GENES):
            block = slice(start, start + CG_GENES)
            right = self.equations.right(block)
            coefficients[:, block] = self._solve(penalty, right, CG_TOLERANCE)
        return coefficients

    def best_penalty(self, design: csr_array, expression: np.ndarray) -> float:
        """The penalty with the least mse on other samples, over at most CG_GENES genes spread over
        all. From the largest on, the first that is better than the next: each starts from the
        solution of the last."""
        genes = np.unique(np.linspace(0, expression.shape[1] - 1, CG_GENES).astype(int))
        mean = self.equations.mean[genes]
        right, coefficients = self.equations.right(genes), None
        best, least = RIDGE_PENALTIES[-1], np.inf
        for penalty in RIDGE_PENALTIES[::-1]:
            coefficients = self._solve(penalty, right, 100 * CG_TOLERANCE, coefficients)
            predicted = design @ coefficients + (mean - self.centre @ coefficients)
            mse = float(np.mean((predicted - expression[:, genes]) ** 2))
            if mse > least:
                break
            best, least = penalty, mse
        return best

    def _solve(
        self, penalty: float, right: np.ndarray, tolerance: float, start: np.ndarray | None = None
    ) -> np.ndarray:
        """(D, genes)"""
        shape, samples = right.shape, self.equations.samples
        diagonal = (self.squares + penalty)[:, None]

        def product(flat: np.ndarray) -> np.ndarray:
            values = flat.reshape(shape)
            result = self.equations.gram @ values + penalty * values
            result -= np.outer(samples * self.centre, self.centre @ values)
            return result.reshape(-1)

        def precondition(flat: np.ndarray) -> np.ndarray:
            return (flat.reshape(shape) / diagonal).reshape(-1)

        size = (right.size, right.size)
        flat, failure = cg(
            LinearOperator(size, product, dtype=np.float64),
            right.reshape(-1),
            None if start is None else start.reshape(-1),
            rtol=tolerance,
            M=LinearOperator(size, precondition, dtype=np.float64),
        )
        if failure:
            raise RuntimeError(f"ridge: no solution for the penalty {penalty:g}")
        return flat.reshape(shape)
