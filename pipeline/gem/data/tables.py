"""Tables of the user in one form: CSV and TSV (also .gz), Parquet, columns of a frame.

A cell of a text table is the text as written, and missing only if it is empty. Columns of any other
table are texts, numbers or booleans, whatever their type on disk.
"""

import csv
import logging
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from datetime import datetime, time
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv

from pipeline.gem.common.config import GROUPS, Data
from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.data.labels import label_text
from pipeline.gem.data.storage.parquet import CELL_BYTES, check_distinct, read_parquet
from pipeline.gem.data.storage.reading import check_memory, check_regular, file_errors

logger = logging.getLogger(__name__)
TEXT_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
_HEAD = 2**16  # bytes that show encoding and delimiter
_HEADER_LENGTH = 2**24  # characters of a line of a header
_MOST_BYTES = 2**28  # of a list of names
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_BYTE_ORDER_MARKS = {  # the longest first: the mark of UTF-32 begins with that of UTF-16
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}

# Columns with a meaning of their own. No declared column and no gene may have such a name: the
# model could not be asked for it.
COHORT_COLUMNS = ("sample_id", "total", "split")  # that the cohort adds to the samples
QUERY_COLUMNS = ("sample_id", "reference_id", "reference_counts")  # that a query may have
LATENT_COLUMNS = tuple(f"latent_{group}" for group in GROUPS)
OUTPUT_COLUMNS = ("extrapolated", "draw", *LATENT_COLUMNS, "counts", "low", "high")
ANNDATA_COLUMNS = ("_index", "__categories")  # that AnnData keeps beside those of obs
RESERVED_COLUMNS = (*COHORT_COLUMNS, *QUERY_COLUMNS, *OUTPUT_COLUMNS, *ANNDATA_COLUMNS)


def reserved_name_problems(data: Data) -> list[str]:
    """A message for each declared column with a reserved name."""
    taken = dict.fromkeys(RESERVED_COLUMNS, "the cohort or a prediction has one of this name")
    # A reconstruction has the likeliest label of a covariate, and its probability.
    taken |= {f"{name}_probability": f"it is added beside {name}" for name in data.covariates.all()}
    taken |= {data.sample_id: "data.sample_id names it"}
    return [
        f"data: no column can be called {name}: {taken[name]}; rename it in the source"
        for name in sorted(data.columns() & taken.keys())
    ]


# files


def is_text_table(path: Path) -> bool:
    return path.name.lower().endswith(TEXT_SUFFIXES)


