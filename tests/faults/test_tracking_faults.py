"""Processes killed while they log, servers that hang, and passwords: one run a fit, seconds, and
nothing that shows a password. tests/tracking has the cases in detail."""

import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from support.repository import Repository
from support.settings import TINY

from pipeline.gem.common import yaml_file

EPOCHS = 12
PASSWORD = "hunter2-secret"


@pytest.fixture
def repository(no_figures, cohort, migrated_store, tmp_path) -> Repository:
    changes = {"train.epochs": EPOCHS, "train.patience": 99, "tune.trials": 3}
    repository = Repository(tmp_path / "repository", TINY | changes)
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    return repository


def logged_runs(folder: Path) -> list:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("gem")
    return client.search_runs([experiment.experiment_id])


def points_twice(folder: Path) -> list[tuple[str, str]]:
    """(run, metric) of curves with a step twice."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    twice = []
    for run in logged_runs(folder):
        for name in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
            if len(set(steps)) < len(steps):
                twice.append((run.info.run_name, name))
    return twice


def test_a_training_killed_at_random_is_one_run(repository, times, record_property):
    rng, killed = random.Random(1), 0
    for _ in range(2 * times):
        stage = repository.start("pipeline.train")
        time.sleep(rng.uniform(0.3, 3.0))
        stage.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        killed += stage.wait(timeout=300) in (75, -signal.SIGKILL)
    repository.stage("pipeline.train")
    log = repository.log("pipeline.train")
    assert "Traceback" not in log and "Exception ignored" not in log
    runs = logged_runs(repository.folder)
    finished = log.count("best epoch")
    assert [run.info.status for run in runs] == ["FINISHED"] * finished
    assert points_twice(repository.folder) == []
    client = mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(point.step for point in history) == list(range(1, EPOCHS + 1))
    assert not list((repository.folder / ".gem/untracked").glob("*/*"))
    figure = f"{killed} kills of {finished} trainings: {len(runs)} runs, no point twice"
    record_property("figure", figure)


@contextmanager
def hanging_server() -> Iterator[tuple[str, list[socket.socket]]]:
    """The address of a server that accepts and never answers, and its connections."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", connections


def test_a_server_that_hangs_costs_seconds(repository, record_property):
    with hanging_server() as (address, connections):
        output = repository.stage(
            "pipeline.train", MLFLOW_TRACKING_URI=address, MLFLOW_HTTP_REQUEST_TIMEOUT="3"
        )
    assert output.count("does not answer") == 1 and "Traceback" not in output
    assert (repository.folder / "experiments/default/model.safetensors").exists()
    assert len(connections) == 2, "3 s each; by default 5 s"
    record_property("figure", f"{len(connections)} requests of 5 s, then none")


TRAIN, TUNE = ("pipeline.train",), ("pipeline.tune", "--search", "latent_kl")


@pytest.mark.parametrize(
    ("stage", "variable", "address", "code"),
    [
        (TRAIN, "MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:9/?password={PASSWORD}", 0),
        (TRAIN, "MLFLOW_TRACKING_URI", f"nonsense://me:{PASSWORD}@127.0.0.1/", 2),
        (TRAIN, "MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}#@127.0.0.1:9", 2),
        (TUNE, "OPTUNA_STORAGE", f"postgresql://me:{PASSWORD}@127.0.0.1:9/d?password=x", 2),
        (TUNE, "OPTUNA_STORAGE", f"mysql://me:{PASSWORD}@127.0.0.1:9/db", 2),
    ],
)
def test_no_file_and_no_message_shows_a_password(repository, stage, variable, address, code):
    yaml_file.edit(repository.folder / "params.yaml", {"train.epochs": 2})
    output = repository.stage(*stage, expect=code, **{variable: address})
    assert "Traceback" not in output and "***" in output
    files = [path for path in repository.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
    assert not [path for path in files if PASSWORD in str(path)]
