"""Workers of a search, killed at random: exactly the budget, no trial lost, none twice."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import mlflow
import optuna
import pandas as pd
import psycopg
import pytest
from support.processes import POSTGRES, postgres_server
from support.repository import Repository, Stage
from support.settings import TINY

from pipeline.gem.common import yaml_file
from pipeline.gem.common.errors import InputError
from pipeline.gem.search.study_db import StudyStorage

MACHINES, TRIALS, SEED = 3, 6, 0
SEARCH = f"""
description: of this test
space:
  model.latent.technical: {{type: integer, low: 2, high: 64, log: true}}
  train.kl_weight.technical: {{type: float, low: 0.01, high: 4.0, log: true}}
baseline: {{model: {{latent: {{technical: 4}}}}, train: {{kl_weight: {{technical: 1.0}}}}}}
objective: {{metric: predictive_log_likelihood, direction: maximize}}
sampler: {{name: tpe, seed: 1, startup_trials: 3}}
pruner: {{name: median, startup_trials: 3, warmup_epochs: 1}}
trials: {TRIALS}
epochs: 3
seeds: [1]
confirm: {{top: 1, seeds: [2], epochs: 1}}
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The address of an empty PostgreSQL database."""
    if not POSTGRES:
        pytest.skip("no PostgreSQL in /usr/lib/postgresql; apt-get install postgresql")
    with postgres_server() as address:
        yield address


@pytest.fixture
def new_search(no_figures, cohort, migrated_store, tmp_path) -> Callable[[int], list[Repository]]:
    """Makes repositories with one search, which share nothing but the storage that a test names."""

    def machines(seed: int) -> list[Repository]:
        repositories = []
        changes = TINY | {"train.epochs": 2, "tracking.experiment": f"gem {seed}"}
        for number in range(MACHINES):
            repository = Repository(tmp_path / f"search{seed}" / f"machine{number}", changes)
            search = repository.folder / "experiments" / "searches" / "shared.yaml"
            search.write_text(SEARCH)
            yaml_file.edit(search, {"sampler.seed": seed})
            shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
            shutil.copy(migrated_store, repository.folder / "mlflow.db")
            repositories.append(repository)
        return repositories

    return machines


@pytest.mark.parametrize("database", ["SQLite", "PostgreSQL"])
def test_three_machines_killed_at_random_finish_exactly_the_budget(
    new_search, database, request, server, tmp_path, times, record_property
):
    """One search after the other, until `times` running workers were killed."""
    moments, seed, kills, trials = random.Random(SEED), 0, 0, 0
    while kills < times:
        seed += 1
        assert seed <= times + 5, f"{seed - 1} searches: {kills} kills met a running worker"
        environment = {"OPTUNA_STORAGE": f"sqlite:///{tmp_path}/shared{seed}.db"}
        if database == "PostgreSQL":
            address = new_database(request.getfixturevalue("postgres"), f"search{seed}")
            environment = {"OPTUNA_STORAGE": address, "MLFLOW_TRACKING_URI": server.address}
        machines = new_search(seed)
        kills += run_and_kill(machines, environment, min(MACHINES, times - kills), moments)
        trials += check_search(environment["OPTUNA_STORAGE"], machines).total()
        if database == "PostgreSQL":
            names = names_of_runs(server.address, f"gem {seed}")
            assert names.count("shared") == names.count("shared winner") == 1
            assert sum(" trial=" in name for name in names) == TRIALS + 2, "one run a trial"
    record_property(
        "figure",
        f"{database}: {kills} running workers killed in {seed} searches: {trials} of "
        f"{seed * TRIALS} trials, none twice, none left",
    )


def run_and_kill(
    machines: list[Repository], environment: dict[str, str], kills: int, moments: random.Random
) -> int:
    """Runs a search on all machines. The first `kills` are killed in turn and started again, each
    once, because a trial that loses four workers has failed. Returns how many were running."""

    def start(repository: Repository) -> Stage:
        return repository.start("pipeline.tune", "--search", "shared", **environment)

    stages, met = [start(repository) for repository in machines], 0
    for index in range(kills):
        time.sleep(moments.uniform(0.2, 3.0))
        stages[index].kill()
        met += stages[index].wait() == -signal.SIGKILL
        stages[index] = start(machines[index])
    codes = [stage.wait(timeout=600) for stage in stages]
    logs = "\n".join(repository.log("pipeline.tune") for repository in machines)
    assert codes == [0] * MACHINES, logs[-3000:]
    return met


def new_database(address: str, name: str) -> str:
    """The address of a new database beside the one at `address`."""
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{address.rpartition('/')[0]}/{name}"


def names_of_runs(address: str, experiment: str) -> list[str]:
    client = mlflow.MlflowClient(address)
    identity = client.get_experiment_by_name(experiment).experiment_id
    runs = client.search_runs([identity], max_results=200)
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}, "KILLED: pruned"
    return [run.info.run_name for run in runs]


def check_search(storage: str, machines: list[Repository]) -> Counter:
    """The states of the trials: exactly the budget, each point once, the same tables everywhere."""
    database = optuna.storages.RDBStorage(storage.replace("postgresql:", "postgresql+psycopg:"))
    for name in optuna.get_all_study_names(database):
        trials = optuna.load_study(study_name=name, storage=database).trials
        states = Counter(trial.state.name for trial in trials)
        assert set(states) <= {"COMPLETE", "PRUNED"}, states
        assert len({tuple(trial.params.values()) for trial in trials}) == len(trials)
        if "." not in name:
            counts = states
    database.engine.dispose()
    folders = [repository.folder / "experiments" / "shared" for repository in machines]
    tables = [pd.read_csv(folder / "trials.csv") for folder in folders]
    assert all(table.equals(tables[0]) for table in tables)
    assert len(tables[0]) == counts.total() == TRIALS
    assert len({(folder / "best.yaml").read_bytes() for folder in folders}) == 1
    return counts


def test_the_lock_of_a_server_is_released_when_its_holder_dies(postgres, monkeypatch):
    monkeypatch.setenv("OPTUNA_STORAGE", postgres)
    child = os.fork()
    if child == 0:
        with StudyStorage().lock():
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    storage = StudyStorage()
    with storage.lock(), storage.worker() as worker:
        assert storage.running_workers() == {worker}
    with storage.lock():
        assert storage.running_workers() == set()
    storage.close()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("horse", "battery"), "password authentication failed.*correct the user or the password"),
        (("/postgres", "/absent"), 'database "absent" does not exist.*create it'),
    ],
)
def test_a_server_that_refuses_is_one_line_without_the_password(
    postgres, monkeypatch, change, expected
):
    monkeypatch.setenv("OPTUNA_STORAGE", postgres.replace(*change))
    with pytest.raises(InputError, match=expected) as caught:
        StudyStorage()
    assert "\n" not in str(caught.value)
    assert "horse" not in str(caught.value) and "battery" not in str(caught.value)
