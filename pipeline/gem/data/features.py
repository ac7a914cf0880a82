"""Features of labels (drugs, genes, cell lines) from a table: the input of an embedding covariate.

U labels, E features.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.common.files import write_table
from pipeline.gem.data.labels import SEPARATOR, label_texts, list_cell_problems
from pipeline.gem.data.tables import read_table

CLIP = 6.0  # standard deviations
# A deviation below this share of the largest value is the rounding error of a constant feature.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Features by label."""

    labels: tuple[str, ...]
    values: np.ndarray  # (U, E) float32

    @property
    def size(self) -> int:
        return self.values.shape[1]

    @classmethod
    def read(cls, path: Path | str) -> "FeatureTable":
        """Labels in the first column, features in the others. InputError lists every problem."""
        path = Path(path)
        if not path.exists():
            raise InputError(
                f"{path}: absent; data.covariates names it as the table of an embedding"
            )
        table = read_table(path)
        _parse_numbers(table)
        problems = _problems(table, path)
        if problems:
            raise InputError(*problems)
        return cls(tuple(label_texts(table.iloc[:, 0])), _as_float32(table.iloc[:, 1:]))

    @classmethod
    def joined(cls, tables: Sequence["FeatureTable"]) -> "FeatureTable":
        """The features of all tables side by side; zeros for a label that a table lacks."""
        labels = tuple(dict.fromkeys(label for table in tables for label in table.labels))
        row = {label: index for index, label in enumerate(labels)}
        values = np.zeros((len(labels), sum(table.size for table in tables)), dtype=np.float32)
        start = 0
        for table in tables:
            rows = [row[label] for label in table.labels]
            values[rows, start : start + table.size] = table.values
            start += table.size
        return cls(labels, values)

    def write(self, path: Path) -> None:
        columns = [f"feature_{index + 1}" for index in range(self.size)]
        table = pd.DataFrame(self.values, columns=columns)
        table.insert(0, "label", list(self.labels))
        write_table(path, table)

    def standardise(self, training_labels: set[str]) -> "FeatureTable":
        """Each feature with mean 0 and deviation 1 over the training labels, clipped.

        Over all labels if no training label is in the table.
        """
        rows = np.array([label in training_labels for label in self.labels])
        fitted = (self.values[rows] if rows.any() else self.values).astype(np.float64)
        deviation = fitted.std(axis=0)
        deviation[deviation <= _ROUNDING * np.abs(fitted).max(axis=0)] = 1
        values = np.clip((self.values - fitted.mean(axis=0)) / deviation, -CLIP, CLIP)
        return FeatureTable(self.labels, values.astype(np.float32))


def _parse_numbers(table: pd.DataFrame) -> None:
    """Replaces texts of the feature columns by numbers, in the columns that hold nothing else."""
    for position in range(1, table.shape[1]):
        if not pd.api.types.is_numeric_dtype(table.dtypes.iloc[position]):
            with suppress(pa.ArrowException):
                texts = pc.utf8_trim_whitespace(pa.array(table.iloc[:, position], pa.string()))
                table.isetitem(position, pc.cast(texts, pa.float64()).to_pandas())


def _problems(table: pd.DataFrame, path: Path) -> list[str]:
    rows, columns = table.shape
    if columns < 2 or not rows:
        return [
            f"{path}: {rows} rows and {columns} columns; "
            "expected labels in the first column and at least one feature column"
        ]
    if problems := list_cell_problems(table.iloc[:, 0], f"{path}: labels"):
        return problems
    labels, problems = label_texts(table.iloc[:, 0]), []
    if labels.isna().any():
        missing = examples(np.flatnonzero(labels.isna().to_numpy()))
        problems.append(f"{path}: no label in rows {missing}")
    duplicates = sorted(labels[labels.duplicated()].dropna().unique())
    if duplicates:
        problems.append(f"{path}: duplicate labels {examples(duplicates)}; expected one row each")
    multiple = sorted(label for label in labels.dropna().unique() if SEPARATOR in label)
    if multiple:
        problems.append(
            f"{path}: labels {examples(multiple)} contain the separator {SEPARATOR}; "
            "expected one label per row"
        )
    for position, name in enumerate(table.columns[1:], start=1):
        column = table.iloc[:, position]
        if not pd.api.types.is_numeric_dtype(column):
            texts = [value for value in column if isinstance(value, str)]
            content = f"text such as {min(texts, key=_is_number)!r}" if texts else column.dtype
            problems.append(f"{path}: feature {name} holds {content}; expected numbers")
        elif len(bad := np.flatnonzero(~np.isfinite(_as_float32(column)))):
            names = examples(labels.iloc[bad])
            problems.append(f"{path}: feature {name} is not finite for {names}")
    return problems


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _as_float32(columns: pd.DataFrame | pd.Series) -> np.ndarray:
    """As float32; values out of its range become infinite, missing ones NaN."""
    with np.errstate(over="ignore"):
        values = columns.astype("float64").to_numpy(dtype=np.float64, na_value=np.nan)
        return values.astype(np.float32)
