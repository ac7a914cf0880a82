"""The combinations of context and perturbation in the training split: a prediction for any other is
extrapolated.

N rows of a query, C columns.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.data.labels import SEPARATOR, label_texts, split_labels

Combination = tuple[str | None, ...]  # (C,) values, None where missing


@dataclass(frozen=True)
class TrainingSupport:
    """Distinct values of the context and control columns among the training samples."""

    columns: tuple[str, ...] = ()
    multilabel_columns: tuple[str, ...] = ()  # their values hold labels in any order
    control: tuple[str, str] | None = None  # column and value of untreated samples
    combinations: tuple[Combination, ...] = field(default=(), repr=False)

    @classmethod
    def from_samples(cls, samples: pd.DataFrame, data: Data) -> "TrainingSupport":
        control = (data.control.column, data.control.value) if data.control else None
        columns = tuple(dict.fromkeys([*data.context_columns, *(control[:1] if control else ())]))
        covariates = data.covariates.all()
        multilabel = tuple(
            name
            for name in columns
            if name in covariates and covariates[name].kind in ("multilabel", "embedding")
        )
        empty = cls(columns, multilabel, control)
        distinct = set(empty._combinations(samples)) if columns else set()
        missing_first = sorted(distinct, key=lambda row: [(v is not None, v or "") for v in row])
        return cls(columns, multilabel, control, tuple(missing_first))

    def is_extrapolated(self, samples: pd.DataFrame) -> np.ndarray:
        """(N,) bool: no training sample has the row's values. A missing value matches any."""
        rows = self._combinations(samples)
        extrapolated = {row: self._is_unmatched(row) for row in set(rows)}
        return np.array([extrapolated[row] for row in rows], dtype=bool)

    def _is_unmatched(self, row: Combination) -> bool:
        present = tuple(column for column, value in enumerate(row) if value is not None)
        if present not in self._projections:
            self._projections[present] = {
                tuple(combination[column] for column in present)
                for combination in self.combinations
            }
        values = tuple(row[column] for column in present)
        return bool(present) and values not in self._projections[present]

    @cached_property
    def _projections(self) -> dict[tuple[int, ...], set[Combination]]:
        """The training combinations on subsets of the columns; filled on demand."""
        return {}

    def _combinations(self, samples: pd.DataFrame) -> list[Combination]:
        if not self.columns:
            return [()] * len(samples)
        return list(zip(*(self._values(samples, name) for name in self.columns), strict=True))

    def _values(self, samples: pd.DataFrame, name: str) -> list[str | None]:
        if name not in samples:
            return [None] * len(samples)
        texts = label_texts(samples[name])
        if name not in self.multilabel_columns:
            return list(texts)
        return [text and SEPARATOR.join(sorted(set(split_labels(text)))) for text in texts]
