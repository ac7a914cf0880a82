"""The verb predict: files and options in, files out."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from support.generation import counts_from_log_cpm
from support.settings import ROOT

from pipeline.gem import GEM
from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.data.expression import log_cpm


@pytest.fixture
def query_file(tmp_path, query) -> Path:
    query.to_parquet(tmp_path / "query.parquet", index=False)
    return tmp_path / "query.parquet"


@pytest.fixture
def reference_file(tmp_path, reference) -> Path:
    reference.reset_index().to_parquet(tmp_path / "reference.parquet", index=False)
    return tmp_path / "reference.parquet"


def test_parquet_output_has_the_query_and_the_counts_of_the_api(
    run_predict, tmp_path, query_file, query, gem
):
    run_predict("--query", query_file, "--output", tmp_path / "out.parquet")
    output = pd.read_parquet(tmp_path / "out.parquet")
    assert list(output.columns) == [*query.columns, "extrapolated", "counts"]
    pd.testing.assert_frame_equal(output[query.columns], query)
    np.testing.assert_array_equal(np.stack(output["counts"]), gem.predict(query)[gem.genes])
    assert pd.read_parquet(tmp_path / "out.genes.parquet")["gene_id"].tolist() == list(gem.genes)


def test_h5ad_output_has_the_same_counts_latents_and_interval(
    run_predict, tmp_path, query_file, query, gem
):
    run_predict("--query", query_file, "--output", tmp_path / "out.h5ad", "--latents", "--interval")
    output = anndata.read_h5ad(tmp_path / "out.h5ad")
    expected = gem.predict(query, latents=True, interval=True)
    np.testing.assert_array_equal(output.X, expected[gem.genes])
    for group in gem.network.slices():
        latents = np.stack(expected[f"latent_{group}"])
        np.testing.assert_array_equal(output.obsm[f"latent_{group}"], latents)
    np.testing.assert_array_equal(output.layers["low"], np.stack(expected["low"]))
    assert output.obs["extrapolated"].dtype == bool
    provenance = output.uns["gem"]
    assert (provenance["control_column"], provenance["control"]) == ("perturbation", "control")


def test_options_of_draws_and_references_reach_the_predictor(
    run_predict, tmp_path, query, reference, reference_file, gem
):
    named = query.head(3).assign(reference_id=reference.index[[2, 0, 2]])
    named.to_csv(tmp_path / "query.csv", index=False)
    files = ["--query", tmp_path / "query.csv", "--reference", reference_file]
    options = ["--mode", "sample", "--draws", 4, "--seed", 7, "--total-count", 5000]
    options += ["--conditioning", "biological", "--unknown", "missing", "--deterministic-latents"]
    run_predict(*files, *options, "--output", tmp_path / "out.parquet")
    output = pd.read_parquet(tmp_path / "out.parquet")
    expected = gem.predict(
        named,
        reference=reference,
        mode="sample",
        draws=4,
        seed=7,
        total_count=5000,
        conditioning=("biological",),
        unknown="missing",
        deterministic_latents=True,
    )
    np.testing.assert_array_equal(np.stack(output["counts"]), expected[gem.genes])
    assert output["draw"].tolist() == expected["draw"].tolist() == [1, 2, 3, 4] * 3


def test_reconstruct_decodes_and_classifies_the_reference(
    run_predict, tmp_path, reference, reference_file, gem
):
    files = ["--reference", reference_file, "--output", tmp_path / "out.parquet"]
    run_predict("--reconstruct", *files)
    output = pd.read_parquet(tmp_path / "out.parquet")
    assert output["sample_id"].tolist() == reference.index.tolist()
    expression = log_cpm(reference.to_numpy(), reference.sum(axis=1).to_numpy())
    decoded = gem.network.decode(gem.posterior(expression).mean).detach().numpy()
    expected = counts_from_log_cpm(decoded, np.full(len(output), 10**6))
    np.testing.assert_allclose(np.stack(output["counts"]), expected, rtol=1e-4, atol=2)
    labels = gem.classify(reference)
    for name in labels:
        np.testing.assert_array_equal(output[name], labels[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "out.csv", "--query", "q.csv"], "neither .parquet nor .h5ad"),
        (["--output", "out.h5ad"], "--query is needed"),
        (["--output", "out.h5ad", "--reconstruct"], "needs the samples of --reference"),
        (
            ["--output", "out.h5ad", "--reconstruct", "--reference", "x.h5ad", "--ensemble"],
            "no latents in common",
        ),
        (
            ["--output", "out.h5ad", "--reconstruct", "--reference", "x.h5ad", "--query", "q.csv"],
            "takes no --query",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(run_predict, options, message):
    with pytest.raises(InputError, match=message):
        run_predict(*options)


@pytest.mark.integration
def test_an_invalid_query_exits_with_2_and_leaves_no_file(tmp_path, model_directory, query):
    bad = query.head(4).astype(object)
    bad.loc[2, "tissue"], bad.loc[1, "perturbation_dose"] = "tissue_11", "3 parsecs"
    bad.to_csv(tmp_path / "query.csv", index=False)
    command = [sys.executable, "-m", "pipeline.predict", "--model", model_directory]
    command += ["--query", tmp_path / "query.csv", "--output", tmp_path / "out.parquet"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tissue, row 2: 'tissue_11' was never seen in training" in done.stderr
    assert "perturbation_dose, row 1: '3 parsecs'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["query.csv"]


def test_an_ensemble_needs_models_with_the_same_genes(
    run_predict, tmp_path, model_directory, query_file, gem
):
    mixed = tmp_path / "mixed"
    shutil.copytree(model_directory, mixed)
    options = ["--model", mixed, "--query", query_file, "--output", tmp_path / "out.h5ad"]
    run_predict(*options, "--ensemble")
    assert anndata.read_h5ad(tmp_path / "out.h5ad").uns["gem"]["ensemble"] == 1
    other = replace(gem, genes=np.array([*gem.genes[1:], "other"]))
    other.save(mixed / "seeds" / "2.safetensors")
    with pytest.raises(IntegrityError, match=r"seeds/2.safetensors: .*1 missing"):
        GEM.load_seeds(mixed)
