"""Whether a simulated cohort ranks settings as real cohorts do.

Reads   experiments/cohorts/NAME/scores.csv of two or more runs, each with other settings
Writes  nothing; prints a table
Run     python -m benchmarks.cohorts.agreement NAME NAME ... [--score mse]

R runs of one cohort: its mean scores of GEM, by run.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from benchmarks.cohorts.declarations import SYNTHETIC
from benchmarks.cohorts.scores import SCORES
from benchmarks.cohorts.table import RANKED, number_text, text_table
from pipeline.gem.common.errors import InputError, did_you_mean, exit_with
from pipeline.gem.evaluation.catalogue import GEM

OUTPUT = Path("experiments/cohorts")
MINIMUM = 3  # runs: with two, a rank correlation is one sign

_NOTE = (
    "Runs are ordered by the mean score of GEM over folds. Kendall: tau-b, mean and range over "
    "real cohorts; chance is 0. Pairs: share of the pairs of runs of which the same one is better, "
    "mean over real cohorts; chance is 0.5. Best, worst: share of the real cohorts with the same "
    "best, worst run; chance is 1 / runs. Between real cohorts: each pair of them."
)


@dataclass(frozen=True)
class Agreement:
    """Of the order of runs by one cohort with the order by another."""

    kendall: float | None  # tau-b; None if one cohort scores all runs equally
    pairs: float  # share of pairs of runs with the same sign of the difference
    best: bool  # the same run is best
    worst: bool

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray, higher: bool) -> "Agreement":
        """From the scores (R,) of the same runs; `higher`: more is better."""
        sign = 1 if higher else -1
        first, second = sign * np.asarray(first), sign * np.asarray(second)
        tau = float(kendalltau(first, second).statistic)
        same = [
            np.sign(first[a] - first[b]) == np.sign(second[a] - second[b])
            for a, b in combinations(range(len(first)), 2)
        ]
        return cls(
            None if np.isnan(tau) else tau,
            float(np.mean(same)),
            bool(first.argmax() == second.argmax()),
            bool(first.argmin() == second.argmin()),
        )


def scores_by_run(runs: Mapping[str, pd.DataFrame], score: str) -> pd.DataFrame:
    """A row per run and a column per cohort that all runs have: the mean score of GEM on the scale
    that counts. InputError for runs without a cohort in common."""
    columns = {}
    for name, scores in runs.items():
        own = scores[scores["counts"] & (scores["predictor"] == GEM)]
        columns[name] = own.set_index("cohort")[score].astype(float)
    order = list(dict.fromkeys(name for own in columns.values() for name in own.index))
    table = pd.DataFrame(columns).T.reindex(columns=order).dropna(axis="columns")
    if table.empty:
        raise InputError(f"{', '.join(runs)}: no cohort has a {score} in all of these runs")
    return table


def agreement_table(scores: pd.DataFrame, simulated: set[str], score: str) -> pd.DataFrame:
    """A row per simulated cohort, and one for the real cohorts among themselves: cohort, kendall,
    kendall_low, kendall_high, pairs, best, worst, cohorts (real ones that it is compared with).

    `scores`: of `scores_by_run`. InputError without a simulated and a real cohort.
    """
    real = [name for name in scores if name not in simulated]
    sources = [name for name in scores if name in simulated]
    if not real or not sources:
        raise InputError(
            f"the runs have {', '.join(scores) or 'no cohort'} in common: expected a simulated and "
            "a real cohort; name both in the command of the benchmark"
        )
    rows = [
        _row(name, [(scores[name], scores[other]) for other in real], score) for name in sources
    ]
    if len(real) > 1:
        pairs = [(scores[one], scores[other]) for one, other in combinations(real, 2)]
        rows.append(_row("between real cohorts", pairs, score))
    return pd.DataFrame(rows)


def _row(name: str, pairs: list[tuple[pd.Series, pd.Series]], score: str) -> dict:
    found = [Agreement.of(one, other, SCORES[score][1]) for one, other in pairs]
    taus = [each.kendall for each in found if each.kendall is not None]
    return {
        "cohort": name,
        "kendall": float(np.mean(taus)) if taus else None,
        "kendall_low": min(taus, default=None),
        "kendall_high": max(taus, default=None),
        "pairs": float(np.mean([each.pairs for each in found])),
        "best": float(np.mean([each.best for each in found])),
        "worst": float(np.mean([each.worst for each in found])),
        "cohorts": len(found),
    }


def markdown(scores: pd.DataFrame, agreement: pd.DataFrame, score: str) -> str:
    """Scores by cohort and run, and the agreement."""
    header = ["cohort", *scores.index]
    lines = [[name, *(number_text(value, 3) for value in scores[name])] for name in scores]
    agreement_lines = [
        [
            row.cohort,
            _range(row),
            *(number_text(value, 2) for value in (row.pairs, row.best, row.worst)),
            str(row.cohorts),
        ]
        for row in agreement.itertuples()
    ]
    columns = ["cohort", "Kendall", "pairs", "best", "worst", "compared with"]
    parts = [
        f"{score} of GEM:",
        text_table(header, lines),
        text_table(columns, agreement_lines),
        _NOTE,
    ]
    return "\n\n".join(parts)


def _range(row) -> str:
    low, high = number_text(row.kendall_low, 2), number_text(row.kendall_high, 2)
    return f"{number_text(row.kendall, 2)} ({low} to {high})"


def read_runs(names: list[str], folder: Path = OUTPUT) -> dict[str, pd.DataFrame]:
    """The scores of each run. InputError names every run that is absent."""
    known = sorted(path.parent.name for path in folder.glob("*/scores.csv"))
    problems = [
        f"{folder / name}/scores.csv: absent{did_you_mean(name, known)}; run the benchmark with "
        f"--name {name}"
        for name in dict.fromkeys(names)
        if name not in known
    ]
    if len(set(names)) < MINIMUM:
        problems.append(f"{len(set(names))} runs: expected {MINIMUM} or more")
    if problems:
        raise InputError(*problems)
    return {name: pd.read_csv(folder / name / "scores.csv") for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="NAME", nargs="+", help="of runs of benchmarks.cohorts")
    parser.add_argument("--score", choices=RANKED, default=RANKED[0], help="(%(default)s)")
    options = parser.parse_args()
    scores = scores_by_run(read_runs(options.runs), options.score)
    table = agreement_table(scores, set(SYNTHETIC), options.score)
    print(markdown(scores, table, options.score))


if __name__ == "__main__":
    exit_with(main)
