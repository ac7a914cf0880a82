"""The stage train, interrupted, killed or started twice: no partial model, no process left."""

import json
import re
import shutil
import signal
from pathlib import Path

import mlflow
import pytest
from support.processes import descendants, is_alive, until
from support.repository import Repository, Stage
from support.settings import TINY

LONG = TINY | {"train.epochs": 40, "train.patience": 99}
OUTPUT = Path("experiments/default")


def prepare(folder: Path, cohort, migrated_store, changes: dict) -> Repository:
    repository = Repository(folder, changes)
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    return repository


@pytest.fixture
def repository(no_figures, cohort, migrated_store, tmp_path) -> Repository:
    return prepare(tmp_path / "repository", cohort, migrated_store, LONG)


def start(repository: Repository) -> Stage:
    """A training after its second epoch."""
    stage = repository.start("pipeline.train")
    until(lambda: "epoch   2/" in repository.log("pipeline.train") or not is_alive(stage.pid))
    assert is_alive(stage.pid), repository.log("pipeline.train")
    return stage


def test_a_stopped_training_writes_nothing_and_its_last_line_says_how_to_continue(repository):
    stage = start(repository)
    stage.send_signal(signal.SIGINT)
    assert stage.wait(timeout=900) == 75, repository.log("pipeline.train")
    assert not list((repository.folder / OUTPUT).glob("**/*"))
    message = "stopped: train: by SIGINT; the finished epochs are saved; resume with: make"
    assert repository.log("pipeline.train").splitlines()[-1] == message
    client = mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("gem").experiment_id])
    assert run.info.status == "KILLED"


def test_a_second_training_of_the_same_folder_names_the_first(repository):
    stage = start(repository)
    stage.send_signal(signal.SIGSTOP)
    try:
        output = repository.stage("pipeline.train", expect=2)
    finally:
        stage.kill()
        stage.wait()
    assert f"error: {OUTPUT} is being trained by process {stage.pid}; wait for it" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_of_several_seeds_end_with_the_training(repository, number):
    # Enough epochs to outlive the test, so that only the signal ends them.
    path = repository.folder / "params.yaml"
    text = re.sub(r"\n  seeds: \[1\]", "\n  seeds: [1, 2]", path.read_text())
    path.write_text(re.sub(r"\n  epochs: \d+", "\n  epochs: 5000", text))
    stage = start(repository)
    assert "train, seed " in repository.log("pipeline.train")
    processes = descendants(stage.pid)
    assert len(processes) >= 2
    stage.send_signal(number)
    assert stage.wait(timeout=900) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    until(lambda: not any(is_alive(pid) for pid in processes), seconds=30)


def test_a_killed_training_leaves_the_previous_outputs(repository):
    """Files are replaced only when all fits are done."""
    repository.stage("pipeline.configure", "--set", "train.epochs=2")
    repository.stage("pipeline.train")
    outputs = [path for path in (repository.folder / OUTPUT).rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in outputs}
    repository.stage("pipeline.configure", "--set", "train.epochs=40")
    (repository.folder / "pipeline.train.log").unlink()
    stage = start(repository)
    stage.kill()
    assert stage.wait() == -signal.SIGKILL
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((repository.folder / OUTPUT / "report.json").read_text())["epochs"] == 2
