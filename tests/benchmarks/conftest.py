"""A folder with a tiny .h5ad and its YAML, and a project with an MLflow store."""

import shutil
from pathlib import Path

import anndata
import mlflow
import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT, TINY

from pipeline.gem.common import yaml_file

DECLARATION = """\
data:
  covariates:
    technical: {batch: {kind: categorical}}
    biological: {donor: {kind: categorical}}
    perturbation:
      perturbation: {kind: categorical}
      perturbation_time: {kind: numeric, scale: log}
  context_columns: [donor]
  control: {column: perturbation, value: control}
hold_out: pairs
at_most: 2
"""


@pytest.fixture(scope="session")
def samples() -> pd.DataFrame:
    """Three donors, a control and two drugs, two times, two replicates."""
    rows = [
        (f"donor {donor}", drug, time, f"batch {replicate}")
        for donor in range(3)
        for drug in ("control", "drug A", "drug B")
        for time in ("1 day", "3 hours")
        for replicate in range(2)
    ]
    columns = ["donor", "perturbation", "perturbation_time", "batch"]
    return pd.DataFrame(rows, columns=columns, index=[f"s{n:02d}" for n in range(len(rows))])


@pytest.fixture
def cohorts(tmp_path, samples) -> Path:
    """A folder with tiny.h5ad and tiny.yaml. Each donor and each drug has an effect."""
    rng = np.random.default_rng(0)
    log_mean = 4 + rng.normal(size=70)
    for column, size in (("donor", 0.5), ("perturbation", 1.0)):
        effects = {level: size * rng.normal(size=70) for level in samples[column].unique()}
        log_mean = log_mean + np.stack([effects[level] for level in samples[column]])
    counts = rng.poisson(np.exp(log_mean)).astype(np.int32)
    var = pd.DataFrame(index=[f"g{n:02d}" for n in range(70)])
    folder = tmp_path / "cohorts"
    folder.mkdir()
    anndata.AnnData(counts, obs=samples, var=var).write_h5ad(folder / "tiny.h5ad")
    (folder / "tiny.yaml").write_text(DECLARATION)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, migrated_store) -> Path:
    """A working directory with params.yaml and an MLflow store."""
    before = mlflow.get_tracking_uri()
    shutil.copy(ROOT / "params.yaml", tmp_path)
    yaml_file.edit(
        tmp_path / "params.yaml", TINY | {"train.epochs": 2, "tracking.experiment": "gem"}
    )
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    yield tmp_path
    mlflow.set_tracking_uri(before)
