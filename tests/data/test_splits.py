"""Names, roles and sizes of splits; contexts and dates."""

import pandas as pd
import pytest
from support.designs import ALL_SPLITS, all_splits, declare_data, design, entities_in

from pipeline.gem.data.splits import (
    SPLIT_ROLES,
    TEST_CONTROL,
    TESTS,
    TRAIN,
    VALIDATIONS,
    contexts,
    date_problems,
    role_of,
    split_sizes,
)
from pipeline.gem.preparation.assign_splits import assign_splits


def test_every_split_has_exactly_one_role():
    assert sorted(name for names in SPLIT_ROLES.values() for name in names) == sorted(ALL_SPLITS)
    assert role_of(TRAIN) == "train"
    assert {role_of(name) for name in VALIDATIONS} == {"validation"}
    assert {role_of(name) for name in (*TESTS, TEST_CONTROL)} == {"test"}


@pytest.mark.parametrize("dtype", ["category", "string", "object"])
def test_missing_values_of_a_context_column_are_a_context_of_their_own(params, dtype):
    samples = design()
    samples.loc[samples.index % 4 == 0, "tissue"] = None
    names = contexts(samples.astype({"tissue": dtype}), declare_data(params.data))
    assert names.tolist() == samples["tissue"].fillna("?").tolist()


@pytest.mark.parametrize(
    "column",
    [
        pd.array([1, None] * 3, dtype="Int64"),
        pd.array([True, None] * 3, dtype="boolean"),
        [1.0, None] * 3,
        [pd.Timestamp("2020-01-01"), None] * 3,
    ],
)
def test_context_columns_of_other_types_may_have_missing_values(params, column):
    samples = pd.DataFrame({"tissue": column})
    assert contexts(samples, declare_data(params.data)).nunique() == 2


def test_without_context_columns_there_is_one_context(params):
    data = declare_data(params.data, context_columns=[])
    assert set(contexts(design(), data)) == {"all"}


def test_unreadable_dates_are_reported_with_their_rows():
    readable = ["2014", "2014-06-01", None, "2014-06-01T10:00", "20140601"]
    assert date_problems(pd.Series(readable), "x") == []
    dates = pd.Series(["2014-06-01", "June 14", None, "June 14"])
    (problem,) = date_problems(dates, "file: date")
    assert problem.startswith("file: date: 'June 14' is not a date (rows 1, 3)")


def test_split_sizes_count_the_distinct_entities(params):
    samples = pd.DataFrame(
        {
            "study": ["s", "s", "t", "u", "u", None],
            "tissue": ["a", "b", "a", "a", "a", "b"],
            "perturbation": ["x", "x", "control", "x", "y", None],
        }
    )
    split = pd.Series([TRAIN, TRAIN, TRAIN, "test_study", "test_study", "validation"])
    columns = ["split", "samples", "studies", "contexts", "perturbations", "pairs"]
    columns += ["conditions", "controls"]
    rows = [
        (TRAIN, 3, 2, 2, 1, 2, 2, 1),
        ("validation", 1, 0, 1, 0, 0, 0, 0),
        ("test_study", 2, 1, 1, 2, 2, 2, 0),
    ]
    sizes = split_sizes(samples, split, declare_data(params.data))
    pd.testing.assert_frame_equal(sizes, pd.DataFrame(rows, columns=columns))


def test_split_sizes_of_assigned_splits_add_up(params):
    samples, data = design(), declare_data(params.data)
    split, _ = assign_splits(samples, data, all_splits())
    sizes = split_sizes(samples, split, data).set_index("split")
    assert sizes["samples"].sum() == len(samples)
    assert sizes["controls"].sum() == (samples["perturbation"] == "control").sum()
    assert list(sizes.index) == [name for name in ALL_SPLITS if name in set(split)]
    held_out = entities_in(samples, split, "perturbation", "test_perturbation")
    assert sizes.loc["test_perturbation", "perturbations"] == len(held_out)
