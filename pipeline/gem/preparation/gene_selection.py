"""Which genes a cohort keeps: those that training samples count, of a list, of highest variance. Totals are over all genes.

Every number here is of training samples alone: what a test counts chooses no gene.
N samples of the source, T of them of training, B of a chunk, G genes of the source.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.common.progress import Progress
from pipeline.gem.data.features import read_table
from pipeline.gem.data.labels import label_texts, list_cells
from pipeline.gem.data.sources import Source, check_counts
from pipeline.gem.preparation.qc import CountSummary

OVERDISPERSION = (
    0.01  # variance = mean + 0.01 mean^2: the null model of Lause, Berens and Kobak (theta = 100)
)
SHOWN = 20  # unknown genes in a message


def read_gene_list(data: Data, genes: pd.Series) -> list[str]:
    """The gene_ids of data.gene_list: a Parquet or CSV table with a column gene_id, else text, one a line. InputError where one is unknown."""
    path = Path(data.gene_list)
    if not path.exists():
        raise InputError(f"{path}: absent; data.gene_list names it")
    names = _texts(path)
    unknown = sorted(set(names) - set(genes.astype(str)))
    if unknown:
        raise InputError(
            f"{path}: genes {examples(unknown, SHOWN)} are not in {data.source}; expected a gene_id of its genes"
        )
    if not names:
        raise InputError(f"{path}: no gene; name one at least, or set data.gene_list to null")
    return names


def _texts(path: Path) -> list[str]:
    if path.suffix not in (".parquet", ".csv"):
        try:
            return [
                line.strip()
                for line in path.read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as a list of genes ({error})") from None
    table = read_table(path)
    if "gene_id" not in table:
        raise InputError(f"{path}: no column gene_id; found {examples(table.columns)}")
    if lists := list_cells(table["gene_id"], f"{path}: gene_id"):
        raise InputError(*lists)
    return label_texts(table["gene_id"]).dropna().tolist()


def select_genes(
    source: Source, census: CountSummary, listed: list[str] | None, targets: set[str], data: Data
) -> tuple[np.ndarray, list[str]]:
    """((G,) whether a gene is kept, what was left out and why). InputError where none is left.

    First the genes that training counts enough, since the density of a silent gene has no bound; of these the list's; of these
    the most variable. The `targets` of perturbations stay with whatever is chosen: how well they are predicted is scored.
    """
    names = source.genes["gene_id"].astype(str)
    notes: list[str] = []
    counted = _counted(census, data, notes)
    kept = counted
    if listed is not None:
        kept = counted & names.isin(listed).to_numpy()
        silent = names[~counted & names.isin(listed).to_numpy()]
        notes += (
            [
                f"genes {examples(silent)} of data.gene_list are left out all the same: training counts them too little"
            ]
            if len(silent)
            else []
        )
        _note(notes, counted, kept, "not in data.gene_list")
    if data.highly_variable is not None:
        before, kept = kept, _most_variable(source, census, kept, data)
        rule = f"not among the {data.highly_variable} whose Pearson residuals vary most between training samples"
        _note(notes, before, kept, rule)
    hit = counted & names.isin(targets).to_numpy() & ~kept
    if hit.any():
        notes.append(
            f"genes {examples(names[hit])} are kept beside these: perturbations of this cohort hit them"
        )
    if not (kept | hit).any():
        raise InputError(
            f"{data.source}: no gene is left of data.gene_list: training counts them too little; lower data.min_gene_samples"
        )
    return kept | hit, notes


def _note(notes: list[str], before: np.ndarray, after: np.ndarray, why: str) -> None:
    if dropped := int((before & ~after).sum()):
        notes.append(f"{dropped} of {int(before.sum())} genes are left out: {why}")


def _counted(census: CountSummary, data: Data, notes: list[str]) -> np.ndarray:
    """(G,) whether enough training samples count a gene, and count it often enough."""
    needed = (
        max(min(data.min_gene_samples, int(census.training.sum()) // 2), 1)
        if data.min_gene_samples
        else 0
    )
    everything = np.ones(len(census.counted), dtype=bool)
    seen = census.counted >= needed
    if not seen.any():
        raise InputError(
            f"{data.source}: no gene is counted in {needed} training samples; lower data.min_gene_samples"
        )
    _note(notes, everything, seen, f"counted in fewer than {needed} training samples")
    loud = seen & (census.sums >= data.min_gene_total)
    if not loud.any():
        raise InputError(
            f"{data.source}: no gene has {data.min_gene_total} counts over the training samples; lower data.min_gene_total"
        )
    _note(notes, seen, loud, f"fewer than {data.min_gene_total} counts over all training samples")
    return loud


def _most_variable(
    source: Source, census: CountSummary, candidates: np.ndarray, data: Data
) -> np.ndarray:
    """(G,) the data.highly_variable of the candidates (G,); the first in gene order where variances are equal."""
    if census.training.sum() < 2:
        raise InputError(
            f"{data.source}: data.highly_variable needs two training samples at least; set it to null"
        )
    variance = np.full(len(candidates), -np.inf)
    variance[candidates] = residual_variance(source, census, candidates, data)
    chosen = np.zeros_like(candidates)
    chosen[np.argsort(-variance, kind="stable")[: data.highly_variable]] = True
    return chosen & candidates


def residual_variance(
    source: Source, census: CountSummary, genes: np.ndarray, data: Data
) -> np.ndarray:
    """Variance over training samples of the Pearson residuals of each of the `genes` (G,), in one pass over the counts.

    A residual is (count - mu) / sqrt(mu + 0.01 mu^2) with mu = sample total x the gene's share of all training counts, clipped
    to +-sqrt(T): near 1 where a gene is as constant as counting allows (Lause, Berens and Kobak, Genome Biology 2021).
    """
    samples, names = source.samples["sample_id"].to_numpy(), source.genes["gene_id"].to_numpy()
    number = int(census.training.sum())
    share = census.sums[genes] / census.totals[census.training].sum()
    first, second = np.zeros(len(share)), np.zeros(len(share))
    progress = Progress("prepare: variance of genes", len(samples), "samples")
    for rows, stored in source.chunks():
        inside = census.training[rows]
        counts = check_counts(stored, samples[rows], names, data.source, source.advice)[inside][
            :, genes
        ]
        expected = census.totals[rows][inside][:, None] * share
        spread = np.sqrt(expected + OVERDISPERSION * expected**2)
        # A gene that training never counts has no residual.
        residual = np.divide(
            counts - expected, spread, out=np.zeros_like(expected), where=spread > 0
        ).clip(-np.sqrt(number), np.sqrt(number))
        first += residual.sum(axis=0)
        second += np.square(residual).sum(axis=0)
        progress.advance(len(rows))
    return second / number - np.square(first / number)
