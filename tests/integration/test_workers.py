"""The workers of one machine: the exact budget, and a search whose processes are killed."""

import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

import mlflow
import pandas as pd
import pytest
from support.processes import children, is_alive, until
from support.repository import Repository, Stage
from support.searches import KL, LATENT
from support.settings import TINY

TRIALS = 5
DEFINITION = f"""
description: of this test
space:
  {LATENT}: {{type: integer, low: 2, high: 64, log: true}}
  {KL}: {{type: float, low: 0.01, high: 4.0, log: true}}
baseline: {{model: {{latent: {{technical: 4}}}}, train: {{kl_weight: {{technical: 1.0}}}}}}
objective: {{metric: predictive_log_likelihood, direction: maximize}}
sampler: {{name: random, seed: 1}}
pruner: {{name: none}}
trials: {TRIALS}
epochs: 20
seeds: [1]
confirm: {{top: 1, seeds: [2, 3], epochs: 1}}
"""


@pytest.fixture
def repository(no_figures, cohort, migrated_store, tmp_path) -> Repository:
    """A repository with a cohort, the search `killed` and an empty store."""
    repository = Repository(tmp_path / "repository", TINY | {"train.patience": 99})
    (repository.folder / "experiments" / "searches" / "killed.yaml").write_text(DEFINITION)
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    return repository


@pytest.fixture
def tune(repository):
    """A function that starts the search with two workers. They end with the test."""
    stages = []

    def start() -> Stage:
        arguments = ("--search", "killed", "--workers", "2")
        stages.append(repository.start("pipeline.tune", *arguments))
        return stages[-1]

    yield start
    for stage in stages:
        stage.kill()
        stage.wait()


def running_trials(repository: Repository) -> list[int]:
    """Numbers of the trials that trained an epoch, and have as many before them, if two do."""
    query = (
        "SELECT number FROM trials JOIN trial_intermediate_values USING (trial_id) "
        "WHERE state = 'RUNNING' GROUP BY number HAVING count(*) <= 10"
    )
    database = repository.folder / ".gem" / "optuna.db"
    if not database.exists():
        return []
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        try:
            numbers = [number for (number,) in connection.execute(query)]
        except sqlite3.OperationalError:  # no such table: the schema is being created
            return []
    return numbers if len(numbers) >= 2 else []


def workers_of(stage: Stage) -> list[int]:
    return until(lambda: len(pids := children(stage.pid)) == 2 and pids)


@contextmanager
def paused(repository: Repository, workers: list[int]) -> Iterator[list[int]]:
    """Pauses the workers in the middle of two trials, so that a slow test meets them there."""

    def send(number: int) -> None:
        for pid in filter(is_alive, workers):
            os.kill(pid, number)

    def pause() -> list[int]:
        assert any(map(is_alive, workers)), "the search ended before two trials ran together"
        send(signal.SIGSTOP)
        numbers = running_trials(repository)
        if not numbers:
            send(signal.SIGCONT)
        return numbers

    numbers = until(pause, interval=0.02)
    try:
        yield numbers
    finally:
        send(signal.SIGCONT)


def check_results(repository: Repository) -> pd.DataFrame:
    """Exactly the budget, every point once, every MLflow run ended, a confirmed winner."""
    folder = repository.folder / "experiments" / "killed"
    table = pd.read_csv(folder / "trials.csv", float_precision="round_trip")
    assert len(table) == TRIALS and set(table["state"]) == {"complete"}
    assert not table[[LATENT, KL]].duplicated().any()
    client = mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("gem").experiment_id], max_results=200)
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    finished = [run.info.run_name for run in runs if run.info.status == "FINISHED"]
    assert sum(name.startswith("killed trial") for name in finished) == TRIALS
    assert len(pd.read_csv(folder / "confirmed.csv").dropna()) == 4
    assert (folder / "best.yaml").exists()
    return table


def test_the_trial_of_a_killed_worker_is_run_again_and_a_second_process_is_refused(
    repository, tune
):
    stage = tune()
    workers = workers_of(stage)
    with paused(repository, workers) as numbers:
        trials = repository.trials()
        assert len({trials[number].user_attrs["worker"] for number in numbers}) == 2
        refused = tune()
        assert refused.wait(timeout=900) == 2
        os.kill(workers[0], signal.SIGKILL)
    log = repository.log("pipeline.tune")
    assert f"error: search killed: process {stage.pid} runs it here; " in log
    assert stage.wait(timeout=900) == 0, repository.log("pipeline.tune")
    log = repository.log("pipeline.tune")
    assert f"worker {workers[0]} was ended by SIGKILL; its trial is run again" in log
    lines = re.findall(r"^search killed: trial \d complete after 20 epochs, -.* left$", log, re.M)
    assert len(lines) == TRIALS

    table = check_results(repository)
    assert table["trial"].tolist() == list(range(TRIALS)), "a trial keeps its number"
    after = repository.trials()
    assert all(after[number].params == trials[number].params for number in numbers)
    assert sum("lost_workers" in trial.user_attrs for trial in after) == 1


def test_a_stopped_search_returns_its_trials_and_the_next_call_runs_them(repository, tune):
    stage = tune()
    with paused(repository, workers_of(stage)):
        stage.send_signal(signal.SIGTERM)
    assert stage.wait(timeout=120) == 75, repository.log("pipeline.tune")
    log = repository.log("pipeline.tune")
    assert "stopped: search killed: by SIGTERM; to continue: make tune SEARCH=killed" in log
    assert "Traceback" not in log
    returned = [
        tuple(trial.params.values())
        for trial in repository.trials()
        if trial.state.name == "WAITING"
    ]
    assert returned and not running_trials(repository)
    assert tune().wait(timeout=900) == 0, repository.log("pipeline.tune")
    table = check_results(repository)
    assert set(returned) <= set(table[[LATENT, KL]].itertuples(index=False, name=None))


def test_workers_end_with_their_parent_and_the_parent_with_its_workers(repository, tune):
    stage = tune()
    workers = workers_of(stage)
    with paused(repository, workers):
        stage.kill()
        stage.wait()
    until(lambda: not any(is_alive(pid) for pid in workers), seconds=30)

    stage = tune()
    for pid in workers_of(stage):
        os.kill(pid, signal.SIGKILL)
    assert stage.wait(timeout=900) == 75
    assert "every worker was killed; is there enough memory?" in repository.log("pipeline.tune")
