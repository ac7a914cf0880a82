"""Writes counts in random order with bounded memory.

Samples go to random buckets on disk first; then each bucket is shuffled in memory.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.gem.common.progress import Progress
from pipeline.gem.data.cohort import StoredFile
from pipeline.gem.data.shards import ShardWriter, read_shard
from pipeline.gem.data.sources import Source, checked_chunks

SHUFFLE_VALUES = 2**27  # counts shuffled in memory at a time: 512 MB


class RoleSamples(NamedTuple):
    """The samples of one role (train, validation or test)."""

    rows: np.ndarray  # positions in the source's samples
    dtype: np.dtype  # integer type of their counts


def write_shuffled_shards(
    source: Source,
    where: str,
    genes: np.ndarray,
    roles: dict[str, RoleSamples],
    seed: int,
    folder: Path,
) -> dict[str, dict[str, dict]]:
    """Writes the counts of `genes` (G,) bool in shards by role; returns the manifest's entries."""
    rng, width = np.random.default_rng(seed), int(genes.sum())
    bucket_of = np.full(len(source.samples), -1)
    buckets: list[ShardWriter] = []
    buckets_of: dict[str, list[ShardWriter]] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".shuffle-") as scratch:
        for role, (rows, dtype) in roles.items():
            number = -(-len(rows) * width // SHUFFLE_VALUES)
            bucket_of[rows] = len(buckets) + rng.integers(0, max(number, 1), len(rows))
            folders = [Path(scratch) / f"{role}-{index}" for index in range(number)]
            buckets_of[role] = [ShardWriter(path, "bucket", dtype) for path in folders]
            buckets += buckets_of[role]
        _fill_buckets(source, where, genes, bucket_of, buckets)
        shards = {}
        for role, (_, dtype) in roles.items():
            with ShardWriter(folder, role, dtype) as writer:
                for bucket in buckets_of[role]:
                    if bucket.paths:  # a bucket may be empty by chance
                        writer.write(*_shuffled(bucket.paths, width, rng))
            shards[role] = {f"counts/{path.name}": StoredFile.of(path) for path in writer.paths}
    return shards


def _fill_buckets(
    source: Source, where: str, genes: np.ndarray, bucket_of: np.ndarray, buckets: list[ShardWriter]
) -> None:
    """Writes each sample to its bucket (N,), -1 for none."""
    samples = source.samples["sample_id"].to_numpy()
    progress = Progress("prepare: writing", len(samples), "samples")
    for rows, counts in checked_chunks(source, where):
        counts = counts[:, genes]
        for bucket in np.unique(bucket_of[rows[bucket_of[rows] >= 0]]):
            inside = bucket_of[rows] == bucket
            buckets[bucket].write(samples[rows[inside]], counts[inside])
        progress.advance(len(rows))
    for bucket in buckets:
        bucket.close()


def _shuffled(
    paths: list[Path], width: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(names (N,), counts (N, G)) of a bucket in random order."""
    parts = zip(*(part for path in paths for part in read_shard(path, width)), strict=True)
    names, counts = (np.concatenate(part) for part in parts)
    order = rng.permutation(len(names))
    return names[order], counts[order]
