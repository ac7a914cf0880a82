"""Query tables: one row per experiment, with any subset of the columns of the model.

A query is read in blocks, so its length does not matter for memory. N rows of a block, U distinct.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.gem.common.config import Numeric
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.tables import (
    ANNDATA_COLUMNS,
    OUTPUT_COLUMNS,
    QUERY_COLUMNS,
    arrow_column,
    is_table,
    is_text_table,
    plain,
    storable,
    table_errors,
    text_batches,
    text_schema,
)
from pipeline.gem.model.gem import TrainedGEM

SAMPLE_ID, REFERENCE_ID, REFERENCE_COUNTS = QUERY_COLUMNS  # columns that are no covariates
SCAN_ROWS = 2**16  # rows read at a time where nothing is predicted
_NUMBER_TYPES = (pa.int64(), pa.float64(), pa.string())  # narrowest first


@dataclass(frozen=True)
class QueryFile:
    """A CSV or Parquet table on disk, with its column types and its number of rows."""

    path: Path
    schema: pa.Schema
    rows: int

    @classmethod
    def open(cls, path: Path, gem: TrainedGEM) -> "QueryFile":
        """InputError if the file is not readable or a column not allowed.

        Columns of a text table are texts as written. Those of numeric covariates become numbers
        where all their cells are.
        """
        path = Path(path)
        if not path.exists():
            raise InputError(f"{path}: absent; a query is a CSV or Parquet table of experiments")
        if not is_table(path):
            raise InputError(f"{path}: neither .csv nor .parquet (nor .tsv, .csv.gz, .tsv.gz)")
        if is_text_table(path):
            query = cls(path, text_schema(path, known_columns(gem)), 0)
            check_column_names(path, query.schema.names)
            return query._with_numbers(gem)
        with table_errors(path), pq.ParquetFile(path) as file:
            schema = _storable(file.schema_arrow.empty_table()).schema
            query = cls(path, schema, file.metadata.num_rows)
        check_column_names(path, query.schema.names)
        return query

    def blocks(self, rows: int) -> Iterator[pa.Table]:
        """The table in blocks of `rows` rows. The last block may be shorter."""
        pending = self.schema.empty_table()
        with table_errors(self.path):
            for table in self._tables(rows):
                pending = pa.concat_tables([pending, table])
                while len(pending) >= rows:
                    yield pending.slice(0, rows).combine_chunks()
                    pending = pending.slice(rows)
        if len(pending):
            yield pending.combine_chunks()

    def _tables(self, rows: int) -> Iterator[pa.Table]:
        if is_text_table(self.path):
            for batch in text_batches(self.path):
                table = pa.Table.from_batches([batch.rename_columns(self.schema.names)])
                columns = map(_cast, table.columns, self.schema.types)
                yield pa.table(list(columns), schema=self.schema)
            return
        with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(rows):
                yield _storable(pa.Table.from_batches([batch]))

    def _with_numbers(self, gem: TrainedGEM) -> "QueryFile":
        """The same text table with the narrowest type that holds all values of numeric columns."""
        numeric = [
            field.name for field in gem.metadata.fields if isinstance(field.covariate, Numeric)
        ]
        levels, rows = {name: 0 for name in self.schema.names if name in numeric}, 0
        for table in self.blocks(SCAN_ROWS):
            rows += len(table)
            for name in levels:
                while not _castable(table[name], _NUMBER_TYPES[levels[name]]):
                    levels[name] += 1
        schema = self.schema
        for name, level in levels.items():
            position = schema.get_field_index(name)
            schema = schema.set(position, pa.field(name, _NUMBER_TYPES[level]))
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
        return cls(pa.table({str(name): arrow_column(frame[name]) for name in frame.columns}))

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    @property
    def rows(self) -> int:
        return len(self.table)

    def blocks(self, rows: int) -> Iterator[pa.Table]:
        return (self.table.slice(start, rows) for start in range(0, len(self.table), rows))


def _storable(table: pa.Table) -> pa.Table:
    return pa.table([storable(column) for column in table.columns], table.column_names)


def check_column_names(path: Path | str, names: list[str]) -> None:
    """InputError if a column has no name, occurs twice, or has the name of one of the output."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    problems = [f"{path}: column {name} occurs more than once" for name in twice]
    problems += [
        f"{path}: column {name} has the name of a column of the output; rename it"
        for name in (*OUTPUT_COLUMNS, *ANNDATA_COLUMNS)
        if name in names
    ]
    if "" in names:
        problems.append(f"{path}: column {names.index('') + 1} has no name; name it")
    if problems:
        raise InputError(*problems)


def known_columns(gem: TrainedGEM) -> list[str]:
    """Covariates, and the columns that decide whether a prediction extrapolates."""
    return list(dict.fromkeys([*gem.metadata.names, *gem.training_support.columns]))


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
    """One `plain` array without coding and NaN (pandas writes it for "missing"), so that equal
    cells are equal values."""
    column = plain(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = column.combine_chunks()
    return (
        pc.if_else(pc.is_nan(values), None, values) if pa.types.is_floating(values.type) else values
    )


def _dictionary_array(column: pa.ChunkedArray) -> pa.DictionaryArray:
    coded = pc.dictionary_encode(plain_values(column))
    return coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) number of each cell among the distinct values; the highest for missing cells."""
    coded = _dictionary_array(column)
    return pc.fill_null(coded.indices, len(coded.dictionary)).to_numpy(zero_copy_only=False)


def _cast(texts: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return texts if kind == pa.string() else pc.cast(pc.utf8_trim_whitespace(texts), kind)


def _castable(texts: pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Whether all texts are finite numbers of this type, none with leading zeros."""
    if kind == pa.string():
        return True
    if pc.any(pc.match_substring_regex(texts, r"^\s*[-+]?0\d")).as_py():
        return False
    try:
        numbers = _cast(texts, kind)
    except pa.ArrowInvalid:
        return False
    return texts.null_count < len(texts) and pc.all(pc.is_finite(numbers)).as_py()
