"""The results of an evaluation as tables on the terminal."""

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline.gem.evaluation.catalogue import MODELS, PREDICTORS
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.report.summary import (
    DIRECTION,
    SHARED_MARK,
    SHARED_NOTE,
    is_shared,
    main_metrics,
    ordered,
    summary_line,
)

_WITH_INTERVAL = ("mse", "skill", "skill_replicate", "delta_pearson")
_STYLE = {"floor": "dim", "baseline": "", "model": "bold", "ceiling": "green"}
_WIDTH = 160  # where the output is not a terminal


def show_results(scores: pd.DataFrame, comparisons: pd.DataFrame) -> None:
    """Prints a table per split, from floor to ceiling, and a line per split and model."""
    console = Console(width=None if Console().is_terminal else _WIDTH)
    splits = list(scores["split"].unique())
    metrics = main_metrics(scores)
    for split in splits:
        rows = scores[scores["split"] == split]
        console.print(_table(split, rows, metrics))
        if any(map(is_shared, rows.itertuples())):
            console.print(SHARED_NOTE, highlight=False, soft_wrap=True)
    for split in splits:
        for model in ordered(set(scores["predictor"]) & set(MODELS)):
            line = summary_line(split, model, comparisons)
            console.print(f"[bold]{split}[/bold]  {model}: {line}", highlight=False, soft_wrap=True)


def _table(split: str, rows: pd.DataFrame, metrics: list[str]) -> Table:
    table = Table(title=split, title_justify="left", title_style="bold", header_style="bold")
    for column in ("role", "predictor"):
        table.add_column(column, no_wrap=True)
    for metric in metrics:
        direction = DIRECTION[METRICS[metric].direction]
        table.add_column(f"{metric}\n[dim]{direction}[/dim]", justify="right", no_wrap=True)
    previous = None
    for predictor in ordered(rows["predictor"]):
        role = PREDICTORS[predictor].role
        if previous not in (None, role):
            table.add_section()
        scores = rows[rows["predictor"] == predictor].set_index("metric")
        cells = [_cell(scores.loc[metric], metric) for metric in metrics]
        shown_role = "" if role == previous else role
        table.add_row(shown_role, predictor, *cells, style=_STYLE[role])
        previous = role
    return table


def _cell(row: pd.Series, metric: str) -> str:
    if pd.isna(row["value"]):
        return "-"
    digits = 3 if METRICS[metric].unit.startswith("log-CPM") or metric == "calibration" else 2
    text = f"{row['value']:.{digits}f}"
    if metric in _WITH_INTERVAL and pd.notna(row["low"]):
        text += f" [dim]({row['low']:.{digits}f} to {row['high']:.{digits}f})[/dim]"
    return f"{text} {SHARED_MARK}" if is_shared(row) else text
