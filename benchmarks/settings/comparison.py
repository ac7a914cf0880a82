"""Each setting against the defaults, paired by fold and training seed.

C real cohorts. The mse of a cohort is its mean over folds, on the scale that counts there.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.cohorts.declarations import SYNTHETIC
from benchmarks.cohorts.table import NEAR, number_text, text_table
from benchmarks.settings.inner_run import GEM, NETWORK

DEFAULT = "default"
PARTS_COMPARED = (GEM, NETWORK)  # what settings change; they do not reach the mixed model

_NOTE = (
    "mse of held-out conditions relative to the defaults: geometric mean over real cohorts and "
    "its 95 % interval (Student's t over cohorts of the log ratio). Lower, higher: real cohorts "
    "that differ by more than 2 %. Correlation: mean difference of that of the effect over real "
    "cohorts. network: the same fits without the mixed model."
)


def cohort_scores(folds: pd.DataFrame, scales: Mapping[str, str]) -> pd.DataFrame:
    """A row per part, setting and cohort: mse and pearson, means over the folds of the cohort, on
    the scale that counts. `scales`: of each cohort."""
    counted = folds[folds["scale"] == folds["cohort"].map(scales)]
    groups = counted.groupby(["predictor", "setting", "cohort"], sort=False)
    return groups[["mse", "pearson"]].mean().reset_index()


def compare(folds: pd.DataFrame, scales: Mapping[str, str]) -> pd.DataFrame:
    """A row per part and setting: predictor, setting, cohorts (C), ratio, low, high, lower, higher,
    correlation, and the ratio of each cohort by its name."""
    scores = cohort_scores(folds, scales)
    rows = []
    for part in PARTS_COMPARED:
        own = scores[scores["predictor"] == part]
        errors = own.pivot(index="setting", columns="cohort", values="mse")
        effects = own.pivot(index="setting", columns="cohort", values="pearson").astype(float)
        ratios = errors / errors.loc[DEFAULT]
        differences = effects - effects.loc[DEFAULT]
        real = [name for name in dict.fromkeys(own["cohort"]) if name not in SYNTHETIC]
        for setting in dict.fromkeys(own["setting"]):
            if setting == DEFAULT:
                continue
            place = {"predictor": part, "setting": setting}
            place |= over_cohorts(ratios.loc[setting, real].to_numpy())
            place["correlation"] = float(differences.loc[setting, real].mean())
            rows.append(place | ratios.loc[setting].to_dict())
    return pd.DataFrame(rows)


def over_cohorts(ratios: np.ndarray) -> dict[str, float | int | None]:
    """Geometric mean of the ratios (C,), its 95 % interval by Student's t, and counts. Without an
    interval for fewer than two cohorts."""
    ratios = ratios[np.isfinite(ratios)]
    number, low, high = len(ratios), None, None
    mean = float(np.log(ratios).mean()) if number else np.nan
    if number > 1:
        error = np.log(ratios).std(ddof=1) / np.sqrt(number)
        margin = stats.t.ppf(0.975, number - 1) * error
        low, high = float(np.exp(mean - margin)), float(np.exp(mean + margin))
    return {
        "cohorts": number,
        "ratio": float(np.exp(mean)),
        "low": low,
        "high": high,
        "lower": int(np.sum(ratios < 1 / NEAR)),
        "higher": int(np.sum(ratios > NEAR)),
    }


def left_out(comparisons: pd.DataFrame, part: str) -> pd.DataFrame:
    """A row per real cohort: cohort, setting (that with the least mean of the log ratio over the
    other real cohorts, or the defaults), and its ratio on this cohort. No choice saw the cohort
    that it is measured on."""
    own = comparisons[comparisons["predictor"] == part].set_index("setting")
    real = [name for name in cohorts_of(comparisons) if name not in SYNTHETIC]
    logs = np.log(own[real].astype(float))
    logs.loc[DEFAULT] = 0.0
    rows = []
    for name in real:
        best = logs.drop(columns=name).mean(axis=1).idxmin()
        rows.append({"cohort": name, "setting": best, "ratio": float(np.exp(logs.loc[best, name]))})
    return pd.DataFrame(rows)


def cohorts_of(comparisons: pd.DataFrame) -> list[str]:
    fixed = ["predictor", "setting", "cohorts", "ratio", "low", "high", "lower", "higher"]
    return [name for name in comparisons if name not in (*fixed, "correlation")]


# text


def markdown(comparisons: pd.DataFrame) -> str:
    """A table of the settings, and one of the choice for each cohort by the others."""
    simulated = [name for name in cohorts_of(comparisons) if name in SYNTHETIC]
    header = ["setting"]
    for part in PARTS_COMPARED:
        header += [f"{part}: mse", "lower, higher", "correlation", *simulated]
    lines = []
    by_part = {part: of_part(comparisons, part) for part in PARTS_COMPARED}
    for setting in by_part[PARTS_COMPARED[0]].index:
        cells = [setting]
        for rows in by_part.values():
            row = rows.loc[setting]
            cells += [_interval(row), f"{row['lower']}, {row['higher']}"]
            cells += ["–" if pd.isna(row["correlation"]) else f"{row['correlation']:+.3f}"]
            cells += [number_text(row[name], 2) for name in simulated]
        lines.append(cells)
    texts = [text_table(header, lines), _NOTE]
    if by_part[PARTS_COMPARED[0]]["cohorts"].max() > 1:
        texts.append(_choices(comparisons))
    return "\n\n".join(texts) + "\n"


def of_part(comparisons: pd.DataFrame, part: str) -> pd.DataFrame:
    return comparisons[comparisons["predictor"] == part].set_index("setting")


def _interval(row: pd.Series) -> str:
    mean = number_text(row["ratio"], 3)
    if pd.isna(row["low"]):
        return mean
    return f"{mean} ({number_text(row['low'], 2)} to {number_text(row['high'], 2)})"


def _choices(comparisons: pd.DataFrame) -> str:
    """What the other cohorts would choose for each cohort, and what that gives."""
    lines, means = [], []
    tables = {part: left_out(comparisons, part).set_index("cohort") for part in PARTS_COMPARED}
    for cohort in tables[PARTS_COMPARED[0]].index:
        rows = [table.loc[cohort] for table in tables.values()]
        cells = [text for row in rows for text in (row["setting"], number_text(row["ratio"], 3))]
        lines.append([cohort, *cells])
    for table in tables.values():
        means += ["geometric mean", number_text(np.exp(np.log(table["ratio"]).mean()), 3)]
    header = ["cohort"]
    for part in PARTS_COMPARED:
        header += [f"{part}: best setting of the other cohorts", "ratio here"]
    return text_table(header, [*lines, ["", *means]])
