"""Quality control: one pass over all counts of a source.

Gene filters, integer types and the duplicate check use its results. N samples, G genes of the
source.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from pipeline.gem.common.config import Data
from pipeline.gem.common.progress import Progress
from pipeline.gem.data.sources import Source, checked_chunks
from pipeline.gem.data.splits import SPLIT_ROLES, TRAIN

MIN_FINGERPRINT_GENES = 20  # samples with fewer detected genes may have equal counts by chance


@dataclass(frozen=True)
class CountSummary:
    """Totals, extremes and fingerprints of the counts of a source."""

    totals: np.ndarray  # (N,) counts over all genes of the source
    in_training: np.ndarray  # (N,) bool, training samples with any count
    detections: np.ndarray  # (G,) training samples with any count of the gene
    gene_totals: np.ndarray  # (G,) counts of the gene over the training samples
    gene_maxima: dict[str, np.ndarray]  # role to (G,) largest count
    fingerprints: np.ndarray  # (N,) as of `fingerprint_counts`


def summarise_counts(source: Source, roles: np.ndarray, data: Data) -> CountSummary:
    """Validates and summarises all counts; `roles` (N,) are those of the samples."""
    samples, genes = len(source.samples), len(source.genes)
    totals, fingerprints = np.zeros(samples, dtype=np.int64), np.empty(samples, dtype="S16")
    detections, gene_totals = np.zeros(genes, dtype=np.int64), np.zeros(genes, dtype=np.int64)
    gene_maxima = {role: np.zeros(genes, dtype=np.int64) for role in SPLIT_ROLES}
    progress = Progress("prepare: checking", samples, "samples")
    for rows, counts in checked_chunks(source, data.source):
        totals[rows], fingerprints[rows] = counts.sum(axis=1), fingerprint_counts(counts)
        training = counts[roles[rows] == TRAIN]
        detections += (training > 0).sum(axis=0)
        gene_totals += training.sum(axis=0)
        for role, maxima in gene_maxima.items():
            np.maximum(maxima, counts[roles[rows] == role].max(axis=0, initial=0), out=maxima)
        progress.advance(len(rows))
    in_training = (roles == TRAIN) & (totals > 0)
    return CountSummary(totals, in_training, detections, gene_totals, gene_maxima, fingerprints)


def fingerprint_counts(counts: np.ndarray) -> np.ndarray:
    """(N,) a hash of each row of counts (N, G), empty for rows that may be equal by chance."""
    rows = np.ascontiguousarray(counts, dtype=np.uint32)
    detected_genes = (rows > 0).sum(axis=1)
    hashes = [
        hashlib.blake2b(row, digest_size=16).digest() if detected >= MIN_FINGERPRINT_GENES else b""
        for row, detected in zip(rows, detected_genes, strict=True)
    ]
    return np.array(hashes, dtype="S16")
