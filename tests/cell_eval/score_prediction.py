"""Prints scores of cell-eval2 for two .h5ad files of raw counts: prediction, observation.

Runs in its own environment, as score.py does. The prediction's uns["gem"] names the column of
conditions and the control. Output: {metric: {condition: value}}.
"""

import json
import sys

import numpy as np
from anndata import read_h5ad
from cell_eval2 import EvalConfig, compute_metrics

METRICS = ["expr_mse", "delta_pearson"]


def main(predicted_path: str, observed_path: str) -> None:
    predicted, observed = read_h5ad(predicted_path), read_h5ad(observed_path)
    about = predicted.uns["gem"]
    config = EvalConfig(
        metrics=METRICS,
        pert_col=about["control_column"],
        control=about["control"],
        control_source="pred",
        input_type="counts",
        device="cpu",
        target_gene_map={"*": None},
        max_counts_per_cell=10**9,  # bulk samples are deeper than cells
    )
    scores = compute_metrics(predicted, observed, config=config)
    table: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    for condition, metric, value in scores.select("perturbation", "metric", "value").iter_rows():
        if value is not None and np.isfinite(value):
            table[metric][condition] = value
    json.dump(table, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
