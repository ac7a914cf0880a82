"""What another measurement of the same condition says: the ceiling of data without a known truth. Not fitted on training.

N samples, G genes. Expression is log-CPM.
"""

import numpy as np
import pandas as pd

from pipeline.gem.config import Data
from pipeline.gem.metadata import label_texts
from pipeline.gem.splits import contexts, joined


def replicate(samples: pd.DataFrame, expression: np.ndarray, declared: Data, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """((N, G) mean of the other half, (N, G) one sample of the other half) of each sample's condition.

    A condition (context, perturbation, dose, time) is split at random into two halves: within the sample's study where
    that has two samples of it or more, else over all studies. A sample is in one half and only the other speaks for it.
    NaN rows where there is no other half. By `sample_id` and seed, whatever the order of the rows.
    """
    order = np.argsort(samples["sample_id"].to_numpy(dtype=str), kind="stable")
    ordered, values = samples.iloc[order], expression[order]
    rng = np.random.default_rng(seed)
    mean, drawn = np.full((2, *expression.shape), np.nan)
    for group in _groups(ordered, declared):
        half = _halves(group, rng)
        members = np.argsort(half, kind="stable")
        start = np.searchsorted(half[members], half ^ 1, side="left")
        number = np.searchsorted(half[members], half ^ 1, side="right") - start   # samples of the other half
        chosen = start + np.floor(rng.random(len(half)) * number).astype(np.int64)
        open_ = np.isnan(mean[:, :1]).all(axis=1) & (number > 0)
        drawn[open_] = values[members[chosen[open_]]]
        mean[open_] = pd.DataFrame(values, dtype=np.float64).groupby(half).mean().reindex(half[open_] ^ 1)
    back = np.argsort(order)
    return mean[back], drawn[back]


def _groups(samples: pd.DataFrame, declared: Data) -> list[np.ndarray]:
    """(N,) indices of each sample's condition in its study, then of its condition over studies."""
    condition = joined([contexts(samples, declared), *(samples[name] for name in declared.covariates.perturbation if name in samples)])
    groups = [pd.factorize(condition)[0]]
    if declared.study_column is not None:
        study = label_texts(samples[declared.study_column])
        within = pd.factorize(joined([condition, study]))[0]
        # Two samples of unknown study are not known to share one: each is alone.
        groups.insert(0, np.where(study.notna(), within, len(samples) + np.arange(len(samples))))
    return groups


def _halves(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) twice the group, plus 0 or 1 by turns in a random order: the other half of h is h ^ 1."""
    shuffled = np.lexsort((rng.random(len(group)), group))
    place = np.empty(len(group), dtype=np.int64)
    place[shuffled] = np.arange(len(group)) - np.searchsorted(group[shuffled], group[shuffled], side="left")
    return 2 * group + place % 2
