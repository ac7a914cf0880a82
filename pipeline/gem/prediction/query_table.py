"""Query tables: one row per experiment, with any subset of the columns of the model.

A query is read in blocks, so its length does not matter for memory. N rows of a block, U distinct.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from pipeline.gem.common.config import GROUPS, Numeric
from pipeline.gem.common.errors import InputError
from pipeline.gem.model.gem import TrainedGEM

SAMPLE_ID, REFERENCE_ID = "sample_id", "reference_id"  # columns that are no covariates
LATENT_COLUMNS = tuple(f"latent_{group}" for group in GROUPS)
RESERVED_COLUMNS = ("extrapolated", "draw", *LATENT_COLUMNS, "counts", "low", "high")
SCAN_ROWS = 2**16  # rows read at a time where nothing is predicted
_CSV_TYPES = (pa.int64(), pa.float64(), pa.string())  # narrowest first


@dataclass(frozen=True)
class QueryFile:
    """A CSV or Parquet table on disk, with its column types and its number of rows."""

    path: Path
    schema: pa.Schema
    rows: int = 0
    null_values: tuple[str, ...] = ()  # texts that mean "missing" in a CSV

    @classmethod
    def open(cls, path: Path, labels: Iterable[str] = ()) -> "QueryFile":
        """Opens a .csv or .parquet file. InputError if it is not readable or a column not allowed.

        In a CSV, "NA" and the like mean a missing value, unless they are one of the `labels`.
        """
        path = Path(path)
        if not path.exists():
            raise InputError(f"{path}: absent; a query is a CSV or Parquet table of experiments")
        if path.suffix not in (".csv", ".parquet"):
            raise InputError(f"{path}: neither .csv nor .parquet")
        with readable(path):
            if path.suffix == ".parquet":
                with pq.ParquetFile(path) as file:
                    query = cls(path, file.schema_arrow, file.metadata.num_rows)
                check_column_names(path, query.schema.names)
                return query
            null_values = sorted(set(pc_csv.ConvertOptions().null_values) - set(labels))
            with pc_csv.open_csv(path) as reader:
                names = reader.schema.names
            check_column_names(path, names)
            text = pa.schema([(name, pa.string()) for name in names])
            return cls(path, text, null_values=tuple(null_values))._with_types()

    def blocks(self, rows: int) -> Iterator[pa.Table]:
        """The table in blocks of `rows` rows. The last block may be shorter."""
        pending = self.schema.empty_table()
        with readable(self.path):
            for batch in self._batches(rows):
                pending = pa.concat_tables([pending, pa.Table.from_batches([batch], self.schema)])
                while len(pending) >= rows:
                    yield pending.slice(0, rows).combine_chunks()
                    pending = pending.slice(rows)
        if len(pending):
            yield pending.combine_chunks()

    def _batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        if self.path.suffix == ".parquet":
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                yield from file.iter_batches(rows)
            return
        convert = pc_csv.ConvertOptions(
            column_types=self.schema,
            null_values=list(self.null_values),
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        parse = pc_csv.ParseOptions(newlines_in_values=True)
        with pc_csv.open_csv(self.path, convert_options=convert, parse_options=parse) as reader:
            yield from reader

    def _with_types(self) -> "QueryFile":
        """The same CSV with the narrowest type that holds all values of each column.

        Arrow infers types from the first block of a file only, and reads "007" as a number.
        """
        levels, rows = dict.fromkeys(self.schema.names, 0), 0
        for table in self.blocks(SCAN_ROWS):
            rows += len(table)
            for name in levels:
                while not _castable(table[name], _CSV_TYPES[levels[name]]):
                    levels[name] += 1
        schema = pa.schema([(name, _CSV_TYPES[level]) for name, level in levels.items()])
        return replace(self, schema=schema, rows=rows)


@dataclass(frozen=True)
class QueryFrame:
    """A query in memory, with the interface of a QueryFile."""

    table: pa.Table
    path: str = "query"

    @classmethod
    def of(cls, frame: pd.DataFrame) -> "QueryFrame":
        """InputError if a column name is not allowed."""
        check_column_names("query", [str(name) for name in frame.columns])
        return cls(pa.table({str(name): _arrow_column(frame[name]) for name in frame.columns}))

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    @property
    def rows(self) -> int:
        return len(self.table)

    def blocks(self, rows: int) -> Iterator[pa.Table]:
        return (self.table.slice(start, rows) for start in range(0, len(self.table), rows))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns errors of Arrow and of the system into an InputError about the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path}: cannot be read ({reason})") from None


def check_column_names(path: Path | str, names: list[str]) -> None:
    """InputError if a column occurs twice, or has the name of a column of the output."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    problems = [f"{path}: column {name} occurs more than once" for name in twice]
    problems += [
        f"{path}: column {name} has the name of a column of the output; rename it"
        for name in RESERVED_COLUMNS
        if name in names
    ]
    if problems:
        raise InputError(*problems)


