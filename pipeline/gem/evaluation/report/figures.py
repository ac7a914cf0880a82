"""Figures of an evaluation, from its tables."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from pipeline.gem.common.plotting import COLOURS, MUTED, STYLE, save_figure


def _predictor_style(name: str) -> tuple[str, str]:
    kind = (
        "oracle"
        if name.startswith("oracle")
        else "gem_tuned"
        if name.startswith("gem_tuned")
        else "gem"
        if name.startswith("gem")
        else "baseline"
    )
    return COLOURS[kind], "D" if name.endswith("_reference") else "o"


@plt.rc_context(STYLE)
def split_scores(
    scores: pd.DataFrame,
    metric: str,
    unit: str,
    better: str,
    path: Path,
    lowest: float | None = None,
) -> None:
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
                axis.axvline(
                    rows.loc[name, "value"],
                    color=_predictor_style(name)[0],
                    linestyle=line,
                    linewidth=1,
                    zorder=0,
                )
        if lowest is not None:
            axis.set_xlim(left=lowest - 0.04)
        axis.set(title=split, xlabel=unit)
    axes[0][0].set_yticks(range(len(order)), order)
    axes[0][0].invert_yaxis()
    figure.suptitle(
        f"{metric} ({better}): dotted ridge, dashed ideal",
        x=0.01,
        ha="left",
        fontsize=10,
        color=MUTED,
    )
    figure.tight_layout()
    save_figure(figure, path)


def _draw_score(
    axis: plt.Axes, position: int, name: str, row: pd.Series, lowest: float | None
) -> None:
    colour, marker = _predictor_style(name)
    if pd.isna(row["value"]):
        axis.text(
            0.02,
            position,
            "not applicable",
            va="center",
            color=MUTED,
            fontsize=7,
            transform=axis.get_yaxis_transform(),
        )
        return
    if lowest is not None and row["value"] < lowest:
        axis.plot(lowest, position, "<", color=colour, markersize=6)
        axis.text(
            lowest + 0.05, position, f"{row['value']:.1f}", va="center", color=MUTED, fontsize=7
        )
        return
    if pd.notna(row["low"]):
        axis.plot(
            [row["low"], row["high"]], [position, position], color=colour, linewidth=2, alpha=0.5
        )
    axis.plot(row["value"], position, marker, color=colour, markersize=6)
