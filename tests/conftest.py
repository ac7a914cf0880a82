"""Fixtures of all tests: a tiny cohort and a tiny model, made by the code of the real stages."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

# Before torch, as in a stage: the threads of a forked stage do not spin either.
import pipeline  # noqa: F401

# isort: split
import filelock
import numpy as np
import psutil
import pytest
import torch
from support.processes import TrackingServer
from support.repository import Repository
from support.settings import ROOT, TINY, at_source
from threadpoolctl import threadpool_limits

from pipeline.gem.common.config import Covariates, Data, Latent, Model, Params, read_params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.preparation.prepare import write_cohort

TEMPORARY_BYTES = 8 * 2**30  # ten times what the folders of all tests take

# The longest integration tests, longest first. One process runs a whole file (`--dist loadfile`),
# so a long file that starts last would keep the other processes waiting.
LONGEST = (
    "pipeline",
    "workers",
    "tune",
    "documentation",
    "outage",
    "real_data",
    "registration",
    "sealed",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--times", type=int, default=1, help="repetitions of each fault in tests/faults"
    )


def pytest_configure() -> None:
    """Folders of tests lie in memory where there is enough: on a disk that takes long for each
    fsync, hundreds of databases take most of the time."""
    memory, variable = Path("/dev/shm"), "PYTEST_DEBUG_TEMPROOT"
    if variable not in os.environ and memory.is_dir() and os.access(memory, os.W_OK):
        can_execute = not os.statvfs(memory).f_flag & os.ST_NOEXEC
        free = min(shutil.disk_usage(memory).free, psutil.virtual_memory().available)
        if can_execute and free > TEMPORARY_BYTES:
            os.environ[variable] = str(memory)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the figures that the tests of faults measured."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    for report in reports:
        for name, text in report.user_properties:
            if name == "figure":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {text}")


@pytest.fixture
def times(request) -> int:
    """How often a test of faults repeats its fault; `make faults TIMES=20`."""
    return request.config.getoption("--times")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything under tests/integration and tests/faults; the longest files come first."""

    def position(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        if item.path.parent.name != "integration":
            return len(LONGEST) + 1
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    for item in items:
        if item.path.parent.name in ("integration", "faults"):
            item.add_marker(pytest.mark.integration)
    items.sort(key=position)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A read-only folder that the first test process fills and all others wait for."""
    own = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each process a folder of its own in a common one.
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(name: str, fill: Callable[[Path], object]) -> Path:
        folder, complete = shared / name, shared / f"{name}.complete"
        with filelock.FileLock(f"{folder}.lock"):
            if not complete.exists():
                folder.mkdir(exist_ok=True)
                fill(folder)
                complete.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small shapes are fastest on one thread, and two test processes do not fight."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def params() -> Params:
    """params.yaml with a tiny cohort and a tiny model."""
    return read_params(ROOT / "params.yaml").override(TINY | {"model.observation": "normal"})


@pytest.fixture(scope="session")
def dosed(params) -> Data:
    """Declarations of a hand-made cohort: context is the tissue, and there is a dose."""
    covariates = {
        "technical": {"study": {"kind": "categorical"}},
        "biological": {"tissue": {"kind": "categorical"}},
        "perturbation": {
            "perturbation": {"kind": "categorical"},
            "perturbation_dose": {"kind": "numeric", "scale": "log"},
        },
    }
    return params.data.model_copy(
        update={"covariates": Covariates.model_validate(covariates), "context_columns": ("tissue",)}
    )


@pytest.fixture(scope="session")
def source_folder(params, shared_folder) -> Path:
    """A synthetic source folder, written by the real stage's code."""
    from pipeline.gem.simulation.write import write_source

    def fill(folder: Path) -> None:
        write_source(params.synthesize, folder / "synthetic")

    return shared_folder("source", fill) / "synthetic"


@pytest.fixture(scope="session")
def cohort(params, source_folder, shared_folder) -> Cohort:
    """The prepared tiny cohort; read only."""
    data = params.override(at_source(source_folder)).data

    def fill(folder: Path) -> None:
        write_cohort(open_source(data), data, params.splits, folder / "cohort")

    cohort = Cohort(shared_folder("prepared", fill) / "cohort")
    for table in cohort.features.values():
        table.values.setflags(write=False)  # a test that changed it would change the tests after it
    return cohort


@pytest.fixture(scope="module")
def no_figures() -> Iterator[None]:
    """Stages forked by these tests draw no figures of a training or a search: they are slow."""
    from pipeline.gem.common.files import write_json
    from pipeline.gem.search import figures
    from pipeline.gem.training import model_directory

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model_directory, "learning_curves", lambda _, path: write_json(path, {}))
        patched.setattr(figures, "draw", lambda *_: None)
        yield


@pytest.fixture
def small_model(params) -> Model:
    """A tiny network with every part of GEM. Without dropout, only the latents are random."""
    sizes = {
        "latent": Latent(technical=2, biological=3, perturbation=2),
        "hidden": 8,
        "blocks": 1,
        "prior_blocks": 1,
        "interactions": 4,
    }
    return params.model.model_copy(update=sizes | {"dropout": 0.0, "additive_technical": True})


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def model_directory(cohort, params, shared_folder) -> Path:
    """A model directory with two training seeds, for whoever only reads it."""
    from pipeline.gem.training.blend import blend_with_mixed_model
    from pipeline.gem.training.dataset import TrainingData
    from pipeline.gem.training.model_directory import write_model_directory
    from pipeline.gem.training.multi_seed import fit_and_refit

    def fill(folder: Path) -> None:
        changed = params.override({"train.seeds": [1, 2], "train.epochs": 8})
        data = TrainingData.load(cohort, torch.device("cpu"))
        results = [fit_and_refit(data, changed, cohort, seed) for seed in changed.train.seeds]
        results = blend_with_mixed_model(results, data, cohort)
        write_model_directory(folder / "default", results, changed, cohort.train_validation_sha256)

    return shared_folder("experiments", fill) / "default"


@pytest.fixture(scope="session")
def migrated_store(shared_folder) -> Path:
    """An empty MLflow database to copy. To create one takes seconds."""
    import mlflow

    def fill(folder: Path) -> None:
        # MLflow writes the working directory into it, and this repository may have artifacts.
        with chdir(folder):
            mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()

    return shared_folder("store", fill) / "mlflow.db"


@pytest.fixture
def store(tmp_path, monkeypatch, migrated_store) -> Iterator[Path]:
    """The folder of an empty mlflow.db, which is the working directory."""
    import mlflow

    from pipeline.gem.tracking import mlflow_client

    before = mlflow.get_tracking_uri()
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    # Absolute: MLflow keeps stores by their address, and a relative path changes with the folder.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow_client.connect("gem")
    yield tmp_path
    mlflow.set_tracking_uri(before)


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
