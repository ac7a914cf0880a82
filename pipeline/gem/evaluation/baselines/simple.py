"""Simple predictors that any model must beat, and the replicate.

Ridge regression is in `ridge.py`, the bilinear model in `bilinear.py`. N samples, G genes,
T treatments, C contexts. Expression is log-CPM, an effect a difference of log-CPM.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from pipeline.gem.common.config import Data
from pipeline.gem.data.labels import SET_KINDS, join_keys, label_key, label_texts, split_labels
from pipeline.gem.data.references import SampleGroups
from pipeline.gem.evaluation.baselines.profiles import (
    GroupMeans,
    Profiles,
    Shifts,
    control_keys,
    mean_weights,
)

_NEAREST_ROWS = 1024


def training_mean(profiles: Profiles, rows: int) -> np.ndarray:
    """(rows, G) the mean of all samples of `profiles`, in every row."""
    mean = profiles.mean
    return np.broadcast_to(mean, (rows, len(mean)))


def treatment_keys(groups: SampleGroups) -> list[pd.Series]:
    """Perturbation, dose and time (all covariates of the group); perturbation."""
    return [groups.treatment, groups.perturbation]


def add_up_sets(
    effects: Callable[[pd.DataFrame], np.ndarray],
    samples: pd.DataFrame,
    data: Data,
    known: Collection[str],
) -> np.ndarray:
    """(N, G) `effects` of treated samples; of a set of perturbations "a|b" that is not `known` the
    sum of those of its labels, if each is known alone."""
    result, column = effects(samples), data.control.column
    covariate = data.covariates.all().get(column)
    if covariate is None or covariate.kind not in SET_KINDS:
        return result
    texts = label_texts(samples[column])
    for text in texts.dropna().unique():
        labels = split_labels(text)
        if len(labels) > 1 and text not in known and all(label in known for label in labels):
            rows = (texts == text).to_numpy()
            parts = (samples[rows].assign(**{column: label}) for label in labels)
            result[rows] = sum(effects(part) for part in parts)
    return result


def known_perturbations(treated: pd.DataFrame, data: Data) -> frozenset[str]:
    """The texts of the perturbations of treated samples."""
    return frozenset(label_texts(treated[data.control.column]).dropna())


class PerturbedMean:
    """The mean of all treated samples; for a control, of all controls.

    "Mean" in the comparison of Ahlmann-Eltze et al. (Nature Methods 2025).
    """

    def __init__(self, train: Profiles):
        """ValueError without controls, or without treated samples; so for all below."""
        train.require_both()
        self.data = train.data
        self.means = GroupMeans.fit(self._keys(train.groups.samples), train.groups)

    def _keys(self, samples: pd.DataFrame) -> list[pd.Series]:
        return [SampleGroups(samples, self.data).control]

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return self.means.lookup(self._keys(samples))


class MatchedMean(PerturbedMean):
    """The perturbed mean within the sample's context; over all contexts if it has none."""

    def _keys(self, samples: pd.DataFrame) -> list[pd.Series]:
        groups = SampleGroups(samples, self.data)
        return [join_keys([groups.context, label_key(groups.control)]), groups.control]


class Additive:
    """`no_change`: the mean of the matched controls. `predict`: plus the mean treatment effect.

    Controls match by context and study, else by context, else all. The effect is the mean over
    contexts of the same perturbation, dose and time; else of the perturbation; else of all treated
    samples. That of a set which training lacks is the sum of those of its labels.
    """

    def __init__(self, train: Profiles):
        train.require_both()
        self.data, self.controls = train.data, train.control_means
        self.effects = GroupMeans.fit(self._effect_keys(train.treated.samples), train.shifts)
        self.known = known_perturbations(train.treated.samples, train.data)

    def _effect_keys(self, samples: pd.DataFrame) -> list[pd.Series]:
        groups = SampleGroups(samples, self.data)
        return [*treatment_keys(groups), groups.everything]

    def no_change(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return self.controls.lookup(control_keys(SampleGroups(samples, self.data)))

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        treated = ~SampleGroups(samples, self.data).control.to_numpy()
        prediction = self.no_change(samples)
        prediction[treated] += add_up_sets(
            lambda part: self.effects.lookup(self._effect_keys(part)),
            samples[treated],
            self.data,
            self.known,
        )
        return prediction


@dataclass(frozen=True)
class EffectsByContext:
    """The mean effect of each treatment in each context where it was measured."""

    treatments: pd.Index  # (T,)
    contexts: pd.Index  # (C,)
    measured: csr_array  # (T, C) bool
    pairs: np.ndarray  # (measured pairs,) treatment * C + context, ascending
    weights: csr_array  # (measured pairs, groups of `shifts`)
    shifts: Shifts  # only asked for the means of pairs that are looked up

    @classmethod
    def fit(cls, treatment: pd.Series, context: pd.Series, shifts: Shifts) -> "EffectsByContext":
        rows, treatments = pd.factorize(treatment.to_numpy(), sort=True)
        columns, contexts = pd.factorize(context.to_numpy(), sort=True)
        shape = len(treatments), len(contexts)
        measured = csr_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=shape)
        pairs, code = np.unique(rows * len(contexts) + columns, return_inverse=True)
        weights = mean_weights(code, len(pairs), shifts.sizes)
        return cls(pd.Index(treatments), pd.Index(contexts), measured, pairs, weights, shifts)

    def nearest(
        self, treatment: pd.Series, context: pd.Series, similarity: pd.DataFrame
    ) -> np.ndarray:
        """(N, G) effect in the same context, else in the most similar one with this treatment.

        NaN rows where the treatment is unknown, or no similarity to such a context. A tie goes to
        the first name.
        """
        row, own = self.treatments.get_indexer(treatment), self.contexts.get_indexer(context)
        profile = similarity.index.get_indexer(context)
        table = similarity.reindex(columns=self.contexts).fillna(-np.inf).to_numpy()
        pair = np.full(len(row), -1)  # no key: no similarity is known, or the treatment is unknown
        for start in range(0, len(row), _NEAREST_ROWS):  # memory would grow with N C
            block = start + np.flatnonzero(row[start : start + _NEAREST_ROWS] >= 0)
            closeness = np.where(profile[block, None] >= 0, table[profile[block]], -np.inf)
            closeness[own[block, None] == np.arange(len(self.contexts))] = np.inf
            closeness[~self.measured[row[block]].toarray()] = -np.inf
            nearest = row[block] * len(self.contexts) + closeness.argmax(axis=1)
            pair[block] = np.where(closeness.max(axis=1) > -np.inf, nearest, -1)
        wanted, index = np.unique(pair[pair >= 0], return_inverse=True)
        effects = self.shifts.means(self.weights[np.searchsorted(self.pairs, wanted)])
        result = np.full((len(pair), effects.shape[1]), np.nan)
        result[pair >= 0] = effects[index]
        return result


