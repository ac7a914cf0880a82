"""Metadata of a source in one form: text or numbers, None if missing."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Covariates, Numeric, Quantity
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.labels import (
    distinct_cells,
    label_text,
    label_texts,
    list_cell_problems,
    looks_missing,
)
from pipeline.gem.data.units import (
    DIMENSIONLESS,
    cell_repr,
    dimension_name,
    is_ambiguous,
    parse_quantity,
)

_MAX_PROBLEMS = 20  # listed per column; further ones are counted


def clean_samples(
    samples: pd.DataFrame, covariates: Covariates, where: str, columns: Iterable[str] = ()
) -> pd.DataFrame:
    """The declared covariates as text or numbers, None if missing, of samples in `LabelForm`.

    InputError lists every invalid value; `columns` are names to suggest for an absent one.
    """
    problems: list[str] = []
    cleaned = samples.copy()
    for name, covariate in covariates.all().items():
        if name not in samples:
            suggestion = did_you_mean(name, columns or samples.columns)
            problems.append(
                f"{where}: column {name} is declared in data.covariates but absent{suggestion}"
            )
        elif invalid := list_cell_problems(samples[name], f"{where}: {name}"):
            problems += invalid
        elif not isinstance(covariate, Numeric):
            cleaned[name] = label_texts(samples[name])
        elif invalid := _quantity_problems(samples[name], covariate, f"{where}: {name}"):
            problems += invalid
        else:
            cleaned[name] = _numbers_or_text(samples[name])
    if problems:
        raise InputError(*problems)
    return cleaned


def _quantity_problems(column: pd.Series, covariate: Numeric, where: str) -> list[str]:
    problems: list[str] = []
    by_dimension: dict[str, list[int]] = {}  # positions of the values
    index, values = distinct_cells(column)
    for position, value in enumerate(values):
        try:
            number, dimension = parse_quantity(value, covariate.plain_unit)
            if number < 0 and covariate.scale == "log":
                raise ValueError(f"{cell_repr(value)} is negative, which the log scale forbids")
            by_dimension.setdefault(dimension, []).append(position)
        except ValueError as error:
            rows = examples(np.flatnonzero(index == position), 3)
            advice = "declare it categorical, or write a number and a unit"
            if looks_missing(value):
                advice = "write nothing where a value is missing, or list it in data.missing_values"
            problems.append(f"{where}: {error} (rows {rows}); {advice}")
    if len(problems) > _MAX_PROBLEMS:
        further = len(problems) - _MAX_PROBLEMS
        problems[_MAX_PROBLEMS:] = [f"{where}: and {further:,} more values like these"]
    if problems or len(by_dimension) < 2:
        return problems
    held = "; ".join(
        f"{dimension_name(dimension)}: {cell_repr(values[positions[0]])} "
        f"(rows {examples(np.flatnonzero(np.isin(index, positions)), 2)})"
        for dimension, positions in sorted(by_dimension.items())
    )
    if any(is_ambiguous(value, by_dimension) for value in values):
        return [f"{where}: {held}; M is ambiguous among times: write min, month or mol/l"]
    if isinstance(covariate, Quantity) and covariate.unit == "any":
        return []
    return [
        f"{where}: {held}; write one dimension, or declare it as kind: quantity with the unit of "
        "plain numbers, or unit: any"
    ]


def _numbers_or_text(column: pd.Series) -> pd.Series:
    """Numbers if no cell has a unit; else text, with each quantity as it is written, in one
    spelling: of "24 hours" and "1 day" the shorter.

    The text of a number does not depend on whether another cell has a unit.
    """
    index, values = distinct_cells(column)
    quantities = [parse_quantity(value) for value in values]
    if all(dimension == DIMENSIONLESS for _, dimension in quantities):
        numbers = np.array([number for number, _ in quantities] + [np.nan])
        return pd.Series(numbers[index], index=column.index)
    texts = [
        label_text(number) if dimension == DIMENSIONLESS else label_text(value)
        for value, (number, dimension) in zip(values, quantities, strict=True)
    ]
    # Products with the factors of units differ in their last digits.
    quantities = [(f"{number:.12g}", dimension) for number, dimension in quantities]
    spelling: dict[tuple[str, str], str] = {}
    for text, quantity in sorted(zip(texts, quantities, strict=True), key=_length_first):
        spelling.setdefault(quantity, text)
    texts = np.array([*(spelling[quantity] for quantity in quantities), None], dtype=object)
    return pd.Series(texts[index], index=column.index, dtype=object)


def _length_first(spelling: tuple[str, tuple[str, str]]) -> tuple[int, str]:
    return len(spelling[0]), spelling[0]
