"""Prints scores of Arc Institute's cell-eval2 as JSON, from an .npz named on the command line.

Runs in its own environment (requirements.lock beside this file). It imports nothing of this
project, and this project imports nothing of it. The .npz holds `observed` (N, G) and `predicted`
(M, G) log-CPM, natural log of 1 + CPM, and the condition of each sample as text:
`observed_condition` (N,), `predicted_condition` (M,). "control" is the control.

Output: {"metrics": {metric: {condition: value}}, "significant": {condition: [bool] * G}}. A
condition without a value is absent. cell-eval2 reads tables of differential genes; these are
scanpy's: Welch's t, Benjamini-Hochberg at 0.05.
"""

import json
import sys

import numpy as np
import pandas as pd
import polars as pl
import scanpy
from anndata import AnnData
from cell_eval2 import DiscriminationParams, EvalConfig, compute_metrics

CONTROL, FDR = "control", 0.05
METRICS = [
    "expr_mse",
    "expr_mae",
    "delta_mse",
    "delta_mae",
    "delta_pearson",
    "pds_cosine",
    "de_wilcoxon_direction_match",  # of the table it reads: here Welch's
    "de_wilcoxon_sig_jaccard",
]


def side_of(file, name: str) -> AnnData:
    """The observed or the predicted samples, with their condition."""
    values = file[name].astype(np.float64)
    genes = [f"gene_{index}" for index in range(values.shape[1])]
    samples = [f"sample_{index}" for index in range(len(values))]
    return AnnData(
        values,
        obs=pd.DataFrame({"condition": file[f"{name}_condition"]}, index=samples),
        var=pd.DataFrame(index=genes),
    )


def differential_table(side: AnnData) -> pd.DataFrame:
    """Every gene of every condition against the control, in the columns that cell-eval2 reads."""
    side = side.copy()
    side.obs["condition"] = side.obs["condition"].astype("category")
    side.uns["log1p"] = {"base": None}
    scanpy.tl.rank_genes_groups(
        side, "condition", reference=CONTROL, method="t-test", corr_method="benjamini-hochberg"
    )
    table = scanpy.get.rank_genes_groups_df(side, group=None)
    names = {
        "group": "target",
        "names": "feature",
        "logfoldchanges": "log2_fold_change",
        "pvals": "p_value",
        "pvals_adj": "p_adj",
    }
    table = table.rename(columns=names)[list(names.values())]
    return table.astype({"target": str, "feature": str, "log2_fold_change": float})


def main(path: str) -> None:
    with np.load(path) as file:
        observed, predicted = side_of(file, "observed"), side_of(file, "predicted")
    tables = {"de_real": differential_table(observed), "de_pred": differential_table(predicted)}
    config = EvalConfig(
        metrics=METRICS,
        pert_col="condition",
        control=CONTROL,
        control_source="pred",  # each side has its own controls
        input_type="lognorm",
        device="cpu",
        discrimination=DiscriminationParams(
            distance="cosine",
            rank_denominator="n-1",
            tie_policy="midrank",
            exclude_target_gene=False,
        ),
        target_gene_map={"*": None},  # no condition names a gene to leave out
    )
    scores = compute_metrics(
        predicted,
        observed,
        config=config,
        **{name: pl.from_pandas(table) for name, table in tables.items()},
    )
    metrics: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    for condition, metric, value in scores.select("perturbation", "metric", "value").iter_rows():
        if value is not None and np.isfinite(value):
            metrics[metric][condition] = value
    table = tables["de_real"].pivot(index="target", columns="feature", values="p_adj")[
        list(observed.var_names)
    ]
    significant = {
        condition: (row <= FDR).tolist()
        for condition, row in zip(table.index, table.to_numpy(), strict=True)
    }
    json.dump({"metrics": metrics, "significant": significant}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
