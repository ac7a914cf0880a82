"""Regret: where the squared error of a model comes from, in parts that somebody can act on.

mse(model) =   count noise                                  mse of the omniscient oracle
             + what no reference could know                 reference oracle - omniscient oracle
             + what a reference tells beyond metadata       metadata oracle - reference oracle
             + scatter between training seeds               variance of the seeds' predictions
             + systematic distance to the ideal prediction  by study, context, perturbation, their pair, and the rest
             + chance                                       a cross term with expectation zero

The oracle is E[x | what the model may see] =: o, so E|x - p|^2 = E|x - o|^2 + E|o - p|^2 for any prediction p from the
same knowledge, and the cross term 2 (x - o)(o - p) only scatters around zero. Seeds: mean_s |o - p_s|^2 = |o - p|^2 +
var_s(p_s) with p the mean of the seeds. The systematic part is projected on group means, one grouping after another, so
that its parts add up; the order matters, as in any sequential analysis of variance.

N samples, G genes, S seeds. Expression is log-CPM.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from pipeline.gem.evaluation.bootstrap import Bootstrap
from pipeline.gem.evaluation.metrics import squared_error
from pipeline.gem.evaluation.predictors import MODELS, REFERENCE_SUFFIX, Prediction
from pipeline.gem.evaluation.test_split import EvaluationSplit

COLUMNS = ["split", "predictor", "part", "value", "low", "high", "share"]
NOISE, HIDDEN, REFERENCE, SEEDS, CHANCE = (
    "count noise",
    "unknowable",
    "missing metadata",
    "seeds",
    "chance",
)
OWN = ("by study", "by context", "by perturbation", "by pair", "rest")
PARTS = (NOISE, HIDDEN, REFERENCE, SEEDS, *OWN, CHANCE)


def regret(
    scene: EvaluationSplit, predictions: Mapping[str, list[Prediction]], resamples: Bootstrap
) -> pd.DataFrame:
    """A row per model and part, in log-CPM squared; empty where the truth is not known."""
    oracles = {
        name: said[0].values
        for name, said in predictions.items()
        if name.startswith("oracle") and said[0].values is not None
    }
    if not {"oracle_metadata", "oracle_omniscient"} <= set(oracles):
        return pd.DataFrame(columns=COLUMNS)
    rows = []
    for name in MODELS:
        said = predictions.get(name, [])
        if not said or any(one.values is None for one in said):
            continue
        parts = _parts(
            scene, np.stack([one.values for one in said]), oracles, name.endswith(REFERENCE_SUFFIX)
        )
        total = sum(float(values.mean()) for values in parts.values())
        for part, values in parts.items():
            found = resamples.score(resamples.mean(values))
            rows.append(
                dict(
                    zip(
                        COLUMNS,
                        (
                            scene.name,
                            name,
                            part,
                            found.value,
                            found.low,
                            found.high,
                            found.value / total,
                        ),
                        strict=True,
                    )
                )
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def _parts(
    scene: EvaluationSplit,
    seeds: np.ndarray,
    oracles: Mapping[str, np.ndarray],
    sees_reference: bool,
) -> dict[str, np.ndarray]:
    """Part to (N,) contributions; they sum to each sample's squared error, mean over seeds (S, N, G)."""
    errors = {name: squared_error(scene.observed, values) for name, values in oracles.items()}
    knows = (
        "oracle_reference"
        if sees_reference and "oracle_reference" in oracles
        else "oracle_metadata"
    )
    between = errors.get("oracle_reference", errors["oracle_metadata"])
    mean = seeds.mean(axis=0, dtype=np.float64)
    parts = {NOISE: errors["oracle_omniscient"], HIDDEN: between - errors["oracle_omniscient"]}
    if knows == "oracle_metadata":
        parts[REFERENCE] = errors["oracle_metadata"] - between
    parts[SEEDS] = np.mean([squared_error(one, mean) for one in seeds], axis=0)
    parts |= systematic(oracles[knows] - mean, _groupings(scene))
    total = np.mean([squared_error(scene.observed, one) for one in seeds], axis=0)
    return parts | {CHANCE: total - sum(parts.values())}


def systematic(distance: np.ndarray, groupings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Squared distance (N, G) to the ideal as (N,) parts: shared within each grouping's groups, one after another, and the rest."""
    left, parts = np.asarray(distance, dtype=np.float64), {}
    for name, group in groupings.items():
        shared = pd.DataFrame(left).groupby(group).transform("mean").to_numpy()
        left = left - shared
        parts[name] = np.square(shared).mean(axis=1)
    return parts | {OWN[-1]: np.square(left).mean(axis=1)}


def _groupings(scene: EvaluationSplit) -> dict[str, np.ndarray]:
    return dict(
        zip(OWN[:-1], (scene.study, scene.context, scene.perturbation, scene.pair), strict=True)
    )
