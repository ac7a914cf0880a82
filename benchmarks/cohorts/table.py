"""The comparison over cohorts: mean scores, paired differences, ranks, wins and losses.

F folds of a cohort.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmarks.cohorts.fold_run import HALF, MEANS
from benchmarks.cohorts.rivals import RIVALS
from benchmarks.cohorts.scores import SCORES
from pipeline.gem.evaluation.bootstrap import Bootstrap
from pipeline.gem.evaluation.catalogue import BASELINES, GEM, REFERENCE_SUFFIX, SKILL_CEILING

SIMPLE = (*BASELINES, *RIVALS)  # what anyone could fit
MODELS = (GEM, GEM + REFERENCE_SUFFIX)
CEILINGS = (SKILL_CEILING, HALF)  # the first that a cohort has is shown
RANKED = ("mse", "pearson")
DRAWS = 2000  # bootstrap samples of the folds
NEAR = 1.02  # within 2 % of the best simple predictor

_NOTE = (
    "Mean squared error / correlation of the effect, of condition means of log-CPM. Difference: "
    "GEM minus the best simple predictor, with its 95 % interval over folds. Top 50: correlation / "
    "share of right signs on the genes that change most. Ceiling: half of the samples predict the "
    "other half (noisy), or the ideal predictor of a simulated cohort. Rows in brackets do not "
    "count. Over cohorts: geometric mean of the ratio of errors; mean difference of correlations."
)


@dataclass(frozen=True)
class Comparison:
    """Every table has a row per cohort and scale and whatever its name says."""

    scores: pd.DataFrame  # cohort, scale, counts, predictor, folds, and the mean of each score
    # cohort, scale, counts, predictor (a model), score, value, against (the best simple predictor),
    # best (its value), difference, low, high, ratio, ratio_low, ratio_high, folds, verdict
    differences: pd.DataFrame
    ranks: pd.DataFrame  # predictor, and its mean rank over cohorts by each of RANKED

    @classmethod
    def of(cls, folds: pd.DataFrame, scales: Mapping[str, str], seed: int) -> "Comparison":
        """From the rows of folds. `scales`: of each cohort, that which ranks and wins compare."""
        for name in SCORES:
            if name not in folds:
                folds = folds.assign(**{name: np.nan})
        scores = _mean_scores(folds, scales)
        differences = [
            row
            for (cohort, scale), rows in folds.groupby(["cohort", "scale"], sort=False)
            for row in _differences(cohort, scale, scales[cohort] == scale, rows, seed)
        ]
        return cls(scores, pd.DataFrame(differences), _ranks(scores))

    def groups(self) -> list[tuple[tuple[str, str], pd.DataFrame]]:
        """((cohort, scale), rows of `scores`); of a cohort the scale that counts comes first."""
        groups = list(self.scores.groupby(["cohort", "scale"], sort=False))
        order = {name: number for number, name in enumerate(self.scores["cohort"].unique())}
        return sorted(groups, key=lambda item: (order[item[0][0]], not item[1]["counts"].iloc[0]))


def _mean_scores(folds: pd.DataFrame, scales: Mapping[str, str]) -> pd.DataFrame:
    groups = folds.groupby(["cohort", "scale", "predictor"], sort=False)
    means = groups[list(SCORES)].mean().reset_index()
    means.insert(2, "counts", [scales[row.cohort] == row.scale for row in means.itertuples()])
    means.insert(4, "folds", groups.size().to_numpy())
    return means


def _differences(
    cohort: str, scale: str, counts: bool, rows: pd.DataFrame, seed: int
) -> list[dict]:
    result = []
    for score in RANKED:
        table = rows.pivot(index="fold", columns="predictor", values=score).astype(float)
        simple = [name for name in SIMPLE if name in table and table[name].notna().any()]
        if not simple:
            continue
        means, higher = table[simple].mean(), SCORES[score][1]
        best = means.idxmax() if higher else means.idxmin()
        for model in MODELS:
            if model not in table or table[model].isna().all():
                continue
            own = {"cohort": cohort, "scale": scale, "counts": counts, "predictor": model}
            values = paired(table[model].to_numpy(), table[best].to_numpy(), seed)
            own |= {"score": score, "against": best} | values
            result.append(own | {"verdict": verdict(score, values)})
    return result


def paired(own: np.ndarray, other: np.ndarray, seed: int) -> dict[str, float | int | None]:
    """Means over the folds (F,) that both have, their difference and ratio, and 95 % bootstrap
    intervals over folds."""
    both = np.isfinite(own) & np.isfinite(other)
    own, other = own[both], other[both]
    resamples = Bootstrap(np.arange(len(own)), DRAWS, seed)
    first, second = resamples.condition_mean(own), resamples.condition_mean(other)
    difference = resamples.score(first - second)
    ratio = resamples.score(
        np.divide(first, second, out=np.full(len(first), np.nan), where=second > 0)
    )
    return {
        "value": float(first[0]),
        "best": float(second[0]),
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "folds": len(own),
    }


def verdict(score: str, values: Mapping[str, float]) -> str:
    """win, near (mse within 2 % of the best) or loss; on the mean over folds."""
    difference = values["difference"] if SCORES[score][1] else -values["difference"]
    if difference > 0:
        return "win"
    return "near" if score == "mse" and values["ratio"] <= NEAR else "loss"


def _ranks(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean rank over cohorts, 1 the best, of those that every fold of a cohort scores."""
    counted = scores[scores["counts"] & scores["predictor"].isin([*SIMPLE, *MODELS])]
    ranks = {}
    for score in RANKED:
        table = counted.pivot(index="cohort", columns="predictor", values=score).astype(float)
        # What predicts no effect, or is absent, is last.
        filled = table.fillna(-np.inf if SCORES[score][1] else np.inf)
        ranks[score] = filled.rank(axis=1, ascending=not SCORES[score][1]).mean()
    ordered = [name for name in (*SIMPLE, *MODELS) if name in ranks["mse"].index]
    return pd.DataFrame(ranks).loc[ordered].rename_axis("predictor").reset_index()


