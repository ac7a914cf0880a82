"""The figure of settings: mse relative to the defaults, of GEM and of its network alone."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cohorts.declarations import SYNTHETIC
from benchmarks.settings.comparison import PARTS_COMPARED, cohorts_of, of_part
from pipeline.gem.common.plotting import COLOURS, INK, STYLE, save_figure

LIMITS = {PARTS_COMPARED[0]: (0.8, 1.25), PARTS_COMPARED[1]: (0.5, 2.0)}  # what is beyond: the edge
TICKS = [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2]
REAL, SIMULATED = COLOURS["gem"], COLOURS["pruned"]


@plt.rc_context(STYLE)
def draw(comparisons: pd.DataFrame, path: Path) -> None:
    """A row per setting: each real cohort, their geometric mean with its interval, each simulated
    cohort."""
    settings = list(dict.fromkeys(comparisons["setting"]))
    figure, axes = plt.subplots(
        1, len(PARTS_COMPARED), figsize=(12, 1.6 + 0.24 * len(settings)), layout="constrained"
    )
    for axis, part in zip(axes, PARTS_COMPARED, strict=True):
        _draw_part(axis, of_part(comparisons, part), LIMITS[part])
        axis.set_title("GEM" if part == PARTS_COMPARED[0] else f"{part} alone")
    axes[0].set_yticks(range(len(settings)), settings)
    axes[0].tick_params(axis="y", labelcolor=INK, length=0)
    axes[1].set_yticks([])
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _draw_part(axis: plt.Axes, rows: pd.DataFrame, limits: tuple[float, float]) -> None:
    low, high = limits
    axis.axvline(1, color=INK, linewidth=1, zorder=1)
    cohorts = cohorts_of(rows)
    for place, (_, row) in enumerate(rows.iterrows()):
        for name in cohorts:
            style = _style(name in SYNTHETIC)
            axis.plot(min(max(row[name], low), high), place, linestyle="", zorder=3, **style)
        mean = min(max(row["ratio"], low), high)
        axis.plot(mean, place, "o", color=REAL, markersize=5.5, zorder=5)
        if pd.notna(row["low"]):
            ends = [min(max(row[name], low), high) for name in ("low", "high")]
            axis.plot(ends, [place, place], color=REAL, linewidth=1.6, zorder=4)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set(xscale="log", xlabel="mse relative to the defaults")
    axis.set_xlim(low * 0.985, high * 1.015)
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    axis.xaxis.set_minor_locator(NullLocator())
    edges = {low: f"≤{low:g}", high: f"≥{high:g}"}
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: edges.get(x, f"{x:g}")))
    axis.grid(visible=False, axis="y")


def _style(simulated: bool) -> dict:
    if simulated:
        return {"marker": "D", "color": SIMULATED, "markersize": 4, "markerfacecolor": "white"}
    return {"marker": "|", "color": "#52606d", "markersize": 6, "alpha": 0.6}


def _legend() -> list[Line2D]:
    return [
        Line2D([], [], marker="o", color=REAL, label="real cohorts: geometric mean, 95 %"),
        Line2D([], [], linestyle="", label="a real cohort", **_style(False)),
        Line2D([], [], linestyle="", label="a simulated cohort", **_style(True)),
    ]
