"""Predictors side by side on one test split: scores, paired differences, regret, and the tables behind the report.

N samples of a split, G genes, R resamples. Expression is log-CPM.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from pipeline.gem.common.config import Evaluate
from pipeline.gem.evaluation import metrics
from pipeline.gem.evaluation.bootstrap import Bootstrap, Score
from pipeline.gem.evaluation.error_decomposition import regret
from pipeline.gem.evaluation.predictors import FLOORS, MODELS, Prediction
from pipeline.gem.evaluation.scoring import (
    BASELINE,
    CEILING,
    COMPONENTS,
    MetricDraws,
    SplitContext,
    TrueChange,
    changes,
    delta_values,
    measure,
    score,
)
from pipeline.gem.evaluation.test_split import EvaluationSplit

BINS = 10  # of a calibration histogram
# (which, against which): said to be better only where the paired interval is clear of zero.
COMPARISONS = (
    *((model, floor) for model in MODELS for floor in FLOORS),
    ("gem_tuned", "gem"),
    ("gem_reference", "gem"),
    ("gem_tuned_reference", "gem_tuned"),
)
COMPARED = ("mse", "delta_pearson")

NUMBERS = dict.fromkeys(
    ("value", "low", "high"), float
)  # also where a column has none: null is NaN there

Predictions = Mapping[
    str, list[Prediction]
]  # predictor to one prediction, or one per training seed


@dataclass(frozen=True)
class Result:
    """Tables of one split; every row starts with `split` and `predictor`."""

    scores: pd.DataFrame  # metric, value, low, high, conditions, reason
    seeds: pd.DataFrame  # metric, seed, value: of predictors with several
    comparisons: pd.DataFrame  # against, metric, value, low, high, number, of, verdict
    conditions: pd.DataFrame  # condition, samples, mse, delta_pearson
    calibration: pd.DataFrame  # bin, share
    regret: pd.DataFrame  # part, value, low, high, share


def principal_axes(expression: np.ndarray) -> np.ndarray:
    """(G, D) leading principal directions of the training expression (N, G): the space of energy distances."""
    return (
        PCA(min(COMPONENTS, *expression.shape), svd_solver="auto", random_state=0)
        .fit(expression)
        .components_.T.astype(np.float64)
    )


def evaluate_scene(
    scene: EvaluationSplit,
    predictions: Predictions,
    seeds: Mapping[str, list[int]],
    axes: np.ndarray,
    true_change: TrueChange | None,
    params: Evaluate,
) -> Result:
    """Everything there is to say of one split; `seeds` names the training seeds of each model's predictions."""
    resamples = Bootstrap(scene.condition, params.bootstrap, params.seed)
    errors = {
        name: sample_errors(scene, said) for name, said in predictions.items() if usable(said)
    }
    truths = SplitContext(scene, resamples, axes, errors, true_change)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda said: [measure(one, truths) for one in said], predictions.values())
        measured = dict(zip(predictions, found, strict=True))
    about = {"split": scene.name}
    return Result(
        scores=pd.DataFrame(
            about
            | {"predictor": name, "metric": metric}
            | _columns(score([one[metric] for one in found], resamples))
            for name, found in measured.items()
            for metric in metrics.METRICS
        ).astype(NUMBERS),
        seeds=_seed_table(scene.name, measured, seeds),
        comparisons=_comparisons(scene, predictions, truths, params),
        conditions=_condition_table(scene, predictions, truths),
        calibration=_calibration_table(scene, predictions),
        regret=regret(scene, predictions, resamples),
    )


def usable(said: list[Prediction]) -> bool:
    return all(one.values is not None for one in said)


def sample_errors(scene: EvaluationSplit, said: list[Prediction]) -> np.ndarray:
    """(N,) squared error, mean over genes and over training seeds."""
    return np.mean([metrics.squared_error(scene.observed, one.values) for one in said], axis=0)


def _columns(found: Score) -> dict[str, object]:
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "conditions": found.conditions,
        "reason": found.reason,
    }


def _seed_table(
    split: str, measured: Mapping[str, list[dict[str, MetricDraws]]], seeds: Mapping[str, list[int]]
) -> pd.DataFrame:
    rows = [
        {
            "split": split,
            "predictor": name,
            "metric": metric,
            "seed": seed,
            "value": float(one[metric].values[0]),
        }
        for name, named in seeds.items()
        for seed, one in zip(named, measured.get(name, ()), strict=False)
        for metric in metrics.METRICS
        if one[metric].values is not None and np.isfinite(one[metric].values[0])
    ]
    return pd.DataFrame(rows, columns=["split", "predictor", "metric", "seed", "value"])


# --- paired differences -------------------------------------------------------------------------------------------------


