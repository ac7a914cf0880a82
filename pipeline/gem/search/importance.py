"""Which searched keys matter: PED-ANOVA and fANOVA of all trials of a search, those that were pruned too.

A pruned trial has no final value, and among the few that come to their end little matters: all are good. So a trial counts with the
share of the others that it beats, at the last epoch that both have reached. Where none is pruned this is its rank.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

_FEWEST = 4  # trials


def importance_table(
    trials: Sequence[FrozenTrial], keys: Sequence[str], upwards: bool, objective: int = 0
) -> pd.DataFrame:
    """A row per key: parameter, ped_anova, fanova, the share of importance by each; empty cells where there are too few trials."""
    shares = wins(trials, upwards, objective)
    judged = [
        (trial, share) for trial, share in zip(trials, shares, strict=True) if math.isfinite(share)
    ]
    enough = len(judged) >= _FEWEST and len({share for _, share in judged}) > 1
    study = _ranked(judged) if enough else None
    table = pd.DataFrame({"parameter": list(keys)})
    evaluators = {
        "ped_anova": optuna.importance.PedAnovaImportanceEvaluator,
        "fanova": lambda: optuna.importance.FanovaImportanceEvaluator(seed=0),
    }
    for name, evaluator in evaluators.items():
        table[name] = (
            table["parameter"].map(_importances(study, evaluator()) if study else {}).astype(float)
        )
    return table.sort_values(
        ["ped_anova", "parameter"], ascending=[False, True], na_position="last"
    ).reset_index(drop=True)


def wins(trials: Sequence[FrozenTrial], upwards: bool, objective: int = 0) -> np.ndarray:
    """(trials,) the share of the others that each beats, a tie being half; NaN of a trial that nothing is known of."""
    known = [_curve(trial, objective) for trial in trials]
    shares = np.full(len(trials), np.nan)
    for one, (last, curve) in enumerate(known):
        scores = []
        for other, (other_last, other_curve) in enumerate(known):
            epoch = min(last, other_last)
            if one != other and epoch in curve and epoch in other_curve:
                difference = (curve[epoch] - other_curve[epoch]) * (1 if upwards else -1)
                scores.append(0.5 + 0.5 * np.sign(difference))
        if scores:
            shares[one] = np.mean(scores)
    return shares


def _curve(trial: FrozenTrial, objective: int) -> tuple[float, dict[float, float]]:
    """(last epoch, value by epoch); the value of a complete trial stands at infinity, after all epochs."""
    curve = (
        {epoch: value for epoch, value in trial.intermediate_values.items() if math.isfinite(value)}
        if objective == 0
        else {}
    )
    if trial.state == TrialState.COMPLETE:
        return math.inf, curve | {math.inf: trial.values[objective]}
    return max(curve, default=-math.inf), curve


def _ranked(judged: list[tuple[FrozenTrial, float]]) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    for trial, share in judged:
        study.add_trial(
            optuna.trial.create_trial(
                params=trial.params, distributions=trial.distributions, value=float(share)
            )
        )
    return study


def _importances(
    study: optuna.Study, evaluator: optuna.importance.BaseImportanceEvaluator
) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # that few trials tell little
        return optuna.importance.get_param_importances(study, evaluator=evaluator)
