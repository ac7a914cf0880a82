"""A linear mixed model of log-CPM on metadata: its fit, and its best linear unbiased prediction.

    y_ng = mu_g + sum over columns d of z_nd b_dg + row effect + noise,  b_dg ~ Normal(0, v_term(d))

The variances of terms, row effects (of all samples with the same metadata) and noise are the same
for all genes and are fitted by restricted maximum likelihood, so that the data decide which effects
of a cohort are shrunk (Henderson, Biometrics 1975; Robinson, Statistical Science 1991).

N samples of U distinct metadata rows, C columns of the encoded metadata, D of the design, G genes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_array
from torch import Tensor

from pipeline.gem.common.config import Data
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.model.mixed.terms import Design
from pipeline.gem.model.mixed.variance_components import fit_variances

VARIANCE_ROWS = 256  # metadata rows at most that variances are fitted on
LEAST_ROWS = 4  # with which a row effect is told from the effects of the terms
_SEED = 0  # of their choice
MIXED_TENSORS = ("intercept", "coefficients", "variance")  # of a model
_NEGLIGIBLE = 1e-6  # share of the variance of expression below which a term is left out
_LEAST_NOISE = 1e-4  # share of the variance of expression


@dataclass(frozen=True)
class MixedSamples:
    """N samples as the mixed model reads them; or one entry per row, pooled from its samples."""

    rows: csr_array  # (U, C) distinct metadata of all groups side by side
    index: np.ndarray  # (N,) row of each entry
    blocks: Callable[[], Iterable[tuple[np.ndarray, Tensor]]]  # (entries (B,), log-CPM (B, G))
    numbers: np.ndarray  # (U,) samples of each row
    gene_weights: np.ndarray  # (G,) of the genes, when variances are fitted
    gene_noise: np.ndarray  # (G,) variance of a sample that is known beside the fitted one

    def entries(self) -> np.ndarray:
        """(U,) entries of each row."""
        return np.bincount(self.index, minlength=self.rows.shape[0])


@dataclass(frozen=True)
class RowMeans:
    """Expression of all samples of R metadata rows."""

    rows: csr_array  # (R, C)
    numbers: np.ndarray  # (R,) samples
    means: np.ndarray  # (R, G)
    within: np.ndarray  # (G,) variance within rows; zero without a row of two entries
    gene_weights: np.ndarray  # (G,)

    @classmethod
    def of(cls, samples: MixedSamples, genes: int) -> "RowMeans":
        """Of VARIANCE_ROWS rows at random, or all."""
        rows = np.arange(samples.rows.shape[0])
        if len(rows) > VARIANCE_ROWS:
            rng = np.random.default_rng(_SEED)
            rows = np.sort(rng.choice(rows, VARIANCE_ROWS, replace=False))
        position = np.full(samples.rows.shape[0], -1)
        position[rows] = np.arange(len(rows))
        sums = np.zeros((len(rows), genes))
        squares = np.zeros(genes)
        for chosen, expression in samples.blocks():
            places = position[samples.index[chosen]]
            inside = places >= 0
            values = expression[torch.from_numpy(inside)].double().numpy()
            np.add.at(sums, places[inside], values)
            squares += (values**2).sum(axis=0)
        entries = samples.entries()[rows]
        means = sums / entries[:, None]
        freedom = entries.sum() - len(rows)
        squares -= (entries[:, None] * means**2).sum(axis=0)
        within = squares.clip(0) / freedom if freedom else np.zeros(genes)
        return cls(samples.rows[rows], samples.numbers[rows], means, within, samples.gene_weights)


@dataclass(frozen=True)
class MixedModel:
    """Predictions of log-CPM from metadata."""

    design: Design
    row_variance: float  # log-CPM squared, of the effect of a metadata row
    noise_variance: float  # of a sample within its row
    intercept: Tensor  # (G,)
    coefficients: Tensor  # (D, G)
    variance: Tensor  # (G,) of samples of a new metadata row around the prediction

    @classmethod
    def fit(
        cls, encoder: MetadataEncoder, data: Data, samples: MixedSamples, genes: int
    ) -> "MixedModel":
        """Variances from RowMeans, effects from all samples."""
        observed = RowMeans.of(samples, genes)
        design = Design.of(encoder, data, samples.rows, (observed.rows, observed.means))
        design = design.with_columns(encoder, samples.rows, genes)
        design, row_variance, noise = _fit_variances(design, encoder, observed)
        intercept, coefficients = _solve(design, encoder, [samples], genes, (row_variance, noise))
        variance = _prediction_variance(design, encoder, observed, row_variance, noise)
        return cls(design, row_variance, noise, intercept, coefficients, variance)

    def refit(self, encoder: MetadataEncoder, samples: Sequence[MixedSamples]) -> "MixedModel":
        """With effects from other samples, and the same variances."""
        genes = len(self.intercept)
        variances = self.row_variance, self.noise_variance
        solution = _solve(self.design, encoder, samples, genes, variances)
        learned = self.design, *variances, *solution, self.variance
        return MixedModel(*learned)

    def rows(self, encoder: MetadataEncoder, metadata: csr_array) -> MetadataRows:
        """The design of encoded metadata (U, C), as `predict` takes it."""
        matrix = self.design.matrix(encoder, metadata)
        return MetadataRows.from_sparse(matrix, self.coefficients.device)

    def predict(self, rows: MetadataRows) -> Tensor:
        """(U, G) log-CPM"""
        if not len(self.coefficients):
            return self.intercept.expand(len(rows), -1)
        effects = F.embedding_bag(
            rows.columns,
            self.coefficients,
            rows.offsets,
            mode="sum",
            per_sample_weights=rows.values,
            include_last_offset=True,
        )
        return effects.add_(self.intercept)


def _fit_variances(
    design: Design, encoder: MetadataEncoder, observed: RowMeans
) -> tuple[Design, float, float]:
    """(the design with variances, those of a row effect and of noise).

    With fewer than LEAST_ROWS rows nothing tells a row effect and noise from the effects of the
    terms: then the noise is that of replicates, if there are any. It is not where there are more
    rows: replicates of one batch share effects that the means of rows have in common.
    """
    kernels = [
        (matrix @ matrix.T).toarray().astype(np.float64)
        for matrix in design.matrices(encoder, observed.rows)
    ]
    of_mean, others = np.diag(1 / observed.numbers), []
    centred = observed.means - observed.means.mean(axis=0)
    weights = observed.gene_weights
    moment = (centred * weights) @ centred.T / weights.sum()
    within = float(np.average(observed.within, weights=weights))
    total = moment.trace() / len(moment) or within
    is_fitted = len(observed.numbers) >= LEAST_ROWS or within == 0
    if is_fitted:
        others = [of_mean] if (observed.numbers == 1).all() else [of_mean, np.eye(len(of_mean))]
    known = 0 * of_mean if is_fitted else within * of_mean
    variances = fit_variances([*kernels, *others], moment, known)
    noise, row_variance = [*variances[len(kernels) :], 0.0, 0.0][:2] if is_fitted else (within, 0.0)
    noise = max(float(noise), _LEAST_NOISE * total, np.finfo(np.float32).tiny)
    terms = variances[: len(kernels)].tolist()
    return design.with_variances(terms, _NEGLIGIBLE * total), float(row_variance), noise


def _solve(
    design: Design,
    encoder: MetadataEncoder,
    splits: Sequence[MixedSamples],
    genes: int,
    variances: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """(intercept (G,), effects (D, G)) of the mixed model equations, over the samples of all
    splits."""
    row_variance, noise = variances
    deviations = design.deviations()
    solution = np.zeros((design.width + 1, genes))
    matrices = []
    for samples in splits:
        matrices.append(design.matrix(encoder, samples.rows).astype(np.float64))
        matrices[-1].data *= deviations[matrices[-1].indices]
    for known in np.unique(splits[0].gene_noise):
        alike = splits[0].gene_noise == known
        gram = np.diag([0.0, *np.ones(design.width)])
        for samples, matrix in zip(splits, matrices, strict=True):
            # The mean of n samples of a row has variance row_variance + noise / n.
            precision = 1 / (row_variance + (noise + known) / samples.numbers)
            weights = precision / samples.entries()
            gram += _bordered(matrix, precision)
            for chosen, expression in samples.blocks():
                index = samples.index[chosen]
                values = expression.double().numpy()[:, alike] * weights[index][:, None]
                solution[0, alike] += values.sum(axis=0)
                solution[1:, alike] += matrix[index].T @ values
        solution[:, alike] = cho_solve(cho_factor(gram, lower=True), solution[:, alike])
    effects = solution[1:] * deviations[:, None]
    return torch.from_numpy(solution[0]).float(), torch.from_numpy(effects).float().contiguous()


def _bordered(matrix: csr_array, weights: np.ndarray) -> np.ndarray:
    """(D + 1, D + 1) weighted Gram matrix of [1 | matrix]."""
    weighted = matrix.multiply(weights[:, None]).tocsr()
    result = np.empty((matrix.shape[1] + 1,) * 2)
    result[0, 0] = weights.sum()
    result[0, 1:] = result[1:, 0] = weighted.sum(axis=0)
    result[1:, 1:] = (matrix.T @ weighted).toarray()
    return result


def _prediction_variance(
    design: Design,
    encoder: MetadataEncoder,
    observed: RowMeans,
    row_variance: float,
    noise: float,
) -> Tensor:
    """(G,) mean squared error for samples of a row that is left out, in closed form: the residual
    of y given all others is (P y)_r / P_rr, with P = V^-1 - V^-1 1 (1' V^-1 1)^-1 1' V^-1."""
    matrix = design.matrix(encoder, observed.rows).astype(np.float64)
    matrix.data *= design.deviations()[matrix.indices]
    covariance = (matrix @ matrix.T).toarray()
    covariance += np.diag(row_variance + noise / observed.numbers)
    inverse = cho_solve(cho_factor(covariance, lower=True), np.eye(len(covariance)))
    ones = inverse.sum(axis=1)
    projection = inverse - np.outer(ones, ones) / ones.sum()
    leverage = np.diag(projection)[:, None].clip(np.finfo(float).tiny)
    left_out = (projection @ observed.means / leverage) ** 2
    # Of row means; a single sample has the whole noise.
    of_sample = left_out + observed.within * (1 - 1 / observed.numbers).clip(0)[:, None]
    variance = np.average(of_sample, axis=0, weights=observed.numbers)
    return torch.from_numpy(variance).float()
