"""The synthetic source on disk: complete, reproducible, and written in the memory of a chunk."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT

from pipeline import synthesize
from pipeline.gem.common.config import read_params
from pipeline.gem.data.shards import read_shard
from pipeline.gem.simulation.generator import Truth


def counts_of(folder, genes: int) -> tuple[list[str], np.ndarray]:
    pieces = [
        piece
        for path in sorted((folder / "counts").glob("*.parquet"))
        for piece in read_shard(path, genes)
    ]
    return [name for names, _ in pieces for name in names], np.concatenate(
        [counts for _, counts in pieces]
    )


def test_the_source_has_every_part_of_the_contract(params, source_folder):
    samples = pd.read_parquet(source_folder / "samples.parquet")
    genes = pd.read_parquet(source_folder / "genes.parquet")
    names, counts = counts_of(source_folder, len(genes))
    assert samples.columns[0] == "sample_id"
    assert names == samples["sample_id"].tolist()
    assert counts.shape == (params.synthesize.samples, params.synthesize.genes)
    truth = Truth.load(source_folder / "truth")
    assert truth.gene_id.tolist() == genes["gene_id"].tolist()
    hidden = pd.read_parquet(source_folder / "truth" / "samples.parquet")
    assert hidden["sample_id"].equals(samples["sample_id"])
    # Counts add up to the library size that was asked for, but for their own dispersion.
    assert abs(counts.sum(axis=1) / hidden["library_size"] - 1).median() < 0.1


def test_what_is_public_of_a_perturbation_is_a_table(source_folder):
    truth = Truth.load(source_folder / "truth")
    features = pd.read_parquet(source_folder / "embeddings" / "perturbation.parquet")
    assert features["perturbation"].tolist() == truth.perturbations[1:]
    np.testing.assert_array_equal(
        features.drop(columns="perturbation").to_numpy(), truth.embedding[1:]
    )
    targets = pd.read_parquet(source_folder / "targets.parquet")
    kinds = dict(zip(truth.perturbations, truth.perturbation_type, strict=True))
    assert set(targets["perturbation"]) == {
        name for name, kind in kinds.items() if kind in ("crispri", "overexpression")
    }
    assert set(targets["gene_id"]) <= set(truth.gene_id)


def test_the_same_seed_gives_the_same_bytes(params, source_folder, tmp_path):
    synthesize.write_source(params.synthesize, tmp_path / "again")
    for path in sorted(source_folder.rglob("*.parquet")):
        assert (
            path.read_bytes() == (tmp_path / "again" / path.relative_to(source_folder)).read_bytes()
        ), path.name


def test_memory_does_not_grow_with_the_counts(params, tmp_path, monkeypatch):
    """Four times the samples: the counts alone would need 9.6 MB more, the table of samples needs little."""
    monkeypatch.setattr(synthesize, "CHUNK_VALUES", 2**16)

    def peak(samples: int) -> int:
        tracemalloc.start()
        settings = params.synthesize.model_copy(update={"samples": samples, "genes": 500})
        synthesize.write_source(settings, tmp_path / str(samples))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(3200) - peak(800) < 0.4 * (3200 - 800) * 500 * 8


def test_the_default_cohort_has_the_size_and_the_gaps_that_it_promises():
    params = read_params(ROOT / "params.yaml").synthesize
    rng = np.random.default_rng(params.seed)
    truth = synthesize.draw_truth(params, rng)
    samples = synthesize.draw_design(params, truth, rng).samples
    assert len(samples) == params.samples == 12000
    assert samples["sex"].isna().mean() == np.clip(samples["sex"].isna().mean(), 0.18, 0.22)
    assert samples["age_years"].isna().mean() == np.clip(
        samples["age_years"].isna().mean(), 0.2, 0.3
    )
    assert samples.groupby("study")["tissue"].nunique().max() < params.tissues, (
        "studies and tissues are confounded"
    )
    treated = samples[samples["perturbation"] != "control"]
    conditions = treated.groupby(
        ["study", "tissue", "cell_type", "perturbation", "perturbation_dose", "perturbation_time"],
        dropna=False,
    ).size()
    assert conditions.min() >= 3, "every condition has replicates"


@pytest.mark.parametrize("depth", [2_000, 5_000_000])
def test_the_declared_depth_is_the_count_of_a_typical_sample(params, tmp_path, depth):
    settings = params.synthesize.model_copy(update={"samples": 300, "depth": depth})
    synthesize.write_source(settings, tmp_path / "source")
    _, counts = counts_of(tmp_path / "source", settings.genes)
    assert np.median(counts.sum(axis=1)) == pytest.approx(depth, rel=0.15)
