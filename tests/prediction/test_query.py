"""Query tables: reading, distinct rows, and the check against a model."""

import decimal
import logging

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.gem.common.errors import InputError
from pipeline.gem.prediction import query_table
from pipeline.gem.prediction.query_check import check_query
from pipeline.gem.prediction.query_table import DistinctRows, QueryFile, QueryFrame


def check(frame: pd.DataFrame, gem, unknown: str = "refuse", reference_ids=None) -> None:
    check_query(QueryFrame.of(frame), gem, unknown, reference_ids)


@pytest.mark.parametrize("rows", [7, 13, 100])
def test_a_csv_has_the_values_of_the_parquet_table(tmp_path, query, gem, rows):
    table = query.assign(sample_id=[f"{row:03d}" for row in range(40)])
    table = table.astype(dict.fromkeys(table.select_dtypes("category"), object))
    table.to_csv(tmp_path / "query.csv", index=False)
    table.to_parquet(tmp_path / "query.parquet", index=False)
    csv, parquet = (QueryFile.open(tmp_path / name, gem) for name in ("query.csv", "query.parquet"))
    assert csv.rows == parquet.rows == 40
    assert csv.schema.field("age_years").type == pa.float64()
    blocks = list(zip(csv.blocks(rows), parquet.blocks(rows), strict=True))
    assert [len(block) for block, _ in blocks[:-1]] == [rows] * (len(blocks) - 1)
    for block, expected in blocks:
        pd.testing.assert_frame_equal(block.to_pandas(), expected.to_pandas())


def test_only_numeric_covariates_of_a_text_query_become_numbers(tmp_path, gem):
    texts = ["00123", "2.10", "1e5", "1.0", "NA", "True", "nan"]
    lines = [f"{text};{text};{age}" for text, age in zip(texts, range(40, 47), strict=True)]
    path = tmp_path / "query.csv"
    path.write_text("\n".join(["sample_id; tissue;age_years", *lines, ";;"]), encoding="utf-16")
    (block,) = QueryFile.open(path, gem).blocks(9)
    assert block.column_names == ["sample_id", "tissue", "age_years"]
    assert block["sample_id"].to_pylist() == block["tissue"].to_pylist() == [*texts, None]
    assert block["age_years"].to_pylist() == [*range(40, 47), None]


def test_types_that_arrow_cannot_take_from_are_read_as_plain_ones(tmp_path, gem):
    columns = {
        "tissue": pa.array(["tissue_1", None, "tissue_1"], pa.string_view()),
        "age_years": pa.array([decimal.Decimal("40.0")] * 3, pa.decimal128(5, 1)),
        "remark": pa.array([b"\xff", b"x", None], pa.binary_view()),
    }
    pq.write_table(pa.table(columns), tmp_path / "query.parquet")
    query = QueryFile.open(tmp_path / "query.parquet", gem)
    check_query(query, gem, "refuse", None)
    (block,) = query.blocks(9)
    assert DistinctRows.of(block, ["tissue", "age_years"]).index.tolist() == [0, 1, 0]
    assert block["remark"].to_pylist() == [b"\xff", b"x", None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "absent"),
        ("query.txt", b"a\n1\n", "neither .csv nor .parquet"),
        ("query.csv", b"", "cannot be read"),
        ("query.csv", b"a,b\n1\n", "cannot be read"),
        ("query.parquet", b"PAR1", "cannot be read"),
        ("query.csv", b"a,b,a\n1,2,3\n", "column a occurs more than once"),
        ("query.csv", b"a,counts\n1,2\n", "column counts has the name of a column of the output"),
    ],
)
def test_a_file_that_is_no_query_is_refused(tmp_path, gem, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        QueryFile.open(tmp_path / name, gem)


@pytest.mark.parametrize("name", ["counts", "extrapolated", "low", "draw", "latent_technical"])
def test_a_frame_with_a_column_of_the_output_is_refused(query, name):
    with pytest.raises(InputError, match=f"column {name} has the name of a column of the output"):
        QueryFrame.of(query.assign(**{name: 1}))


def test_distinct_rows_reproduce_the_table():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "text": rng.choice(["a", "b", None], 200),
            "number": rng.choice([1.0, 2.5, np.nan], 200),
            "category": pd.Categorical(rng.choice(["x", "y"], 200)),
            "unused": range(200),
        }
    )
    distinct = DistinctRows.of(
        QueryFrame.of(frame).table, ["text", "number", "category", "absent", "reference_id"]
    )
    assert distinct.reference_ids is None and list(distinct.samples) == [
        "text",
        "number",
        "category",
    ]
    assert len(distinct.samples) == len(frame.drop(columns="unused").drop_duplicates())
    rebuilt = distinct.samples.iloc[distinct.index].reset_index(drop=True)
    for name in distinct.samples:
        pd.testing.assert_series_equal(
            rebuilt[name].astype(object).where(rebuilt[name].notna(), None),
            frame[name].astype(object).where(frame[name].notna(), None),
        )


