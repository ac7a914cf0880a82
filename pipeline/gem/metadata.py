"""Metadata as the model sees it: covariates of each group, their vocabularies, and the encoding of tables.

Missing and unknown are different things: a missing value encodes as zeros and is always allowed; a value that the
vocabulary lacks is refused, unless the caller asks to treat it as missing.

N samples, D_g encoded size of a group.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from pipeline.gem.config import GROUPS, Covariate, Covariates
from pipeline.gem.errors import InputError, did_you_mean, examples
from pipeline.gem.quantities import parse_quantity

LOG_OFFSET = 1e-6    # added before the logarithm of a numeric covariate
CLIP = 6.0           # standard deviations
SEPARATOR = "|"      # between the labels of a multilabel value

_COVARIATE = TypeAdapter(Covariate)


@dataclass(frozen=True)
class Vocabulary:
    """What the training split taught about one covariate."""

    name: str
    covariate: Covariate
    levels: tuple[str, ...] = ()      # labels, or the dimensions of a numeric covariate
    mean: float = 0.0                 # numeric: of the training split, on its scale
    deviation: float = 1.0

    @property
    def size(self) -> int:
        """Columns of the encoding."""
        return len(self.levels) + (self.covariate.kind == "numeric")

    @classmethod
    def learn(cls, name: str, covariate: Covariate, column: pd.Series) -> "Vocabulary":
        values = column.dropna()
        if covariate.kind == "categorical":
            return cls(name, covariate, tuple(sorted(set(map(str, values)))))
        if covariate.kind == "multilabel":
            return cls(name, covariate, tuple(sorted({label for value in set(values) for label in labels_of(value)})))
        parsed = [parse_quantity(value) for value in values]
        scaled = np.array([_scaled(number, covariate.scale) for number, _ in parsed])
        dimensions = tuple(sorted({dimension for _, dimension in parsed}))
        if not len(scaled):
            return cls(name, covariate, dimensions)
        return cls(name, covariate, dimensions, float(scaled.mean()), float(scaled.std()) or 1.0)

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
        labels = labels_of(value) if self.covariate.kind == "multilabel" else [str(value)]
        if any(label not in self.levels for label in labels):
            return None
        code[[self.levels.index(label) for label in labels]] = 1
        return code

    def state(self) -> dict:
        """Plain values, for the model file."""
        return {"name": self.name, "covariate": self.covariate.model_dump(), "levels": list(self.levels), "mean": self.mean, "deviation": self.deviation}

    @classmethod
    def from_state(cls, state: dict) -> "Vocabulary":
        return cls(state["name"], _COVARIATE.validate_python(state["covariate"]), tuple(state["levels"]), state["mean"], state["deviation"])


def labels_of(value: object) -> list[str]:
    return [label.strip() for label in str(value).split(SEPARATOR) if label.strip()]


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
    def fit(cls, samples: pd.DataFrame, covariates: Covariates) -> "MetadataEncoder":
        """Vocabularies of the rows of `samples`, which must be the training split alone."""
        return cls({group: [Vocabulary.learn(name, kind, samples[name]) for name, kind in getattr(covariates, group).items()] for group in GROUPS})

    @property
    def sizes(self) -> dict[str, int]:
        """D_g per group."""
        return {group: sum(field.size for field in fields) for group, fields in self.groups.items()}

    def field_sizes(self, group: str) -> list[int]:
        return [field.size for field in self.groups[group]]

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
        # Few distinct values stand for many rows; the last row of the table of codes is "missing".
        index, values = pd.factorize(samples[field.name])
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
                    f"{field.name}, row {_first(index, position)}: {value!r} was never seen in training"
                    f"{did_you_mean(value, field.levels)} (or treat unknown values as missing)"
                )
        return codes[index]

    def labels(self, samples: pd.DataFrame) -> dict[str, np.ndarray]:
        """(N,) class index per label head, -1 where missing or unknown: categorical fields of the groups with biology."""
        return {
            field.name: pd.Categorical(samples[field.name], categories=list(field.levels)).codes.astype(np.int64)
            for field in self.heads()
        }

    def heads(self) -> list[Vocabulary]:
        """The covariates that have a classifier: categorical, two levels or more, of the last two groups."""
        return [
            field for group in GROUPS[1:] for field in self.groups[group] if field.covariate.kind == "categorical" and len(field.levels) > 1
        ]

    def group_of(self, name: str) -> str:
        return next(group for group, fields in self.groups.items() if any(field.name == name for field in fields))

    def state(self) -> dict:
        return {group: [field.state() for field in fields] for group, fields in self.groups.items()}

    @classmethod
    def from_state(cls, state: dict) -> "MetadataEncoder":
        return cls({group: [Vocabulary.from_state(field) for field in state[group]] for group in GROUPS})


def _first(index: np.ndarray, position: int) -> int:
    return int(np.flatnonzero(index == position)[0])


def clean_samples(samples: pd.DataFrame, covariates: Covariates, where: str) -> pd.DataFrame:
    """Declared covariates in one form: text or numbers, None for missing or empty. InputError lists every bad value."""
    problems = [
        f"{where}: column {name} is declared in data.covariates but absent{did_you_mean(name, samples.columns)}"
        for name in covariates.all()
        if name not in samples
    ]
    cleaned = samples.copy()
    for name, covariate in covariates.all().items():
        if name not in samples:
            continue
        column = samples[name].astype(object)
        text = column.map(lambda value: value.strip() if isinstance(value, str) else value)
        column = text.where(text.notna() & (text != ""), None)
        if covariate.kind == "numeric":
            problems += _bad_quantities(name, column, covariate.scale, where)
            # Plain numbers stay numbers; quantities with a unit stay text, as they were written.
            numbers = pd.to_numeric(column, errors="coerce")
            cleaned[name] = numbers if numbers.notna().sum() == column.notna().sum() else column.map(lambda value: None if value is None else str(value))
        else:
            cleaned[name] = column.map(lambda value: None if value is None else str(value))
    if problems:
        raise InputError(*problems)
    return cleaned


def _bad_quantities(name: str, column: pd.Series, scale: str, where: str) -> list[str]:
    problems = []
    for value in column.dropna().unique():
        try:
            _scaled(parse_quantity(value)[0], scale)
        except ValueError as error:
            rows = np.flatnonzero((column == value).to_numpy())
            problems.append(f"{where}: {name}: {error} (rows {examples(rows)}); declare it categorical, or write a number and a unit")
    return problems
