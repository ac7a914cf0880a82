"""Diagnostics of models: genes of single conditions, spread per gene, and the latent space.

N samples, G genes, L latent dimensions of a group. Expression is log-CPM, a change is from control.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.common.config import GROUPS, Data
from pipeline.gem.data.labels import label_texts
from pipeline.gem.evaluation.baselines.bilinear import leading_components
from pipeline.gem.evaluation.bootstrap import Bootstrap, condition_sums
from pipeline.gem.evaluation.catalogue import GEM, SKILL_BASELINE, SKILL_CEILING
from pipeline.gem.evaluation.evaluation_split import EvaluationSplit
from pipeline.gem.evaluation.predictors import Predictions
from pipeline.gem.evaluation.split_context import SplitContext, changes
from pipeline.gem.model.calibration import calibration_error
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.latent_probe import (
    active_units,
    balanced_accuracy,
    linear_probe,
    majority_accuracy,
)

EXTREMES = 3  # conditions at either end
MAX_LEVELS = 5  # of a covariate that get a colour of their own
MAP_SAMPLES = 1500  # in a latent map: more points hide one another
LATENT_COLUMNS = [
    "predictor",
    "measure",
    "group",
    "covariate",
    "covariate_group",
    "value",
    "chance",
    "reason",
]


@dataclass(frozen=True)
class ConditionScatter:
    """Observed and predicted change of one treated condition, gene by gene."""

    split: str
    name: str
    samples: int
    best: bool  # one of the best predicted by GEM, else of the worst
    observed: np.ndarray  # (G,) change
    predicted: Mapping[str, np.ndarray]  # predictor to (G,) change, mean over training seeds
    correlation: Mapping[str, float]  # predictor to delta_pearson, as in the table of conditions
    biased: bool  # the correlation


@dataclass(frozen=True)
class Spread:
    """Standard deviation within conditions per gene, pooled over conditions with two samples."""

    split: str
    conditions: int
    observed: np.ndarray  # (G,)
    predicted: Mapping[str, np.ndarray]  # predictor to (G,), of one draw per observed sample


@dataclass(frozen=True)
class LatentMap:
    """Posterior means of a latent group on two principal components, coloured by a covariate."""

    predictor: str
    group: str
    share: float  # of the group's variance in these two components
    points: np.ndarray  # (N, 2)
    covariate: str
    covariate_group: str
    levels: tuple[str, ...]  # the most frequent, by frequency
    level: np.ndarray  # (N,) index into levels; len(levels) for others; -1 for missing


def extreme_conditions(
    split: EvaluationSplit, predictions: Predictions, table: pd.DataFrame
) -> list[ConditionScatter]:
    """The EXTREMES best and worst predicted conditions of GEM; beside it the skill baseline.

    `table`: the rows of the table of conditions of this split. Conditions of one sample, which are
    mostly noise, are taken only if there are too few others.
    """
    rows = {
        name: table[table["predictor"] == name].reset_index(drop=True)
        for name in (GEM, SKILL_BASELINE)
        if name in predictions and (table["predictor"] == name).any()
    }
    if not rows:
        return []
    first = next(iter(rows.values()))
    ranked = first.dropna(subset="delta_pearson")
    replicated = ranked[ranked["samples"] >= 2]
    if len(replicated) >= 2 * EXTREMES:
        ranked = replicated
    if ranked.empty:
        return []
    ranked = ranked.sort_values(["delta_pearson", "condition"], ascending=[False, True]).index
    number = min(EXTREMES, len(ranked) // 2) or len(ranked)
    best, worst = ranked[:number], ranked[number:][-number:]
    # No resample and no axis: changes need neither.
    context = SplitContext(split, Bootstrap(split.condition, 0, 0), np.zeros((0, 0)), {}, None)
    pairs = {name: [changes(seed, context) for seed in predictions[name]] for name in rows}
    observed = next(iter(pairs.values()))[0][0]
    predicted = {
        name: np.mean([own for _, own in of_seeds], axis=0) for name, of_seeds in pairs.items()
    }
    return [
        ConditionScatter(
            split=split.name,
            name=first.loc[index, "condition"],
            samples=int(first.loc[index, "samples"]),
            best=index in best,
            observed=observed[index],
            predicted={name: change[index] for name, change in predicted.items()},
            correlation={name: float(rows[name].loc[index, "delta_pearson"]) for name in rows},
            biased=split.shared_control,
        )
        for index in (*best, *worst)
    ]


def spread_within_conditions(split: EvaluationSplit, predictions: Predictions) -> Spread | None:
    """None if no treated condition has two samples, or without a predictor with draws."""
    number = np.bincount(split.condition)
    rows = split.treated & (number[split.condition] >= 2)
    if not rows.any():
        return None
    condition = pd.factorize(split.condition[rows])[0]
    predicted = {}
    for name in (GEM, SKILL_CEILING):
        draw = predictions[name][0].draw if name in predictions else None
        if draw is not None and np.isfinite(draw[rows]).all():
            predicted[name] = _pooled_deviation(draw[rows], condition)
    if not predicted:
        return None
    observed = _pooled_deviation(split.observed[rows], condition)
    return Spread(split.name, int(condition.max()) + 1, observed, predicted)


def _pooled_deviation(values: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """(G,) standard deviation of values (N, G) around the means of their conditions (N,)."""
    number = np.bincount(condition)
    means = condition_sums(values, condition, len(number)) / number[:, None]
    residual = values - means[condition]
    return np.sqrt(np.square(residual).sum(axis=0) / (len(values) - len(number)))


# --- latent space -------------------------------------------------------------------------------


def latent_maps(
    gem: TrainedGEM,
    predictor: str,
    samples: pd.DataFrame,
    expression: np.ndarray,
    data: Data,
    seed: int,
) -> list[LatentMap]:
    """Every latent group, coloured by one covariate of every group, on held-out samples (N, G)."""
    rows = np.arange(len(samples))
    if len(rows) > MAP_SAMPLES:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), MAP_SAMPLES, replace=False))
    colours = [
        (covariate, owner, *_frequent_levels(samples[covariate].iloc[rows]))
        for owner, covariate in map_covariates(data).items()
    ]
    maps = []
    for group, latents in _posterior_means(gem, expression[rows]).items():
        points, share = _principal_plane(latents)
        maps += [LatentMap(predictor, group, share, points, *colour) for colour in colours]
    return maps


def map_covariates(data: Data) -> dict[str, str]:
    """Latent group to the covariate that colours it: study, first context column, perturbation;
    if that is not a label of the group, the group's first label."""
    preferred = {
        "technical": data.study_column,
        "biological": next(iter(data.context_columns), None),
        "perturbation": data.control.column if data.control else None,
    }
    result = {}
    for group in GROUPS:
        covariates = getattr(data.covariates, group)
        labels = [name for name, covariate in covariates.items() if _is_label(covariate.kind)]
        if labels:
            result[group] = preferred[group] if preferred[group] in labels else labels[0]
    return result


