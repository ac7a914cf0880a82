"""Figures from tables, one function each; every one writes a PNG and nothing else."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

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


@plt.rc_context(_STYLE)
def search_history(trials: pd.DataFrame, objective: str, path: Path) -> None:
    """The value of every trial in order, the best so far, and the baseline."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    complete, pruned = trials[trials["state"] == "complete"], trials[trials["state"] == "pruned"]
    axis.plot(complete["trial"], complete["value"], "o", color=COLOURS["gem"], label="complete")
    axis.plot(pruned["trial"], pruned["value"], "o", markerfacecolor="none", color=COLOURS["pruned"], label="pruned (value when stopped)")
    axis.step(complete["trial"], complete["value"].cummax(), where="post", color=COLOURS["gem"], alpha=0.4, label="best so far")
    if 0 in set(complete["trial"]):
        axis.axhline(float(complete.set_index("trial").loc[0, "value"]), color=MUTED, linestyle=":", label="baseline (trial 0)")
    values = complete["value"]
    if len(values) > 1:
        spread = max(values.max() - values.min(), 1e-9)
        axis.set_ylim(values.min() - 0.5 * spread, values.max() + 0.2 * spread)
    axis.set(title="Search", xlabel="trial", ylabel=objective)
    axis.legend(loc="lower right", fontsize=8)
    _save(figure, path)


@plt.rc_context(_STYLE)
def search_slices(trials: pd.DataFrame, parameters: dict[str, bool], objective: str, path: Path) -> None:
    """Value against each searched parameter; `parameters` maps its name to whether its axis is logarithmic."""
    complete = trials[trials["state"] == "complete"]
    columns = 3
    rows = -(-len(parameters) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 2.7 * rows), sharey=True, squeeze=False)
    for axis, (name, log) in zip(axes.flat, parameters.items(), strict=False):
        points = axis.scatter(complete[name], complete["value"], c=complete["trial"], cmap="viridis", s=28)
        axis.set_title(name, fontsize=9)
        if log:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.xaxis.set_minor_locator(NullLocator())
    for axis in list(axes.flat)[len(parameters) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel(objective, fontsize=8)
    figure.tight_layout()
    if len(complete):
        figure.colorbar(points, ax=axes, label="trial", shrink=0.6, ticks=MaxNLocator(integer=True))
    _save(figure, path)


@plt.rc_context(_STYLE)
def search_importance(importance: pd.DataFrame, path: Path) -> None:
    """Two answers to which parameter matters, side by side: they can disagree."""
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.4 * len(importance)))
    positions = np.arange(len(importance))
    for offset, (name, colour) in zip((-0.18, 0.18), (("ped_anova", COLOURS["gem"]), ("fanova", COLOURS["gem_tuned"])), strict=True):
        axis.barh(positions + offset, importance[name].fillna(0), height=0.34, color=colour, label=name)
    axis.set_yticks(positions, importance["parameter"])
    axis.invert_yaxis()
    axis.set(title="Importance of the searched parameters", xlabel="share")
    axis.legend()
    _save(figure, path)
