"""Which searched keys matter, also where most trials were pruned."""

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats import rankdata

from pipeline.gem.search.importance import importance_table, wins

SPACE = {"a": FloatDistribution(0, 1), "b": FloatDistribution(0, 1)}


def trial(
    curve: list[float], *, complete: bool = True, values: list[float] | None = None, **params: float
) -> FrozenTrial:
    """A trial with a value after each epoch, and of a complete one a final value."""
    params = params or {"a": 0.5, "b": 0.5}
    return create_trial(
        state=TrialState.COMPLETE if complete else TrialState.PRUNED,
        params=params,
        distributions={name: SPACE[name] for name in params},
        intermediate_values=dict(enumerate(curve, start=1)),
        values=(values or curve[-1:]) if complete else None,
    )


def test_trials_that_all_end_count_with_their_rank(rng):
    values = rng.permutation(7).astype(float)
    for upwards in (True, False):
        found = wins([trial([0.0, value]) for value in values], upwards)
        np.testing.assert_allclose(found, (rankdata(values if upwards else -values) - 1) / 6)


def test_equal_trials_share_the_win():
    np.testing.assert_allclose(
        wins([trial([1.0]), trial([1.0]), trial([0.0])], upwards=True), [0.75, 0.75, 0.0]
    )


def test_a_pruned_trial_is_compared_at_the_last_epoch_that_both_have_reached():
    good, late, pruned = (
        trial([1.0, 5.0, 9.0]),
        trial([0.0, 4.0, 8.0]),
        trial([0.5, 4.5], complete=False),
    )
    np.testing.assert_allclose(wins([good, late, pruned], upwards=True), [1.0, 0.0, 0.5])
    earlier = trial([2.0], complete=False)  # at epoch 1 it beats them all
    np.testing.assert_allclose(
        wins([good, late, pruned, earlier], upwards=True), [2 / 3, 0.0, 1 / 3, 1.0]
    )


def test_a_trial_that_nothing_is_known_of_has_no_share():
    failed = create_trial(state=TrialState.FAIL, params={"a": 0.1, "b": 0.1}, distributions=SPACE)
    broken = trial([math.nan, math.nan], complete=False)
    found = wins([trial([1.0]), failed, broken, trial([2.0])], upwards=True)
    np.testing.assert_array_equal(found, [0.0, np.nan, np.nan, 1.0])


def test_the_key_that_matters_is_found_though_most_trials_were_pruned(rng):
    """Of complete trials alone, nothing is to be seen: all of them have the same `a`, nearly."""
    points = rng.random((40, 2))
    good = np.argsort(-points[:, 0])[:4]
    trials = [
        trial([a, a] if number in good else [a], complete=number in good, a=a, b=b)
        for number, (a, b) in enumerate(points)
    ]
    table = importance_table(trials, ["b", "a"], upwards=True)
    assert table["parameter"].tolist() == ["a", "b"]
    assert (table.loc[0, ["ped_anova", "fanova"]] > 0.8).all()
    assert table[["ped_anova", "fanova"]].sum().tolist() == pytest.approx([1, 1])


def test_of_complete_trials_it_is_what_optuna_says_of_their_ranks(rng):
    trials = [trial([a + 0.1 * b], a=a, b=b) for a, b in rng.random((30, 2))]
    study = optuna.create_study(direction="maximize")
    ranks = rankdata([one.value for one in trials])
    study.add_trials(
        [
            create_trial(params=one.params, distributions=SPACE, value=(rank - 1) / 29)
            for one, rank in zip(trials, ranks, strict=True)
        ]
    )
    expected = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    table = importance_table(trials, ["a", "b"], upwards=True).set_index("parameter")
    assert table["fanova"].to_dict() == pytest.approx(expected)


def test_each_of_several_objectives_has_its_own(rng):
    trials = [trial([], values=[a, -b], a=a, b=b) for a, b in rng.random((30, 2))]
    tables = [
        importance_table(trials, ["a", "b"], upwards, objective)
        for objective, upwards in ((0, True), (1, False))
    ]
    assert [table.loc[0, "parameter"] for table in tables] == ["a", "b"]


def test_a_key_that_not_every_trial_asks_has_no_number_of_fanova(rng):
    points = rng.random((12, 2))
    trials = [
        trial([a], **({"a": a, "b": b} if number else {"a": a}))
        for number, (a, b) in enumerate(points)
    ]
    table = importance_table(trials, ["a", "b"], upwards=True).set_index("parameter")
    assert (
        np.isnan(table.loc["b", "fanova"])
        and table.loc["b", "ped_anova"] < 0.1
        and table.loc["a"].min() > 0.9
    )


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
def test_too_few_trials_or_all_alike_say_nothing(values):
    table = importance_table([trial([value]) for value in values], ["a", "b"], upwards=True)
    assert table[["ped_anova", "fanova"]].isna().all().all()
