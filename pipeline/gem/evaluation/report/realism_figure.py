"""One figure: what simulated and real cohorts look like, side by side. The look is that of figures.py."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.gem.common.plotting import COLOURS, INK, MUTED, STYLE, save_figure
from pipeline.gem.evaluation.report.realism import (
    TOP,
    CohortStatistics,
    Curve,
    Number,
    real_portraits,
)

CHOSEN = (COLOURS["gem"], COLOURS["gem_tuned"], COLOURS["pruned"])  # the cohorts that are judged
REFERENCE = (COLOURS["oracle"], "#b45309", "#be185d", INK)  # the real cohorts they are judged by
LAST_ZEROS = 300.0  # counts: beyond, no cohort has zeros to show


@plt.rc_context(STYLE)
def credibility(portraits: dict[str, CohortStatistics], path: Path) -> None:
    """Small multiples of `portraits` by name; those named in `real_portraits()` are dashed, as what one compares with."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.6))
    style = _styles(portraits)
    _curves(axes[0, 0], {name: one.bcv_curve for name, one in portraits.items()}, style, band=True)
    axes[0, 0].set(
        title="Variation between replicates",
        xlabel="mean counts of a gene",
        ylabel="biological coefficient of variation",
    )
    # By the medians: the quartiles of a few replicates at low means would flatten all others.
    axes[0, 0].set_ylim(
        0,
        1.05
        * max((value for one in portraits.values() for value in one.bcv_curve.value), default=1.0),
    )
    _curves(
        axes[0, 1], {name: one.zero_curve for name, one in portraits.items()}, style, poisson=True
    )
    axes[0, 1].set(
        title="Zeros (dotted: if they were Poisson's)",
        xlabel="mean counts of a gene",
        ylabel="share of zeros",
    )
    for axis in axes[0, :2]:
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0, 1].set(xlim=(0.01, LAST_ZEROS), ylim=(-0.03, 1.03))
    _strips(
        axes[0, 2],
        {name: one.library_size for name, one in portraits.items()},
        style,
        1e-6,
        _counts,
    )
    axes[0, 2].set(title="Library sizes", xlabel="total counts, millions")
    _plain_log(axes[0, 2], margin=0.15)
    _strips(
        axes[1, 0],
        {name: one.replicate_pearson for name, one in portraits.items()},
        style,
        1,
        "{:.3f}".format,
    )
    axes[1, 0].set(title="Correlation of replicates", xlabel="Pearson's, over genes, of log-CPM")
    axes[1, 0].margins(x=0.12)
    axes[1, 0].set_xlim(right=min(1.0, axes[1, 0].get_xlim()[1]))
    axes[1, 0].xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    _strips(
        axes[1, 1],
        {name: one.differential_share for name, one in portraits.items()},
        style,
        100,
        "{:.3g} %".format,
    )
    axes[1, 1].set(title="Differential genes", xlabel="% of the genes of a contrast (FDR 5 %)")
    axes[1, 1].set_xlim(-9, 103)
    _target(axes[1, 2], portraits, style)
    figure.tight_layout(h_pad=2.5, w_pad=2.0, rect=(0, 0, 1, 0.93))
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        *handles, loc="upper left", ncols=len(portraits), bbox_to_anchor=(0.005, 1.0), fontsize=10
    )
    figure.text(
        0.995,
        0.985,
        "lines and dots: median; thick: quartiles; thin: 5 to 95 %",
        ha="right",
        va="top",
        color=MUTED,
    )
    save_figure(figure, path)


def _styles(portraits: dict[str, CohortStatistics]) -> dict[str, tuple[str, str, str]]:
    """(colour, line, marker) of every cohort."""
    references = set(real_portraits())
    chosen, real = iter(CHOSEN * len(portraits)), iter(REFERENCE * len(portraits))
    return {
        name: (next(real), "--", "s") if name in references else (next(chosen), "-", "o")
        for name in portraits
    }


def _curves(
    axis: plt.Axes, curves: dict[str, Curve], style: dict, band: bool = False, poisson: bool = False
) -> None:
    for name, curve in curves.items():
        colour, line, marker = style[name]
        axis.plot(
            curve.mean,
            curve.value,
            line,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.6,
            label=name,
        )
        if band:
            axis.fill_between(
                curve.mean, curve.low, curve.high, color=colour, alpha=0.10, linewidth=0
            )
        if poisson:
            axis.plot(curve.mean, curve.poisson, ":", color=colour, linewidth=1.2)


def _strips(
    axis: plt.Axes,
    numbers: dict[str, Number],
    style: dict,
    scale: float,
    text: Callable[[float], str],
) -> None:
    """One line a cohort: median with its text, quartiles, 5 to 95 %; a null says why."""
    for row, (name, number) in enumerate(numbers.items()):
        colour, _, marker = style[name]
        if number.value is None:
            axis.text(
                0.02,
                row,
                number.reason,
                va="center",
                color=MUTED,
                fontsize=8,
                transform=axis.get_yaxis_transform(),
            )
            continue
        low, lower, _, upper, high = (scale * value for value in number.quantiles)
        axis.plot(
            [low, high], [row, row], color=colour, linewidth=1.2, alpha=0.7, solid_capstyle="butt"
        )
        axis.plot(
            [lower, upper], [row, row], color=colour, linewidth=6, alpha=0.35, solid_capstyle="butt"
        )
        axis.plot(scale * number.value, row, marker, color=colour, markersize=6)
        axis.annotate(
            text(scale * number.value),
            (scale * number.value, row),
            (0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    _name_rows(axis, list(numbers), style)


def _counts(millions: float) -> str:
    return f"{millions:.3g} million" if millions >= 1 else f"{1e6 * millions:,.0f}"


def _name_rows(axis: plt.Axes, names: list[str], style: dict) -> None:
    axis.set_yticks(range(len(names)), names)
    for label, name in zip(axis.get_yticklabels(), names, strict=True):
        label.set_color(style[name][0])
    axis.set_ylim(len(names) - 0.5, -0.7)
    axis.grid(visible=False, axis="y")


def _target(axis: plt.Axes, portraits: dict[str, CohortStatistics], style: dict) -> None:
    """Where the target gene stands among all genes by its change; the best place is the left edge."""
    _strips(
        axis, {name: one.target_rank for name, one in portraits.items()}, style, 100, lambda _: ""
    )
    axis.axvline(100 * TOP, color=MUTED, linestyle=":", linewidth=1, zorder=0)
    for row, one in enumerate(portraits.values()):
        if one.target_first.value is not None:
            said = f"first in {100 * one.target_first.value:.0f} %, top 1 % in {100 * one.target_top.value:.0f} % of {one.target_first.over}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axis.annotate(
                said,
                (0.02, row),
                (0, 9),
                xycoords=axis.get_yaxis_transform(),
                textcoords="offset points",
                fontsize=8,
                bbox=box,
            )
    axis.set(
        title="Rank of the target gene by its change",
        xlabel="% of genes that move at least as much",
    )
    _plain_log(axis)
    axis.set_xlim(100 / _most_genes(portraits) / 1.5, 150)


def _plain_log(axis: plt.Axes, margin: float | None = None) -> None:
    """A logarithmic axis whose numbers are written out."""
    axis.set_xscale("log")
    if margin is not None:
        axis.margins(x=margin)
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(NullLocator())


def _most_genes(portraits: dict[str, CohortStatistics]) -> int:
    """Of cohorts with a target: the first rank of the largest is the axis's left end."""
    return max(
        (one.genes for one in portraits.values() if one.target_rank.value is not None),
        default=int(np.ceil(1 / TOP)),
    )
