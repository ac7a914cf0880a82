"""The tables of an evaluation in sentences, and what page, figures and console have in common.

"Lower" and "higher" are claimed only if the paired 95 % interval excludes zero.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from pipeline.gem.evaluation.catalogue import (
    BASELINES,
    BETTER,
    MODELS,
    PREDICTORS,
    SHARED_CONTROLS,
    SKILL_BASELINE,
    SKILL_CEILING,
    UNCLEAR,
    WORSE,
    is_biased,
)
from pipeline.gem.evaluation.metrics import METRICS

MAIN_METRICS = ("mse", "skill", "delta_pearson", "discrimination", "calibration")
SPLIT_MEANING = {
    "test_random": "New samples of conditions in training",
    "test_combination": "New combinations of context and perturbation, or of several perturbations",
    "test_condition": "Known perturbations at a new dose or time, in a context in training",
    "test_context": "New contexts (a donor, a cell type) of which only controls are in training",
    "test_level": "New donors, doses or times (data.level_column) without a sample in training",
    "test_perturbation": "Perturbations that are not in training",
    "test_study": "Studies that are not in training",
}
DIRECTION = {
    "lower": "lower is better",
    "higher": "higher is better",
    "zero": "closest to 0 is best",
}
_OPPOSITE = {"lower": "higher", "higher": "lower"}


SHARED_MARK = "*"  # of a score from SHARED_CONTROLS; every terminal can print it
SHARED_NOTE = f"{SHARED_MARK} {SHARED_CONTROLS}"


def is_shared(row: pd.Series) -> bool:
    """Whether a row of the scores has a value that is biased by shared controls."""
    return is_biased(row.value, row.reason)


@dataclass(frozen=True)
class SkillScale:
    """The metric that is 0 for ridge and 1 for a ceiling."""

    metric: str
    label: str  # of the ceiling, on an axis
    ceiling: str  # in a sentence


_IDEAL = SkillScale("skill", "ideal", "the ideal predictor")
_REPLICATE = SkillScale("skill_replicate", "replicate", "a replicate of the experiment")


def skill_scale(scores: pd.DataFrame) -> SkillScale:
    """Up to the ideal predictor, or to a replicate if the truth is not known."""
    return _IDEAL if (scores["predictor"] == SKILL_CEILING).any() else _REPLICATE


def main_metrics(scores: pd.DataFrame) -> list[str]:
    """MAIN_METRICS with the skill that these scores have."""
    skill = skill_scale(scores).metric
    return [skill if metric == "skill" else metric for metric in MAIN_METRICS]


def ordered(predictors: Iterable[str]) -> list[str]:
    """Each predictor once, from floor to ceiling."""
    present = set(predictors)
    return [name for name in PREDICTORS if name in present]


@dataclass(frozen=True)
class ModelSummary:
    """A model on one split."""

    text: str
    verdicts: dict[str, str]  # metric to its verdict over all baselines

    @property
    def verdict(self) -> str:
        return overall_verdict(self.verdicts.values())


def overall_verdict(verdicts: Iterable[str]) -> str:
    """BETTER if all are, WORSE if any is."""
    distinct = set(verdicts)
    if WORSE in distinct:
        return WORSE
    return BETTER if distinct == {BETTER} else UNCLEAR


def summarise_model(
    split: str, model: str, scores: pd.DataFrame, comparisons: pd.DataFrame
) -> ModelSummary:
    """`scores` and `comparisons`: tables of an evaluation, of any number of splits."""
    rows = _against(comparisons, split, model, BASELINES)
    by_metric = {metric: group for metric, group in rows.groupby("metric", sort=False)}
    sentences = [_skill_sentence(split, model, scores)]
    sentences += [_baseline_sentence(metric, group) for metric, group in by_metric.items()]
    if not by_metric:
        sentences.append("There is no baseline to compare it with.")
    verdicts = {metric: overall_verdict(group["verdict"]) for metric, group in by_metric.items()}
    return ModelSummary(" ".join(sentences), verdicts)


def _against(
    comparisons: pd.DataFrame, split: str, model: str, others: Iterable[str]
) -> pd.DataFrame:
    own = (comparisons["split"] == split) & (comparisons["predictor"] == model)
    return comparisons[own & comparisons["against"].isin(others)]


def _skill_sentence(split: str, model: str, scores: pd.DataFrame) -> str:
    scores = scores[scores["split"] == split]
    scale, name = skill_scale(scores), PREDICTORS[model].label
    rows = scores[(scores["predictor"] == model) & (scores["metric"] == scale.metric)]
    row = next(rows.itertuples())
    if pd.isna(row.value):
        return f"{_capitalise(name)} has no {scale.metric} ({row.reason})."
    sign, interval, note = (1 if row.value >= 0 else -1), "", ""
    if pd.notna(row.low):
        low, high = sorted((sign * row.low, sign * row.high))
        interval = f" (95 % interval {percent(low)} to {percent(high)} %)"
        if row.low <= 0 <= row.high:
            note = f", no clear difference from {SKILL_BASELINE}"
    share = f"{percent(sign * row.value)} %{interval}"
    gap = f"the gap in mse between {SKILL_BASELINE} and {scale.ceiling}"
    change = f"closes {share} of {gap}" if sign == 1 else f"widens {gap} by {share}"
    return f"{_capitalise(name)} {change}{note}."


def _baseline_sentence(metric: str, rows: pd.DataFrame) -> str:
    """ "It has a lower mse than 4 of 8 baselines, and no clear difference from ridge." """
    better, worse, unclear = (rows[rows["verdict"] == kind] for kind in (BETTER, WORSE, UNCLEAR))
    if len(unclear) == len(rows):
        return f"It has no clear difference in {metric} from any of {_count(rows)}."
    parts = []
    if len(better):
        parts.append(f"a {_direction(metric, BETTER)} {metric} than {_count(better, rows)}")
        if len(better) == len(rows):
            closest = better.loc[better["value"].idxmin()]
            over = f"{closest['number']} {plural(closest['of'], closest['number'])}"
            parts[-1] += f" (smallest difference: {_difference_to(closest)}, over {over})"
    if len(worse):
        largest = _difference_to(worse.loc[worse["value"].idxmin()])
        parts.append(
            f"a {_direction(metric, WORSE)} {metric} than {_count(worse, rows)} "
            f"(largest difference: {largest})"
        )
    if len(unclear):
        parts.append(f"no clear difference from {listing(unclear['against'])}")
    return f"It has {', and '.join(parts)}."


def _direction(metric: str, verdict: str) -> str:
    """How a better or worse predictor's metric compares: lower or higher."""
    better = METRICS[metric].direction
    return better if verdict == BETTER else _OPPOSITE[better]


