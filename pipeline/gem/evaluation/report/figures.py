"""Figures of an evaluation: every predictor's scores, one figure per metric."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from pipeline.gem.common.files import folder_replacement
from pipeline.gem.common.plotting import COLOURS, MUTED, STYLE, save_figure
from pipeline.gem.evaluation.catalogue import (
    PREDICTORS,
    REFERENCE_SUFFIX,
    SKILL_BASELINE,
    SKILL_CEILING,
)
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.report.summary import DIRECTION, main_metrics, ordered

_LOWEST_SKILL = -0.5
# Vertical lines: predictor to line style and its name in the title.
_GUIDES = {SKILL_BASELINE: (":", "dotted ridge"), SKILL_CEILING: ("--", "dashed ideal")}


def draw_figures(scores: pd.DataFrame, folder: Path) -> None:
    """<metric>.png for every main metric, in the place of those of an earlier evaluation."""
    with folder_replacement(folder) as temporary:
        for metric in main_metrics(scores):
            draw_scores(scores, metric, temporary / f"{metric}.png")


def _colour(predictor: str) -> str:
    return COLOURS[PREDICTORS[predictor].colour]


@plt.rc_context(STYLE)
def draw_scores(scores: pd.DataFrame, metric: str, path: Path) -> None:
    """One metric of every predictor, with 95 % intervals, an axis per split, from floor to ceiling.

    A skill far below the rest is an arrow at the left edge with its value.
    """
    table = scores[scores["metric"] == metric]
    splits, predictors = list(scores["split"].unique()), ordered(scores["predictor"])
    lowest = _LOWEST_SKILL if metric.startswith("skill") else None
    size = (1.6 + 3.0 * len(splits), 0.6 + 0.34 * len(predictors))
    figure, axes = plt.subplots(1, len(splits), figsize=size, sharey=True, squeeze=False)
    for axis, split in zip(axes[0], splits, strict=True):
        rows = table[table["split"] == split].set_index("predictor")
        for y, predictor in enumerate(predictors):
            _draw_score(axis, y, predictor, rows.loc[predictor], lowest)
        for predictor, (line, _) in _GUIDES.items():
            if predictor in rows.index and pd.notna(x := rows.loc[predictor, "value"]):
                axis.axvline(x, color=_colour(predictor), linestyle=line, linewidth=1, zorder=0)
        if lowest is not None:
            axis.set_xlim(left=lowest - 0.04)
        axis.set(title=split, xlabel=METRICS[metric].unit)
    axes[0][0].set_yticks(range(len(predictors)), predictors)
    axes[0][0].invert_yaxis()
    guides = ", ".join(name for predictor, (_, name) in _GUIDES.items() if predictor in predictors)
    title = f"{metric} ({DIRECTION[METRICS[metric].direction]}): {guides}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=MUTED)
    figure.tight_layout()
    save_figure(figure, path)


def _draw_score(
    axis: plt.Axes, y: int, predictor: str, row: pd.Series, lowest: float | None
) -> None:
    colour, text = _colour(predictor), {"va": "center", "color": MUTED, "fontsize": 7}
    if pd.isna(row["value"]):
        axis.text(0.02, y, "not applicable", transform=axis.get_yaxis_transform(), **text)
    elif lowest is not None and row["value"] < lowest:
        axis.plot(lowest, y, "<", color=colour, markersize=6)
        axis.text(lowest + 0.05, y, f"{row['value']:.1f}", **text)
    else:
        if pd.notna(row["low"]):
            axis.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2, alpha=0.5)
        marker = "D" if predictor.endswith(REFERENCE_SUFFIX) else "o"
        axis.plot(row["value"], y, marker, color=colour, markersize=6)
