"""Pairs of context and perturbation that are held out: those that params.yaml names, or a share of all, drawn.

Either way both parts of a pair stay seen apart: the context in its controls or another pair, the perturbation in another
context. A table `belongs` has for each of N samples, as text: context, perturbation (None for controls), pair; and control (bool).
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data, Splits
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.labels import label_texts

LISTS = (
    "combination",
    "validation_combination",
)  # of params.yaml: splits; each a share, or mappings of column to value


def named_pairs(
    samples: pd.DataFrame, belongs: pd.DataFrame, data: Data, params: Splits
) -> tuple[list[str], list[str]]:
    """(for the test, for validation): pairs of the treated samples that match a mapping. InputError lists every mapping that is wrong."""
    named: dict[str, list[str]] = {name: [] for name in LISTS}
    problems: list[str] = []
    for name in LISTS:
        mappings = getattr(params, name)
        for number, mapping in enumerate(mappings if isinstance(mappings, tuple) else ()):
            where = f"{data.source}: splits.{name}.{number}"
            found = _misnamed(mapping, samples, data, where)
            problems += found
            named[name] += (
                [] if found else _matching(mapping, samples, belongs, data, where, problems)
            )
    twice = sorted(set(named[LISTS[0]]) & set(named[LISTS[1]]))
    if twice:
        problems.append(
            f"{data.source}: splits.{LISTS[0]} and splits.{LISTS[1]} both name {examples(twice)}; a pair is held out once"
        )
    if problems:
        raise InputError(*problems)
    return sorted(set(named[LISTS[0]])), sorted(set(named[LISTS[1]]))


def _misnamed(
    mapping: Mapping[str, str], samples: pd.DataFrame, data: Data, where: str
) -> list[str]:
    """Columns that do not tell pairs apart, and values that no sample has."""
    if data.control is None:
        return [
            f"{where}: data.control is null, so that no sample is treated; declare it, or hold out no pairs"
        ]
    columns, problems = (*data.context_columns, data.control.column), []
    for column, value in mapping.items():
        if column not in columns:
            known = did_you_mean(column, columns)
            problems.append(
                f"{where}: {column} names no pair; expected columns of data.context_columns and data.control{known}"
            )
        elif value not in (texts := set(label_texts(samples[column]).dropna())):
            problems.append(
                f"{where}: no sample has {column} = {value}{did_you_mean(value, sorted(texts))}"
            )
    return problems


def _matching(
    mapping: Mapping[str, str],
    samples: pd.DataFrame,
    belongs: pd.DataFrame,
    data: Data,
    where: str,
    problems: list[str],
) -> list[str]:
    """The pairs of treated samples that have all values of a mapping."""
    matches = np.logical_and.reduce(
        [(label_texts(samples[column]) == value).to_numpy() for column, value in mapping.items()]
    )
    found = belongs["pair"][matches].dropna().unique().tolist()
    if not found:
        shown = " and ".join(f"{column} = {value}" for column, value in mapping.items())
        only = "only controls have" if matches.any() else "no sample has"
        problems.append(
            f"{where}: {only} {shown}; name a pair of context and perturbation that was measured"
        )
    return found


def pairs_to_hold_out(
    belongs: pd.DataFrame,
    free: pd.Series,
    named: tuple[list[str], list[str]],
    data: Data,
    params: Splits,
    rng: np.random.Generator,
) -> tuple[list[str], list[str]]:
    """(for the test, for validation) of the `free` samples (N,): the named, else a share, drawn. InputError where a named one is not seen apart."""
    fixed = [*named[0], *named[1]]
    stays = free & ~belongs["pair"].isin(fixed)
    _refuse_unseen(belongs, stays, fixed, data)
    table = (
        belongs[stays & belongs["pair"].notna()]
        .drop_duplicates("pair")
        .sort_values("pair", kind="stable")
    )
    number = belongs["pair"][free].nunique()
    tests, validations = (
        0 if isinstance(share, tuple) else round(share * number)
        for share in (params.combination, params.validation_combination)
    )
    with_controls = belongs["context"][stays & belongs["control"]].drop_duplicates()
    left_in_context = (
        table["context"].value_counts().add(with_controls.value_counts(), fill_value=0)
    )
    left_of_perturbation = table["perturbation"].value_counts()
    drawn: list[str] = []
    for row in table.iloc[rng.permutation(len(table))].itertuples():
        if len(drawn) == tests + validations:
            break
        if left_in_context[row.context] > 1 and left_of_perturbation[row.perturbation] > 1:
            left_in_context[row.context] -= 1
            left_of_perturbation[row.perturbation] -= 1
            drawn.append(row.pair)
    # Where too few can be held out, test and validation share them as they share what was asked for.
    half = min(tests, -(-len(drawn) * tests // max(1, tests + validations)))
    return [*named[0], *drawn[:half]], [*named[1], *drawn[half:]]


def _refuse_unseen(belongs: pd.DataFrame, stays: pd.Series, fixed: list[str], data: Data) -> None:
    """InputError where holding out the named pairs leaves training none of their context or perturbation."""
    held, problems = belongs[belongs["pair"].isin(fixed)], []
    for part, elsewhere in (
        ("context", "neither a control nor another perturbation"),
        ("perturbation", "no other context"),
    ):
        for name in sorted(set(held[part]) - set(belongs[part][stays].dropna())):
            pairs = held["pair"][held[part] == name].unique()
            problems.append(
                f"{data.source}: splits: with {examples(pairs)} held out, training sees {elsewhere} of the {part} {name}; "
                "a combination is one whose parts are both seen apart: hold out fewer pairs"
            )
    if problems:
        raise InputError(*problems)
