"""Held-out pairs of context and perturbation: listed in params.yaml, or a share drawn at random.

Both parts of a held-out pair stay in training: the context in its controls or in another pair, the
perturbation in another context.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data, Splits
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.labels import LabelForm, label_texts
from pipeline.gem.data.splits import Entities

# Of params.yaml: splits. Each is a share, or a list of mappings from column to value.
PARAMETERS = ("combination", "validation_combination")


class HeldOutPairs(NamedTuple):
    """Names of pairs, as in `Entities.pair`."""

    test: list[str]
    validation: list[str]


def listed_pairs(
    samples: pd.DataFrame, entities: Entities, data: Data, params: Splits
) -> HeldOutPairs:
    """The pairs of treated samples that match the lists. InputError lists every invalid mapping."""
    matches: list[set[str]] = []
    problems: list[str] = []
    form = LabelForm.of(data)
    for name in PARAMETERS:
        value = getattr(params, name)
        pairs: set[str] = set()
        for number, mapping in enumerate(value if isinstance(value, tuple) else ()):
            where = f"{data.source}: splits.{name}.{number}"
            mapping = {column: form.text(column, text) or text for column, text in mapping.items()}
            invalid = _mapping_problems(mapping, samples, data, where)
            if invalid:
                problems += invalid
                continue
            columns = [label_texts(samples[column]) == text for column, text in mapping.items()]
            rows = np.logical_and.reduce(columns)
            matching = entities.pair[rows].dropna().unique()
            if not len(matching):
                problems.append(_no_match(mapping, where, only_controls=bool(rows.any())))
            pairs.update(matching)
        matches.append(pairs)
    if in_both := sorted(matches[0] & matches[1]):
        problems.append(
            f"{data.source}: splits.{PARAMETERS[0]} and splits.{PARAMETERS[1]} both list "
            f"{examples(in_both)}; hold out a pair once"
        )
    if problems:
        raise InputError(*problems)
    return HeldOutPairs(*(sorted(pairs) for pairs in matches))


def _mapping_problems(
    mapping: Mapping[str, str], samples: pd.DataFrame, data: Data, where: str
) -> list[str]:
    """Columns that do not define pairs, and values that no sample has."""
    if data.control is None:
        return [
            f"{where}: data.control is null, so no sample counts as treated; "
            "declare the control, or list no pairs"
        ]
    columns, problems = (*data.context_columns, data.control.column), []
    for column, value in mapping.items():
        if column not in columns:
            problems.append(
                f"{where}: {column} does not define pairs; expected columns of "
                f"data.context_columns and data.control{did_you_mean(column, columns)}"
            )
        elif value not in (texts := set(label_texts(samples[column]).dropna())):
            hint = did_you_mean(value, sorted(texts))
            problems.append(f"{where}: no sample has {column} = {value}{hint}")
    return problems


def _no_match(mapping: Mapping[str, str], where: str, only_controls: bool) -> str:
    values = " and ".join(f"{column} = {value}" for column, value in mapping.items())
    subject = "only controls have" if only_controls else "no sample has"
    return f"{where}: {subject} {values}; list a measured pair of context and perturbation"


def select_pairs(
    entities: Entities,
    is_free: pd.Series,
    listed: HeldOutPairs,
    params: Splits,
    rng: np.random.Generator,
) -> HeldOutPairs:
    """The listed pairs, and where params has a share, pairs drawn from the `is_free` samples (N,).

    A share is one of all free pairs. If fewer pairs can be held out, the test and validation splits
    divide them in proportion to their shares.
    """
    stays = is_free & ~entities.pair.isin([*listed.test, *listed.validation])
    parts = {"context": entities.context, "perturbation": entities.perturbation}
    table = pd.DataFrame({"pair": entities.pair} | parts)[stays & entities.pair.notna()]
    table = table.drop_duplicates("pair").sort_values("pair", kind="stable")
    number = entities.pair[is_free].nunique()
    tests, validations = (
        0 if isinstance(share, tuple) else round(share * number)
        for share in (params.combination, params.validation_combination)
    )
    with_controls = entities.context[stays & entities.control].drop_duplicates()
    in_context = table["context"].value_counts().add(with_controls.value_counts(), fill_value=0)
    of_perturbation = table["perturbation"].value_counts()
    drawn: list[str] = []
    for row in table.iloc[rng.permutation(len(table))].itertuples():
        if len(drawn) == tests + validations:
            break
        if in_context[row.context] > 1 and of_perturbation[row.perturbation] > 1:
            in_context[row.context] -= 1
            of_perturbation[row.perturbation] -= 1
            drawn.append(row.pair)
    tests = min(tests, -(-len(drawn) * tests // max(1, tests + validations)))
    return HeldOutPairs([*listed.test, *drawn[:tests]], [*listed.validation, *drawn[tests:]])


def check_parts_in_training(
    entities: Entities, is_free: pd.Series, listed: HeldOutPairs, source: str
) -> None:
    """InputError if no `is_free` sample (N,) outside the listed pairs has one of their parts."""
    in_listed = entities.pair.isin([*listed.test, *listed.validation])
    stays = is_free & ~in_listed
    problems = []
    for part, missing in (
        ("context", "neither a control nor another perturbation"),
        ("perturbation", "no other context"),
    ):
        names = getattr(entities, part)
        for name in sorted(set(names[in_listed]) - set(names[stays].dropna())):
            pairs = entities.pair[in_listed & (names == name)].unique()
            problems.append(
                f"{source}: splits: with {examples(pairs)} held out, training has {missing} of the "
                f"{part} {name}; a combination needs both parts in training: hold out fewer pairs"
            )
    if problems:
        raise InputError(*problems)
