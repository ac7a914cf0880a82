"""A tiny trained model, a query and reference samples for all tests of predictions."""

import sys

import numpy as np
import pandas as pd
import pytest

from pipeline.gem import GEM

COLUMNS = ["cell_type", "tissue", "sex", "age_years", "perturbation", "perturbation_dose"]


@pytest.fixture(scope="session")
def gem(model_directory) -> GEM:
    return GEM.load(model_directory)


@pytest.fixture(scope="session")
def query(cohort) -> pd.DataFrame:
    """40 experiments with some of the covariates, and a column that the model does not know."""
    rows = cohort.rows(["train"]).head(40)[["sample_id", *COLUMNS]]
    return rows.assign(remark="as planned").reset_index(drop=True)


@pytest.fixture(scope="session")
def reference(cohort) -> pd.DataFrame:
    """Raw counts of five samples, a column per gene."""
    names = cohort.rows(["train"])["sample_id"].head(5)
    counts = cohort.counts(["train"])[:5].astype(np.int64)
    return pd.DataFrame(counts, pd.Index(names, name="sample_id"), cohort.genes)


@pytest.fixture
def run_predict(monkeypatch, model_directory):
    """Runs the verb in this process."""
    from pipeline import predict

    def run(*options: object) -> None:
        arguments = ["predict", "--model", model_directory, *options]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        predict.main()

    return run
