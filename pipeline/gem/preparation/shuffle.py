"""Writes counts in random order with bounded memory.

Samples go to random buckets on disk first; then each bucket is shuffled in memory. Both together
give every order the same probability. G genes.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.gem.common.progress import Progress
from pipeline.gem.data.cohort import StoredFile
from pipeline.gem.data.shards import ShardWriter, rows_per_group
from pipeline.gem.data.sources import Source, checked_chunks

SHUFFLE_VALUES = 2**26  # counts shuffled in memory at a time: 256 MB at four bytes
MOST_BUCKETS = 500  # open files, of which a process may have 1,024


class RoleSamples(NamedTuple):
    """The samples of one role (train, validation or test)."""

    rows: np.ndarray  # positions in the source's samples
    dtype: np.dtype  # integer type of their counts


@dataclass
class _Bucket:
    """Samples in the order of the source, in a file without a name."""

    file: BinaryIO
    dtype: np.dtype
    rows: list[np.ndarray] = field(default_factory=list)  # positions in the source's samples

    def add(self, rows: np.ndarray, counts: np.ndarray) -> None:
        self.rows.append(rows)
        np.ascontiguousarray(counts, dtype=self.dtype).tofile(self.file)

    def read(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows (N,), counts (N, G))"""
        self.file.seek(0)
        counts = np.fromfile(self.file, dtype=self.dtype).reshape(-1, width)
        return np.concatenate([np.empty(0, dtype=np.int64), *self.rows]), counts


def write_shuffled_shards(
    source: Source,
    where: str,
    genes: np.ndarray,
    roles: dict[str, RoleSamples],
    seed: int,
    folder: Path,
) -> tuple[dict[str, dict[str, dict]], np.ndarray]:
    """Writes the counts of `genes` (G,) bool in shards by role.

    Returns the manifest's entries, and the positions in the source's samples in the order of the
    shards, role after role.
    """
    rng, width = np.random.default_rng(seed), int(genes.sum())
    samples = source.samples["sample_id"].to_numpy()
    bucket_of = np.full(len(samples), -1)
    buckets: list[_Bucket] = []
    buckets_of: dict[str, list[_Bucket]] = {}
    with ExitStack() as files:
        for role, (rows, dtype) in roles.items():
            number = min(-(-len(rows) * width // SHUFFLE_VALUES), MOST_BUCKETS)
            bucket_of[rows] = len(buckets) + rng.integers(0, max(number, 1), len(rows))
            buckets_of[role] = [
                _Bucket(files.enter_context(tempfile.TemporaryFile(dir=folder.parent)), dtype)
                for _ in range(number)
            ]
            buckets += buckets_of[role]
        _fill_buckets(source, where, genes, bucket_of, buckets)
        shards, order = {}, [np.empty(0, dtype=np.int64)]
        for role, (_, dtype) in roles.items():
            with ShardWriter(folder, role, dtype) as writer:
                for bucket in buckets_of[role]:
                    order.append(_write_shuffled(writer, bucket, samples, width, rng))
            shards[role] = {f"counts/{path.name}": StoredFile.of(path) for path in writer.paths}
    return shards, np.concatenate(order)


def _fill_buckets(
    source: Source, where: str, genes: np.ndarray, bucket_of: np.ndarray, buckets: list[_Bucket]
) -> None:
    """Writes each sample to its bucket (N,), -1 for none."""
    progress = Progress("prepare: writing", len(bucket_of), "samples")
    for rows, counts in checked_chunks(source, where):
        counts = counts[:, genes]
        for bucket in np.unique(bucket_of[rows[bucket_of[rows] >= 0]]):
            inside = bucket_of[rows] == bucket
            buckets[bucket].add(rows[inside], counts[inside])
        progress.advance(len(rows))


def _write_shuffled(
    writer: ShardWriter,
    bucket: _Bucket,
    samples: np.ndarray,
    width: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Writes a bucket in random order; returns the positions of its samples in this order."""
    rows, counts = bucket.read(width)
    order = rng.permutation(len(rows))
    size = 8 * rows_per_group(width)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        writer.write(samples[rows[part]], counts[part])
    return rows[order]
