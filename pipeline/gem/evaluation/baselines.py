"""Simple predictors that any model must beat, fitted on the training split, and the replicate.

The bilinear model is in `bilinear.py`. N samples, G genes, D columns of the design, T treatments,
C contexts. Expression is log-CPM, an effect a difference of log-CPM.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.common.config import GROUPS, Data
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.labels import join_keys, label_key
from pipeline.gem.data.references import SampleGroups

RIDGE_PENALTIES = tuple(10.0**power for power in np.arange(-2, 4.5, 0.5))


def training_mean(train: np.ndarray, rows: int) -> np.ndarray:
    """(rows, G) the mean of all training samples (N, G), in every row."""
    return np.broadcast_to(train.mean(axis=0, dtype=np.float64), (rows, train.shape[1]))


@dataclass(frozen=True)
class Ridge:
    """Ridge regression on one-hot metadata (numeric covariates standardised).

    An unknown level is encoded as missing.
    """

    encoder: MetadataEncoder
    coefficients: np.ndarray  # (D, G)
    centre: np.ndarray  # (D,)
    intercept: np.ndarray  # (G,)
    penalty: float

    @classmethod
    def fit(
        cls,
        encoder: MetadataEncoder,
        samples: pd.DataFrame,
        expression: np.ndarray,
        selection: tuple[pd.DataFrame, np.ndarray] | None,
    ) -> "Ridge":
        """The penalty with the least mse on `selection` (samples, expression); 1 without it."""
        design = cls._design(encoder, samples)
        centre, intercept = design.mean(axis=0), expression.mean(axis=0, dtype=np.float64)
        values, vectors = np.linalg.eigh((design - centre).T @ (design - centre))
        projected = vectors.T @ ((design - centre).T @ (expression - intercept))

        def solve(penalty: float) -> "Ridge":
            coefficients = vectors @ (projected / (values.clip(0) + penalty)[:, None])
            return cls(encoder, coefficients, centre, intercept, penalty)

        def mse(ridge: "Ridge") -> float:
            return float(np.mean((ridge.predict(selection[0]) - selection[1]) ** 2))

        if selection is None:
            return solve(1.0)
        return min((solve(penalty) for penalty in RIDGE_PENALTIES), key=mse)

    @staticmethod
    def _design(encoder: MetadataEncoder, samples: pd.DataFrame) -> np.ndarray:
        encoded = encoder.encode(samples, unknown="missing")
        parts = [encoded[group].matrix().toarray() for group in GROUPS]
        return np.concatenate(parts, axis=1).astype(np.float64)

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        design = self._design(self.encoder, samples)
        return (design - self.centre) @ self.coefficients + self.intercept


@dataclass(frozen=True)
class GroupMeans:
    """Means of groups of samples, looked up by keys, the most specific known key first."""

    tables: tuple[pd.DataFrame, ...]  # each (keys, G), most specific first

    @classmethod
    def fit(cls, keys: list[pd.Series], expression: np.ndarray) -> "GroupMeans":
        return cls(tuple(pd.DataFrame(expression).groupby(key.to_numpy()).mean() for key in keys))

    def lookup(self, keys: list[pd.Series]) -> np.ndarray:
        """(N, G); NaN rows where no key is known."""
        result = self.tables[0].reindex(keys[0].to_numpy()).to_numpy()
        for table, key in zip(self.tables[1:], keys[1:], strict=True):
            absent = np.isnan(result).any(axis=1)
            if not absent.any():
                break
            result[absent] = table.reindex(key.to_numpy()[absent]).to_numpy()
        return result


def control_keys(groups: SampleGroups) -> list[pd.Series]:
    """Keys by which the control of a baseline matches: context and study; context; all."""
    return [groups.study_context, groups.context, groups.everything]


def treatment_keys(groups: SampleGroups) -> list[pd.Series]:
    """Perturbation, dose and time (all covariates of the group); perturbation."""
    return [groups.treatment, groups.perturbation]


def training_controls(samples: pd.DataFrame, data: Data) -> np.ndarray:
    """(N,) bool, which are controls. ValueError without any, or if all are."""
    control = SampleGroups(samples, data).control.to_numpy()
    if not control.any() or control.all():
        raise ValueError("training needs both controls and treated samples")
    return control


class PerturbedMean:
    """The mean of all treated training samples; for a control, of all training controls.

    "Mean" in the comparison of Ahlmann-Eltze et al. (Nature Methods 2025).
    """

    def __init__(self, data: Data, samples: pd.DataFrame, expression: np.ndarray):
        training_controls(samples, data)
        self.data = data
        self.means = GroupMeans.fit(self._keys(samples), expression)

    def _keys(self, samples: pd.DataFrame) -> list[pd.Series]:
        return [SampleGroups(samples, self.data).control]

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return self.means.lookup(self._keys(samples))


class MatchedMean(PerturbedMean):
    """The perturbed mean within the sample's context; over all contexts if training has none."""

    def _keys(self, samples: pd.DataFrame) -> list[pd.Series]:
        groups = SampleGroups(samples, self.data)
        return [join_keys([groups.context, label_key(groups.control)]), groups.control]


