"""What a level always came with in training: a study its platform, a cell type its tissue. A query need not say it.

Only between fields of one group that hold one label, and only from the finer to the coarser: every study has one platform, but
a platform that a single study used does not name that study.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.data.covariates import CovariateEncoder
from pipeline.gem.data.labels import label_text, label_texts

Cells = tuple[
    np.ndarray, list
]  # (N,) position of each cell among the distinct values, -1 where missing; the values


@dataclass(frozen=True)
class FunctionalDependency:
    """The level of field `told` that each level of field `given` always came with."""

    given: str
    told: str
    levels: dict[str, str]

    def fill(self, cells: dict[str, Cells], rows: int) -> None:
        """Completes the cells of `told` that are missing where `given` is known; what is said stays as it is."""
        if self.given not in cells:
            return
        index, values = cells[self.given]
        said, known = cells.get(self.told, (np.full(rows, -1), []))
        implied = [self.levels.get(label_text(value)) for value in values]
        position = {
            level: len(known) + place
            for place, level in enumerate(sorted({level for level in implied if level}))
        }
        answers = np.array(
            [*(position.get(level, -1) for level in implied), -1]
        )  # the last: where `given` is missing too
        cells[self.told] = np.where(said < 0, answers[index], said), [*known, *position]


def functional_dependencies(
    samples: pd.DataFrame, fields: Sequence[CovariateEncoder]
) -> list[FunctionalDependency]:
    """Between the fields of one group, of training samples alone."""
    labelled = [field for field in fields if field.covariate.kind in ("categorical", "embedding")]
    texts = {field.name: label_texts(samples[field.name]) for field in labelled}
    found = []
    for given in labelled:
        for told in labelled:
            pairs = (
                pd.DataFrame({"given": texts[given.name], "told": texts[told.name]})
                .dropna()
                .drop_duplicates()
            )
            if (
                len(given.levels) > len(told.levels)
                and len(pairs)
                and not pairs["given"].duplicated().any()
            ):
                found.append(
                    FunctionalDependency(
                        given.name,
                        told.name,
                        dict(sorted(zip(pairs["given"], pairs["told"], strict=True))),
                    )
                )
    return found
