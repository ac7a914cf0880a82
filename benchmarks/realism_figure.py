"""One figure: statistics of cohorts and of the real cohorts they are compared with."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from benchmarks.realism_statistics import TOP, CohortStatistics, Curve, Statistic
from pipeline.gem.common.plotting import COLOURS, INK, MUTED, STYLE, save_figure

COHORT_COLOURS = (COLOURS["gem"], COLOURS["gem_tuned"], COLOURS["pruned"])
REAL_COLOURS = (COLOURS["oracle"], "#b45309", "#be185d", INK)
LAST_ZEROS = 300.0  # counts: above, no cohort has zeros
LEGEND = "lines and dots: median; thick: quartiles; thin: 5 to 95 %"


class Style(NamedTuple):
    colour: str
    line: str
    marker: str


Styles = dict[str, Style]
Cohorts = dict[str, CohortStatistics]


@plt.rc_context(STYLE)
def draw(cohorts: Cohorts, real: Cohorts, path: Path) -> None:
    """Small multiples of `cohorts` (solid lines) and the `real` ones (dashed), by name."""
    colours, real_colours = cycle(COHORT_COLOURS), cycle(REAL_COLOURS)
    styles = {name: Style(next(colours), "-", "o") for name in cohorts}
    styles |= {name: Style(next(real_colours), "--", "s") for name in real}
    cohorts = cohorts | real
    figure, ((bcv, zeros, sizes), (pearson, differential, target)) = plt.subplots(
        2, 3, figsize=(16, 7.8)
    )
    _draw_bcv(bcv, cohorts, styles)
    _draw_zeros(zeros, cohorts, styles)
    _draw_library_sizes(sizes, cohorts, styles)
    _draw_correlations(pearson, cohorts, styles)
    _draw_differential(differential, cohorts, styles)
    _draw_target_ranks(target, cohorts, styles)
    figure.tight_layout(h_pad=2.5, w_pad=2.0, rect=(0, 0.03, 1, 0.94))
    handles = bcv.get_legend_handles_labels()
    figure.legend(
        *handles, loc="upper left", ncols=len(cohorts), bbox_to_anchor=(0.005, 1.0), fontsize=10
    )
    figure.text(0.995, 0.01, LEGEND, ha="right", va="bottom", color=MUTED)
    save_figure(figure, path)


def _draw_bcv(axis: plt.Axes, cohorts: Cohorts, styles: Styles) -> None:
    _mean_axis(axis, "Variation between replicates", "biological coefficient of variation")
    for name, cohort in cohorts.items():
        curve, colour = cohort.bcv_curve, styles[name].colour
        _plot_curve(axis, name, curve, styles[name])
        axis.fill_between(curve.mean, curve.low, curve.high, color=colour, alpha=0.10, linewidth=0)
    # By the medians: the quartiles of a few replicates at low means would flatten the rest.
    medians = [value for cohort in cohorts.values() for value in cohort.bcv_curve.value]
    axis.set_ylim(0, 1.05 * max(medians, default=1.0))


def _draw_zeros(axis: plt.Axes, cohorts: Cohorts, styles: Styles) -> None:
    _mean_axis(axis, "Zeros (dotted: Poisson)", "share of zeros")
    for name, cohort in cohorts.items():
        curve, colour = cohort.zero_curve, styles[name].colour
        _plot_curve(axis, name, curve, styles[name])
        axis.plot(curve.mean, curve.poisson, ":", color=colour, linewidth=1.2)
    axis.set(xlim=(0.01, LAST_ZEROS), ylim=(-0.03, 1.03))


def _draw_library_sizes(axis: plt.Axes, cohorts: Cohorts, styles: Styles) -> None:
    sizes = {name: cohort.library_size for name, cohort in cohorts.items()}
    _plot_intervals(axis, sizes, styles, 1e-6, _millions)
    axis.set(title="Library sizes", xlabel="total counts, millions")
    _log_scale(axis, margin=0.15)


def _draw_correlations(axis: plt.Axes, cohorts: Cohorts, styles: Styles) -> None:
    pearson = {name: cohort.replicate_pearson for name, cohort in cohorts.items()}
    _plot_intervals(axis, pearson, styles, 1, "{:.3f}".format)
    axis.set(title="Correlation of replicates", xlabel="Pearson correlation of log-CPM over genes")
    axis.margins(x=0.12)
    axis.set_xlim(right=min(1.0, axis.get_xlim()[1]))
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _draw_differential(axis: plt.Axes, cohorts: Cohorts, styles: Styles) -> None:
    shares = {name: cohort.differential_share for name, cohort in cohorts.items()}
    _plot_intervals(axis, shares, styles, 100, "{:.3g} %".format)
    axis.set(title="Differential genes", xlabel="% of the genes of a contrast (FDR 5 %)")
    axis.set_xlim(-9, 103)


def _draw_target_ranks(axis: plt.Axes, cohorts: Cohorts, styles: Styles) -> None:
    """The rank of the target gene among all genes by its change; the best is at the left edge."""
    ranks = {name: cohort.target_rank for name, cohort in cohorts.items()}
    _plot_intervals(axis, ranks, styles, 100, lambda _: "")
    axis.axvline(100 * TOP, color=MUTED, linestyle=":", linewidth=1, zorder=0)
    with_target = [
        (row, cohort)
        for row, cohort in enumerate(cohorts.values())
        if cohort.target_first.value is not None
    ]
    for row, cohort in with_target:
        first, top = 100 * cohort.target_first.value, 100 * cohort.target_top.value
        text = f"first in {first:.0f} %, top 1 % in {top:.0f} % of {cohort.target_first.n}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        _annotate(axis, text, (0.02, row), bbox=box, xycoords=axis.get_yaxis_transform())
    axis.set(title="Rank of the target gene", xlabel="% of genes that change at least as much")
    _log_scale(axis)
    most_genes = max((cohort.genes for _, cohort in with_target), default=round(1 / TOP))
    axis.set_xlim(100 / most_genes / 1.5, 150)


def _mean_axis(axis: plt.Axes, title: str, ylabel: str) -> None:
    axis.set(title=title, xlabel="mean counts of a gene", ylabel=ylabel, xscale="log")
    axis.xaxis.set_minor_locator(NullLocator())


def _plot_curve(axis: plt.Axes, name: str, curve: Curve, style: Style) -> None:
    look = {"color": style.colour, "marker": style.marker, "markersize": 4, "linewidth": 1.6}
    axis.plot(curve.mean, curve.value, style.line, label=name, **look)


def _plot_intervals(
    axis: plt.Axes,
    statistics: dict[str, Statistic],
    styles: Styles,
    scale: float,
    text: Callable[[float], str],
) -> None:
    """A row per cohort: median with its text, quartiles, 5 to 95 %; or why there is no value."""
    for row, (name, statistic) in enumerate(statistics.items()):
        style = styles[name]
        if statistic.value is None:
            where = {"va": "center", "transform": axis.get_yaxis_transform()}
            axis.text(0.02, row, fill(statistic.reason, 40), color=MUTED, fontsize=7, **where)
            continue
        low, lower, _, upper, high = (scale * value for value in statistic.quantiles)
        line = {"color": style.colour, "solid_capstyle": "butt"}
        axis.plot([low, high], [row, row], linewidth=1.2, alpha=0.7, **line)
        axis.plot([lower, upper], [row, row], linewidth=6, alpha=0.35, **line)
        value = scale * statistic.value
        axis.plot(value, row, style.marker, color=style.colour, markersize=6)
        _annotate(axis, text(value), (value, row), ha="center")
    axis.set_yticks(range(len(statistics)), list(statistics))
    for label, name in zip(axis.get_yticklabels(), statistics, strict=True):
        label.set_color(styles[name].colour)
    axis.set_ylim(len(statistics) - 0.5, -0.7)
    axis.grid(visible=False, axis="y")


def _annotate(axis: plt.Axes, text: str, point: tuple[float, float], **options: object) -> None:
    axis.annotate(text, point, (0, 9), textcoords="offset points", fontsize=8, **options)


def _millions(millions: float) -> str:
    return f"{millions:.3g} million" if millions >= 1 else f"{1e6 * millions:,.0f}"


def _log_scale(axis: plt.Axes, margin: float | None = None) -> None:
    """A logarithmic axis with plain numbers."""
    axis.set_xscale("log")
    if margin is not None:
        axis.margins(x=margin)
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(NullLocator())
