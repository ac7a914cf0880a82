"""Assigns every sample of a cohort to a named split.

Whole entities first (latest studies, perturbations, pairs of context and perturbation), the tests before the
validations, then samples at random. A split that a cohort cannot have is absent, and the reason is given.
"""

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data, Splits
from pipeline.gem.data.splits import TEST_CONTROL, TRAIN, Entities, date_order
from pipeline.gem.preparation.combinations import named_pairs, pairs_to_hold_out


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
    samples: pd.DataFrame,
    entities: Entities,
    data: Data,
    params: Splits,
    split: pd.Series,
    notes: list[str],
    rng: np.random.Generator,
) -> None:
    """Whole studies, perturbations and pairs, those of the test before those of validation."""
    studies = _studies_by_date(samples, entities.study, data, rng)
    belongs = pd.DataFrame(
        {name: getattr(entities, name) for name in ("context", "perturbation", "pair", "control")}
    )
    named = named_pairs(samples, belongs, data, params)
    in_named = entities.pair.isin([*named[0], *named[1]])
    # A named pair is a combination only while its perturbation is seen elsewhere.
    perturbations = [
        name
        for name in rng.permutation(
            np.array(sorted(entities.perturbation.dropna().unique()), dtype=object)
        )
        if not (in_named.any() and (entities.shows([name]) & in_named).any())
    ]
    test_studies, validation_studies = _test_and_validation(studies[::-1], params.study)
    test_perturbations, validation_perturbations = _test_and_validation(
        perturbations, params.perturbation
    )
    held = entities.study.isin(test_studies + validation_studies) | entities.shows(
        test_perturbations + validation_perturbations
    )
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
        notes += [
            f"{number} samples of the pairs that splits names for {name} are in {other}"
            for other, number in elsewhere.items()
        ]


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
        return (
            "every sample of the pairs named lies in a held-out study"
            if asked
            else "no pair is named"
        )
    pairs = f"of {entities.pair.nunique()} pairs of context and perturbation"
    return f"{pairs} a share of {asked} is none, or none is left with both seen apart"


def _reserve_controls(
    entities: Entities,
    data: Data,
    params: Splits,
    split: pd.Series,
    notes: list[str],
    rng: np.random.Generator,
) -> None:
    """A share of each context's controls, which nobody trains on."""
    free = entities.control & (split == "")
    reserved: list[int] = []
    for _, rows in entities.context[free].groupby(entities.context[free], sort=True):
        reserved += list(
            rng.permutation(rows.index.to_numpy())[: round(params.test_control * len(rows))]
        )
    split[reserved] = TEST_CONTROL
    if not reserved:
        few = f"{int(entities.control.sum())} controls are too few to reserve a share of {params.test_control} in any context"
        notes.append(
            f"{TEST_CONTROL} is absent: {'data.control is null' if data.control is None else few}"
        )


def _hold_out_samples(
    entities: Entities, params: Splits, split: pd.Series, notes: list[str], rng: np.random.Generator
) -> None:
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
            notes.append(
                f"{name} is absent: a share of {share} of {len(left)} samples is none, or each is the only one of its perturbation or context"
            )


def _studies_by_date(
    samples: pd.DataFrame, studies: pd.Series, data: Data, rng: np.random.Generator
) -> list:
    """Studies, the latest last and those without a date first; in random order where there are no dates."""
    names = sorted(studies.dropna().unique())
    if data.date_column is None:
        return list(rng.permutation(np.array(names, dtype=object)))
    latest = date_order(samples[data.date_column]).groupby(studies).max().fillna(-np.inf)
    return sorted(names, key=lambda name: (latest[name], name))
