"""Counts on disk: Parquet shards of (sample_id, counts), a list of integers in gene order per sample."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.gem.errors import IntegrityError

ROW_GROUP = 1024          # rows
SHARD_VALUES = 2**28      # counts in one shard at most


class ShardWriter:
    """Streams rows into `folder/<stem>-00000.parquet`, ...; row groups of about 1,024 rows, page checksums."""

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
        """Appends rows: names (N,) and counts (N, G)."""
        if self._writer and (self._rows + len(counts)) * counts.shape[1] > SHARD_VALUES:
            self.close()
        offsets = pa.array(np.arange(0, counts.size + 1, counts.shape[1], dtype=np.int32))
        values = pa.array(np.ascontiguousarray(counts, dtype=self.dtype).reshape(-1))
        table = pa.table({"sample_id": pa.array(sample_ids, pa.string()), "counts": pa.ListArray.from_arrays(offsets, values)})
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.paths.append(self.folder / f"{self.stem}-{len(self.paths):05d}.parquet")
            self._writer = pq.ParquetWriter(
                self.paths[-1], table.schema, compression="zstd", use_dictionary=["sample_id"], write_page_checksum=True
            )
            self._rows = 0
        self._writer.write_table(table, row_group_size=ROW_GROUP)
        self._rows += len(counts)


def read_shard(path: Path, genes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(sample_id (N,), counts (N, G)) per row group. IntegrityError where the file is torn or a row has another length."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["sample_id", "counts"])
                column = table["counts"].combine_chunks()
                lengths = np.diff(column.offsets.to_numpy())
                if column.null_count or (lengths != genes).any():
                    bad = int(np.flatnonzero(lengths != genes)[0]) if (lengths != genes).any() else 0
                    raise IntegrityError(f"{path}: row {bad} of row group {group} has {lengths[bad]} counts; expected one for each of {genes} genes")
                yield table["sample_id"].to_numpy(), column.flatten().to_numpy(zero_copy_only=False).reshape(-1, genes)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise IntegrityError(f"{path}: cannot be read ({error}); restore it, or run the stage that writes it again") from None