class AdditiveNearest:
    """The matched control plus the effect of the same treatment in the most similar context.

    The treatment is the same perturbation, dose and time, else the same perturbation at any. The
    sample's own context is the most similar one; others are ordered by the correlation over genes
    of their mean controls (all studies pooled). Where no similarity is known (a context
    that training lacks, or without controls), the effect is the treatment's mean over contexts;
    for an unknown perturbation, the mean effect in the sample's context, else overall. That of a
    set which training lacks is the sum of those of its labels.
    """

    def __init__(self, train: Profiles):
        self.data, self.additive = train.data, Additive(train)
        _, of_contexts, _ = train.control_means.tables
        self.similarity = context_similarity(of_contexts)
        treated, shifts = SampleGroups(train.treated.samples, train.data), train.shifts
        self.levels = [
            EffectsByContext.fit(key, treated.context, shifts) for key in treatment_keys(treated)
        ]
        self.fallback = GroupMeans.fit(self._fallback_keys(treated), shifts)

    @staticmethod
    def _fallback_keys(groups: SampleGroups) -> list[pd.Series]:
        return [*treatment_keys(groups), groups.context, groups.everything]

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        prediction = self.additive.no_change(samples)
        treated = ~SampleGroups(samples, self.data).control.to_numpy()
        prediction[treated] += add_up_sets(
            self._effects, samples[treated], self.data, self.additive.known
        )
        return prediction

    def _effects(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G) of treated samples."""
        groups = SampleGroups(samples, self.data)
        effects = self.fallback.lookup(self._fallback_keys(groups))
        # The most specific level comes last and overwrites.
        for level, key in zip(self.levels[::-1], treatment_keys(groups)[::-1], strict=True):
            nearest = level.nearest(key, groups.context, self.similarity)
            effects = np.where(np.isnan(nearest), effects, nearest)
        return effects


def context_similarity(profiles: pd.DataFrame) -> pd.DataFrame:
    """(C, C) Pearson correlation over genes of the mean profiles (C, G) of controls.

    NaN for a profile that is constant over genes.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.atleast_2d(np.corrcoef(profiles.to_numpy()))
    return pd.DataFrame(correlation, index=profiles.index, columns=profiles.index)


def replicate(
    samples: pd.DataFrame, expression: np.ndarray, data: Data, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """((N, G) mean of a sample's replicates, (N, G) one of them): the ceiling of measured data.

    The replicates of each condition and study (`SampleGroups.replicates`) are split at random into
    a predictor half and a target half. Each target is predicted by the mean of the predictor half;
    rows of the predictor half and of samples without a replicate are NaN. If both halves predicted
    each other, the mean of a condition's predictions would be the mean of its observations: a
    perturbation without effect would score 1 in `delta_pearson`. No sample is the draw of two
    targets, so draws vary within a condition as measurements do.
    The result depends on `sample_id` and seed, not on the order of rows.
    """
    order = np.argsort(samples["sample_id"].to_numpy(dtype=str), kind="stable")
    group = SampleGroups(samples.iloc[order], data).replicates
    values = expression[order]
    shuffled = np.lexsort((np.random.default_rng(seed).random(len(group)), group))
    # Position within its group: even ones predict, each odd one is predicted.
    start = np.searchsorted(group[shuffled], group[shuffled], side="left")
    is_target = (np.arange(len(group)) - start) % 2 == 1
    predictor_half, target_half = shuffled[~is_target], shuffled[is_target]
    partner = shuffled[np.flatnonzero(is_target) - 1]
    half_means = pd.DataFrame(values[predictor_half], dtype=np.float64)
    half_means = half_means.groupby(group[predictor_half]).mean()
    mean, draw = np.full((2, *expression.shape), np.nan)
    mean[order[target_half]] = half_means.reindex(group[target_half])
    draw[order[target_half]] = values[partner]
    return mean, draw