class Additive:
    """`no_change`: the mean of the matched controls. `predict`: plus the mean treatment effect.

    Controls match by context and study, else by context, else all. The effect is the mean over
    contexts of the same perturbation, dose and time; else of the perturbation; else of all treated
    samples.
    """

    def __init__(self, data: Data, samples: pd.DataFrame, expression: np.ndarray):
        self.data = data
        control = training_controls(samples, data)
        controls, treated = SampleGroups(samples[control], data), samples[~control]
        self.controls = GroupMeans.fit(control_keys(controls), expression[control])
        shifts = expression[~control] - self.no_change(treated)
        self.effects = GroupMeans.fit(self._effect_keys(treated), shifts)

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
        prediction[treated] += self.effects.lookup(self._effect_keys(samples[treated]))
        return prediction


@dataclass(frozen=True)
class EffectsByContext:
    """The mean effect of each treatment in each context where it was measured."""

    treatments: pd.Index  # (T,)
    contexts: pd.Index  # (C,)
    measured: np.ndarray  # (T, C) bool
    effects: pd.DataFrame  # (measured pairs, G), by treatment * C + context

    @classmethod
    def fit(
        cls, treatment: pd.Series, context: pd.Series, shifts: np.ndarray
    ) -> "EffectsByContext":
        rows, treatments = pd.factorize(treatment.to_numpy(), sort=True)
        columns, contexts = pd.factorize(context.to_numpy(), sort=True)
        measured = np.zeros((len(treatments), len(contexts)), dtype=bool)
        measured[rows, columns] = True
        effects = pd.DataFrame(shifts).groupby(rows * len(contexts) + columns).mean()
        return cls(pd.Index(treatments), pd.Index(contexts), measured, effects)

    def nearest(
        self, treatment: pd.Series, context: pd.Series, similarity: pd.DataFrame
    ) -> np.ndarray:
        """(N, G) effect in the same context, else in the most similar one with this treatment.

        NaN rows where the treatment is unknown, or no similarity to such a context. A tie goes to
        the first name.
        """
        row = self.treatments.get_indexer(treatment)
        closeness = similarity.reindex(index=context, columns=self.contexts).fillna(-np.inf)
        same = context.to_numpy()[:, None] == self.contexts.to_numpy()
        closeness = np.where(same, np.inf, closeness.to_numpy())  # (N, C)
        closeness = np.where(self.measured[row], closeness, -np.inf)
        # -1 is no key: no similarity is known, or the treatment is unknown (row -1).
        pair = row * len(self.contexts) + closeness.argmax(axis=1)
        pair = np.where(closeness.max(axis=1) > -np.inf, pair, -1)
        return self.effects.reindex(pair).to_numpy()


class AdditiveNearest:
    """The matched control plus the effect of the same treatment in the most similar context.

    The treatment is the same perturbation, dose and time, else the same perturbation at any. The
    sample's own context is the most similar one; others are ordered by the correlation over genes
    of their mean training controls (all studies pooled). Where no similarity is known (a context
    that training lacks, or without controls), the effect is the treatment's mean over contexts;
    for an unknown perturbation, the mean effect in the sample's context, else overall.
    """

    def __init__(self, data: Data, samples: pd.DataFrame, expression: np.ndarray):
        self.data = data
        self.additive = Additive(data, samples, expression)
        control = training_controls(samples, data)
        context = SampleGroups(samples[control], data).context
        self.similarity = context_similarity(context, expression[control])
        treated = SampleGroups(samples[~control], data)
        shifts = expression[~control] - self.additive.no_change(samples[~control])
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
        groups = SampleGroups(samples[treated], self.data)
        effects = self.fallback.lookup(self._fallback_keys(groups))
        # The most specific level comes last and overwrites.
        for level, key in zip(self.levels[::-1], treatment_keys(groups)[::-1], strict=True):
            nearest = level.nearest(key, groups.context, self.similarity)
            effects = np.where(np.isnan(nearest), effects, nearest)
        prediction[treated] += effects
        return prediction


def context_similarity(context: pd.Series, expression: np.ndarray) -> pd.DataFrame:
    """(C, C) Pearson correlation over genes of the mean profiles of controls.

    NaN for a profile that is constant over genes.
    """
    profiles = pd.DataFrame(expression).groupby(context.to_numpy()).mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.atleast_2d(np.corrcoef(profiles.to_numpy(dtype=np.float64)))
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
