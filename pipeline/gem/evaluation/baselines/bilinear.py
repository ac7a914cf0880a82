"""The bilinear model of perturbation effects, with ridge penalties.

After Ahlmann-Eltze, Huber & Anders (Nature Methods 2025):

    effect = b + G W p

b is the mean effect, G the leading principal components of the effects, p a
description of the perturbation, and W the coefficients of the ridge regression of effects on p.
The model is the sum of two such maps:

1. p is the observable features of the perturbation, which an unknown perturbation has too;
2. p is the perturbation's coordinates on the leading principal components of the residual of the
   first map, as in the paper for genes without other features; zero for an unknown perturbation.

In each, p also holds dose and time and their products with the features: the effect of a dose
differs between perturbations. The maps are fitted one after the other. Fitted together, the second,
which fits known perturbations best, would replace the first, which also predicts unknown ones.

N samples, T treatments (perturbation, dose, time), G genes, F features of a perturbation, S columns
of dose and time, D = S + F + F S, K components. Expression is log-CPM, an effect a difference of
log-CPM.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data, Numeric
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.covariates import CovariateEncoder
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.labels import join_keys, label_key, label_texts, split_labels
from pipeline.gem.data.references import SampleGroups
from pipeline.gem.evaluation.baselines.profiles import Groups, Profiles, Shifts, mean_weights
from pipeline.gem.evaluation.baselines.simple import Additive, treatment_keys

COMPONENTS = 50  # at most, of G and of the second map's p
PENALTIES = tuple(10.0**power for power in np.arange(-4, 2.1, 0.5))
ROUNDING = 1e-10  # a squared singular value below this share of the largest is rounding


@dataclass(frozen=True)
class Complexity:
    """Of one map."""

    penalty: float  # per treated sample
    components: int  # at most


# Without a selection split: as in the authors' script, whose penalty is per fit.
DEFAULT = Complexity(penalty=0.1, components=10)


@dataclass(frozen=True)
class PerturbationDesign:
    """p of a sample: features of its perturbation, its dose and time, and their products."""

    column: str
    features: pd.DataFrame  # (perturbations, F); zeros for a perturbation that it lacks
    dose_time: MetadataEncoder

    def __call__(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, D)"""
        encoded = self.dose_time.encode(samples, unknown="missing")["perturbation"]
        dose_time = encoded.matrix().toarray().astype(np.float64)  # (N, S)
        names = label_key(samples[self.column]).to_numpy()
        features = self.features.reindex(names).fillna(0.0).to_numpy()  # (N, F)
        products = features[:, :, None] * dose_time[:, None, :]
        products = products.reshape(len(samples), features.shape[1] * dose_time.shape[1])
        return np.concatenate([dose_time, features, products], axis=1)


@dataclass(frozen=True)
class Effects:
    """Effects of T treatments, each the mean over its samples, or a residual of them.

    p is constant within a treatment: a sum of squared errors over samples equals the weighted sum
    over treatments plus a constant.
    """

    samples: pd.DataFrame  # T rows, one sample of each treatment
    perturbation: pd.Series  # (T,)
    values: np.ndarray  # (T, G)
    weights: np.ndarray  # (T,) float64 numbers of samples

    @classmethod
    def of(cls, shifts: Shifts, data: Data) -> "Effects":
        """Differences of the treated samples to their matched controls."""
        exact, perturbation = treatment_keys(SampleGroups(shifts.samples, data))
        codes, names = pd.factorize(join_keys([exact, perturbation]).to_numpy(), sort=True)
        _, first = np.unique(codes, return_index=True)
        weights = np.bincount(codes, weights=shifts.sizes, minlength=len(names))
        means = shifts.means(mean_weights(codes, len(names), shifts.sizes))
        return cls(shifts.samples.iloc[first], perturbation.iloc[first], means, weights)

    def none(self) -> "Effects":
        """Those of no treatment."""
        empty = slice(0)
        return Effects(
            self.samples[empty], self.perturbation[empty], self.values[empty], self.weights[empty]
        )

    def minus(self, explained: np.ndarray) -> "Effects":
        return replace(self, values=self.values - explained)

    def by_perturbation(self) -> tuple[pd.DataFrame, np.ndarray]:
        """((perturbations, G) mean over samples, (perturbations,) numbers of samples)."""
        names = self.perturbation.to_numpy()
        numbers = pd.Series(self.weights).groupby(names).sum()
        sums = pd.DataFrame(self.values * self.weights[:, None]).groupby(names).sum()
        return sums.div(numbers, axis=0), numbers.to_numpy()


