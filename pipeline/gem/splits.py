"""Named splits of a cohort: what is held out.

Whole entities first (latest studies, perturbations, pairs of context and perturbation), the tests before the
validations, then samples at random. A split that a cohort cannot have is absent, and the reason is said.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd

from pipeline.gem.config import Data, Splits
from pipeline.gem.errors import examples
from pipeline.gem.labels import label_texts, labels_of
from pipeline.gem.pairs import named_pairs, pairs_to_hold_out

TRAIN = "train"
VALIDATIONS = ("validation", "validation_combination", "validation_perturbation", "validation_study")
TESTS = ("test_random", "test_combination", "test_perturbation", "test_study")
TEST_CONTROL = "test_control"  # controls nobody trains on: the observed side of effects
ROLES = {TRAIN: (TRAIN,), "validation": VALIDATIONS, "test": (*TESTS, TEST_CONTROL)}


def role_of(split: str) -> str:
    """train, validation or test: what may look at the samples."""
    return next(role for role, splits in ROLES.items() if split in splits)


def contexts(samples: pd.DataFrame, data: Data) -> pd.Series:
    """One name per sample for the values of the context columns ("?" for a missing one)."""
    return joined([samples[name] for name in data.context_columns]) if data.context_columns else pd.Series("all", index=samples.index)


def joined(columns: list[pd.Series]) -> pd.Series:
    """One text per row for its values in several columns ("?" for a missing one)."""
    return reduce(lambda left, right: left + " / " + right, [label_texts(column).fillna("?") for column in columns])


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
    perturbation: pd.Series   # None for controls
    pair: pd.Series           # context and perturbation
    control: pd.Series        # bool
    several: bool             # whether "a|b" is both of two perturbations, or the name of one

    @classmethod
    def of(cls, samples: pd.DataFrame, data: Data) -> "Entities":
        nothing = pd.Series(None, index=samples.index, dtype=object)
        context, control = contexts(samples, data), is_control(samples, data)
        perturbation = label_texts(samples[data.control.column]).where(~control, None) if data.control else nothing
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
        return self.perturbation.isin([value for value in values if any(one <= set(labels_of(value)) for one in wanted)])


def assign_splits(samples: pd.DataFrame, data: Data, params: Splits) -> tuple[pd.Series, list[str]]:
    """(split of each sample, why which splits are absent). The order of the rows does not matter."""
    order = np.argsort(samples["sample_id"].to_numpy(dtype=str), kind="stable")
    ordered = samples.iloc[order].reset_index(drop=True)
    entities = Entities.of(ordered, data)
    rng = np.random.default_rng(params.seed)
    split = pd.Series("", index=ordered.index, dtype=object)
    notes: list[str] = []
    _hold_out_entities(ordered, entities, data, params, split, notes, rng)
    _reserve_controls(entities, data, params, split, notes, rng)
    _hold_out_samples(entities, params, split, notes, rng)
    split[split == ""] = TRAIN
    result = pd.Series("", index=samples.index, dtype=object)
    result.iloc[order] = split.to_numpy()
    return result, notes


def _hold_out_entities(
    samples: pd.DataFrame, entities: Entities, data: Data, params: Splits, split: pd.Series, notes: list[str], rng: np.random.Generator
) -> None:
    """Whole studies, perturbations and pairs, those of the test before those of validation."""
    studies = _studies_by_date(samples, entities.study, data, rng)
    belongs = pd.DataFrame({name: getattr(entities, name) for name in ("context", "perturbation", "pair", "control")})
    named = named_pairs(samples, belongs, data, params)
    in_named = entities.pair.isin([*named[0], *named[1]])
    # A named pair is a combination only while its perturbation is seen elsewhere.
    perturbations = [
        name
        for name in rng.permutation(np.array(sorted(entities.perturbation.dropna().unique()), dtype=object))
        if not (in_named.any() and (entities.shows([name]) & in_named).any())
    ]
    test_studies, validation_studies = _test_and_validation(studies[::-1], params.study)
    test_perturbations, validation_perturbations = _test_and_validation(perturbations, params.perturbation)
    held = entities.study.isin(test_studies + validation_studies) | entities.shows(test_perturbations + validation_perturbations)
    test_pairs, validation_pairs = pairs_to_hold_out(belongs, ~held, named, data, params, rng)
    chosen = (
        ("test_study", entities.study.isin(test_studies)),
        ("test_perturbation", entities.shows(test_perturbations)),
        ("test_combination", entities.pair.isin(test_pairs)),
        ("validation_study", entities.study.isin(validation_studies)),
        ("validation_perturbation", entities.shows(validation_perturbations)),
        ("validation_combination", entities.pair.isin(validation_pairs)),
    )
    for name, wanted in chosen:
        rows = wanted & (split == "")
        split[rows] = name
        if not rows.any():
            notes.append(f"{name} is absent: {_why_absent(name, entities, data, params)}")
    for name, pairs in (("test_combination", named[0]), ("validation_combination", named[1])):
        elsewhere = split[entities.pair.isin(pairs) & (split != name)].value_counts()
        notes += [f"{number} samples of the pairs that splits names for {name} are in {other}" for other, number in elsewhere.items()]


def _test_and_validation(names: list, share: float) -> tuple[list, list]:
    """A share of the names, and as many again."""
    number = round(share * len(names))
    return names[:number], names[number : 2 * number]


def _why_absent(name: str, entities: Entities, data: Data, params: Splits) -> str:
    if name.endswith("_study"):
        if data.study_column is None:
            return "data.study_column is null"
        return f"a share of {params.study} of {entities.study.nunique()} studies is none"
    if data.control is None:
        return "data.control is null"
    if name.endswith("_perturbation"):
        return f"a share of {params.perturbation} of {entities.perturbation.nunique()} perturbations besides the control is none"
    asked = params.combination if name.startswith("test") else params.validation_combination
    if isinstance(asked, tuple):
        return "every sample of the pairs named lies in a held-out study" if asked else "no pair is named"
    pairs = f"of {entities.pair.nunique()} pairs of context and perturbation"
    return f"{pairs} a share of {asked} is none, or none is left with both seen apart"


def _reserve_controls(entities: Entities, data: Data, params: Splits, split: pd.Series, notes: list[str], rng: np.random.Generator) -> None:
    """A share of each context's controls, which nobody trains on."""
    free = entities.control & (split == "")
    reserved: list[int] = []
    for _, rows in entities.context[free].groupby(entities.context[free], sort=True):
        reserved += list(rng.permutation(rows.index.to_numpy())[: round(params.test_control * len(rows))])
    split[reserved] = TEST_CONTROL
    if not reserved:
        few = f"{int(entities.control.sum())} controls are too few to reserve a share of {params.test_control} in any context"
        notes.append(f"{TEST_CONTROL} is absent: {'data.control is null' if data.control is None else few}")


