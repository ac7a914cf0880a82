"""The MLflow runs of a search: one of each, wherever the process that opens it is killed."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import optuna
import pytest
import torch
from support.searches import open_search, run, search_config

from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.objective import ObjectiveFunction
from pipeline.gem.search.search import Search
from pipeline.gem.search.trial_queue import RunningTrial
from pipeline.gem.tracking import mlflow_client
from pipeline.gem.tracking.runs import Run
from pipeline.gem.training.dataset import TrainingData


@pytest.fixture
def machine(store, monkeypatch) -> Iterator[Callable[[str], None]]:
    """Changes to a machine: its own folder; the store and the database are those of all."""
    monkeypatch.setenv("OPTUNA_STORAGE", f"sqlite:///{store}/optuna.db")

    def change(name: str) -> None:
        folder = store / name
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        mlflow_client.connect("gem")

    return change


def names_of_runs() -> list[str]:
    mlflow_client.send_saved()
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return sorted(run.info.run_name for run in found)


def is_killed(work: Callable[[], object]) -> bool:
    """Runs `work` in a process of its own. Whether SIGKILL ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill(monkeypatch, owner: type, name: str, after: bool) -> None:
    """The process is killed before or after the first call of a method."""
    method = getattr(owner, name)

    def killed(*arguments, **options) -> None:
        if after:
            method(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(owner, name, killed)


def create_parent(key: str) -> None:
    with Run.open("parent", "tune", key=key) as run:
        run.log_params({"a": 1})


def share_parent(params) -> str:
    search = open_search(params)
    return search.shared_run("winner", create_parent)


def evaluate_trials(params, cohort) -> Search:
    """One trial, whose fit takes no time, in a run below the run `parent`."""
    search = open_search(params)
    parent = search.shared_run("winner", create_parent)
    data = TrainingData.load(cohort, torch.device("cpu"))
    objective = ObjectiveFunction(
        "test", search_config(), params, data, "a" * 64, parent, StopSignal(), Path()
    )

    def evaluate(trial: RunningTrial) -> float:
        with objective._open_run(trial, f"trial={trial.number}") as opened:
            opened.log_metrics({"loss": 1.0}, step=1)
        return 0.0

    return run(search, 1, evaluate)


# A run is opened (`Run._begin`) and its key is stored; the process dies before or after either.
MOMENTS = [
    (Run, "_begin", False),
    (Run, "_begin", True),
    (optuna.Study, "set_user_attr", False),
    (optuna.Study, "set_user_attr", True),
]


@pytest.mark.parametrize(("owner", "name", "after"), MOMENTS)
def test_a_killed_machine_leaves_no_second_run_of_a_search(
    params, machine, monkeypatch, owner, name, after
):
    with monkeypatch.context() as patched:
        machine("first")
        kill(patched, owner, name, after)
        assert is_killed(lambda: share_parent(params))
    machine("second")
    key = share_parent(params)
    machine("first")
    assert share_parent(params) == key
    assert names_of_runs() == ["parent"]
    assert mlflow.get_run(mlflow_client.server_run_id(key)).data.params == {"a": "1"}


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [*MOMENTS[:2], (RunningTrial, "set_attributes", False), (RunningTrial, "set_attributes", True)],
)
def test_a_killed_worker_leaves_no_second_run_of_its_trial(
    params, cohort, machine, monkeypatch, owner, name, after
):
    machine("first")
    share_parent(params)
    with monkeypatch.context() as patched:
        kill(patched, owner, name, after)
        assert is_killed(lambda: evaluate_trials(params, cohort))
    machine("second")
    assert len(evaluate_trials(params, cohort).complete) == 1
    machine("first")
    assert names_of_runs() == ["parent", "trial=0"]


def test_a_run_that_somebody_deleted_is_created_again(params, machine):
    machine("first")
    key = share_parent(params)
    mlflow.delete_run(mlflow_client.server_run_id(key))
    assert share_parent(params) != key
    assert names_of_runs() == ["parent"]
