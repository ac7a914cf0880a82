"""The combinations of context and perturbation in the samples of training, after a refit also in
those of the validation: a prediction for any other is extrapolated.

N rows of a query, C columns.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.data.labels import label_texts

Combination = tuple[str | None, ...]  # (C,) values, None where missing


@dataclass(frozen=True)
class TrainingSupport:
    """Distinct values of the context and control columns among the training samples.

    The samples, in training and in a query, have the form of `LabelForm`.
    """

    columns: tuple[str, ...] = ()
    combinations: tuple[Combination, ...] = field(default=(), repr=False)

    @classmethod
    def from_samples(cls, samples: pd.DataFrame, data: Data) -> "TrainingSupport":
        control = [data.control.column] if data.control else []
        columns = tuple(dict.fromkeys([*data.context_columns, *control]))
        distinct = set(cls(columns)._combinations(samples)) if columns else set()
        missing_first = sorted(distinct, key=lambda row: [(v is not None, v or "") for v in row])
        return cls(columns, tuple(missing_first))

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
        absent = [None] * len(samples)
        values = [label_texts(samples[n]) if n in samples else absent for n in self.columns]
        return list(zip(*values, strict=True))
