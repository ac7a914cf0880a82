"""Notes on labels that may not be what they seem: one label in several spellings, several labels
that look like one, missing values as text, a separator that is none.

Nothing is changed here: `LabelForm` decides what is one label. A note asks, the user answers in
params.yaml or in the source.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import pandas as pd

from pipeline.gem.common.config import Data, Labels, Numeric
from pipeline.gem.common.logs import printable
from pipeline.gem.data.covariates import label_counts
from pipeline.gem.data.labels import (
    SEPARATOR,
    LabelForm,
    cell_value,
    label_text,
    label_texts,
    looks_missing,
    normal_text,
    split_labels,
)
from pipeline.gem.data.units import plain_quantity

_EXAMPLES, _LENGTH = 3, 40  # labels in a note, characters of a label
# Letters that print as Latin ones.
_LATIN = str.maketrans(
    "АВЕЅІЈКМНОРСТУХаесіјорхуΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABESIJKMHOPCTYXaecijopxyABEZHIKMNOPTYXo"
)
_CODES = (-1, -9, -99, -999, -9999, 999, 9999, 99999)  # for a missing number
# Punctuation, but no sign ("CD4+", "CD4-") and no point between digits ("1.5").
_PUNCTUATION = re.compile(
    r"(?<!\d)[^\w+\-]+|[^\w+\-]+(?!\d)|(?<=[^\W\d])-(?=\w)|(?<=\w)-(?=[^\W\d])"
)
_SEPARATORS = "+,;&/"  # of other programs
_PARTS = re.compile(rf"[{re.escape(SEPARATOR + _SEPARATORS)}_]")
_SHARE = 0.5  # of the labels that hold a separator "throughout"


def label_notes(samples: pd.DataFrame, data: Data) -> list[str]:
    """Notes on the columns that params.yaml declares; `samples` as in the source."""
    form, covariates, notes = LabelForm.of(data), data.covariates.all(), []
    columns = [*covariates, *data.context_columns, data.study_column, data.level_column]
    columns += form.control[:1] if form.control else ()
    for name in dict.fromkeys(name for name in columns if name is not None):
        if isinstance(numeric := covariates.get(name), Numeric):
            own_notes = _number_notes(form.table(samples[[name]])[name], numeric)
        else:
            own_notes = _notes_of_column(name, Counter(_written(samples[name])), form)
        notes += [f"{name}: {note}" for note in own_notes]
    return list(map(printable, notes))


def rare_label_notes(training: pd.DataFrame, data: Data) -> list[str]:
    """Notes on the labels that are in fewer training samples than `min_count`."""
    notes = []
    for name, covariate in data.covariates.all().items():
        if not isinstance(covariate, Labels) or covariate.min_count == 1:
            continue
        counts = label_counts(training[name], covariate)
        rare = {label for label, number in counts.items() if number < covariate.min_count}
        if rare:
            texts = label_texts(training[name]).dropna()
            is_single = covariate.kind == "categorical"
            samples = sum(
                not rare.isdisjoint([text] if is_single else split_labels(text)) for text in texts
            )
            notes.append(
                f"{name}: {len(rare):,} of {len(counts):,} labels are in fewer than min_count = "
                f"{covariate.min_count} training samples and unknown to the model; {samples:,} of "
                f"{len(training):,} training samples have one"
            )
    return list(map(printable, notes))


def _number_notes(column: pd.Series, covariate: Numeric) -> Iterator[str]:
    if covariate.plain_unit is None:
        forms = {text: plain_quantity(text, None) for text in set(map(cell_value, column)) - {None}}
        texts = {str(text) for text, form in forms.items() if isinstance(form, str)}
        if merged := _groups(texts, lambda text: plain_quantity(text, None)):
            yield f"spellings of one quantity, merged: {_listing(merged)}"
    values = pd.to_numeric(column, errors="coerce").dropna()
    for code in _CODES:
        others = values[values != code]
        number = len(values) - len(others)
        alone = others.min() >= 0 if code < 0 else others.max() < code / 3
        if number > 1 and len(others) and alone:
            yield (
                f"{code} in {number:,} samples, far from the other numbers: missing? "
                "If so, list it in data.missing_values"
            )


def _written(column: pd.Series) -> Iterator[str]:
    """Cells as they are written, without those that are missing."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    return (text if isinstance(text, str) else label_text(text) for text in column[column.notna()])


