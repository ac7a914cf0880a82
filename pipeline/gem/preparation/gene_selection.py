"""The genes that a cohort keeps: detected in training, in a list, of highest variance.

All rules use training samples only, so that no test count influences the choice. The totals of
samples remain those over all genes.
N samples of the source, T of them of training, B of a chunk, G genes of the source.
"""

import numpy as np

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.common.progress import Progress
from pipeline.gem.data.sources import Source, checked_chunks
from pipeline.gem.preparation.qc import CountSummary

# Variance = mean + 0.01 mean^2: the null model of Lause, Berens and Kobak (theta = 100).
OVERDISPERSION = 0.01


class _GeneFilter:
    """The genes that all filters have kept so far, and a note per filter."""

    def __init__(self, genes: int):
        self.kept, self.notes = np.ones(genes, dtype=bool), []

    def apply(self, passing: np.ndarray, reason: str, error: str | None = None) -> None:
        """Keeps the passing genes (G,). InputError with `error` if none is left."""
        kept = self.kept & passing
        if error and not kept.any():
            raise InputError(error)
        if excluded := int((self.kept & ~kept).sum()):
            self.notes.append(f"{excluded} of {int(self.kept.sum())} genes excluded: {reason}")
        self.kept = kept


def select_genes(
    source: Source,
    summary: CountSummary,
    gene_list: list[str] | None,
    targets: set[str],
    data: Data,
) -> tuple[np.ndarray, list[str]]:
    """((G,) whether a gene is kept, notes on excluded genes). InputError if none is left.

    The filters apply in this order: detection in training (the density of an undetected gene is
    unbounded), the gene list, variance. Detected `targets` of perturbations are kept in addition,
    because their prediction is scored.
    """
    names, filters = source.genes["gene_id"].astype(str), _GeneFilter(len(source.genes))
    _apply_count_filters(filters, summary, data)
    detected = filters.kept
    if gene_list is not None:
        listed = names.isin(gene_list).to_numpy()
        if (undetected := listed & ~detected).any():
            filters.notes.append(
                f"genes {examples(names[undetected])} of data.gene_list excluded: "
                "too few counts in training"
            )
        filters.apply(listed, "not in data.gene_list")
    if data.highly_variable is not None:
        filters.apply(
            _most_variable(source, summary, filters.kept, data),
            f"not among the {data.highly_variable} with the highest variance of Pearson residuals "
            "over training samples",
        )
    added = detected & names.isin(targets).to_numpy() & ~filters.kept
    if added.any():
        filters.notes.append(f"genes {examples(names[added])} kept as targets of perturbations")
    kept = filters.kept | added
    if not kept.any():
        raise InputError(
            f"{data.source}: no gene of data.gene_list is left: too few counts in training; "
            "lower data.min_gene_samples"
        )
    return kept, filters.notes


def _apply_count_filters(filters: _GeneFilter, summary: CountSummary, data: Data) -> None:
    minimum = 0
    if data.min_gene_samples:
        minimum = max(min(data.min_gene_samples, int(summary.in_training.sum()) // 2), 1)
    filters.apply(
        summary.detections >= minimum,
        f"detected in fewer than {minimum} training samples",
        f"{data.source}: no gene is detected in {minimum} training samples; "
        "lower data.min_gene_samples",
    )
    filters.apply(
        summary.gene_totals >= data.min_gene_total,
        f"fewer than {data.min_gene_total} counts over all training samples",
        f"{data.source}: no gene has {data.min_gene_total} counts over the training samples; "
        "lower data.min_gene_total",
    )


def _most_variable(
    source: Source, summary: CountSummary, candidates: np.ndarray, data: Data
) -> np.ndarray:
    """(G,) the data.highly_variable of the candidates (G,), the first of equally variable ones."""
    if summary.in_training.sum() < 2:
        raise InputError(
            f"{data.source}: data.highly_variable needs at least two training samples; "
            "set it to null"
        )
    variance = np.full(len(candidates), -np.inf)
    variance[candidates] = residual_variance(source, summary, candidates, data)
    selected = np.zeros_like(candidates)
    selected[np.argsort(-variance, kind="stable")[: data.highly_variable]] = True
    return selected & candidates


def residual_variance(
    source: Source, summary: CountSummary, genes: np.ndarray, data: Data
) -> np.ndarray:
    """Variance over training samples of the Pearson residuals of `genes` (G,) bool, in one pass.

    The residual is (count - mu) / sqrt(mu + 0.01 mu^2) with mu = sample total x the gene's share of
    all training counts, clipped to +-sqrt(T). Its variance is near 1 for a gene without biological
    variation (Lause, Berens and Kobak, Genome Biology 2021).
    """
    number = int(summary.in_training.sum())
    share = summary.gene_totals[genes] / summary.totals[summary.in_training].sum()
    first, second = np.zeros(len(share)), np.zeros(len(share))
    progress = Progress("prepare: variance of genes", len(source.samples), "samples")
    for rows, counts in checked_chunks(source, data.source):
        in_training = summary.in_training[rows]
        counts = counts[in_training][:, genes]
        expected = summary.totals[rows][in_training][:, None] * share
        deviation = np.sqrt(expected + OVERDISPERSION * expected**2)
        # A gene without training counts has no residual.
        residual = np.zeros_like(expected)
        np.divide(counts - expected, deviation, out=residual, where=deviation > 0)
        residual = residual.clip(-np.sqrt(number), np.sqrt(number))
        first += residual.sum(axis=0)
        second += np.square(residual).sum(axis=0)
        progress.advance(len(rows))
    return second / number - np.square(first / number)
