"""Parquet shards of counts."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.gem.common.errors import IntegrityError
from pipeline.gem.data import shards
from pipeline.gem.data.shards import ShardWriter, read_shard


def write(folder, counts: np.ndarray) -> None:
    with ShardWriter(folder, "x", np.dtype(np.uint8)) as writer:
        writer.write(np.array([f"s{number}" for number in range(len(counts))]), counts)


def test_a_shard_is_read_one_row_group_at_a_time(tmp_path):
    write(tmp_path, np.ones((2500, 3)))
    assert pq.ParquetFile(tmp_path / "x-00000.parquet").num_row_groups == 3
    lengths = [len(names) for names, _ in read_shard(tmp_path / "x-00000.parquet", 3)]
    assert lengths == [1024, 1024, 452]


def test_a_large_row_group_is_read_in_bounded_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP", 10**6)
    counts = np.arange(150).reshape(50, 3)
    write(tmp_path, counts)
    monkeypatch.setattr(shards, "BATCH_VALUES", 60)
    blocks = list(read_shard(tmp_path / "x-00000.parquet", 3))
    assert pq.ParquetFile(tmp_path / "x-00000.parquet").num_row_groups == 1
    assert [len(names) for names, _ in blocks] == [20, 20, 10]
    assert np.array_equal(np.concatenate([block for _, block in blocks]), counts)


def test_a_shard_with_another_number_of_genes_is_an_error_with_its_row(tmp_path):
    write(tmp_path, np.ones((2, 3)))
    message = r"x-00000\.parquet: row 0 has 3 counts; expected one for each of 4 genes"
    with pytest.raises(IntegrityError, match=message):
        list(read_shard(tmp_path / "x-00000.parquet", 4))
