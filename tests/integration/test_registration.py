"""Registered models: who is champion, and that what is registered predicts the same numbers where this repository is not."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from support.settings import ROOT

from pipeline.gem.common.code_version import import_closure, imported
from pipeline.gem.common.files import sha256
from pipeline.gem.tracking import mlflow_client, model_registry, registry, runs
from pipeline.gem.tracking.model_registry import (
    CHAMPION,
    NAME,
    PENDING,
    VALUE_TAG,
    champion,
    register,
    register_pending,
    said,
)
from pipeline.gem.tracking.registry import Version
from pipeline.gem.tracking.runs import MODEL_TAG
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.model_directory import write_model_directory
from pipeline.gem.training.trainer import fit

SAMPLED = {"mode": "sample", "samples": 2, "total_count": 5000, "seed": 7}
LOADING = f"""
import mlflow, pandas, sys
said = mlflow.pyfunc.load_model("models:/{NAME}@{CHAMPION}").predict(pandas.read_parquet("query.parquet"), params={SAMPLED})
said.to_parquet("said.parquet")
print(sys.modules["pipeline"].__file__)
"""


@pytest.fixture(scope="module")
def fits(cohort, params) -> dict:
    data = TrainingData.load(cohort, torch.device("cpu"))
    return {
        seed: fit(data, params.override({"train.epochs": epochs}), seed)
        for seed, epochs in ((1, 2), (2, 4))
    }


@pytest.fixture
def local(tmp_path, monkeypatch, migrated_store) -> Iterator[Path]:
    """A working directory with a store of its own."""
    before = mlflow.get_tracking_uri()
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow_client.connect("gem")
    yield tmp_path
    mlflow.set_tracking_uri(before)


def registered(fit, params, cohort, name: str = "default") -> Path:
    """The model directory of a fit, trained and registered as by a stage."""
    directory = Path("experiments") / name
    write_model_directory(directory, [fit], params)
    with runs.run(name, "train") as run:
        register(directory, fit, params, cohort, name, run.id)
    return directory


def version_of(
    number: int,
    value: float | None,
    data: str = "a",
    observation: str = "normal",
    draws: int = 16,
    model: int = 0,
) -> Version:
    tags = {
        MODEL_TAG: f"model {model or number}",
        "data.sha256": data,
        "model.observation": observation,
        "train.predictive_draws": str(draws),
        "selection_split": "validation_random",
    }
    return Version(number, tags | ({} if value is None else {VALUE_TAG: repr(value)}))


OLD = [version_of(1, -9.0), version_of(2, -8.0), version_of(3, -8.0)]


@pytest.mark.parametrize(
    ("made", "before", "best"),
    [
        (version_of(4, -7.0), 2, 4),  # better
        (version_of(4, -8.5), 2, 2),  # worse
        (version_of(4, -8.0), 2, 2),  # a tie stays
        (version_of(4, -8.0), 3, 3),
        (version_of(4, -9.5), None, 2),  # no champion yet: the best, of equals the oldest
        (version_of(4, -8.0, model=2), 2, 4),  # the champion itself, with newer code
        (version_of(4, -8.0, model=3), 2, 2),
        (version_of(4, -99.0, data="b"), 2, 4),  # values on other data do not compare
        (version_of(4, -99.0, observation="multinomial"), 2, 4),
        (version_of(4, -99.0, draws=4), 2, 4),
        (version_of(4, None, data="b"), 2, 4),  # nothing to judge by: the newest
    ],
)
def test_the_champion_is_the_best_of_what_compares_with_the_newest(made, before, best):
    current = None if before is None else OLD[before - 1]
    assert champion([*OLD, made], made, current).number == best


def test_training_on_earlier_data_again_brings_back_the_best_of_these():
    other = version_of(4, -1.0, data="b")
    assert champion([*OLD, other], OLD[0], other).number == 2


def test_what_happened_to_the_champion_is_said():
    assert "stays version 2 (-8.0 nats" in said(OLD[1], OLD[1])
    assert "now version 2 (-8.0 nats on validation_random; version 1 had -9.0)" in said(
        OLD[1], OLD[0]
    )
    assert "version 2 does not compare: other data, another observation model" in said(
        version_of(4, 1.0, "b", "multinomial"), OLD[1]
    )
    assert "the model of version 2 with newer code" in said(version_of(4, -8.0, model=2), OLD[1])
    assert "no validation split" in said(version_of(1, None), None)


def test_each_model_is_a_version_the_same_bytes_are_not_another_and_a_worse_one_leaves_the_champion(
    local, fits, params, cohort, capsys
):
    client = mlflow.MlflowClient()
    values = {seed: one.best.validation_predictive_log_likelihood for seed, one in fits.items()}
    assert values[2] > values[1]
    for seed, number, best in ((1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 2, 2)):
        directory = registered(fits[seed], params, cohort)
        assert len(registry.versions(NAME)) == number
        assert client.get_model_version_by_alias(NAME, CHAMPION).version == best
    assert f"{CHAMPION} stays version 2" in capsys.readouterr().out
    found = client.get_model_version_by_alias(NAME, CHAMPION)
    assert found.tags[MODEL_TAG] == sha256(directory / "model.pt")
    assert found.tags["data.sha256"] == cohort.train_validation_sha256
    assert float(found.tags[VALUE_TAG]) == values[2]
    assert mlflow.get_run(found.run_id).info.run_name == "default"


def test_the_same_model_with_newer_code_is_a_version_that_takes_its_place(
    local, fits, params, cohort, monkeypatch
):
    registered(fits[1], params, cohort)
    monkeypatch.setattr(model_registry, "requirements", lambda files: ["numpy==0.1"])
    registered(fits[1], params, cohort)
    versions = registry.versions(NAME)
    assert (
        len({one.tags[MODEL_TAG] for one in versions}) == 1
        and len({one.tags["code.sha256"] for one in versions}) == 2
    )
    assert registry.alias(NAME, CHAMPION) == 2


def test_a_version_holds_the_code_that_prediction_imports_and_pins_its_packages(
    local, fits, params, cohort
):
    registered(fits[1], params, cohort)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@{CHAMPION}"))
    code = sorted(
        path.relative_to(folder / "code").as_posix() for path in (folder / "code").rglob("*.py")
    )
    assert code == import_closure("pipeline.gem.prediction.mlflow_model")
    assert not [
        file for file in code if "pipeline/gem/" not in file and not file.endswith("__init__.py")
    ], "a verb is not for prediction"
    pinned = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    assert {"torch", "numpy", "pandas", "pyarrow", "pydantic", "scipy", "PyYAML", "mlflow"} <= set(
        pinned
    )
    assert pinned == {name: version(name).split("+")[0] for name in pinned}
    outside = (
        {name.split(".")[0] for file in code for name in imported(file)}
        - sys.stdlib_module_names
        - {"pipeline", "yaml"}
    )
    assert outside - set(pinned) == {"anndata", "h5py"}, (
        "only what no request can reach may stay behind: .h5ad files"
    )
    assert (folder / "data" / "model.pt").read_bytes() == Path(
        "experiments/default/model.pt"
    ).read_bytes()


def test_the_signature_has_optional_columns_and_the_parameters_of_prediction_and_the_example_fits_it(
    local, fits, params, cohort
):
    registered(fits[1], params, cohort)
    model = mlflow.models.get_model_info(f"models:/{NAME}@{CHAMPION}")
    columns, gem = model.signature.inputs.to_dict(), fits[1].gem
    assert [column["name"] for column in columns] == [
        *gem.metadata.names,
        "sample_id",
        "reference_counts",
    ]
    assert not any(column["required"] for column in columns)
    defaults = {one.name: one.default for one in model.signature.params}
    assert (
        defaults["mode"] == "mean"
        and defaults["total_count"] == 1_000_000
        and list(defaults["conditioning"]) == ["technical", "biological"]
    )
    assert [
        column["name"] for column in model.signature.outputs.to_dict() if column["required"]
    ] == ["extrapolated", *gem.genes]
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@{CHAMPION}"))
    example = json.loads(
        (folder / "serving_input_example.json").read_text(), parse_constant=pytest.fail
    )["dataframe_split"]
    frame = pd.DataFrame(example["data"], columns=example["columns"])
    assert len(frame) == 3
    assert len(gem.predict(frame)) == 3


def test_a_registry_that_does_not_answer_stops_nothing_says_so_and_is_made_up_for_once(
    local, fits, params, cohort, capsys, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    directory = Path("experiments/default")
    write_model_directory(directory, [fits[1]], params)
    with runs.run("default", "train") as run:
        mlflow.set_tracking_uri(f"http://127.0.0.1:{free_port()}")
        register(directory, fits[1], params, cohort, "default", run.id)
        mlflow.set_tracking_uri(f"sqlite:///{local}/mlflow.db")
    warned = capsys.readouterr().err
    assert "not registered as gem" in warned and "python -m pipeline.register" in warned
    assert len(list(PENDING.iterdir())) == 1
    registered(fits[2], params, cohort, "other")
    assert [one.tags["label"] for one in registry.versions(NAME)] == ["default", "other"]
    assert register_pending() and len(registry.versions(NAME)) == 2
    assert not list(PENDING.iterdir())


def test_a_model_that_was_trained_again_meanwhile_is_not_registered_as_what_it_was(
    local, fits, params, cohort, capsys, monkeypatch
):
    monkeypatch.setattr(model_registry, "register_pending", lambda: False)
    registered(fits[1], params, cohort)
    fits[2].gem.save(Path("experiments/default/model.pt"))
    assert register_pending()
    assert "has changed since" in capsys.readouterr().err
    assert registry.versions(NAME) == [] and not list(PENDING.iterdir())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def elsewhere(store: str) -> dict[str, str]:
    """An environment that knows nothing of this repository."""
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin:/bin",
        "HOME": os.environ["HOME"],
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def listening(folder: Path, store: str, health: str, *command: str) -> Iterator[str]:
    """The address of a server of mlflow's on loopback, which runs in an empty folder."""
    folder.mkdir()
    address = f"http://127.0.0.1:{(port := free_port())}"
    arguments = [
        sys.executable,
        "-m",
        "mlflow",
        *command,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            arguments,
            cwd=folder,
            env=elsewhere(store),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address + health, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


@dataclass(frozen=True)
class Elsewhere:
    """A model in use where this repository is not."""

    address: str  # of `mlflow models serve`
    loading: subprocess.Popen  # Python that predicts query.parquet as said.parquet in `folder`, and prints where its code is
    folder: Path


@pytest.fixture(scope="module")
def served(fits, params, cohort, migrated_store, tmp_path_factory) -> Iterator[Elsewhere]:
    """Of a model that was registered on a tracking server; server and Python start side by side."""
    folder, before = tmp_path_factory.mktemp("served"), mlflow.get_tracking_uri()
    database = shutil.copy(migrated_store, folder / "server.db")
    where = (
        "--backend-store-uri",
        f"sqlite:///{database}",
        "--artifacts-destination",
        str(folder / "artifacts"),
    )
    with (
        pytest.MonkeyPatch.context() as patched,
        listening(folder / "server", "", "/health", "server", *where) as store,
    ):
        patched.chdir(folder)
        patched.setenv("MLFLOW_TRACKING_URI", store)
        mlflow_client.connect("gem")
        registered(fits[2], params, cohort)
        mlflow.set_tracking_uri(before)
        (folder / "python").mkdir()
        query_of(cohort).to_parquet(folder / "python" / "query.parquet")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        loading = subprocess.Popen(
            [sys.executable, "-c", LOADING],
            cwd=folder / "python",
            env=elsewhere(store),
            text=True,
            **pipes,
        )
        model = ("--model-uri", f"models:/{NAME}@{CHAMPION}", "--env-manager", "local")
        with listening(folder / "empty", store, "/ping", "models", "serve", *model) as address:
            yield Elsewhere(address, loading, folder / "python")


def post(address: str, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def query_of(cohort) -> pd.DataFrame:
    """Some of the columns, with gaps, numbers and units."""
    names = [
        "study",
        "tissue",
        "age_years",
        "perturbation",
        "perturbation_dose",
        "perturbation_time",
    ]
    return cohort.rows(["test_random"])[names].head(6).reset_index(drop=True)


def split(query: pd.DataFrame) -> dict:
    return {"dataframe_split": query.astype(object).where(query.notna(), None).to_dict("split")}


@pytest.mark.parametrize(
    "how",
    [{}, {"interval": True, "latents": True}, SAMPLED, SAMPLED | {"deterministic_latents": True}],
)
def test_a_server_answers_the_numbers_of_the_model_in_python(served, fits, cohort, how):
    query, gem = query_of(cohort), fits[2].gem
    status, said = post(served.address, split(query) | {"params": how})
    assert status == 200, said
    expected = gem.predict(query, **how)
    found = pd.DataFrame(said["predictions"])
    assert set(found) == set(expected)
    for name in ("extrapolated", *gem.genes):
        np.testing.assert_array_equal(found[name], expected[name])
    assert (
        found["perturbation_dose"].isna().tolist() == expected["perturbation_dose"].isna().tolist()
    )


def test_a_server_starts_from_reference_counts(served, fits, cohort):
    query, gem = query_of(cohort), fits[2].gem
    counts = cohort.counts(["test_control"])[: len(query)]
    reference = pd.DataFrame(
        counts, columns=gem.genes, index=[str(row) for row in range(len(query))]
    )
    conditioning = ["biological"]
    status, said = post(
        served.address,
        split(query.assign(reference_counts=counts.tolist()))
        | {"params": {"conditioning": conditioning}},
    )
    assert status == 200, said
    expected = gem.predict(
        query.assign(reference_id=reference.index),
        reference=reference,
        conditioning=tuple(conditioning),
    )
    np.testing.assert_array_equal(pd.DataFrame(said["predictions"])[gem.genes], expected[gem.genes])
    assert not np.array_equal(expected[gem.genes], gem.predict(query)[gem.genes])


@pytest.mark.parametrize(
    ("change", "how", "told"),
    [
        ({"tissue": "tissue_l"}, {}, "did you mean tissue_"),
        ({}, {"mode": "sampel"}, "mode: 'sampel' is unknown; did you mean"),
        ({"reference_counts": [[1, 2]]}, {}, "reference_counts, rows 0: expected a list of"),
    ],
)
def test_a_server_says_what_is_wrong_with_a_query_and_shows_no_traceback(
    served, cohort, change, how, told
):
    status, said = post(
        served.address, split(query_of(cohort).head(1).assign(**change)) | {"params": how}
    )
    assert status == 400
    assert told in said["message"]
    assert "stack_trace" not in said


def test_a_model_loaded_by_its_alias_predicts_the_same_where_this_repository_is_not(served, fits):
    printed, complaints = served.loading.communicate(timeout=120)
    assert served.loading.returncode == 0, complaints
    assert "code/pipeline" in printed and str(ROOT) not in printed
    query = pd.read_parquet(served.folder / "query.parquet")
    pd.testing.assert_frame_equal(
        pd.read_parquet(served.folder / "said.parquet"), fits[2].gem.predict(query, **SAMPLED)
    )
