"""What anyone could fit: the floors of every comparison. All fitted on the training split alone.

The bilinear model is in bilinear.py; the replicate, which is no fit, in replicate.py.
N samples, G genes, D columns of the design, T treatments, C contexts. Expression is log-CPM, an effect a difference of log-CPM.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.common.config import GROUPS, Data
from pipeline.gem.data.encoder import MetadataEncoder, label_texts
from pipeline.gem.data.splits import contexts, is_control, joined

RIDGE_PENALTIES = tuple(10.0**power for power in np.arange(-2, 4.5, 0.5))


def training_mean(train: np.ndarray, rows: int) -> np.ndarray:
    """(rows, G) the mean of all training samples."""
    return np.broadcast_to(train.mean(axis=0, dtype=np.float64), (rows, train.shape[1]))


@dataclass(frozen=True)
class Ridge:
    """Ridge regression on the one-hot metadata (numeric covariates standardised); an unknown level is missing."""

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
        choice: tuple[pd.DataFrame, np.ndarray] | None,
    ) -> "Ridge":
        """The penalty with the least mse on `choice` (samples, expression); 1 where there is no choice split."""
        design = cls._design(encoder, samples)
        centre, intercept = design.mean(axis=0), expression.mean(axis=0, dtype=np.float64)
        values, vectors = np.linalg.eigh((design - centre).T @ (design - centre))
        projected = vectors.T @ ((design - centre).T @ (expression - intercept))

        def solve(penalty: float) -> "Ridge":
            return cls(
                encoder,
                vectors @ (projected / (values.clip(0) + penalty)[:, None]),
                centre,
                intercept,
                penalty,
            )

        if choice is None:
            return solve(1.0)
        return min(
            (solve(penalty) for penalty in RIDGE_PENALTIES),
            key=lambda ridge: float(np.mean((ridge.predict(choice[0]) - choice[1]) ** 2)),
        )

    @staticmethod
    def _design(encoder: MetadataEncoder, samples: pd.DataFrame) -> np.ndarray:
        encoded = encoder.encode(samples, unknown="missing")
        return np.concatenate([encoded[group] for group in GROUPS], axis=1).astype(np.float64)

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return (
            self._design(self.encoder, samples) - self.centre
        ) @ self.coefficients + self.intercept


@dataclass(frozen=True)
class Means:
    """Group means of the training split, looked up by key, the most specific that exists first."""

    tables: tuple[pd.DataFrame, ...]  # each (keys, G), most specific first

    @classmethod
    def fit(cls, keys: list[pd.Series], expression: np.ndarray) -> "Means":
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


def places(samples: pd.DataFrame, data: Data) -> list[pd.Series]:
    """Where a control matches, best first: context and study; context; everywhere."""
    context = contexts(samples, data)
    everywhere = pd.Series("all", index=samples.index)
    if data.study_column is None:
        return [context, everywhere]
    return [
        context + " / " + label_texts(samples[data.study_column]).fillna("?"),
        context,
        everywhere,
    ]


def treatments(samples: pd.DataFrame, data: Data) -> list[pd.Series]:
    """What was done, most specific first: perturbation, dose and time (every covariate of the group); perturbation."""
    named = joined([samples[name] for name in data.covariates.perturbation if name in samples])
    return [named, label_texts(samples[data.control.column]).fillna("?")]


def controls_of(samples: pd.DataFrame, data: Data) -> np.ndarray:
    """(N,) which training samples are controls. ValueError where there are no controls, or nothing else."""
    control = is_control(samples, data).to_numpy()
    if not control.any() or control.all():
        raise ValueError("controls and treated samples are both needed in training")
    return control


class PerturbedMean:
    """The mean of all treated training samples for a treated sample, of all training controls for a control.

    "Mean" of the comparison of Ahlmann-Eltze et al. (Nature Methods 2025).
    """

    def __init__(self, data: Data, samples: pd.DataFrame, expression: np.ndarray):
        controls_of(samples, data)
        self.data = data
        self.means = Means.fit(self._keys(samples), expression)

    def _keys(self, samples: pd.DataFrame) -> list[pd.Series]:
        return [is_control(samples, self.data)]

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return self.means.lookup(self._keys(samples))


class MatchedMean(PerturbedMean):
    """The perturbed mean within the sample's context; over all contexts where training has no such sample there."""

    def _keys(self, samples: pd.DataFrame) -> list[pd.Series]:
        control = is_control(samples, self.data)
        return [contexts(samples, self.data) + " / " + control.astype(str), control]


