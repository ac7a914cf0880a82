"""The SQLite file of a local store: what is wrong with it is one line before any work, or a
warning; a project that was moved or copied writes into itself."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow.store.model_registry import sqlalchemy_store as model_registry
from mlflow.store.tracking import sqlalchemy_store as tracking
from mlflow.tracking._tracking_service.utils import _tracking_store_registry

from pipeline.gem.common.errors import InputError
from pipeline.gem.common.processes import file_lock
from pipeline.gem.tracking import connection, mlflow_client, offline_buffer, runs
from pipeline.gem.tracking.model_registry import register_models
from pipeline.gem.tracking.runs import Run


def execute(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        for statement in statements:
            database.execute(statement)


def forget_stores() -> None:
    """MLflow keeps connections by address: here one process plays several."""
    for store in (tracking.SqlAlchemyStore, model_registry.SqlAlchemyStore):
        for engine in store._engine_map.values():
            engine.dispose()
        store._engine_map.clear()
    _tracking_store_registry._get_store_with_resolved_uri.cache_clear()


def older(file: Path) -> None:
    execute(file, "UPDATE alembic_version SET version_num = '451aebb31d03'")


def newer(file: Path) -> None:
    execute(file, "UPDATE alembic_version SET version_num = 'ffffffffffff'")


def foreign(file: Path) -> None:
    file.unlink()
    execute(file, "CREATE TABLE studies (id)", "CREATE TABLE alembic_version (version_num)")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zeros(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:8192] + bytes(32768) + content[40960:])


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def deleted(file: Path) -> None:
    execute(file, "UPDATE experiments SET lifecycle_stage = 'deleted'")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (older, "made by an MLflow before .* run `mlflow db upgrade sqlite:///mlflow.db`"),
        (newer, "probably a newer one .*; install that release, or move the file aside"),
        (foreign, r"no database of MLflow \(tables: alembic_version, studies\); move it aside"),
        (cut, "restore a copy, or move it aside"),
        (zeros, "restore a copy, or move it aside"),
        (
            lambda file: file.write_text("a text\n" * 99),
            "file is not a database.*; move it aside, or set MLFLOW_TRACKING_URI",
        ),
        (folder, "is no file; move it aside"),
        (deleted, "experiment gem is deleted .*mlflow experiments restore -x 1`, or set another"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_before_the_work(store, damage, message):
    damage(store / "mlflow.db")
    with pytest.raises(InputError, match=message) as caught:
        mlflow_client.connect("gem")
    (problem,) = caught.value.problems
    assert len(problem) <= 300 and "mlflow.db" in problem


def test_an_empty_store_is_made_anew(store):
    (store / "mlflow.db").write_bytes(b"")
    (store / ".mlflow.db.1.new").write_text("of a killed process")
    forget_stores()
    mlflow_client.connect("gem")
    with Run.open("default", "train") as run:
        pass
    assert mlflow.get_run(run.id).info.status == "FINISHED"
    assert not list(store.glob(".mlflow.db*"))


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr("pipeline.gem.tracking.local_store.LOCK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(connection, "RETRY_INTERVAL_S", 0.0)


def test_a_store_that_is_locked_costs_a_warning(store, impatient, caplog):
    with closing(sqlite3.connect(store / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        mlflow_client.connect("gem")
        with Run.open("default", "train") as run:
            run.log_metrics({"loss": 1.0}, step=1)
    assert caplog.text.count("sqlite:///mlflow.db cannot be used (database is locked)") == 1
    mlflow_client.connect("gem")
    (logged,) = mlflow_client.find_runs("stage", "train")
    assert logged.info.status == "FINISHED" and logged.data.metrics == {"loss": 1.0}


def test_a_store_that_is_deleted_during_a_run_loses_nothing(
    store, impatient, caplog, migrated_store
):
    note = store / "note.txt"
    note.write_text("note")
    with Run.open("default", "train") as run:
        run.log_params({"a": 1})
        run.log_metrics({"loss": 2.0}, step=1)
        run.log_artifacts([note])
        (store / "mlflow.db").unlink()
        run.log_metrics({"loss": 1.0}, step=2)
    assert caplog.text.count("mlflow.db was deleted or replaced") == 1
    forget_stores()
    shutil.copy(migrated_store, store / "mlflow.db")
    mlflow_client.connect("gem")
    (logged,) = mlflow_client.find_runs("stage", "train")
    history = mlflow.MlflowClient().get_metric_history(logged.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]
    assert logged.info.status == "FINISHED" and logged.data.params == {"a": "1"}
    assert mlflow.artifacts.load_text(f"runs:/{logged.info.run_id}/note.txt") == "note"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError, "rejects a request (RuntimeError)"),
        (
            KeyError("x"),
            "fails by a bug of this program or of MLflow; report it (KeyError: 'x' at ",
        ),
        (OSError(28, "No space left"), "cannot be used ([Errno 28] No space left)"),
        (ValueError, "rejects a request (ValueError)"),
    ],
)
def test_whatever_a_library_raises_ends_no_work(
    store, impatient, monkeypatch, caplog, error, message
):
    with monkeypatch.context() as broken:

        def fail(*_, **__):
            raise error

        broken.setattr(mlflow.MlflowClient, "log_batch", fail)
        broken.setattr(offline_buffer, "write_json", fail if isinstance(error, OSError) else print)
        with Run.open("default", "train") as run:
            run.log_metrics({"loss": 1.0}, step=1)
    assert run.id
    # Not the one about git, which a process logs once.
    own = [record for record in caplog.records if record.name.startswith("pipeline.gem.tracking")]
    warnings = [record for record in own if record.levelname == "WARNING"]
    assert len(warnings) == (2 if isinstance(error, OSError) else 1)
    assert message in caplog.text


def test_a_bug_at_the_first_request_is_raised_as_it_is(store, monkeypatch):
    monkeypatch.setattr(connection, "_find_experiment", lambda: None + 1)
    with pytest.raises(TypeError):
        mlflow_client.connect("gem")


def test_a_store_that_another_process_holds_costs_a_warning(store, monkeypatch, caplog):
    monkeypatch.setattr(connection, "LOCK_TIMEOUT_S", 0.1)
    with file_lock(Path(".gem/mlflow.lock")):
        mlflow_client.connect("gem")
        assert register_models(store / "experiments") == {}
    message = "cannot be used (another process of this project holds .gem/mlflow.lock for 0.1 s)"
    assert caplog.text.count(message) == 1


# A project that was moved or copied


NAMES = ["new", "a b", "ü'\"é", "50%41 #?", ".dvc-x/tmp"]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_project_writes_into_itself(store, tmp_path_factory, monkeypatch, name):
    (store / "note.txt").write_text("before")
    with Run.open("before", "train") as before:
        before.log_artifacts([Path("note.txt")])
    project = tmp_path_factory.mktemp("copies") / name
    shutil.copytree(store, project)
    original = sorted(store.rglob("*"))
    content = (store / "mlflow.db").read_bytes()
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    forget_stores()
    for _ in range(2):
        mlflow_client.connect("gem")
        assert mlflow.artifacts.load_text(f"runs:/{before.id}/note.txt") == "before"
        with Run.open("after", "train") as after:
            after.log_artifacts([Path("note.txt")])
    assert sorted(store.rglob("*")) == original and (store / "mlflow.db").read_bytes() == content
    assert len(list(project.parent.rglob("artifacts/note.txt"))) == 3
    assert len(list(project.rglob("artifacts/note.txt"))) == 3


def test_places_that_somebody_has_chosen_stay(store, tmp_path_factory, monkeypatch):
    """Only what lies in the former folder of the project moves with it."""
    chosen = tmp_path_factory.mktemp("chosen") / "mlruns"
    mlflow.MlflowClient().create_experiment("elsewhere", f"{chosen}/7")
    project = tmp_path_factory.mktemp("copies") / "moved"
    shutil.copytree(store, project)
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    forget_stores()
    mlflow_client.connect("gem")
    client = mlflow.MlflowClient()
    places = {name: client.get_experiment_by_name(name) for name in ("gem", "elsewhere")}
    assert places["gem"].artifact_location == f"{project}/mlruns/1"
    assert places["elsewhere"].artifact_location == f"{chosen}/7"


def test_a_copy_without_its_artifacts_is_refused(store, tmp_path_factory, monkeypatch):
    with Run.open("before", "train") as before:
        (store / "note.txt").write_text("before")
        before.log_artifacts([Path("note.txt")])
    project = tmp_path_factory.mktemp("copy")
    shutil.copy(store / "mlflow.db", project)
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(InputError, match=r"without its artifacts; copy .*mlruns here too"):
        mlflow_client.connect("gem")


def test_a_store_outside_of_the_project_keeps_artifacts_beside_it(
    store, tmp_path_factory, monkeypatch, migrated_store
):
    outside = tmp_path_factory.mktemp("outside")
    shutil.copy(migrated_store, outside / "all.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{outside}/all.db")
    mlflow_client.connect("gem")
    with Run.open("default", "train") as run:
        pass
    assert mlflow.get_run(run.id).info.artifact_uri.startswith(f"{outside}/mlruns/")
    place = store / "mlruns" / "1"
    execute(outside / "all.db", f"UPDATE experiments SET artifact_location = '{place}'")
    mlflow_client.connect("gem")  # this project made it
    monkeypatch.chdir(tmp_path_factory.mktemp("other"))
    with pytest.raises(InputError, match=r"keeps its files in .*, another project"):
        mlflow_client.connect("gem")


def test_a_copy_that_dvc_removes_records_in_the_project(store, monkeypatch):
    copy = store / ".dvc" / "tmp" / "exps" / "standalone" / "tmpx"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow_client.connect("of an experiment")
    with Run.open("default", "train") as run:
        (copy / "note.txt").write_text("note")
        run.log_artifacts([Path("note.txt")])
    shutil.rmtree(copy)
    monkeypatch.chdir(store)
    mlflow_client.connect("of an experiment")
    assert mlflow.artifacts.load_text(f"runs:/{run.id}/note.txt") == "note"
    assert runs.exists(run.id)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("sqlite:///a/~/x.db", "~ is expanded by a shell only"),
        ("sqlite:///", "after three slashes"),
        ("http://user:hunter22@", "expected http://HOST:PORT"),
        ("postgresql://user:hunter22@host:x/db", "not the address of a database"),
    ],
)
def test_an_address_is_read_before_a_folder_is_made(store, monkeypatch, address, message):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(InputError, match=message) as caught:
        mlflow_client.connect("gem")
    assert "hunter22" not in str(caught.value)
    assert {path.name for path in store.iterdir()} == {"mlflow.db", ".gem"}
