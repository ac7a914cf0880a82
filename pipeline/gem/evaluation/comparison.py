"""Predictors side by side on one test split: scores, paired differences, and tables for figures.

N samples of a split, G genes, T treated conditions. Expression is log-CPM.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from pipeline.gem.common.capacity import cores
from pipeline.gem.common.config import Evaluate
from pipeline.gem.evaluation import metrics
from pipeline.gem.evaluation.bootstrap import Bootstrap, MetricDraws, Score
from pipeline.gem.evaluation.catalogue import (
    BASELINES,
    BETTER,
    BIASED,
    MODELS,
    SKILL_BASELINE,
    SKILL_CEILING,
    UNCLEAR,
    WORSE,
    is_biased,
)
from pipeline.gem.evaluation.error_decomposition import decompose_error
from pipeline.gem.evaluation.evaluation_split import EvaluationSplit, PredictedSplit
from pipeline.gem.evaluation.predictors import Predictions
from pipeline.gem.evaluation.scoring import measure, score
from pipeline.gem.evaluation.split_context import SplitContext, TrueChange, condition_deltas

BINS = 10  # of a calibration histogram
# (predictor, the one it is compared with)
COMPARISONS = (
    *((model, baseline) for model in MODELS for baseline in BASELINES),
    ("gem_tuned", "gem"),
    ("gem_reference", "gem"),
    ("gem_tuned_reference", "gem_tuned"),
)
INTERVAL = ["value", "low", "high"]
SCORE_COLUMNS = ["split", "predictor", "metric", *INTERVAL, "conditions", "reason"]
SEED_COLUMNS = ["split", "predictor", "metric", "seed", "value", BIASED]
COMPARISON_COLUMNS = [
    "split",
    "predictor",
    "against",
    "metric",
    *INTERVAL,
    "number",
    "of",
    "verdict",
]
CONDITION_COLUMNS = ["split", "predictor", "condition", "samples", "mse", "delta_pearson", BIASED]
CALIBRATION_COLUMNS = ["split", "predictor", "bin", "share"]


@dataclass(frozen=True)
class SplitResult:
    """The tables of one split; every row starts with `split` and `predictor`."""

    scores: pd.DataFrame  # SCORE_COLUMNS: all predictors, all metrics
    seeds: pd.DataFrame  # SEED_COLUMNS: models, each training seed
    comparisons: pd.DataFrame  # COMPARISON_COLUMNS
    conditions: pd.DataFrame  # CONDITION_COLUMNS
    calibration: pd.DataFrame  # CALIBRATION_COLUMNS
    error_decomposition: pd.DataFrame


def evaluate_split(
    split: EvaluationSplit,
    predictions: Predictions,
    seeds: Mapping[str, list[int]],
    axes: np.ndarray,
    true_change: TrueChange | None,
    params: Evaluate,
) -> SplitResult:
    """All tables of a split. `seeds`: the training seed of each prediction of a model."""
    resamples = Bootstrap(split.condition, params.bootstrap, params.seed)
    errors = {
        name: sample_errors(split, predicted)
        for name, predicted in predictions.items()
        if is_complete(predicted)
    }
    context = SplitContext(split, resamples, axes, errors, true_change)

    def measure_seeds(name: str) -> list[dict[str, MetricDraws]]:
        return [measure(predicted, context) for predicted in predictions[name]]

    with ThreadPoolExecutor(cores()) as pool:
        draws = dict(zip(predictions, pool.map(measure_seeds, predictions), strict=True))
    return SplitResult(
        scores=_score_table(split.name, draws, resamples),
        seeds=_seed_table(split.name, draws, seeds),
        comparisons=_comparison_table(predictions, context, params),
        conditions=_condition_table(predictions, context),
        calibration=_calibration_table(split, predictions),
        error_decomposition=decompose_error(split, predictions, resamples),
    )


def is_complete(predicted: list[PredictedSplit]) -> bool:
    """Whether every training seed has a prediction."""
    return all(seed.values is not None for seed in predicted)


def sample_errors(split: EvaluationSplit, predicted: list[PredictedSplit]) -> np.ndarray:
    """(N,) squared error, mean over genes and over training seeds."""
    return np.mean(
        [metrics.squared_error(split.observed, seed.values) for seed in predicted], axis=0
    )


def _score_table(
    split: str, draws: Mapping[str, list[dict[str, MetricDraws]]], resamples: Bootstrap
) -> pd.DataFrame:
    rows = []
    for name, seeds in draws.items():
        for metric in metrics.METRICS:
            result = score([seed[metric] for seed in seeds], resamples)
            interval = (result.value, result.low, result.high)
            rows.append((split, name, metric, *interval, result.conditions, result.reason))
    return _with_numbers(pd.DataFrame(rows, columns=SCORE_COLUMNS))


def _with_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """INTERVAL as float also if a column has no value: null is NaN."""
    return table.astype(dict.fromkeys(INTERVAL, float))


def _seed_table(
    split: str, measured: Mapping[str, list[dict[str, MetricDraws]]], seeds: Mapping[str, list[int]]
) -> pd.DataFrame:
    rows = []
    for name, numbers in seeds.items():
        for number, by_metric in zip(numbers, measured.get(name, ()), strict=False):
            for metric in metrics.METRICS:
                draws = by_metric[metric]
                if draws.values is not None and np.isfinite(draws.values[0]):
                    value = float(draws.values[0])
                    marked = is_biased(value, draws.reason)
                    rows.append((split, name, metric, number, value, marked))
    return pd.DataFrame(rows, columns=SEED_COLUMNS)


# --- paired differences -------------------------------------------------------------------------


def _comparison_table(
    predictions: Predictions, context: SplitContext, params: Evaluate
) -> pd.DataFrame:
    """Paired differences, positive for better, resampled over the held-out entities: the interval
    holds for other pairs, perturbations or studies."""
    split, errors = context.split, context.errors
    deltas, delta_entity = _entity_deltas(predictions, context)
    if split.shared_control:  # the bias differs between predictors that do and do not use controls
        deltas = {}
    rows, resamples = [], {}
    for model, other in COMPARISONS:
        if model in errors and other in errors:
            gain = errors[other] - errors[model]
            row = _paired_difference(gain, split.entity, params, resamples)
            rows.append({"predictor": model, "against": other, "metric": "mse"} | row)
        if model in deltas and other in deltas:
            gain = deltas[model] - deltas[other]
            row = _paired_difference(gain, delta_entity, params, resamples)
            rows.append({"predictor": model, "against": other, "metric": "delta_pearson"} | row)
    table = pd.DataFrame(rows).assign(split=split.name, of=split.entity_kind)
    return _with_numbers(table.reindex(columns=COMPARISON_COLUMNS))


def _entity_deltas(
    predictions: Predictions, context: SplitContext
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(predictor to (T,) delta_pearson, (T,) entity) of each treated condition in each entity.

    A perturbation may be measured in several studies.
    """
    split = context.split
    pairs = np.stack([split.condition, split.entity])
    within = np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1)
    if not np.array_equal(within, split.condition):
        context = replace(
            context, split=replace(split, condition=within), resamples=Bootstrap(within, 0, 0)
        )
    compared = {name for pair in COMPARISONS for name in pair}
    deltas = {}
    for name, predicted in predictions.items():
        if name in compared and is_complete(predicted):
            values = seed_mean_delta_pearson(predicted, context)
            if values is not None:
                deltas[name] = values
    return deltas, split.entity[[rows[0] for rows in context.rows]]


