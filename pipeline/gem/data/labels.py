"""Labels: the text of a table cell, independent of how the table stores and spells it.

`cell_value`   a cell without invisible characters and surplus space, None if missing
`label_text`   the one text of a label: also in Unicode's compatibility form (NFKC)
`LabelForm`    the one text of a set of labels, and the texts that mean "missing", by column
`label_key`    labels as parts of a joined key
"""

import re
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data, Numeric
from pipeline.gem.common.errors import examples
from pipeline.gem.common.logs import INVISIBLE
from pipeline.gem.data.units import plain_quantity

SEPARATOR = "|"  # between the labels of one value
SET_KINDS = ("multilabel", "embedding")  # of covariates whose cells hold several labels
KEY_SEPARATOR = " / "  # between the parts of a joined key
MISSING_KEY = "?"  # the part of a joined key for a missing value
MISSING_ADVICE = "write nothing where a value is missing, or list it in data.missing_values"
# Texts that stand for a missing value in tables of others, without case.
_LIKE_MISSING = re.compile(
    r"#?n[./]?a[./]?[nt]?|<n/?an?>|none|null|nil|-+|\?+|\.+|unknown|missing|undefined|unspecified|"
    r"not (available|applicable|provided|collected|reported|known|recorded|specified|determined)",
    re.IGNORECASE,
)
# A slash that could be read as part of a separator.
_ESCAPED = re.compile(r"\\|(?<![^ ])/|/(?![^ ])|^\?$")


def _visible(text: str) -> str:
    """Without invisible characters; every run of space is one blank, none at the ends."""
    if not text.isprintable() or INVISIBLE.search(text):
        text = "".join(character for character in text if not _is_invisible(character))
    return " ".join(text.split())


def _is_invisible(character: str) -> bool:
    """Formats (zero width, byte-order mark, soft hyphen), controls, fillers."""
    if unicodedata.category(character) in ("Cf", "Cc"):
        return not character.isspace()
    return bool(INVISIBLE.fullmatch(character))


def normal_text(text: str) -> str:
    """The one spelling of a text: NFKC, without invisible characters and surplus space."""
    text = _visible(text)
    return text if text.isascii() else _visible(unicodedata.normalize("NFKC", text))


def cell_value(value: object) -> object:
    """A cell; text without invisible characters and surplus space. None if missing or empty.

    ValueError if it holds a list.
    """
    if isinstance(value, str):
        return _visible(value) or None
    if not pd.api.types.is_scalar(value):
        raise ValueError(f"a {type(value).__name__} in a cell; expected one value")
    return None if pd.isna(value) else value


def label_text(value: object) -> str | None:
    """The text of a label; None if missing or empty.

    Whole floats lose their point: pandas stores integers as floats once a value is missing.
    """
    value = cell_value(value)
    if isinstance(value, str):
        return normal_text(value) or None
    if value is None:
        return None
    whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
    return str(int(value)) if whole else str(value)


def label_texts(column: pd.Series) -> pd.Series:
    """`label_text` of every cell."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        texts = np.array([*map(label_text, column.cat.categories), None], dtype=object)
        return pd.Series(texts[column.cat.codes], index=column.index, dtype=object)
    index, values = distinct_cells(column)
    texts = np.array([*map(label_text, values), None], dtype=object)
    return pd.Series(texts[index], index=column.index, dtype=object)


def looks_missing(value: object) -> bool:
    """Whether a text stands for a missing value in many tables; this project reads it as a label
    unless `data.missing_values` lists it."""
    return isinstance(value, str) and bool(_LIKE_MISSING.fullmatch(normal_text(value)))


def split_labels(value: object) -> list[str]:
    """The distinct labels of "a|b", sorted."""
    labels = map(normal_text, (label_text(value) or "").split(SEPARATOR))
    return sorted({label for label in labels if label})


@dataclass(frozen=True)
class LabelForm:
    """How the cells of a cohort, and of a query about it, become labels.

    "B|A", "A | B" and "A|B|A" are the set "A|B". The control is no perturbation: "A|control" is
    "A". A text that means "missing" in a column is None, and left out of a set.
    """

    sets: tuple[str, ...] = ()  # columns whose cells hold several labels
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # column to texts
    control: tuple[str, str] | None = None  # column and value of untreated samples
    # Numeric columns of the context and the control, which are compared as texts, to their unit.
    units: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Data) -> "LabelForm":
        """The form that params.yaml declares."""
        covariates, control = data.covariates.all(), data.control
        sets = tuple(name for name, item in covariates.items() if item.kind in SET_KINDS)
        compared = [*data.context_columns, control and control.column]
        units = {
            name: covariates[name].plain_unit
            for name in compared
            if isinstance(covariates.get(name), Numeric)
        }
        missing = {
            name: tuple(sorted({normal_text(text) for text in texts}))
            for name, texts in data.missing_values.items()
        }
        form = cls(sets, missing, units=units)
        if control is None:
            return form
        value = form.text(control.column, control.value) or control.value
        return replace(form, control=(control.column, value))

    def cell(self, column: str, value: object) -> object:
        """The value of a cell: None if missing, the text of a set of labels, the one form of a
        quantity in `units`, else as it is.

        ValueError if the cell holds a list.
        """
        value = cell_value(value)
        missing = self.missing.get(column, ())
        if value is None or (missing and label_text(value) in missing):
            return None
        if column in self.units:
            with suppress(ValueError):  # no quantity: an error where the column is checked
                return plain_quantity(value, self.units[column])
        if column not in self.sets:
            return value
        labels = [label for label in split_labels(value) if label not in missing]
        if len(labels) > 1 and self.control is not None and column == self.control[0]:
            labels = [label for label in labels if label != self.control[1]]
        return SEPARATOR.join(labels) or None

    def text(self, column: str, value: object) -> str | None:
        """The label, or the set of labels, of a cell; None if missing."""
        return label_text(self.cell(column, value))

    def table(self, samples: pd.DataFrame) -> pd.DataFrame:
        """`cell` of every cell. A column with lists in its cells stays as it is."""
        changed = {}
        for name in dict.fromkeys([*self.sets, *self.missing, *self.units]):
            if name in samples and not list_cell_problems(samples[name], name):
                index, values = distinct_cells(samples[name])
                cells = [*(self.cell(name, value) for value in values), None]
                changed[name] = np.array(cells, dtype=object)[index]
        return samples.assign(**changed)


def label_key(column: pd.Series) -> pd.Series:
    """One text per cell, as a part of a joined key; MISSING_KEY for a missing value.

    A label that could be read as something else is escaped by a backslash: "a / b" is not the
    parts "a" and "b", and the label "?" is not missing.
    """
    texts = label_texts(column)
    escaped = {text: _ESCAPED.sub(r"\\\g<0>", text) for text in texts.dropna().unique()}
    return texts.map(escaped).astype(object).fillna(MISSING_KEY)


def join_keys(keys: list[pd.Series]) -> pd.Series:
    """One key per row from several (`label_key`s, or joined keys of as many parts in every row).
    Rows with different labels have different keys."""
    joined = keys[0]
    for key in keys[1:]:
        joined = joined + KEY_SEPARATOR + key
    return joined


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
    of_text: dict[str, int] = {}  # text as it is written; most cells repeat one
    index = np.full(len(column), -1)
    for row, written in enumerate(column):
        if type(written) is str and written in of_text:
            index[row] = of_text[written]
            continue
        value = cell_value(written)
        if value is not None:
            index[row] = position_of.setdefault((type(value), value), len(position_of))
        if type(written) is str:
            of_text[written] = index[row]
    return index, [value for _, value in position_of]