def _hold_out_samples(entities: Entities, params: Splits, split: pd.Series, notes: list[str], rng: np.random.Generator) -> None:
    """Samples at random among those left; training keeps one of each perturbation and context, so that what is random interpolates."""
    left = rng.permutation(split.index[split == ""].to_numpy())
    perturbation, context = entities.perturbation[left], entities.context[left]
    kept = (perturbation.notna() & ~perturbation.duplicated()) | ~context.duplicated()
    free = left[~kept.to_numpy()]
    tests, validations = round(params.test_random * len(left)), round(params.validation * len(left))
    for name, share, rows in (
        ("test_random", params.test_random, free[:tests]),
        ("validation", params.validation, free[tests : tests + validations]),
    ):
        split[rows] = name
        if not len(rows):
            notes.append(f"{name} is absent: a share of {share} of {len(left)} samples is none, or each is the only one of its perturbation or context")


def _studies_by_date(samples: pd.DataFrame, studies: pd.Series, data: Data, rng: np.random.Generator) -> list:
    """Studies, the latest last and those without a date first; in random order where there are no dates."""
    names = sorted(studies.dropna().unique())
    if data.date_column is None:
        return list(rng.permutation(np.array(names, dtype=object)))
    latest = date_order(samples[data.date_column]).groupby(studies).max().fillna(-np.inf)
    return sorted(names, key=lambda name: (latest[name], name))


def sizes(samples: pd.DataFrame, split: pd.Series, data: Data) -> pd.DataFrame:
    """A row per split that is there: its samples, and how many studies, contexts, perturbations, pairs and controls they hold."""
    entities = Entities.of(samples, data)
    rows = []
    for name in (name for names in ROLES.values() for name in names):
        inside = split == name
        if inside.any():
            distinct = {f"{kind}s": getattr(entities, kind)[inside].nunique() for kind in ("study", "context", "perturbation", "pair")}
            rows.append({"split": name, "samples": int(inside.sum()), **distinct, "controls": int(entities.control[inside].sum())})
    return pd.DataFrame(rows).rename(columns={"studys": "studies"})
