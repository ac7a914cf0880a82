"""What no table holds and a reader wants to see: genes of single conditions, spread gene by gene, samples in latent space.

N samples, G genes, T treated conditions. Expression is log-CPM, a change is from control.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.common.config import GROUPS, Data
from pipeline.gem.data.labels import label_texts
from pipeline.gem.evaluation.bootstrap import Bootstrap, condition_sums
from pipeline.gem.evaluation.predictors import Prediction
from pipeline.gem.evaluation.scoring import SplitContext, changes
from pipeline.gem.evaluation.test_split import EvaluationSplit
from pipeline.gem.model.gem import TrainedGEM

CHOSEN = 3  # conditions at either end
LEVELS = 5  # of a covariate that get a colour of their own
MAP_SAMPLES = 1500  # in a latent map: more points hide one another
SHOWN = ("gem", "ridge")
SPREAD = ("gem", "oracle_metadata")


@dataclass(frozen=True)
class Condition:
    """One treated condition, gene by gene."""

    split: str
    name: str
    samples: int
    best: bool  # among those predicted best by the first of `predicted`, else worst
    observed: np.ndarray  # (G,) change
    predicted: Mapping[str, np.ndarray]  # predictor to (G,) change, mean over training seeds
    correlation: Mapping[str, float]  # predictor to delta_pearson, as in the table of conditions


@dataclass(frozen=True)
class Spread:
    """Standard deviation within conditions, gene by gene, pooled over the conditions with two samples or more."""

    split: str
    conditions: int
    observed: np.ndarray  # (G,)
    predicted: Mapping[
        str, np.ndarray
    ]  # predictor to (G,), of one drawn sample for each observed one


@dataclass(frozen=True)
class LatentMap:
    """Posterior means of one latent group on their two main directions, and a covariate to colour them by."""

    predictor: str
    group: str
    share: float  # of the group's variance in these two directions
    points: np.ndarray  # (N, 2)
    covariate: str
    covariate_group: str
    levels: tuple[str, ...]  # the commonest, in order of number
    level: np.ndarray  # (N,) index into levels; len(levels): another one; -1: missing


def conditions(
    scene: EvaluationSplit, predictions: Mapping[str, list[Prediction]], table: pd.DataFrame
) -> list[Condition]:
    """The CHOSEN best and worst conditions by the first of SHOWN; `table` is the split's rows of the table of conditions.

    Of conditions with two samples or more where there are enough of them: one sample is mostly noise.
    """
    shown = [name for name in SHOWN if name in predictions and (table["predictor"] == name).any()]
    rows = {name: table[table["predictor"] == name].reset_index(drop=True) for name in shown}
    if not shown or rows[shown[0]]["delta_pearson"].isna().all():
        return []
    truths = SplitContext(
        scene, Bootstrap(scene.condition, 0, 0), np.zeros((0, 0)), {}, None
    )  # no resample, no axis: changes need neither
    pairs = {name: [changes(one, truths) for one in predictions[name]] for name in shown}
    judged = rows[shown[0]].dropna(subset="delta_pearson")
    several = judged[judged["samples"] >= 2]
    judged = (several if len(several) >= 2 * CHOSEN else judged).sort_values(
        ["delta_pearson", "condition"], ascending=[False, True]
    )
    number = min(CHOSEN, len(judged) // 2) or len(judged)
    ends = [(index, True) for index in judged.index[:number]] + [
        (index, False) for index in judged.index[number:][-number:]
    ]
    return [
        Condition(
            split=scene.name,
            name=rows[shown[0]].loc[index, "condition"],
            samples=int(rows[shown[0]].loc[index, "samples"]),
            best=best,
            observed=pairs[shown[0]][0][0][index],
            predicted={
                name: np.mean([predicted[index] for _, predicted in pairs[name]], axis=0)
                for name in shown
            },
            correlation={name: float(rows[name].loc[index, "delta_pearson"]) for name in shown},
        )
        for index, best in ends
    ]


def spread(scene: EvaluationSplit, predictions: Mapping[str, list[Prediction]]) -> list[Spread]:
    """One; none where no treated condition has two samples, or nobody predicts a distribution."""
    number = np.bincount(scene.condition, minlength=int(scene.condition.max()) + 1)
    treated = scene.treated & (number[scene.condition] >= 2)
    drawn = {
        name: predictions[name][0].drawn
        for name in SPREAD
        if name in predictions and predictions[name][0].drawn is not None
    }
    drawn = {name: values for name, values in drawn.items() if np.isfinite(values[treated]).all()}
    if not treated.any() or not drawn:
        return []
    condition = pd.factorize(scene.condition[treated])[0]
    found = {name: _pooled(values[treated], condition) for name, values in drawn.items()}
    return [
        Spread(
            scene.name, int(condition.max()) + 1, _pooled(scene.observed[treated], condition), found
        )
    ]


def _pooled(values: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """(G,) standard deviation of values (N, G) around the means of their conditions (N,)."""
    number = np.bincount(condition)
    left = values - (condition_sums(values, condition, len(number)) / number[:, None])[condition]
    return np.sqrt(np.square(left).sum(axis=0) / (len(values) - len(number)))


def latent_maps(
    gem: TrainedGEM,
    predictor: str,
    samples: pd.DataFrame,
    expression: np.ndarray,
    data: Data,
    seed: int,
) -> list[LatentMap]:
    """Every latent group, coloured by a covariate of every group, on samples (N, G) that training never saw."""
    rows = np.arange(len(samples))
    if len(rows) > MAP_SAMPLES:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), MAP_SAMPLES, replace=False))
    means = gem.posterior(expression[rows]).mean.cpu().numpy().astype(np.float64)
    coloured = [
        (covariate, owner, *_levels(samples[covariate].iloc[rows]))
        for owner, covariate in covariates_shown(data).items()
    ]
    maps = []
    for group, place in gem.network.slices().items():
        points, share = _plane(means[:, place])
        maps += [
            LatentMap(predictor, group, share, points, covariate, owner, levels, level)
            for covariate, owner, levels, level in coloured
        ]
    return maps


def covariates_shown(data: Data) -> dict[str, str]:
    """Latent group to the covariate that stands for it: the study, the first of the context, the perturbation."""
    declared = {
        group: [
            name
            for name, one in getattr(data.covariates, group).items()
            if one.kind in ("categorical", "embedding")
        ]
        for group in GROUPS
    }
    wanted: Sequence[str | None] = (
        data.study_column,
        next(iter(data.context_columns), None),
        data.control.column if data.control else None,
    )
    chosen = {
        group: name if name in declared[group] else next(iter(declared[group]), None)
        for group, name in zip(GROUPS, wanted, strict=True)
    }
    return {group: name for group, name in chosen.items() if name is not None}


def _levels(values: pd.Series) -> tuple[tuple[str, ...], np.ndarray]:
    texts = label_texts(values)
    number = texts.value_counts()
    # By number, then name: a tie must not depend on the order of samples.
    levels = tuple(sorted(number.index, key=lambda level: (-number[level], str(level)))[:LEVELS])
    place = {level: index for index, level in enumerate(levels)}
    return levels, np.array(
        [-1 if pd.isna(text) else place.get(text, len(levels)) for text in texts]
    )


def _plane(means: np.ndarray) -> tuple[np.ndarray, float]:
    """((N, 2) coordinates, share of the variance); the sign by the largest loading, so that it is the same everywhere."""
    centred = means - means.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    points = centred @ axes
    total = values.clip(0).sum()
    wide = np.zeros((len(points), 2))
    wide[:, : points.shape[1]] = points
    return wide, float(values.clip(0)[::-1][:2].sum() / total) if total > 0 else 0.0