class Additive:
    """`no_change`: the mean of matched controls. `additive`: that plus the mean effect of the treatment over contexts.

    Controls match by context and study, else by context, else all. The effect is that of the same perturbation, dose
    and time, else of the perturbation, else of all treated samples.
    """

    def __init__(self, data: Data, samples: pd.DataFrame, expression: np.ndarray):
        self.data = data
        control = controls_of(samples, data)
        self.controls = Means.fit(places(samples[control], data), expression[control])
        shifts = expression[~control] - self.no_change(samples[~control])
        self.effects = Means.fit(self._effect_keys(samples[~control]), shifts)

    def _effect_keys(self, samples: pd.DataFrame) -> list[pd.Series]:
        return [*treatments(samples, self.data), pd.Series("all", index=samples.index)]

    def no_change(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return self.controls.lookup(places(samples, self.data))

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        treated = ~is_control(samples, self.data).to_numpy()
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
        """(N, G) effect in the same context, else in the most similar of those where the treatment was measured.

        NaN rows where the treatment is unknown, or no similarity to such a context is. A tie goes to the first name.
        """
        row = self.treatments.get_indexer(treatment)
        closeness = (
            similarity.reindex(index=context, columns=self.contexts).fillna(-np.inf).to_numpy()
        )  # (N, C)
        closeness = np.where(
            context.to_numpy()[:, None] == self.contexts.to_numpy(), np.inf, closeness
        )
        closeness = np.where(self.measured[row], closeness, -np.inf)
        # A pair below zero is no key: where no similarity is known, or the treatment is unknown (row -1).
        pair = np.where(
            closeness.max(axis=1) > -np.inf, row * len(self.contexts) + closeness.argmax(axis=1), -1
        )
        return self.effects.reindex(pair).to_numpy()


class AdditiveNearest:
    """The matched control plus the effect of the same treatment in the most similar context.

    The treatment is the same perturbation, dose and time, else the same perturbation at any. The sample's own context is
    the most similar one, then by the correlation over genes of the contexts' mean training controls (all studies pooled).
    Where no similarity is known (a context never seen, or without controls), the effect is the treatment's mean over
    contexts; for a perturbation never seen, the mean effect of all perturbations in the sample's context, else overall.
    """

    def __init__(self, data: Data, samples: pd.DataFrame, expression: np.ndarray):
        self.data = data
        self.additive = Additive(data, samples, expression)
        control = controls_of(samples, data)
        self.similarity = similarity_of_contexts(
            contexts(samples[control], data), expression[control]
        )
        treated = samples[~control]
        shifts = expression[~control] - self.additive.no_change(treated)
        self.levels = [
            EffectsByContext.fit(key, contexts(treated, data), shifts)
            for key in treatments(treated, data)
        ]
        self.elsewhere = Means.fit(self._elsewhere_keys(treated), shifts)

    def _elsewhere_keys(self, samples: pd.DataFrame) -> list[pd.Series]:
        return [
            *treatments(samples, self.data),
            contexts(samples, self.data),
            pd.Series("all", index=samples.index),
        ]

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        prediction = self.additive.no_change(samples)
        treated = ~is_control(samples, self.data).to_numpy()
        rows = samples[treated]
        effects = self.elsewhere.lookup(self._elsewhere_keys(rows))
        # The most specific level comes last and overwrites.
        for level, key in zip(self.levels[::-1], treatments(rows, self.data)[::-1], strict=True):
            found = level.nearest(key, contexts(rows, self.data), self.similarity)
            effects = np.where(np.isnan(found), effects, found)
        prediction[treated] += effects
        return prediction


def similarity_of_contexts(context: pd.Series, expression: np.ndarray) -> pd.DataFrame:
    """(C, C) Pearson correlation over genes of the mean profiles of controls; NaN for a profile constant over genes."""
    profiles = pd.DataFrame(expression).groupby(context.to_numpy()).mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.atleast_2d(np.corrcoef(profiles.to_numpy(dtype=np.float64)))
    return pd.DataFrame(correlation, index=profiles.index, columns=profiles.index)
