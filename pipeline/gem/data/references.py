"""References: the control that stands for "this sample, untreated"."""

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.data.splits import contexts, is_control, joined


def matching_keys(samples: pd.DataFrame, data: Data) -> list[pd.Series]:
    """How well a control can match, best first: study, context and all biology; study and context; context."""
    context = contexts(samples, data)
    with_study = joined([context, samples[data.study_column]]) if data.study_column else context
    biology = [name for name in data.covariates.biological if name not in data.context_columns]
    if not biology:
        return [with_study, with_study, context]
    return [joined([with_study, *(samples[name] for name in biology)]), with_study, context]


def reference_lists(
    samples: pd.DataFrame, pool: pd.DataFrame, data: Data, same: bool = False
) -> list[np.ndarray]:
    """For each sample the positions in `pool` of the best matching controls; empty where there is none.

    `same` says that `pool` is `samples`: then no sample is its own reference.
    """
    controls = np.flatnonzero(is_control(pool, data).to_numpy())
    lists: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(samples)
    keys = (
        zip(matching_keys(samples, data), matching_keys(pool.iloc[controls], data), strict=True)
        if len(controls)
        else ()
    )
    for of_samples, of_controls in keys:
        groups = {
            name: rows.to_numpy()
            for name, rows in pd.Series(controls).groupby(of_controls.to_numpy())
        }
        candidates = [
            found if len(found) else groups.get(key, found)
            for found, key in zip(lists, of_samples, strict=True)
        ]
        lists = [found[found != row] if same else found for row, found in enumerate(candidates)]
    return lists


def choose_references(
    samples: pd.DataFrame, pool: pd.DataFrame, data: Data, seed: int
) -> np.ndarray | None:
    """(N,) position in `pool` of one reference per sample, chosen by seed; None where a sample has none."""
    rng = np.random.default_rng(seed)
    lists = reference_lists(samples, pool, data)
    if any(len(found) == 0 for found in lists):
        return None
    return np.array([rng.choice(found) for found in lists])
