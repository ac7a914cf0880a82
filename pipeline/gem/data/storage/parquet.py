"""Parquet tables, checked before they are read."""

from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.gem.common.errors import GemError, InputError, examples
from pipeline.gem.data.storage.reading import RESTORE, check_memory, check_regular, file_errors

CELL_BYTES = 60  # of a text in memory, beside its characters


def read_parquet(
    path: Path,
    columns: Collection[str] | None = None,
    advice: str = RESTORE,
    error: type[GemError] = InputError,
) -> tuple[pa.Table, list[str]]:
    """(those of `columns` that a table has, all if None; the names of all its columns).

    Other columns are not read. The index of a frame that pandas wrote comes first, as columns.
    `error` if the file is damaged, InputError if it is unsuitable.
    """
    check_regular(path, error)
    with file_errors(path, advice, error, "a Parquet table"):
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        index = (schema.pandas_metadata or {}).get("index_columns", [])
        known = sorted(schema.names, key=lambda name: name not in index)
        names = known if columns is None else [name for name in known if name in columns]
        if columns is not None:
            check_distinct(path, names)
        check_memory(str(path), f"{rows:,} rows", rows * len(names) * 8)
        # Text is read with one copy of each value: a small file may repeat a long one.
        texts = [name for name in names if _is_text(schema.field(name).type)]
        with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=texts) as file:
            table = file.read(None if columns is None else names)
        table.validate(full=True)
        if len(set(names)) == len(names):
            table = table.select(names)
        for position, name in enumerate(table.column_names):
            column = table.column(position)
            if pa.types.is_dictionary(column.type) and _is_text(column.type.value_type):
                _check_text(column, f"{path}: {name}")
                if name in texts:
                    column = column.cast(column.type.value_type)
                    table = table.set_column(position, name, column)
        return table, schema.names


def check_distinct(path: Path, names: Collection[str]) -> None:
    """InputError if a name of a column occurs more than once."""
    if repeated := {name for name in names if list(names).count(name) > 1}:
        raise InputError(f"{path}: columns {examples(sorted(repeated))} occur more than once")


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind)


def _check_text(column: pa.ChunkedArray, where: str) -> None:
    """InputError if the texts of a column of codes need more memory than is free."""
    size = len(column) * CELL_BYTES
    for chunk in column.chunks:
        lengths = pc.take(pc.binary_length(chunk.dictionary), chunk.indices)
        size += pc.sum(lengths).as_py() or 0
    check_memory(where, "its text", size)