@dataclass(frozen=True)
class BilinearMap:
    """One term G W p, p centred on the treated samples."""

    design: PerturbationDesign
    centre: np.ndarray  # (D,)
    weights: np.ndarray  # (D, K) transposed W
    components: np.ndarray  # (G, K) orthonormal
    complexity: Complexity

    @classmethod
    def fit(
        cls,
        design: PerturbationDesign,
        effects: Effects,
        selection: Effects,
        complexity: Complexity,
    ) -> "BilinearMap":
        """Ridge regression of centred effects.

        If `selection` has samples, the complexity is the one with the least squared error on them.
        """
        components = leading_components(effects.values, effects.weights)
        inputs = design(effects.samples)
        centre = np.average(inputs, axis=0, weights=effects.weights)
        weighted = (inputs - centre).T * effects.weights
        values, vectors = np.linalg.eigh(weighted @ (inputs - centre))
        projected = vectors.T @ (weighted @ (effects.values @ components))

        def solve(penalty: float) -> np.ndarray:
            ridge = values.clip(0) + penalty * effects.weights.sum()
            return vectors @ (projected / ridge[:, None])

        if len(selection.samples):
            inputs, observed = design(selection.samples) - centre, selection.values @ components
            errors = [
                cumulative_errors(inputs @ solve(penalty), observed, selection.weights)
                for penalty in PENALTIES
            ]
            best, number = np.unravel_index(np.argmin(errors), np.shape(errors))
            complexity = Complexity(PENALTIES[best], int(number))
        weights, leading = solve(complexity.penalty), slice(complexity.components)
        return cls(design, centre, weights[:, leading], components[:, leading], complexity)

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return (self.design(samples) - self.centre) @ self.weights @ self.components.T

    def residual(self, effects: Effects) -> Effects:
        return effects.minus(self.predict(effects.samples))


