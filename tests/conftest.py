"""A tiny cohort for all tests, made once by the real stages' code; and how the test processes share the work."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from support.settings import ROOT, TINY, at_source

from pipeline.gem.common.config import Covariates, Data, Latent, Model, Params, read_params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.preparation.prepare import write_cohort

# Files that take longest, longest first: a file is tested by one process, and a long one that starts last keeps the others waiting.
LONGEST = tuple(
    f"test_{name}.py"
    for name in (
        "pipeline",
        "workers",
        "tune",
        "outage",
        "real_data",
        "registration",
        "sealed",
        "train",
        "postgres",
        "oracle",
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder for all test processes: the first that asks makes it, the others wait; read only."""
    own = tmp_path_factory.getbasetemp()
    shared = (
        own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    )  # pytest-xdist gives each process a folder in a common one

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with filelock.FileLock(f"{folder}.lock"):
            if not made.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small shapes are fastest on one thread, and two test processes do not fight."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def params() -> Params:
    """params.yaml with a tiny cohort and a tiny model."""
    return read_params(ROOT / "params.yaml").override(TINY)


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
def source_folder(params, made_once) -> Path:
    """A synthetic source folder, written by the real stage's code."""
    from pipeline.synthesize import write_source

    return (
        made_once("source", lambda folder: write_source(params.synthesize, folder / "synthetic"))
        / "synthetic"
    )


@pytest.fixture(scope="session")
def cohort(params, source_folder, made_once) -> Cohort:
    """The prepared tiny cohort; read only."""
    data = params.override(at_source(source_folder)).data
    return Cohort(
        made_once(
            "prepared",
            lambda folder: write_cohort(open_source(data), data, params.splits, folder / "cohort"),
        )
        / "cohort"
    )


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Stages forked from here draw no figures of a search, which cost more than its trials; test_pipeline.py sees them drawn."""
    from pipeline.gem.search import results

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(results, "draw", lambda *_: None)
        yield


@pytest.fixture
def small_model(params) -> Model:
    """Parameters of a network that costs nothing, with every part that GEM has; without dropout, so that only latents are random."""
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
def model_directory(cohort, params, made_once) -> Path:
    """A model directory with two training seeds, for whoever only reads it."""
    from pipeline.gem.training.dataset import TrainingData
    from pipeline.gem.training.model_directory import write_model_directory
    from pipeline.gem.training.trainer import fit

    def make(folder: Path) -> None:
        changed, data = (
            params.override({"train.seeds": [1, 2], "train.epochs": 8}),
            TrainingData.load(cohort, torch.device("cpu")),
        )
        write_model_directory(
            folder / "default", [fit(data, changed, seed) for seed in changed.train.seeds], changed
        )

    return made_once("experiments", make) / "default"


@pytest.fixture(scope="session")
def migrated_store(made_once) -> Path:
    """An empty MLflow database, to be copied: making one takes seconds."""
    import mlflow

    return (
        made_once(
            "store",
            lambda folder: mlflow.MlflowClient(
                f"sqlite:///{folder}/mlflow.db"
            ).search_experiments(),
        )
        / "mlflow.db"
    )
