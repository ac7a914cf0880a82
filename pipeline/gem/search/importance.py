"""Importance of the searched keys by PED-ANOVA and fANOVA, over all trials including pruned ones.

A pruned trial has no final value, and the few complete trials are all good, so that among them no
key matters. Therefore every trial counts with its win rate: the share of the other trials that it
beats at the last epoch that both reached. Without pruning this is the rank of its final value.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

_MIN_TRIALS = 4


def importance_table(
    trials: Sequence[FrozenTrial], keys: Sequence[str], maximize: bool, objective: int = 0
) -> pd.DataFrame:
    """Columns parameter, ped_anova, fanova: each key's share of the importance, a row per key.

    The shares are missing if there are too few trials, or if all are equally good.
    """
    table = pd.DataFrame({"parameter": list(keys)})
    rates = win_rates(trials, maximize, objective)
    study, finite = study_in_memory(trials, rates), rates[np.isfinite(rates)]
    enough = len(finite) >= _MIN_TRIALS and len(set(finite)) > 1
    for name, evaluator in (
        ("ped_anova", optuna.importance.PedAnovaImportanceEvaluator()),
        ("fanova", optuna.importance.FanovaImportanceEvaluator(seed=0)),
    ):
        shares = _importances(study, evaluator) if enough else {}
        table[name] = table["parameter"].map(shares).astype(float)
    return table.sort_values(
        ["ped_anova", "parameter"], ascending=[False, True], na_position="last"
    ).reset_index(drop=True)


def study_in_memory(
    trials: Sequence[FrozenTrial], values: Sequence[float], direction: str = "maximize"
) -> optuna.Study:
    """An Optuna study of the trials with other values. Leaves out trials without a value."""
    study = optuna.create_study(direction=direction)
    for trial, value in zip(trials, values, strict=True):
        if math.isfinite(value):
            settings = {"params": trial.params, "distributions": trial.distributions}
            study.add_trial(optuna.create_trial(**settings, value=float(value)))
    return study


def win_rates(trials: Sequence[FrozenTrial], maximize: bool, objective: int = 0) -> np.ndarray:
    """(trials,) the share of the other trials that each beats at the last epoch that both reached.

    A tie counts half. NaN for a trial without a value.
    """
    curves = [_learning_curve(trial, objective) for trial in trials]
    rates = np.full(len(trials), np.nan)
    for number, (last, curve) in enumerate(curves):
        scores = []
        for other, (other_last, other_curve) in enumerate(curves):
            epoch = min(last, other_last)
            if other != number and epoch in curve and epoch in other_curve:
                difference = (curve[epoch] - other_curve[epoch]) * (1 if maximize else -1)
                scores.append(0.5 + 0.5 * np.sign(difference))
        if scores:
            rates[number] = np.mean(scores)
    return rates


def _learning_curve(trial: FrozenTrial, objective: int) -> tuple[float, dict[float, float]]:
    """(last epoch, value by epoch). The final value of a complete trial has epoch infinity."""
    curve: dict[float, float] = {}
    if objective == 0:
        reported = trial.intermediate_values
        curve = {epoch: value for epoch, value in reported.items() if math.isfinite(value)}
    if trial.state == TrialState.COMPLETE:
        return math.inf, curve | {math.inf: trial.values[objective]}
    return max(curve, default=-math.inf), curve


def _importances(study: optuna.Study, evaluator) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # few trials
        return optuna.importance.get_param_importances(study, evaluator=evaluator)
