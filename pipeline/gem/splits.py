"""Named splits of a cohort: what is held out, and the audit that nothing leaks.

Whole entities first (latest studies, perturbations, pairs of context and perturbation), the tests before the
validations, then samples at random. A split that a cohort cannot have is absent, and the reason is said.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from pipeline.gem.config import Data, Splits
from pipeline.gem.errors import IntegrityError, examples

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
    if not data.context_columns:
        return pd.Series("all", index=samples.index)
    return samples[list(data.context_columns)].fillna("?").astype(str).agg(" / ".join, axis=1)


def is_control(samples: pd.DataFrame, data: Data) -> pd.Series:
    if data.control is None:
        return pd.Series(False, index=samples.index)
    return samples[data.control.column] == data.control.value


def assign_splits(samples: pd.DataFrame, data: Data, params: Splits) -> tuple[pd.Series, list[str]]:
    """(split of each sample, why which splits are absent)."""
    rng = np.random.default_rng(params.seed)
    split = pd.Series("", index=samples.index)
    notes: list[str] = []

    def hold_out(name: str, entities: pd.Series, chosen: list, reason: str) -> None:
        rows = entities.isin(chosen) & (split == "")
        if rows.any():
            split[rows] = name
        else:
            notes.append(f"{name} is absent: {reason}")

    studies = samples[data.study_column].astype(object) if data.study_column else pd.Series(None, index=samples.index, dtype=object)
    control = is_control(samples, data)
    perturbations = samples[data.control.column].where(~control) if data.control else pd.Series(None, index=samples.index, dtype=object)
    pairs = (contexts(samples, data) + " / " + perturbations.astype(object)).where(perturbations.notna())

    ordered = _studies_by_date(samples, studies, data, rng)
    count = round(params.study * len(ordered))
    test_studies, validation_studies = ordered[len(ordered) - count :], ordered[max(len(ordered) - 2 * count, 0) : len(ordered) - count]
    named = list(rng.permutation(np.array(sorted(perturbations.dropna().unique()), dtype=object)))
    count = round(params.perturbation * len(named))
    test_perturbations, validation_perturbations = named[:count], named[count : 2 * count]
    held = studies.isin(test_studies + validation_studies) | perturbations.isin(test_perturbations + validation_perturbations)
    test_pairs, validation_pairs = _pairs_to_hold_out(samples, data, perturbations, pairs, ~held, params.combination, rng)

    no_studies = f"a share of {params.study} of {len(ordered)} studies is none"
    no_perturbations = f"a share of {params.perturbation} of {len(named)} perturbations besides the control is none"
    no_pairs = f"of {pairs.nunique()} pairs of context and perturbation a share of {params.combination} is none, or none is left with both seen apart"
    hold_out("test_study", studies, test_studies, no_studies)
    hold_out("test_perturbation", perturbations, test_perturbations, no_perturbations)
    hold_out("test_combination", pairs, test_pairs, no_pairs)
    hold_out("validation_study", studies, validation_studies, no_studies)
    hold_out("validation_perturbation", perturbations, validation_perturbations, no_perturbations)
    hold_out("validation_combination", pairs, validation_pairs, no_pairs)

    _hold_out_samples(samples, data, params, split, control, notes, rng)
    split[split == ""] = TRAIN
    return split, notes


def _hold_out_samples(
    samples: pd.DataFrame, data: Data, params: Splits, split: pd.Series, control: pd.Series, notes: list[str], rng: np.random.Generator
) -> None:
    """Random samples among those left: reserved controls, test, validation."""
    reserved: list = []
    for _, rows in samples[control & (split == "")].groupby(contexts(samples, data), sort=True):
        reserved += list(rng.permutation(rows.index.to_numpy())[: round(params.test_control * len(rows))])
    split[reserved] = TEST_CONTROL
    if not reserved:
        notes.append(f"{TEST_CONTROL} is absent: {int(control.sum())} controls are too few to reserve a share of {params.test_control} in any context")
    left = rng.permutation(split.index[split == ""].to_numpy())
    tests, validations = round(params.test_random * len(left)), round(params.validation * len(left))
    split[left[:tests]] = "test_random"
    split[left[tests : tests + validations]] = "validation"
    for name, share, number in (("test_random", params.test_random, tests), ("validation", params.validation, validations)):
        if number == 0:
            notes.append(f"{name} is absent: a share of {share} of {len(left)} samples is none")


def _studies_by_date(samples: pd.DataFrame, studies: pd.Series, data: Data, rng: np.random.Generator) -> list:
    """Studies, the latest last; in random order where there are no dates."""
    names = sorted(studies.dropna().unique())
    if data.date_column is None:
        return list(rng.permutation(np.array(names, dtype=object)))
    latest = samples.groupby(studies)[data.date_column].max()
    return sorted(names, key=lambda name: (str(latest[name]), name))


def _pairs_to_hold_out(
    samples: pd.DataFrame, data: Data, perturbations: pd.Series, pairs: pd.Series, free: pd.Series, share: float, rng: np.random.Generator
) -> tuple[list[str], list[str]]:
    """(for the test, for validation): pairs whose context and perturbation both stay seen apart from each other.

    The context in its controls or in another pair, the perturbation in another context.
    """
    context = contexts(samples, data)
    table = pd.DataFrame({"pair": pairs, "context": context, "perturbation": perturbations})[free & pairs.notna()].drop_duplicates()
    wanted = round(share * len(table))
    left_in_context = table["context"].value_counts().add(context[free & is_control(samples, data)].drop_duplicates().value_counts(), fill_value=0)
    left_of_perturbation = table["perturbation"].value_counts()
    chosen = []
    for row in table.iloc[rng.permutation(len(table))].itertuples():
        if len(chosen) == 2 * wanted:
            break
        if left_in_context[row.context] > 1 and left_of_perturbation[row.perturbation] > 1:
            left_in_context[row.context] -= 1
            left_of_perturbation[row.perturbation] -= 1
            chosen.append(row.pair)
    half = min(wanted, -(-len(chosen) // 2))
    return chosen[:half], chosen[half:]


def audit(samples: pd.DataFrame, split: pd.Series, data: Data) -> None:
    """Refuses a cohort whose held-out entity is also seen by training or by a choice. IntegrityError names the entities."""
    control = is_control(samples, data)
    visible = split.map(role_of).isin(("train", "validation"))
    problems = []

    def check(name: str, entities: pd.Series, seen_by: pd.Series, who: str) -> None:
        leaked = set(entities[(split == name) & entities.notna()]) & set(entities[seen_by & entities.notna()])
        if leaked:
            problems.append(f"{name} leaks: {examples(sorted(leaked))} also in {who}")

    entities: dict[str, Callable[[], pd.Series]] = {}
    if data.study_column:
        entities["study"] = lambda: samples[data.study_column]
    if data.control:
        perturbation = samples[data.control.column].where(~control)
        entities["perturbation"] = lambda: perturbation
        entities["combination"] = lambda: (contexts(samples, data) + " / " + perturbation).where(perturbation.notna())
    for kind, values in entities.items():
        check(f"test_{kind}", values(), visible, "training or validation")
        check(f"validation_{kind}", values(), split == TRAIN, "training")
    if not (split == TRAIN).any():
        problems.append("no sample is left for training; lower the shares in splits")
    if problems:
        raise IntegrityError(*problems)
