"""The encoding of one covariate, and functional dependencies between covariates.

Both are learned from the training split alone, but for the further labels of a refit.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Covariate, Labels, Numeric
from pipeline.gem.common.errors import did_you_mean
from pipeline.gem.data.features import CLIP, FeatureTable
from pipeline.gem.data.labels import cell_value, label_text, label_texts, split_labels
from pipeline.gem.data.units import cell_repr, dimension_name, is_ambiguous, parse_quantity

# Added before the logarithm of a numeric covariate, but at most this share of its smallest positive
# value in training: otherwise it would swallow doses such as 1e-9 mol/l.
LOG_OFFSET, LOG_OFFSET_SHARE = 1e-6, 1e-3
# A deviation up to this share of the largest value is the rounding error of a constant column.
ROUNDING = 1e-9


# Cells of a column: (N,) position among the distinct values, -1 if missing; the values.
Cells = tuple[np.ndarray, list]
Entries = dict[int, float]  # of a sparse row: the values that are not zero, by column


@dataclass(frozen=True)
class CovariateEncoder:
    """Encodes values of one covariate as entries of a sparse row.

    Columns are [standardised value of a number | levels | labels with features]. A label has a 1 in
    the column of its level, and a 1 in that of its features, which stand in a table of their own; a
    number has its value and a 1 for its dimension. Missing values have no entries.
    """

    name: str
    covariate: Covariate
    levels: tuple[str, ...] = ()  # labels, or the dimensions of a numeric covariate
    mean: float = 0.0  # numeric: over the training split, on the scale of the covariate
    deviation: float = 1.0
    offset: float = LOG_OFFSET  # numeric on the log scale
    features: FeatureTable | None = None  # embedding: standardised over the training labels

    @property
    def first_level(self) -> int:
        """Column of the first level: those of a number follow its value."""
        return int(isinstance(self.covariate, Numeric))

    @property
    def first_features(self) -> int:
        """Column of the first label with features; the number of columns before."""
        return self.first_level + len(self.levels)

    @property
    def inputs(self) -> int:
        """Numbers that describe a sample: value, levels and features."""
        return self.first_features + (self.features.size if self.features else 0)

    @property
    def scaling(self) -> tuple[float, float, float]:
        """What standardises a number."""
        return self.mean, self.deviation, self.offset

    @property
    def known_labels(self) -> tuple[str, ...]:
        """Every label that has an encoding."""
        return tuple(dict.fromkeys([*self.levels, *self._feature_rows]))

    @cached_property
    def _level_positions(self) -> dict[str, int]:
        return {level: position for position, level in enumerate(self.levels)}

    @cached_property
    def _feature_rows(self) -> dict[str, int]:
        labels = self.features.labels if self.features else ()
        return {label: row for row, label in enumerate(labels)}

    @classmethod
    def fit(
        cls,
        name: str,
        covariate: Covariate,
        column: pd.Series,
        features: FeatureTable | None = None,
    ) -> "CovariateEncoder":
        """The encoder of a column of the training split."""
        if not isinstance(covariate, Numeric):
            counts = label_counts(column, covariate)
            standardised = features.standardise(set(counts)) if features else None
            levels = sorted(label for label, n in counts.items() if n >= covariate.min_count)
            return cls(name, covariate, tuple(levels), features=standardised)
        quantities = [
            parse_quantity(value, covariate.plain_unit)
            for value in map(cell_value, column)
            if value is not None
        ]
        dimensions = tuple(sorted({dimension for _, dimension in quantities}))
        if not quantities:
            return cls(name, covariate, dimensions)
        smallest = min((number for number, _ in quantities if number > 0), default=1.0)
        offset = min(LOG_OFFSET, LOG_OFFSET_SHARE * smallest)
        numbers = np.array([to_scale(number, covariate.scale, offset) for number, _ in quantities])
        mean, deviation = float(numbers.mean()), float(numbers.std())
        if deviation <= ROUNDING * np.abs(numbers).max():
            deviation = 1.0
        return cls(name, covariate, dimensions, mean, deviation, offset)

    def extended(self, column: pd.Series) -> "CovariateEncoder":
        """This encoder with the further labels of a column that contains the training split. What
        it learned of numbers and features stays, so that what a network learned of them does."""
        fitted = CovariateEncoder.fit(self.name, self.covariate, column)
        if isinstance(self.covariate, Numeric) and not self.levels:
            return fitted
        return replace(self, levels=fitted.levels)

    def try_encode(self, value: object, unknown: str) -> tuple[Entries | None, str | None]:
        """(entries or None, error message or None) of a value that is not missing.

        A value that is not in the training split is an error if `unknown` is "refuse".
        """
        try:
            code = self.encode_value(value, unknown)
        except ValueError as error:
            return None, str(error)
        if code is not None or unknown != "refuse":
            return code, None
        if isinstance(self.covariate, Numeric):
            dimensions = " or ".join(
                dimension_name(level, with_units=True) for level in self.levels
            )
            return None, f"{cell_repr(value)} has another dimension than in training: {dimensions}"
        suggestion, least = did_you_mean(value, self.known_labels), self.covariate.min_count
        rarity = "never seen in training" if least == 1 else f"in fewer than {least} samples"
        return None, (
            f"{cell_repr(value)} was {rarity}{suggestion} (or treat unknown values as missing)"
        )

    def encode_value(self, value: object, unknown: str = "refuse") -> Entries | None:
        """Entries of a value that is not missing; None if the value is unknown.

        Of several labels one that is unknown makes the value unknown, unless it may be missing
        and rare labels are unknown by declaration. ValueError if a numeric covariate is no
        quantity.
        """
        if isinstance(self.covariate, Numeric):
            return self._encode_quantity(value)
        levels, rows = self._level_positions, self._feature_rows
        labels = [label for label in self._labels(value) if label in levels or label in rows]
        is_partial = unknown == "missing" and self.covariate.min_count > 1
        if not self.knows(value) and not (is_partial and labels):
            return None
        columns = [levels[label] for label in labels if label in levels]
        columns += [self.first_features + rows[label] for label in labels if label in rows]
        return dict.fromkeys(sorted(columns), 1.0)

    def knows(self, value: object) -> bool:
        """Whether all labels of a value have an encoding."""
        levels, rows = self._level_positions, self._feature_rows
        return all(label in levels or label in rows for label in self._labels(value))

    def _labels(self, value: object) -> list[str]:
        categorical = self.covariate.kind == "categorical"
        return [label_text(value)] if categorical else split_labels(value)

    def _encode_quantity(self, value: object) -> Entries | None:
        number, dimension = parse_quantity(value, self.covariate.plain_unit)
        if is_ambiguous(value, self.levels):
            raise ValueError(f"{cell_repr(value)}: M is ambiguous; write min, month or mol/l")
        if dimension not in self._level_positions:
            return None
        scaled = to_scale(number, self.covariate.scale, self.offset)
        standardised = (scaled - self.mean) / self.deviation
        column = self.first_level + self._level_positions[dimension]
        return {0: min(max(standardised, -CLIP), CLIP), column: 1.0}

    def class_indices(self, column: pd.Series) -> np.ndarray:
        """(N,) position of each value among the levels, -1 if missing or no level."""
        positions = [self._level_positions.get(text, -1) for text in label_texts(column)]
        return np.array(positions, dtype=np.int64)


def label_counts(column: pd.Series, covariate: Labels) -> Counter[str]:
    """The number of samples of each label."""
    counts = Counter(label_texts(column).dropna())
    if covariate.kind == "categorical":
        return counts
    labels: Counter[str] = Counter()
    for text, number in counts.items():
        for label in dict.fromkeys(split_labels(text)):
            labels[label] += number
    return labels


def to_scale(number: float, scale: str, offset: float) -> float:
    """A number on the linear or log scale. ValueError for a negative number on the log scale."""
    if scale == "linear":
        return number
    if number < 0:
        raise ValueError(f"{number:g} is negative, which the log scale forbids")
    return float(np.log(number + offset))


@dataclass(frozen=True)
class FunctionalDependency:
    """Each level of the covariate `determinant` occurs with one level of `determined` only.

    A study determines its platform, a cell type its tissue. A query may omit the determined value.
    """

    determinant: str
    determined: str
    levels: dict[str, str]  # of the determinant to the determined one

    def fill(self, cells: dict[str, Cells], rows: int) -> None:
        """Fills the missing cells of the determined covariate; other cells keep their value."""
        if self.determinant not in cells:
            return
        index, values = cells[self.determinant]
        own_index, own_values = cells.get(self.determined, (np.full(rows, -1), []))
        implied = [self.levels.get(label_text(value)) for value in values]
        new_levels = sorted({level for level in implied if level})
        position = {level: len(own_values) + place for place, level in enumerate(new_levels)}
        # The last entry is for rows where the determinant is missing too.
        filled = np.array([*(position.get(level, -1) for level in implied), -1])
        cells[self.determined] = (
            np.where(own_index < 0, filled[index], own_index),
            [*own_values, *position],
        )


def functional_dependencies(
    samples: pd.DataFrame, fields: Sequence[CovariateEncoder]
) -> list[FunctionalDependency]:
    """Dependencies between covariates of one group that hold one label.

    Only from the covariate with more levels to the one with fewer: a study determines its
    platform, but a platform that a single study used does not determine the study.
    """
    labelled = [field for field in fields if field.covariate.kind in ("categorical", "embedding")]
    texts = {field.name: label_texts(samples[field.name]) for field in labelled}
    texts |= {
        field.name: texts[field.name].where(texts[field.name].isin(field.levels))
        for field in labelled
    }
    dependencies = []
    for source in labelled:
        for target in labelled:
            if len(source.levels) <= len(target.levels):
                continue
            pairs = pd.DataFrame({"source": texts[source.name], "target": texts[target.name]})
            pairs = pairs.dropna().drop_duplicates()
            if len(pairs) and not pairs["source"].duplicated().any():
                levels = dict(sorted(zip(pairs["source"], pairs["target"], strict=True)))
                dependencies.append(FunctionalDependency(source.name, target.name, levels))
    return dependencies
