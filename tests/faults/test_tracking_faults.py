"""Servers that hang cost seconds, and nothing shows a password. tests/tracking has the cases in
detail."""

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.repository import Repository
from support.settings import TINY

PASSWORD = "hunter2-secret"


@pytest.fixture
def repository(no_figures, cohort, migrated_store, tmp_path) -> Repository:
    repository = Repository(tmp_path / "repository", TINY | {"train.epochs": 2})
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    return repository


@contextmanager
def hanging_server() -> Iterator[tuple[str, list[socket.socket]]]:
    """The address of a server that accepts and never answers, and its connections."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", connections
        finally:
            server.shutdown(socket.SHUT_RDWR)  # ends the thread's `accept`
            thread.join()
            for connection in connections:
                connection.close()


def test_a_server_that_hangs_costs_seconds(repository, record_property):
    with hanging_server() as (address, connections):
        output = repository.stage(
            "pipeline.train", MLFLOW_TRACKING_URI=address, MLFLOW_HTTP_REQUEST_TIMEOUT="3"
        )
    assert output.count("does not answer") == 1 and "Traceback" not in output
    assert (repository.folder / "experiments/default/model.safetensors").exists()
    assert len(connections) == 2, "3 s each; by default 5 s"
    record_property("figure", f"{len(connections)} requests of 5 s, then none")


TRAIN, TUNE = ("pipeline.train",), ("pipeline.tune", "--search", "latent_kl")


@pytest.mark.parametrize(
    ("stage", "variable", "address", "code"),
    [
        (TRAIN, "MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:9/?password={PASSWORD}", 0),
        (TRAIN, "MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}#@127.0.0.1:9", 2),
        (TUNE, "OPTUNA_STORAGE", f"postgresql://me:{PASSWORD}@127.0.0.1:9/d?password=x", 2),
    ],
)
def test_no_file_and_no_message_shows_a_password(repository, stage, variable, address, code):
    output = repository.stage(*stage, expect=code, **{variable: address})
    assert "Traceback" not in output and "***" in output
    files = [path for path in repository.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
    assert not [path for path in files if PASSWORD in str(path)]
