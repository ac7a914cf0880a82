"""Parquet shards of counts: sample_id, and a list of integers in gene order per sample."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.gem.common.errors import GemError, InputError, IntegrityError
from pipeline.gem.data.storage.reading import check_regular, file_errors
from pipeline.gem.data.tables import identifiers

ROW_GROUP = 1024  # rows at most
SHARD_VALUES = 2**28  # counts in one shard at most
BATCH_VALUES = 2**23  # counts in a row group at most; also counts read at a time from any file


def rows_per_group(genes: int) -> int:
    """Rows of a row group, which is the unit of a random read."""
    return max(1, min(ROW_GROUP, BATCH_VALUES // max(1, genes)))


class ShardWriter:
    """Streams rows into `folder/<stem>-00000.parquet`, ... with page checksums."""

    def __init__(self, folder: Path, stem: str, dtype: np.dtype):
        self.folder, self.stem, self.dtype = folder, stem, dtype
        self.paths: list[Path] = []
        self._writer: pq.ParquetWriter | None = None
        self._rows = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def write(self, sample_ids: np.ndarray, counts: np.ndarray) -> None:
        """Appends names (N,) and counts (N, G)."""
        if self._writer and (self._rows + len(counts)) * counts.shape[1] > SHARD_VALUES:
            self.close()
        offsets = pa.array(np.arange(0, counts.size + 1, counts.shape[1], dtype=np.int32))
        values = pa.array(np.ascontiguousarray(counts, dtype=self.dtype).reshape(-1))
        lists = pa.ListArray.from_arrays(offsets, values)
        table = pa.table({"sample_id": pa.array(sample_ids, pa.string()), "counts": lists})
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.paths.append(self.folder / f"{self.stem}-{len(self.paths):05d}.parquet")
            self._writer = pq.ParquetWriter(
                self.paths[-1],
                table.schema,
                compression="zstd",
                use_dictionary=["sample_id"],
                write_page_checksum=True,
            )
            self._rows = 0
        self._writer.write_table(table, row_group_size=rows_per_group(counts.shape[1]))
        self._rows += len(counts)


def read_shard(
    path: Path,
    genes: int,
    advice: str = "restore it, or run the stage that writes it again",
    error: type[GemError] = IntegrityError,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(sample_id (N,) as text, counts (N, G)) in batches of bounded size.

    `error` if the file is damaged or a row has another length; InputError if counts are not lists
    of numbers.
    """
    rows, start = rows_per_group(genes), 0
    check_regular(path, error)
    with (
        file_errors(path, advice, error),
        pq.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        _check_columns(path, file.schema_arrow)
        _check_sizes(path, file.metadata, genes, advice, error)
        for batch in file.iter_batches(rows, columns=["sample_id", "counts"]):
            if len(batch):
                names = identifiers(pa.chunked_array([batch["sample_id"]])).to_numpy()
                counts, lengths = _flat(batch["counts"])
                wrong = np.flatnonzero(lengths != genes)
                if len(wrong):
                    row = wrong[0]
                    raise error(
                        f"{path}: row {start + row} has {lengths[row]} counts; "
                        f"expected one for each of {genes} genes; {advice}"
                    )
                yield names, counts.reshape(-1, genes)
            start += len(batch)


def group_sizes(path: Path) -> list[int]:
    """The number of rows of each row group."""
    with pq.ParquetFile(path) as file:
        metadata = file.metadata
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def read_groups(path: Path, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """The counts (N, G) of row groups of a shard of a cohort, in this order."""
    with (
        file_errors(path, "restore it, or run the stage that writes it again", IntegrityError),
        pq.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        for number in numbers:
            column = file.read_row_group(number, ["counts"], use_threads=False)["counts"]
            parts = [_flat(chunk)[0].reshape(len(chunk), -1) for chunk in column.chunks]
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_columns(path: Path, schema: pa.Schema) -> None:
    absent = [name for name in ("sample_id", "counts") if name not in schema.names]
    if absent:
        raise InputError(
            f"{path}: no column {' or '.join(absent)}; it has {', '.join(schema.names)}"
        )
    kind, types = schema.field("counts").type, pa.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_list or not (types.is_integer(kind.value_type) or types.is_floating(kind.value_type)):
        raise InputError(
            f"{path}: counts is of type {kind}; expected a list of whole numbers per sample"
        )


def _check_sizes(
    path: Path, metadata: pq.FileMetaData, genes: int, advice: str, error: type[GemError]
) -> None:
    """An error if a row group holds far more counts than its rows: a row is read as a whole."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        counts = max(group.column(index).num_values for index in range(group.num_columns))
        if counts > group.num_rows * max(1, genes) + BATCH_VALUES:
            raise error(
                f"{path}: row group {number} has {counts:,} counts; "
                f"expected {group.num_rows:,} x {genes:,}; {advice}"
            )


def _flat(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(all counts, (N,) number of counts in each row) of a column of lists."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return column.flatten().to_numpy(zero_copy_only=False), lengths
