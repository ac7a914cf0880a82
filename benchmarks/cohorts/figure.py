"""The figure over cohorts: error, correlation of the effect, and ranks, of every predictor."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cohorts.fold_run import HALF, MEANS
from benchmarks.cohorts.table import CEILINGS, MODELS, SIMPLE, Comparison, best_simple, ceiling
from pipeline.gem.common.plotting import COLOURS, INK, STYLE, save_figure
from pipeline.gem.evaluation.catalogue import GEM

# Grey, with a marker each: what anyone could fit.
MARKERS = dict(zip(SIMPLE, (*"x123^DsP", *"+4v<*"), strict=True))
LINE_MARKERS = "x1234+"
GEM_COLOUR, HALF_COLOUR, SIMPLE_COLOUR = COLOURS["gem"], COLOURS["oracle"], "#52606d"
LIMITS = (0.4, 4.0)  # of the ratio of errors; what is beyond stands at the edge
OFFSETS = {GEM: -0.14, MODELS[1]: 0.14}  # of rows, so that intervals do not overlap


@plt.rc_context(STYLE)
def draw(comparison: Comparison, path: Path) -> None:
    """A row per cohort: mse relative to the best simple predictor, correlation of the effect; and
    mean ranks."""
    groups = comparison.groups()
    figure, (error, effect, rank) = plt.subplots(
        1,
        3,
        figsize=(13, 2.2 + 0.42 * len(groups)),
        width_ratios=[4, 4, 2.4],
        layout="constrained",
    )
    for row, (key, scores) in enumerate(groups):
        by_name = scores.set_index("predictor")
        differences = comparison.differences
        inside = (differences["cohort"] == key[0]) & (differences["scale"] == key[1])
        _draw_errors(error, row, by_name, differences[inside])
        _draw_effects(effect, row, by_name)
    labels = [_label(key, bool(rows["counts"].iloc[0])) for key, rows in groups]
    for axis in (error, effect):
        axis.set_yticks(range(len(groups)), labels if axis is error else [""] * len(groups))
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
        for row in range(0, len(groups), 2):
            axis.axhspan(row - 0.5, row + 0.5, color="#f5f7fa", zorder=0)
    error.tick_params(axis="y", labelcolor=INK, length=0)
    effect.tick_params(axis="y", length=0)
    _ratio_axis(error)
    effect.set(title="Correlation of the effect", xlabel="Pearson correlation over genes")
    effect.set_xlim(right=1.02)
    _draw_ranks(rank, comparison.ranks)
    figure.get_layout_engine().set(wspace=0.04)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=5)
    save_figure(figure, path)


def _label(key: tuple[str, str], counts: bool) -> str:
    cohort, scale = key
    if counts:
        return cohort if scale == MEANS else f"{cohort}, {scale}"
    return f"(the same, {scale})"


def _style(name: str) -> dict:
    """Of the markers of a predictor."""
    if name in MARKERS:
        size = 7 if MARKERS[name] in LINE_MARKERS else 4.5
        return {"marker": MARKERS[name], "color": SIMPLE_COLOUR, "markersize": size, "alpha": 0.75}
    if name in CEILINGS:
        return {"marker": "|", "color": HALF_COLOUR, "markersize": 11, "markeredgewidth": 2}
    face = GEM_COLOUR if name == GEM else "white"
    return {"marker": "o", "color": GEM_COLOUR, "markerfacecolor": face, "markersize": 7.5}


def _draw_errors(
    axis: plt.Axes, row: int, by_name: pd.DataFrame, differences: pd.DataFrame
) -> None:
    best = by_name.loc[best_simple(by_name)["mse"], "mse"]
    for name in _shown(by_name):
        ratio = min(max(by_name.loc[name, "mse"] / best, LIMITS[0]), LIMITS[1])
        axis.plot(
            ratio, row + OFFSETS.get(name, 0), linestyle="", zorder=_order(name), **_style(name)
        )
    for found in differences[differences["score"] == "mse"].itertuples():
        if pd.notna(found.ratio_low):
            low, high = max(found.ratio_low, LIMITS[0]), min(found.ratio_high, LIMITS[1])
            where = row + OFFSETS[found.predictor]
            axis.plot([low, high], [where, where], color=GEM_COLOUR, linewidth=1.4, zorder=4)


def _draw_effects(axis: plt.Axes, row: int, by_name: pd.DataFrame) -> None:
    for name in _shown(by_name):
        value = by_name.loc[name, "pearson"]
        if pd.notna(value):
            where = row + OFFSETS.get(name, 0)
            axis.plot(max(value, 0), where, linestyle="", zorder=_order(name), **_style(name))


def _shown(by_name: pd.DataFrame) -> list[str]:
    return [name for name in (*SIMPLE, ceiling(by_name), *MODELS) if name in by_name.index]


def _order(name: str) -> int:
    return 5 if name in MODELS else 3


def _ratio_axis(axis: plt.Axes) -> None:
    axis.axvline(1, color=INK, linewidth=1, zorder=1)
    axis.set(
        title="Mean squared error", xlabel="relative to the best simple predictor", xscale="log"
    )
    axis.xaxis.set_major_locator(FixedLocator([0.4, 0.5, 0.7, 1, 1.5, 2, 3, 4]))
    axis.xaxis.set_minor_locator(NullLocator())
    edges = {0.4: "≤0.4", 4: "≥4"}
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: edges.get(x, f"{x:g}")))
    axis.set_xlim(LIMITS[0] * 0.93, LIMITS[1] * 1.08)


def _draw_ranks(axis: plt.Axes, ranks: pd.DataFrame) -> None:
    ordered = ranks.sort_values("mse").reset_index(drop=True)
    for row, each in enumerate(ordered.itertuples()):
        colour = GEM_COLOUR if each.predictor in MODELS else SIMPLE_COLOUR
        axis.plot([each.mse, each.pearson], [row, row], color=colour, linewidth=1, alpha=0.5)
        axis.plot(each.mse, row, "o", color=colour, markersize=6)
        axis.plot(each.pearson, row, "o", color=colour, markerfacecolor="white", markersize=6)
    axis.set_yticks(range(len(ordered)), list(ordered["predictor"]))
    axis.tick_params(axis="y", labelcolor=INK, length=0)
    axis.set_ylim(len(ordered) - 0.5, -0.5)
    axis.set(title="Mean rank over cohorts", xlabel="● error   ○ correlation   (1: best)")
    axis.grid(visible=False, axis="y")


def _legend() -> list[Line2D]:
    meanings = {
        GEM: "GEM from metadata",
        MODELS[1]: "GEM from a reference",
        HALF: "ceiling: half of the samples, or ideal",
    } | {name: name for name in SIMPLE}
    return [
        Line2D([], [], linestyle="", label=label, **_style(name))
        for name, label in meanings.items()
    ]
