"""Spaces of expression: counts and log-CPM.

B samples, G genes. log-CPM is the natural log1p of counts per million of the sample's total.
"""

import numpy as np

CPM = 1e6


def log_cpm(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(B, G) float32 log-CPM of counts (B, G) with total counts (B,), which may span more genes. Totals must be positive."""
    totals = np.asarray(totals, dtype=np.float64)
    if (totals <= 0).any():
        raise ValueError(
            f"row {int(np.flatnonzero(totals <= 0)[0])} has no counts: its log-CPM is undefined"
        )
    # In float64: rounding the logarithm once keeps the way back exact for counts below 2^20.
    return np.log1p(counts * (CPM / totals)[:, None]).astype(np.float32)


def counts_from_log_cpm(expression: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(B, G) int64 counts whose rows sum exactly to `totals` (B,), the inverse of `log_cpm`.

    Negative log-CPM are clipped at 0; a row without any expression cannot be scaled and raises ValueError.
    """
    linear = np.expm1(np.maximum(np.asarray(expression, dtype=np.float64), 0))
    sums = linear.sum(axis=1)
    if (sums <= 0).any():
        raise ValueError(
            f"row {int(np.flatnonzero(sums <= 0)[0])} has no expression in any gene: it cannot be scaled to a total"
        )
    return round_to_totals(linear * (np.asarray(totals, dtype=np.float64) / sums)[:, None], totals)


def round_to_totals(values: np.ndarray, totals: np.ndarray, dtype: type = np.int64) -> np.ndarray:
    """(B, G) whole counts from values (B, G) that sum nearly to whole `totals` (B,): largest remainders are rounded up.

    Ties go to the first gene, on every machine. ValueError where the totals are not whole, or not within G of the sums.
    """
    totals = np.asarray(totals)
    if np.any(totals != np.floor(totals)):
        raise ValueError("totals must be whole numbers of counts")
    whole = np.floor(values)
    missing = totals.astype(np.int64) - whole.sum(axis=1, dtype=np.float64).astype(np.int64)
    wrong = np.flatnonzero((missing < 0) | (missing > values.shape[1]))
    if len(wrong):
        raise ValueError(
            f"row {wrong[0]} sums to {values[wrong[0]].sum():g}, which rounding cannot bring to {totals[wrong[0]]}"
        )
    result = whole.astype(dtype)
    result += _largest(np.subtract(values, whole, out=whole), missing)
    return result


def _largest(remainders: np.ndarray, number: np.ndarray) -> np.ndarray:
    """(B, G) 0 or 1: the `number` (B,) largest of each row of remainders (B, G) in [0, 1), the first of equal ones.

    By 256 classes of size: bisection finds the class that the limit falls into, and only its members (some eight genes of
    2,000) are sorted.
    """
    classes = (remainders * 256).astype(np.uint8)
    limit = np.zeros(
        len(number), dtype=np.uint8
    )  # the highest class with `number` remainders in it and above it
    for bit in (128, 64, 32, 16, 8, 4, 2, 1):
        higher = limit | np.uint8(bit)
        limit = np.where(_true_in_row(classes >= higher[:, None]) >= number, higher, limit)
    above = classes > limit[:, None]
    left = number - _true_in_row(above)
    place = np.flatnonzero(classes == limit[:, None])
    rows = place // remainders.shape[1]
    order = np.lexsort(
        (-remainders.reshape(-1)[place], rows)
    )  # stable: of equal ones the first gene comes first
    place, rows = place[order], rows[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    chosen = above.view(np.uint8)
    chosen.reshape(-1)[place[rank < left[rows]]] = 1
    return chosen


def _true_in_row(mask: np.ndarray) -> np.ndarray:
    """(B,) how many of each row of a mask (B, G) are true; three times as fast as count_nonzero."""
    return np.bitwise_count(np.packbits(mask, axis=1)).sum(axis=1, dtype=np.int64)
