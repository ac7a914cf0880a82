"""How alike effects are in different contexts, without the noise of replicates.

N samples, G genes. Expression is log-CPM.
"""

from collections import defaultdict
from itertools import combinations

import numpy as np
import pandas as pd

from benchmarks.cohorts.controls import matched_controls
from pipeline.gem.common.config import Data
from pipeline.gem.data.references import SampleGroups

RELIABILITY = 0.2  # correlation of the two halves of an effect, from which it counts

Halves = tuple[np.ndarray, np.ndarray]  # (G,) each, an effect from disjoint samples


def context_correlations(
    expression: np.ndarray, samples: pd.DataFrame, data: Data, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """((pairs,) covariance over genes of the effects of one treatment in two contexts, (pairs,) the
    covariance that they would have if they were proportional).

    Effects are differences of treated samples and controls of one study and context, with equal
    times where there are such controls. Each is measured twice, by halves of both: products of
    different halves have no noise. Contexts of which an effect has a reliability below RELIABILITY
    are left out.
    """
    cross, proportional = [], []
    for effects in _effects(expression, samples, data, seed).values():
        for (first, one), (second, other) in combinations(effects, 2):
            if first != second:
                products = [_covariance(a, b) for a in one for b in other]
                cross.append(np.mean(products))
                proportional.append(np.sqrt(_covariance(*one) * _covariance(*other)))
    return np.array(cross), np.array(proportional)


def _effects(
    expression: np.ndarray, samples: pd.DataFrame, data: Data, seed: int
) -> dict[str, list[tuple[str, Halves]]]:
    """Treatment to (context, halves of its effect) in each study and context."""
    if data.control is None:
        return {}
    groups, rng = SampleGroups(samples, data), np.random.default_rng(seed)
    control = groups.control.to_numpy()
    keys = {"block": groups.study_context.to_numpy(), "treatment": groups.treatment.to_numpy()}
    table, context = pd.DataFrame(keys)[~control], groups.context.to_numpy()
    found = defaultdict(list)
    for (block, treatment), treated in sorted(table.groupby(["block", "treatment"]).groups.items()):
        pool = np.flatnonzero(control & (keys["block"] == block))
        (matched,) = matched_controls(samples.iloc[treated[:1]], samples.iloc[pool], data)
        sides = [rng.permutation(np.asarray(rows)) for rows in (treated, pool[matched])]
        if min(map(len, sides)) < 2:
            continue
        halves = tuple(
            np.subtract(*(expression[rows[part::2]].mean(axis=0) for rows in sides))
            for part in (0, 1)
        )
        variance = np.sqrt(_covariance(halves[0], halves[0]) * _covariance(halves[1], halves[1]))
        if variance > 0 and _covariance(*halves) >= RELIABILITY * variance:
            found[treatment].append((context[treated[0]], halves))
    return found


def _covariance(first: np.ndarray, second: np.ndarray) -> float:
    """Over genes."""
    return float(np.mean((first - first.mean()) * (second - second.mean())))
