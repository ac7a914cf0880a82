"""Results as tables on the terminal."""

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline.gem.metrics import METRICS

_SHOWN = ("mse", "skill", "delta_pearson")
_MEANING = {
    "no_change": "floor",
    "training_mean": "floor",
    "additive": "baseline",
    "ridge": "baseline",
    "oracle_metadata": "ideal",
    "oracle_omniscient": "omniscient",
}


def show_results(scores: pd.DataFrame, comparisons: pd.DataFrame) -> None:
    """A table per split, from floor to ceiling, then what is better than what."""
    console = Console(width=None if Console().is_terminal else 120)
    for split, rows in scores.groupby("split", sort=False):
        table = Table(title=str(split), title_justify="left", title_style="bold", header_style="bold")
        table.add_column("predictor")
        for metric in _SHOWN:
            table.add_column(f"{metric} ({'lower' if METRICS[metric].direction == 'lower' else 'higher'} is better)", justify="right")
        for predictor, of_predictor in rows.groupby("predictor", sort=False):
            cells = of_predictor.set_index("metric")
            label = f"{predictor} [dim]({_MEANING[predictor]})[/dim]" if predictor in _MEANING else f"[bold]{predictor}[/bold]"
            table.add_row(label, *(_cell(cells.loc[metric]) for metric in _SHOWN))
        console.print(table)
    for row in comparisons.itertuples():
        if row.verdict == "no clear difference":
            console.print(f"{row.split}: no clear difference between {row.predictor} and {row.against}", highlight=False)
        else:
            low, high = sorted((abs(row.low), abs(row.high)))
            moved = "lower" if row.verdict == "better" else "higher"
            verdict = f"{row.predictor} is [bold]{row.verdict}[/bold] than {row.against}"
            over = f"(interval over {row.number} x {row.of})"
            console.print(f"{row.split}: {verdict}: mse {moved} by {low:.4f} to {high:.4f} {over}", highlight=False)


def _cell(row: pd.Series) -> str:
    if pd.isna(row["value"]):
        return "-"
    interval = "" if pd.isna(row["low"]) else f" [dim]({row['low']:.3f} to {row['high']:.3f})[/dim]"
    return f"{row['value']:.3f}{interval}" if abs(row["value"]) < 10 else f"{row['value']:.1f}"
