"""Which samples belong together: the controls that match a sample, and its replicates.

The only home of these rules, for training, baselines and metrics:

`SampleGroups(samples, data)`  a text key per sample for context, study, treatment, condition
`.control_keys`                keys by which a control matches a sample, best first
`.replicates`                  index of each sample's condition within its study
`matching_controls`            positions of the best matching controls of each sample in a pool
`ControlGroups.of(samples, data)`  the same within one table, as indices into few arrays
`choose_references`            one of them per sample, drawn by seed

N samples, M of them controls.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.data.labels import join_keys, label_key, label_texts
from pipeline.gem.data.splits import contexts, is_control


class SampleGroups:
    """Keys (N,) of a table of samples; samples with an equal key belong together.

    All are joined keys with the index of `samples`.
    """

    def __init__(self, samples: pd.DataFrame, data: Data):
        self.samples, self.data = samples, data

    @cached_property
    def control(self) -> pd.Series:
        """Whether a sample is a control (bool)."""
        return is_control(self.samples, self.data)

    @cached_property
    def context(self) -> pd.Series:
        return contexts(self.samples, self.data)

    @cached_property
    def study(self) -> pd.Series:
        """One key for all samples if no study column is declared."""
        if self.data.study_column is None:
            return self.everything
        return label_key(self.samples[self.data.study_column])

    @cached_property
    def study_context(self) -> pd.Series:
        """Context and study; the context alone if no study column is declared."""
        if self.data.study_column is None:
            return self.context
        return join_keys([self.context, self.study])

    @cached_property
    def perturbation(self) -> pd.Series:
        """The control column, which names the perturbation. Needs a declared control."""
        return label_key(self.samples[self.data.control.column])

    @cached_property
    def treatment(self) -> pd.Series:
        """All covariates of the perturbation group that the table has: perturbation, dose, time."""
        keys = self._keys(self.data.covariates.perturbation)
        return join_keys(keys) if keys else self.everything

    @cached_property
    def condition(self) -> pd.Series:
        """Context and treatment."""
        return join_keys([self.context, *self._keys(self.data.covariates.perturbation)])

    @cached_property
    def everything(self) -> pd.Series:
        """One key for all samples."""
        return pd.Series("all", index=self.samples.index)

    @property
    def control_keys(self) -> list[pd.Series]:
        """How well a control matches, best first: study, context and all biological covariates;
        study and context; context."""
        context_columns = self.data.context_columns
        biology = [name for name in self.data.covariates.biological if name not in context_columns]
        exact = join_keys([self.study_context, *(label_key(self.samples[n]) for n in biology)])
        return [exact, self.study_context, self.context]

    @cached_property
    def replicates(self) -> np.ndarray:
        """(N,) index of the condition and study; of the condition alone for a sample that is the
        only one of its condition in its study, or whose study is missing."""
        condition = pd.factorize(self.condition)[0]
        if self.data.study_column is None:
            return condition
        within = pd.factorize(join_keys([self.condition, self.study]))[0]
        # Two samples of unknown study need not share one.
        unknown = label_texts(self.samples[self.data.study_column]).isna().to_numpy()
        single = unknown | (np.bincount(within)[within] < 2)
        return np.where(single, condition, len(self.samples) + within)

    def _keys(self, names: Iterable[str]) -> list[pd.Series]:
        """Of those of the columns that the table has."""
        return [label_key(self.samples[name]) for name in names if name in self.samples]


class ControlGroups(NamedTuple):
    """The best matching controls of each sample i of a table: `rows[start[i] : start[i] + size[i]]`
    without position `own[i]`, so that no sample is its own reference. A size without `own` of
    zero: no other control matches.

    Samples share the lists of their controls: memory does not grow with the size of the groups.
    """

    rows: np.ndarray  # (3 M,) controls by key, one order after another
    start: np.ndarray  # (N,)
    size: np.ndarray  # (N,) of candidates, without the sample itself
    own: np.ndarray  # (N,) position of the sample within its list; its length if it is not there

    @classmethod
    def of(cls, samples: pd.DataFrame, data: Data) -> "ControlGroups":
        groups, number = SampleGroups(samples, data), len(samples)
        controls = np.flatnonzero(groups.control.to_numpy())
        rows = [np.empty(0, dtype=np.int64)]
        start, size, own = (np.zeros(number, dtype=np.int64) for _ in range(3))
        for level, key in enumerate(groups.control_keys if len(controls) else ()):
            code, names = pd.factorize(key.to_numpy())
            order = np.argsort(code[controls], kind="stable")
            rows.append(controls[order])
            sizes = np.bincount(code[controls], minlength=len(names))
            first = np.cumsum(sizes) - sizes
            position = np.full(number, number)
            position[rows[-1]] = np.arange(len(controls)) - first[code[rows[-1]]]
            candidates = sizes[code] - (position < number)
            better = (size == 0) & (candidates > 0)
            start[better] = level * len(controls) + first[code[better]]
            size[better] = candidates[better]
            own[better] = position[better]
        return cls(np.concatenate(rows), start, size, own)


def matching_controls(samples: pd.DataFrame, pool: pd.DataFrame, data: Data) -> list[np.ndarray]:
    """For each sample the positions in `pool` of its best matching controls; empty without any."""
    controls = np.flatnonzero(is_control(pool, data).to_numpy())
    matches: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(samples)
    if not len(controls):
        return matches
    sample_keys = SampleGroups(samples, data).control_keys
    control_keys = SampleGroups(pool.iloc[controls], data).control_keys
    for of_samples, of_controls in zip(sample_keys, control_keys, strict=True):
        groups = pd.Series(controls).groupby(of_controls.to_numpy())
        positions = {key: rows.to_numpy() for key, rows in groups}
        for row, key in enumerate(of_samples):
            if not len(matches[row]):
                matches[row] = positions.get(key, matches[row])
    return matches


def choose_references(
    samples: pd.DataFrame, pool: pd.DataFrame, data: Data, seed: int
) -> np.ndarray | None:
    """(N,) position in `pool` of one matching control per sample, drawn by seed.

    None if any sample has no matching control.
    """
    rng = np.random.default_rng(seed)
    matches = matching_controls(samples, pool, data)
    if any(len(positions) == 0 for positions in matches):
        return None
    return np.array([rng.choice(positions) for positions in matches])
