"""One label, one set of labels and one joined key have one text, however a table spells them."""

import itertools
import unicodedata

import numpy as np
import pandas as pd
import pytest
from support.designs import declare_data, design

from pipeline.gem.data.labels import (
    LabelForm,
    join_keys,
    label_key,
    label_text,
    label_texts,
    looks_missing,
    normal_text,
)
from pipeline.gem.data.splits import Entities, contexts

FORM = LabelForm(
    sets=("drug",),
    missing={"drug": ("NA",), "age": ("-9", "NA")},
    control=("drug", "control"),
    units={"time": None, "days": "d"},
)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("cafe\u0301ine", "caf\u00e9ine"),  # decomposed
        ("5\u00b5-drug", "5\u03bc-drug"),  # micro sign, Greek letter
        ("HT\u00a029", "HT 29"),  # no-break space
        ("HT \t\u2003 29\r\n", "HT 29"),
        ("drug\u200b", "drug"),  # zero-width space
        ("\ufeffdrug", "drug"),  # byte-order mark
        ("dr\u00adug", "drug"),  # soft hyphen
        ("\u202edrug\u202c", "drug"),  # direction of writing
        ("drug\ufe0f\u3164", "drug"),  # variation selector, filler
        ("dr\x00ug\x7f", "drug"),
        ("e\u200d\u0301", "\u00e9"),  # a joiner between the parts of a letter
        ("\uff21\uff4c\uff5c1", "Al|1"),  # full width
        ("\ufb01bro", "fibro"),  # ligature
        ("\u2028a\u2029b", "a b"),
        ("\u200b\u00a0", None),
        ("Drug", "Drug"),  # case and punctuation are part of a label
        ("A-1", "A-1"),
        ("007", "007"),
        (1, "1"),
        (1.0, "1"),
        (np.float64(1), "1"),
        ("1.0", "1.0"),
        (True, "True"),
        (np.True_, "True"),
        (float("nan"), None),
        (pd.NA, None),
        (pd.NaT, None),
    ],
)
def test_a_label_has_one_text(written, text):
    assert label_text(written) == text
    assert label_texts(pd.Series([written], dtype=object)).tolist() == [text]
    assert label_text(text) == text


@pytest.mark.parametrize(
    ("column", "cell", "value"),
    [
        ("drug", "B|A", "A|B"),
        ("drug", " B | A ", "A|B"),
        ("drug", "A|B|A||", "A|B"),
        ("drug", "B\uff5cA\u200b", "A|B"),
        ("drug", "A|control", "A"),
        ("drug", "control|control", "control"),
        ("drug", "control", "control"),
        ("drug", "A|NA", "A"),
        ("drug", "NA|NA", None),
        ("drug", "NA", None),
        ("drug", "|", None),
        ("drug", "na", "na"),  # the setting lists "NA"
        ("drug", 2.0, "2"),
        ("age", -9.0, None),
        ("age", "NA", None),
        ("age", 9.0, 9.0),
        ("time", "1 day", "24 hours"),
        ("time", "55.0", 55.0),
        ("days", "24 h", 1.0),
        ("time", "soon", "soon"),
        ("tissue", "B|A", "B|A"),  # one label
        ("tissue", "NA", "NA"),
        ("tissue", " A ", "A"),
    ],
)
def test_a_cell_has_one_form(column, cell, value):
    assert FORM.cell(column, cell) == value
    frame = pd.DataFrame({column: [cell]}, dtype=object)
    if column != "tissue":
        for kind in (object, "category"):
            (found,) = FORM.table(frame.astype(kind))[column].tolist()
            assert found == value
    assert FORM.cell(column, value) == value


def test_random_texts_have_a_form_that_does_not_change_again(rng):
    ranges = [range(1, 0x250), range(0x300, 0x370), range(0x200B, 0x2070), range(0x1100, 0x1200)]
    ranges += [range(0xAC00, 0xAC40), range(0xF900, 0x10000), range(0x1D400, 0x1D440)]
    alphabet = [chr(code) for part in ranges for code in part]
    for codes in rng.integers(0, len(alphabet), (5_000, 7)):
        text = normal_text("".join(alphabet[code] for code in codes))
        assert normal_text(text) == text == unicodedata.normalize("NFKC", text)
        label = FORM.cell("drug", text)
        assert FORM.cell("drug", label) == label


def test_joined_keys_differ_where_a_label_differs():
    """Of all texts of up to four characters that could be mistaken for parts of a key."""
    texts = [
        "".join(letters) for n in range(1, 5) for letters in itertools.product("/ \\?", repeat=n)
    ]
    texts = [*{text for text in map(normal_text, texts) if text}, "a / b", "a", "/ b", "b", None]
    pairs = pd.DataFrame(itertools.product(texts, repeat=2), columns=["left", "right"])
    keys = join_keys([label_key(pairs["left"]), label_key(pairs["right"])])
    assert len(texts) > 100 and keys.nunique() == len(pairs)


def test_ordinary_labels_are_joined_as_they_are():
    columns = [pd.Series(["lung", "mg/mL", None]), pd.Series(["T cell", "a/b", "x"])]
    assert join_keys([*map(label_key, columns)]).tolist() == [
        "lung / T cell",
        "mg/mL / a/b",
        "? / x",
    ]


def test_contexts_and_pairs_of_different_labels_differ(params):
    samples = pd.DataFrame(
        {
            "tissue": ["lung / airway", "lung", "?", None],
            "cell": ["epithelium", "airway / epithelium", "T", "T"],
            "perturbation": ["drug"] * 4,
        }
    )
    data = declare_data(params.data, context_columns=["tissue", "cell"], study_column=None)
    assert contexts(samples, data).nunique() == 4
    # A pair whose context is not known is none.
    assert Entities.of(samples, data).pair.nunique() == 3
    assert Entities.of(samples, data).pair.isna().tolist() == [False, False, False, True]


def test_the_control_of_params_is_found_in_any_spelling(params):
    multilabel = {"technical": {}, "biological": {}, "perturbation": {"perturbation": {}}}
    multilabel["perturbation"]["perturbation"] = {"kind": "multilabel"}
    for value, text in (("DMSO\u200b", "DMSO"), ("water|DMSO", "DMSO|water"), ("NA", "NA")):
        control = {"column": "perturbation", "value": value}
        data = declare_data(params.data, covariates=multilabel, control=control)
        assert LabelForm.of(data).control == ("perturbation", text)


def test_a_column_with_lists_is_left_to_the_checks():
    frame = pd.DataFrame({"drug": [["A"], ["B"]]})
    assert FORM.table(frame)["drug"].tolist() == [["A"], ["B"]]


def test_missing_values_are_those_of_the_setting_only(params):
    data = declare_data(params.data, missing_values={"perturbation": ["drug0", " N\u200bA "]})
    samples = LabelForm.of(data).table(design().replace({"perturbation": {"drug1": "NA"}}))
    assert samples["perturbation"].isna().sum() == 2 * 10 * 3 * 2
    assert "drug2" in set(samples["perturbation"])


@pytest.mark.parametrize("text", ["nan", "NA", "n/a", "None", "<NA>", "null", "-", "?", "Unknown"])
def test_texts_look_missing(text):
    assert looks_missing(text) and looks_missing(f" {text}\u200b")


@pytest.mark.parametrize("text", ["male", "Nanog", "none of these", "NAD", "A-", 1.0, "na1"])
def test_other_texts_do_not_look_missing(text):
    assert not looks_missing(text)
