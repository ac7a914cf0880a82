"""Embeddings: observable features of labels (drugs, genes, cell lines), from a table that anyone may bring.

U labels, E features.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.errors import InputError, examples

_ROUNDING = 1e-9   # a deviation below this share of the largest value is what rounding leaves of a constant feature


@dataclass(frozen=True)
class Features:
    """Features by label."""

    labels: tuple[str, ...]
    values: np.ndarray   # (U, E) float32

    @property
    def size(self) -> int:
        return self.values.shape[1]

    @classmethod
    def read(cls, path: Path | str) -> "Features":
        """A Parquet table: the first column names labels, every other column is a feature. InputError lists what is wrong."""
        path = Path(path)
        if not path.exists():
            raise InputError(f"{path}: absent; data.covariates names it as the table of an embedding")
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a Parquet table ({str(error).splitlines()[0]})") from None
        problems = _problems(table, path)
        if problems:
            raise InputError(*problems)
        return cls(tuple(table.iloc[:, 0].astype(str)), table.iloc[:, 1:].to_numpy(dtype=np.float32))

    def write(self, path: Path) -> None:
        table = pd.DataFrame(self.values, columns=[f"feature_{index + 1}" for index in range(self.size)])
        table.insert(0, "label", list(self.labels))
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path, index=False)

    def standardised(self, seen: set[str]) -> "Features":
        """Mean 0 and deviation 1 of each feature over the labels that training saw (over all, where it saw none)."""
        rows = np.array([label in seen for label in self.labels])
        known = (self.values[rows] if rows.any() else self.values).astype(np.float64)
        deviation = known.std(axis=0)
        deviation[deviation <= _ROUNDING * np.maximum(np.abs(known).max(axis=0), 1)] = 1
        return Features(self.labels, ((self.values - known.mean(axis=0)) / deviation).astype(np.float32))


def _problems(table: pd.DataFrame, path: Path) -> list[str]:
    if table.shape[1] < 2 or not len(table):
        return [f"{path}: {table.shape[0]} rows and {table.shape[1]} columns; expected labels in the first column, then one feature at least"]
    labels, problems = table.iloc[:, 0], []
    if labels.isna().any():
        problems.append(f"{path}: no label in rows {examples(np.flatnonzero(labels.isna().to_numpy()))}")
    twice = sorted(labels[labels.duplicated()].dropna().astype(str).unique())
    if twice:
        problems.append(f"{path}: labels {examples(twice)} stand twice; expected one row a label")
    for name in table.columns[1:]:
        column = table[name]
        if not pd.api.types.is_numeric_dtype(column):
            problems.append(f"{path}: feature {name} holds {column.dtype}; expected numbers")
        elif not np.isfinite(column.to_numpy(dtype=float)).all():
            problems.append(f"{path}: feature {name} is not finite for {examples(labels[~np.isfinite(column.to_numpy(dtype=float))].astype(str).tolist())}")
    return problems
