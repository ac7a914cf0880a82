"""Figures of a search, from its tables. The look is that of figures.py."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.gem.common.plotting import COLOURS, MUTED, STYLE, save_figure

_FEWEST = 4  # points that make a surface


@plt.rc_context(STYLE)
def history(trials: pd.DataFrame, objective: str, path: Path, upwards: bool = True) -> None:
    """The value of every trial in order, the best so far, and the baseline."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    complete, pruned = trials[trials["state"] == "complete"], trials[trials["state"] == "pruned"]
    axis.plot(complete["trial"], complete["value"], "o", color=COLOURS["gem"], label="complete")
    axis.plot(
        pruned["trial"],
        pruned["value"],
        "o",
        markerfacecolor="none",
        color=COLOURS["pruned"],
        label="pruned (value when stopped)",
    )
    best = complete["value"].cummax() if upwards else complete["value"].cummin()
    axis.step(
        complete["trial"], best, where="post", color=COLOURS["gem"], alpha=0.4, label="best so far"
    )
    if 0 in set(complete["trial"]):
        axis.axhline(
            float(complete.set_index("trial").loc[0, "value"]),
            color=MUTED,
            linestyle=":",
            label="baseline (trial 0)",
        )
    values = complete["value"]
    if len(values) > 1:
        spread = max(values.max() - values.min(), 1e-9)
        axis.set_ylim(values.min() - 0.5 * spread, values.max() + 0.2 * spread)
    axis.set(title="Search", xlabel="trial", ylabel=objective)
    axis.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)


@plt.rc_context(STYLE)
def slices(trials: pd.DataFrame, parameters: dict[str, bool], objective: str, path: Path) -> None:
    """Value against each searched parameter; `parameters` maps its name to whether its axis is logarithmic."""
    judged, score, label = _judged(trials, objective)
    pruned = judged["state"] == "pruned"
    columns = 3
    rows = -(-len(parameters) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 2.7 * rows), sharey=True, squeeze=False)
    for axis, (name, log) in zip(axes.flat, parameters.items(), strict=False):
        places = _positions(judged[name])
        points = axis.scatter(
            places[~pruned],
            judged[score][~pruned],
            c=judged["trial"][~pruned],
            cmap="viridis",
            s=28,
        )
        axis.plot(
            places[pruned],
            judged[score][pruned],
            "o",
            markerfacecolor="none",
            color=COLOURS["pruned"],
            markersize=5,
        )
        axis.set_title(name, fontsize=9)
        if log:
            axis.set_xscale("log")
            _plain(axis.xaxis)
    for axis in list(axes.flat)[len(parameters) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel(label, fontsize=8)
    if pruned.any():
        figure.suptitle(
            "filled: complete; open: pruned", x=0.01, ha="left", fontsize=10, color=MUTED
        )
    figure.tight_layout()
    if (~pruned).any():
        figure.colorbar(points, ax=axes, label="trial", shrink=0.6, ticks=MaxNLocator(integer=True))
    save_figure(figure, path)


@plt.rc_context(STYLE)
def importance(table: pd.DataFrame, path: Path) -> None:
    """Two answers to which parameter matters, side by side: they can disagree."""
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.4 * len(table)))
    positions = np.arange(len(table))
    for offset, (name, colour) in zip(
        (-0.18, 0.18),
        (("ped_anova", COLOURS["gem"]), ("fanova", COLOURS["gem_tuned"])),
        strict=True,
    ):
        axis.barh(positions + offset, table[name].fillna(0), height=0.34, color=colour, label=name)
    axis.set_yticks(positions, table["parameter"])
    axis.invert_yaxis()
    axis.set(title="Importance of the searched parameters", xlabel="share")
    axis.legend()
    save_figure(figure, path)