def cumulative_errors(
    predicted: np.ndarray, observed: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """(K + 1,) squared error with the first 0, 1, ..., K components, minus that with none.

    Both arguments are (T, K) coordinates. The components G are orthonormal:
    |y - G s|^2 = |y|^2 + sum over components of s^2 - 2 s (G^T y).
    """
    return np.concatenate([[0.0], np.cumsum(weights @ (predicted**2 - 2 * predicted * observed))])


@dataclass(frozen=True)
class Bilinear:
    """The matched control, plus the mean effect, plus the two maps.

    An unknown perturbation without features has the mean effect at its dose and time.
    """

    additive: Additive
    mean_effect: np.ndarray  # (G,)
    maps: tuple[BilinearMap, BilinearMap]  # of observable features; of effects

    @classmethod
    def fit(
        cls,
        profiles: Profiles,
        features: pd.DataFrame | None,
        selection: Profiles | None = None,
        complexities: tuple[Complexity, Complexity] = (DEFAULT, DEFAULT),
    ) -> "Bilinear":
        """Fitted on `profiles`, with these complexities of the maps; with those of least error on
        the treated samples of `selection`, if it has any.

        `features`: (perturbations, F), indexed by perturbation. ValueError if `profiles` lack
        controls or treated samples.
        """
        additive, data = Additive(profiles), profiles.data
        train = Effects.of(profiles.shifts, data)
        held_out = train.none()
        if selection is not None:
            held_out = Effects.of(Shifts(selection, profiles.control_means), data)
        mean_effect = np.average(train.values, axis=0, weights=train.weights)
        train, held_out = train.minus(mean_effect), held_out.minus(mean_effect)
        column = data.control.column
        dose_time = fit_dose_time(data, profiles.treated)
        table = standardise(features, train.perturbation)
        design = PerturbationDesign(column, table, dose_time)
        observable = BilinearMap.fit(design, train, held_out, complexities[0])
        train, held_out = observable.residual(train), observable.residual(held_out)
        design = PerturbationDesign(column, effect_coordinates(train), dose_time)
        of_effects = BilinearMap.fit(design, train, held_out, complexities[1])
        return cls(additive, mean_effect, (observable, of_effects))

    @property
    def complexities(self) -> tuple[Complexity, Complexity]:
        return self.maps[0].complexity, self.maps[1].complexity

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        treated = ~SampleGroups(samples, self.additive.data).control.to_numpy()
        prediction = self.additive.no_change(samples).astype(np.float64)
        effects = sum(term.predict(samples[treated]) for term in self.maps)
        prediction[treated] += self.mean_effect + effects
        return prediction


def leading_components(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(G, K) orthonormal principal directions of values (T, G), each counted `weights` (T,) times.

    K is at most COMPONENTS and the rank.
    """
    weighted = np.sqrt(weights)[:, None] * values
    # Eigenvectors of the smaller Gram matrix: a fraction of the cost of a full decomposition.
    wide = weighted.shape[0] <= weighted.shape[1]
    squares, vectors = np.linalg.eigh(weighted @ weighted.T if wide else weighted.T @ weighted)
    threshold = ROUNDING * max(squares[-1], np.finfo(float).tiny)
    leading = np.flatnonzero(squares > threshold)[::-1][:COMPONENTS]
    if wide:
        return weighted.T @ vectors[:, leading] / np.sqrt(squares[leading])
    return vectors[:, leading]


def fit_dose_time(data: Data, treated: Groups) -> MetadataEncoder:
    """The encoder of dose and time (numeric covariates of the perturbation group): on their
    declared scale, standardised on the treated samples."""
    encoders = [
        CovariateEncoder.fit(name, covariate, treated.samples[name].repeat(treated.sizes))
        for name, covariate in data.covariates.perturbation.items()
        if isinstance(covariate, Numeric) and name in treated.samples
    ]
    return MetadataEncoder({"perturbation": encoders})


def perturbation_features(cohort: Cohort) -> pd.DataFrame | None:
    """(perturbations, features) the declared features of the perturbation column, if any; of a set
    of labels their sum."""
    control = cohort.declared.control
    table = cohort.features.get(control.column) if control else None
    if table is None:
        return None
    features = pd.DataFrame(table.values, index=list(table.labels))
    texts = label_texts(cohort.samples[control.column]).dropna().unique()
    sets = {text: split_labels(text) for text in texts if text not in features.index}
    sums = {
        text: features.reindex(labels).sum()
        for text, labels in sorted(sets.items())
        if len(labels) > 1
    }
    return pd.concat([features, pd.DataFrame(sums).T]) if sums else features


def standardise(features: pd.DataFrame | None, perturbation: pd.Series) -> pd.DataFrame:
    """(perturbations, F) mean 0 and standard deviation 1 over `perturbation` (T,).

    A missing value is the mean. Without features F is 0.
    """
    if features is None:
        return pd.DataFrame(index=pd.Index([], dtype=object))
    table = features.set_axis(label_key(pd.Series(features.index)), axis=0).astype(np.float64)
    train = table[table.index.isin(perturbation)]
    deviation = train.std(ddof=0)
    return ((table - train.mean()) / deviation.where(deviation > 0, 1.0)).fillna(0.0)


def effect_coordinates(effects: Effects) -> pd.DataFrame:
    """(perturbations, F) mean effects on their leading components, of mean squared length 1."""
    means, numbers = effects.by_perturbation()
    scores = means @ leading_components(means.to_numpy(), numbers)
    length = np.sqrt((scores.to_numpy() ** 2).sum(axis=1).mean())
    return scores / (length if length > 0 else 1.0)
