"""Several machines run one search: a real PostgreSQL, a real MLflow server, one machine killed."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
import optuna
import pandas as pd
import psycopg
import pytest
from support.processes import free_port, until
from support.repository import Repository
from support.settings import TINY

from pipeline.gem.search.study_db import StudyStorage

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
MACHINES, TRIALS = 3, 6

pytestmark = pytest.mark.skipif(
    not BINARIES, reason="no PostgreSQL in /usr/lib/postgresql; apt-get install postgresql"
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of an empty server. PostgreSQL refuses to run as root."""
    folder, port, owner = Path(tempfile.mkdtemp()), free_port(), {}
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        owner = {"user": user.pw_uid, "group": user.pw_gid}
        os.chown(folder, user.pw_uid, user.pw_gid)

    def call(program: str, *arguments: str) -> None:
        command = [str(BINARIES[-1] / program), "-D", str(folder / "data"), *arguments]
        quiet = {"stdout": subprocess.DEVNULL, "timeout": 120}
        subprocess.run(command, cwd=folder, check=True, **quiet, **owner)

    call("initdb", "--auth", "trust", "--username", "gem", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    call("pg_ctl", "start", "--wait", "--log", str(folder / "log"), "--options", options)
    yield f"postgresql://gem@127.0.0.1:{port}/postgres"
    call("pg_ctl", "stop", "--mode", "immediate")
    shutil.rmtree(folder)


@pytest.fixture
def machines(no_figures, cohort, tmp_path) -> list[Repository]:
    """Repositories that share nothing but the servers."""
    repositories = []
    for number in range(MACHINES):
        folder, params = tmp_path / f"machine{number}", TINY | {"tune.trials": TRIALS}
        repositories.append(Repository(folder, params))
        shutil.copytree(cohort.folder, folder / "data" / "cohort")
    return repositories


def running_trials(postgres: str) -> int:
    """The number of running trials with an MLflow run."""
    query = (
        "SELECT count(*) FROM trials JOIN trial_user_attributes USING (trial_id) "
        "WHERE state = 'RUNNING' AND key = 'mlflow_run'"
    )
    with psycopg.connect(postgres) as connection:
        try:
            return connection.execute(query).fetchone()[0]
        except psycopg.errors.UndefinedTable:
            return 0


def trials_of(postgres: str) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(postgres.replace("postgresql:", "postgresql+psycopg:"))
    name = next(name for name in optuna.get_all_study_names(storage) if "." not in name)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    return trials


def test_three_machines_share_the_budget_and_lose_no_trial_of_a_killed_one(
    postgres, server, machines
):
    environment = {"OPTUNA_STORAGE": postgres, "MLFLOW_TRACKING_URI": server.address}
    arguments = ("pipeline.tune", "--search", "latent_kl")
    stages = [repository.start(*arguments, **environment) for repository in machines]
    try:
        until(lambda: running_trials(postgres) >= MACHINES)
        stages[0].send_signal(signal.SIGKILL)
        codes = [stage.wait(timeout=900) for stage in stages]
    finally:
        for stage in stages:
            stage.kill()
    logs = [repository.log("pipeline.tune") for repository in machines]
    assert codes == [-signal.SIGKILL, 0, 0], "\n".join(logs)

    folders = [repository.folder / "experiments" / "latent_kl" for repository in machines[1:]]
    table, other = (pd.read_csv(folder / "trials.csv") for folder in folders)
    pd.testing.assert_frame_equal(table, other)
    assert len(table) == TRIALS and set(table["state"]) <= {"complete", "pruned"}
    assert not table.iloc[:, 5:].duplicated().any()
    assert len({(folder / "best.yaml").read_bytes() for folder in folders}) == 1

    (lost,) = (trial for trial in trials_of(postgres) if "deaths" in trial.user_attrs)
    client = mlflow.MlflowClient(server.address)
    runs = client.search_runs([client.get_experiment_by_name("gem").experiment_id], max_results=200)
    names = [run.info.run_name for run in runs]
    assert names.count("latent_kl") == 1 and names.count("latent_kl winner") == 1
    assert sum(name.startswith("latent_kl trial") for name in names) == TRIALS
    status = {run.info.run_id: run.info.status for run in runs}
    assert set(status.values()) <= {"FINISHED", "KILLED"}, "KILLED: pruned"
    assert lost.user_attrs["mlflow_run"] in status


def test_the_lock_of_a_server_is_released_when_its_holder_dies(postgres, monkeypatch):
    monkeypatch.setenv("OPTUNA_STORAGE", postgres)
    child = os.fork()
    if child == 0:
        with StudyStorage().lock():
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    storage = StudyStorage()
    with storage.lock():
        pass
    storage.storage.engine.dispose()
