"""Spaces of expression: counts and log-CPM.

B samples, G genes. log-CPM is the natural log1p of counts per million of the sample's total.
"""

import numpy as np

CPM = 1e6


def log_cpm(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(B, G) float32 log-CPM of counts (B, G) with total counts (B,), which may span more genes. Totals must be positive."""
    totals = np.asarray(totals, dtype=np.float64)
    if (totals <= 0).any():
        raise ValueError(f"row {int(np.flatnonzero(totals <= 0)[0])} has no counts: its log-CPM is undefined")
    # In float64: rounding the logarithm once keeps the way back exact for counts below 2^20.
    return np.log1p(counts * (CPM / totals)[:, None]).astype(np.float32)


def counts_from_log_cpm(expression: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(B, G) int64 counts whose rows sum exactly to `totals` (B,), the inverse of `log_cpm`.

    Negative log-CPM are clipped at 0; a row without any expression cannot be scaled and raises ValueError.
    """
    linear = np.expm1(np.maximum(np.asarray(expression, dtype=np.float64), 0))
    sums = linear.sum(axis=1)
    if (sums <= 0).any():
        raise ValueError(f"row {int(np.flatnonzero(sums <= 0)[0])} has no expression in any gene: it cannot be scaled to a total")
    return round_to_totals(linear * (np.asarray(totals, dtype=np.float64) / sums)[:, None], totals)


def round_to_totals(values: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(B, G) int64 from values (B, G) that sum nearly to whole `totals` (B,): largest remainders are rounded up."""
    totals = np.asarray(totals)
    if np.any(totals != np.floor(totals)):
        raise ValueError("totals must be whole numbers of counts")
    whole = np.floor(values).astype(np.int64)
    missing = totals.astype(np.int64) - whole.sum(axis=1)
    remainders = values - whole
    # Stable, so that ties go to the first gene on every machine.
    rank = np.argsort(np.argsort(-remainders, axis=1, kind="stable"), axis=1, kind="stable")
    return whole + (rank < missing[:, None])