def test_without_known_columns_all_rows_are_one():
    distinct = DistinctRows.of(pa.table({"a": [1, 2, 3]}), ["b"])
    assert len(distinct.samples) == 1 and distinct.index.tolist() == [0, 0, 0]


def test_all_problems_are_reported_with_row_and_suggestion(gem, query):
    bad = query.head(4).astype(object)
    bad.loc[2, "tissue"], bad.loc[3, "tissue"] = "tissue_11", "nowhere"
    bad.loc[1, "perturbation_dose"] = "3 parsecs"
    with pytest.raises(InputError) as caught:
        check(bad, gem)
    message = str(caught.value)
    assert (
        "tissue, row 2: 'tissue_11' was never seen in training; did you mean tissue_1?" in message
    )
    assert "tissue, row 3: 'nowhere'" in message
    assert "perturbation_dose, row 1: '3 parsecs' has an unknown unit" in message


def test_unknown_values_may_be_missing_but_bad_quantities_may_not(gem):
    check(pd.DataFrame({"tissue": ["nowhere"]}), gem, "missing")
    with pytest.raises(InputError, match="unknown unit"):
        check(pd.DataFrame({"perturbation_dose": ["3 parsecs"]}), gem, "missing")


def test_a_value_is_reported_once_and_further_ones_are_counted(gem, monkeypatch):
    monkeypatch.setattr("pipeline.gem.prediction.query_check.SCAN_ROWS", 10)
    frame = pd.DataFrame({"tissue": [f"nowhere {row // 2}" for row in range(60)]})
    with pytest.raises(InputError) as caught:
        check(frame, gem)
    assert len(caught.value.problems) == 21
    assert "tissue, row 38: 'nowhere 19'" in caught.value.problems[19]
    assert "and 10 more values like these" in caught.value.problems[20]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"tissue": []}), "no rows"),
        (pd.DataFrame({"tisue": ["x"]}), "none of its columns is known to the model: it has tisue"),
        (pd.DataFrame({" Tissue": ["x"]}), "column ' Tissue' is not 'tissue'; rename it"),
        (pd.DataFrame({"cell.type": ["x"]}), "column 'cell.type' is not 'cell_type'; rename it"),
        (pd.DataFrame({"tissue": ["x"], "ReferenceID": "x"}), "is not 'reference_id'"),
        (pd.DataFrame({"tissue": [["a", "b"]]}), "expected one value per cell"),
    ],
)
def test_a_query_without_usable_rows_is_refused(gem, frame, message):
    with pytest.raises(InputError, match=message):
        check(frame, gem)


def test_every_row_needs_one_of_several_references(gem, query):
    with pytest.raises(InputError, match="2 references; add a column reference_id"):
        check(query, gem, reference_ids=["first", "second"])
    check(query, gem, reference_ids=["first"])
    named = query.head(3).assign(reference_id=["first", None, "seconds"])
    with pytest.raises(InputError, match="row 1: no reference; name one in every row") as caught:
        check(named, gem, reference_ids=["first", "second"])
    assert "row 2: no reference is named 'seconds'; did you mean second?" in str(caught.value)


def test_columns_without_effect_are_warned_of(gem, query, caplog):
    caplog.set_level(logging.WARNING)
    check(query.rename(columns={"sex": "sexx"}).assign(reference_id="a"), gem)
    assert "column sexx is unknown to the model; it is copied to the output only; " in caplog.text
    assert "did you mean sex?" in caplog.text
    assert "column reference_id is ignored without references" in caplog.text
    assert "sample_id" not in caplog.text


def test_columns_of_a_frame_that_arrow_cannot_hold_become_text():
    table = QueryFrame.of(pd.DataFrame({"dose": [55, "24 hours", None], 7: [1, 2, 3]})).table
    assert table["dose"].to_pylist() == ["55", "24 hours", None]
    assert table["7"].to_pylist() == [1, 2, 3]
    assert query_table.plain_values(pa.chunked_array([[1.5, float("nan")]])).to_pylist() == [
        1.5,
        None,
    ]
