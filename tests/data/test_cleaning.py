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


def quantity(unit: str) -> dict:
    return {"kind": "quantity", "scale": "log", "unit": unit}


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
    assert clean(["1 uM", "2 nM", None], LOG).tolist() == ["1 uM", "2 nM", None]
    in_nanomolar = clean(["1 uM", "2", None], quantity("nM"))
    assert in_nanomolar.tolist()[:2] == [1000.0, 2.0] and np.isnan(in_nanomolar.iloc[2])


@pytest.mark.parametrize(
    "column",
    [[55.0, 0.1, 1e-7, None], ["55", " 0.10", "1e-7", ""], [np.float32(55), 0.1, 1e-7, np.nan]],
)
def test_a_unit_in_one_cell_does_not_change_the_text_of_others(column):
    """Otherwise the metadata of a test sample would change the hash of the training data."""
    years = quantity("year")
    plain, mixed = clean([*column, 3.0], years), clean([*column, "3 years"], years)
    assert plain.dtype == float and mixed.dtype == float
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
        "table: age: 'old' is not a number; write a number, or a number and a unit (rows 1, 3)",
        "table: dose: '-1 uM' is negative, which the log scale forbids (rows 1)",
        "table: time: '1 fortnight' has an unknown unit; write one of s min h",
        "table: time: 'inf' is not a number",
        "table: list: more than one value in a cell (rows 0, 1, 2, 3)",
    ]
    problems = caught.value.problems
    assert all(line.startswith(start) for line, start in zip(problems, starts, strict=True))


# One dimension per column: the cells, the declared unit, the start of the message or None.
COLUMNS = {
    "plain and unit": (["24", "24h", "48 h"], None, "plain numbers: '24' (rows 0); time: '24h' (r"),
    "plain with a unit for it": (["24", "24h", "1 day"], "h", None),
    "plain of another unit": (
        ["24", "1 uM"],
        "h",
        "molarity: '1 uM' (rows 1); time: '24' (rows 0)",
    ),
    "time and dose": (["1 h", "1 nM"], None, "molarity: '1 nM' (rows 1); time: '1 h' (rows 0)"),
    "three dimensions": (["1 h", "1 nM", 3], None, "plain numbers: 3 (rows 2); molarity: '1 nM'"),
    "several as declared": (["1 nM", "1 ng/ml", "2 Gy", 3], "any", None),
    "weeks and years": (["8 weeks", "1 year", "3 months", "2 d"], None, None),
    "one dose in many units": (["1 nM", "1e-6 M", "2 umol/l"], None, None),
    "minutes as m": (["30m", "1h"], None, "'30m': m is ambiguous; write min"),
    "months as M": (["30M", "1h"], None, "molarity: '30M' (rows 0); time: '1h' (rows 1); M is am"),
    "months as M, any": (
        ["30 M", "1h"],
        "any",
        "molarity: '30 M' (rows 0); time: '1h' (rows 1); M",
    ),
    "molarity, any": (["30 mM", "1h"], "any", None),
    "unknown unit": (["1 foo"], "any", "'1 foo' has an unknown unit; write one of s min h"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_has_one_dimension_unless_declared(name):
    cells, unit, start = COLUMNS[name]
    if start is None:
        assert clean(cells, quantity(unit) if unit else LOG).notna().all()
        return
    with pytest.raises(InputError) as caught:
        clean(cells, quantity(unit) if unit else LOG)
    (problem,) = caught.value.problems
    assert problem.startswith(f"table: x: {start}")
    assert "write" in problem and "..." not in problem


def test_many_invalid_values_are_counted():
    with pytest.raises(InputError) as caught:
        clean([f"{number} foo" for number in range(1000)], LINEAR)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "table: x: and 980 more values like these"


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