@plt.rc_context(STYLE)
def contours(
    trials: pd.DataFrame,
    pairs: list[tuple[str, str]],
    parameters: dict[str, bool],
    objective: str,
    path: Path,
) -> None:
    """The objective over pairs of searched parameters, between the trials; `parameters` as in `slices`."""
    judged, score, label = _judged(trials, objective)
    figure, axes = plt.subplots(
        1, max(1, len(pairs)), figsize=(4.2 * max(1, len(pairs)), 3.6), squeeze=False
    )
    for axis, (first, second) in zip(axes[0], pairs, strict=False):
        rows = judged.dropna(subset=[first, second])
        x, y = (
            np.log10(rows[name].to_numpy(float)) if parameters[name] else rows[name].to_numpy(float)
            for name in (first, second)
        )
        if _make_a_surface(x, y, rows[score]):
            axis.tricontourf(x, y, rows[score], levels=12, cmap="viridis")
        axis.scatter(x, y, c=rows[score], cmap="viridis", edgecolor="white", s=30, zorder=3)
        axis.set_xlabel(f"log10 {first}" if parameters[first] else first, fontsize=8)
        axis.set_ylabel(f"log10 {second}" if parameters[second] else second, fontsize=8)
    figure.suptitle(f"{label}: brighter is more", x=0.01, ha="left", fontsize=10, color=MUTED)
    figure.tight_layout()
    save_figure(figure, path)


def _judged(trials: pd.DataFrame, objective: str) -> tuple[pd.DataFrame, str, str]:
    """(trials to draw, column to draw, its name): where some were pruned, values do not compare, and the share of wins does."""
    if (trials["state"] == "pruned").any():
        return trials.dropna(subset=["wins"]), "wins", "share of the other trials that it beats"
    return trials[trials["state"] == "complete"], "value", objective


def _make_a_surface(x: np.ndarray, y: np.ndarray, values: pd.Series) -> bool:
    """Enough points, not all on one line."""
    if len(values) < _FEWEST or values.nunique() < 2:
        return False
    centred = np.stack([x - x.mean(), y - y.mean()])
    scale = np.abs(centred).max(axis=1, keepdims=True)
    return bool((scale > 0).all()) and np.linalg.matrix_rank(centred / scale, tol=1e-3) == 2


@plt.rc_context(STYLE)
def pareto(trials: pd.DataFrame, objectives: list[str], path: Path) -> None:
    """Every pair of objectives: all complete trials, and those that no other beats in all."""
    complete = trials[trials["state"] == "complete"]
    pairs = [
        (first, second)
        for position, first in enumerate(objectives)
        for second in objectives[position + 1 :]
    ]
    figure, axes = plt.subplots(1, len(pairs), figsize=(4.2 * len(pairs), 3.6), squeeze=False)
    for axis, (first, second) in zip(axes[0], pairs, strict=True):
        for front, colour, label in (
            (False, COLOURS["baseline"], "beaten in all"),
            (True, COLOURS["gem"], "on the front"),
        ):
            rows = complete[complete["front"] == front]
            axis.plot(rows[first], rows[second], "o", color=colour, label=label)
        baseline = complete[complete["trial"] == 0]
        axis.plot(
            baseline[first],
            baseline[second],
            "o",
            markerfacecolor="none",
            markeredgecolor=MUTED,
            markersize=10,
            label="baseline (trial 0)",
        )
        axis.set(xlabel=first, ylabel=second)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(
        "No trial is better than one on the front in every objective",
        x=0.01,
        ha="left",
        fontsize=10,
        color=MUTED,
    )
    figure.tight_layout()
    save_figure(figure, path)


@plt.rc_context(STYLE)
def confirmed(table: pd.DataFrame, objective: str, path: Path) -> None:
    """Candidates over fresh seeds: a line joins what one seed gave to each."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    trials = list(dict.fromkeys(table["trial"]))
    for seed, rows in table.groupby("seed"):
        axis.plot(
            [trials.index(trial) for trial in rows["trial"]],
            rows[objective],
            "o-",
            alpha=0.7,
            label=f"seed {seed}",
        )
    axis.set_xticks(
        range(len(trials)), ["baseline" if trial == 0 else f"trial {trial}" for trial in trials]
    )
    axis.set(title="Confirmed with fresh seeds", ylabel=objective)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def _positions(values: pd.Series) -> pd.Series:
    """Numbers as they are; choices by their names."""
    return (
        values
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        else values.astype(str)
    )


def _plain(axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())