def seed_mean_delta_pearson(
    predicted: list[PredictedSplit], context: SplitContext
) -> np.ndarray | None:
    """(T,) delta_pearson of the treated conditions, mean over seeds; None without controls."""
    deltas = [condition_deltas(seed, context) for seed in predicted]
    return None if any(delta is None for delta in deltas) else np.mean(deltas, axis=0)


def _paired_difference(
    gain: np.ndarray, entity: np.ndarray, params: Evaluate, drawn: dict[bytes, Bootstrap]
) -> dict[str, object]:
    """The mean gain (n,) of samples or conditions, leaving out NaN, resampled by entity (n,).
    `drawn`: the resamples so far, by the entities of the samples."""
    valid = np.isfinite(gain)
    index = np.unique(entity[valid], return_inverse=True)[1]
    key = index.tobytes()
    resamples = drawn.get(key) or Bootstrap(index, params.bootstrap, params.seed)
    drawn[key] = resamples
    result = Score.null("no condition has both")
    if valid.any():
        result = resamples.score(resamples.mean(gain[valid]))
    return {
        "value": result.value,
        "low": result.low,
        "high": result.high,
        "number": resamples.number,
        "verdict": _verdict(result),
    }


def _verdict(gain: Score) -> str:
    if gain.low is None or gain.low <= 0 <= gain.high:
        return UNCLEAR
    return BETTER if gain.low > 0 else WORSE


# --- tables for figures -------------------------------------------------------------------------


def _condition_table(predictions: Predictions, context: SplitContext) -> pd.DataFrame:
    """Each treated condition, of the models and both ends of the skill."""
    tables = [pd.DataFrame(columns=CONDITION_COLUMNS)]
    for name in (*MODELS, SKILL_BASELINE, SKILL_CEILING):
        if name in context.errors and context.rows:
            deltas = seed_mean_delta_pearson(predictions[name], context)
            columns = {
                "split": context.split.name,
                "predictor": name,
                "condition": context.split.condition_name[[rows[0] for rows in context.rows]],
                "samples": [len(rows) for rows in context.rows],
                "mse": [context.errors[name][rows].mean() for rows in context.rows],
                "delta_pearson": np.nan if deltas is None else deltas,
                BIASED: deltas is not None and context.split.shared_control,
            }
            tables.append(pd.DataFrame(columns))
    return tables[0] if len(tables) == 1 else pd.concat(tables[1:], ignore_index=True)


def _calibration_table(split: EvaluationSplit, predictions: Predictions) -> pd.DataFrame:
    """The share of each bin of the PIT histogram, summed over training seeds."""
    rows = []
    for name, predicted in predictions.items():
        pits = [seed.pit for seed in predicted if seed.pit is not None]
        if pits:
            counts = sum(
                metrics.pit_histogram(pit, split.condition, BINS).sum(axis=0) for pit in pits
            )
            shares = counts / counts.sum()
            rows += [(split.name, name, *row) for row in enumerate(shares, start=1)]
    return pd.DataFrame(rows, columns=CALIBRATION_COLUMNS)


def nested_scores(scores: pd.DataFrame) -> dict[str, dict[str, dict[str, float | None]]]:
    """{split: {predictor: {metric: number or null}}}, the content of metrics.json. A biased score
    has a 1 beside it, `delta_pearson_biased`."""
    result: dict = {}
    for row in scores.itertuples():
        value = None if pd.isna(row.value) else float(row.value)
        metrics = result.setdefault(row.split, {}).setdefault(row.predictor, {})
        metrics[row.metric] = value
        if is_biased(value, row.reason):
            metrics[f"{row.metric}_{BIASED}"] = 1
    return result
