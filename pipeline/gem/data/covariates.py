"""A vocabulary: what the training split taught about one covariate, and the encoding of its values."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from pipeline.gem.common.config import Covariate
from pipeline.gem.common.errors import did_you_mean
from pipeline.gem.data.features import CLIP, FeatureTable
from pipeline.gem.data.labels import cell, label_text, label_texts, labels_of
from pipeline.gem.data.units import parse_quantity, shown

LOG_OFFSET = 1e-6  # added before the logarithm of a numeric covariate
ROUNDING = (
    1e-9  # a deviation below this share of the mean is what rounding leaves of a constant column
)

_COVARIATE = TypeAdapter(Covariate)


@dataclass(frozen=True)
class CovariateEncoder:
    """What the training split taught about one covariate."""

    name: str
    covariate: Covariate
    levels: tuple[str, ...] = ()  # labels, or the dimensions of a numeric covariate
    mean: float = 0.0  # numeric: of the training split, on its scale
    deviation: float = 1.0
    features: FeatureTable | None = (
        None  # embedding: of labels seen and unseen, standardised on those seen
    )

    @property
    def size(self) -> int:
        """Columns of the encoding: features, then levels; of a number its value, then its dimensions."""
        return self.described + len(self.levels)

    @property
    def described(self) -> int:
        """Columns in front that do not name a level."""
        return self.features.size if self.features else int(self.covariate.kind == "numeric")

    @property
    def known(self) -> tuple[str, ...]:
        """Every label that has an encoding."""
        return tuple(dict.fromkeys([*self.levels, *self._row_of_features]))

    @cached_property
    def _position_of_level(self) -> dict[str, int]:
        return {level: position for position, level in enumerate(self.levels)}

    @cached_property
    def _row_of_features(self) -> dict[str, int]:
        return (
            {label: row for row, label in enumerate(self.features.labels)} if self.features else {}
        )

    @classmethod
    def learn(
        cls,
        name: str,
        covariate: Covariate,
        column: pd.Series,
        features: FeatureTable | None = None,
    ) -> "CovariateEncoder":
        if covariate.kind != "numeric":
            texts = set(label_texts(column).dropna())
            labels = (
                texts
                if covariate.kind == "categorical"
                else {label for text in texts for label in labels_of(text)}
            )
            return cls(
                name,
                covariate,
                tuple(sorted(labels)),
                features=features.standardised(labels) if features else None,
            )
        parsed = [parse_quantity(value) for value in map(cell, column) if value is not None]
        numbers = np.array([scaled(number, covariate.scale) for number, _ in parsed])
        dimensions = tuple(sorted({dimension for _, dimension in parsed}))
        if not len(numbers):
            return cls(name, covariate, dimensions)
        mean, deviation = float(numbers.mean()), float(numbers.std())
        return cls(
            name,
            covariate,
            dimensions,
            mean,
            deviation if deviation >= ROUNDING * max(1.0, abs(mean)) else 1.0,
        )

    def read(self, value: object, unknown: str) -> tuple[np.ndarray | None, str | None]:
        """((size,) encoding of a value that is not missing, what is wrong with it); None where there is none.

        A value that training did not see is wrong where `unknown` is "refuse".
        """
        try:
            code = self.encode_value(value)
        except ValueError as error:
            return None, str(error)
        if code is None and unknown == "refuse" and self.covariate.kind == "numeric":
            return (
                None,
                f"{shown(value)} is of another kind than training saw: {' or '.join(level or 'plain numbers' for level in self.levels)}",
            )
        if code is None and unknown == "refuse":
            return (
                None,
                f"{shown(value)} was never seen in training{did_you_mean(value, self.known)} (or treat unknown values as missing)",
            )
        return code, None

    def encode_value(self, value: object) -> np.ndarray | None:
        """(size,) encoding of a value that is not missing; None where it is unknown. ValueError where it is no quantity."""
        if self.covariate.kind == "numeric":
            return self._encode_quantity(value)
        labels = [label_text(value)] if self.covariate.kind == "categorical" else labels_of(value)
        if any(
            label not in self._position_of_level and label not in self._row_of_features
            for label in labels
        ):
            return None
        code = np.zeros(self.size, dtype=np.float32)
        for label in dict.fromkeys(labels):
            if label in self._row_of_features:
                code[: self.described] += self.features.values[self._row_of_features[label]]
            if label in self._position_of_level:
                code[self.described + self._position_of_level[label]] = 1
        return code

    def _encode_quantity(self, value: object) -> np.ndarray | None:
        number, dimension = parse_quantity(value)
        if dimension not in self._position_of_level:
            return None
        code = np.zeros(self.size, dtype=np.float32)
        code[0] = min(
            max((scaled(number, self.covariate.scale) - self.mean) / self.deviation, -CLIP), CLIP
        )
        code[1 + self._position_of_level[dimension]] = 1
        return code

    def class_indices(self, column: pd.Series) -> np.ndarray:
        """(N,) position of each value among the levels, -1 where it is missing or no level."""
        return np.array(
            [self._position_of_level.get(text, -1) for text in label_texts(column)], dtype=np.int64
        )

    def state(self) -> dict:
        """Plain values and arrays, for the model file."""
        features = self.features and {
            "labels": list(self.features.labels),
            "values": self.features.values,
        }
        named = {
            "name": self.name,
            "covariate": self.covariate.model_dump(),
            "levels": list(self.levels),
        }
        return named | {"mean": self.mean, "deviation": self.deviation, "features": features}

    @classmethod
    def from_state(cls, state: dict) -> "CovariateEncoder":
        features = state["features"] and FeatureTable(
            tuple(state["features"]["labels"]),
            np.asarray(state["features"]["values"], dtype=np.float32),
        )
        covariate = _COVARIATE.validate_python(state["covariate"])
        return cls(
            state["name"],
            covariate,
            tuple(state["levels"]),
            state["mean"],
            state["deviation"],
            features,
        )


def scaled(number: float, scale: str) -> float:
    """A quantity on the scale of its covariate. ValueError for a negative number on the log scale."""
    if scale == "linear":
        return number
    if number < 0:
        raise ValueError(f"{number} is negative: a covariate on the log scale cannot be")
    return float(np.log(number + LOG_OFFSET))
