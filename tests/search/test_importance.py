"""Importance of the searched keys, also if most trials were pruned."""

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats import rankdata

from pipeline.gem.search.importance import importance_table, win_rates

SPACE = {"a": FloatDistribution(0, 1), "b": FloatDistribution(0, 1)}
SHARES = ["ped_anova", "fanova"]


def trial(
    curve: list[float], *, pruned: bool = False, values: list[float] | None = None, **params: float
) -> FrozenTrial:
    """A trial with a value after each epoch; the final value of a complete trial is the last."""
    params = params or {"a": 0.5, "b": 0.5}
    return create_trial(
        state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
        params=params,
        distributions={name: SPACE[name] for name in params},
        intermediate_values=dict(enumerate(curve, start=1)),
        values=None if pruned else values or curve[-1:],
    )


def table(trials: list[FrozenTrial], maximize: bool = True, objective: int = 0):
    return importance_table(trials, ["a", "b"], maximize, objective).set_index("parameter")


@pytest.mark.parametrize("maximize", [True, False])
def test_the_win_rate_of_complete_trials_is_their_rank(rng, maximize):
    values = rng.permutation(7).astype(float)
    ranks = rankdata(values if maximize else -values)
    rates = win_rates([trial([0.0, value]) for value in values], maximize)
    np.testing.assert_allclose(rates, (ranks - 1) / 6)


def test_a_tie_counts_half():
    trials = [trial([1.0]), trial([1.0]), trial([0.0])]
    np.testing.assert_allclose(win_rates(trials, maximize=True), [0.75, 0.75, 0.0])


def test_a_pruned_trial_is_compared_at_the_last_epoch_that_both_reached():
    trials = [trial([1.0, 5.0, 9.0]), trial([0.0, 4.0, 8.0]), trial([0.5, 4.5], pruned=True)]
    np.testing.assert_allclose(win_rates(trials, maximize=True), [1.0, 0.0, 0.5])
    best_at_epoch_1 = trial([2.0], pruned=True)
    rates = win_rates([*trials, best_at_epoch_1], maximize=True)
    np.testing.assert_allclose(rates, [2 / 3, 0.0, 1 / 3, 1.0])


def test_a_trial_without_a_value_has_no_win_rate():
    failed = create_trial(state=TrialState.FAIL, params={"a": 0.1, "b": 0.1}, distributions=SPACE)
    broken = trial([math.nan, math.nan], pruned=True)
    rates = win_rates([trial([1.0]), failed, broken, trial([2.0])], maximize=True)
    np.testing.assert_array_equal(rates, [0.0, np.nan, np.nan, 1.0])


def test_the_decisive_key_is_found_though_most_trials_were_pruned(rng):
    """All complete trials have almost the same `a`, so that they alone do not show it."""
    points = rng.random((40, 2))
    good = np.argsort(-points[:, 0])[:4]
    trials = [
        trial([a, a] if number in good else [a], pruned=number not in good, a=a, b=b)
        for number, (a, b) in enumerate(points)
    ]
    shares = table(trials)[SHARES]
    assert shares.index.tolist() == ["a", "b"] and (shares.loc["a"] > 0.8).all()
    assert shares.sum().tolist() == pytest.approx([1, 1])


def test_the_importance_of_complete_trials_is_optunas_of_their_ranks(rng):
    trials = [trial([a + 0.1 * b], a=a, b=b) for a, b in rng.random((30, 2))]
    study = optuna.create_study(direction="maximize")
    ranks = rankdata([trial.value for trial in trials])
    for one, rank in zip(trials, ranks, strict=True):
        study.add_trial(create_trial(params=one.params, distributions=SPACE, value=(rank - 1) / 29))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    expected = optuna.importance.get_param_importances(study, evaluator=evaluator)
    assert table(trials)["fanova"].to_dict() == pytest.approx(expected)


def test_every_objective_has_its_own_importance(rng):
    trials = [trial([], values=[a, -b], a=a, b=b) for a, b in rng.random((30, 2))]
    assert table(trials).index[0] == "a"
    assert table(trials, maximize=False, objective=1).index[0] == "b"


def test_fanova_is_missing_for_a_key_that_is_not_in_every_trial(rng):
    points = rng.random((12, 2))
    trials = [trial([a], a=a, b=b) for a, b in points[1:]]
    shares = table([trial([points[0, 0]], a=points[0, 0]), *trials])
    assert np.isnan(shares.loc["b", "fanova"]) and shares.loc["b", "ped_anova"] < 0.1
    assert shares.loc["a"].min() > 0.9


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
def test_few_or_equal_trials_have_no_importance(values):
    assert table([trial([value]) for value in values])[SHARES].isna().all().all()
