"""Names and roles of the splits of a cohort, and the entities that a split can hold out."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import examples
from pipeline.gem.data.labels import (
    MISSING_ADVICE,
    SET_KINDS,
    join_keys,
    label_key,
    label_texts,
    looks_missing,
    split_labels,
)

TRAIN = "train"
VALIDATIONS = (
    "validation",
    "validation_combination",
    "validation_perturbation",
    "validation_study",
)
VISIBLE = (TRAIN, *VALIDATIONS)  # everything but the test
# Early stopping and searches use the first of these that the cohort has.
SELECTION_SPLITS = ("validation_combination", "validation")
TESTS = (
    "test_random",
    "test_combination",
    "test_condition",
    "test_context",
    "test_level",
    "test_perturbation",
    "test_study",
)
TEST_CONTROL = "test_control"  # controls held out of training, the observed side of effects
SPLIT_ROLES = {TRAIN: (TRAIN,), "validation": VALIDATIONS, "test": (*TESTS, TEST_CONTROL)}


def role_of(split: str) -> str:
    """train, validation or test."""
    return next(role for role, splits in SPLIT_ROLES.items() if split in splits)


def contexts(samples: pd.DataFrame, data: Data) -> pd.Series:
    """A joined key per sample of its context columns."""
    if not data.context_columns:
        return pd.Series("all", index=samples.index)
    return join_keys([label_key(samples[name]) for name in data.context_columns])


def is_control(samples: pd.DataFrame, data: Data) -> pd.Series:
    if data.control is None:
        return pd.Series(False, index=samples.index)
    return label_texts(samples[data.control.column]) == data.control.value


def date_order(column: pd.Series) -> pd.Series:
    """Numbers in the order of the dates; NaN if missing or unreadable.

    Plain numbers stay as they are; others are ISO 8601 ("2014", "2014-06-01"), in days.
    """
    texts = label_texts(column)
    values = pd.Series(texts.dropna().unique(), dtype=object)
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    if not np.isfinite(numbers).all():
        times = pd.to_datetime(values, errors="coerce", format="ISO8601", utc=True)
        numbers = (times - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)
    return texts.map(dict(zip(values, numbers, strict=True))).astype(float)


def date_problems(column: pd.Series, where: str) -> list[str]:
    """A message for each value that `date_order` cannot read."""
    texts = label_texts(column)
    unreadable = texts[texts.notna() & date_order(column).isna()]
    return [
        f"{where}: {value!r} is not a date "
        f"(rows {examples(np.flatnonzero((texts == value).to_numpy()))}); "
        + (MISSING_ADVICE if looks_missing(value) else "write numbers, or dates as 2014-06-01")
        for value in unreadable.unique()
    ]


@dataclass(frozen=True)
class Entities:
    """The entities of each sample as text, None for a sample without one.

    The samples are those of a cohort: a set of labels, or a quantity, has one text.
    """

    samples: pd.DataFrame
    data: Data
    study: pd.Series
    level: pd.Series  # the value of data.level_column
    context: pd.Series
    context_known: pd.Series  # bool, no part of the context is missing
    perturbation: pd.Series  # None for controls
    pair: pd.Series  # context and perturbation; None if a part of it is missing
    control: pd.Series  # bool
    multilabel: bool  # "a|b" is a combination of two perturbations, not one name

    @classmethod
    def of(cls, samples: pd.DataFrame, data: Data) -> "Entities":
        context, control = contexts(samples, data), is_control(samples, data)
        study = level = perturbation = pair = pd.Series(None, index=samples.index, dtype=object)
        covariate = None
        if data.study_column:
            study = label_texts(samples[data.study_column])
        if data.level_column:
            level = label_texts(samples[data.level_column])
        if data.control:
            perturbation = label_texts(samples[data.control.column]).where(~control, None)
            pair = join_keys([context, label_key(perturbation)])
            covariate = data.covariates.all().get(data.control.column)
        context_known = pd.Series(True, index=samples.index)
        for name in data.context_columns:
            context_known &= label_texts(samples[name]).notna()
        return cls(
            samples=samples,
            data=data,
            study=study,
            level=level,
            context=context,
            perturbation=perturbation,
            context_known=context_known,
            pair=pair.where(context_known & perturbation.notna(), None),
            control=control,
            multilabel=covariate is not None and covariate.kind in SET_KINDS,
        )

    @cached_property
    def condition(self) -> pd.Series:
        """The pair, and dose, time and all else that the perturbation's covariates say; None for
        controls. A part that is missing is a part of its own."""
        if self.data.control is None:
            return self.perturbation
        columns = dict.fromkeys([*self.data.covariates.perturbation, self.data.control.column])
        keys = [self.context, *(label_key(self.samples[name]) for name in columns)]
        return join_keys(keys).where(self.perturbation.notna(), None)

    @property
    def known_context(self) -> pd.Series:
        """None for a context with a missing part."""
        return self.context.where(self.context_known, None)

    @property
    def treated_context(self) -> pd.Series:
        """None for controls."""
        return self.context.where(~self.control, None)

    @property
    def treated_level(self) -> pd.Series:
        """None for controls."""
        return self.level.where(~self.control, None)

    def has_perturbation(self, names: Iterable[str]) -> pd.Series:
        """Whether each sample has one of the perturbations; "a|b" has "a" if multilabel."""
        return self._has(self.perturbation, self._labels if self.multilabel else None, names)

    def perturbations_lacking(self, rows: pd.Series, elsewhere: pd.Series) -> set[str]:
        """The perturbations of the samples `rows` (N,) that the samples `elsewhere` (N,) do not
        know. They know a set "a|b" also from its labels, each alone or in another set."""
        known = set(self.perturbation[elsewhere].dropna())
        lacking = set(self.perturbation[rows].dropna()) - known
        if not self.multilabel:
            return lacking
        labels = set().union(*(self._labels[name] for name in known))
        return {
            name for name in lacking if len(self._labels[name]) < 2 or self._labels[name] - labels
        }

    def has_level(self, names: Iterable[str]) -> pd.Series:
        """The same of the values of data.level_column."""
        covariate = self.data.covariates.all().get(self.data.level_column)
        holds_sets = covariate is not None and covariate.kind in SET_KINDS
        return self._has(self.level, _labels_of(self.level) if holds_sets else None, names)

    @staticmethod
    def _has(
        column: pd.Series, labels: dict[str, set[str]] | None, names: Iterable[str]
    ) -> pd.Series:
        names = list(names)
        if labels is None:
            return column.isin(names)
        sets = [set(split_labels(name)) for name in names]
        return column.isin(
            [value for value, own in labels.items() if any(part <= own for part in sets)]
        )

    def labels(self, perturbation: str) -> set[str]:
        """Of a set "a|b" its labels; else the perturbation itself."""
        return self._labels[perturbation] if self.multilabel else {perturbation}

    @cached_property
    def _labels(self) -> dict[str, set[str]]:
        """Of each perturbation."""
        return _labels_of(self.perturbation)


def _labels_of(column: pd.Series) -> dict[str, set[str]]:
    """The set of labels of each distinct value."""
    return {value: set(split_labels(value)) for value in column.dropna().unique()}


def split_sizes(samples: pd.DataFrame, split: pd.Series, data: Data) -> pd.DataFrame:
    """A row per split: numbers of samples, studies, contexts, perturbations, pairs, conditions and
    controls."""
    entities = Entities.of(samples, data)
    rows = []
    for name in (name for names in SPLIT_ROLES.values() for name in names):
        inside = split == name
        if inside.any():
            rows.append(
                {
                    "split": name,
                    "samples": int(inside.sum()),
                    "studies": entities.study[inside].nunique(),
                    "contexts": entities.context[inside].nunique(),
                    "perturbations": entities.perturbation[inside].nunique(),
                    "pairs": entities.pair[inside].nunique(),
                    "conditions": entities.condition[inside].nunique(),
                    "controls": int(entities.control[inside].sum()),
                }
            )
    return pd.DataFrame(rows)
