"""A real tracking server that is killed or hangs: it costs seconds, nothing is lost, nothing is
logged twice. tests/tracking/test_offline_buffer.py has the cases in detail."""

import json
import shutil
import signal

import mlflow
import pandas as pd
import pytest
from support.processes import TrackingServer, is_alive, until
from support.repository import Repository, Stage
from support.settings import TINY

from pipeline.gem.common.files import sha256

EPOCHS, TRIALS = 20, 3


@pytest.fixture(scope="module")
def repository(no_figures, cohort, tmp_path_factory) -> Repository:
    changes = {"train.epochs": EPOCHS, "train.patience": 99, "tune.trials": TRIALS}
    repository = Repository(tmp_path_factory.mktemp("outage") / "repository", TINY | changes)
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    return repository


def impatient(server: TrackingServer) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": server.address,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
    }


def client_of(server: TrackingServer) -> mlflow.MlflowClient:
    """Reads the database, so that the server need not run."""
    return mlflow.MlflowClient(f"sqlite:///{server.folder}/mlflow.db")


def runs_of(server: TrackingServer) -> list:
    experiment = client_of(server).get_experiment_by_name("gem")
    return client_of(server).search_runs([experiment.experiment_id])


def steps(server: TrackingServer, run, metric: str) -> list[int]:
    history = client_of(server).get_metric_history(run.info.run_id, metric)
    return sorted(point.step for point in history)


def wait_for(text: str, repository: Repository, module: str, stage: Stage) -> None:
    until(lambda: text in repository.log(module) or not is_alive(stage.pid))
    assert text in repository.log(module), repository.log(module)


def warnings_in(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("warning: ")]


def test_a_server_killed_during_a_training_costs_neither_the_model_nor_its_run(server, repository):
    stage = repository.start("pipeline.train", **impatient(server))
    wait_for("epoch   2/", repository, "pipeline.train", stage)
    server.kill()
    assert stage.wait(timeout=900) == 0, repository.log("pipeline.train")
    output = repository.log("pipeline.train")
    assert "Traceback" not in output
    (warning,) = warnings_in(output)
    assert warning.startswith(f"warning: MLflow at {server.address} does not answer (")
    assert "python -m pipeline.register" in warning
    experiment = repository.folder / "experiments/default"
    assert len(pd.read_csv(experiment / "history.csv")) == EPOCHS
    assert [run.info.status for run in runs_of(server)] == ["RUNNING"]

    # As a stage, registration does not fail; a user gets an error.
    repository.stage("pipeline.register", DVC_STAGE="register", **impatient(server))
    path = repository.folder / "experiments/registered.json"
    assert not json.loads(path.read_text())["experiments/default"]["registered"]
    output = repository.stage("pipeline.register", expect=2, **impatient(server))
    assert "runs not sent: 1, models not registered: 1" in output
    assert len(warnings_in(output)) == 1

    server.start()
    for _ in range(2):
        output = repository.stage("pipeline.register", **impatient(server))
        assert "register: all runs sent, all models registered" in output
    assert json.loads(path.read_text())["experiments/default"]["registered"]
    (run,) = runs_of(server)
    assert run.info.status == "FINISHED"
    assert run.data.tags["model.sha256"] == sha256(experiment / "model.safetensors")
    assert steps(server, run, "validation/mse") == list(range(1, EPOCHS + 1))
    report = json.loads((experiment / "report.json").read_text())
    assert run.data.metrics["best/mse"] == report["validation"]["mse"]
    client = mlflow.MlflowClient(server.address)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files >= {"history.csv", "report.json", "figures"}
    (version,) = client.search_model_versions("name = 'gem'")
    assert version.run_id == run.info.run_id
    assert client.get_model_version_by_alias("gem", "champion").version == version.version


def test_a_server_that_hangs_during_a_search_costs_no_trial(server, repository):
    before = {run.info.run_id for run in runs_of(server)}
    stage = repository.start("pipeline.tune", "--search", "latent_kl", **impatient(server))
    wait_for("trial 0 ", repository, "pipeline.tune", stage)
    server.send(signal.SIGSTOP)
    try:
        assert stage.wait(timeout=900) == 0, repository.log("pipeline.tune")
    finally:
        server.send(signal.SIGCONT)
    output = repository.log("pipeline.tune")
    assert "Traceback" not in output and "does not answer" in output
    table = pd.read_csv(repository.folder / "experiments/latent_kl/trials.csv")
    assert len(table) == TRIALS

    repository.stage("pipeline.register", MLFLOW_TRACKING_URI=server.address)
    logged = [run for run in runs_of(server) if run.info.run_id not in before]
    names = [run.info.run_name for run in logged]
    assert len(set(names)) == len(names), "a run is logged twice"
    trials = [f"latent_kl trial={number}" for number in range(TRIALS)]
    assert {"latent_kl", "latent_kl winner", *trials} <= set(names)
    assert {run.info.status for run in logged} <= {"FINISHED", "KILLED"}
    parent = logged[names.index("latent_kl")]
    counts = [parent.data.metrics[f"trials/{state}"] for state in ("complete", "pruned")]
    assert sum(counts) == TRIALS and "result" in parent.data.tags
    for number, name in enumerate(trials):
        run, row = logged[names.index(name)], table[table["trial"] == number].iloc[0]
        assert steps(server, run, "train/loss") == list(range(1, row["epochs"] + 1))
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
