"""Estimation of the linear mixed model: its variances, and the best linear unbiased effects.

Genes of similar mean expression form a class and share variances, for the noise of a count depends
on its size. Those of a class are fitted to half its own second moment and half that of all genes.
The effects follow from the mixed model equations (Henderson, Biometrics 1975; Robinson, Statistical
Science 1991).

N samples of U distinct metadata rows, C columns of the encoded metadata, D of the design, G genes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_array
from torch import Tensor

from pipeline.gem.common.config import Data
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.model.mixed.mixed_model import MixedModel, Variances
from pipeline.gem.model.mixed.terms import ROWS, Design
from pipeline.gem.model.mixed.variance_components import fit_variances, projection

VARIANCE_ROWS = 256  # metadata rows at most that variances are fitted on
LEAST_ROWS = 4  # with which a row effect is told from the effects of the terms
GENE_CLASSES, CLASS_GENES = 4, 100  # at most, and genes of each at least
OWN_MOMENT = 0.5  # weight of a class's own second moment
_SEED = 0  # of the choice of rows
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

    def moment(self, genes: np.ndarray) -> np.ndarray:
        """(R, R) weighted mean over the genes (G,) of the second moment of their deviations."""
        weights = self.gene_weights[genes]
        centred = self.means[:, genes] - self.means[:, genes].mean(axis=0)
        return (centred * weights) @ centred.T / weights.sum()

    def mean_within(self, genes: np.ndarray) -> float:
        return float(np.average(self.within[genes], weights=self.gene_weights[genes]))


@dataclass(frozen=True)
class MixedFit:
    """The design and variances of a cohort, from which models of its samples follow."""

    design: Design
    variances: tuple[Variances, ...]  # of each class of genes
    gene_class: np.ndarray  # (G,)
    variance: Tensor  # (G,) of samples of a new metadata row around the prediction

    @classmethod
    def of(
        cls, encoder: MetadataEncoder, data: Data, samples: MixedSamples, genes: int
    ) -> "MixedFit":
        """Variances from RowMeans."""
        observed = RowMeans.of(samples, genes)
        design = Design.of(encoder, data, samples.rows, (observed.rows, observed.means))
        design = design.with_columns(encoder, samples.rows, genes)
        gene_class = _gene_classes(samples, observed)
        design, variances = _fit_variances(design, encoder, observed, gene_class)
        variance = _prediction_variance(design, encoder, observed, variances, gene_class)
        return cls(design, variances, gene_class, variance)

    def model(self, encoder: MetadataEncoder, samples: MixedSamples) -> MixedModel:
        """With effects from the samples."""
        solution = _solve(self, encoder, samples)
        return MixedModel(self.design, self.variances, *solution, self.variance)

    def gene_groups(self, gene_noise: np.ndarray) -> Iterator[tuple[Variances, float, np.ndarray]]:
        """(variances, known noise, genes (G,)) of the genes that share both."""
        for number, variances in enumerate(self.variances):
            own = self.gene_class == number
            for known in np.unique(gene_noise[own]):
                yield variances, float(known), own & (gene_noise == known)


def _gene_classes(samples: MixedSamples, observed: RowMeans) -> np.ndarray:
    """(G,) classes of equal size by mean expression. One where noise is known for each gene, and
    where there are so many rows that the equations of several would take long."""
    genes = observed.means.shape[1]
    classes = min(GENE_CLASSES, genes // CLASS_GENES)
    if classes < 2 or samples.gene_noise.any() or samples.rows.shape[0] > VARIANCE_ROWS:
        return np.zeros(genes, dtype=np.int64)
    order = np.argsort(observed.means.mean(axis=0), kind="stable")
    gene_class = np.empty(genes, dtype=np.int64)
    gene_class[order] = np.arange(genes) * classes // genes
    return gene_class


def _fit_variances(
    design: Design, encoder: MetadataEncoder, observed: RowMeans, gene_class: np.ndarray
) -> tuple[Design, tuple[Variances, ...]]:
    """(the design without negligible terms, the variances of each class).

    With fewer than LEAST_ROWS rows nothing tells a row effect and noise from the effects of the
    terms: then the noise is that of replicates, if there are any. It is not where there are more
    rows: replicates of one batch share effects that the means of rows have in common.
    """
    kernels = [
        (matrix @ matrix.T).toarray().astype(np.float64)
        for matrix in design.matrices(encoder, observed.rows)
    ]
    treated = design.treated(encoder, observed.rows)
    targets = np.flatnonzero(treated) if treated.any() else np.arange(len(treated))
    every_gene = np.ones(len(gene_class), dtype=bool)
    total = observed.moment(every_gene)
    fitted = []
    for number in range(gene_class.max() + 1):
        own = observed.moment(gene_class == number)
        shared = total * (own.trace() / (total.trace() or 1.0))
        moment = OWN_MOMENT * own + (1 - OWN_MOMENT) * shared
        within = observed.mean_within(gene_class == number)
        fitted.append(_class_variances(kernels, observed.numbers, moment, within, targets))
    smallest = _NEGLIGIBLE * total.trace() / len(total)
    kept = [any(each.terms[k] > smallest for each in fitted) for k in range(len(kernels))]
    terms = [term for term, stays in zip(design.terms, kept, strict=True) if stays]
    variances = tuple(
        replace(each, terms=tuple(np.array(each.terms)[np.array(kept, dtype=bool)].tolist()))
        for each in fitted
    )
    return replace(design, terms=tuple(terms)), variances


def _class_variances(
    kernels: list[np.ndarray],
    numbers: np.ndarray,
    moment: np.ndarray,
    within: float,
    targets: np.ndarray,
) -> Variances:
    """For the second moment (R, R) of a class of genes, with this variance within rows."""
    of_mean, others = np.diag(1 / numbers), []
    total = moment.trace() / len(moment) or within
    is_fitted = len(numbers) >= LEAST_ROWS or within == 0
    if is_fitted:
        others = [of_mean] if (numbers == 1).all() else [of_mean, np.eye(len(of_mean))]
    known = 0 * of_mean if is_fitted else within * of_mean
    if len(numbers) < LEAST_ROWS:
        targets = targets[:0]
    values = fit_variances([*kernels, *others], moment, known, targets)
    noise, row = [*values[len(kernels) :], 0.0, 0.0][:2] if is_fitted else (within, 0.0)
    noise = max(float(noise), _LEAST_NOISE * total, np.finfo(np.float32).tiny)
    return Variances(tuple(values[: len(kernels)].tolist()), float(row), noise)


def _solve(fit: MixedFit, encoder: MetadataEncoder, samples: MixedSamples) -> tuple[Tensor, Tensor]:
    """(intercept (G,), effects (D, G)) of the mixed model equations. The design of ROWS metadata
    rows is in memory at a time."""
    genes, width = len(fit.gene_class), fit.design.width
    groups = list(fit.gene_groups(samples.gene_noise))
    group_of = np.empty(genes, dtype=np.int64)
    for number, (_, _, alike) in enumerate(groups):
        group_of[alike] = number
    rows = samples.rows.shape[0]

    @lru_cache(maxsize=1)
    def matrix(start: int) -> csr_array:
        chunk = samples.rows[start : start + ROWS]
        return fit.design.matrix(encoder, chunk).astype(np.float64)

    # The mean of n samples of a row has variance row + noise / n.
    precision = np.stack(
        [1 / (v.row + (v.noise + known) / samples.numbers) for v, known, _ in groups], axis=1
    )
    right, weights = np.zeros((width + 1, genes)), precision / samples.entries()[:, None]
    for chosen, expression in samples.blocks():
        index = samples.index[chosen]
        values = expression.double().numpy() * weights[index][:, group_of]
        right[0] += values.sum(axis=0)
        if rows > ROWS:
            right[1:] += fit.design.matrix(encoder, samples.rows[index]).T @ values
        else:
            right[1:] += matrix(0)[index].T @ values
    solution = np.empty_like(right)
    for number, (variances, _, alike) in enumerate(groups):
        scale = np.concatenate([[1.0], variances.deviations(fit.design)])
        gram = sum(
            _bordered(matrix(start), precision[start : start + ROWS, number])
            for start in range(0, rows, ROWS)
        )
        gram *= scale[:, None] * scale
        gram[np.arange(1, width + 1), np.arange(1, width + 1)] += 1
        factor = cho_factor(gram, lower=True, overwrite_a=True)
        solution[:, alike] = scale[:, None] * cho_solve(factor, scale[:, None] * right[:, alike])
    effects = torch.from_numpy(solution[1:]).float().contiguous()
    return torch.from_numpy(solution[0]).float(), effects


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
    variances: Sequence[Variances],
    gene_class: np.ndarray,
) -> Tensor:
    """(G,) mean squared error for samples of a row that is left out, in closed form: the residual
    of y given all others is (P y)_r / P_rr, with P as in `projection`."""
    matrix = design.matrix(encoder, observed.rows).astype(np.float64)
    result = np.empty(len(gene_class))
    # Of row means; a single sample has the whole noise.
    more = (1 - 1 / observed.numbers).clip(0)[:, None]
    for number, each in enumerate(variances):
        own = gene_class == number
        scaled = matrix.multiply(each.deviations(design)[None, :]).tocsr()
        covariance = (scaled @ scaled.T).toarray()
        covariance += np.diag(each.row + each.noise / observed.numbers)
        projected = projection(covariance)
        leverage = np.diag(projected)[:, None].clip(np.finfo(float).tiny)
        left_out = (projected @ observed.means[:, own] / leverage) ** 2
        of_sample = left_out + observed.within[own] * more
        result[own] = np.average(of_sample, axis=0, weights=observed.numbers)
    return torch.from_numpy(result).float()
