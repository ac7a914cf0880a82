"""Cell types that are known by their features alone, from source to prediction."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.gem import GEM
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.preparation.prepare import write_cohort
from pipeline.gem.training.blend import blend_with_mixed_model
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.model_directory import write_model_directory
from pipeline.gem.training.trainer import fit

GENES, TYPES, HELD_OUT, NEVER = 60, 14, "type 3", "type 99"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Cell types whose expression is linear in two features, each in a table of its own."""
    folder, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    names = [*(f"type {number}" for number in range(TYPES)), NEVER]
    features = pd.DataFrame(rng.normal(size=(len(names), 2)), names, ["first", "second"])
    for column in features:
        table = features[[column]].rename_axis("cell_type").reset_index()
        table.to_csv(folder / f"{column}.csv", index=False)
    rows = [(name, drug) for name in names[:-1] for drug in ("control", "a", "b") for _ in range(4)]
    samples = pd.DataFrame(rows, columns=["cell_type", "perturbation"])
    samples.insert(0, "sample_id", [f"s{number:03d}" for number in range(len(samples))])
    drugs = {"control": 0.0, "a": rng.normal(size=GENES), "b": rng.normal(size=GENES)}
    base, loadings = rng.normal(size=GENES), rng.normal(size=(2, GENES))
    log_mean = 5 + base + features.loc[samples["cell_type"]].to_numpy() @ loadings
    log_mean += np.stack([np.broadcast_to(drugs[name], GENES) for name in samples["perturbation"]])
    counts = rng.poisson(np.exp(log_mean))
    samples.to_parquet(folder / "samples.parquet")
    genes = pd.DataFrame({"gene_id": [f"g{number}" for number in range(GENES)]})
    genes.to_parquet(folder / "genes.parquet")
    (folder / "counts").mkdir()
    lists = pa.array(counts.tolist(), pa.list_(pa.int64()))
    table = pa.table({"sample_id": samples["sample_id"].tolist(), "counts": lists})
    pq.write_table(table, folder / "counts" / "counts.parquet")
    return folder


@pytest.fixture(scope="module")
def cohort(params, source, tmp_path_factory) -> Cohort:
    tables = [str(source / "first.csv"), str(source / "second.csv")]
    changes = {
        "source": str(source),
        "covariates": {
            "technical": {},
            "biological": {"cell_type": {"kind": "embedding", "tables": tables}},
            "perturbation": {"perturbation": {"kind": "categorical"}},
        },
        "context_columns": ["cell_type"],
        "level_column": "cell_type",
        **dict.fromkeys(("target_gene", "study_column", "date_column")),
    }
    data = type(params.data).model_validate(params.data.model_dump(mode="json") | changes)
    shares = dict.fromkeys(("study", "perturbation", "combination", "validation_combination"), 0.0)
    splits = params.splits.model_copy(update=shares | {"level": ({"cell_type": HELD_OUT},)})
    folder = tmp_path_factory.mktemp("cohort") / "cohort"
    write_cohort(open_source(data), data, splits, folder)
    return Cohort(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["network", "mixed model"])
def trained(request, cohort, params, tmp_path_factory) -> GEM:
    changed = params.override({"train.epochs": 30, "model.mixed_model": request.param})
    data = TrainingData.load(cohort, torch.device("cpu"))
    fits = [fit(data, changed, 1)]
    if request.param:
        fits = blend_with_mixed_model(fits, data, cohort)
    folder = tmp_path_factory.mktemp("model") / "default"
    write_model_directory(folder, fits, changed, cohort.train_validation_sha256)
    return GEM.load(folder)


def log_cpm(counts: pd.DataFrame) -> np.ndarray:
    values = counts.to_numpy(dtype=float)
    return np.log1p(values / values.sum(axis=1, keepdims=True) * 1e6)


def test_a_new_cell_type_with_features_is_predicted(trained, cohort):
    held_out = cohort.rows(["test_level"])
    assert set(held_out["cell_type"]) == {HELD_OUT} and len(held_out) == 12
    query = held_out[["cell_type", "perturbation"]].reset_index(drop=True)
    predicted, observed = (
        log_cpm(trained.predict(query)[trained.genes]),
        cohort.expression(["test_level"]),
    )
    error = np.square(predicted - observed).mean()
    mean = np.square(cohort.expression(["train"]).mean(axis=0) - observed).mean()
    assert error < 0.5 * mean


def test_the_features_decide_and_a_cell_type_without_is_refused(trained):
    query = pd.DataFrame({"cell_type": [HELD_OUT, NEVER], "perturbation": "a"})
    first, second = log_cpm(trained.predict(query)[trained.genes])
    assert np.abs(first - second).mean() > 0.2
    with pytest.raises(InputError, match="type 77"):
        trained.predict(pd.DataFrame({"cell_type": ["type 77"], "perturbation": ["a"]}))
