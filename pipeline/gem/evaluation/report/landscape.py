"""The landscape of a search for the report: which settings, their scores, which keys matter.

Read from the tables of the search, in the folder of the model of its winner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.evaluation.report import svg

FILES = ("best.yaml", "trials.csv", "importance.csv", "confirmed.csv")
MOST_SETTINGS = 20  # rows of the table
_LOG_RATIO = 10.0  # of the largest to the smallest value of a key: beyond, its axis is logarithmic


@dataclass(frozen=True)
class Setting:
    """A trial: its score, and the mean and standard deviation over the seeds that confirm it."""

    trial: int
    state: str
    epochs: int
    score: float | None
    mean: float | None
    deviation: float | None
    values: tuple[object, ...]  # of the keys


@dataclass(frozen=True)
class Landscape:
    """The result of a search."""

    name: str
    summary: str  # a sentence
    metric: str
    trials: pd.DataFrame
    importance: pd.DataFrame
    confirmed: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> "Landscape":
        """From the files FILES of a folder."""
        best, *tables = (folder / name for name in FILES)
        trials, importance, confirmed = map(pd.read_csv, tables)
        metric = confirmed.columns[2]  # after trial and seed
        if "objective" in importance:
            importance = importance[importance["objective"] == metric]
        return cls(folder.name, summary_of(best), metric, trials, importance, confirmed)

    @property
    def keys(self) -> list[str]:
        """The searched keys of params.yaml; no other column has a dot."""
        return [name for name in self.trials if "." in name]

    @property
    def _rank(self) -> pd.Series:
        """0 to 1, best: the share of other trials that a trial beats; 1 on a Pareto front."""
        column = "win_rate" if "win_rate" in self.trials else "pareto_optimal"
        return self.trials[column].astype(float)

    def settings(self) -> list[Setting]:
        """The best settings first, at most MOST_SETTINGS."""
        column = "value" if "value" in self.trials else self.metric
        best = self.trials.assign(rank=self._rank).sort_values(
            ["rank", "trial"], ascending=[False, True]
        )
        fits = self.confirmed.groupby("trial")[self.metric]
        means, deviations = fits.mean(), fits.std()
        rows = []
        for row in best.head(MOST_SETTINGS).to_dict("records"):
            trial, values = row["trial"], tuple(row[key] for key in self.keys)
            confirmed = means.get(trial), deviations.get(trial)
            rows.append(
                Setting(trial, row["state"], row["epochs"], row[column], *confirmed, values)
            )
        return rows

    def importances(self) -> list[tuple[str, str, float | None]]:
        """(key, chart, share) by PED-ANOVA, the most important first."""
        rows = []
        for row in self.importance.itertuples():
            share = 0.0 if pd.isna(row.ped_anova) else row.ped_anova
            label = f"importance of {row.parameter}: {share:.2f}"
            rows.append((row.parameter, svg.stacked_bar([("fill gem", share)], 1.0, label), share))
        return rows

    def slices(self) -> list[tuple[str, str]]:
        """(key, chart) of the rank of every trial against its value of a key."""
        charts = []
        for key in self.keys:
            values, ends = positions(self.trials[key].tolist())
            label = f"rank of each setting against its {key}"
            charts.append((key, svg.slice_chart(values, self._rank.to_numpy(), ends, label)))
        return charts


def summary_of(best: Path) -> str:
    """The result of a search in one sentence, from the first line of its best.yaml."""
    return best.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def positions(values: Sequence[object]) -> tuple[np.ndarray, tuple[str, str]]:
    """(values from 0 to 1, the texts of the lowest and the highest). Numbers over more than a
    factor of _LOG_RATIO on a logarithmic axis; other values by their order of appearance."""
    numbers = pd.to_numeric(pd.Series(values), errors="coerce")
    if numbers.isna().all():
        levels = list(dict.fromkeys(str(value) for value in values))
        numbers = pd.Series([levels.index(str(value)) for value in values], dtype=float)
        ends = levels[0], levels[-1]
    else:
        low, high = numbers.min(), numbers.max()
        ends = f"{low:.3g}", f"{high:.3g}"
        if low > 0 and high > _LOG_RATIO * low:
            numbers = np.log(numbers)
    low, high = numbers.min(), numbers.max()
    return ((numbers - low) / max(high - low, 1e-12)).to_numpy(), ends