def _notes_of_column(name: str, cells: Counter, form: LabelForm) -> Iterator[str]:
    is_set = name in form.sets
    written, orders = Counter(), Counter()
    for cell, number in cells.items():
        for label in cell.split(SEPARATOR) if is_set else [cell]:
            written[label.strip()] += number
        if is_set and form.cell(name, cell):
            parts = [part for label in cell.split(SEPARATOR) if (part := normal_text(label))]
            orders[SEPARATOR.join(parts)] += number
    missing, control = form.missing.get(name, ()), form.control
    labels: Counter = Counter()
    for label, number in written.items():
        if (text := normal_text(label)) and text not in missing:
            labels[text] += number
    merged = [names for names in _groups(written, normal_text) if normal_text(names[0])]
    if merged:
        yield f"spellings of one label, merged: {_listing(merged)}"
    if reordered := _groups(orders, lambda text: SEPARATOR.join(split_labels(text))):
        yield f"sets of labels in several orders, each one set: {_listing(reordered)}"
    if similar := _similar(text for text in labels if not looks_missing(text)):
        yield f"labels that differ little and stay several: {_listing(similar)}; is each right?"
    own_control = control[1] if control and control[0] == name else None
    if suspicious := [text for text in labels if looks_missing(text) and text != own_control]:
        numbers = ", ".join(f"{_show(text)} in {labels[text]:,}" for text in suspicious[:6])
        yield f"{numbers} samples: missing? If so, list it in data.missing_values.{name}"
    if own_control and (inside := [text for text in orders if _holds(text, own_control)]):
        yield (
            f"the control {_show(own_control)} beside other labels ({_listing([inside[:2]])}) is "
            "left out: it is no perturbation"
        )
    if is_set:
        others = [label for label in labels if label != own_control]
        for separator in _SEPARATORS:
            holding = [label for label in others if separator in label.strip(separator)]
            sets = [label for label in holding if labels.keys() >= _parts(label, separator)]
            if sets or len(holding) >= max(2, _SHARE * len(others)):
                yield (
                    f"{len(holding)} of {len(others)} labels hold {separator!r}, as "
                    f"{_show(holding[0])}: if it separates labels, write {SEPARATOR!r} instead"
                )


def _parts(label: str, separator: str) -> set[str]:
    return {normal_text(part) for part in label.split(separator)}


def _holds(cell: str, control: str) -> bool:
    labels = split_labels(cell)
    return control in labels and len(labels) > 1


def _similar(texts: Iterable[str]) -> list[list[str]]:
    """Labels that differ only in case, punctuation, spacing, look-alike letters, the order of
    their parts, or the way a number is written."""
    labels, groups = list(texts), {}
    for key in (_folded, _unordered, _as_number):
        groups |= dict.fromkeys(map(tuple, _groups(labels, key)))
    return [list(group) for group in groups]


def _folded(label: str) -> str:
    # A trailing underscore is punctuation, but a word character.
    label = label.translate(_LATIN).casefold().replace("_", " ")
    return _PUNCTUATION.sub("", label) or label


def _unordered(label: str) -> str:
    parts = _PARTS.split(label)
    # "plate_1_2" is not "plate_2_1".
    return label if any(map(str.isdigit, parts)) else SEPARATOR.join(sorted(map(_folded, parts)))


def _as_number(label: str) -> str:
    try:
        return repr(float(label))
    except ValueError:
        return label


def _groups(texts: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    """Of distinct texts: those with an equal key, where there are several."""
    groups: dict[str, list[str]] = {}
    for text in sorted(texts):
        groups.setdefault(key(text), []).append(text)
    return [group for group in groups.values() if len(group) > 1]


def _listing(groups: list[list[str]]) -> str:
    """ "'a' = 'b', 'c' = 'd' (5 in all)"."""
    shown = [" and ".join(_show(text, group) for text in group[:2]) for group in groups[:_EXAMPLES]]
    return ", ".join(shown) + (f" ({len(groups)} in all)" if len(groups) > _EXAMPLES else "")


def _show(text: str, group: Iterable[str] = ()) -> str:
    """In quotes; in ASCII if a label of the group has other characters that may print alike."""
    foreign = {tuple(c for c in other if not c.isascii()) for other in (text, *group)}
    as_written = text.isprintable() and len(foreign) == 1
    short = text if len(text) <= _LENGTH else f"{text[:_LENGTH]}..."
    return repr(short) if as_written else ascii(short)
