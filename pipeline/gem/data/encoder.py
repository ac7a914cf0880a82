"""Metadata as the model sees it: the encoding of tables, group by group, and their cleaning.

Missing and unknown are different things: a missing value encodes as zeros and is always allowed; a value that the
vocabulary lacks is refused, unless the caller asks to treat it as missing.

N samples, D_g encoded size of a group.
"""

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pandas as pd

from pipeline.gem.common.config import GROUPS, Covariates
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.covariates import CovariateEncoder, scaled
from pipeline.gem.data.dependencies import Cells, FunctionalDependency, functional_dependencies
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.data.labels import distinct, label_text, label_texts, list_cells
from pipeline.gem.data.units import DIMENSIONLESS, parse_quantity


class MetadataEncoder:
    """Tables to matrices, one per group; fields in the order of their declaration."""

    def __init__(
        self,
        groups: dict[str, list[CovariateEncoder]],
        implied: list[FunctionalDependency] | None = None,
    ):
        self.groups, self.implied = groups, implied or []

    @classmethod
    def fit(
        cls,
        samples: pd.DataFrame,
        covariates: Covariates,
        features: Mapping[str, FeatureTable] | None = None,
    ) -> "MetadataEncoder":
        """Vocabularies of the rows of `samples`, which must be the training split alone; `features` of each embedding."""
        features = features or {}
        groups = {
            group: [
                CovariateEncoder.learn(name, kind, samples[name], features.get(name))
                for name, kind in getattr(covariates, group).items()
            ]
            for group in GROUPS
        }
        return cls(
            groups,
            [one for fields in groups.values() for one in functional_dependencies(samples, fields)],
        )

    @property
    def sizes(self) -> dict[str, int]:
        """D_g per group."""
        return {group: sum(field.size for field in fields) for group, fields in self.groups.items()}

    def blocks(self, group: str) -> list[tuple[int, int]]:
        """Per field (columns that describe it, columns that name its level): the second part of an embedding is its identity."""
        return [
            (field.described, len(field.levels)) if field.features else (field.size, 0)
            for field in self.groups[group]
        ]

    @property
    def names(self) -> list[str]:
        return [field.name for fields in self.groups.values() for field in fields]

    def encode(self, samples: pd.DataFrame, unknown: str = "refuse") -> dict[str, np.ndarray]:
        """Per group (N, D_g) float32. A column that is absent is missing everywhere, but for what other columns imply.

        `unknown` is "refuse" (InputError naming column, row and the closest known values) or "missing".
        """
        if unknown not in ("refuse", "missing"):
            raise ValueError(f"unknown is {unknown!r}; expected 'refuse' or 'missing'")
        problems: list[str] = []
        cells = self._cells(samples, problems)
        for implied in self.implied:
            implied.fill(cells, len(samples))
        encoded = {}
        for group, fields in self.groups.items():
            parts = [
                self._encode_field(field, cells.get(field.name), len(samples), unknown, problems)
                for field in fields
            ]
            encoded[group] = (
                np.concatenate(parts, axis=1)
                if parts
                else np.zeros((len(samples), 0), dtype=np.float32)
            )
        if problems:
            raise InputError(*problems)
        return encoded

    def _cells(self, samples: pd.DataFrame, problems: list[str]) -> dict[str, Cells]:
        found = {}
        for name in self.names:
            if name in samples:
                try:
                    found[name] = distinct(samples[name])
                except ValueError as error:
                    problems.append(f"{name}: {error}")
        return found

    @staticmethod
    def _encode_field(
        field: CovariateEncoder, cells: Cells | None, rows: int, unknown: str, problems: list[str]
    ) -> np.ndarray:
        if cells is None:
            return np.zeros((rows, field.size), dtype=np.float32)
        # Few distinct values stand for many rows; the last row of the table of codes is "missing".
        index, values = cells
        codes = np.zeros((len(values) + 1, field.size), dtype=np.float32)
        for position, value in enumerate(values):
            code, problem = field.read(value, unknown)
            if code is not None:
                codes[position] = code
            if problem:
                problems.append(f"{field.name}, row {np.argmax(index == position)}: {problem}")
        return codes[index]

    def labels(self, samples: pd.DataFrame) -> dict[str, np.ndarray]:
        """(N,) class index per label head, -1 where missing or unknown: categorical fields of the groups with biology."""
        return {field.name: field.class_indices(samples[field.name]) for field in self.heads()}

    def heads(self) -> list[CovariateEncoder]:
        """The covariates that have a classifier: one label of two or more, in the last two groups."""
        return [
            field
            for group in GROUPS[1:]
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
        """A line for each covariate that another encoder knows otherwise."""
        own, others = (
            {field.name: (group, field) for group, fields in one.groups.items() for field in fields}
            for one in (self, other)
        )
        alone = ((own.keys() - others.keys(), "model"), (others.keys() - own.keys(), "data"))
        found = [
            f"covariates {examples(sorted(names))} known to the {who} only"
            for names, who in alone
            if names
        ]
        if not found and self.implied != other.implied:
            found = ["levels of one covariate always came with other levels of another"]
        return found + [
            f"{name}: {said}"
            for name in own
            if name in others and (said := _difference(own[name], others[name]))
        ]

    def state(self) -> dict:
        fields = {
            group: [field.state() for field in fields] for group, fields in self.groups.items()
        }
        return fields | {"implied": [asdict(one) for one in self.implied]}

    @classmethod
    def from_state(cls, state: dict) -> "MetadataEncoder":
        fields = {
            group: [CovariateEncoder.from_state(field) for field in state[group]]
            for group in GROUPS
        }
        return cls(fields, [FunctionalDependency(**one) for one in state["implied"]])


def _difference(
    own: tuple[str, CovariateEncoder], other: tuple[str, CovariateEncoder]
) -> str | None:
    (group, field), (other_group, other_field) = own, other
    if (group, field.covariate.kind) != (other_group, other_field.covariate.kind):
        return f"{field.covariate.kind} in group {group} to the model, {other_field.covariate.kind} in group {other_group} to the data"
    surplus, missing = (
        sorted(set(field.known) - set(other_field.known)),
        sorted(set(other_field.known) - set(field.known)),
    )
    if surplus or missing:
        return f"{len(surplus)} labels that the data lacks ({examples(surplus)}), {len(missing)} that the model lacks ({examples(missing)})"
    if field.levels != other_field.levels:
        return "other labels were seen in training"
    if (field.mean, field.deviation) != (other_field.mean, other_field.deviation):
        return f"mean {field.mean:g} and deviation {field.deviation:g} to the model, {other_field.mean:g} and {other_field.deviation:g} to the data"
    if field.features is not None and not np.array_equal(
        field.features.values, other_field.features.values
    ):
        return "other features of its labels"
    return None


def clean_samples(samples: pd.DataFrame, covariates: Covariates, where: str) -> pd.DataFrame:
    """Declared covariates in one form: text or numbers, None for missing or empty. InputError lists every bad value."""
    problems: list[str] = []
    cleaned = samples.copy()
    for name, covariate in covariates.all().items():
        if name not in samples:
            problems.append(
                f"{where}: column {name} is declared in data.covariates but absent{did_you_mean(name, samples.columns)}"
            )
        elif bad := list_cells(samples[name], f"{where}: {name}"):
            problems += bad
        elif covariate.kind != "numeric":
            cleaned[name] = label_texts(samples[name])
        elif bad := _bad_quantities(samples[name], covariate.scale, f"{where}: {name}"):
            problems += bad
        else:
            cleaned[name] = _numbers_or_text(samples[name])
    if problems:
        raise InputError(*problems)
    return cleaned


def _bad_quantities(column: pd.Series, scale: str, where: str) -> list[str]:
    problems = []
    index, values = distinct(column)
    for position, value in enumerate(values):
        try:
            scaled(parse_quantity(value)[0], scale)
        except ValueError as error:
            rows = np.flatnonzero(index == position)
            problems.append(
                f"{where}: {error} (rows {examples(rows)}); declare it categorical, or write a number and a unit"
            )
    return problems


def _numbers_or_text(column: pd.Series) -> pd.Series:
    """Plain numbers as numbers; beside quantities with a unit, which stay as they were written, their text.

    A cell reads the same either way: a unit in one sample must not change what another says.
    """
    index, values = distinct(column)
    parsed = [parse_quantity(value) for value in values]
    if all(dimension == DIMENSIONLESS for _, dimension in parsed):
        numbers = np.array([number for number, _ in parsed] + [np.nan])
        return pd.Series(numbers[index], index=column.index)
    texts = [
        label_text(number) if dimension == DIMENSIONLESS else str(value)
        for value, (number, dimension) in zip(values, parsed, strict=True)
    ]
    return pd.Series(
        np.array([*texts, None], dtype=object)[index], index=column.index, dtype=object
    )