# text


def markdown(comparison: Comparison) -> str:
    """Three tables: cohorts, ranks, wins."""
    return "\n\n".join([_cohorts(comparison), _rank_table(comparison), _wins(comparison)]) + "\n"


def _cohorts(comparison: Comparison) -> str:
    header = ["cohort", "folds", *MODELS, "best simple", "difference of mse", "ceiling"]
    header += ["top 50: gem", "top 50: best simple", "calibration"]
    lines = []
    for (cohort, scale), rows in comparison.groups():
        by_name = rows.set_index("predictor")
        found = comparison.differences
        found = found[(found["cohort"] == cohort) & (found["scale"] == scale)]
        simple = best_simple(by_name)
        name = cohort if scale == MEANS else f"{cohort}, {scale}"
        if not rows["counts"].iloc[0]:
            name = f"({cohort}, {scale})"
        cells = [_pair(by_name, model) for model in MODELS]
        best = f"{_pair(by_name, simple['mse'])} {simple['mse']}"
        if simple.get("pearson") not in (None, simple["mse"]):
            best += (
                f"; {number_text(by_name.loc[simple['pearson'], 'pearson'], 2)} {simple['pearson']}"
            )
        tops = [_top(by_name, GEM), _top(by_name, simple["mse"])]
        calibration = number_text(by_name.loc[GEM, "calibration"], 2)
        line = [
            name,
            str(rows["folds"].max()),
            *cells,
            best,
            _difference(found),
            _pair(by_name, ceiling(by_name)),
        ]
        lines.append([*line, *tops, calibration])
    return f"{text_table(header, lines)}\n\n{_NOTE}"


def ceiling(by_name: pd.DataFrame) -> str:
    """The ideal predictor of a simulated cohort, else the half of the samples."""
    return next((name for name in CEILINGS if name in by_name.index), HALF)


def best_simple(by_name: pd.DataFrame) -> dict[str, str]:
    """The best simple predictor of a cohort by each of RANKED that one has."""
    simple = by_name.loc[[name for name in SIMPLE if name in by_name.index]]
    found = {}
    for score in RANKED:
        values = simple[score].astype(float).dropna()
        if len(values):
            found[score] = values.idxmax() if SCORES[score][1] else values.idxmin()
    return found


def _rank_table(comparison: Comparison) -> str:
    lines = [
        [row.predictor, number_text(row.mse, 1), number_text(row.pearson, 1)]
        for row in comparison.ranks.itertuples()
    ]
    return text_table(["predictor", "mean rank by mse", "mean rank by correlation"], lines)


def _wins(comparison: Comparison) -> str:
    found = comparison.differences[comparison.differences["counts"]]
    lines = []
    for (model, score), rows in found.groupby(["predictor", "score"], sort=False):
        number = rows["verdict"].value_counts()
        clear = ((rows["low"] > 0) | (rows["high"] < 0)).sum()
        mean = f"{rows['difference'].mean():+.3f}"
        if score == "mse":
            mean = f"x {np.exp(np.log(rows['ratio']).mean()):.2f}"
        counts = [str(number.get(key, 0)) for key in ("win", "near", "loss")]
        lost = ", ".join(rows.loc[rows["verdict"] == "loss", "cohort"]) or "none"
        lines.append([model, score, mean, *counts, f"{clear} of {len(rows)}", lost])
    header = [
        "model",
        "score",
        "over cohorts",
        "wins",
        "within 2 %",
        "losses",
        "interval without 0",
        "lost",
    ]
    return text_table(header, lines)


def _difference(found: pd.DataFrame) -> str:
    rows = found[(found["predictor"] == GEM) & (found["score"] == "mse")]
    if not len(rows):
        return ""
    row = rows.iloc[0]
    if pd.isna(row["low"]):
        return f"{row['difference']:+.3f}"
    return f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def _pair(by_name: pd.DataFrame, name: str) -> str:
    if name not in by_name.index:
        return ""
    row = by_name.loc[name]
    return f"{number_text(row['mse'], 3)} / {number_text(row['pearson'], 2)}"


def _top(by_name: pd.DataFrame, name: str) -> str:
    row = by_name.loc[name]
    return f"{number_text(row['top_pearson'], 2)} / {number_text(row['top_direction'], 2)}"


def number_text(value: float | None, digits: int) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def text_table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
