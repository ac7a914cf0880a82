"""What another measurement of the same condition says: the ceiling of data without a known truth. Not fitted on training.

N samples, G genes. Expression is log-CPM.
"""

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.data.labels import label_texts
from pipeline.gem.data.splits import contexts, joined


def replicate(
    samples: pd.DataFrame, expression: np.ndarray, declared: Data, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """((N, G) mean of the speaking half, (N, G) one sample of it) for the samples of the other half of each condition.

    The samples of a condition (context, perturbation, dose, time) in a study are split at random into a half that speaks
    and a half that is spoken for; so are, as one group, those without another of their condition in their study. Rows of
    the speaking half are NaN, as are samples without a replicate. If both halves spoke for each other, the mean of a
    condition's predictions would be the mean of its observations: a perturbation without effect would score 1 in
    `delta_pearson`, and everything else above what a second experiment can reach.

    No sample speaks twice as the one sample, whose spread within a condition is then that of measurements.
    By `sample_id` and seed, whatever the order of the rows.
    """
    order = np.argsort(samples["sample_id"].to_numpy(dtype=str), kind="stable")
    group, values = _groups(samples.iloc[order], declared), expression[order]
    shuffled = np.lexsort((np.random.default_rng(seed).random(len(group)), group))
    place = np.arange(len(group)) - np.searchsorted(group[shuffled], group[shuffled], side="left")
    heard = np.flatnonzero(
        place % 2 == 1
    )  # every second of a group; the one before it speaks for it
    speaking, spoken_for = shuffled[place % 2 == 0], shuffled[heard]
    means = pd.DataFrame(values[speaking], dtype=np.float64).groupby(group[speaking]).mean()
    mean, drawn = np.full((2, *expression.shape), np.nan)
    mean[order[spoken_for]] = means.reindex(group[spoken_for])
    drawn[order[spoken_for]] = values[shuffled[heard - 1]]
    return mean, drawn


def _groups(samples: pd.DataFrame, declared: Data) -> np.ndarray:
    """(N,) index of each sample's condition and study; of the condition alone for those that no other shares a study with."""
    condition = joined(
        [
            contexts(samples, declared),
            *(samples[name] for name in declared.covariates.perturbation if name in samples),
        ]
    )
    group = pd.factorize(condition)[0]
    if declared.study_column is None:
        return group
    study = label_texts(samples[declared.study_column])
    within = pd.factorize(joined([condition, study]))[0]
    # Two samples of unknown study are not known to share one.
    alone = study.isna().to_numpy() | (np.bincount(within)[within] < 2)
    return np.where(alone, group, len(samples) + within)
