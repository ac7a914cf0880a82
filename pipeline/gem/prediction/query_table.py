"""Queries: a table of experiments to predict, a row each, with only the columns that one has. Read in blocks, checked whole.

N rows of a block, U distinct ones. A query of any length takes the memory of one block.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from pipeline.gem.common.errors import InputError, did_you_mean
from pipeline.gem.data.covariates import CovariateEncoder
from pipeline.gem.data.labels import cell
from pipeline.gem.data.units import shown
from pipeline.gem.model.gem import TrainedGEM

SAMPLE, REFERENCE = "sample_id", "reference_id"  # names that are no covariates
RESERVED = ("extrapolated", "sample", "counts", "low", "high")  # columns that a prediction adds
_SHOWN = 20  # problems of one column that are listed; the others are counted
_REMEMBERED = 2**16  # checked values of one column that are kept in mind
_READ_ROWS = 2**16  # rows checked at a time


@dataclass(frozen=True)
class QueryFile:
    """A CSV or Parquet table, opened: its columns and their types, and how many rows it has."""

    path: Path
    schema: pa.Schema
    rows: int
    missing: tuple[str, ...] = ()  # texts that mean "missing" in a CSV

    @classmethod
    def open(cls, path: Path, labels: Iterable[str] = ()) -> "QueryFile":
        """InputError where it is absent or no table. In a CSV what other tools write for "missing" is that, but for `labels`."""
        path = Path(path)
        if not path.exists():
            raise InputError(
                f"{path}: absent; give a CSV or Parquet table, a row for each experiment"
            )
        if path.suffix not in (".csv", ".parquet"):
            raise InputError(f"{path}: neither .csv nor .parquet")
        try:
            if path.suffix == ".parquet":
                with pq.ParquetFile(path) as file:
                    return cls(path, file.schema_arrow, file.metadata.num_rows)._checked()
            missing = tuple(sorted(set(pc_csv.ConvertOptions().null_values) - set(labels)))
            with pc_csv.open_csv(path) as reader:
                header = reader.schema.names
            return (
                cls(path, pa.schema([(name, pa.string()) for name in header]), 0, missing)
                ._checked()
                ._typed()
            )
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{path}: cannot be read ({next(iter(str(error).splitlines()), type(error).__name__)})"
            ) from None

    def blocks(self, rows: int) -> Iterator[pa.Table]:
        """The table in blocks of `rows` rows, the last one shorter."""
        waiting, number = [], 0
        try:
            for batch in self._batches(rows):
                waiting.append(batch)
                number += len(batch)
                while number >= rows:
                    table = pa.Table.from_batches(waiting, self.schema)
                    yield table.slice(0, rows).combine_chunks()
                    waiting, number = table.slice(rows).to_batches(), number - rows
            if number:
                yield pa.Table.from_batches(waiting, self.schema).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.path}: cannot be read ({next(iter(str(error).splitlines()), type(error).__name__)})"
            ) from None

    def _batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        if self.path.suffix == ".parquet":
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                yield from file.iter_batches(rows)
            return
        convert = pc_csv.ConvertOptions(
            column_types=self.schema,
            null_values=list(self.missing),
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        with pc_csv.open_csv(
            self.path,
            convert_options=convert,
            parse_options=pc_csv.ParseOptions(newlines_in_values=True),
        ) as reader:
            yield from reader

    def _checked(self) -> "QueryFile":
        names = self.schema.names
        problems = [
            f"{self.path}: column {name} stands twice"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        problems += [
            f"{self.path}: a column named {name}; rename it: the prediction adds a column of that name"
            for name in RESERVED
            if name in names
        ]
        if problems:
            raise InputError(*problems)
        return self

    def _typed(self) -> "QueryFile":
        """The narrowest type that holds every value of each column: whole numbers, numbers, text. "007" is text."""
        kinds, rows = dict.fromkeys(self.schema.names, 0), 0
        for table in self.blocks(_READ_ROWS):
            rows += len(table)
            for name in kinds:
                while not _is(_KINDS[kinds[name]], table[name]):
                    kinds[name] += 1
        return QueryFile(
            self.path,
            pa.schema([(name, _KINDS[kind]) for name, kind in kinds.items()]),
            rows,
            self.missing,
        )


@dataclass(frozen=True)
class QueryFrame:
    """A query from Python, as a file would be."""

    table: pa.Table
    path: str = "query"

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    @property
    def rows(self) -> int:
        return len(self.table)

    def blocks(self, rows: int) -> Iterator[pa.Table]:
        return (self.table.slice(start, rows) for start in range(0, len(self.table), rows))


_KINDS = (pa.int64(), pa.float64(), pa.string())


def _is(kind: pa.DataType, texts: pa.ChunkedArray) -> bool:
    if kind == pa.string():
        return True
    if pc.any(pc.match_substring_regex(texts, r"^\s*[-+]?0\d")).as_py():
        return False
    try:
        pc.cast(texts, kind)
    except pa.ArrowInvalid:
        return False
    return texts.null_count < len(texts)


def check_query(
    query: QueryFile | QueryFrame, gem: TrainedGEM, unknown: str, references: Collection[str] | None
) -> list[str]:
    """What to tell of a query that is in order; InputError lists every problem of every row: row, column, closest known value.

    `references` are the names that its column reference_id chooses from; None: there are none.
    """
    known, names, where = known_columns(gem), query.schema.names, query.path
    problems = [] if query.rows else [f"{where}: no rows; give one for each experiment"]
    if not set(names) & set(known) and references is None:
        problems.append(
            f"{where}: none of its columns is known to the model{did_you_mean('', known)}"
        )
    if references is not None and len(references) > 1 and REFERENCE not in names:
        problems.append(
            f"{where}: there are {len(references):,} references; add a column {REFERENCE} that says which is whose"
        )
    fields = {field.name: field for several in gem.metadata.groups.values() for field in several}
    checks = {
        name: partial(_covariate_problem, fields[name], unknown) for name in names if name in fields
    }
    if references is not None and REFERENCE in names:
        checks[REFERENCE] = partial(_reference_problem, frozenset(references))
    nested = [
        name
        for name in names
        if name in (*known, REFERENCE) and pa.types.is_nested(query.schema.field(name).type)
    ]
    problems += [
        f"{where}: column {name} holds {query.schema.field(name).type}; expected one value a cell"
        for name in nested
    ]
    problems += _bad_values(
        query, {name: check for name, check in checks.items() if name not in nested}
    )
    if problems:
        raise InputError(*problems)
    strange = [name for name in names if name not in (*known, SAMPLE, REFERENCE)]
    notes = [
        f"{where}: column {name} is unknown to the model and only carried along{did_you_mean(name, known)}"
        for name in strange
    ]
    ignored = references is None and REFERENCE in names
    return notes + (
        [f"{where}: column {REFERENCE} says nothing without references"] if ignored else []
    )


def known_labels(gem: TrainedGEM) -> set[str]:
    """Every label of every covariate, none of which means "missing"."""
    fields = (field for several in gem.metadata.groups.values() for field in several)
    return {label for field in fields if field.covariate.kind != "numeric" for label in field.known}


def known_columns(gem: TrainedGEM) -> list[str]:
    """Names that mean something to the model: covariates, and what else says whether a prediction extrapolates."""
    return list(dict.fromkeys([*gem.metadata.names, *gem.seen.columns]))


def _bad_values(
    query: QueryFile | QueryFrame, checks: Mapping[str, Callable[[object], str | None]]
) -> list[str]:
    """A line for each distinct bad value of each column, with the first row that has it."""
    problems: dict[str, list[str]] = {name: [] for name in checks}
    seen: dict[str, set] = {name: set() for name in checks}
    more, start = dict.fromkeys(checks, 0), 0
    for table in query.blocks(_READ_ROWS) if checks else ():
        for name, check in checks.items():
            column = _flat(table[name]).combine_chunks()
            for scalar in pc.unique(column):
                value = cell(scalar.as_py())
                if (value is None and name != REFERENCE) or value in seen[name]:
                    continue
                seen[name].add(value)
                problem = check(value)
                if problem and len(problems[name]) < _SHOWN:
                    problems[name].append(
                        f"{query.path}: {name}, row {start + _first(column, scalar)}: {problem}"
                    )
                elif problem:
                    more[name] += 1
            if len(seen[name]) > _REMEMBERED:
                seen[name].clear()
        start += len(table)
    for name, number in more.items():
        problems[name] += (
            [f"{query.path}: {name}: and {number:,} more values like these"] if number else []
        )
    return [problem for several in problems.values() for problem in several]


def _first(column: pa.Array, value: pa.Scalar) -> int:
    return (
        pc.index(pc.is_null(column), True).as_py()
        if value.as_py() is None
        else pc.index(column, value).as_py()
    )


def _covariate_problem(field: CovariateEncoder, unknown: str, value: object) -> str | None:
    return field.read(value, unknown)[1]


def _reference_problem(known: frozenset[str], value: object) -> str | None:
    if value is None:
        return "names no reference; every row needs one, or none"
    return (
        None
        if str(value) in known
        else f"no reference is named {shown(value)}{did_you_mean(value, sorted(known))}"
    )


@dataclass(frozen=True)
class DistinctRows:
    """A block of a query: its distinct rows, and which of them each row is."""

    samples: pd.DataFrame  # (U, ...) the columns that the model knows
    index: np.ndarray  # (N,) int64
    reference: np.ndarray | None = None  # (U,) names of references, None where the row names none

    @classmethod
    def of(cls, table: pa.Table, known: Iterable[str]) -> "DistinctRows":
        """`known` are the columns that matter, and reference_id where there are references."""
        names = [name for name in known if name in table.column_names]
        index, first = _distinct_rows(table, names)
        samples = plain(table.take(pa.array(first)), names)
        reference = samples.pop(REFERENCE).to_numpy(dtype=object) if REFERENCE in samples else None
        return cls(samples, index, reference)


def _distinct_rows(table: pa.Table, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """((N,) number of each row among the distinct ones, (U,) where each of these stands first)."""
    code = np.zeros(len(table), dtype=np.int64)
    for name in names:
        column = _coded(table[name])
        values = (
            pc.fill_null(column.indices, len(column.dictionary))
            .to_numpy(zero_copy_only=False)
            .astype(np.int64)
        )
        code = np.unique(code * (len(column.dictionary) + 1) + values, return_inverse=True)[
            1
        ].reshape(-1)
    _, first, index = np.unique(code, return_index=True, return_inverse=True)
    return index.reshape(-1), first


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without a dictionary, so that the same value has one code; a column without any value as text."""
    if pa.types.is_null(column.type):
        return column.cast(pa.string())
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def plain(table: pa.Table, names: list[str]) -> pd.DataFrame:
    """Columns of a table as categories of plain values: few distinct values stand for many rows."""
    columns = {}
    for name in names:
        coded = _coded(table[name])
        codes = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)
        columns[name] = pd.Categorical.from_codes(
            codes, pd.Index(coded.dictionary.to_pylist(), dtype=object)
        )
    return pd.DataFrame(columns, index=range(len(table)))


def _coded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    flat = _flat(column).combine_chunks()
    if pa.types.is_floating(flat.type):
        flat = pc.if_else(pc.is_nan(flat), None, flat)  # which pandas writes for "missing"
    coded = pc.dictionary_encode(flat)
    return coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded


def as_table(frame: pd.DataFrame) -> pa.Table:
    """A frame as Arrow, columns by name; what Arrow cannot hold together, as 55 beside "24 hours", as text."""
    problems = [f"column {name} stands twice" for name in frame.columns[frame.columns.duplicated()]]
    if problems:
        raise InputError(*problems)
    return pa.table({str(name): _arrow(frame[name]) for name in frame.columns})


def _arrow(column: pd.Series) -> pa.Array:
    try:
        return pa.Array.from_pandas(column)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array(
            [
                None if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)
                for value in column
            ],
            pa.string(),
        )
