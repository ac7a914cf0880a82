"""The bilinear model of perturbation effects of Ahlmann-Eltze, Huber & Anders (Nature Methods 2025), with ridge penalties.

    effect = b + G W p

b is the mean training effect, G the leading principal components of the training effects, p what describes a perturbation,
and W the coefficients that the ridge regression of the effects on p gives. Two such maps are added up:

1. p is the observable features of the perturbation, which a perturbation never seen has too;
2. p is the perturbation's coordinates on the leading principal components of what the first map leaves of the training
   effects, as the paper takes for genes without other features; zero for a perturbation never seen.

In each, p also holds dose and time, and their products with the features: the effect of a dose differs between
perturbations. Fitting them one after the other, rather than at once, keeps the second (which fits seen perturbations
best) from taking what the first could say of unseen ones.

N samples, T treatments (perturbation, dose, time), G genes, F features of a perturbation, S columns of dose and time, D = S + F + F S, K components.
Expression is log-CPM, an effect a difference of log-CPM.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.data.encoder import CovariateEncoder, MetadataEncoder, label_texts
from pipeline.gem.data.splits import is_control
from pipeline.gem.evaluation.baselines import Additive, treatments

COMPONENTS = 50  # at most, of G and of the second map's p
PENALTIES = tuple(10.0**power for power in np.arange(-4, 2.1, 0.5))  # per treated training sample
WITHOUT_CHOICE = (
    0.1,
    10,
)  # penalty and components, as in the authors' script (whose penalty is per fit, not per sample)
ROUNDING = 1e-10  # a squared singular value below this share of the largest is rounding


@dataclass(frozen=True)
class Describer:
    """p of a sample: the features of its perturbation, its dose and time, and their products."""

    column: str
    features: pd.DataFrame  # (perturbations, F); a perturbation that it lacks has zeros
    strength: MetadataEncoder  # dose and time

    def __call__(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, D)"""
        strength = self.strength.encode(samples, unknown="missing")["perturbation"].astype(
            np.float64
        )
        features = (
            self.features.reindex(label_texts(samples[self.column]).to_numpy())
            .fillna(0.0)
            .to_numpy()
        )
        products = features[:, :, None] * strength[:, None, :]
        return np.concatenate(
            [
                strength,
                features,
                products.reshape(len(samples), features.shape[1] * strength.shape[1]),
            ],
            axis=1,
        )


@dataclass(frozen=True)
class Effects:
    """What is still to be explained of the effects of T treatments, each the mean over its samples.

    p is the same within a treatment, so a sum of squared errors over samples is one over treatments, weighted, and a constant.
    """

    samples: pd.DataFrame  # T rows, one sample for each treatment
    perturbation: pd.Series  # (T,)
    values: np.ndarray  # (T, G)
    weights: np.ndarray  # (T,) numbers of samples

    @classmethod
    def of(cls, additive: Additive, samples: pd.DataFrame, expression: np.ndarray) -> "Effects":
        """Differences of the treated samples to their matched controls."""
        treated = ~is_control(samples, additive.data).to_numpy()
        rows = samples[treated]
        exact, perturbation = treatments(rows, additive.data)
        codes, _ = pd.factorize((exact + " / " + perturbation).to_numpy(), sort=True)
        shifts = expression[treated].astype(np.float64) - additive.no_change(rows)
        first = pd.Series(np.arange(len(rows))).groupby(codes).first().to_numpy(dtype=np.int64)
        return cls(
            rows.iloc[first],
            perturbation.iloc[first],
            pd.DataFrame(shifts).groupby(codes).mean().to_numpy(),
            np.bincount(codes),
        )

    def less(self, explained: np.ndarray) -> "Effects":
        return replace(self, values=self.values - explained)

    def by_perturbation(self) -> tuple[pd.DataFrame, np.ndarray]:
        """((perturbations, G) mean over samples, their numbers)."""
        names = self.perturbation.to_numpy()
        numbers = pd.Series(self.weights).groupby(names).sum()
        return pd.DataFrame(self.values * self.weights[:, None]).groupby(names).sum().div(
            numbers, axis=0
        ), numbers.to_numpy()


@dataclass(frozen=True)
class BilinearMap:
    """One term G W p, p centred on the training samples."""

    describe: Describer
    centre: np.ndarray  # (D,)
    weights: np.ndarray  # (D, K) transposed W
    components: np.ndarray  # (G, K) orthonormal
    penalty: float  # per treated training sample

    @classmethod
    def fit(cls, describe: Describer, effects: Effects, choice: Effects) -> "BilinearMap":
        """Ridge of centred effects; the penalty and number of components with the least squared error on `choice`, if it has samples."""
        components = leading_components(effects.values, effects.weights)
        design = describe(effects.samples)
        centre = np.average(design, axis=0, weights=effects.weights)
        weighted = (design - centre).T * effects.weights
        values, vectors = np.linalg.eigh(weighted @ (design - centre))
        projected = vectors.T @ (weighted @ (effects.values @ components))

        def solve(penalty: float) -> np.ndarray:
            return vectors @ (
                projected / (values.clip(0) + penalty * effects.weights.sum())[:, None]
            )

        if len(choice.samples):
            asked, observed = describe(choice.samples) - centre, choice.values @ components
            errors = np.stack(
                [
                    squared_errors(asked @ solve(penalty), observed, choice.weights)
                    for penalty in PENALTIES
                ]
            )
            best, number = np.unravel_index(errors.argmin(), errors.shape)
            penalty = PENALTIES[best]
        else:
            penalty, number = WITHOUT_CHOICE
        return cls(describe, centre, solve(penalty)[:, :number], components[:, :number], penalty)

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return (self.describe(samples) - self.centre) @ self.weights @ self.components.T

    def rest(self, effects: Effects) -> Effects:
        """What this map leaves to explain."""
        return effects.less(self.predict(effects.samples))


