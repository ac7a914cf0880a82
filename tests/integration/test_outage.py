"""A tracking server that dies, hangs or was never there: nothing is lost, and it is told later, once. Real servers."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from support.processes import TrackingServer, until
from support.repository import Repository
from support.settings import TINY

from pipeline.gem.common.errors import InputError
from pipeline.gem.common.files import sha256
from pipeline.gem.tracking import mlflow_client, runs

EPOCHS, TRIALS = 30, 4


@pytest.fixture(scope="module")
def server(tmp_path_factory, migrated_store) -> Iterator[TrackingServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_store, folder / "mlflow.db")
    server = TrackingServer(folder)
    yield server
    server.kill()


@pytest.fixture
def repository(undrawn, cohort, tmp_path) -> Repository:
    repository = Repository(
        tmp_path / "repository",
        TINY | {"train.epochs": EPOCHS, "train.patience": 99, "tune.trials": TRIALS},
    )
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    return repository


@pytest.fixture
def here(tmp_path, monkeypatch, server) -> Iterator[Path]:
    """A working directory whose server hangs."""
    before = mlflow.get_tracking_uri()
    if not server.is_started:
        server.start()
    server.send(signal.SIGSTOP)
    monkeypatch.chdir(tmp_path)
    for name, value in (impatient(server) | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}).items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    mlflow.set_tracking_uri(before)
    server.send(signal.SIGCONT)


def impatient(server: TrackingServer) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": server.address,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
    }


def runs_of(server: TrackingServer, experiment: str) -> list:
    """As they are stored; without their server, which need not live."""
    client = mlflow.MlflowClient(f"sqlite:///{server.folder}/mlflow.db")
    return client.search_runs(
        [client.get_experiment_by_name(experiment).experiment_id], max_results=200
    )


def curve(server: TrackingServer, run, metric: str) -> list[int]:
    return [
        one.step
        for one in mlflow.MlflowClient(f"sqlite:///{server.folder}/mlflow.db").get_metric_history(
            run.info.run_id, metric
        )
    ]


def warnings_in(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("warning: ")]


def test_a_server_killed_in_the_middle_of_a_training_loses_neither_the_model_nor_its_curve(
    server, repository
):
    server.start()
    stage = repository.start("pipeline.train", **impatient(server))
    until(lambda: "epoch   2/" in repository.said("pipeline.train"))
    server.kill()
    assert stage.wait(timeout=900) == 0, repository.said("pipeline.train")
    said = repository.said("pipeline.train")
    assert "Traceback" not in said
    down, unregistered = warnings_in(said)
    assert (
        down.startswith(f"warning: MLflow at {server.address} does not answer (")
        and "python -m pipeline.register" in down
    )
    assert unregistered.startswith(
        "warning: experiments/default/model.pt is trained, but not registered as gem: "
    )
    written = pd.read_csv(repository.folder / "experiments/default/history.csv")
    assert len(written) == EPOCHS
    assert [run.info.status for run in runs_of(server, "gem")] == ["RUNNING"]

    assert "not been told all of 1 run" in repository.stage(
        "pipeline.register", expect=2, **impatient(server)
    )
    server.start()
    repository.stage("pipeline.register", **impatient(server))
    assert "every run is told, every trained model is registered" in repository.stage(
        "pipeline.register", **impatient(server)
    )
    (run,) = runs_of(server, "gem")
    assert run.info.status == "FINISHED"
    assert run.data.tags["model.sha256"] == sha256(
        repository.folder / "experiments/default/model.pt"
    )
    assert sorted(curve(server, run, "validation/mse")) == list(range(1, EPOCHS + 1))
    assert (
        run.data.metrics["best/mse"]
        == json.loads((repository.folder / "experiments/default/report.json").read_text())[
            "validation"
        ]["mse"]
    )
    client = mlflow.MlflowClient(server.address)
    assert {one.path for one in client.list_artifacts(run.info.run_id)} >= {
        "history.csv",
        "report.json",
        "figures",
    }
    assert client.get_model_version_by_alias("gem", "champion").run_id == run.info.run_id


def test_a_server_that_hangs_in_the_middle_of_a_search_costs_no_trial_and_is_told_of_each_once(
    server, repository
):
    server.start()
    before = {run.info.run_id for run in runs_of(server, "gem")}
    stage = repository.start("pipeline.tune", "--search", "latent_kl", **impatient(server))
    until(lambda: "tune: trial 0 " in repository.said("pipeline.tune"))
    server.send(signal.SIGSTOP)
    try:
        assert stage.wait(timeout=900) == 0, repository.said("pipeline.tune")
    finally:
        server.send(signal.SIGCONT)
    said = repository.said("pipeline.tune")
    assert "Traceback" not in said and "does not answer" in said
    table = pd.read_csv(repository.folder / "experiments/latent_kl/trials.csv")
    assert len(table) == TRIALS and (repository.folder / "experiments/latent_kl/model.pt").exists()

    repository.stage("pipeline.register", MLFLOW_TRACKING_URI=server.address)
    recorded = [run for run in runs_of(server, "gem") if run.info.run_id not in before]
    names = [run.info.run_name for run in recorded]
    assert sorted(name for name in names if " trial " in name) == [
        f"latent_kl trial {number}" for number in range(TRIALS)
    ]
    assert names.count("latent_kl") == names.count("latent_kl winner") == 1 and len(
        set(names)
    ) == len(names)
    assert {run.info.status for run in recorded} <= {"FINISHED", "KILLED"}
    parent = next(run for run in recorded if run.info.run_name == "latent_kl")
    assert (
        parent.data.metrics["trials/complete"] + parent.data.metrics["trials/pruned"] == TRIALS
        and "verdict" in parent.data.tags
    )
    for run in recorded:
        if " trial " in run.info.run_name:
            row = table[table["trial"] == int(run.data.params["trial"])].iloc[0]
            assert sorted(curve(server, run, "train/loss")) == list(range(1, row["epochs"] + 1))
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_runs_of_a_server_that_was_never_there_are_made_when_it_is_as_they_were(here, server):
    mlflow_client.connect("never there")
    (here / "note.txt").write_text("as it was")
    with runs.run("parent", "tune") as parent:
        parent.params({"a": 1})
        with runs.run("child", "tune", parent=parent.id) as child:
            child.metrics({"loss": 2.0}, step=1)
            child.artifacts([here / "note.txt"])
        with pytest.raises(KeyError), runs.run("lost", "tune", parent=parent.id):
            raise KeyError
    (here / "note.txt").write_text("as it is")
    with runs.run("parent", "tune", resume=parent.id) as again:
        again.metrics({"loss": 1.0}, step=2)
    assert runs.exists(parent.id) and mlflow_client.unsent() == 3
    server.send(signal.SIGCONT)
    for _ in range(2):
        mlflow_client.connect("never there")
        assert mlflow_client.unsent() == 0
    recorded = {run.info.run_name: run for run in runs_of(server, "never there")}
    assert len(runs_of(server, "never there")) == 3
    assert {name: run.info.status for name, run in recorded.items()} == {
        "parent": "FINISHED",
        "child": "FINISHED",
        "lost": "FAILED",
    }
    assert {recorded[name].data.tags["mlflow.parentRunId"] for name in ("child", "lost")} == {
        recorded["parent"].info.run_id
    }
    assert recorded["parent"].data.params == {"a": "1"} and curve(
        server, recorded["parent"], "loss"
    ) == [2]
    assert recorded["child"].info.end_time <= recorded["parent"].info.end_time
    assert (
        Path(
            mlflow.artifacts.download_artifacts(
                run_id=recorded["child"].info.run_id, artifact_path="note.txt"
            )
        ).read_text()
        == "as it was"
    )
    assert runs.exists(parent.id)
    runs.complete(parent.id, {"test/mse": 0.5}, {})
    assert mlflow.get_run(recorded["parent"].info.run_id).data.metrics["test/mse"] == 0.5


def test_what_was_sent_but_not_struck_out_is_not_doubled(here, server, monkeypatch):
    """As where the sender dies, or a server carries out a request whose answer never comes."""
    mlflow_client.connect("twice")
    with runs.run("one", "train") as run:
        run.metrics({"loss": 1.0}, step=1)
    server.send(signal.SIGCONT)
    with monkeypatch.context() as patched:
        patched.setattr(runs.OfflineRun, "sent", lambda journal, run_id: None)
        mlflow_client.connect("twice")
    assert mlflow_client.unsent() == 1
    mlflow_client.connect("twice")
    (found,) = runs_of(server, "twice")
    assert mlflow_client.unsent() == 0 and curve(server, found, "loss") == [1]


def test_a_run_that_the_server_will_never_take_is_set_aside_and_stops_nothing(here, server, capsys):
    server.send(signal.SIGCONT)
    mlflow_client.connect("refused")
    with runs.run("deleted", "train") as run:
        run.metrics({"loss": 1.0})
        server.send(signal.SIGSTOP)
        run.metrics({"loss": 2.0}, step=1)
    server.send(signal.SIGCONT)
    mlflow.delete_run(run.id)
    mlflow_client.connect("refused")
    assert "MLflow refuses what it has missed" in capsys.readouterr().err
    assert mlflow_client.unsent() == 0 and list(Path(".gem/untracked").rglob("*.refused"))


@pytest.mark.parametrize("address", ["htp://127.0.0.1:5000", "nonsense://x"])
def test_an_address_that_is_none_is_one_line(here, monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(
        InputError, match=f"MLFLOW_TRACKING_URI: {address} cannot be opened"
    ) as caught:
        mlflow_client.connect("gem")
    assert "\n" not in str(caught.value)