def is_table(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def table_errors(path: Path, kind: str = "a table") -> AbstractContextManager[None]:
    """Turns errors of Arrow, of decoding and of the system into an InputError about the file."""
    check_regular(path)
    errors = (pa.ArrowException, OSError, ValueError, csv.Error)
    return file_errors(path, "save it again", kind=kind, errors=errors)


def read_table(path: Path) -> pd.DataFrame:
    """A table whose suffix is one of SUFFIXES. InputError if it cannot be read.

    The index of a frame that pandas wrote as Parquet comes first, as columns.
    """
    return read_columns(path)[0]


def read_columns(
    path: Path, columns: Collection[str] | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """(those of `columns` that a table has, all if None; the names of all its columns)."""
    if is_text_table(path):
        with table_errors(path, "a CSV table"):
            schema = text_schema(path)
            names = schema.names
            kept = [i for i, name in enumerate(names) if columns is None or name in columns]
            if columns is not None:
                check_distinct(path, [names[i] for i in kept])
            batches = (batch.rename_columns(names).select(kept) for batch in text_batches(path))
            table = pa.Table.from_batches(
                _within_memory(batches, path), pa.schema([schema.field(i) for i in kept])
            )
    else:
        table, names = read_parquet(path, columns)
    return pd.DataFrame(
        {position: _to_pandas(plain(column)) for position, column in enumerate(table.columns)},
        index=range(len(table)),
    ).set_axis(table.column_names, axis=1), names


def _within_memory(batches: Iterator[pa.RecordBatch], path: Path) -> Iterator[pa.RecordBatch]:
    """The batches. InputError before their text, as objects of Python, exceeds the free memory."""
    size = 0
    for batch in batches:
        size += batch.nbytes + CELL_BYTES * batch.num_rows * batch.num_columns
        check_memory(str(path), "its text", size)
        yield batch


def with_names(table: pd.DataFrame, names: pd.Series, key: str, where: str) -> pd.DataFrame:
    """The table with the names of its rows, as text, in a first column `key`.

    It replaces another column of that name. InputError if a name is missing.
    """
    names = identifier_series(names)
    missing = np.flatnonzero(names.isna().to_numpy())
    if len(missing):
        raise InputError(f"{where}: {key} is missing in rows {examples(missing)}; name every row")
    table = table.drop(columns=key, errors="ignore").reset_index(drop=True)
    table.insert(0, key, names.to_numpy(dtype=object))
    return table


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without the space around them."""
    with table_errors(path, "a list of names"), pa.input_stream(path) as file:
        content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        lines = content.decode(_encoding(content)).splitlines()
    return [line.strip() for line in lines if line.strip()]


def text_schema(path: Path, known: Collection[str] = ()) -> pa.Schema:
    """Text columns, named as in the header without the space around a name that is not `known`;
    one without a name is called by its position. A warning tells of an unusual delimiter."""
    with table_errors(path, "a CSV table"):
        encoding, delimiter, usual = _text_format(path)
        names = _header(path, encoding, delimiter)
    if not usual:
        separator = _DELIMITERS[delimiter]
        logger.warning("%s: its columns are separated by %s; read as such", path, separator)
    names = [name if name in known else name.strip() for name in names]
    names = [name or f"column_{number}" for number, name in enumerate(names, start=1)]
    return pa.schema([(name, pa.string()) for name in names])


def text_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of a text table, of bounded size, with the names of the header as they are."""
    encoding, delimiter, _ = _text_format(path)
    names = _header(path, encoding, delimiter)
    reader = pc_csv.open_csv(
        pa.input_stream(path),
        # Arrow drops the mark of UTF-8 itself.
        read_options=pc_csv.ReadOptions(encoding="utf-8" if "utf-8" in encoding else encoding),
        parse_options=pc_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pc_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    if reader.schema.names != names:  # a column of another name would get a guessed type
        raise ValueError("its header has quotes that can be read in two ways")
    with reader:
        yield from reader


def _header(path: Path, encoding: str, delimiter: str) -> list[str]:
    with pa.input_stream(path) as file, TextIOWrapper(file, encoding, newline="") as text:
        lines = iter(lambda: _line(text), "")
        names = next(filter(None, csv.reader(lines, delimiter=delimiter)), None)
    if names is None:
        raise ValueError("it is empty")
    return names


def _line(file: TextIO) -> str:
    line = file.readline(_HEADER_LENGTH + 1)
    if len(line) > _HEADER_LENGTH:
        raise ValueError(f"a line of its header has more than {_HEADER_LENGTH:,} characters")
    return line


def _text_format(path: Path) -> tuple[str, str, bool]:
    """(encoding, delimiter, whether the suffix promises that delimiter) from the first bytes."""
    with pa.input_stream(path) as file:
        head = file.read(_HEAD)
    encoding = _encoding(head)
    usual = "\t" if ".tsv" in path.name.lower() else ","
    # Text in quotes may hold any delimiter: keep what stands outside.
    header = next(iter(head.decode(encoding, errors="ignore").splitlines()), "")
    outside = "".join(header.split('"')[::2])
    delimiter = max((usual, *_DELIMITERS), key=outside.count)  # the usual one if equal
    return encoding, delimiter, delimiter == usual


def _encoding(head: bytes) -> str:
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "")
    if not encoding and b"\0" in head:
        raise ValueError("it is no text, or UTF-16 without a byte-order mark; save it as UTF-8")
    return encoding or "utf-8"


# columns


def storable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column in a type that Arrow's functions know: no view, no runs, no extension."""
    kind, types = column.type, pa.types
    if types.is_run_end_encoded(kind):
        return storable(pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks]))
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return column.cast(pa.string() if types.is_string_view(kind) else pa.binary())
    if types.is_dictionary(kind) and types.is_string_view(kind.value_type):
        return pa.chunked_array(
            pa.DictionaryArray.from_arrays(chunk.indices, chunk.dictionary.cast(pa.string()))
            for chunk in column.chunks
        )
    if isinstance(kind, pa.BaseExtensionType):
        return _texts(column)
    return column


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as text, 64-bit floats, integers or booleans; text that was coded stays coded.

    A number of 32 or 16 bits becomes the number that its shortest text names: 0.1, not
    0.10000000149. Nested columns, and bytes that are no UTF-8, stay as they are.
    """
    column = storable(column)
    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        values = plain(_decoded(column))
        return values.dictionary_encode() if types.is_string(values.type) else values
    if types.is_null(kind) or types.is_large_string(kind):
        return column.cast(pa.string())
    if types.is_float32(kind) or types.is_float16(kind):
        numbers = column.to_numpy()
        missing = np.asarray(column.is_null())
        return pa.chunked_array([pa.array(numbers.astype(str).astype(np.float64), mask=missing)])
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        try:
            return column.cast(pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:
            return column
    if any(is_plain(kind) for is_plain in _PLAIN):
        return column
    return _texts(column)


_PLAIN = (
    pa.types.is_string,
    pa.types.is_floating,
    pa.types.is_integer,
    pa.types.is_boolean,
    pa.types.is_nested,
)


def identifiers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Names of samples or genes as text, as written without the space around them."""
    column = plain(column)
    if pa.types.is_dictionary(column.type):
        column = _decoded(column)
    if not pa.types.is_string(column.type):
        return _texts(column)
    texts = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(texts, ""), None, texts)