def squared_errors(predicted: np.ndarray, observed: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(K + 1,) squared error with the first 0, 1, ..., K components, less that of none; both (T, K) in their coordinates.

    The components G are orthonormal: |y - G s|^2 = |y|^2 + sum over components of s^2 - 2 s (G^T y).
    """
    return np.concatenate([[0.0], np.cumsum(weights @ (predicted**2 - 2 * predicted * observed))])


@dataclass(frozen=True)
class Bilinear:
    """The matched control, plus the mean effect, plus the two maps.

    A perturbation without features that training never saw has the mean effect at its dose and time.
    """

    additive: Additive
    mean_effect: np.ndarray  # (G,)
    maps: tuple[
        BilinearMap, BilinearMap
    ]  # of observable features; of the effects that training saw

    @classmethod
    def fit(
        cls,
        data: Data,
        samples: pd.DataFrame,
        expression: np.ndarray,
        features: pd.DataFrame | None,
        choice: tuple[pd.DataFrame, np.ndarray] | None,
    ) -> "Bilinear":
        """Fitted on `samples`; penalties and numbers of components are chosen on `choice` (samples, expression), if there is one.

        `features` is indexed by perturbation, a numeric column per feature; None where there are none.
        ValueError where training lacks controls or treated samples.
        """
        additive = Additive(data, samples, expression)
        left = Effects.of(additive, samples, expression)
        held = Effects.of(additive, *(choice or (samples.iloc[:0], expression[:0])))
        mean_effect = np.average(left.values, axis=0, weights=left.weights)
        left, held = left.less(mean_effect), held.less(mean_effect)
        strength = strength_of(data, samples[~is_control(samples, data)])
        observable = BilinearMap.fit(
            Describer(data.control.column, standardised(features, left.perturbation), strength),
            left,
            held,
        )
        left, held = observable.rest(left), observable.rest(held)
        seen = BilinearMap.fit(
            Describer(data.control.column, coordinates(left), strength), left, held
        )
        return cls(additive, mean_effect, (observable, seen))

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        treated = ~is_control(samples, self.additive.data).to_numpy()
        prediction = self.additive.no_change(samples).astype(np.float64)
        prediction[treated] += self.mean_effect + sum(
            term.predict(samples[treated]) for term in self.maps
        )
        return prediction


def leading_components(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(G, K) orthonormal principal directions of values (T, G), each counted `weights` (T,) times; K <= COMPONENTS."""
    weighted = np.sqrt(weights)[:, None] * values
    # The eigenvectors of the smaller Gram matrix give the singular vectors at a fraction of the cost.
    wide = weighted.shape[0] <= weighted.shape[1]
    squares, vectors = np.linalg.eigh(weighted @ weighted.T if wide else weighted.T @ weighted)
    kept = np.flatnonzero(squares > ROUNDING * max(squares[-1], np.finfo(float).tiny))[::-1][
        :COMPONENTS
    ]
    return weighted.T @ vectors[:, kept] / np.sqrt(squares[kept]) if wide else vectors[:, kept]


def strength_of(data: Data, treated: pd.DataFrame) -> MetadataEncoder:
    """Dose, time: the numeric covariates of the perturbation, on their declared scale, standardised on the treated training samples."""
    numeric = {
        name: kind
        for name, kind in data.covariates.perturbation.items()
        if kind.kind == "numeric" and name in treated
    }
    return MetadataEncoder(
        {
            "perturbation": [
                CovariateEncoder.learn(name, kind, treated[name]) for name, kind in numeric.items()
            ]
        }
    )


def standardised(features: pd.DataFrame | None, perturbation: pd.Series) -> pd.DataFrame:
    """(perturbations, F) mean 0 and deviation 1 over the perturbations of training; a missing value is the mean."""
    if features is None:
        return pd.DataFrame(index=pd.Index([], dtype=object))
    table = features.set_axis(label_texts(pd.Series(features.index)), axis=0).astype(np.float64)
    seen = table[table.index.isin(perturbation)]
    deviation = seen.std(ddof=0)
    return ((table - seen.mean()) / deviation.where(deviation > 0, 1.0)).fillna(0.0)


def coordinates(effects: Effects) -> pd.DataFrame:
    """(perturbations, F) each one's mean effect on the leading components, scaled to mean squared length 1."""
    means, numbers = effects.by_perturbation()
    scores = means @ leading_components(means.to_numpy(), numbers)
    length = np.sqrt((scores.to_numpy() ** 2).sum(axis=1).mean())
    return scores / (length if length > 0 else 1.0)
