"""What training saw together: the combinations of context and perturbation, so that a prediction can say where it leaves them.

N rows of a query, C declared columns.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.data.labels import SEPARATOR, label_texts, labels_of


@dataclass(frozen=True)
class TrainingSupport:
    """Distinct values of the context columns and of the control's column among the training samples."""

    columns: tuple[str, ...] = ()
    several: tuple[str, ...] = ()  # those of them whose values hold several labels, in any order
    control: tuple[str, str] | None = None  # column and value of untreated samples
    combinations: tuple[tuple[str | None, ...], ...] = field(
        default=(), repr=False
    )  # each (C,), None where missing

    @classmethod
    def of(cls, samples: pd.DataFrame, data: Data) -> "TrainingSupport":
        control = (data.control.column, data.control.value) if data.control else None
        columns = tuple(dict.fromkeys([*data.context_columns, *(control[:1] if control else ())]))
        kinds = {name: covariate.kind for name, covariate in data.covariates.all().items()}
        several = tuple(name for name in columns if kinds.get(name) in ("multilabel", "embedding"))
        made = cls(columns, several, control)
        found = set(made._rows(samples)) if columns else set()
        return cls(
            columns,
            several,
            control,
            tuple(
                sorted(found, key=lambda row: [(value is not None, value or "") for value in row])
            ),
        )

    def extrapolated(self, samples: pd.DataFrame) -> np.ndarray:
        """(N,) bool: no training sample agrees with the row's given values. A value that is not given agrees with any."""
        known, judged = self._known, {}
        for row in (rows := self._rows(samples)):
            if row not in judged:
                given = tuple(column for column, value in enumerate(row) if value is not None)
                if given not in known:
                    known[given] = {
                        tuple(seen[column] for column in given) for seen in self.combinations
                    }
                judged[row] = (
                    bool(given) and tuple(row[column] for column in given) not in known[given]
                )
        return np.array([judged[row] for row in rows], dtype=bool)

    @cached_property
    def _known(self) -> dict[tuple[int, ...], set[tuple[str | None, ...]]]:
        """Which columns are given: the combinations of these, as they are asked for."""
        return {}

    def _rows(self, samples: pd.DataFrame) -> list[tuple[str | None, ...]]:
        if not self.columns:
            return [()] * len(samples)
        return list(zip(*(self._column(samples, name) for name in self.columns), strict=True))

    def _column(self, samples: pd.DataFrame, name: str) -> list[str | None]:
        if name not in samples:
            return [None] * len(samples)
        texts = label_texts(samples[name])
        return [
            SEPARATOR.join(sorted(set(labels_of(text))))
            if text is not None and name in self.several
            else text
            for text in texts
        ]
