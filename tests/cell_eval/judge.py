"""Scores of cell-eval2 for a prediction that GEM wrote: two .h5ad of raw counts, the predicted and the observed one.

Runs in an environment of its own, as score.py does. The column of conditions and the control are those that the prediction
names in uns. Printed: {metric: {condition: value}}.
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
        metrics=METRICS, pert_col=about["control_column"], control=about["control"], control_source="pred", input_type="counts", device="cpu",
        target_gene_map={"*": None}, max_counts_per_cell=10**9,   # samples of bulk are deeper than cells
    )  # fmt: skip
    scores = compute_metrics(predicted, observed, config=config)
    found: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    for condition, metric, value in scores.select("perturbation", "metric", "value").iter_rows():
        if value is not None and np.isfinite(value):
            found[metric][condition] = value
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
