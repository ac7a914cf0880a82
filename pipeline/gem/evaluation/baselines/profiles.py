"""Mean expression of groups of samples, summed block after block: what baselines need of a split.

A group holds the controls of one study and context, or the treated samples of one context and
treatment. The means of larger groups, and the effects of treatments, follow from these. Memory
grows with groups and genes, not with samples.

N samples, U distinct rows of metadata among them, P groups, G genes. Expression is log-CPM.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from pipeline.gem.common.config import Data
from pipeline.gem.data.labels import join_keys
from pipeline.gem.data.references import SampleGroups


class SparseSums:
    """W' Y (K, G) of sparse weights W (N, K) and expression Y (N, G), block after block of rows."""

    def __init__(self, weights: Callable[[slice], csr_array], columns: int, genes: int):
        """`weights`: the rows (B, K) of W of a block."""
        self.weights, self.values = weights, np.zeros((columns, genes))
        self.samples = 0

    def add(self, block: np.ndarray) -> csr_array:
        """Adds the next rows (B, G); returns their weights."""
        rows = slice(self.samples, self.samples + len(block))
        self.samples = rows.stop
        weights = self.weights(rows)
        # Few columns occur in a block.
        used, position = np.unique(weights.indices, return_inverse=True)
        shape = len(block), len(used)
        local = csr_array((weights.data, position.reshape(-1), weights.indptr), shape=shape)
        self.values[used] += local.T @ block
        return weights


def one_hot(code: np.ndarray, number: int) -> csr_array:
    """(N, number) 1 in column `code` (N,); a row of -1 is empty."""
    known = code >= 0
    offsets = np.concatenate([[0], np.cumsum(known)])
    return csr_array((np.ones(known.sum()), code[known], offsets), shape=(len(code), number))


@dataclass(frozen=True)
class Groups:
    """P groups of samples."""

    samples: pd.DataFrame  # (P, ...) one sample of each
    sizes: np.ndarray  # (P,)
    values: np.ndarray  # (P, G) means

    def means(self, weights: csr_array) -> np.ndarray:
        """(K, G) for weights (K, P) of the groups."""
        return weights @ self.values

    def __getitem__(self, rows: slice) -> "Groups":
        return Groups(self.samples.iloc[rows], self.sizes[rows], self.values[rows])

    def joined(self, other: "Groups") -> "Groups":
        """Both; a group of both stands twice."""
        return Groups(
            pd.concat([self.samples, other.samples]),
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([self.values, other.values]),
        )


@dataclass(frozen=True)
class GroupMeans:
    """Means of groups of samples, looked up by keys, the most specific known key first."""

    tables: tuple[pd.DataFrame, ...]  # each (keys, G), most specific first

    @classmethod
    def fit(cls, keys: list[pd.Series], groups: "Groups | Shifts") -> "GroupMeans":
        """`keys`: each (P,) of the groups."""
        tables = []
        for key in keys:
            code, names = pd.factorize(key.to_numpy(), sort=True)
            weights = mean_weights(code, len(names), groups.sizes)
            tables.append(pd.DataFrame(groups.means(weights), index=names))
        return cls(tuple(tables))

    def lookup(self, keys: list[pd.Series]) -> np.ndarray:
        """(N, G); NaN rows where no key is known."""
        table, row = self.positions(keys)
        result = np.full((len(row), self.tables[0].shape[1]), np.nan)
        for number, values in enumerate(self.tables):
            result[table == number] = values.to_numpy()[row[table == number]]
        return result

    def positions(self, keys: list[pd.Series]) -> tuple[np.ndarray, np.ndarray]:
        """((N,) table with the most specific known key, -1 without one; (N,) its row there)."""
        table, row = np.full((2, len(keys[0])), -1)
        for number, (values, key) in enumerate(zip(self.tables, keys, strict=True)):
            found = values.index.get_indexer(key.to_numpy())
            new = (table < 0) & (found >= 0)
            table[new], row[new] = number, found[new]
        return table, row


def mean_weights(code: np.ndarray, number: int, sizes: np.ndarray) -> csr_array:
    """(number, P) weights of P groups of `sizes` (P,) in the means of larger groups, whose index is
    `code` (P,)."""
    of_all = np.bincount(code, weights=sizes, minlength=number)
    return csr_array((sizes / of_all[code], (code, np.arange(len(code)))), (number, len(code)))


def control_keys(groups: SampleGroups) -> list[pd.Series]:
    """Keys by which the control of a baseline matches: context and study; context; all."""
    return [groups.study_context, groups.context, groups.everything]


class Shifts:
    """Differences of treated samples to their matched controls, by group."""

    def __init__(self, profiles: "Profiles", controls: GroupMeans):
        """`controls` by `control_keys`, of `profiles` or of other samples."""
        treated, cells = profiles.treated, profiles.treated_cells
        self.groups, self.controls = treated, controls
        self.samples, self.sizes = treated.samples, treated.sizes
        table, row = controls.positions(control_keys(SampleGroups(cells.samples, profiles.data)))
        share = cells.sizes / treated.sizes[cells.group]
        self._matched = [  # by table: (P, keys) the share of a group's samples with this control
            csr_array(
                (share[table == number], (cells.group[table == number], row[table == number])),
                shape=(len(treated.sizes), len(values)),
            )
            for number, values in enumerate(controls.tables)
        ]

    def means(self, weights: csr_array) -> np.ndarray:
        """(K, G) for weights (K, P) of the groups."""
        result = self.groups.means(weights)
        for matched, values in zip(self._matched, self.controls.tables, strict=True):
            result -= (weights @ matched) @ values.to_numpy()
        return result


