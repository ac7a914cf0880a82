"""Registered models predict the same numbers without this repository, and follow its code."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from support.processes import TrackingServer, free_port, is_up, until
from support.repository import Repository
from support.settings import ROOT, TINY

from pipeline.gem import GEM
from pipeline.gem.tracking import mlflow_client
from pipeline.gem.tracking.model_registry import CHAMPION, NAME, register_models

URI = f"models:/{NAME}@{CHAMPION}"
SAMPLED = {"mode": "sample", "draws": 2, "total_count": 5000, "seed": 7}
LOAD_AND_PREDICT = f"""
import mlflow, pandas, sys
model, query = mlflow.pyfunc.load_model("{URI}"), pandas.read_parquet("query.parquet")
model.predict(query, params={SAMPLED}).to_parquet("predictions.parquet")
print(sys.modules["pipeline"].__file__)
"""


def test_a_change_of_the_prediction_code_makes_a_new_version_the_champion(
    cohort, model_directory, migrated_store, tmp_path
):
    repository = Repository(tmp_path / "repository", TINY)
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    shutil.copytree(model_directory, repository.folder / "experiments/default")
    client = mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")
    outputs, champions = [], []
    code = repository.folder / "pipeline/gem/prediction/api.py"
    original = code.read_bytes()
    # A forked stage has imported the original code.
    for content, register in (
        (original, repository.stage),
        (original + b"\nCHANGED = True\n", repository.python),
        (original, repository.stage),
    ):
        code.write_bytes(content)
        register("pipeline.register")
        outputs.append((repository.folder / "experiments/registered.json").read_bytes())
        champions.append(int(client.get_model_version_by_alias(NAME, CHAMPION).version))
    assert champions == [1, 2, 1]
    assert outputs[0] == outputs[2] != outputs[1]
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 2
    folder = repository.folder / "package"
    uri = client.get_model_version_download_uri(NAME, "2")
    mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))
    (packed,) = folder.rglob("pipeline/gem/prediction/api.py")
    assert packed.read_bytes() == original + b"\nCHANGED = True\n"


def test_a_moved_project_serves_its_champion_and_registers_what_it_lost(
    cohort, model_directory, migrated_store, tmp_path, monkeypatch
):
    repository = Repository(tmp_path / "old", TINY)
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    shutil.copytree(model_directory, repository.folder / "experiments/default")
    repository.stage("pipeline.register")
    old, repository.folder = repository.folder, tmp_path / "new ü'"
    old.rename(repository.folder)
    output = repository.stage("pipeline.register")
    assert f"mlflow.db was made in {old}; its paths of artifacts are corrected" in output
    assert "all models registered" in output and "registered as" not in output
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which MLflow adds the packed code
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{repository.folder}/mlflow.db")
    mlflow.pyfunc.load_model(URI)
    mlflow.set_tracking_uri(before)
    (model,) = repository.folder.glob("mlruns/*/models/*/artifacts/data/model.safetensors")
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    for expected in ("registered as version 2", "champion is version 2", "champion is version 2"):
        output = repository.stage("pipeline.register")
        assert expected in output
    assert "not those that were registered" not in output
    assert not old.exists()


def outside(server: TrackingServer) -> dict[str, str]:
    """An environment without this repository."""
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin:/bin",
        "HOME": os.environ["HOME"],
        "MLFLOW_TRACKING_URI": server.address,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def registered(server, model_directory, tmp_path_factory) -> TrackingServer:
    """The tracking server with a registered model."""
    folder, before = tmp_path_factory.mktemp("registered"), mlflow.get_tracking_uri()
    shutil.copytree(model_directory, folder / "experiments" / "default")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("MLFLOW_TRACKING_URI", server.address)
        mlflow_client.connect("gem")
        register_models(Path("experiments"))
    mlflow.set_tracking_uri(before)
    return server


@contextmanager
def model_server(folder: Path, server: TrackingServer) -> Iterator[str]:
    """The address of `mlflow models serve`, which runs in `folder`."""
    port = free_port()
    options = ["--model-uri", URI, "--env-manager", "local", "--workers", "1"]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "mlflow", "models", "serve", *options, *address]
    with open(folder / "log", "w") as log:
        streams = {"stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(command, cwd=folder, env=outside(server), **streams)
    try:
        url = f"http://127.0.0.1:{port}"
        assert until(lambda: is_up(f"{url}/ping") or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def python(registered, cohort, tmp_path_factory) -> tuple[subprocess.Popen, Path]:
    """Python outside of this repository that predicts query.parquet; runs beside the server."""
    folder = tmp_path_factory.mktemp("python")
    query_of(cohort).to_parquet(folder / "query.parquet")
    command, pipe = [sys.executable, "-c", LOAD_AND_PREDICT], subprocess.PIPE
    environment = outside(registered)
    streams = {"stdout": pipe, "stderr": pipe, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **streams), folder


@pytest.fixture(scope="module")
def address(registered, python, tmp_path_factory) -> Iterator[str]:
    with model_server(tmp_path_factory.mktemp("serve"), registered) as url:
        yield url


@pytest.fixture(scope="module")
def gem(model_directory) -> GEM:
    return GEM.load(model_directory)


def query_of(cohort) -> pd.DataFrame:
    """Some of the columns, with missing values, numbers and units."""
    biological = ["study", "tissue", "age_years"]
    perturbation = ["perturbation", "perturbation_dose", "perturbation_time"]
    samples = cohort.rows(["test_random"])[biological + perturbation]
    texts = samples.select_dtypes("category").columns
    return samples.head(6).reset_index(drop=True).astype(dict.fromkeys(texts, object))


def post(address: str, query: pd.DataFrame, params: dict) -> tuple[int, dict]:
    cells = query.astype(object).where(query.notna(), None)
    body = json.dumps({"dataframe_split": cells.to_dict("split"), "params": params}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/invocations", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    "options",
    [{}, {"interval": True, "latents": True}, SAMPLED, SAMPLED | {"deterministic_latents": True}],
)
def test_a_server_returns_the_numbers_of_the_python_api(address, gem, cohort, options):
    query = query_of(cohort)
    status, response = post(address, query, options)
    assert status == 200, response
    expected, predictions = gem.predict(query, **options), pd.DataFrame(response["predictions"])
    assert set(predictions) == set(expected)
    for name in ("extrapolated", *gem.genes):
        np.testing.assert_array_equal(predictions[name], expected[name])
    missing = expected["perturbation_dose"].isna().tolist()
    assert predictions["perturbation_dose"].isna().tolist() == missing


def test_a_server_accepts_reference_counts(address, gem, cohort):
    query = query_of(cohort)
    counts = cohort.counts(["test_control"])[: len(query)]
    with_reference = query.assign(reference_counts=counts.tolist())
    status, response = post(address, with_reference, {"conditioning": ["biological"]})
    assert status == 200, response
    rows = [str(row) for row in range(len(query))]
    expected = gem.predict(
        query.assign(reference_id=rows),
        reference=pd.DataFrame(counts, columns=gem.genes, index=rows),
        conditioning=("biological",),
    )
    predictions = pd.DataFrame(response["predictions"])[gem.genes]
    np.testing.assert_array_equal(predictions, expected[gem.genes])
    assert not np.array_equal(predictions, gem.predict(query)[gem.genes])


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"tissue": "tissue_l"}, {}, "did you mean tissue_"),
        ({}, {"mode": "sampel"}, "mode: 'sampel' is unknown; did you mean"),
        ({"reference_counts": [[1, 2]]}, {}, "reference_counts, rows 0: expected a list of"),
    ],
)
def test_a_server_explains_an_invalid_query_without_a_traceback(
    address, cohort, columns, options, message
):
    status, response = post(address, query_of(cohort).head(1).assign(**columns), options)
    assert status == 400
    assert message in response["message"]
    assert "stack_trace" not in response


def test_a_model_loaded_by_its_alias_predicts_without_this_repository(python, gem):
    process, folder = python
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "code/pipeline" in output and str(ROOT) not in output
    query = pd.read_parquet(folder / "query.parquet")
    predictions = pd.read_parquet(folder / "predictions.parquet")
    pd.testing.assert_frame_equal(predictions, gem.predict(query, **SAMPLED))
