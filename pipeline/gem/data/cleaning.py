"""Metadata of a source in one form: text or numbers, None if missing."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Covariates, Numeric, Quantity
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.labels import (
    MISSING_ADVICE,
    distinct_cells,
    label_text,
    label_texts,
    list_cell_problems,
    looks_missing,
)
from pipeline.gem.data.units import (
    cell_repr,
    dimension_name,
    is_ambiguous,
    parse_quantity,
    plain_quantity,
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
            cleaned[name] = _numbers_or_text(samples[name], covariate.plain_unit)
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
            advice = ""
            if looks_missing(value):
                advice = f"; or {MISSING_ADVICE}"
            problems.append(f"{where}: {error} (rows {rows}){advice}")
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


def _numbers_or_text(column: pd.Series, unit: str | None) -> pd.Series:
    """Numbers if all cells are plain numbers or in the declared `unit`; else text.

    The text of a cell does not depend on other cells.
    """
    index, values = distinct_cells(column)
    cells = [plain_quantity(value, unit) for value in values]
    if not any(isinstance(cell, str) for cell in cells):
        return pd.Series(np.array([*cells, np.nan])[index], index=column.index)
    texts = np.array([*map(label_text, cells), None], dtype=object)
    return pd.Series(texts[index], index=column.index, dtype=object)
