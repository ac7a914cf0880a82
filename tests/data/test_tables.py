"""Tables of every format hold the same texts: nothing that looks like a number becomes one."""

import datetime
import decimal
import gzip

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.gem.common.config import Covariates
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.labels import label_texts
from pipeline.gem.data.tables import (
    RESERVED_COLUMNS,
    identifiers,
    plain_frame,
    read_lines,
    read_table,
    reserved_name_problems,
)

LABELS = ["00123", "2.10", "1e5", "1.0", "NA", "nan", "True", "-", "βµ", "inf", "0x1F"]
FILES = {
    "t.csv": ",".join,
    "t.tsv": "\t".join,
    "t.csv.gz": ",".join,
    "SEMICOLONS.CSV": ";".join,
    "tabs.csv": "\t".join,
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", FILES)
def test_text_tables_keep_every_cell_as_written(tmp_path, caplog, name, encoding):
    lines = [FILES[name](row) for row in [(" label ", "x"), *((label, "") for label in LABELS)]]
    content = "\r\n".join(lines).encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    table = read_table(path)
    assert list(table) == ["label", "x"]
    assert table["label"].tolist() == LABELS and table["x"].isna().all()
    guessed = name[0] in "St" and "," not in lines[0] and not name.endswith("tsv")
    assert ("its columns are separated by" in caplog.text) == guessed


def test_quoted_cells_may_hold_delimiters_and_newlines(tmp_path):
    (tmp_path / "t.csv").write_text('"a;;;",b\n"x,\ny","00"\n"",""\n')
    table = read_table(tmp_path / "t.csv")
    assert list(table) == ["a;;;", "b"]
    assert table.astype(object).where(table.notna(), None).values.tolist() == [
        ["x,\ny", "00"],
        [None, None],
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\n\n\n", "it is empty"),
        ("a,b\nä,1\n".encode("cp1252"), "its text is not UTF-8; save it as UTF-8"),
        ("ä,b\na,1\n".encode("cp1252"), "its text is not UTF-8; save it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
        (b"PK\x03\x04\0\0", "it is no text"),
        (b"a,b\n1\n", "Expected 2 columns, got 1"),
    ],
)
def test_a_file_that_is_no_text_table_is_one_line(tmp_path, content, reason):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_table(tmp_path / "t.csv")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path / 't.csv'}: cannot be read as a CSV table (")
    assert reason in problem and "\n" not in problem


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_names_has_no_byte_order_mark(tmp_path, encoding):
    (tmp_path / "list").write_text("g1\n\n 007 \n", encoding=encoding)
    assert read_lines(tmp_path / "list") == ["g1", "007"]


DAY = datetime.date(2020, 1, 2)
# An array as it may be stored in Parquet: the texts of its labels.
STORED = {
    "view": (pa.array(["007", None], pa.string_view()), ["007", None]),
    "large": (pa.array(["1.0", "NA"], pa.large_string()), ["1.0", "NA"]),
    "coded": (pa.array(["1e5", None]).dictionary_encode(), ["1e5", None]),
    "coded view": (
        pa.DictionaryArray.from_arrays([0, 0], pa.array(["2.10"], pa.string_view())),
        ["2.10", "2.10"],
    ),
    "coded numbers": (pa.array([7, None]).dictionary_encode(), ["7", None]),
    "binary": (pa.array([b"007", None], pa.binary()), ["007", None]),
    "fixed binary": (pa.array([b"ab1", b"ab2"], pa.binary(3)), ["ab1", "ab2"]),
    "integers": (pa.array([2**62 + 1, None], pa.int64()), [str(2**62 + 1), None]),
    "unsigned": (pa.array([2**64 - 1, None], pa.uint64()), [str(2**64 - 1), None]),
    "booleans": (pa.array([True, None]), ["True", None]),
    "float16": (pa.array(np.array([0.1, 10], np.float16)), ["0.1", "10"]),
    "float32": (pa.array([0.1, 1e-7], pa.float32()), ["0.1", "1e-07"]),
    "float32 with gaps": (pa.array([0.3, None, float("nan")], pa.float32()), ["0.3", None, None]),
    "float64": (pa.array([0.1, 10.0]), ["0.1", "10"]),
    "decimals": (pa.array([decimal.Decimal("0.10"), None], pa.decimal128(9, 2)), ["0.10", None]),
    "dates": (pa.array([DAY, None]), ["2020-01-02", None]),
    "midnight": (
        pa.array([pd.Timestamp(DAY), pd.Timestamp("2020-01-02 03:04")], pa.timestamp("ns")),
        ["2020-01-02", "2020-01-02 03:04:00"],
    ),
    "runs": (pa.RunEndEncodedArray.from_arrays([1, 2], ["a", "b"]), ["a", "b"]),
    "nothing": (pa.nulls(2), [None, None]),
}


@pytest.mark.parametrize("kind", STORED)
def test_labels_and_identifiers_do_not_depend_on_the_type_in_parquet(tmp_path, kind):
    stored, texts = STORED[kind]
    assert identifiers(pa.chunked_array([stored])).to_pylist() == texts
    if kind in ("runs", "coded view"):
        return  # Arrow does not write them
    pq.write_table(pa.table({"label": stored}), tmp_path / "t.parquet")
    read = label_texts(read_table(tmp_path / "t.parquet")["label"])
    assert read.astype(object).where(read.notna(), None).tolist() == texts


def test_the_index_of_a_frame_is_the_first_column(tmp_path):
    frame = pd.DataFrame({"x": [0.5]}, index=pd.Index(["007"], name="label"))
    frame.to_parquet(tmp_path / "t.parquet")
    assert list(read_table(tmp_path / "t.parquet")) == ["label", "x"]


def test_columns_of_a_frame_become_texts_or_numbers_of_64_bits():
    frame = pd.DataFrame(
        {
            "coded": pd.Categorical.from_codes([0, 1], np.array([0.1, 10], np.float32)),
            "bytes": [b"007", b"x"],
            "mixed": [55, "24 hours"],
            "strings": pd.array(["1.0", None], dtype="string"),
        },
        index=["s1", "s2"],
    )
    read = plain_frame(frame)
    assert read.index.tolist() == ["s1", "s2"]
    texts = {name: label_texts(read[name]).tolist() for name in read}
    assert texts == {
        "coded": ["0.1", "10"],
        "bytes": ["007", "x"],
        "mixed": ["55", "24 hours"],
        "strings": ["1.0", None],
    }


@pytest.mark.parametrize("name", [*RESERVED_COLUMNS, "tissue_probability", "donor"])
def test_a_reserved_name_of_a_column_is_a_problem_wherever_it_is_declared(params, name):
    data = params.data.model_copy(update={"sample_id": "donor"})
    assert not reserved_name_problems(data)
    covariates = data.covariates.model_dump()
    covariates["technical"][name] = {"kind": "categorical"}
    for change in (
        {"covariates": Covariates.model_validate(covariates)},
        {"context_columns": ("tissue", name)},
        {"control": data.control.model_copy(update={"column": name})},
        {"date_column": name},
        {"study_column": name},
        {"level_column": name},
    ):
        (problem,) = reserved_name_problems(data.model_copy(update=change))
        assert problem.startswith(f"data: no column can be called {name}: ")
        assert problem.endswith("; rename it in the source")
