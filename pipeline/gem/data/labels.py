"""Labels: what a cell of a table says, however the table stores it."""

import numpy as np
import pandas as pd

from pipeline.gem.common.errors import examples

SEPARATOR = "|"  # between the labels of one value


def cell(value: object) -> object:
    """A cell of a table: text trimmed, None where missing or empty. ValueError where it holds more than one value."""
    if isinstance(value, str):
        return value.strip() or None
    if not pd.api.types.is_scalar(value):
        raise ValueError(f"a {type(value).__name__} in a cell; expected one value")
    return None if pd.isna(value) else value


def label_text(value: object) -> str | None:
    """The text of a label; None where missing or empty.

    Whole numbers lose their point: pandas makes floats of an integer column as soon as one value is missing.
    """
    value = cell(value)
    if value is None or isinstance(value, str):
        return value
    whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
    return str(int(value)) if whole else str(value)


def label_texts(column: pd.Series) -> pd.Series:
    """`label_text` of every cell."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        texts = np.array([*map(label_text, column.cat.categories), None], dtype=object)
        return pd.Series(texts[column.cat.codes], index=column.index, dtype=object)
    return pd.Series([label_text(value) for value in column], index=column.index, dtype=object)


def labels_of(value: object) -> list[str]:
    """The labels of "a|b"."""
    return [label.strip() for label in (label_text(value) or "").split(SEPARATOR) if label.strip()]


def list_cells(column: pd.Series, where: str) -> list[str]:
    """A problem line if cells hold lists."""
    rows = [row for row, value in enumerate(column) if not pd.api.types.is_scalar(value)]
    return (
        [
            f"{where}: more than one value in a cell (rows {examples(rows)}); expected text or a number, several labels as a{SEPARATOR}b"
        ]
        if rows
        else []
    )


def distinct(column: pd.Series) -> tuple[np.ndarray, list]:
    """(position of each cell among the distinct values, -1 where missing; the values). True and 1 are two values."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, index = np.unique(column.cat.codes, return_inverse=True)
        place, values = distinct(
            pd.Series(
                [None if code < 0 else column.cat.categories[code] for code in codes], dtype=object
            )
        )
        return place[index.reshape(-1)], values
    positions: dict = {}
    index = np.full(len(column), -1)
    for row, value in enumerate(map(cell, column)):
        if value is not None:
            index[row] = positions.setdefault((type(value), value), len(positions))
    return index, [value for _, value in positions]
