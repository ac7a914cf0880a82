"""Several machines at one search: a real PostgreSQL, a real MLflow server, three folders, one machine killed."""

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
from support.processes import TrackingServer, free_port, until
from support.repository import Repository
from support.settings import TINY

from pipeline.gem.common.errors import InputError
from pipeline.gem.search.study_db import StudyStorage, storage_url

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
MACHINES, TRIALS = 3, 9

needs_postgres = pytest.mark.skipif(
    not BINARIES, reason="no PostgreSQL under /usr/lib/postgresql; apt-get install postgresql"
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The address of an empty server. PostgreSQL refuses root: it runs as the user of that name, in a folder that this user may enter."""
    folder, port = Path(tempfile.mkdtemp()), free_port()
    owner = {}
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        owner = {"user": user.pw_uid, "group": user.pw_gid}
        os.chown(folder, user.pw_uid, user.pw_gid)

    def call(program: str, *arguments: str) -> None:
        command = [str(BINARIES[-1] / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(
            command, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=120, **owner
        )

    call("initdb", "--auth", "trust", "--username", "gem", "--no-sync")
    call(
        "pg_ctl",
        "start",
        "--wait",
        "--log",
        str(folder / "log"),
        "--options",
        f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off",
    )
    yield f"postgresql://gem@127.0.0.1:{port}/postgres"
    call("pg_ctl", "stop", "--mode", "immediate")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory, migrated_store) -> Iterator[str]:
    """The address of an MLflow server."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_store, folder / "mlflow.db")
    server = TrackingServer(folder)
    try:
        yield server.start().address
    finally:
        server.kill()


@pytest.fixture
def machines(undrawn, cohort, tmp_path) -> list[Repository]:
    """Folders that share nothing but the servers."""
    found = [
        Repository(tmp_path / f"machine{number}", TINY | {"tune.trials": TRIALS})
        for number in range(MACHINES)
    ]
    for repository in found:
        shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    return found


def running(postgres: str) -> int:
    """Trials that run and are tracked."""
    query = "SELECT count(*) FROM trials JOIN trial_user_attributes USING (trial_id) WHERE state = 'RUNNING' AND key = 'mlflow_run'"
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


@needs_postgres
def test_three_machines_keep_the_budget_and_lose_no_trial_though_one_is_killed(
    postgres, server, machines
):
    environment = {
        "OPTUNA_STORAGE": postgres,
        "MLFLOW_TRACKING_URI": server,
        "GEM_HEARTBEAT_SECONDS": "1",
    }
    processes = [
        repository.start("pipeline.tune", "--search", "latent_kl", **environment)
        for repository in machines
    ]
    try:
        until(lambda: running(postgres) >= MACHINES)
        processes[0].send_signal(signal.SIGKILL)
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(repository.folder / "pipeline.tune.log").read_text() for repository in machines]
    assert codes == [-signal.SIGKILL, 0, 0], "\n".join(logs)

    tables = [
        pd.read_csv(repository.folder / "experiments/latent_kl/trials.csv")
        for repository in machines[1:]
    ]
    pd.testing.assert_frame_equal(*tables)
    assert len(tables[0]) == TRIALS and set(tables[0]["state"]) <= {"complete", "pruned"}
    assert len(tables[0].iloc[:, 5:].drop_duplicates()) == TRIALS, "a point was tried twice"
    best = [
        (repository.folder / "experiments/latent_kl/best.yaml").read_bytes()
        for repository in machines[1:]
    ]
    assert best[0] == best[1]

    trials = trials_of(postgres)
    lost = [trial for trial in trials if trial.state.name == "FAIL"]
    assert len(lost) == 1
    again = next(trial for trial in trials if trial.user_attrs.get("retry_of") == lost[0].number)
    assert again.params == lost[0].params and again.number in set(tables[0]["trial"])

    client = mlflow.MlflowClient(server)
    runs = client.search_runs([client.get_experiment_by_name("gem").experiment_id], max_results=200)
    names = [run.info.run_name for run in runs]
    assert names.count("latent_kl") == 1 and names.count("latent_kl winner") == 1
    assert sum(name.startswith("latent_kl trial") for name in names) == TRIALS + 1
    status = {run.info.run_id: run.info.status for run in runs}
    assert set(status.values()) <= {"FINISHED", "KILLED"}
    assert status[lost[0].user_attrs["mlflow_run"]] == "KILLED"


@needs_postgres
def test_the_lock_of_a_server_is_free_when_its_holder_dies(postgres, monkeypatch):
    monkeypatch.setenv("OPTUNA_STORAGE", postgres)
    child = os.fork()
    if child == 0:
        with StudyStorage().lock():
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert (
        os.WTERMSIG(status) == signal.SIGKILL
    )  # it died with the lock in its hands, and the next line does not wait
    storage = StudyStorage()
    with storage.lock():
        pass
    storage.storage.engine.dispose()


@pytest.mark.parametrize(
    "text",
    ["postgresql://a:secret@h/d", "postgres://a:secret@h/d", "postgresql+psycopg://a:secret@h/d"],
)
def test_every_spelling_of_postgresql_is_taken(monkeypatch, text):
    monkeypatch.setenv("OPTUNA_STORAGE", text)
    assert (
        storage_url().render_as_string(hide_password=False) == "postgresql+psycopg://a:secret@h/d"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "mysql://a:secret@h/d",
            r"OPTUNA_STORAGE is mysql://a:\*\*\*@h/d: expected sqlite:///FILE \(one machine\) or postgresql",
        ),
        ("sqlite://", "a database in memory is gone with its process"),
        (
            "nonsense",
            "OPTUNA_STORAGE is no database address; expected sqlite:///FILE or postgresql",
        ),
    ],
)
def test_a_database_that_cannot_be_shared_is_refused_without_its_password(
    monkeypatch, text, expected
):
    monkeypatch.setenv("OPTUNA_STORAGE", text)
    with pytest.raises(InputError, match=expected) as caught:
        storage_url()
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line_without_its_password(monkeypatch):
    monkeypatch.setenv("OPTUNA_STORAGE", f"postgresql://a:secret@127.0.0.1:{free_port()}/d")
    with pytest.raises(
        InputError,
        match=r"OPTUNA_STORAGE: postgresql\+psycopg://a:\*\*\*@127.* cannot be opened \(.*refused.*start the server",
    ) as caught:
        StudyStorage()
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
