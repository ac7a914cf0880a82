"""Cleaning of metadata: one form, every problem at once."""

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import Covariates
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.cleaning import clean_samples
from pipeline.gem.data.labels import label_texts

CATEGORICAL = {"kind": "categorical"}
LINEAR, LOG = {"kind": "numeric", "scale": "linear"}, {"kind": "numeric", "scale": "log"}


def declare(**biological) -> Covariates:
    groups = {"technical": {}, "biological": biological, "perturbation": {}}
    return Covariates.model_validate(groups)


def clean(column, kind: dict) -> pd.Series:
    column = column if isinstance(column, pd.Series) else pd.Series(column, dtype=object)
    return clean_samples(pd.DataFrame({"x": column}), declare(x=kind), "table")["x"]


def test_text_is_trimmed_and_empty_text_is_missing():
    cleaned = clean(["", "  ", " a ", None, "a"], CATEGORICAL)
    assert cleaned.tolist() == [None, None, "a", None, "a"]


@pytest.mark.parametrize("dtype", ["object", "category", "string", "Int64", "Float64"])
def test_labels_do_not_depend_on_the_type_of_the_column(dtype):
    column = pd.Series(["1", "2", None, "1"]).astype(float).astype("Int64")
    texts = column.astype("string") if dtype in ("object", "category", "string") else column
    assert clean(texts.astype(dtype), CATEGORICAL).tolist() == ["1", "2", None, "1"]


def test_numbers_are_converted_and_quantities_stay_as_written():
    plain = clean(["1", " 2.5 ", ""], LINEAR)
    assert plain.tolist()[:2] == [1.0, 2.5] and np.isnan(plain.iloc[2])
    assert clean(["1 uM", "2", None], LOG).tolist() == ["1 uM", "2", None]


@pytest.mark.parametrize(
    "column",
    [[55.0, 0.1, 1e-7, None], ["55", " 0.10", "1e-7", ""], [np.float32(55), 0.1, 1e-7, np.nan]],
)
def test_a_unit_in_one_cell_does_not_change_the_text_of_others(column):
    """Otherwise the metadata of a test sample would change the hash of the training data."""
    plain, mixed = clean([*column, 3.0], LINEAR), clean([*column, "3 years"], LINEAR)
    assert plain.dtype == float and mixed.iloc[-1] == "3 years"
    expected = ["55", "0.1", "1e-07", None]
    assert label_texts(plain).tolist()[:-1] == label_texts(mixed).tolist()[:-1] == expected


def test_all_problems_of_a_table_are_reported_at_once():
    samples = pd.DataFrame(
        {
            "study": ["s"] * 4,
            "age": ["1", "old", None, "old"],
            "dose": ["1 uM", "-1 uM", "1", "1"],
            "time": ["1 fortnight", "1 h", "inf", ""],
            "list": [["a"], ["b"], ["c"], ["d"]],
        }
    )
    covariates = declare(studdy=CATEGORICAL, age=LINEAR, dose=LOG, time=LOG, list=CATEGORICAL)
    with pytest.raises(InputError) as caught:
        clean_samples(samples, covariates, "table")
    starts = [
        "table: column studdy is declared in data.covariates but absent; did you mean study?",
        "table: age: 'old' is not a number, or a number and a unit (rows 1, 3); declare it",
        "table: dose: -1.0 is negative, which the log scale does not allow (rows 1)",
        "table: time: '1 fortnight' has the unknown unit 'fortnight' (rows 0)",
        "table: time: 'inf' is not a number",
        "table: list: more than one value in a cell (rows 0, 1, 2, 3)",
    ]
    problems = caught.value.problems
    assert all(line.startswith(start) for line, start in zip(problems, starts, strict=True))


@pytest.mark.parametrize("value", [np.inf, -np.inf, True, np.True_, pd.Timestamp("2020-01-01")])
def test_a_value_that_is_not_a_number_is_an_error_without_its_python_type(value):
    with pytest.raises(InputError) as caught:
        clean([1.0, value], LINEAR)
    assert "np." not in str(caught.value) and "Timestamp(" not in str(caught.value)


def test_the_table_and_its_other_columns_do_not_change():
    samples = pd.DataFrame({"x": [" a "], "other": [" b "]})
    cleaned = clean_samples(samples, declare(x=CATEGORICAL), "table")
    assert samples["x"].tolist() == [" a "] and cleaned["other"].tolist() == [" b "]


def test_cleaning_is_idempotent():
    covariates = declare(a=CATEGORICAL, b=LINEAR, c=LOG)
    samples = pd.DataFrame(
        {"a": [" x", "", None], "b": ["1", " 2", None], "c": ["1 uM", "", "2 nM"]}
    )
    once = clean_samples(samples, covariates, "table")
    pd.testing.assert_frame_equal(clean_samples(once, covariates, "table"), once)
