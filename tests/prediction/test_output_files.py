"""Output files: Parquet with lists and AnnData, written in blocks."""

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.gem.common.errors import InputError
from pipeline.gem.common.progress import Progress
from pipeline.gem.prediction.output_files import write_blocks
from pipeline.gem.prediction.predictor import PredictedBlock

GENES = np.array(["g1", "g2", "g3", "g4"], dtype=object)
PROVENANCE = {"mode": "mean", "seed": 3, "control": "none"}
COLUMNS = {
    "text": ["a", None, "b", "c", "a", None],
    "number": [1, 2, 3, 4, None, 6],
    "flag": [True, False, None, True, True, False],
    "category": pa.array(["x", "y", "x", "x", "z", "x"]).dictionary_encode(),
    "date": pa.array([0, 1, 2, 3, 4, None], pa.date32()),
    "a/b": [0.5, 1.5, 2.5, 3.5, 4.5, 5.5],
    "empty": pa.nulls(6),
}


def blocks(mean_count: float) -> list[PredictedBlock]:
    """Three blocks of two rows."""
    rng, table = np.random.default_rng(0), pa.table(COLUMNS)
    counts = rng.poisson(mean_count, (6, 4)).astype(np.int32)
    latents = rng.normal(size=(6, 3)).astype(np.float32)
    parts = [slice(start, start + 2) for start in (0, 2, 4)]
    return [
        PredictedBlock(
            np.arange(6)[part],
            table.slice(part.start, 2),
            counts[part],
            {"biological": latents[part]},
            {"low": counts[part] // 2, "high": counts[part] * 2},
        )
        for part in parts
    ]


def write(path, parts) -> None:
    write_blocks(path, GENES, PROVENANCE, parts, Progress("test", 6, "rows"))


def stacked(parts: list[PredictedBlock]) -> dict[str, np.ndarray]:
    return {
        "counts": np.concatenate([part.counts for part in parts]),
        "latent_biological": np.concatenate([part.latents["biological"] for part in parts]),
        "low": np.concatenate([part.interval["low"] for part in parts]),
        "high": np.concatenate([part.interval["high"] for part in parts]),
    }


def test_a_parquet_table_has_the_columns_then_lists_and_names_its_genes(tmp_path):
    write(tmp_path / "x.parquet", blocks(50))
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == [*COLUMNS, "latent_biological", "counts", "low", "high"]
    assert table.select(list(COLUMNS)).to_pylist() == pa.table(COLUMNS).to_pylist()
    for name, expected in stacked(blocks(50)).items():
        np.testing.assert_array_equal(np.stack(table[name].to_pandas()), expected)
    assert table.schema.metadata[b"gem.seed"] == b"3"
    assert pd.read_parquet(tmp_path / "x.genes.parquet")["gene_id"].tolist() == list(GENES)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("mean_count", "sparse"), [(50, False), (0.1, True)])
def test_an_h5ad_is_valid_anndata_with_the_same_numbers(tmp_path, mean_count, sparse):
    write(tmp_path / "x.h5ad", blocks(mean_count))
    read, expected = anndata.read_h5ad(tmp_path / "x.h5ad"), stacked(blocks(mean_count))
    assert hasattr(read.X, "toarray") == sparse and np.issubdtype(read.X.dtype, np.integer)
    arrays = {"counts": read.X, "low": read.layers["low"], "high": read.layers["high"]}
    for name, values in arrays.items():
        dense = values.toarray() if hasattr(values, "toarray") else values
        np.testing.assert_array_equal(dense, expected[name])
    np.testing.assert_array_equal(read.obsm["latent_biological"], expected["latent_biological"])
    assert read.var_names.tolist() == list(GENES)
    assert read.obs_names.tolist() == [str(row) for row in range(6)]
    assert dict(read.uns["gem"]) == PROVENANCE


def test_columns_in_obs_are_numbers_booleans_or_categories(tmp_path):
    write(tmp_path / "x.h5ad", blocks(50))
    obs = anndata.read_h5ad(tmp_path / "x.h5ad").obs
    assert list(obs) == [name.replace("/", "_") for name in COLUMNS]
    kinds = {name: obs[name].dtype.name for name in ("text", "number", "flag", "category", "date")}
    assert kinds == {
        "text": "category",
        "number": "float64",
        "flag": "boolean",
        "category": "category",
        "date": "category",
    }
    for name in ("text", "number", "flag"):
        values = obs[name].astype(object).where(obs[name].notna(), None).tolist()
        assert values == COLUMNS[name]
    assert obs["category"].tolist() == ["x", "y", "x", "x", "z", "x"]
    assert obs["date"].tolist()[:2] == ["1970-01-01", "1970-01-02"]
    assert obs["empty"].isna().all()


@pytest.mark.parametrize("name", ["x.parquet", "x.h5ad"])
def test_a_failure_leaves_no_file_and_keeps_the_last_complete_one(tmp_path, name):
    def failing():
        yield from blocks(50)[:2]
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write(tmp_path / name, failing())
    assert not list(tmp_path.iterdir())
    write(tmp_path / name, blocks(50))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="full"):
        write(tmp_path / name, failing())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"neither \.parquet nor \.h5ad"):
        write(tmp_path / "x.csv", blocks(50))