def _count(rows: pd.DataFrame, of: pd.DataFrame | None = None) -> str:
    """ "4 of 8 baselines"."""
    number = len(rows) if of is None else len(of)
    share = "" if of is None else f"{len(rows)} of "
    return f"{share}{number} {plural('baseline', number)}"


def _difference_to(row: pd.Series) -> str:
    return f"{difference(row)} to {row['against']}"


def difference(row: pd.Series) -> str:
    """The paired 95 % interval of a difference without its sign: "0.013 to 0.025"."""
    if pd.isna(row["low"]):
        return f"{abs(row['value']):.3f}"
    low, high = sorted((abs(row["low"]), abs(row["high"])))
    # As many digits as separate the two from each other and from zero, at least three.
    for digits in range(3, 7):
        if round(low, digits) > 0 and round(low, digits) != round(high, digits):
            return f"{low:.{digits}f} to {high:.{digits}f}"
    return f"{low:.3f} to {high:.3f}"


def compare_models(split: str, comparisons: pd.DataFrame) -> list[str]:
    """A sentence per pair of models."""
    rows = comparisons[(comparisons["split"] == split) & comparisons["against"].isin(MODELS)]
    sentences = []
    for (model, other), pair in rows.groupby(["predictor", "against"], sort=False):
        names = PREDICTORS[model].label, PREDICTORS[other].label
        clear, unclear = pair[pair["verdict"] != UNCLEAR], pair[pair["verdict"] == UNCLEAR]
        if clear.empty:
            metrics = listing(pair["metric"])
            sentences.append(f"No clear difference between {names[0]} and {names[1]} in {metrics}.")
            continue
        parts = [
            f"a {_direction(row['metric'], row['verdict'])} {row['metric']} (by {difference(row)})"
            for _, row in clear.iterrows()
        ]
        rest = f"; no clear difference in {listing(unclear['metric'])}" if len(unclear) else ""
        sentences.append(f"{_capitalise(names[0])} has {listing(parts)} than {names[1]}{rest}.")
    return sentences


def summary_line(split: str, model: str, comparisons: pd.DataFrame) -> str:
    """One line: "mse lower than 8 of 8 baselines; delta_pearson higher than 7 of 8 baselines
    (lower than bilinear)"."""
    parts = []
    baselines = _against(comparisons, split, model, BASELINES)
    for metric, rows in baselines.groupby("metric", sort=False):
        notes = []
        for verdict, words in (
            (WORSE, f"{_direction(metric, WORSE)} than"),
            (UNCLEAR, "no clear difference from"),
        ):
            names = rows.loc[rows["verdict"] == verdict, "against"]
            notes += [f"{words} {listing(names)}"] if len(names) else []
        better = _count(rows[rows["verdict"] == BETTER], rows)
        note = f" ({'; '.join(notes)})" if notes else ""
        parts.append(f"{metric} {_direction(metric, BETTER)} than {better}{note}")
    models = _against(comparisons, split, model, MODELS)
    for row in models[models["verdict"] != UNCLEAR].itertuples():
        parts.append(f"{row.metric} {_direction(row.metric, row.verdict)} than {row.against}")
    return "; ".join(parts) or "nothing to compare with"


def headline(summaries: dict[str, ModelSummary], model: str) -> tuple[str, str]:
    """(a model's result over all splits, what keeps it from being better). `summaries` by split."""
    name = _capitalise(PREDICTORS[model].label)
    by_verdict = {
        verdict: [split for split, summary in summaries.items() if summary.verdict == verdict]
        for verdict in (BETTER, WORSE, UNCLEAR)
    }
    notes = []
    if by_verdict[WORSE]:
        lost = dict.fromkeys(
            metric
            for summary in summaries.values()
            for metric, verdict in summary.verdicts.items()
            if verdict == WORSE
        )
        where = listing(by_verdict[WORSE])
        notes.append(f"On {where}, a baseline is clearly better in {listing(lost, 'or')}.")
    if by_verdict[UNCLEAR]:
        where = listing(by_verdict[UNCLEAR])
        notes.append(f"On {where}, no clear difference from at least one baseline.")
    number, total = len(by_verdict[BETTER]), len(summaries)
    where = f"{number} of {total} {plural('test split', total)}"
    return f"{name} is clearly better than all baselines on {where}.", " ".join(notes)


def percent(share: float) -> str:
    return str(round(100 * share)).replace("-", "−")


def plural(word: str, number: int) -> str:
    if number == 1:
        return word
    return "studies" if word == "study" else f"{word}s"


def listing(words: Iterable[str], conjunction: str = "and") -> str:
    """ "a, b and c"."""
    *first, last = list(words) or [""]
    return f"{', '.join(first)} {conjunction} {last}" if first else last


def _capitalise(text: str) -> str:
    return text[0].upper() + text[1:]
