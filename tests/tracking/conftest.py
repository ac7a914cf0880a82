"""A working directory with an empty MLflow store."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from pipeline.gem.tracking import mlflow_client


@pytest.fixture
def store(tmp_path, monkeypatch, migrated_store) -> Iterator[Path]:
    """The folder of mlflow.db, which is the working directory."""
    before = mlflow.get_tracking_uri()
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    # Absolute: MLflow keeps stores by their address, and a relative path changes with the folder.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow_client.connect("gem")
    yield tmp_path
    mlflow.set_tracking_uri(before)
