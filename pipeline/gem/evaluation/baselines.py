"""Simple predictors that any model must beat, fitted on the training split, and the replicate.

The bilinear model is in `bilinear.py`. N samples, G genes, D columns of the design, T treatments,
C contexts. Expression is log-CPM, an effect a difference of log-CPM.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array, hstack
from scipy.sparse.linalg import LinearOperator, cg

from pipeline.gem.common.config import GROUPS, Data
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.labels import join_keys, label_key
from pipeline.gem.data.references import SampleGroups

RIDGE_PENALTIES = tuple(10.0**power for power in np.arange(-2, 4.5, 0.5))
CLOSED_FORM_COLUMNS = 2048  # above, a decomposition takes longer than conjugate gradients
CG_TOLERANCE, CG_GENES = 1e-6, 64
_NEAREST_ROWS = 1024


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
        """The penalty with the least mse on `selection` (samples, expression); 1 without it.

        In closed form up to CLOSED_FORM_COLUMNS columns, by conjugate gradients above.
        """
        design = one_hot_design(encoder, samples)
        is_wide = design.shape[1] > CLOSED_FORM_COLUMNS
        solver = ConjugateGradients if is_wide else ClosedForm
        least_squares = solver(design, expression)
        penalty = 1.0
        if selection is not None:
            penalty = least_squares.best_penalty(
                one_hot_design(encoder, selection[0]), selection[1]
            )
        coefficients = least_squares.solve(penalty)
        mean = expression.mean(axis=0, dtype=np.float64)
        return cls(encoder, coefficients, mean - least_squares.centre @ coefficients, penalty)

    def predict(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, G)"""
        return one_hot_design(self.encoder, samples) @ self.coefficients + self.intercept


def one_hot_design(encoder: MetadataEncoder, samples: pd.DataFrame) -> csr_array:
    """(N, D) float64"""
    encoded = encoder.encode(samples, unknown="missing")
    return hstack([encoded[group].matrix() for group in GROUPS], format="csr", dtype=np.float64)


class ClosedForm:
    """Ridge regression of expression (N, G) on a centred design (N, D), for all penalties from one
    decomposition of the Gram matrix."""

    def __init__(self, design: csr_array, expression: np.ndarray):
        self.design, self.expression, self.centre = design, expression, design.mean(axis=0)
        self.mean = expression.mean(axis=0, dtype=np.float64)
        gram = (design.T @ design).toarray()
        gram -= len(expression) * np.outer(self.centre, self.centre)
        self.values, self.vectors = np.linalg.eigh(gram)
        self.projected = self.vectors.T @ (design.T @ (expression - self.mean))

    def solve(self, penalty: float) -> np.ndarray:
        """(D, G) coefficients"""
        return self.vectors @ (self.projected / (self.values.clip(0) + penalty)[:, None])

    def best_penalty(self, design: csr_array, expression: np.ndarray) -> float:
        """The penalty with the least mse on other samples."""

        def mse(penalty: float) -> float:
            coefficients = self.solve(penalty)
            intercept = self.mean - self.centre @ coefficients
            return float(np.mean((design @ coefficients + intercept - expression) ** 2))

        return min(RIDGE_PENALTIES, key=mse)


class ConjugateGradients:
    """As ClosedForm, by conjugate gradients with the inverse diagonal as preconditioner.

    Time grows with the entries of the design, memory with D times the genes of a block: the systems
    of several genes are solved as one. Relative to the right side, the residual is at most
    CG_TOLERANCE.
    """

    def __init__(self, design: csr_array, expression: np.ndarray):
        self.design, self.expression, self.centre = design, expression, design.mean(axis=0)
        self.transposed = design.T.tocsr()
        self.squares = design.power(2).sum(axis=0) - len(expression) * self.centre**2

    def solve(self, penalty: float) -> np.ndarray:
        """(D, G) float32 coefficients"""
        columns, genes = self.design.shape[1], self.expression.shape[1]
        coefficients = np.empty((columns, genes), dtype=np.float32)
        for start in range(0, genes, CG_GENES):
            block = slice(start, start + CG_GENES)
            coefficients[:, block] = self._solve(penalty, self._right_side(block), CG_TOLERANCE)
        return coefficients

    def best_penalty(self, design: csr_array, expression: np.ndarray) -> float:
        """The penalty with the least mse on other samples, over at most CG_GENES genes spread over
        all. From the largest on, the first that is better than the next: each starts from the
        solution of the last."""
        genes = np.unique(np.linspace(0, expression.shape[1] - 1, CG_GENES).astype(int))
        mean = self.expression[:, genes].mean(axis=0, dtype=np.float64)
        right, coefficients = self._right_side(genes), None
        best, least = RIDGE_PENALTIES[-1], np.inf
        for penalty in RIDGE_PENALTIES[::-1]:
            coefficients = self._solve(penalty, right, 100 * CG_TOLERANCE, coefficients)
            predicted = design @ coefficients + (mean - self.centre @ coefficients)
            mse = float(np.mean((predicted - expression[:, genes]) ** 2))
            if mse > least:
                break
            best, least = penalty, mse
        return best

    def _right_side(self, genes: slice | np.ndarray) -> np.ndarray:
        """(D, genes)"""
        values = self.expression[:, genes].astype(np.float64)
        return self.transposed @ (values - values.mean(axis=0))

    def _solve(
        self, penalty: float, right: np.ndarray, tolerance: float, start: np.ndarray | None = None
    ) -> np.ndarray:
        """(D, genes)"""
        shape, samples = right.shape, self.design.shape[0]
        diagonal = (self.squares + penalty)[:, None]

        def product(flat: np.ndarray) -> np.ndarray:
            values = flat.reshape(shape)
            result = self.transposed @ (self.design @ values) + penalty * values
            result -= np.outer(samples * self.centre, self.centre @ values)
            return result.reshape(-1)

        def precondition(flat: np.ndarray) -> np.ndarray:
            return (flat.reshape(shape) / diagonal).reshape(-1)

        size = (right.size, right.size)
        flat, failure = cg(
            LinearOperator(size, product, dtype=np.float64),
            right.reshape(-1),
            None if start is None else start.reshape(-1),
            rtol=tolerance,
            M=LinearOperator(size, precondition, dtype=np.float64),
        )
        if failure:
            raise RuntimeError(f"ridge: no solution for the penalty {penalty:g}")
        return flat.reshape(shape)


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
    measured: csr_array  # (T, C) bool
    effects: pd.DataFrame  # (measured pairs, G), by treatment * C + context

    @classmethod
    def fit(
        cls, treatment: pd.Series, context: pd.Series, shifts: np.ndarray
    ) -> "EffectsByContext":
        rows, treatments = pd.factorize(treatment.to_numpy(), sort=True)
        columns, contexts = pd.factorize(context.to_numpy(), sort=True)
        shape = len(treatments), len(contexts)
        measured = csr_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=shape)
        effects = pd.DataFrame(shifts).groupby(rows * len(contexts) + columns).mean()
        return cls(pd.Index(treatments), pd.Index(contexts), measured, effects)

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
