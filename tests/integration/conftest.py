"""The finished project and the MLflow server that several integration tests start from."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import TrackingServer
from support.repository import Repository
from support.settings import ROOT, TINY


@pytest.fixture(scope="session")
def finished(shared_folder) -> Path:
    """A project after `make`: all stages have run on a tiny cohort. Copy it before a change."""

    def fill(folder: Path) -> None:
        project = Repository(folder / "project", TINY)
        for part in ("docs", "benchmarks", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, project.folder / part, ignore=ignored)
        for part in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / part, project.folder / part)
        (project.folder / ".venv").symlink_to(Path(sys.prefix))
        # `make` must find the environment newer than the lock file.
        os.utime(project.folder / "requirements.lock", (0, 0))
        project.commit("documentation and tests")
        project.dvc("repro")

    return shared_folder("finished", fill) / "project"


@pytest.fixture(scope="module")
def server(tmp_path_factory, migrated_store) -> Iterator[TrackingServer]:
    """A real MLflow server with an empty store."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_store, folder / "mlflow.db")
    server = TrackingServer(folder).start()
    yield server
    server.kill()
