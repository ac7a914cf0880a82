"""Predictions in the hands of others: cell-eval2 and scanpy's file format, in the judge's own environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT

from pipeline import predict

PYTHON, JUDGE = (
    ROOT / ".venv-cell-eval" / "bin" / "python",
    ROOT / "tests" / "cell_eval" / "judge.py",
)


@pytest.mark.parametrize("total", [1_000_000, 20])
def test_cell_eval_accepts_a_prediction_and_finds_it_as_far_from_the_truth_as_we_do(
    monkeypatch, tmp_path, model_directory, cohort, total
):
    """Dense, and sparse where most counts are zero."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run the tests with `make test`")
    rows = cohort.rows(["train"])
    names = ["control", *rows["perturbation"].value_counts().drop("control").index[:3]]
    chosen = rows["perturbation"].isin(names).to_numpy()
    rows, counts = rows[chosen].reset_index(drop=True), cohort.counts(["train"])[chosen]
    rows[["tissue", "cell_type", "sex", "perturbation"]].to_parquet(
        tmp_path / "query.parquet", index=False
    )
    options = [
        "--query",
        tmp_path / "query.parquet",
        "--output",
        tmp_path / "said.h5ad",
        "--total-count",
        total,
    ]
    monkeypatch.setattr(
        sys, "argv", ["predict", "--model", str(model_directory), *map(str, options)]
    )
    predict.main()
    observed = anndata.AnnData(
        counts.astype(np.float32),
        obs=pd.DataFrame(
            {"perturbation": rows["perturbation"].to_numpy()},
            index=[str(row) for row in rows.index],
        ),
    )
    observed.var_names = cohort.genes
    observed.write_h5ad(tmp_path / "observed.h5ad")
    scores = judged(tmp_path / "said.h5ad", tmp_path / "observed.h5ad")
    said = anndata.read_h5ad(tmp_path / "said.h5ad")
    assert hasattr(said.X, "toarray") == (total == 20)
    assert set(scores["expr_mse"]) == set(names[1:]) or set(scores["expr_mse"]) == set(names)
    assert all(np.isfinite(value) for value in scores["expr_mse"].values())
    if total == 1_000_000:
        bulk = {
            side: counts_of_groups(matrix, rows["perturbation"], names)
            for side, matrix in (("said", said.X), ("observed", counts))
        }
        ours = np.square(bulk["said"] - bulk["observed"]).mean(axis=1)
        assert np.corrcoef(ours[1:], [scores["expr_mse"][name] for name in names[1:]])[0, 1] > 0.9


def judged(predicted: Path, observed: Path) -> dict[str, dict[str, float]]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    done = subprocess.run(
        [PYTHON, JUDGE, predicted, observed],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def counts_of_groups(counts: np.ndarray, labels: pd.Series, names: list[str]) -> np.ndarray:
    """(conditions, G) log-CPM of summed counts."""
    sums = np.stack(
        [counts[(labels == name).to_numpy()].sum(axis=0, dtype=np.float64) for name in names]
    )
    return np.log1p(sums / sums.sum(axis=1, keepdims=True) * 1e6)
