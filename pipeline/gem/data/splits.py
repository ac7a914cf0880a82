"""Named splits of a cohort: what is held out.

Whole entities first (latest studies, perturbations, pairs of context and perturbation), the tests before the
validations, then samples at random. A split that a cohort cannot have is absent, and the reason is said.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import examples
from pipeline.gem.data.labels import label_texts, labels_of

TRAIN = "train"
VALIDATIONS = (
    "validation",
    "validation_combination",
    "validation_perturbation",
    "validation_study",
)
SELECTION_SPLITS = (
    "validation_combination",
    "validation",
)  # early stopping and searches use the first that exists
TESTS = ("test_random", "test_combination", "test_perturbation", "test_study")
TEST_CONTROL = "test_control"  # controls nobody trains on: the observed side of effects
ROLES = {TRAIN: (TRAIN,), "validation": VALIDATIONS, "test": (*TESTS, TEST_CONTROL)}


def role_of(split: str) -> str:
    """train, validation or test: what may look at the samples."""
    return next(role for role, splits in ROLES.items() if split in splits)


def contexts(samples: pd.DataFrame, data: Data) -> pd.Series:
    """One name per sample for the values of the context columns ("?" for a missing one)."""
    return (
        joined([samples[name] for name in data.context_columns])
        if data.context_columns
        else pd.Series("all", index=samples.index)
    )


def joined(columns: list[pd.Series]) -> pd.Series:
    """One text per row for its values in several columns ("?" for a missing one)."""
    return reduce(
        lambda left, right: left + " / " + right,
        [label_texts(column).fillna("?") for column in columns],
    )


def is_control(samples: pd.DataFrame, data: Data) -> pd.Series:
    if data.control is None:
        return pd.Series(False, index=samples.index)
    return label_texts(samples[data.control.column]) == data.control.value


def date_order(column: pd.Series) -> pd.Series:
    """Dates as numbers that order them: plain numbers as they are, else ISO 8601 ("2014", "2014-06-01"). NaN where missing or unreadable."""
    texts = label_texts(column)
    known = pd.Series(texts.dropna().unique(), dtype=object)
    numbers = pd.to_numeric(known, errors="coerce").astype(float)
    if not np.isfinite(numbers).all():
        times = pd.to_datetime(known, errors="coerce", format="ISO8601", utc=True)
        numbers = (times - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)
    return texts.map(dict(zip(known, numbers, strict=True))).astype(float)


def unreadable_dates(column: pd.Series, where: str) -> list[str]:
    """A problem line for each date that `date_order` cannot place."""
    texts = label_texts(column)
    bad = texts[texts.notna() & date_order(column).isna()]
    return [
        f"{where}: {value!r} is no date (rows {examples(np.flatnonzero((texts == value).to_numpy()))}); write numbers, or dates as 2014-06-01"
        for value in bad.unique()
    ]


@dataclass(frozen=True)
class Entities:
    """What each sample belongs to, as text; None where it belongs to none."""

    study: pd.Series
    context: pd.Series
    perturbation: pd.Series  # None for controls
    pair: pd.Series  # context and perturbation
    control: pd.Series  # bool
    several: bool  # whether "a|b" is both of two perturbations, or the name of one

    @classmethod
    def of(cls, samples: pd.DataFrame, data: Data) -> "Entities":
        nothing = pd.Series(None, index=samples.index, dtype=object)
        context, control = contexts(samples, data), is_control(samples, data)
        perturbation = (
            label_texts(samples[data.control.column]).where(~control, None)
            if data.control
            else nothing
        )
        kind = data.covariates.all().get(data.control.column) if data.control else None
        return cls(
            study=label_texts(samples[data.study_column]) if data.study_column else nothing,
            context=context,
            perturbation=perturbation,
            pair=(context + " / " + perturbation).where(perturbation.notna(), None),
            control=control,
            several=kind is not None and kind.kind in ("multilabel", "embedding"),
        )

    def shows(self, names: Iterable[str]) -> pd.Series:
        """Whether a sample shows a perturbation of these names: where one value holds several, "a|b" shows "a"."""
        if not self.several:
            return self.perturbation.isin(list(names))
        wanted = [set(labels_of(name)) for name in names]
        values = self.perturbation.dropna().unique()
        return self.perturbation.isin(
            [value for value in values if any(one <= set(labels_of(value)) for one in wanted)]
        )


def sizes(samples: pd.DataFrame, split: pd.Series, data: Data) -> pd.DataFrame:
    """A row per split that is there: its samples, and how many studies, contexts, perturbations, pairs and controls they hold."""
    entities = Entities.of(samples, data)
    rows = []
    for name in (name for names in ROLES.values() for name in names):
        inside = split == name
        if inside.any():
            distinct = {
                f"{kind}s": getattr(entities, kind)[inside].nunique()
                for kind in ("study", "context", "perturbation", "pair")
            }
            rows.append(
                {
                    "split": name,
                    "samples": int(inside.sum()),
                    **distinct,
                    "controls": int(entities.control[inside].sum()),
                }
            )
    return pd.DataFrame(rows).rename(columns={"studys": "studies"})
