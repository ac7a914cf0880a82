"""Metadata as the model sees it: covariates of each group, their vocabularies, and the encoding of tables.

Missing and unknown are different things: a missing value encodes as zeros and is always allowed; a value that the
vocabulary lacks is refused, unless the caller asks to treat it as missing.

N samples, D_g encoded size of a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from pipeline.gem.config import GROUPS, Covariate, Covariates
from pipeline.gem.embedding import Features
from pipeline.gem.errors import InputError, did_you_mean, examples
from pipeline.gem.quantities import parse_quantity, shown

LOG_OFFSET = 1e-6    # added before the logarithm of a numeric covariate
CLIP = 6.0           # standard deviations
SEPARATOR = "|"      # between the labels of a multilabel value
ROUNDING = 1e-9      # a deviation below this share of the mean is what rounding leaves of a constant column

_COVARIATE = TypeAdapter(Covariate)


@dataclass(frozen=True)
class Vocabulary:
    """What the training split taught about one covariate."""

    name: str
    covariate: Covariate
    levels: tuple[str, ...] = ()      # labels, or the dimensions of a numeric covariate
    mean: float = 0.0                 # numeric: of the training split, on its scale
    deviation: float = 1.0
    features: Features | None = None  # embedding: of labels seen and unseen, standardised on those seen

    @property
    def size(self) -> int:
        """Columns of the encoding: features, then levels; of a number its value, then its dimensions."""
        return self.described + len(self.levels)

    @property
    def described(self) -> int:
        """Columns in front that do not name a level."""
        return self.features.size if self.features else int(self.covariate.kind == "numeric")

    @classmethod
    def learn(cls, name: str, covariate: Covariate, column: pd.Series, features: Features | None = None) -> "Vocabulary":
        if covariate.kind != "numeric":
            texts = set(label_texts(column).dropna())
            labels = texts if covariate.kind == "categorical" else {label for text in texts for label in labels_of(text)}
            return cls(name, covariate, tuple(sorted(labels)), features=features.standardised(labels) if features else None)
        parsed = [parse_quantity(value) for value in map(cell, column) if value is not None]
        scaled = np.array([_scaled(number, covariate.scale) for number, _ in parsed])
        dimensions = tuple(sorted({dimension for _, dimension in parsed}))
        if not len(scaled):
            return cls(name, covariate, dimensions)
        mean, deviation = float(scaled.mean()), float(scaled.std())
        return cls(name, covariate, dimensions, mean, deviation if deviation >= ROUNDING * max(1.0, abs(mean)) else 1.0)

    def encode_value(self, value: object) -> np.ndarray | None:
        """(size,) encoding of a value that is not missing; None where it is unknown. ValueError where it is no quantity."""
        code = np.zeros(self.size, dtype=np.float32)
        if self.covariate.kind == "numeric":
            number, dimension = parse_quantity(value)
            if dimension not in self.levels:
                return None
            code[0] = np.clip((_scaled(number, self.covariate.scale) - self.mean) / self.deviation, -CLIP, CLIP)
            code[1 + self.levels.index(dimension)] = 1
            return code
        labels = [label_text(value)] if self.covariate.kind == "categorical" else labels_of(value)
        described = self._positions_of_features
        if any(label not in self.levels and label not in described for label in labels):
            return None
        for label in dict.fromkeys(labels):
            if label in described:
                code[: self.described] += self.features.values[described[label]]
            if label in self.levels:
                code[self.described + self.levels.index(label)] = 1
        return code

    @property
    def known(self) -> tuple[str, ...]:
        """Every label that has an encoding."""
        return tuple(dict.fromkeys([*self.levels, *self._positions_of_features]))

    @cached_property
    def _positions_of_features(self) -> dict[str, int]:
        return {label: row for row, label in enumerate(self.features.labels)} if self.features else {}

    def state(self) -> dict:
        """Plain values and arrays, for the model file."""
        features = self.features and {"labels": list(self.features.labels), "values": self.features.values}
        named = {"name": self.name, "covariate": self.covariate.model_dump(), "levels": list(self.levels)}
        return named | {"mean": self.mean, "deviation": self.deviation, "features": features}

    @classmethod
    def from_state(cls, state: dict) -> "Vocabulary":
        features = state["features"] and Features(tuple(state["features"]["labels"]), np.asarray(state["features"]["values"], dtype=np.float32))
        covariate = _COVARIATE.validate_python(state["covariate"])
        return cls(state["name"], covariate, tuple(state["levels"]), state["mean"], state["deviation"], features)


def cell(value: object) -> object:
    """A cell of a table: text trimmed, None where missing or empty. ValueError where it holds more than one value."""
    if isinstance(value, str):
        return value.strip() or None
    if not pd.api.types.is_scalar(value):
        raise ValueError(f"a {type(value).__name__} in a cell; expected one value")
    return None if pd.isna(value) else value


def label_text(value: object) -> str | None:
    """The text of a label, however a table stores it; None where missing or empty.

    Whole numbers lose their point: pandas makes floats of an integer column as soon as one value is missing.
    """
    value = cell(value)
    if value is None or isinstance(value, str):
        return value
    whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
    return str(int(value)) if whole else str(value)


def label_texts(column: pd.Series) -> pd.Series:
    """`label_text` of every cell."""
    return pd.Series([label_text(value) for value in column], index=column.index, dtype=object)


def labels_of(value: object) -> list[str]:
    return [label.strip() for label in (label_text(value) or "").split(SEPARATOR) if label.strip()]


def _scaled(number: float, scale: str) -> float:
    if scale == "linear":
        return number
    if number < 0:
        raise ValueError(f"{number} is negative: a covariate on the log scale cannot be")
    return float(np.log(number + LOG_OFFSET))


class MetadataEncoder:
    """Tables to matrices, one per group; fields in the order of their declaration."""

    def __init__(self, groups: dict[str, list[Vocabulary]]):
        self.groups = groups

    @classmethod
    def fit(cls, samples: pd.DataFrame, covariates: Covariates, features: Mapping[str, Features] | None = None) -> "MetadataEncoder":
        """Vocabularies of the rows of `samples`, which must be the training split alone; `features` of each embedding."""
        features = features or {}
        return cls(
            {
                group: [Vocabulary.learn(name, kind, samples[name], features.get(name)) for name, kind in getattr(covariates, group).items()]
                for group in GROUPS
            }
        )

    @property
    def sizes(self) -> dict[str, int]:
        """D_g per group."""
        return {group: sum(field.size for field in fields) for group, fields in self.groups.items()}

    def blocks(self, group: str) -> list[tuple[int, int]]:
        """Per field (columns that describe it, columns that name its level): the second part of an embedding is its identity."""
        return [
            (field.described, len(field.levels)) if field.features else (field.size, 0) for field in self.groups[group]
        ]

    @property
    def names(self) -> list[str]:
        return [field.name for fields in self.groups.values() for field in fields]

    def encode(self, samples: pd.DataFrame, unknown: str = "refuse") -> dict[str, np.ndarray]:
        """Per group (N, D_g) float32. A column that is absent is missing everywhere.

        `unknown` is "refuse" (InputError naming column, row and the closest known values) or "missing".
        """
        if unknown not in ("refuse", "missing"):
            raise ValueError(f"unknown is {unknown!r}; expected 'refuse' or 'missing'")
        problems: list[str] = []
        encoded = {}
        for group, fields in self.groups.items():
            parts = [self._encode_field(field, samples, unknown, problems) for field in fields]
            encoded[group] = np.concatenate(parts, axis=1) if parts else np.zeros((len(samples), 0), dtype=np.float32)
        if problems:
            raise InputError(*problems)
        return encoded

    def _encode_field(self, field: Vocabulary, samples: pd.DataFrame, unknown: str, problems: list[str]) -> np.ndarray:
        if field.name not in samples:
            return np.zeros((len(samples), field.size), dtype=np.float32)
        try:
            index, values = _distinct(samples[field.name])
        except ValueError as error:
            problems.append(f"{field.name}: {error}")
            return np.zeros((len(samples), field.size), dtype=np.float32)
        # Few distinct values stand for many rows; the last row of the table of codes is "missing".
        codes = np.zeros((len(values) + 1, field.size), dtype=np.float32)
        for position, value in enumerate(values):
            try:
                code = field.encode_value(value)
            except ValueError as error:
                problems.append(f"{field.name}, row {_first(index, position)}: {error}")
                continue
            if code is not None:
                codes[position] = code
            elif unknown == "refuse":
                problems.append(
                    f"{field.name}, row {_first(index, position)}: {shown(value)} was never seen in training"
                    f"{did_you_mean(value, field.known)} (or treat unknown values as missing)"
                )
        return codes[index]

    def labels(self, samples: pd.DataFrame) -> dict[str, np.ndarray]:
        """(N,) class index per label head, -1 where missing or unknown: categorical fields of the groups with biology."""
        return {field.name: self._class_indices(field, samples[field.name]) for field in self.heads()}

    @staticmethod
    def _class_indices(field: Vocabulary, column: pd.Series) -> np.ndarray:
        positions = {level: position for position, level in enumerate(field.levels)}
        return np.array([positions.get(text, -1) for text in label_texts(column)], dtype=np.int64)

    def heads(self) -> list[Vocabulary]:
        """The covariates that have a classifier: one label of two or more, in the last two groups."""
        return [
            field
            for group in GROUPS[1:]
            for field in self.groups[group]
            if field.covariate.kind in ("categorical", "embedding") and len(field.levels) > 1
        ]

    def group_of(self, name: str) -> str:
        return next(group for group, fields in self.groups.items() if any(field.name == name for field in fields))

    def state(self) -> dict:
        return {group: [field.state() for field in fields] for group, fields in self.groups.items()}

    @classmethod
    def from_state(cls, state: dict) -> "MetadataEncoder":
        return cls({group: [Vocabulary.from_state(field) for field in state[group]] for group in GROUPS})


def _distinct(column: pd.Series) -> tuple[np.ndarray, list]:
    """(position of each cell among the distinct values, -1 where missing; the values). True and 1 are two values."""
    positions: dict = {}
    index = np.full(len(column), -1)
    for row, value in enumerate(map(cell, column)):
        if value is not None:
            index[row] = positions.setdefault((type(value), value), len(positions))
    return index, [value for _, value in positions]


def _first(index: np.ndarray, position: int) -> int:
    return int(np.flatnonzero(index == position)[0])


def clean_samples(samples: pd.DataFrame, covariates: Covariates, where: str) -> pd.DataFrame:
    """Declared covariates in one form: text or numbers, None for missing or empty. InputError lists every bad value."""
    problems: list[str] = []
    cleaned = samples.copy()
    for name, covariate in covariates.all().items():
        if name not in samples:
            problems.append(f"{where}: column {name} is declared in data.covariates but absent{did_you_mean(name, samples.columns)}")
        elif bad := list_cells(samples[name], f"{where}: {name}"):
            problems += bad
        elif covariate.kind == "numeric":
            problems += _bad_quantities(name, samples[name], covariate.scale, where)
            cleaned[name] = _numbers_or_text(samples[name])
        else:
            cleaned[name] = label_texts(samples[name])
    if problems:
        raise InputError(*problems)
    return cleaned


def list_cells(column: pd.Series, where: str) -> list[str]:
    """A problem line if cells hold lists."""
    rows = [row for row, value in enumerate(column) if not pd.api.types.is_scalar(value)]
    return [f"{where}: more than one value in a cell (rows {examples(rows)}); expected text or a number, several labels as a{SEPARATOR}b"] if rows else []


def _numbers_or_text(column: pd.Series) -> pd.Series:
    """Plain numbers stay numbers; quantities with a unit stay text, as they were written."""
    cells = pd.Series([cell(value) for value in column], index=column.index, dtype=object)
    numbers = pd.to_numeric(cells, errors="coerce").astype(float)
    if numbers.notna().sum() == cells.notna().sum():
        return numbers
    return cells.map(lambda value: None if value is None else str(value))


def _bad_quantities(name: str, column: pd.Series, scale: str, where: str) -> list[str]:
    problems = []
    index, values = _distinct(column)
    for position, value in enumerate(values):
        try:
            _scaled(parse_quantity(value)[0], scale)
        except ValueError as error:
            rows = np.flatnonzero(index == position)
            problems.append(f"{where}: {name}: {error} (rows {examples(rows)}); declare it categorical, or write a number and a unit")
    return problems