@dataclass(frozen=True)
class Cells:
    """U distinct rows of metadata."""

    samples: pd.DataFrame  # (U, ...) one sample of each
    sizes: np.ndarray  # (U,) numbers of samples
    group: np.ndarray  # (U,) index of the group


@dataclass(frozen=True)
class Profiles:
    """Groups of controls and of treated samples of a split."""

    data: Data
    groups: Groups  # first those of controls
    control_groups: int
    treated_cells: Cells
    squares: pd.DataFrame  # (contexts, G) sums of squares of the controls

    @classmethod
    def of(cls, data: Data, samples: pd.DataFrame, blocks: Iterable[np.ndarray]) -> "Profiles":
        """Of samples (N, ...) and their expression, block after block (B, G)."""
        sums = None
        for block in blocks:
            sums = sums or ProfileSums(data, samples, block.shape[1])
            sums.add(block)
        return sums.profiles()

    @property
    def controls(self) -> Groups:
        """By study and context."""
        return self.groups[: self.control_groups]

    @property
    def treated(self) -> Groups:
        """By context, perturbation, dose and time."""
        return self.groups[self.control_groups :]

    @property
    def mean(self) -> np.ndarray:
        """(G,) of all samples."""
        return self.groups.sizes @ self.groups.values / self.groups.sizes.sum()

    @cached_property
    def control_means(self) -> GroupMeans:
        """By `control_keys`."""
        controls = self.controls
        return GroupMeans.fit(control_keys(SampleGroups(controls.samples, self.data)), controls)

    @cached_property
    def shifts(self) -> Shifts:
        return Shifts(self, self.control_means)

    @property
    def has_both(self) -> bool:
        """Whether there are controls and treated samples."""
        return 0 < self.control_groups < len(self.groups.sizes)

    def require_both(self) -> None:
        """ValueError without controls, or without treated samples."""
        if not self.has_both:
            raise ValueError("training needs both controls and treated samples")


class ProfileSums:
    """The sums of `Profiles`, block after block of expression."""

    def __init__(self, data: Data, samples: pd.DataFrame, genes: int):
        self.data = data
        self.cell, first = distinct_metadata(data, samples)
        self.cells = samples.iloc[first]
        groups = SampleGroups(self.cells, data)
        control = groups.control.to_numpy()
        treatment = groups.condition
        if data.control is not None:
            treatment = join_keys([treatment, groups.perturbation])
        of_control, names = pd.factorize(groups.study_context.to_numpy()[control])
        of_treated, conditions = pd.factorize(treatment.to_numpy()[~control])
        self.controls = len(names)
        self.group = np.empty(len(first), dtype=np.int64)  # (U,), those of controls come first
        self.group[control], self.group[~control] = of_control, self.controls + of_treated
        context, self.contexts = pd.factorize(groups.context.where(groups.control).to_numpy())
        number = self.controls + len(conditions)
        self._sums = SparseSums(
            lambda rows: one_hot(self.group[self.cell[rows]], number), number, genes
        )
        self._squares = SparseSums(
            lambda rows: one_hot(context[self.cell[rows]], len(self.contexts)),
            len(self.contexts),
            genes,
        )

    def add(self, block: np.ndarray) -> None:
        """The next rows (B, G) of the samples."""
        self._sums.add(block)
        self._squares.add(np.square(block, dtype=np.float64))

    def profiles(self) -> Profiles:
        """Of the samples that were added. They stay the same when others are added."""
        numbers = np.bincount(self.cell[: self._sums.samples], minlength=len(self.cells))
        added = np.flatnonzero(numbers)
        cells, numbers = self.cells.iloc[added], numbers[added]
        names, first, group = np.unique(self.group[added], return_index=True, return_inverse=True)
        sizes = np.bincount(group, weights=numbers).astype(np.int64)
        values = self._sums.values[names]  # a copy
        values /= sizes[:, None]
        controls = int(np.searchsorted(names, self.controls))
        treated = group >= controls
        return Profiles(
            self.data,
            Groups(cells.iloc[first], sizes, values),
            controls,
            Cells(cells[treated], numbers[treated], group[treated] - controls),
            pd.DataFrame(self._squares.values.copy(), index=self.contexts),
        )


def distinct_metadata(data: Data, samples: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """((N,) index of the distinct row of each sample, (U,) first sample of each) in the columns
    that name context, study, control and treatment."""
    columns = [*data.context_columns, data.study_column, *data.covariates.perturbation]
    columns += [data.control.column] if data.control else []
    columns = [name for name in dict.fromkeys(columns) if name in samples]
    if not columns:
        return np.zeros(len(samples), dtype=np.int64), np.arange(min(1, len(samples)))
    by_row = samples[columns].groupby(columns, sort=False, dropna=False, observed=True)
    index = by_row.ngroup().to_numpy()
    return index, np.unique(index, return_index=True)[1]
