"""Embeddings: observable features of labels (drugs, genes, cell lines), from a table that anyone may bring.

U labels, E features.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.data.labels import SEPARATOR, label_texts, list_cells

CLIP = 6.0  # standard deviations: what lies further says no more
_ROUNDING = 1e-9  # a deviation below this share of the largest value is what rounding leaves of a constant feature


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
        """A table: the first column names labels, every other column is a feature. InputError lists what is wrong."""
        path = Path(path)
        if not path.exists():
            raise InputError(
                f"{path}: absent; data.covariates names it as the table of an embedding"
            )
        table = read_table(path)
        problems = _problems(table, path)
        if problems:
            raise InputError(*problems)
        return cls(tuple(label_texts(table.iloc[:, 0])), _numbers(table.iloc[:, 1:]))

    def write(self, path: Path) -> None:
        table = pd.DataFrame(
            self.values, columns=[f"feature_{index + 1}" for index in range(self.size)]
        )
        table.insert(0, "label", list(self.labels))
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path, index=False)

    def standardised(self, seen: set[str]) -> "FeatureTable":
        """Mean 0 and deviation 1 of each feature over the labels that training saw (over all, where it saw none), clipped."""
        rows = np.array([label in seen for label in self.labels])
        known = (self.values[rows] if rows.any() else self.values).astype(np.float64)
        deviation = known.std(axis=0)
        deviation[deviation <= _ROUNDING * np.abs(known).max(axis=0)] = 1
        return FeatureTable(
            self.labels,
            np.clip((self.values - known.mean(axis=0)) / deviation, -CLIP, CLIP).astype(np.float32),
        )


def read_table(path: Path) -> pd.DataFrame:
    """A table that a person brings, Parquet or (by its name) CSV; InputError where the file is none."""
    kind, read = ("CSV", pd.read_csv) if path.suffix == ".csv" else ("Parquet", pd.read_parquet)
    try:
        return read(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: not a {kind} table ({next(iter(str(error).splitlines()), type(error).__name__)})"
        ) from None


def _problems(table: pd.DataFrame, path: Path) -> list[str]:
    if table.shape[1] < 2 or not len(table):
        return [
            f"{path}: {table.shape[0]} rows and {table.shape[1]} columns; expected labels in the first column, then one feature at least"
        ]
    if lists := list_cells(table.iloc[:, 0], f"{path}: labels"):
        return lists
    labels, problems = label_texts(table.iloc[:, 0]), []
    if labels.isna().any():
        problems.append(
            f"{path}: no label in rows {examples(np.flatnonzero(labels.isna().to_numpy()))}"
        )
    twice = sorted(labels[labels.duplicated()].dropna().unique())
    if twice:
        problems.append(f"{path}: labels {examples(twice)} stand twice; expected one row a label")
    several = sorted(label for label in labels.dropna().unique() if SEPARATOR in label)
    if several:
        problems.append(
            f"{path}: labels {examples(several)} hold {SEPARATOR}, which stands between labels; expected one label a row"
        )
    for position, name in enumerate(table.columns[1:], start=1):
        column = table.iloc[:, position]
        if not pd.api.types.is_numeric_dtype(column):
            problems.append(f"{path}: feature {name} holds {column.dtype}; expected numbers")
        elif len(bad := np.flatnonzero(~np.isfinite(_numbers(column)))):
            problems.append(
                f"{path}: feature {name} is not finite for {examples(labels.iloc[bad])}"
            )
    return problems


def _numbers(columns: pd.DataFrame | pd.Series) -> np.ndarray:
    """As float32; what it cannot hold is not finite."""
    with np.errstate(over="ignore"):
        return (
            columns.astype("float64").to_numpy(dtype=np.float64, na_value=np.nan).astype(np.float32)
        )