def identifier(value: object) -> str | None:
    """The name of one sample or gene as text; None if missing or empty."""
    return value.strip() or None if isinstance(value, str) else label_text(value)


def identifier_series(names: pd.Series | pd.Index) -> pd.Series:
    """`identifiers` of a column or an index of a frame."""
    return _to_pandas(identifiers(arrow_column(names)))


def plain_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with all columns `plain`."""
    columns = [_to_pandas(plain(arrow_column(frame.iloc[:, i]))) for i in range(frame.shape[1])]
    plain_columns = dict(enumerate(column.set_axis(frame.index) for column in columns))
    return pd.DataFrame(plain_columns, index=frame.index).set_axis(frame.columns, axis=1)


def arrow_column(column: pd.Series | pd.Index) -> pa.ChunkedArray:
    """A column of a frame; as text if it mixes types, such as 55 and "24 hours"."""
    try:
        array = pa.Array.from_pandas(column)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        array = pa.array(map(_text, column), pa.string())
    return array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type)


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Of values that are neither text nor numbers, such as decimals and dates."""
    return pa.chunked_array([pa.array(map(_text, column.to_pylist()), pa.string())])


def _text(value: object) -> str | None:
    if not pd.api.types.is_scalar(value):
        return str(value)
    if isinstance(value, datetime) and not pd.isna(value) and value.time() == time():
        return str(value.date())  # pandas stores dates as times at midnight
    return label_text(value)


def _to_pandas(column: pa.ChunkedArray) -> pd.Series:
    """Integers stay integers where a value is missing: as floats, long ones would lose digits."""
    if pa.types.is_integer(column.type) and column.null_count:
        name = str(column.type).replace("int", "Int").replace("u", "U")
        return pd.Series(pd.api.types.pandas_dtype(name).__from_arrow__(column))
    return column.to_pandas()