def _is_label(kind: str) -> bool:
    return kind in ("categorical", "embedding")


def _posterior_means(gem: TrainedGEM, expression: np.ndarray) -> dict[str, np.ndarray]:
    """Latent group to (N, L)."""
    means = gem.posterior(expression).mean.cpu().numpy().astype(np.float64)
    return {group: means[:, columns] for group, columns in gem.network.slices().items()}


def _frequent_levels(values: pd.Series) -> tuple[tuple[str, ...], np.ndarray]:
    texts = label_texts(values)
    number = texts.value_counts()
    # By number, then name: a tie must not depend on the order of samples.
    levels = sorted(number.index, key=lambda level: (-number[level], str(level)))[:MAX_LEVELS]
    level = pd.Index(levels).get_indexer(texts)
    level[(level < 0) & texts.notna().to_numpy()] = len(levels)
    return tuple(levels), level


def _principal_plane(latents: np.ndarray) -> tuple[np.ndarray, float]:
    """((N, 2) coordinates of (N, L), share of the variance)."""
    centred = latents - latents.mean(axis=0)
    axes = leading_components(centred, np.ones(len(centred)))[:, :2]
    # The largest loading is positive: the same sign on every machine.
    largest = np.abs(axes).argmax(axis=0)
    points = np.zeros((len(centred), 2))
    points[:, : axes.shape[1]] = centred @ (axes * np.sign(axes[largest, range(axes.shape[1])]))
    total = np.square(centred).sum()
    return points, float(np.square(points).sum() / total) if total > 0 else 0.0


def latent_table(
    gem: TrainedGEM, predictor: str, samples: pd.DataFrame, expression: np.ndarray, seed: int
) -> pd.DataFrame:
    """LATENT_COLUMNS: measures of the latents on held-out samples (N, G).

    accuracy: balanced, of each label head on the posterior mean; chance: the most frequent class.
    calibration_error: mean gap between confidence and accuracy of the calibrated heads.
    probe: balanced accuracy of a linear probe for a covariate on the latents of a group; it is
    leakage if the covariate belongs to another group. active_units: dimensions in use.
    """
    groups = _posterior_means(gem, expression)
    rows = [*_head_rows(gem, samples, expression), *_probe_rows(gem, samples, groups, seed)]
    rows += [
        {"measure": "active_units", "group": group, "value": active_units(latents)}
        for group, latents in groups.items()
    ]
    return pd.DataFrame([{"predictor": predictor} | row for row in rows], columns=LATENT_COLUMNS)


def _head_rows(
    gem: TrainedGEM, samples: pd.DataFrame, expression: np.ndarray
) -> Iterator[dict[str, object]]:
    labels = gem.metadata.labels(samples)
    for name, probability in gem.probabilities(gem.posterior(expression).mean).items():
        group = gem.metadata.group_of(name)
        row = {"group": group, "covariate": name, "covariate_group": group, "reason": ""}
        if not (labels[name] >= 0).any():
            row["reason"] = "no sample has a label that training knows"
            yield row | {"measure": "accuracy"}
            yield row | {"measure": "calibration_error"}
            continue
        accuracy = balanced_accuracy(labels[name], probability.argmax(axis=1))
        chance = majority_accuracy(labels[name])
        yield row | {"measure": "accuracy", "value": accuracy, "chance": chance}
        error = calibration_error(probability, labels[name])
        yield row | {"measure": "calibration_error", "value": error}


def _probe_rows(
    gem: TrainedGEM, samples: pd.DataFrame, groups: Mapping[str, np.ndarray], seed: int
) -> Iterator[dict[str, object]]:
    for owner in GROUPS:
        for encoder in gem.metadata.groups[owner]:
            if _is_label(encoder.covariate.kind):
                labels = pd.factorize(label_texts(samples[encoder.name]))[0]
                for group, latents in groups.items():
                    probe = linear_probe(latents, labels, seed)
                    yield {
                        "measure": "probe",
                        "group": group,
                        "covariate": encoder.name,
                        "covariate_group": owner,
                        "value": probe.accuracy,
                        "chance": probe.chance,
                        "reason": probe.reason,
                    }
