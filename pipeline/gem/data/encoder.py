"""The encoding of metadata as matrices, one per covariate group.

A missing value encodes as zeros and is always valid. An unknown value, one that is not in the
training split, is an error unless the caller treats it as missing.

N samples, D columns of a group, U distinct rows.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from pipeline.gem.common.config import GROUPS, Covariates
from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.data.covariates import (
    Cells,
    CovariateEncoder,
    FunctionalDependency,
    functional_dependencies,
)
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.data.labels import distinct_cells


class MetadataEncoder:
    """Tables to matrices, one per group; covariates in the order of their declaration."""

    def __init__(
        self,
        groups: dict[str, list[CovariateEncoder]],
        dependencies: list[FunctionalDependency] | None = None,
    ):
        self.groups, self.dependencies = groups, dependencies or []

    @classmethod
    def fit(
        cls,
        samples: pd.DataFrame,
        covariates: Covariates,
        features: Mapping[str, FeatureTable] | None = None,
    ) -> "MetadataEncoder":
        """From the training split alone, and the `features` of each embedding covariate."""
        features = features or {}
        groups = {
            group: [
                CovariateEncoder.fit(name, covariate, samples[name], features.get(name))
                for name, covariate in getattr(covariates, group).items()
            ]
            for group in GROUPS
        }
        dependencies = []
        for fields in groups.values():
            dependencies += functional_dependencies(samples, fields)
        return cls(groups, dependencies)

    @property
    def fields(self) -> list[CovariateEncoder]:
        return [field for fields in self.groups.values() for field in fields]

    @property
    def names(self) -> list[str]:
        return [field.name for field in self.fields]

    @property
    def sizes(self) -> dict[str, int]:
        """D per group."""
        return {group: sum(field.size for field in fields) for group, fields in self.groups.items()}

    def blocks(self, group: str) -> list[tuple[int, int]]:
        """Columns of each covariate: (features, identity) of an embedding, (all, 0) of others."""
        return [
            (field.feature_size, len(field.levels)) if field.features else (field.size, 0)
            for field in self.groups[group]
        ]

    def encode(self, samples: pd.DataFrame, unknown: str = "refuse") -> dict[str, np.ndarray]:
        """(N, D) float32 per group.

        An absent column is missing throughout; functional dependencies fill missing values.
        `unknown` is "refuse" (InputError with column, row and the closest known value) or
        "missing".
        """
        if unknown not in ("refuse", "missing"):
            raise ValueError(f"unknown is {unknown!r}; expected 'refuse' or 'missing'")
        problems: list[str] = []
        cells = self._cells(samples, problems)
        for dependency in self.dependencies:
            dependency.fill(cells, len(samples))
        encoded = {}
        for group, fields in self.groups.items():
            parts = [np.zeros((len(samples), 0), dtype=np.float32)]
            for field in fields:
                column = cells.get(field.name)
                if column is None:
                    parts.append(np.zeros((len(samples), field.size), dtype=np.float32))
                else:
                    parts.append(_encode_column(field, column, unknown, problems))
            encoded[group] = np.concatenate(parts, axis=1)
        if problems:
            raise InputError(*problems)
        return encoded

    def _cells(self, samples: pd.DataFrame, problems: list[str]) -> dict[str, Cells]:
        cells = {}
        for name in self.names:
            if name in samples:
                try:
                    cells[name] = distinct_cells(samples[name])
                except ValueError as error:
                    problems.append(f"{name}: {error}")
        return cells

    def labels(self, samples: pd.DataFrame) -> dict[str, np.ndarray]:
        """(N,) class index per classifier head, -1 if missing or unknown."""
        return {field.name: field.class_indices(samples[field.name]) for field in self.heads()}

    def heads(self) -> list[CovariateEncoder]:
        """The covariates with a classifier: biological or perturbation, one label per sample,
        two levels or more."""
        return [
            field
            for group in ("biological", "perturbation")
            for field in self.groups[group]
            if field.covariate.kind in ("categorical", "embedding") and len(field.levels) > 1
        ]

    def group_of(self, name: str) -> str:
        return next(
            group
            for group, fields in self.groups.items()
            if any(field.name == name for field in fields)
        )

    def differences(self, other: "MetadataEncoder") -> list[str]:
        """A message per covariate that `other`, an encoder of the data, encodes differently."""
        own, others = (
            {
                field.name: (group, field)
                for group, fields in encoder.groups.items()
                for field in fields
            }
            for encoder in (self, other)
        )
        messages = [
            f"covariates {examples(sorted(names))} in the {holder} only"
            for names, holder in (
                (own.keys() - others.keys(), "model"),
                (others.keys() - own.keys(), "data"),
            )
            if names
        ]
        if not messages and self.dependencies != other.dependencies:
            messages.append("the functional dependencies between covariates differ")
        for name in own:
            if name in others and (difference := _difference(*own[name], *others[name])):
                messages.append(f"{name}: {difference}")
        return messages


def distinct_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((U,) first position of each distinct row, in lexicographic order of the rows; (N,) index
    of each row among them) for a matrix (N, D) of float32 or integers.

    Compares hashes of the rows and verifies the result: a hundred times as fast as comparing
    whole rows, as np.unique does.
    """
    rows, columns = matrix.shape
    if columns == 0 or rows == 0:
        return np.arange(min(rows, 1)), np.zeros(rows, dtype=np.int64)
    bits = np.ascontiguousarray(matrix + 0)  # -0 becomes 0
    if bits.dtype.kind == "f":
        bits = bits.astype(np.float32, copy=False).view(np.uint32)
    factors = np.random.default_rng(0).integers(1, 2**63, columns, dtype=np.uint64) | np.uint64(1)
    hashes = bits.astype(np.uint64) @ factors
    _, first, index = np.unique(hashes, return_index=True, return_inverse=True)
    distinct, index = matrix[first], index.reshape(-1)
    if not np.array_equal(distinct[index], matrix):  # a collision
        _, first, index = np.unique(matrix, axis=0, return_index=True, return_inverse=True)
        return first, index.reshape(-1)
    varying = (distinct != distinct[:1]).any(axis=0)
    order = np.lexsort(distinct[:, varying].T[::-1]) if varying.any() else np.zeros(1, dtype=int)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return first[order], position[index]


