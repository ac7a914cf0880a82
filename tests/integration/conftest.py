"""The finished project that several integration tests start from."""

import os
import shutil
import sys
from pathlib import Path

import pytest
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