def _comparisons(
    scene: EvaluationSplit, predictions: Predictions, truths: SplitContext, params: Evaluate
) -> pd.DataFrame:
    """Paired differences, resampled over the held-out entities: what would hold for other pairs, drugs, studies. Positive is better."""
    deltas, entity = _entity_deltas(scene, predictions, truths)
    errors, found = truths.errors, []
    for better, worse in COMPARISONS:
        if better in errors and worse in errors:
            found.append(
                _difference(
                    scene,
                    better,
                    worse,
                    "mse",
                    errors[worse] - errors[better],
                    scene.entity,
                    params,
                )
            )
        if better in deltas and worse in deltas:
            found.append(
                _difference(
                    scene,
                    better,
                    worse,
                    "delta_pearson",
                    deltas[better] - deltas[worse],
                    entity,
                    params,
                )
            )
    columns = [
        "split",
        "predictor",
        "against",
        "metric",
        "value",
        "low",
        "high",
        "number",
        "of",
        "verdict",
    ]
    return pd.DataFrame(found, columns=columns).astype(NUMBERS)


def _entity_deltas(
    scene: EvaluationSplit, predictions: Predictions, truths: SplitContext
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(predictor to (T,) delta_pearson, (T,) entity) of each treated condition within each entity: a drug may come in several studies."""
    within = np.unique(np.stack([scene.condition, scene.entity]), axis=1, return_inverse=True)[
        1
    ].reshape(-1)
    truths = replace(
        truths, scene=replace(scene, condition=within), resamples=Bootstrap(within, 0, 0)
    )
    compared = {name for pair in COMPARISONS for name in pair}
    deltas = {
        name: seed_deltas(said, truths)
        for name, said in predictions.items()
        if name in compared and usable(said)
    }
    return {name: values for name, values in deltas.items() if values is not None}, scene.entity[
        [rows[0] for rows in truths.groups]
    ]


def seed_deltas(said: list[Prediction], truths: SplitContext) -> np.ndarray | None:
    """(T,) delta_pearson of the treated conditions, mean over training seeds; None where there are no controls to take a change from."""
    pairs = [changes(one, truths) for one in said]
    return (
        None
        if any(pair is None for pair in pairs)
        else np.mean([delta_values(*pair) for pair in pairs], axis=0)
    )


def _difference(
    scene: EvaluationSplit,
    better: str,
    worse: str,
    metric: str,
    gain: np.ndarray,
    entity: np.ndarray,
    params: Evaluate,
) -> dict[str, object]:
    """From gains (N,) of samples or conditions, NaN where one has none, that belong to entities (N,)."""
    known = np.isfinite(gain)
    resamples = Bootstrap(
        np.unique(entity[known], return_inverse=True)[1], params.bootstrap, params.seed
    )
    found = (
        resamples.score(resamples.mean(gain[known]))
        if known.any()
        else Score.null("no condition has both")
    )
    about = {"split": scene.name, "predictor": better, "against": worse, "metric": metric}
    return about | {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "number": resamples.number,
        "of": scene.entity_kind,
        "verdict": _verdict(found),
    }


def _verdict(gain: Score) -> str:
    if gain.low is None or gain.low <= 0 <= gain.high:
        return "no clear difference"
    return "better" if gain.low > 0 else "worse"


# --- tables behind the figures ------------------------------------------------------------------------------------------


def _condition_table(
    scene: EvaluationSplit, predictions: Predictions, truths: SplitContext
) -> pd.DataFrame:
    """Treated conditions one by one, for the predictors that a reader wants to look into."""
    columns = ["split", "predictor", "condition", "samples", "mse", "delta_pearson"]
    if not len(truths.conditions):
        return pd.DataFrame(columns=columns)
    names = scene.condition_name[[rows[0] for rows in truths.groups]]
    samples = [len(rows) for rows in truths.groups]
    tables = []
    for name in (*MODELS, BASELINE, CEILING):
        if name in truths.errors:
            deltas = seed_deltas(predictions[name], truths)
            errors = [truths.errors[name][rows].mean() for rows in truths.groups]
            found = {
                "condition": names,
                "samples": samples,
                "mse": errors,
                "delta_pearson": np.nan if deltas is None else deltas,
            }
            tables.append(pd.DataFrame({"split": scene.name, "predictor": name} | found))
    return (
        pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    )


def _calibration_table(scene: EvaluationSplit, predictions: Predictions) -> pd.DataFrame:
    rows = []
    for name, said in predictions.items():
        histograms = [
            metrics.pit_histogram(one.pit, scene.condition, BINS).sum(axis=0)
            for one in said
            if one.pit is not None
        ]
        if histograms:
            total = np.sum(histograms, axis=0)
            rows += [
                {"split": scene.name, "predictor": name, "bin": place + 1, "share": share}
                for place, share in enumerate(total / total.sum())
            ]
    return pd.DataFrame(rows, columns=["split", "predictor", "bin", "share"])


def nested(scores: pd.DataFrame) -> dict[str, dict[str, dict[str, float | None]]]:
    """{split: {predictor: {metric: number or null}}}, the content of metrics.json."""
    result: dict = {}
    for row in scores.itertuples():
        value = None if row.value is None or np.isnan(row.value) else float(row.value)
        result.setdefault(row.split, {}).setdefault(row.predictor, {})[row.metric] = value
    return result
