"""The synthetic source on disk: complete, reproducible, written in the memory of a chunk."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.data.shards import read_shard
from pipeline.gem.simulation import write
from pipeline.gem.simulation.truth import Truth
from pipeline.gem.simulation.write import write_source


def read_counts(folder, genes: int) -> tuple[np.ndarray, np.ndarray]:
    """(names (N,), counts (N, G))"""
    paths = sorted((folder / "counts").glob("*.parquet"))
    batches = zip(*(batch for path in paths for batch in read_shard(path, genes)), strict=True)
    names, counts = (np.concatenate(batch) for batch in batches)
    return names, counts


def test_the_source_has_every_part_of_the_contract(params, source_folder):
    samples = pd.read_parquet(source_folder / "samples.parquet")
    genes = pd.read_parquet(source_folder / "genes.parquet")
    names, counts = read_counts(source_folder, len(genes))
    assert samples.columns[0] == "sample_id"
    assert names.tolist() == samples["sample_id"].tolist()
    assert counts.shape == (params.synthesize.samples, params.synthesize.genes)
    truth = Truth.load(source_folder / "truth")
    assert truth.gene_id.tolist() == genes["gene_id"].tolist()
    hidden = pd.read_parquet(source_folder / "truth" / "samples.parquet")
    assert hidden["sample_id"].equals(samples["sample_id"])
    # Total counts are the library size up to their dispersion.
    assert abs(counts.sum(axis=1) / hidden["library_size"] - 1).median() < 0.1


def test_features_and_target_genes_of_perturbations_are_tables(source_folder):
    truth = Truth.load(source_folder / "truth")
    features = pd.read_parquet(source_folder / "embeddings" / "perturbation.parquet")
    assert features["perturbation"].tolist() == truth.perturbations[1:]
    values = features.drop(columns="perturbation").to_numpy()
    np.testing.assert_array_equal(values, truth.embedding[1:])
    targets = pd.read_parquet(source_folder / "targets.parquet")
    kinds = dict(zip(truth.perturbations, truth.perturbation_type, strict=True))
    genetic = {name for name, kind in kinds.items() if kind in ("crispri", "overexpression")}
    assert set(targets["perturbation"]) == genetic
    assert set(targets["gene_id"]) <= set(truth.gene_id)


def test_the_same_seed_gives_the_same_bytes(params, source_folder, tmp_path):
    write_source(params.synthesize, tmp_path)
    for path in sorted(source_folder.rglob("*.parquet")):
        again = tmp_path / path.relative_to(source_folder)
        assert path.read_bytes() == again.read_bytes(), path.name


def test_the_subpopulation_of_a_cell_is_with_the_truth(params, tmp_path):
    settings = params.synthesize.model_copy(update={"preset": "single_cell", "subpopulations": 3})
    write_source(settings, tmp_path)
    hidden = pd.read_parquet(tmp_path / "truth" / "samples.parquet")
    assert set(hidden["subpopulation"]) == {0, 1, 2}
    assert "subpopulation" not in pd.read_parquet(tmp_path / "samples.parquet")


def test_memory_does_not_grow_with_the_counts(params, tmp_path, monkeypatch):
    """For four times the samples, the counts alone would need 9.6 MB more."""
    monkeypatch.setattr(write, "CHUNK_VALUES", 2**16)

    def peak(samples: int) -> int:
        settings = params.synthesize.model_copy(update={"samples": samples, "genes": 500})
        tracemalloc.start()
        write_source(settings, tmp_path / str(samples))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(3200) - peak(800) < 0.4 * (3200 - 800) * 500 * 8


@pytest.mark.parametrize("depth", [2_000, 5_000_000])
def test_the_declared_depth_is_the_total_count_of_a_typical_sample(params, tmp_path, depth):
    settings = params.synthesize.model_copy(update={"samples": 300, "depth": depth})
    write_source(settings, tmp_path)
    _, counts = read_counts(tmp_path, settings.genes)
    assert np.median(counts.sum(axis=1)) == pytest.approx(depth, rel=0.15)
