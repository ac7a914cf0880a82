"""Any text may name a column: it is prepared, trained, saved, registered and predicted."""

import shutil
import sys

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.gem import GEM
from pipeline.gem.common.config import Data
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.evaluation.diagnostics import latent_table
from pipeline.gem.preparation.prepare import write_cohort
from pipeline.gem.tracking.model_registry import CHAMPION, NAME, register_models
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.model_directory import write_model_directory
from pipeline.gem.training.trainer import fit

# The columns of the synthetic cohort, renamed. perturbation is an embedding, with a table.
NAMES = {
    "study": "type",
    "library_selection": " . ",
    "library_layout": "..",
    "platform": "long " * 80 + "name",
    "tissue": "cell.line",
    "cell_type": "../../a|b, c; d",
    "disease": "keys",
    "sex": "values",
    "age_years": "__metadata__",
    "perturbation": "Größe 'µ' \"x\" [1] {%s} <b>",
    "perturbation_type": "forward",
    "perturbation_dose": "dose (µM)",
    "perturbation_time": "0",
    "study_date": "class",
}


@pytest.fixture
def renamed(params, source_folder, tmp_path) -> Cohort:
    """The tiny cohort under the names of NAMES."""
    source = tmp_path / "source"
    shutil.copytree(source_folder, source, ignore=shutil.ignore_patterns("truth"))
    samples = pd.read_parquet(source / "samples.parquet").rename(columns=NAMES)
    samples.to_parquet(source / "samples.parquet")
    data = params.data.model_dump(mode="json")
    data |= {"source": str(source), "target_gene": str(source / "targets.parquet")}
    data["covariates"] = {
        group: {NAMES[name]: covariate for name, covariate in covariates.items()}
        for group, covariates in data["covariates"].items()
    }
    table = str(source / "embeddings" / "perturbation.parquet")
    data["covariates"]["perturbation"][NAMES["perturbation"]]["table"] = table
    data["context_columns"] = [NAMES["tissue"], NAMES["cell_type"]]
    data["control"]["column"] = NAMES["perturbation"]
    data |= {"study_column": NAMES["study"], "date_column": NAMES["study_date"]}
    declared = Data.model_validate(data)
    write_cohort(open_source(declared), declared, params.splits, tmp_path / "cohort")
    return Cohort(tmp_path / "cohort")


@pytest.mark.usefixtures("no_figures")
def test_columns_of_any_name_train_predict_and_are_registered(
    renamed, cohort, params, store, monkeypatch
):
    assert [*renamed.declared.covariates.all()] == [*NAMES.values()][:-1]
    changed, predictions, directory = params.override({"train.epochs": 2}), [], None
    for number, data in enumerate((renamed, cohort)):
        training = TrainingData.load(data, torch.device("cpu"))
        directory = store / "experiments" / ("default" if number == 0 else "plain")
        write_model_directory(directory, [fit(training, changed, 1)], changed, "data")
        gem = GEM.load(directory)
        samples = data.rows(["train"])[["sample_id", *gem.metadata.names]].head(5)
        predictions.append(gem.predict(samples).iloc[:, len(samples.columns) :])
        heads = latent_table(gem, "gem", data.rows(["train"]), data.expression(["train"]), 1)
        assert set(gem.temperatures) <= set(heads["covariate"])
    np.testing.assert_array_equal(*predictions)  # names decide nothing
    shutil.rmtree(directory)
    register_models(store / "experiments")
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which MLflow adds the packed code
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@{CHAMPION}")
    query = renamed.rows(["train"])[[*NAMES.values()][:-1]].head(5)
    served = model.predict(query).iloc[:, len(query.columns) :]
    np.testing.assert_array_equal(served, predictions[0])
