"""Notes on labels: what is merged, what looks alike, what looks missing."""

import re

import numpy as np
import pandas as pd
import pytest
from support.designs import declare_data

from pipeline.gem.preparation.label_notes import label_notes, rare_label_notes

LABELS = [f"drug{letter}" for letter in "ABCDEF"]


@pytest.fixture
def notes_of(params):
    def notes(cells: list, kind: str = "categorical", **changes) -> list[str]:
        kinds = {"kind": kind, "scale": "linear"} if kind == "numeric" else {"kind": kind}
        covariates = {"technical": {}, "biological": {"x": kinds}, "perturbation": {}}
        changes = {"control": None, "context_columns": [], "study_column": None} | changes
        changes |= {"date_column": None}
        data = declare_data(params.data, covariates=covariates, **changes)
        return label_notes(pd.DataFrame({"x": pd.Series(cells, dtype=object)}), data)

    return notes


@pytest.mark.parametrize(
    ("kind", "cells", "note"),
    [
        ("categorical", ["caf\u00e9", "cafe\u0301"], r"merged: 'cafe\u0301' and 'caf\xe9'"),
        ("categorical", ["drug", "drug\u200b"], r"merged: 'drug' and 'drug\u200b'"),
        ("multilabel", ["A\u00a0a|B", "A a|C"], r"merged: 'A a' and 'A\xa0a'"),
        ("multilabel", ["A|B", "B|A"], "in several orders, each one set: 'A|B' and 'B|A'"),
        ("categorical", ["DrugA", "drugA"], "stay several: 'DrugA' and 'drugA'"),
        ("categorical", ["T cell", "T-cell"], "stay several: 'T cell' and 'T-cell'"),
        ("categorical", ["HT 29", "HT29"], "stay several: 'HT 29' and 'HT29'"),
        ("categorical", ["IL-2", "IL\u20132"], r"stay several: 'IL-2' and 'IL\u20132'"),
        ("categorical", ["drugA", "drug\u0410"], r"stay several: 'drugA' and 'drug\u0410'"),
        ("categorical", ["1", "1.0"], "stay several: '1' and '1.0'"),
        ("categorical", ["A+B", "B+A"], "stay several: 'A+B' and 'B+A'"),
        ("categorical", ["A|B", "B|A"], "stay several: 'A|B' and 'B|A'"),
        ("categorical", [True, "TRUE"], "stay several: 'TRUE' and 'True'"),
        ("categorical", ["a", "nan", "nan", "NA"], "'nan' in 2, 'NA' in 1 samples: missing?"),
        ("multilabel", ["a", "b|unknown"], "'unknown' in 1 samples: missing?"),
        ("numeric", [1, 2, -9, -9], "-9 in 2 samples, far from the other numbers: missing?"),
        ("numeric", [1.0, 2, 999, 999, np.nan], "999 in 2 samples"),
        ("numeric", ["1 day", "24 hours", "2 h"], "merged: '1 day' and '24 hours'"),
        ("multilabel", ["A+B", "B+C", "A"], "2 of 4 labels hold '+', as 'A+B'"),
        ("multilabel", [*LABELS, "drugB & drugA"], "1 of 7 labels hold '&'"),
        ("multilabel", ["A;B", "B;C"], "hold ';'"),
        ("multilabel", ["A, B", "B, C"], "hold ','"),
    ],
)
def test_a_doubt_is_noted_once_in_one_line(notes_of, kind, cells, note):
    notes = notes_of([*cells, *([] if kind == "numeric" else LABELS[:1])], kind)
    found = [line for line in notes if note in line]
    assert len(found) == 1, notes
    assert all(line.startswith("x: ") and line.isprintable() for line in notes)
    assert all(len(line) <= 300 for line in notes)


@pytest.mark.parametrize(
    ("kind", "cells"),
    [
        ("categorical", [*LABELS, " drugA", None, ""]),
        ("categorical", ["CD4+", "CD4-", "1.5", "15", "plate_1_2", "plate_2_1", "A1", "A11"]),
        ("multilabel", ["A|B", "A | B", "A", "B"]),
        ("multilabel", ["A+", "B", "C"]),
        ("numeric", [-9.0, -9.0, -5, 3]),
        ("numeric", [999.0, 999.0, 800]),
        ("numeric", ["1 day", "36 hours", " 1\u200b day", None, "", " "]),
        ("numeric", [1, 2.5, float("nan"), pd.NA]),
        ("numeric", ["1", "1.0", 1]),
    ],
)
def test_ordinary_labels_have_no_note(notes_of, kind, cells):
    assert notes_of(cells, kind) == []


def test_the_control_is_not_missing_and_is_no_part_of_a_set(notes_of):
    control = {"column": "x", "value": "none"}
    (note,) = notes_of(["none", "A|none", "A"], "multilabel", control=control)
    assert note == (
        "x: the control 'none' beside other labels ('A|none') is left out: it is no perturbation"
    )


def test_what_the_setting_lists_is_not_asked_again(notes_of):
    assert notes_of(["a", "nan", "NA"], missing_values={"x": ["nan", "NA"]}) == []
    assert notes_of([1, -9, -9], "numeric", missing_values={"x": ["-9"]}) == []


def test_many_and_enormous_labels_are_one_line_each(notes_of):
    cells = [f"{letter}{'x' * 10**4}{number}" for number in range(9) for letter in "Aa"]
    (note,) = notes_of(cells)
    assert len(note) <= 300 and "(9 in all)" in note


@pytest.mark.parametrize(
    ("kind", "cells", "note"),
    [
        ("categorical", list("aaabbc"), "x: 2 of 3 labels .* min_count = 3 .*; 3 of 6 training"),
        ("multilabel", ["a|b", "a", "a|c", None], "x: 2 of 3 labels .*; 2 of 4 training"),
        ("categorical", list("aaabbb"), None),
    ],
)
def test_labels_below_min_count_and_their_samples_are_counted(params, kind, cells, note):
    covariates = {"technical": {}, "biological": {}, "perturbation": {}}
    covariates["biological"]["x"] = {"kind": kind, "min_count": 3}
    none = {"control": None, "context_columns": [], "study_column": None, "date_column": None}
    data = declare_data(params.data, covariates=covariates, **none)
    notes = rare_label_notes(pd.DataFrame({"x": cells}), data)
    assert len(notes) == (note is not None)
    assert all(re.search(note, line) for line in notes)
