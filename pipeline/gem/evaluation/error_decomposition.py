"""The squared error of a model, decomposed into parts that a user can act on.

mse(model) =   count noise            mse of the omniscient oracle
             + hidden factors         reference oracle - omniscient oracle
             + reference information  metadata oracle - reference oracle
             + seeds                  variance of the predictions over training seeds
             + by study, ... residual squared distance to the ideal prediction
             + sampling error         a cross term with expectation zero

The oracle o is E[x | inputs of the model], so E|x - p|^2 = E|x - o|^2 + E|o - p|^2 for any
prediction p from the same inputs, and the cross term 2 (x - o)(o - p) has expectation zero. Seeds:
mean_s |o - p_s|^2 = |o - p|^2 + var_s(p_s) with p the mean of the seeds. The distance |o - p|^2 is
projected on group means, one grouping after another, so that its parts add up; the order matters,
as in any sequential analysis of variance.

N samples, G genes, S seeds. Expression is log-CPM.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from pipeline.gem.evaluation.bootstrap import Bootstrap, condition_sums
from pipeline.gem.evaluation.catalogue import MODELS, REFERENCE_SUFFIX
from pipeline.gem.evaluation.evaluation_split import EvaluationSplit
from pipeline.gem.evaluation.metrics import squared_error
from pipeline.gem.evaluation.predictors import Predictions

COLUMNS = ["split", "predictor", "part", "value", "low", "high", "share"]
COUNT_NOISE, HIDDEN_FACTORS = "count noise", "hidden factors"
REFERENCE_INFORMATION, SEEDS = "reference information", "seeds"
BY_STUDY, BY_CONTEXT, BY_PERTURBATION = "by study", "by context", "by perturbation"
BY_PAIR, RESIDUAL, SAMPLING_ERROR = "by pair", "residual", "sampling error"
SYSTEMATIC = (BY_STUDY, BY_CONTEXT, BY_PERTURBATION, BY_PAIR, RESIDUAL)
PARTS = (COUNT_NOISE, HIDDEN_FACTORS, REFERENCE_INFORMATION, SEEDS, *SYSTEMATIC, SAMPLING_ERROR)


def decompose_error(
    split: EvaluationSplit, predictions: Predictions, resamples: Bootstrap
) -> pd.DataFrame:
    """A row per model and part, in log-CPM squared; empty without a known truth."""
    oracles = {
        name: seeds[0].values
        for name, seeds in predictions.items()
        if name.startswith("oracle") and seeds[0].values is not None
    }
    rows = []
    if {"oracle_metadata", "oracle_omniscient"} <= set(oracles):
        for name in MODELS:
            values = [predicted.values for predicted in predictions.get(name, [])]
            if not values or any(seed is None for seed in values):
                continue
            parts = _parts(split, np.stack(values), oracles, name.endswith(REFERENCE_SUFFIX))
            total = sum(float(contributions.mean()) for contributions in parts.values())
            for part, contributions in parts.items():
                score = resamples.score(resamples.mean(contributions))
                interval = (score.value, score.low, score.high)
                rows.append((split.name, name, part, *interval, score.value / total))
    return pd.DataFrame(rows, columns=COLUMNS)


def _parts(
    split: EvaluationSplit,
    seeds: np.ndarray,
    oracles: Mapping[str, np.ndarray],
    from_reference: bool,
) -> dict[str, np.ndarray]:
    """Part to (N,) contributions, whose sum is each sample's squared error, mean over seeds."""
    errors = {name: squared_error(split.observed, values) for name, values in oracles.items()}
    matched = "oracle_metadata"  # the oracle with the inputs of the model
    if from_reference and "oracle_reference" in oracles:
        matched = "oracle_reference"
    reference_error = errors.get("oracle_reference", errors["oracle_metadata"])
    mean = seeds.mean(axis=0, dtype=np.float64)
    parts = {
        COUNT_NOISE: errors["oracle_omniscient"],
        HIDDEN_FACTORS: reference_error - errors["oracle_omniscient"],
    }
    if matched == "oracle_metadata":
        parts[REFERENCE_INFORMATION] = errors["oracle_metadata"] - reference_error
    parts[SEEDS] = np.mean([squared_error(seed, mean) for seed in seeds], axis=0)
    groupings = {
        BY_STUDY: split.study,
        BY_CONTEXT: split.context,
        BY_PERTURBATION: split.perturbation,
        BY_PAIR: split.pair,
    }
    parts |= project_on_groups(oracles[matched] - mean, groupings)
    total = np.mean([squared_error(split.observed, seed) for seed in seeds], axis=0)
    return parts | {SAMPLING_ERROR: total - sum(parts.values())}


def project_on_groups(
    distance: np.ndarray, groupings: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Squared distance (N, G) as (N,) parts: the means of each grouping's groups, one grouping
    after another, and the residual."""
    rest, parts = np.asarray(distance, dtype=np.float64), {}
    for name, group in groupings.items():
        code, names = pd.factorize(group)
        means = condition_sums(rest, code, len(names)) / np.bincount(code)[:, None]
        rest = rest - means[code]
        parts[name] = np.square(means).mean(axis=1)[code]
    return parts | {RESIDUAL: np.einsum("ng,ng->n", rest, rest) / rest.shape[1]}
