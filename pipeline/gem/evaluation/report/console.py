"""Results as tables on the terminal."""

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.predictors import MODELS
from pipeline.gem.evaluation.report.summary import DIRECTION, ROLES, axis_of, condensed, ordered

SHOWN = ("mse", "skill", "delta_pearson", "discrimination", "calibration")
_WITH_INTERVAL = ("mse", "skill", "skill_replicate", "delta_pearson")
_STYLE = {"floor": "dim", "baseline": "", "model": "bold", "ceiling": "green"}


def show_results(scores: pd.DataFrame, comparisons: pd.DataFrame) -> None:
    """A table per split, from floor to ceiling, then what is better than what: a line per split and model."""
    console = Console(width=None if Console().is_terminal else 160)
    shown = tuple(axis_of(scores) if name == "skill" else name for name in SHOWN)
    for split, rows in scores.groupby("split", sort=False):
        console.print(_table(str(split), rows, shown))
    for split in scores["split"].unique():
        for model in (name for name in MODELS if (scores["predictor"] == name).any()):
            console.print(
                f"[bold]{split}[/bold]  {model}: {condensed(split, model, comparisons)}",
                highlight=False,
                soft_wrap=True,
            )


def _table(split: str, rows: pd.DataFrame, shown: tuple[str, ...]) -> Table:
    table = Table(title=split, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("role", no_wrap=True)
    table.add_column("predictor", no_wrap=True)
    for metric in shown:
        table.add_column(
            f"{metric}\n[dim]{DIRECTION[METRICS[metric].direction]}[/dim]",
            justify="right",
            no_wrap=True,
        )
    previous = None
    for predictor in ordered(rows["predictor"]):
        cells, role = (
            rows[rows["predictor"] == predictor].set_index("metric"),
            ROLES.get(predictor, ""),
        )
        if previous is not None and role != previous:
            table.add_section()
        table.add_row(
            "" if role == previous else role,
            predictor,
            *(_cell(cells.loc[metric], metric) for metric in shown),
            style=_STYLE.get(role, ""),
        )
        previous = role
    return table


def _cell(row: pd.Series, metric: str) -> str:
    if pd.isna(row["value"]):
        return "-"
    digits = 3 if METRICS[metric].unit.startswith("log-CPM") or metric == "calibration" else 2
    shown = metric in _WITH_INTERVAL and pd.notna(row["low"])
    interval = f" [dim]({row['low']:.{digits}f} to {row['high']:.{digits}f})[/dim]" if shown else ""
    return f"{row['value']:.{digits}f}{interval}"
