"""What anyone could fit: the floors of every comparison. All fitted on the training split alone.

N samples, G genes, D columns of the design. Expression is log-CPM.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.config import GROUPS, Data
from pipeline.gem.metadata import MetadataEncoder, label_texts
from pipeline.gem.splits import contexts, is_control, joined

RIDGE_PENALTIES = tuple(10.0**power for power in np.arange(-2, 4.5, 0.5))


def training_mean(train: np.ndarray, rows: int) -> np.ndarray:
    """(rows, G) the mean of all training samples."""
    return np.broadcast_to(train.mean(axis=0, dtype=np.float64), (rows, train.shape[1]))


@dataclass(frozen=True)
class Ridge:
    """Ridge regression on the one-hot metadata (numeric covariates standardised); an unknown level is missing."""

    encoder: MetadataEncoder
    coefficients: np.ndarray   # (D, G)
    centre: np.ndarray         # (D,)
    intercept: np.ndarray      # (G,)
    penalty: float

    @classmethod
    def fit(cls, encoder: MetadataEncoder, samples: pd.DataFrame, expression: np.ndarray, choice: tuple[pd.DataFrame, np.ndarray] | None) -> "Ridge":
        """The penalty with the least mse on `choice` (samples, expression); 1 where there is no choice split."""
        design = cls._design(encoder, samples)
        centre, intercept = design.mean(axis=0), expression.mean(axis=0, dtype=np.float64)
        values, vectors = np.linalg.eigh((design - centre).T @ (design - centre))
        projected = vectors.T @ ((design - centre).T @ (expression - intercept))

        def solve(penalty: float) -> "Ridge":
            return cls(encoder, vectors @ (projected / (values.clip(0) + penalty)[:, None]), centre, intercept, penalty)

        if choice is None:
            return solve(1.0)
        return min((solve(penalty) for penalty in RIDGE_PENALTIES), key=lambda ridge: float(np.mean((ridge.predict(choice[0]) - choice[1]) ** 2)))

    @staticmethod
    def _design(encoder: MetadataEncoder, samples: pd.DataFrame) -> np.ndarray:
        encoded = encoder.encode(samples, unknown="missing")
        return np.concatenate([encoded[group] for group in GROUPS], axis=1).astype(np.float64)

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return (self._design(self.encoder, samples) - self.centre) @ self.coefficients + self.intercept


@dataclass(frozen=True)
class Means:
    """Group means of the training split, looked up by key, the most specific that exists first."""

    tables: tuple[pd.DataFrame, ...]   # each (keys, G), most specific first

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


class Additive:
    """`no_change`: the mean of matched controls. `additive`: that plus the mean effect of the treatment over contexts.

    Controls match by context and study, else by context, else all. The effect is that of the same perturbation, dose
    and time, else of the perturbation, else of all treated samples.
    """

    def __init__(self, data: Data, samples: pd.DataFrame, expression: np.ndarray):
        self.data = data
        control = is_control(samples, data).to_numpy()
        if not control.any() or control.all():
            raise ValueError("controls and treated samples are both needed in training")
        self.controls = Means.fit(self._places(samples[control]), expression[control])
        shifts = expression[~control] - self.no_change(samples[~control])
        self.effects = Means.fit(self._treatments(samples[~control]), shifts)

    def _places(self, samples: pd.DataFrame) -> list[pd.Series]:
        context = contexts(samples, self.data)
        everywhere = pd.Series("all", index=samples.index)
        if self.data.study_column is None:
            return [context, everywhere]
        return [context + " / " + label_texts(samples[self.data.study_column]).fillna("?"), context, everywhere]

    def _treatments(self, samples: pd.DataFrame) -> list[pd.Series]:
        names = [name for name in self.data.covariates.perturbation if name in samples]
        treatment = joined([samples[name] for name in names])
        return [treatment, label_texts(samples[self.data.control.column]).fillna("?"), pd.Series("all", index=samples.index)]

    def no_change(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return self.controls.lookup(self._places(samples))

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        treated = ~is_control(samples, self.data).to_numpy()
        prediction = self.no_change(samples)
        prediction[treated] += self.effects.lookup(self._treatments(samples[treated]))
        return prediction
