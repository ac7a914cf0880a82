"""Metadata of a source in one form: text or numbers, None if missing."""

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Covariates
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.covariates import to_scale
from pipeline.gem.data.labels import (
    distinct_cells,
    label_text,
    label_texts,
    list_cell_problems,
    looks_missing,
)
from pipeline.gem.data.units import DIMENSIONLESS, parse_quantity


def clean_samples(samples: pd.DataFrame, covariates: Covariates, where: str) -> pd.DataFrame:
    """The declared covariates as text or numbers, None if missing, of samples in `LabelForm`.

    InputError lists every invalid value.
    """
    problems: list[str] = []
    cleaned = samples.copy()
    for name, covariate in covariates.all().items():
        if name not in samples:
            suggestion = did_you_mean(name, samples.columns)
            problems.append(
                f"{where}: column {name} is declared in data.covariates but absent{suggestion}"
            )
        elif invalid := list_cell_problems(samples[name], f"{where}: {name}"):
            problems += invalid
        elif covariate.kind != "numeric":
            cleaned[name] = label_texts(samples[name])
        elif invalid := _quantity_problems(samples[name], covariate.scale, f"{where}: {name}"):
            problems += invalid
        else:
            cleaned[name] = _numbers_or_text(samples[name])
    if problems:
        raise InputError(*problems)
    return cleaned


def _quantity_problems(column: pd.Series, scale: str, where: str) -> list[str]:
    problems = []
    index, values = distinct_cells(column)
    for position, value in enumerate(values):
        try:
            to_scale(parse_quantity(value)[0], scale)
        except ValueError as error:
            rows = examples(np.flatnonzero(index == position))
            advice = "declare it categorical, or write a number and a unit"
            if looks_missing(value):
                advice = "write nothing where a value is missing, or list it in data.missing_values"
            problems.append(f"{where}: {error} (rows {rows}); {advice}")
    return problems


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
