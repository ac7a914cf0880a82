"""The stage tune as it is called: its time limit, its dashboard, and DVC killed above it. Real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from support.processes import answers, descendants, free_port, is_alive, until
from support.repository import Repository
from support.settings import TINY

STUDY = """
question: How far does it come in the time it has?
space: {train.kl_weight.technical: {type: float, low: 0.01, high: 4.0, log: true}}
baseline: {train: {kl_weight: {technical: 1.0}}}
objective: {metric: predictive_log_likelihood, direction: maximize}
sampler: {name: random, seed: 1}
pruner: {name: none}
trials: TRIALS
time_limit: MINUTES
epochs: 2
seeds: [1]
confirm: {top: 1, seeds: [2], epochs: 1}
"""


@pytest.fixture
def repository(undrawn, cohort, migrated_store, tmp_path) -> Repository:
    repository = Repository(tmp_path / "repository", TINY)
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    return repository


def ask(repository: Repository, trials: int, minutes: float) -> None:
    (repository.folder / "experiments" / "searches" / "timed.yaml").write_text(
        STUDY.replace("TRIALS", str(trials)).replace("MINUTES", str(minutes))
    )


def test_a_search_ends_at_its_time_limit_with_what_it_has_and_the_next_call_goes_on(repository):
    ask(repository, trials=1000, minutes=0.03)
    said = repository.stage("pipeline.tune", "--search", "timed", "--workers", "2")
    first = pd.read_csv(repository.folder / "experiments/timed/trials.csv")
    assert 0 < len(first) < 1000 and set(first["state"]) == {"complete"}
    assert (
        f"timed: the time limit of 0.03 minutes was reached with {len(first)} of 1000 trials; these answer for now"
        in said
    )
    assert (repository.folder / "experiments/timed/best.yaml").exists() and (
        repository.folder / "experiments/timed/model.pt"
    ).exists()

    ask(repository, trials=len(first) + 2, minutes=10)
    said = repository.stage("pipeline.tune", "--search", "timed", "--workers", "2")
    assert f"{len(first)} of {len(first) + 2} trials are there" in said and "time limit" not in said
    second = pd.read_csv(repository.folder / "experiments/timed/trials.csv")
    pd.testing.assert_frame_equal(
        second.iloc[: len(first)].drop(columns="wins"), first.drop(columns="wins")
    )
    assert (
        len(second) == len(first) + 2 and not second["train.kl_weight.technical"].duplicated().any()
    )


def test_a_time_limit_that_no_trial_meets_is_a_stop_that_says_how_to_go_on(repository):
    ask(repository, trials=3, minutes=0.0000001)
    said = repository.stage("pipeline.tune", "--search", "timed", expect=75)
    assert (
        "stopped: timed: the time limit of 1e-07 minutes came before the first trial had ended; go on with: make tune SEARCH=timed"
        in said
    )


def test_a_winner_that_was_trained_before_is_not_trained_again(repository):
    """Nor for the threads that workers have: the winner is fitted as params.yaml says."""
    repository.stage("pipeline.configure", "--set", "train.threads=2")
    repository.stage("pipeline.train")
    ask(repository, trials=1, minutes=10)
    said = repository.stage("pipeline.tune", "--search", "timed", "--workers", "2")
    assert (
        "timed winner: trained before, with the same settings, data and code: not trained again (.gem/checkpoints/"
        in said
    )
    assert "timed winner: epoch" not in said
    folders = [repository.folder / "experiments" / name for name in ("default", "timed")]
    for file in ("model.pt", "history.csv", "report.json"):
        assert len({(folder / file).read_bytes() for folder in folders}) == 1, file
    client = mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("gem").experiment_id])
    curves = [
        client.get_metric_history(run.info.run_id, "train/loss")
        for run in runs
        if run.info.run_name in ("default", "timed winner")
    ]
    assert len(curves) == 2 and [one.value for one in curves[0]] == [one.value for one in curves[1]]
    assert "trained before" not in repository.stage("pipeline.train"), (
        "who asks for a training gets one"
    )


def test_the_dashboard_answers_on_loopback_with_the_studies_of_the_same_storage(repository):
    ask(repository, trials=1, minutes=10)
    repository.stage("pipeline.tune", "--search", "timed")
    port = free_port()
    stage = repository.start("pipeline.dashboard", "--port", str(port))
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(f"{address}/dashboard"))
        assert (
            f"searches in sqlite:///.gem/optuna.db: {address} (stop with Ctrl-C)"
            in repository.said("pipeline.dashboard")
        )
        with urllib.request.urlopen(f"{address}/api/studies", timeout=30) as answer:
            names = [study["study_name"] for study in json.load(answer)["study_summaries"]]
        assert len(names) == 2 and re.fullmatch(r"timed-[0-9a-f]{12}", min(names, key=len)), (
            "the search and its confirmation"
        )
        listening = [
            line.split()[1]
            for line in Path(f"/proc/{stage.pid}/net/tcp").read_text().splitlines()[1:]
            if line.split()[3] == "0A"
        ]
        assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening, (
            "this machine's loopback only"
        )
        taken = repository.stage("pipeline.dashboard", "--port", str(port), expect=2).splitlines()[
            -1
        ]
        assert re.fullmatch(
            rf"error: port {port} cannot be opened \(.*\); choose another: make dashboard DASHBOARD_PORT=8081",
            taken,
        )
    finally:
        stage.kill()
        stage.wait()


def test_make_dashboard_starts_that_stage():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert "@python -m pipeline.dashboard --port $(DASHBOARD_PORT)" in makefile


def test_a_search_whose_dvc_was_killed_ends_with_its_workers_and_the_next_repro_goes_on(repository):
    """kill -9 of DVC alone: nothing tells the stage but that who started it is gone; the shell between the two is not."""
    # More trials than any machine ends before it has seen that its parent is gone.
    repository.stage("pipeline.configure", "--set", "tune.trials=1000")
    environment = repository.environment(f"sqlite:///{repository.folder}/mlflow.db") | {
        "GEM_WORKERS": "2",
        "SHELL": "/bin/sh",
    }
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", "tune"]
    with open(repository.folder / "dvc.log", "w") as log:
        dvc = subprocess.Popen(
            command, cwd=repository.folder, env=environment, stdout=log, stderr=log
        )
    database = repository.folder / ".gem" / "optuna.db"
    until(
        lambda: (
            dvc.poll() is not None
            or (
                database.exists()
                and "tune: trial 0 " in (repository.folder / "dvc.log").read_text()
            )
        )
    )
    assert dvc.poll() is None, (repository.folder / "dvc.log").read_text()
    stages = descendants(dvc.pid)
    assert len(stages) >= 3, "the stage and its two workers"
    os.kill(dvc.pid, signal.SIGKILL)
    dvc.wait()
    until(lambda: not any(is_alive(pid) for pid in stages), seconds=60)
    before = [trial for trial in repository.trials() if trial.state.name in ("COMPLETE", "PRUNED")]
    assert 0 < len(before) < 1000, "it was killed in the middle"

    repository.stage("pipeline.configure", "--set", f"tune.trials={len(before) + 2}")
    done = subprocess.run(
        command, cwd=repository.folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(before)} of {len(before) + 2} trials are there" in done.stdout
    table = pd.read_csv(repository.folder / "experiments/latent_kl/trials.csv")
    assert len(table) == len(before) + 2 and {trial.number for trial in before} <= set(
        table["trial"]
    )
    assert len(table.iloc[:, 5:].drop_duplicates()) == len(table), "a point was tried twice"
    client = mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("gem").experiment_id], max_results=200)
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert sum(run.info.run_name == "latent_kl" for run in runs) == 1
