"""One checked pass over all counts of a source: what splits, filters and integer types follow from.

N samples, G genes of the source.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.gem.common.config import Data
from pipeline.gem.common.progress import Progress
from pipeline.gem.data.sources import Source, check_counts
from pipeline.gem.data.splits import ROLES, TRAIN
from pipeline.gem.preparation.leakage import fingerprints


@dataclass(frozen=True)
class CountSummary:
    """What one pass over the counts found."""

    totals: np.ndarray  # (N,) over all genes of the source
    training: np.ndarray  # (N,) samples of training with any count
    counted: np.ndarray  # (G,) training samples with any count of the gene
    sums: np.ndarray  # (G,) counts of the gene over the training samples
    highest: dict[str, np.ndarray]  # role to (G,) largest count
    fingerprints: np.ndarray  # (N,) the same for the same counts


def summarise_counts(source: Source, roles: np.ndarray, data: Data) -> CountSummary:
    """One checked pass over all counts; `roles` (N,) of the samples."""
    samples, genes = source.samples["sample_id"].to_numpy(), source.genes["gene_id"].to_numpy()
    totals, found = np.zeros(len(samples), dtype=np.int64), np.empty(len(samples), dtype="S16")
    counted, sums = np.zeros(len(genes), dtype=np.int64), np.zeros(len(genes), dtype=np.int64)
    highest = {role: np.zeros(len(genes), dtype=np.int64) for role in ROLES}
    progress = Progress("prepare: checking", len(samples), "samples")
    for rows, stored in source.chunks():
        counts = check_counts(stored, samples[rows], genes, data.source, source.advice)
        totals[rows], found[rows] = counts.sum(axis=1), fingerprints(counts)
        training = counts[roles[rows] == TRAIN]
        counted += (training > 0).sum(axis=0)
        sums += training.sum(axis=0)
        for role in ROLES:
            highest[role] = np.maximum(
                highest[role], counts[roles[rows] == role].max(axis=0, initial=0)
            )
        progress.advance(len(rows))
    return CountSummary(totals, (roles == TRAIN) & (totals > 0), counted, sums, highest, found)
