"""The encoding of metadata as sparse rows, one per sample and covariate group.

A missing value has no entries and is always valid. An unknown value, one that the encoder was not
fitted to, is an error unless the caller treats it as missing. Each distinct value is encoded
once, and each distinct row is stored once: memory grows neither with samples times columns nor with
values times columns.

N samples, F covariates, C columns of a group, U distinct rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array, hstack

from pipeline.gem.common.config import GROUPS, Covariates, Labels
from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.data.covariates import (
    Cells,
    CovariateEncoder,
    Entries,
    FunctionalDependency,
    functional_dependencies,
)
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.data.labels import distinct_cells, label_texts


@dataclass(frozen=True)
class FieldColumns:
    """The columns of one covariate in the rows of its group."""

    field: CovariateEncoder
    own: slice  # the value of a number, and levels
    features: slice  # one per label with features; empty without


def field_columns(fields: Sequence[CovariateEncoder]) -> list[FieldColumns]:
    """The columns of the covariates of a group: first the own ones of all covariates, then the
    labels with features."""
    owns, feature_columns, start = [], [], 0
    for field in fields:
        owns.append(slice(start, start := start + field.first_features))
    for field in fields:
        labels = len(field.features.labels) if field.features else 0
        feature_columns.append(slice(start, start := start + labels))
    return list(map(FieldColumns, fields, owns, feature_columns))


@dataclass(frozen=True)
class EncodedGroup:
    """The metadata of N samples in one group."""

    distinct: csr_array  # (U, C) float32
    index: np.ndarray  # (N,) row of each sample among them

    def matrix(self) -> csr_array:
        """(N, C)"""
        return self.distinct[self.index]


class MetadataEncoder:
    """Tables to sparse rows, one per group; covariates in the order of their declaration."""

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
        return cls(groups, _dependencies(samples, groups))

    def extended(self, samples: pd.DataFrame) -> "MetadataEncoder":
        """This encoder with the further labels of `samples`, which contain the training split."""
        groups = {
            group: [field.extended(samples[field.name]) for field in fields]
            for group, fields in self.groups.items()
        }
        return MetadataEncoder(groups, _dependencies(samples, groups))

    @property
    def fields(self) -> list[CovariateEncoder]:
        return [field for fields in self.groups.values() for field in fields]

    @property
    def names(self) -> list[str]:
        return [field.name for field in self.fields]

    @property
    def inputs(self) -> dict[str, int]:
        """Numbers that describe a sample, by group."""
        return {
            group: sum(field.inputs for field in fields) for group, fields in self.groups.items()
        }

    def columns(self, group: str) -> list[FieldColumns]:
        return field_columns(self.groups[group])

    def encode(self, samples: pd.DataFrame, unknown: str = "refuse") -> dict[str, EncodedGroup]:
        """The rows of each group. Their order does not depend on that of the samples.

        An absent column is missing throughout; functional dependencies fill missing values.
        `unknown` is "refuse" (InputError with column, row and the closest known value) or
        "missing".
        """
        if unknown not in ("refuse", "missing"):
            raise ValueError(f"unknown is {unknown!r}; expected 'refuse' or 'missing'")
        problems: list[str] = []
        cells, encoded = self._cells(samples, problems), {}
        for dependency in self.dependencies:
            dependency.fill(cells, len(samples))
        for group in self.groups:
            columns = self.columns(group)
            width = columns[-1].features.stop if columns else 0
            codes = np.zeros((len(samples), len(columns)), dtype=np.int64)
            tables = []
            for position, field in enumerate(columns):
                rows: list[Entries] = [{}]  # a missing value
                column = cells.get(field.field.name)
                if column is not None:
                    codes[:, position], rows = _encode_column(field, column, unknown, problems)
                tables.append(_sparse(rows, width))
            first, index = distinct_rows(codes)
            parts = (table[codes[first, number]] for number, table in enumerate(tables))
            distinct = sum(parts, csr_array((len(first), width), dtype=np.float32))
            encoded[group] = EncodedGroup(distinct, index)
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

    def without_rare(self, samples: pd.DataFrame) -> pd.DataFrame:
        """Training samples with missing values where a label is too rare to be known."""
        changed = {}
        for field in self.fields:
            if isinstance(field.covariate, Labels) and field.covariate.min_count > 1:
                texts = label_texts(samples[field.name])
                known = {text for text in texts.dropna().unique() if field.knows(text)}
                changed[field.name] = texts.where(texts.isin(known))
        return samples.assign(**changed)

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


def _dependencies(
    samples: pd.DataFrame, groups: Mapping[str, list[CovariateEncoder]]
) -> list[FunctionalDependency]:
    return [
        dependency
        for fields in groups.values()
        for dependency in functional_dependencies(samples, fields)
    ]


def joined_rows(encoded: Mapping[str, EncodedGroup]) -> tuple[csr_array, np.ndarray]:
    """((U, C) distinct metadata of all groups side by side; (N,) row of each sample)."""
    codes = np.stack([encoded[group].index for group in GROUPS], axis=1)
    first, index = distinct_rows(codes)
    parts = [encoded[group].distinct[encoded[group].index[first]] for group in GROUPS]
    return csr_array(hstack(parts, format="csr")), index


def distinct_rows(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((U,) first position of each distinct row, in lexicographic order of the rows; (N,) index
    of each row among them) for integers (N, F), none negative."""
    index = np.zeros(len(codes), dtype=np.int64)
    for column in codes.T:
        size = 1 + column.max(initial=0)
        if index.max(initial=0) >= 2**62 // size:
            index = np.unique(index, return_inverse=True)[1]
        index = index * size + column
    _, first, inverse = np.unique(index, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _encode_column(
    columns: FieldColumns, cells: Cells, unknown: str, problems: list[str]
) -> tuple[np.ndarray, list[Entries]]:
    """((N,) code of each sample; the row of each code, the first that of a missing value).

    Values that are encoded alike have one code; codes are in the order of their entries.
    """
    (index, values), field = cells, columns.field
    entries: list[Entries] = []
    for position, value in enumerate(values):
        row, problem = field.try_encode(value, unknown)
        entries.append(row or {})
        if problem:
            problems.append(f"{field.name}, row {np.argmax(index == position)}: {problem}")
    keys = [tuple(row.items()) for row in entries]
    code = {key: number for number, key in enumerate(sorted({(), *keys}))}
    # The last: missing values have position -1.
    codes = np.array([*(code[key] for key in keys), 0], dtype=np.int64)
    shift = columns.features.start - field.first_features
    rows = [
        {
            column + (columns.own.start if column < field.first_features else shift): value
            for column, value in key
        }
        for key in code
    ]
    return codes[index], rows


def _sparse(rows: list[Entries], width: int) -> csr_array:
    """(rows, width) float32"""
    offsets = np.cumsum([0, *map(len, rows)])
    columns = np.array([column for row in rows for column in row], dtype=np.int64)
    values = np.array([value for row in rows for value in row.values()], dtype=np.float32)
    return csr_array((values, columns, offsets), shape=(len(rows), width))


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
