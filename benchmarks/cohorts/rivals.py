"""Simple predictors of whole conditions, as anyone would fit them to few samples.

Unlike the baselines of an evaluation they match controls by time, and know a level of each time
and dose.

R distinct rows of metadata, G genes. Expression is log-CPM, an effect a difference of log-CPM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from benchmarks.cohorts.controls import matched_controls
from pipeline.gem.common.config import Data, Numeric
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.labels import SET_KINDS, join_keys, label_key, label_texts, split_labels
from pipeline.gem.data.references import SampleGroups
from pipeline.gem.data.splits import VISIBLE
from pipeline.gem.evaluation.baselines.ridge import Design

PENALTY = 1.0  # of the ridge: the weight of one sample
RIVALS = {
    "no_change_at_time": "mean of the context's controls at the same time",
    "treatment_mean": "mean over contexts of the same perturbation, dose and time",
    "additive_at_time": "control at the same time plus the mean effect over contexts",
    "nearest_at_time": "the same plus the effect in the context with the most similar controls",
    "ridge_levels": "ridge regression on levels of all metadata, of numbers too",
}


def rival_predictions(
    cohort: Cohort, held_out: Mapping[str, pd.DataFrame]
) -> dict[str, dict[str, np.ndarray]]:
    """Rival to condition to its mean log-CPM (G,); none without a declared control. `held_out`: the
    samples of each condition."""
    if cohort.declared.control is None:
        return {}
    rivals = Rivals.fit(cohort)
    found = {name: rivals.predict(samples) for name, samples in held_out.items()}
    return {rival: {name: each[rival] for name, each in found.items()} for rival in RIVALS}


@dataclass(frozen=True)
class Rivals:
    """The mean expression of all samples with equal metadata, outside the test."""

    data: Data
    rows: pd.DataFrame  # (R, ...)
    sizes: np.ndarray  # (R,) samples
    values: np.ndarray  # (R, G)

    @classmethod
    def fit(cls, cohort: Cohort) -> "Rivals":
        splits = [name for name in VISIBLE if cohort.has(name)]
        samples, data = cohort.rows(splits), cohort.declared
        columns = dict.fromkeys([*data.context_columns, *data.covariates.all()])
        columns |= {data.control.column: None}
        key = join_keys([label_key(samples[name]) for name in columns])
        code, _ = pd.factorize(key.to_numpy())
        sums, start = np.zeros((code.max() + 1, len(cohort.genes))), 0
        for block in cohort.expression_blocks(splits):
            np.add.at(sums, code[start : start + len(block)], block)
            start += len(block)
        sizes = np.bincount(code).astype(float)
        _, first = np.unique(code, return_index=True)
        rows = samples.iloc[first].reset_index(drop=True)
        return cls(data, rows, sizes, sums / sizes[:, None])

    def predict(self, samples: pd.DataFrame) -> dict[str, np.ndarray]:
        """Rival to mean log-CPM (G,) of the samples of one condition."""
        context = SampleGroups(samples.iloc[[0]], self.data).context.item()
        control = self._control(samples.iloc[[0]])[0]
        rows = self._same_treatment(samples)
        if control is None:
            control = self._control_of_any_context(samples.iloc[[0]])
        found = dict.fromkeys(RIVALS, control) | {"ridge_levels": self._ridge(samples)}
        if len(rows):
            found["treatment_mean"] = self._mean(rows)
        # Of a set of perturbations that is nowhere else: the sum of those of its labels.
        parts = (
            [rows] if len(rows) else [self._same_treatment(each) for each in self._apart(samples)]
        )
        effects = [self._effects(each) for each in parts]
        if effects and all(effects):
            means = [np.mean(list(each.values()), axis=0) for each in effects]
            found["additive_at_time"] = control + sum(means)
            found["nearest_at_time"] = control + sum(
                self._nearest(context, each) for each in effects
            )
        return found

    def _apart(self, samples: pd.DataFrame) -> list[pd.DataFrame]:
        """The samples with each label of their set of perturbations; none without a set."""
        column = self.data.control.column
        covariate = self.data.covariates.all().get(column)
        if covariate is None or covariate.kind not in SET_KINDS:
            return []
        labels = split_labels(samples[column].iloc[0])
        return [samples.assign(**{column: label}) for label in labels] if len(labels) > 1 else []

    def _mean(self, rows: np.ndarray) -> np.ndarray:
        return np.average(self.values[rows], axis=0, weights=self.sizes[rows])

    def _control(self, samples: pd.DataFrame) -> list[np.ndarray | None]:
        found = matched_controls(samples, self.rows, self.data)
        return [self._mean(rows) if len(rows) else None for rows in found]

    def _control_of_any_context(self, samples: pd.DataFrame) -> np.ndarray:
        """(G,) for a context without controls: those of all contexts, at the same time where there
        are such; the mean of all samples if there is no control."""
        data = self.data.model_copy(update={"context_columns": ()})
        (rows,) = matched_controls(samples, self.rows, data)
        return self._mean(rows if len(rows) else np.arange(len(self.rows)))

    def _same_treatment(self, samples: pd.DataFrame) -> np.ndarray:
        """Rows of the same perturbation, dose and time; else of the perturbation at any."""
        own, groups = SampleGroups(samples.iloc[[0]], self.data), SampleGroups(self.rows, self.data)
        for name in ("treatment", "perturbation"):
            wanted = getattr(own, name).item()
            rows = np.flatnonzero((getattr(groups, name) == wanted).to_numpy())
            if len(rows):
                break
        return rows

    def _effects(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Context to the mean effect (G,) of its rows; contexts without controls are left out."""
        controls = self._control(self.rows.iloc[rows])
        contexts = SampleGroups(self.rows.iloc[rows], self.data).context.to_numpy()
        changes: dict[str, list[np.ndarray]] = {}
        for row, context, control in zip(rows, contexts, controls, strict=True):
            if control is not None:
                changes.setdefault(context, []).append(self.values[row] - control)
        return {context: np.mean(found, axis=0) for context, found in changes.items()}

    def _nearest(self, context: str, effects: Mapping[str, np.ndarray]) -> np.ndarray:
        """(G,) the effect in the context itself, else in that whose mean controls correlate best
        with its own; the mean effect for a context without controls."""
        if context in effects:
            return effects[context]
        groups = SampleGroups(self.rows, self.data)
        controls, contexts = groups.control.to_numpy(), groups.context.to_numpy()
        own = controls & (contexts == context)
        if not own.any():
            return np.mean(list(effects.values()), axis=0)
        similarity = {}
        for other in sorted(effects):
            profile = self._mean(np.flatnonzero(controls & (contexts == other)))
            similarity[other] = np.corrcoef(self._mean(np.flatnonzero(own)), profile)[0, 1]
        return effects[max(similarity, key=similarity.get)]

    @cached_property
    def _encoder(self) -> MetadataEncoder:
        return MetadataEncoder.fit(self.rows, self.data.covariates.identities())

    def _design(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, D) metadata, and a level of each number."""
        columns = [Design(self._encoder, samples).rows(slice(None)).toarray()]
        for name, covariate in self.data.covariates.all().items():
            if isinstance(covariate, Numeric):
                levels = sorted(label_texts(self.rows[name]).dropna().unique())
                texts = label_texts(samples[name]).to_numpy()
                columns.append(texts[:, None] == np.array(levels, dtype=object))
        return np.hstack(columns).astype(float)

    @cached_property
    def _regression(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """((D, G) coefficients, (D,) mean design, (G,) mean expression)."""
        design, root = self._design(self.rows), np.sqrt(self.sizes)[:, None]
        centre = np.average(design, axis=0, weights=self.sizes)
        mean = np.average(self.values, axis=0, weights=self.sizes)
        inputs, outputs = root * (design - centre), root * (self.values - mean)
        normal = inputs.T @ inputs + PENALTY * np.eye(inputs.shape[1])
        return np.linalg.solve(normal, inputs.T @ outputs), centre, mean

    def _ridge(self, samples: pd.DataFrame) -> np.ndarray:
        """(G,) the mean over the samples."""
        coefficients, centre, mean = self._regression
        return mean + (self._design(samples) - centre).mean(axis=0) @ coefficients
