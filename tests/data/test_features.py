"""Embeddings: features of labels by hand, and tables that are none."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.gem.common.errors import InputError
from pipeline.gem.data.features import CLIP, FeatureTable


def written(folder, **columns):
    path = folder / "table.parquet"
    pd.DataFrame(columns).to_parquet(path, index=False)
    return path


def problems_of(path) -> list[str]:
    with pytest.raises(InputError) as caught:
        FeatureTable.read(path)
    assert all(
        problem.startswith(f"{path}: ") and "\n" not in problem for problem in caught.value.problems
    )
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


# reading


def test_the_first_column_names_labels_and_every_other_is_a_feature(tmp_path):
    features = FeatureTable.read(written(tmp_path, drug=["a", "b"], mass=[1.5, 2.5], rings=[3, 0]))
    assert features.labels == ("a", "b") and features.size == 2
    assert features.values.dtype == np.float32 and features.values.tolist() == [
        [1.5, 3.0],
        [2.5, 0.0],
    ]


def test_what_is_written_reads_as_the_same(tmp_path, rng):
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
def test_labels_of_every_type_are_the_labels_of_the_samples(tmp_path, labels):
    assert FeatureTable.read(written(tmp_path, label=labels, x=[0.0, 1.0])).labels == ("1", "2")


@pytest.mark.parametrize(
    "kind", ["int8", "uint64", "float16", "float64", "Int64", "Float32", "bool", "boolean"]
)
def test_numbers_of_every_type_are_features(tmp_path, kind):
    path = written(
        tmp_path,
        label=["a", "b"],
        x=pd.Series([0, 1]).astype("float32" if kind == "float16" else kind),
    )
    assert FeatureTable.read(path).values.tolist() == [[0.0], [1.0]]


# tables that are none


def test_an_absent_table_is_named_with_the_section_that_names_it(tmp_path):
    assert problems_of(tmp_path / "nothing.parquet") == [
        "absent; data.covariates names it as the table of an embedding"
    ]


@pytest.mark.parametrize(
    "content", [b"", b"label,x\na,1\n", b"PAR1torn"], ids=["empty", "csv", "torn"]
)
def test_a_file_that_is_no_parquet_is_one_line(tmp_path, content):
    (tmp_path / "table.parquet").write_bytes(content)
    (problem,) = problems_of(tmp_path / "table.parquet")
    assert problem.startswith("not a Parquet table (")


def test_a_folder_is_no_table(tmp_path):
    (tmp_path / "table.parquet").mkdir()
    assert problems_of(tmp_path / "table.parquet")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"label": ["a"]}, "1 rows and 1 columns"),
        (
            {"label": pd.Series([], dtype=str), "x": pd.Series([], dtype=float)},
            "0 rows and 2 columns",
        ),
    ],
    ids=["no features", "no rows"],
)
def test_a_table_without_features_or_rows_says_what_is_expected(tmp_path, columns, found):
    assert problems_of(written(tmp_path, **columns)) == [
        f"{found}; expected labels in the first column, then one feature at least"
    ]


@pytest.mark.parametrize(
    "labels",
    [["a", "b", "a"], ["a", "b", " a"], pd.Series([1, 2, 1])],
    ids=["text", "padded", "integers"],
)
def test_labels_that_stand_twice_are_named(tmp_path, labels):
    (problem,) = problems_of(written(tmp_path, label=labels, x=[0.0, 1.0, 2.0]))
    assert problem == f"labels {str(labels[0]).strip()} stand twice; expected one row a label"


def test_a_missing_or_joint_label_is_named(tmp_path):
    assert problems_of(written(tmp_path, label=["a", None, " "], x=[0.0, 1.0, 2.0])) == [
        "no label in rows 1, 2"
    ]
    (problem,) = problems_of(written(tmp_path, label=["a", "a|b"], x=[0.0, 1.0]))
    assert problem == "labels a|b hold |, which stands between labels; expected one label a row"


@pytest.mark.parametrize(
    "column",
    [
        ["1", "2"],
        pd.Categorical(["x", "y"]),
        pd.to_datetime(["2020-01-01", "2021-01-01"]),
        [[1.0], [2.0]],
    ],
)
def test_a_feature_that_is_no_number_is_named(tmp_path, column):
    (problem,) = problems_of(written(tmp_path, label=["a", "b"], x=[1.0, 2.0], smiles=column))
    assert problem.startswith("feature smiles holds ") and problem.endswith("; expected numbers")


@pytest.mark.parametrize(
    "column",
    [[1.0, np.nan], [1.0, -np.inf], [1.0, 1e300], pd.array([1, None], dtype="Int64")],
    ids=["NaN", "infinite", "beyond float32", "missing"],
)
def test_a_feature_that_is_not_finite_is_named_with_its_labels(tmp_path, column):
    assert problems_of(written(tmp_path, label=["a", "b"], x=column, y=[0.0, 1.0])) == [
        "feature x is not finite for b"
    ]


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    found = problems_of(
        written(
            tmp_path,
            label=["a", "a", None],
            x=[1.0, np.nan, 0.0],
            y=["1", "2", "3"],
            z=[0.0, 1.0, np.inf],
        )
    )
    assert [problem.split()[0:2] for problem in found] == [
        ["no", "label"],
        ["labels", "a"],
        ["feature", "x"],
        ["feature", "y"],
        ["feature", "z"],
    ]


def test_features_of_one_name_are_each_judged(tmp_path):
    pq.write_table(
        pa.table(
            [pa.array(["a", "b"]), pa.array([1.0, 2.0]), pa.array([1.0, np.nan])],
            names=["label", "x", "x"],
        ),
        tmp_path / "table.parquet",
    )
    with pytest.raises(InputError):
        FeatureTable.read(tmp_path / "table.parquet")


# standardising


def test_features_are_standardised_over_the_labels_that_training_saw():
    features = FeatureTable(
        ("a", "b", "c"), np.array([[0, 10], [4, 10], [6, 13]], dtype=np.float32)
    )
    expected = [
        [-1, 0],
        [1, 0],
        [2, 3],
    ]  # means 2 and 10 of a and b; deviation 2, and none in the second feature
    assert features.standardised({"a", "b", "control"}).values.tolist() == expected


def test_where_training_saw_no_label_all_of_them_count():
    features = FeatureTable(("a", "b"), np.array([[0.0], [4.0]], dtype=np.float32))
    assert (
        features.standardised({"control"}).values.tolist()
        == features.standardised({"a", "b"}).values.tolist()
        == [[-1], [1]]
    )


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
def test_the_unit_of_a_feature_does_not_matter(rng, size):
    values = rng.normal(size=(20, 1))
    labels = tuple(map(str, range(20)))
    plain, other = (
        FeatureTable(labels, (values * unit).astype(np.float32)).standardised(set(labels)).values
        for unit in (1.0, size)
    )
    assert other == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-20, 1e20])
def test_a_feature_that_never_varies_is_zero(value):
    labels = tuple(map(str, range(7)))
    assert (
        not FeatureTable(labels, np.full((7, 1), value, dtype=np.float32))
        .standardised(set(labels))
        .values.any()
    )


def test_a_label_far_from_all_that_training_saw_is_clipped():
    features = FeatureTable(
        ("a", "b", "far", "odd"), np.array([[0, 1], [1, 1], [1e6, 1], [0, -1e6]], dtype=np.float32)
    )
    assert features.standardised({"a", "b"}).values.tolist() == [
        [-1, 0],
        [1, 0],
        [CLIP, 0],
        [-1, -CLIP],
    ]