def _encode_column(
    field: CovariateEncoder, column: Cells, unknown: str, problems: list[str]
) -> np.ndarray:
    """(N, D) of one covariate; each distinct value is encoded once."""
    index, values = column
    codes = np.zeros((len(values) + 1, field.size), dtype=np.float32)  # the last: missing
    for position, value in enumerate(values):
        code, problem = field.try_encode(value, unknown)
        if code is not None:
            codes[position] = code
        if problem:
            problems.append(f"{field.name}, row {np.argmax(index == position)}: {problem}")
    return codes[index]


def _difference(
    group: str, field: CovariateEncoder, other_group: str, other: CovariateEncoder
) -> str | None:
    kind, other_kind = field.covariate.kind, other.covariate.kind
    if (group, kind) != (other_group, other_kind):
        data_side = f"{other_kind} in group {other_group} in the data"
        return f"{kind} in group {group} in the model, {data_side}"
    own_labels, other_labels = set(field.known_labels), set(other.known_labels)
    if own_labels != other_labels:
        surplus, missing = sorted(own_labels - other_labels), sorted(other_labels - own_labels)
        return (
            f"{len(surplus)} labels of the model that the data lacks ({examples(surplus)}), "
            f"{len(missing)} of the data that the model lacks ({examples(missing)})"
        )
    if field.scaling != other.scaling:
        return (
            f"mean {field.mean:g} and deviation {field.deviation:g} in the model, "
            f"{other.mean:g} and {other.deviation:g} in the data"
        )
    same_features = field.features is None or np.array_equal(
        field.features.values, other.features.values
    )
    if field.levels != other.levels or not same_features:
        return "the training labels or their features differ"
    return None
