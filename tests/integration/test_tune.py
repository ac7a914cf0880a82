"""The stage tune: its time limit, and a run after a promotion."""

import re
import shutil
import time
from types import SimpleNamespace

import mlflow
import pandas as pd
import pytest
from support.repository import Repository
from support.settings import TINY

from pipeline.gem.search import run as search_run

DEFINITION = """
description: of this test
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
def repository(no_figures, cohort, migrated_store, tmp_path) -> Repository:
    """A repository with a cohort and an empty store."""
    repository = Repository(tmp_path / "repository", TINY)
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    return repository


def define(repository: Repository, trials: int, minutes: float) -> None:
    text = DEFINITION.replace("TRIALS", str(trials)).replace("MINUTES", str(minutes))
    (repository.folder / "experiments" / "searches" / "short.yaml").write_text(text)


def tune(repository: Repository, *arguments: str, expect: int = 0) -> str:
    return repository.stage("pipeline.tune", "--search", "short", *arguments, expect=expect)


def mlflow_runs(repository: Repository) -> list:
    client = mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("gem").experiment_id], max_results=200)


def test_after_its_time_limit_a_search_uses_the_finished_trials_and_a_second_call_continues(
    repository, monkeypatch
):
    define(repository, trials=3, minutes=0.01)
    with monkeypatch.context() as patched:  # the limit is over when the first trial would start
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() - 60)
        patched.setattr(search_run, "time", clock)
        output = tune(repository, expect=75)
    message = "search short: no trial finished within the time limit of 0.01 minutes"
    assert f"stopped: {message}; to continue: make tune SEARCH=short" in output

    define(repository, trials=1000, minutes=0.03)
    output = tune(repository, "--workers", "2")
    folder = repository.folder / "experiments" / "short"
    first = pd.read_csv(folder / "trials.csv")
    assert 0 < len(first) < 1000 and set(first["state"]) == {"complete"}
    assert f"time limit of 0.03 minutes reached after {len(first)} of 1000 trials" in output
    assert (folder / "best.yaml").exists() and (folder / "model.safetensors").exists()

    define(repository, trials=len(first) + 2, minutes=10)
    output = tune(repository)
    assert f"{len(first)} of {len(first) + 2} trials finished, in sqlite" in output
    second = pd.read_csv(folder / "trials.csv")
    pd.testing.assert_frame_equal(
        second.iloc[: len(first)].drop(columns="win_rate"), first.drop(columns="win_rate")
    )
    assert len(second) == len(first) + 2
    assert not second["train.kl_weight.technical"].duplicated().any()


def test_after_a_promotion_the_stage_trains_nothing_and_writes_the_same_results(repository):
    """DVC deletes the outputs before the run. They are written again from the storage."""
    # The winner is fitted with two threads; a worker has one. Two are slow beside other tests: few
    # steps.
    changes = ("train.threads=2", "train.epochs=2", "train.batch_size=256")
    repository.stage("pipeline.configure", *(f"--set={change}" for change in changes))
    define(repository, trials=2, minutes=10)
    tune(repository, "--workers", "2")
    folder = repository.folder / "experiments" / "short"
    results = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    runs = mlflow_runs(repository)

    repository.stage("pipeline.configure", "--promote", "short")
    shutil.rmtree(folder)
    output = tune(repository)
    assert "2 of 2 trials finished" in output
    assert "search short winner: cached: identical settings, data and code" in output
    assert not re.search(r"trial \d+ (complete|confirmed)|winner: epoch", output)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == results
    assert len(mlflow_runs(repository)) == len(runs)

    output = repository.stage("pipeline.train")
    assert "cached" not in output, "the stage train always trains"
    for name in ("model.safetensors", "history.csv", "report.json"):
        default = repository.folder / "experiments" / "default" / name
        assert default.read_bytes() == results[folder / name], "the promoted model"
