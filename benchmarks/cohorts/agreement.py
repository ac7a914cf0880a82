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
from benchmarks.cohorts.table import NEAR, RANKED, number_text, text_table
from pipeline.gem.common.errors import InputError, did_you_mean, exit_with
from pipeline.gem.evaluation.catalogue import GEM

OUTPUT = Path("experiments/cohorts")
MINIMUM = 3  # runs: with two, a rank correlation is one sign

_NOTE = (
    "Runs are ordered by the mean score of GEM over folds. Kendall: tau-b, mean and range over "
    "real cohorts; chance is 0. Clear pairs: pairs of runs that differ by more than 2 % (mse) or "
    "0.02 (correlation) in both cohorts, over all real cohorts, and the share of them of which the "
    "same run is better; chance is 0.5. Best, worst: share of the real cohorts with the same best, "
    "worst run; chance is 1 / runs. Between real cohorts: each pair of them."
)


@dataclass(frozen=True)
class Agreement:
    """Of the order of runs by one cohort with the order by another."""

    kendall: float | None  # tau-b; None if one cohort scores all runs equally
    pairs: int  # of runs that differ clearly in both cohorts
    same: int  # of these: the same run is better
    best: bool  # the same run is best
    worst: bool

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray, score: str) -> "Agreement":
        """From the values (R,) of a score for the same runs."""
        tau = float(kendalltau(first, second).statistic)
        signs = _signs(first, score) * _signs(second, score)
        best = np.argmax if SCORES[score][1] else np.argmin
        worst = np.argmin if SCORES[score][1] else np.argmax
        return cls(
            None if np.isnan(tau) else tau,
            int(np.count_nonzero(signs)),
            int(np.sum(signs > 0)),
            bool(best(first) == best(second)),
            bool(worst(first) == worst(second)),
        )


def _signs(values: np.ndarray, score: str) -> np.ndarray:
    """Of the differences of all pairs of runs: 1, -1, or 0 for one that is not clear."""
    one, other = np.triu_indices(len(values), 1)
    difference = values[one] - values[other]
    least = NEAR - 1
    if score == "mse":
        least = least * np.minimum(values[one], values[other])
    return np.where(np.abs(difference) > least, np.sign(difference), 0)


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
    kendall_low, kendall_high, pairs (clear ones), same (share of them), best, worst, cohorts (real
    ones that it is compared with).

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
    found = [Agreement.of(one.to_numpy(), other.to_numpy(), score) for one, other in pairs]
    number = sum(each.pairs for each in found)
    taus = [each.kendall for each in found if each.kendall is not None]
    return {
        "cohort": name,
        "kendall": float(np.mean(taus)) if taus else None,
        "kendall_low": min(taus, default=None),
        "kendall_high": max(taus, default=None),
        "pairs": number,
        "same": sum(each.same for each in found) / number if number else None,
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
            f"{number_text(row.same, 2)} of {row.pairs}",
            *(number_text(value, 2) for value in (row.best, row.worst)),
            str(row.cohorts),
        ]
        for row in agreement.itertuples()
    ]
    columns = ["cohort", "Kendall", "clear pairs", "best", "worst", "compared with"]
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