def known_columns(gem: TrainedGEM) -> list[str]:
    """Covariates, and the columns that decide whether a prediction extrapolates."""
    return list(dict.fromkeys([*gem.metadata.names, *gem.training_support.columns]))


def known_labels(gem: TrainedGEM) -> set[str]:
    """All labels of all covariates. None of them means "missing"."""
    fields = [field for field in gem.metadata.fields if not isinstance(field.covariate, Numeric)]
    return {label for field in fields for label in field.known_labels}


@dataclass(frozen=True)
class DistinctRows:
    """The distinct rows of a block: each is encoded once."""

    samples: pd.DataFrame  # (U, ...) columns that the model knows
    index: np.ndarray  # (N,) int64, distinct row of each row
    reference_ids: np.ndarray | None = None  # (U,) None without that column

    @classmethod
    def of(cls, table: pa.Table, columns: Iterable[str]) -> "DistinctRows":
        """`columns` are those that matter; the table may lack some."""
        names = [name for name in columns if name in table.column_names]
        codes = pd.DataFrame({name: _codes(table[name]) for name in names}, index=range(len(table)))
        index = np.zeros(len(table), dtype=np.int64)
        if names:
            index = codes.groupby(names).ngroup().to_numpy()
        _, first = np.unique(index, return_index=True)
        samples = categorical_frame(table.take(pa.array(first)), names)
        if REFERENCE_ID not in samples:
            return cls(samples, index)
        return cls(samples, index, samples.pop(REFERENCE_ID).to_numpy(dtype=object))


def categorical_frame(table: pa.Table, names: list[str]) -> pd.DataFrame:
    """Columns as categories: label encoding then looks at each distinct value once."""
    columns = {}
    for name in names:
        coded = _dictionary_array(table[name])
        codes = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)
        categories = pd.Index(coded.dictionary.to_pylist(), dtype=object)
        columns[name] = pd.Categorical.from_codes(codes, categories)
    return pd.DataFrame(columns, index=range(len(table)))


def plain_values(column: pa.ChunkedArray) -> pa.Array:
    """One array without dictionary and NaN (pandas writes it for "missing"), so that equal cells
    are equal values. A column without any value becomes text."""
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = column.combine_chunks()
    return pc.if_else(pc.is_nan(values), None, values) if _is_float(values) else values


def _is_float(values: pa.Array) -> bool:
    return pa.types.is_floating(values.type)


def _dictionary_array(column: pa.ChunkedArray) -> pa.DictionaryArray:
    coded = pc.dictionary_encode(plain_values(column))
    return coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) number of each cell among the distinct values; the highest for missing cells."""
    coded = _dictionary_array(column)
    return pc.fill_null(coded.indices, len(coded.dictionary)).to_numpy(zero_copy_only=False)


def _castable(texts: pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Whether all texts of a CSV column are numbers of this type, none with leading zeros."""
    if kind == pa.string():
        return True
    if pc.any(pc.match_substring_regex(texts, r"^\s*[-+]?0\d")).as_py():
        return False
    try:
        pc.cast(texts, kind)
    except pa.ArrowInvalid:
        return False
    return texts.null_count < len(texts)


def _arrow_column(column: pd.Series) -> pa.Array:
    """A column of a frame; as text if it mixes types, such as 55 and "24 hours"."""
    try:
        return pa.Array.from_pandas(column)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        missing = [pd.api.types.is_scalar(value) and pd.isna(value) for value in column]
        texts = [None if no else str(value) for value, no in zip(column, missing, strict=True)]
        return pa.array(texts, pa.string())
