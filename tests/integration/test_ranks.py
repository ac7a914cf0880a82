"""The stage train by two processes: torchrun's engine, rank 0's files, a killed rank."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import mlflow
import pytest
from support.processes import descendants, is_alive, until
from support.repository import Repository
from support.settings import ROOT, TINY

from pipeline.gem.training import distributed

MODEL = Path("experiments/default/model.safetensors")


@pytest.fixture
def repository(no_figures, cohort, migrated_store, tmp_path) -> Repository:
    repository = Repository(tmp_path / "repository", TINY | {"train.epochs": 8})
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    return repository


def runs(repository: Repository) -> list:
    client = mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("gem").experiment_id])


def test_a_killed_rank_stops_all_and_the_next_call_resumes(repository):
    stage = repository.start("pipeline.train", ranks=2)
    until(lambda: "epoch   2/" in repository.log("pipeline.train") or not is_alive(stage.pid))
    ranks = descendants(stage.pid)
    os.kill(max(ranks), signal.SIGKILL)
    assert stage.wait(timeout=60) != 0
    assert not any(is_alive(pid) for pid in ranks)
    log = repository.log("pipeline.train").splitlines()
    assert log[-1] == (
        "stopped: train: another of the 2 processes has ended; the finished epochs are saved; "
        "resume with: the same command"
    )
    assert sum(line.startswith(("stopped", "error")) for line in log) == 1
    assert not (repository.folder / MODEL).exists()
    assert [run.info.status for run in runs(repository)] == ["KILLED"]
    output = repository.stage("pipeline.train", ranks=2)
    assert "train: by 2 processes" in output and "resuming from epoch" in output
    assert output.count("epoch   8/8") == 1, "rank 0 alone logs"
    assert (repository.folder / MODEL).exists()
    assert [run.info.status for run in runs(repository)] == ["FINISHED"]


def test_a_mistake_is_one_line_whatever_the_number_of_ranks(repository):
    path = repository.folder / "params.yaml"
    path.write_text(path.read_text().replace("\n  epochs: 8", "\n  epochs: many"))
    output = repository.stage("pipeline.train", ranks=2, expect=2)
    assert len(output.splitlines()) == 1 and "train.epochs is 'many'" in output


PROGRAM = """
import sys

import torch

from pipeline.gem.common.errors import InputError, exit_with
from pipeline.gem.training import distributed


def main():
    with distributed.group():
        number = torch.tensor(distributed.rank() + 1)
        raise InputError(f"sum {int(distributed.total(number))} of {distributed.size()}")


exit_with(main)
"""


def test_a_launched_program_ends_as_its_ranks_do(tmp_path, monkeypatch, capfd):
    """Real processes, as `make train PROCESSES=2` starts them."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    context = multiprocessing.get_context("fork")
    launcher = context.Process(target=distributed.launch, args=("program", 2))
    launcher.start()
    launcher.join()
    assert launcher.exitcode == 2
    assert capfd.readouterr().err == "error: sum 3 of 2\n"


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_a_wrong_number_of_processes_is_refused(monkeypatch, value):
    monkeypatch.setenv("GEM_PROCESSES", value)
    with pytest.raises(distributed.InputError, match="expected a whole number from 1"):
        distributed.ranks_to_start()
