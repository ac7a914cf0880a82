"""Worker processes: one memory, an exact budget, and what becomes of a search whose processes are killed. Real processes."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import mlflow
import optuna
import pandas as pd
import pytest
from support.processes import children, is_alive, until
from support.repository import Repository, Stage
from support.settings import ROOT, TINY

STUDY = """
question: What does a killed worker cost?
space:
  model.latent.technical: {type: integer, low: 2, high: 64, log: true}
  train.kl_weight.technical: {type: float, low: 0.01, high: 4.0, log: true}
baseline: {model: {latent: {technical: 4}}, train: {kl_weight: {technical: 1.0}}}
objective: {metric: predictive_log_likelihood, direction: maximize}
sampler: {name: random, seed: 1}
pruner: {name: none}
trials: 5
epochs: 10
seeds: [1]
confirm: {top: 1, seeds: [2, 3], epochs: 1}
"""


@pytest.fixture(scope="module")
def prepared(undrawn, cohort, migrated_store, tmp_path_factory) -> Repository:
    """With a cohort, a study and an empty store."""
    repository = Repository(
        tmp_path_factory.mktemp("workers") / "prepared", TINY | {"train.patience": 99}
    )
    (repository.folder / "experiments" / "searches" / "killed.yaml").write_text(STUDY)
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    return repository


@pytest.fixture
def repository(prepared, tmp_path) -> Repository:
    """A prepared repository that no search has seen."""
    own = object.__new__(Repository)
    own.folder = tmp_path / "repository"
    shutil.copytree(prepared.folder, own.folder)
    return own


@pytest.fixture
def tune(repository):
    """Starts the search; whatever is left of it ends with the test."""
    started = []

    def start(*arguments: str, **environment: str) -> Stage:
        started.append(
            repository.start("pipeline.tune", "--search", "killed", *arguments, **environment)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def said(repository: Repository) -> str:
    return repository.said("pipeline.tune")


def running(repository: Repository, at_least: int = 1) -> list[int]:
    """Numbers of trials that have trained an epoch and have as many before them, once there are so many."""
    query = "SELECT number FROM trials JOIN trial_intermediate_values USING (trial_id) WHERE state = 'RUNNING' GROUP BY number HAVING count(*) <= 5"
    database = repository.folder / ".gem" / "optuna.db"
    if not database.exists():
        return []
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        known = connection.execute(
            "SELECT name FROM sqlite_master WHERE name = 'trial_intermediate_values'"
        ).fetchall()
        numbers = [number for (number,) in connection.execute(query)] if known else []
    return numbers if len(numbers) >= at_least else []


@contextmanager
def standing(repository: Repository, processes: list[int], trials: int) -> Iterator[list[int]]:
    """The trials that the processes run; they stand still in the middle of them until the block is left, however slow this machine is."""

    def tell(number: int) -> None:
        for pid in filter(is_alive, processes):
            os.kill(pid, number)

    def look() -> list[int]:
        tell(signal.SIGSTOP)
        if not (found := running(repository, trials)):
            tell(signal.SIGCONT)
        return found

    found = until(look)
    try:
        yield found
    finally:
        tell(signal.SIGCONT)


def assert_exact(repository: Repository, trials: int = 5) -> pd.DataFrame:
    """The budget neither over nor under, every point once, every run closed, a confirmed winner."""
    table = pd.read_csv(
        repository.folder / "experiments/killed/trials.csv", float_precision="round_trip"
    )
    assert len(table) == trials and set(table["state"]) == {"complete"}
    assert (
        len(table[["model.latent.technical", "train.kl_weight.technical"]].drop_duplicates())
        == trials
    )
    client = mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("gem").experiment_id], max_results=200)
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert (
        sum(
            run.info.status == "FINISHED" and run.info.run_name.startswith("killed trial")
            for run in runs
        )
        == trials
    )
    assert len(pd.read_csv(repository.folder / "experiments/killed/confirmed.csv").dropna()) == 4
    assert (repository.folder / "experiments/killed/best.yaml").exists()
    return table


def point(trial: optuna.trial.FrozenTrial) -> tuple:
    return tuple(trial.params.values())


def test_two_workers_keep_the_budget_and_a_second_call_of_the_same_study_is_refused_by_name(
    repository, tune
):
    process = tune("--workers", "2")
    both = until(lambda: running(repository, 2))
    assert len({repository.trials()[number].user_attrs["worker"] for number in both}) == 2
    assert tune().wait(timeout=900) == 2
    assert re.search(
        rf"^error: killed is being searched here by process {process.pid}; .*\n",
        said(repository),
        flags=re.MULTILINE,
    )
    assert process.wait(timeout=900) == 0, said(repository)
    assert_exact(repository)
    lines = [
        line
        for line in said(repository).splitlines()
        if line.startswith("tune: trial ") and " left" in line
    ]
    assert len(lines) == 5 and all(
        re.search(
            r"complete after 10 epochs, -\d+\.\d+; best -\d+\.\d+ \(trial \d\); \d of 5, .* left",
            line,
        )
        for line in lines
    )


def test_a_killed_workers_trial_is_run_again_with_its_parameters_and_counted_once(repository, tune):
    process = tune("--workers", "2")
    workers = until(lambda: len(found := children(process.pid)) == 2 and found)
    with standing(repository, workers, 2) as numbers:
        victim = workers[0]
        os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=900) == 0, said(repository)
    assert f"worker {victim} was ended by SIGKILL; its trial is run again" in said(repository)
    table = assert_exact(repository)
    lost = set(numbers) - set(table["trial"])
    assert len(lost) == 1 and max(table["trial"]) == 5, "one number was used twice"
    trials = repository.trials()
    again = [trial for trial in trials if trial.user_attrs.get("retry_of") in lost]
    assert len(again) == 1 and point(again[0]) == point(trials[lost.pop()])


@pytest.mark.parametrize(("arguments", "name"), [((), "SIGTERM"), (("--workers", "2"), "SIGINT")])
def test_a_search_told_to_stop_hands_its_trials_back_and_goes_on_as_if_it_had_not(
    repository, tune, arguments, name
):
    process = tune(*arguments)
    searching = (
        until(lambda: len(found := children(process.pid)) == 2 and found)
        if arguments
        else [process.pid]
    )
    with standing(repository, searching, len(searching)):
        process.send_signal(getattr(signal, name))
    assert process.wait(timeout=120) == 75, said(repository)
    stopped = [
        line
        for line in said(repository).splitlines()
        if "trial" not in line and not line.startswith("killed: ")
    ]
    assert stopped[-1] == f"stopped: killed: by {name}; go on with: make tune SEARCH=killed"
    assert "Traceback" not in said(repository)
    handed_back = [point(trial) for trial in repository.trials() if trial.state.name == "FAIL"]
    assert handed_back and not running(repository)
    assert tune().wait(timeout=900) == 0, said(repository)
    table = assert_exact(repository)
    points = {
        tuple(row)
        for row in table[["model.latent.technical", "train.kl_weight.technical"]].itertuples(
            index=False
        )
    }
    assert set(handed_back) <= points


def test_workers_whose_parent_was_killed_stop_within_seconds_and_the_next_call_goes_on(
    repository, tune
):
    process = tune("--workers", "2")
    until(lambda: running(repository, 2))
    workers = children(process.pid)
    process.kill()
    process.wait()
    until(lambda: not any(is_alive(pid) for pid in workers), seconds=30)
    assert tune("--workers", "2").wait(timeout=900) == 0, said(repository)
    assert_exact(repository)


def test_a_search_all_of_whose_workers_were_killed_says_so_and_can_be_continued(repository, tune):
    process = tune("--workers", "2")
    until(lambda: running(repository, 2))
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=900) == 75
    assert (
        "stopped: killed: every worker was killed: is there enough memory?; go on with: make tune SEARCH=killed"
        in said(repository)
    )


def test_what_the_parent_loaded_is_in_memory_once(tmp_path):
    code = f"""
import re, sys
import torch
torch.set_num_threads(1)
from pipeline.gem.common.processes import Interruption
from pipeline.gem.search.workers import Workers
data = torch.rand(50_000_000)   # 200 MB

def work(interruption):
    (data[:1_000_000] * 2).sum(), data.sum()
    private = sum(int(size) for size in re.findall(r"Private_\\w+:\\s+(\\d+) kB", open("/proc/self/smaps_rollup").read()))
    with open(r"{tmp_path}/sizes", "a") as file:
        file.write(f"{{private}}\\n")

with Interruption() as interruption, Workers(2, work) as workers:
    workers.wait(interruption)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    sizes = [int(line) / 1024 for line in (tmp_path / "sizes").read_text().split()]
    assert len(sizes) == 2 and max(sizes) < 60, f"{sizes} MB of their own beside 200 MB of data"
