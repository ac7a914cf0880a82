"""Feature tables: reading, problems, and standardisation by hand."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.gem.common.errors import InputError
from pipeline.gem.data.features import CLIP, FeatureTable


def write(folder, **columns):
    path = folder / "table.parquet"
    pd.DataFrame(columns).to_parquet(path, index=False)
    return path


def problems_of(path) -> list[str]:
    with pytest.raises(InputError) as caught:
        FeatureTable.read(path)
    problems = caught.value.problems
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in problems)
    return [line.removeprefix(f"{path}: ") for line in problems]


# reading


def test_the_first_column_holds_labels_and_every_other_a_feature(tmp_path):
    features = FeatureTable.read(write(tmp_path, drug=["a", "b"], mass=[1.5, 2.5], rings=[3, 0]))
    assert features.labels == ("a", "b") and features.size == 2
    assert features.values.dtype == np.float32
    assert features.values.tolist() == [[1.5, 3.0], [2.5, 0.0]]


def test_a_written_table_is_read_back(tmp_path, rng):
    features = FeatureTable(("a", "b", "c"), rng.normal(size=(3, 4)).astype(np.float32))
    features.write(tmp_path / "deep" / "table.parquet")
    again = FeatureTable.read(tmp_path / "deep" / "table.parquet")
    assert again.labels == features.labels and np.array_equal(again.values, features.values)


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series([1, 2]),
        pd.Series([1.0, 2.0]),
        pd.Series(["1", " 2 "]),
        pd.Series(["1", "2"], dtype="category"),
        pd.Series([1, 2], dtype="Int64"),
    ],
    ids=["integers", "floats", "padded text", "categorical", "nullable integers"],
)
def test_labels_do_not_depend_on_the_type_of_their_column(tmp_path, labels):
    assert FeatureTable.read(write(tmp_path, label=labels, x=[0.0, 1.0])).labels == ("1", "2")


@pytest.mark.parametrize("kind", ["int8", "uint64", "float64", "Int64", "Float32", "boolean"])
def test_numbers_of_every_type_are_features(tmp_path, kind):
    path = write(tmp_path, label=["a", "b"], x=pd.Series([0, 1]).astype(kind))
    assert FeatureTable.read(path).values.tolist() == [[0.0], [1.0]]


# problems


def test_an_absent_table_is_one_problem_with_the_section_that_names_it(tmp_path):
    expected = "absent; data.covariates names it as the table of an embedding"
    assert problems_of(tmp_path / "nothing.parquet") == [expected]


@pytest.mark.parametrize("content", [b"", b"label,x\na,1\n", b"PAR1torn"])
def test_a_file_that_is_not_parquet_is_one_problem(tmp_path, content):
    path = tmp_path / "table.parquet"
    path.write_bytes(content)
    (problem,) = problems_of(path)
    assert problem.startswith("cannot be read as a Parquet table (")


NOTHING = pd.Series([], dtype=float)
DATES = pd.to_datetime(["2020-01-01", "2021-01-01"])


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"label": ["a"]}, "1 rows and 1 columns; expected labels in the first column"),
        ({"label": NOTHING, "x": NOTHING}, "0 rows and 2 columns; expected labels"),
        ({"label": ["a", "b", " a"], "x": [0, 1, 2]}, "duplicate labels a; expected one row each"),
        ({"label": [1, 2, 1], "x": [0, 1, 2]}, "duplicate labels 1; expected one row each"),
        ({"label": ["a", None, " "], "x": [0, 1, 2]}, "no label in rows 1, 2"),
        ({"label": ["a", "a|b"], "x": [0, 1]}, "labels a|b contain the separator |; expected one"),
        ({"label": ["a", "b"], "x": ["1", "n"]}, "feature x holds text such as 'n'"),
        ({"label": ["a", "b"], "x": DATES}, "feature x holds text such as '2020-01-01'"),
        ({"label": ["a", "b"], "x": [[1.0], [2.0]]}, "feature x holds object; expected numbers"),
        ({"label": ["a", "b"], "x": [1, np.nan]}, "feature x is not finite for b"),
        ({"label": ["a", "b"], "x": [1, -np.inf]}, "feature x is not finite for b"),
        ({"label": ["a", "b"], "x": [1, 1e300]}, "feature x is not finite for b"),
        (
            {"label": ["a", "b"], "x": pd.array([1, None], dtype="Int64")},
            "feature x is not finite for b",
        ),
    ],
)
def test_an_invalid_label_or_feature_is_one_problem(tmp_path, columns, problem):
    (message,) = problems_of(write(tmp_path, **columns))
    assert message.startswith(problem)


def test_all_problems_are_reported_at_once(tmp_path):
    columns = {"x": [1.0, np.nan, 0.0], "y": ["1", "2", "c"], "z": [0.0, 1.0, np.inf]}
    problems = problems_of(write(tmp_path, label=["a", "a", None], **columns))
    starts = ["no label", "duplicate labels a", "feature x", "feature y", "feature z"]
    assert all(line.startswith(start) for line, start in zip(problems, starts, strict=True))


def test_features_of_equal_names_are_checked_each(tmp_path):
    columns = [pa.array(["a", "b"]), pa.array([1.0, 2.0]), pa.array([1.0, np.nan])]
    pq.write_table(pa.table(columns, names=["label", "x", "x"]), tmp_path / "table.parquet")
    assert problems_of(tmp_path / "table.parquet")


# standardisation


def standardised(values, training_labels: set[str] | None = None) -> np.ndarray:
    """Of labels a, b, ...; all are training labels unless given."""
    values = np.array(values, dtype=np.float32)
    labels = tuple(chr(ord("a") + row) for row in range(len(values)))
    training_labels = set(labels) if training_labels is None else training_labels
    return FeatureTable(labels, values).standardise(training_labels).values


def test_features_are_standardised_over_the_training_labels():
    # Over a and b: means 2 and 10, deviations 2 and 0.
    values = standardised([[0, 10], [4, 10], [6, 13]], {"a", "b", "control"})
    assert values.tolist() == [[-1, 0], [1, 0], [2, 3]]


def test_without_training_labels_all_labels_count():
    assert standardised([[0], [4]], {"control"}).tolist() == [[-1], [1]]


@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_standardised_features_do_not_depend_on_the_unit(rng, unit):
    values = rng.normal(size=(20, 1))
    assert standardised(values * unit) == pytest.approx(standardised(values), abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-20, 1e20])
def test_a_constant_feature_is_zero(value):
    assert not standardised(np.full((7, 1), value)).any()


def test_outlying_labels_are_clipped():
    values = standardised([[0, 1], [1, 1], [1e6, 1], [0, -1e6]], {"a", "b"})
    assert values.tolist() == [[-1, 0], [1, 0], [CLIP, 0], [-1, -CLIP]]
