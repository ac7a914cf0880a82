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


def _link(target: Path, path: Path) -> Path:
    path.symlink_to(target)
    return path


def _hard_link(target: Path, path: Path) -> Path:
    path.hardlink_to(target)
    return path


# What --output names, in a folder with q.genes.parquet, ref.parquet and the model directory m.
OUTPUTS = {
    "the query": lambda folder: folder / "q.genes.parquet",
    "the query by its genes": lambda folder: folder / "q.parquet",
    "by dots": lambda folder: folder / "m" / ".." / "q.genes.parquet",
    "by a relative path": lambda folder: Path(os.path.relpath(folder / "q.genes.parquet")),
    "by a link": lambda folder: _link(folder / "q.genes.parquet", folder / "l.parquet"),
    "by a hard link": lambda folder: _hard_link(folder / "q.genes.parquet", folder / "h.parquet"),
    "by a linked folder": lambda folder: _link(folder, folder / "other") / "q.genes.parquet",
    "the reference": lambda folder: folder / "ref.parquet",
    "into the model": lambda folder: folder / "m" / "new" / "out.h5ad",
    "into the model by a link": lambda folder: _link(folder / "m", folder / "lm") / "out.h5ad",
    "a seed by a link": lambda folder: _link(folder / "m/seeds/2.safetensors", folder / "l.h5ad"),
    "a seed by a hard link": lambda folder: _hard_link(
        folder / "m/seeds/2.safetensors", folder / "h.h5ad"
    ),
    "a folder": lambda folder: folder / "d.parquet",
}


@pytest.mark.parametrize("model", ["m", "m/model.safetensors"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_output_replaces_nothing_that_is_read(
    run_predict, tmp_path, model_directory, output, model
):
    shutil.copytree(model_directory, tmp_path / "m")
    for name in ("q.genes.parquet", "ref.parquet"):
        (tmp_path / name).write_bytes(b"content")
    (tmp_path / "d.parquet").mkdir()
    path = OUTPUTS[output](tmp_path)
    before = {file: file.stat() for file in sorted(tmp_path.rglob("*"))}
    files = ["--query", tmp_path / "q.genes.parquet", "--reference", tmp_path / "ref.parquet"]
    with pytest.raises(InputError, match=r"--output: .* (would replace|is inside|is a folder)"):
        run_predict("--model", tmp_path / model, *files, "--output", path)
    assert before == {file: file.stat() for file in sorted(tmp_path.rglob("*"))}


def test_the_output_may_replace_an_earlier_one_and_never_the_target_of_a_link(
    run_predict, tmp_path, query_file
):
    (tmp_path / "mine").write_bytes(b"mine")
    output = _link(tmp_path / "mine", tmp_path / "out.parquet")
    for _ in range(2):
        run_predict("--query", query_file, "--output", output)
        assert len(pd.read_parquet(output)) == 40 and not output.is_symlink()
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_any_name_of_a_column_is_written_to_h5ad(run_predict, tmp_path, query):
    names = ["a/b", "a_b", ".", "_", "µ %", "index", "cell.line"]
    query.head(2).assign(**dict.fromkeys(names, "x")).to_csv(tmp_path / "query.csv", index=False)
    run_predict("--query", tmp_path / "query.csv", "--output", tmp_path / "out.h5ad")
    obs = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert {"a_b", "a_b_", "_", "__", "µ %", "index", "cell.line"} < set(obs)


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
