"""Labels: the text of a table cell, independent of how the table stores it."""

import numpy as np
import pandas as pd

from pipeline.gem.common.errors import examples

SEPARATOR = "|"  # between the labels of one value


def cell_value(value: object) -> object:
    """A cell without surrounding space; None if missing or empty. ValueError if it holds a list."""
    if isinstance(value, str):
        return value.strip() or None
    if not pd.api.types.is_scalar(value):
        raise ValueError(f"a {type(value).__name__} in a cell; expected one value")
    return None if pd.isna(value) else value


def label_text(value: object) -> str | None:
    """The text of a label; None if missing or empty.

    Whole floats lose their point: pandas stores integers as floats once a value is missing.
    """
    value = cell_value(value)
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


def split_labels(value: object) -> list[str]:
    """The labels of "a|b"."""
    return [label.strip() for label in (label_text(value) or "").split(SEPARATOR) if label.strip()]


def list_cell_problems(column: pd.Series, where: str) -> list[str]:
    """One message if any cell holds a list."""
    rows = [row for row, value in enumerate(column) if not pd.api.types.is_scalar(value)]
    if not rows:
        return []
    return [
        f"{where}: more than one value in a cell (rows {examples(rows)}); "
        f"expected text or a number; write several labels as a{SEPARATOR}b"
    ]


def distinct_cells(column: pd.Series) -> tuple[np.ndarray, list]:
    """((N,) position of each cell among the distinct values, -1 if missing; the values).

    True and 1 are distinct.
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, index = np.unique(column.cat.codes, return_inverse=True)
        categories = [None if code < 0 else column.cat.categories[code] for code in codes]
        positions, values = distinct_cells(pd.Series(categories, dtype=object))
        return positions[index.reshape(-1)], values
    position_of: dict = {}
    index = np.full(len(column), -1)
    for row, value in enumerate(map(cell_value, column)):
        if value is not None:
            index[row] = position_of.setdefault((type(value), value), len(position_of))
    return index, [value for _, value in position_of]
