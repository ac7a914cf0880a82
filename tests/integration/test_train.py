"""The stage train told to stop, killed, or started twice: no half a model, no process left behind. Real processes."""

import json
import re
import shutil
import signal

import mlflow
import pytest
from support.processes import descendants, is_alive, until
from support.repository import Repository
from support.settings import TINY

from pipeline.gem.common.files import sha256

LONG = TINY | {"train.epochs": 40, "train.patience": 99}


@pytest.fixture
def repository(cohort, migrated_store, tmp_path) -> Repository:
    return prepared(tmp_path / "repository", cohort, migrated_store, LONG)


def prepared(folder, cohort, migrated_store, parameters: dict) -> Repository:
    repository = Repository(folder, parameters)
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    return repository


def started(repository: Repository):
    """A training that has told of its second epoch."""
    stage = repository.start("pipeline.train")
    until(lambda: "epoch   2/" in repository.said("pipeline.train"))
    return stage


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_training_told_to_stop_says_so_and_the_next_goes_on_as_if_it_had_not_been(
    repository, cohort, migrated_store, tmp_path, name
):
    stage = started(repository)
    stage.send_signal(getattr(signal, name))
    assert stage.wait(timeout=900) == 75, repository.said("pipeline.train")
    said = repository.said("pipeline.train")
    assert (
        said.splitlines()[-1].startswith(f"stopped: train: by {name}; ") and "Traceback" not in said
    )
    assert not list((repository.folder / "experiments" / "default").glob("**/*"))
    client = mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")
    assert [
        run.info.status
        for run in client.search_runs([client.get_experiment_by_name("gem").experiment_id])
    ] == ["KILLED"]
    if name == "SIGTERM":
        assert "train: goes on after the last epoch" in repository.stage("pipeline.train")
        assert (
            len(list((repository.folder / ".gem/checkpoints").glob("*.ended.pt")))
            == len(list((repository.folder / ".gem/checkpoints").iterdir()))
            == 1
        )
        other = prepared(tmp_path / "other", cohort, migrated_store, LONG)
        other.stage("pipeline.train")
        both = [
            [
                sha256(one.folder / "experiments/default" / file)
                for file in ("model.pt", "history.csv", "report.json")
            ]
            for one in (repository, other)
        ]
        assert both[0] == both[1]


def test_a_training_that_was_killed_goes_on(repository, cohort, migrated_store, tmp_path):
    stage = started(repository)
    stage.kill()
    stage.wait()
    assert "train: goes on after the last epoch" in repository.stage("pipeline.train")
    other = prepared(tmp_path / "other", cohort, migrated_store, LONG)
    assert "goes on" not in other.stage("pipeline.train")
    assert (
        len({sha256(one.folder / "experiments/default/model.pt") for one in (repository, other)})
        == 1
    )


def test_a_second_training_of_the_same_folder_is_told_who_trains(repository):
    stage = started(repository)
    stage.send_signal(signal.SIGSTOP)
    try:
        said = repository.stage("pipeline.train", expect=2)
    finally:
        stage.kill()
        stage.wait()
    assert (
        f"error: experiments/default is being trained here by process {stage.pid}; wait for it, or stop it"
        in said
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_fits_of_several_seeds_end_with_the_training_that_asked_for_them(
    cohort, migrated_store, tmp_path, number
):
    # Enough epochs to outlive the test: whatever ends them is the signal.
    repository = prepared(
        tmp_path / "repository", cohort, migrated_store, LONG | {"train.epochs": 5000}
    )
    path = repository.folder / "params.yaml"
    path.write_text(re.sub(r"\n  seeds: \[1\]", "\n  seeds: [1, 2]", path.read_text()))
    stage = started(repository)
    assert "train, seed " in repository.said("pipeline.train")
    helpers = descendants(stage.pid)
    assert len(helpers) >= 3, "two fits and what carries their epochs"
    stage.send_signal(number)
    assert stage.wait(timeout=900) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    until(lambda: not any(is_alive(pid) for pid in helpers), seconds=30)


def test_what_a_training_writes_is_whole(repository):
    """What it wrote before is replaced, file by file, only when all fits are done."""
    repository.stage("pipeline.configure", "--set", "train.epochs=2")
    repository.stage("pipeline.train")
    before = {
        path: path.read_bytes()
        for path in (repository.folder / "experiments/default").rglob("*")
        if path.is_file()
    }
    repository.stage("pipeline.configure", "--set", "train.epochs=40")
    (repository.folder / "pipeline.train.log").unlink()
    stage = started(repository)
    stage.kill()
    assert stage.wait() == -signal.SIGKILL
    assert {path: path.read_bytes() for path in before} == before
    assert (
        json.loads((repository.folder / "experiments/default/report.json").read_text())["epochs"]
        == 2
    )
