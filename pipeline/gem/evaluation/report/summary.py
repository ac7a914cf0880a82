"""What the tables say, in sentences: better or worse only where the paired interval is clear of zero, and else nothing is claimed."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from pipeline.gem.evaluation.predictors import CEILINGS, FLOORS, MODELS, PREDICTORS

BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"
# Who could be beaten by saying nothing of the sample, by a simple rule or fit, and by nobody.
TRIVIAL = ("no_change", "training_mean", "perturbed_mean")
ROLES = {
    **dict.fromkeys(FLOORS, "baseline"),
    **dict.fromkeys(TRIVIAL, "floor"),
    **dict.fromkeys(MODELS, "model"),
    **dict.fromkeys(("replicate", *CEILINGS), "ceiling"),
}
ORDER = (*FLOORS, *MODELS, "replicate", *CEILINGS)  # from floor to ceiling
MEANING = {
    "no_change": "the matched controls: no perturbation does anything",
    "training_mean": "one profile for all: the mean of training",
    "perturbed_mean": "the mean of all treated samples, or of all controls",
    "matched_mean": "the same within the sample's context",
    "additive": "matched control plus the mean effect of the treatment",
    "additive_nearest": "matched control plus its effect in the most similar context",
    "ridge": "ridge regression on one-hot metadata: the 0 of skill",
    "bilinear": "ridge on principal components and features of the perturbation",
    "gem": "GEM from metadata, default settings",
    "gem_reference": "the same, technical and biological latents taken from one control sample",
    "gem_tuned": "GEM from metadata, settings found by the search",
    "gem_tuned_reference": "the same, from one control sample",
    "replicate": "the other half of the same condition, measured: the ceiling of data whose truth is unknown",
    "oracle_metadata": "the ideal prediction from metadata: the 1 of skill",
    "oracle_reference": "the ideal prediction from metadata and a reference sample",
    "oracle_omniscient": "every hidden cause known: count noise is what remains",
}
QUESTION = {
    "test_random": "On new samples of known circumstances",
    "test_combination": "On combinations never seen",
    "test_perturbation": "On perturbations never seen",
    "test_study": "On studies never seen",
}
DIRECTION = {
    "lower": "lower is better",
    "higher": "higher is better",
    "zero": "nearest to 0 is best",
}  # of a metric
_IDEAL = {"skill": "the ideal predictor", "skill_replicate": "a replicate of the experiment"}
_HIGHER_IS_BETTER = {"mse": False, "delta_pearson": True}


@dataclass(frozen=True)
class Verdict:
    """What one split says of one model."""

    split: str
    model: str
    place: str  # between ridge and the ideal
    against: str  # the baselines
    tones: dict[
        str, str
    ]  # metric to better: than every baseline; worse: than one clearly; else no clear difference

    @property
    def tone(self) -> str:
        """Over all metrics that are compared."""
        return tone_of(self.tones.values())

    @property
    def sentence(self) -> str:
        return f"{QUESTION.get(self.split, f'On {self.split}')}, {self.place}; {self.against}."


def ordered(predictors: Iterable[str]) -> list[str]:
    """From floor to ceiling."""
    present = set(predictors)
    return [name for name in ORDER if name in present] + sorted(present - set(PREDICTORS))


def verdict(split: str, model: str, scores: pd.DataFrame, comparisons: pd.DataFrame) -> Verdict:
    """From the tables of an evaluation (any number of splits)."""
    rows = comparisons[
        (comparisons["split"] == split)
        & (comparisons["predictor"] == model)
        & comparisons["against"].isin(FLOORS)
    ]
    tones = {
        metric: tone_of(those["verdict"]) for metric, those in rows.groupby("metric", sort=False)
    }
    return Verdict(split, model, _place(split, model, scores), _against(rows), tones)


def tone_of(verdicts: Iterable[str]) -> str:
    """Better where all are, worse where any is."""
    said = set(verdicts)
    return WORSE if WORSE in said else BETTER if said == {BETTER} else UNCLEAR


def axis_of(scores: pd.DataFrame) -> str:
    """The metric that places predictors between ridge (0) and a ceiling (1): the ideal, or where no truth is known a replicate."""
    return "skill" if (scores["predictor"] == "oracle_metadata").any() else "skill_replicate"


def _place(split: str, model: str, scores: pd.DataFrame) -> str:
    metric = axis_of(scores[scores["split"] == split])
    found = scores[
        (scores["split"] == split) & (scores["predictor"] == model) & (scores["metric"] == metric)
    ]
    if found.empty or pd.isna(found["value"].iloc[0]):
        reason = "it is not in the table" if found.empty else str(found["reason"].iloc[0])
        return f"the place of {label(model)} between ridge and {_IDEAL[metric]} cannot be given ({reason})"
    row = found.iloc[0]
    gap = f"the gap between ridge and {_IDEAL[metric]}"
    interval = (
        "" if pd.isna(row["low"]) else f" ({percent(row['low'])} to {percent(row['high'])} %)"
    )
    if row["value"] >= 0:
        unclear = pd.notna(row["low"]) and row["low"] <= 0
        return f"{label(model)} closes {percent(row['value'])} %{interval} of {gap}" + (
            ", which is not clearly more than nothing" if unclear else ""
        )
    unclear = pd.notna(row["high"]) and row["high"] >= 0
    tail = ", which is not clearly less than nothing" if unclear else ""
    bounds = (
        "" if pd.isna(row["low"]) else f" ({percent(-row['high'])} to {percent(-row['low'])} %)"
    )
    return f"{label(model)} is farther from {_IDEAL[metric]} than ridge, by {percent(-row['value'])} %{bounds} of the gap between them{tail}"


def _against(rows: pd.DataFrame) -> str:
    """Wins, losses and what is open, per metric; metrics of which the same is true share a clause."""
    metrics = [metric for metric in _HIGHER_IS_BETTER if (rows["metric"] == metric).any()]
    if not metrics:
        return "there is no baseline to compare it with"
    won = [
        metric
        for metric in metrics
        if (rows.loc[rows["metric"] == metric, "verdict"] == BETTER).all()
    ]
    clauses = []
    if won:
        clauses.append(
            f"it beats every baseline in {' and '.join(won)} (closest: {_closest(rows[rows['metric'] == won[0]])})"
        )
    clauses += [
        _mixed(rows[rows["metric"] == metric], metric) for metric in metrics if metric not in won
    ]
    return "; ".join(clauses)


def _mixed(rows: pd.DataFrame, metric: str) -> str:
    of = {kind: rows[rows["verdict"] == kind] for kind in (BETTER, WORSE, UNCLEAR)}
    parts = []
    if len(of[BETTER]):
        parts.append(f"beats {len(of[BETTER])} of {len(rows)} baselines")
    if len(of[WORSE]):
        worst = of[WORSE].sort_values("value").iloc[0]
        others = "" if len(of[WORSE]) == 1 else f" and {len(of[WORSE]) - 1} more"
        parts.append(f"loses to {worst['against']} ({change(worst)}){others}")
    if len(of[UNCLEAR]):
        parts.append(f"does not differ clearly from {listing(of[UNCLEAR]['against'])}")
    return f"in {metric} it {listing(parts)}"


def _closest(rows: pd.DataFrame) -> str:
    row = rows.loc[rows["value"].idxmin()]
    return (
        f"{row['against']}, {amount(row)} over {row['number']} {plural(row['of'], row['number'])}"
    )


def amount(row: pd.Series) -> str:
    """ "mse lower by 0.013 to 0.025": the paired interval, from the side of the predictor."""
    return f"{row['metric']} {change(row)}"


def change(row: pd.Series) -> str:
    gained = row["value"] > 0
    direction = "higher" if gained == _HIGHER_IS_BETTER[row["metric"]] else "lower"
    if pd.isna(row["low"]):
        return f"{direction} by {abs(row['value']):.3f}"
    low, high = sorted((abs(row["low"]), abs(row["high"])))
    return f"{direction} by {_shortest(low, high)}"


def _shortest(low: float, high: float) -> str:
    """Two numbers with as many digits as tell them from each other and from zero, three at least."""
    digits = next(
        (
            digits
            for digits in range(3, 7)
            if round(low, digits) > 0 and round(low, digits) != round(high, digits)
        ),
        3,
    )
    return f"{low:.{digits}f} to {high:.{digits}f}"


def between_models(split: str, comparisons: pd.DataFrame) -> list[str]:
    """A sentence per pair of models."""
    rows = comparisons[(comparisons["split"] == split) & comparisons["against"].isin(MODELS)]
    said = []
    for (name, other), pair in rows.groupby(["predictor", "against"], sort=False):
        clear = pair[pair["verdict"] != UNCLEAR]
        if clear.empty:
            said.append(
                f"{label(name)} and {label(other)} do not differ clearly in {listing(pair['metric'])}"
            )
        else:
            open_ = pair.loc[pair["verdict"] == UNCLEAR, "metric"]
            kinds = [
                clear[clear["verdict"] == kind]
                for kind in (BETTER, WORSE)
                if (clear["verdict"] == kind).any()
            ]
            told = [
                f"{those['verdict'].iloc[0]} ({listing(amount(row) for _, row in those.iterrows())})"
                for those in kinds
            ]
            said.append(
                f"{label(name)} is {listing(told)} than {label(other)}"
                + (f"; {listing(open_)} does not differ clearly" if len(open_) else "")
            )
    return said


def condensed(split: str, model: str, comparisons: pd.DataFrame) -> str:
    """One line: "beats 8 of 8 baselines in mse; beats 7 of 8 baselines in delta_pearson (loses to bilinear)"."""
    rows = comparisons[(comparisons["split"] == split) & (comparisons["predictor"] == model)]
    said: dict[
        tuple[str, str], list[str]
    ] = {}  # (what, in which manner) to the metrics of which it is true
    for metric, those in rows[rows["against"].isin(FLOORS)].groupby("metric", sort=False):
        named = {
            kind: listing(those.loc[those["verdict"] == kind, "against"])
            for kind in (WORSE, UNCLEAR)
        }
        notes = [
            f"{word} {named[kind]}"
            for kind, word in ((WORSE, "loses to"), (UNCLEAR, "unclear:"))
            if named[kind]
        ]
        won = (those["verdict"] == BETTER).sum()
        said.setdefault(
            (f"beats {won} of {len(those)} baselines", f" ({'; '.join(notes)})" if notes else ""),
            [],
        ).append(metric)
    for row in rows[rows["against"].isin(MODELS)].itertuples():
        if row.verdict != UNCLEAR:
            said.setdefault((f"{row.verdict} than {row.against}", ""), []).append(row.metric)
    return (
        "; ".join(
            f"{what} in {listing(metrics)}{intervention_columns}"
            for (what, intervention_columns), metrics in said.items()
        )
        or "nothing to compare with"
    )


def label(predictor: str) -> str:
    """A model's name in a sentence."""
    base = {"gem": "GEM", "gem_tuned": "tuned GEM"}
    named = base.get(predictor.removesuffix("_reference"), predictor)
    return (
        f"{named} with a reference"
        if predictor in MODELS and predictor.endswith("_reference")
        else named
    )


def percent(share: float) -> str:
    return f"{100 * share:.0f}".replace("-", "−")


def plural(word: str, number: int) -> str:
    if number == 1:
        return word
    return "studies" if word == "study" else f"{word}s"


def listing(words: Iterable[str]) -> str:
    """ "a, b and c"."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
