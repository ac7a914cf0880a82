"""Figures from tables, one function each; every one writes a PNG and nothing else."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = {"gem": "#2563eb", "gem_tuned": "#7c3aed", "oracle": "#059669", "baseline": "#9aa5b1", "pruned": "#f59e0b"}
GROUP_COLOURS = {"technical": "#d97706", "biological": "#059669", "perturbation": "#7c3aed"}
_STYLE = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": GRID,
    "figure.dpi": 110,
    "font.size": 9,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No software version or date in the file: the same table gives the same bytes.
    figure.savefig(path, metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)


@plt.rc_context(_STYLE)
def learning_curves(history: pd.DataFrame, path: Path) -> None:
    """Likelihood terms, KL per group and validation scores over the epochs of the first seed."""
    table = history[history["seed"] == history["seed"].iloc[0]]
    figure, (terms, divergence, validation) = plt.subplots(1, 3, figsize=(13, 3.6))
    ways = {"nll_reconstruction": "reconstruction", "nll_predictive": "from metadata", "nll_conditioned": "from a reference"}
    for name, label in ways.items():
        if f"train/{name}" in table:
            terms.plot(table["epoch"], table[f"train/{name}"], label=label)
    terms.set(title="Negative log-likelihood, training", xlabel="epoch", ylabel="nats per sample")
    terms.legend()
    for group, colour in GROUP_COLOURS.items():
        divergence.plot(table["epoch"], table[f"train/kl_{group}"], color=colour, label=group)
    divergence.set(title="KL(posterior | prior)", xlabel="epoch", ylabel="nats per sample")
    divergence.set_ylim(bottom=0)
    divergence.legend()
    for name, label in {"predictive_log_likelihood": "predictive log-likelihood", "evidence_lower_bound": "evidence lower bound"}.items():
        if f"validation/{name}" in table:
            validation.plot(table["epoch"], table[f"validation/{name}"], label=label)
    if validation.lines:
        best = table.loc[table["validation/predictive_log_likelihood"].idxmax()]
        validation.axvline(best["epoch"], color=MUTED, linestyle=":", label=f"chosen: epoch {int(best['epoch'])}")
        # The first epochs are far below and would flatten everything after them.
        values = table["validation/predictive_log_likelihood"]
        spread = values.max() - values.quantile(0.25)
        validation.set_ylim(values.quantile(0.25) - spread, values.max() + 0.3 * spread)
        validation.legend(loc="lower right")
    else:
        validation.text(0.5, 0.5, "no validation split", ha="center", transform=validation.transAxes, color=MUTED)
    validation.set(title="Validation (comparable across settings)", xlabel="epoch", ylabel="nats per sample")
    figure.tight_layout()
    _save(figure, path)


def _predictor_style(name: str) -> tuple[str, str]:
    kind = "oracle" if name.startswith("oracle") else "gem_tuned" if name.startswith("gem_tuned") else "gem" if name.startswith("gem") else "baseline"
    return COLOURS[kind], "D" if name.endswith("_reference") else "o"


@plt.rc_context(_STYLE)
def split_scores(scores: pd.DataFrame, metric: str, unit: str, better: str, path: Path, lowest: float | None = None) -> None:
    """Every predictor on one axis per split, with 95 % intervals, from floor to ceiling; `better` says which way is better.

    Values below `lowest` are drawn at the edge with their number: far floors would flatten what one came to see.
    """
    table = scores[scores["metric"] == metric]
    splits, order = list(dict.fromkeys(scores["split"])), list(dict.fromkeys(scores["predictor"]))
    size = (1.6 + 3.0 * len(splits), 0.6 + 0.34 * len(order))
    figure, axes = plt.subplots(1, len(splits), figsize=size, sharey=True, squeeze=False)
    for axis, split in zip(axes[0], splits, strict=True):
        rows = table[table["split"] == split].set_index("predictor")
        for position, name in enumerate(order):
            _draw_score(axis, position, name, rows.loc[name], lowest)
        for name, line in (("ridge", ":"), ("oracle_metadata", "--")):
            if name in rows.index and pd.notna(rows.loc[name, "value"]):
                axis.axvline(rows.loc[name, "value"], color=_predictor_style(name)[0], linestyle=line, linewidth=1, zorder=0)
        if lowest is not None:
            axis.set_xlim(left=lowest - 0.04)
        axis.set(title=split, xlabel=unit)
    axes[0][0].set_yticks(range(len(order)), order)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"{metric} ({better}): dotted ridge, dashed ideal", x=0.01, ha="left", fontsize=10, color=MUTED)
    figure.tight_layout()
    _save(figure, path)


def _draw_score(axis: plt.Axes, position: int, name: str, row: pd.Series, lowest: float | None) -> None:
    colour, marker = _predictor_style(name)
    if pd.isna(row["value"]):
        axis.text(0.02, position, "not applicable", va="center", color=MUTED, fontsize=7, transform=axis.get_yaxis_transform())
        return
    if lowest is not None and row["value"] < lowest:
        axis.plot(lowest, position, "<", color=colour, markersize=6)
        axis.text(lowest + 0.05, position, f"{row['value']:.1f}", va="center", color=MUTED, fontsize=7)
        return
    if pd.notna(row["low"]):
        axis.plot([row["low"], row["high"]], [position, position], color=colour, linewidth=2, alpha=0.5)
    axis.plot(row["value"], position, marker, color=colour, markersize=6)
