"""Confirmation with fresh seeds: the statistics of the decision, and the fits that are missing."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support.searches import NO_PRUNER, open_search, run, score, search_config

from pipeline.gem.common.errors import DivergedError, StoppedError
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.confirmation import Confirmation, best_trial, compare, decide
from pipeline.gem.search.search_config import Objective

METRIC = "predictive_log_likelihood"
LIKELIHOOD = Objective(metric=METRIC, direction="maximize")
ERROR = Objective(metric="mse", direction="minimize")


def scores(objective=LIKELIHOOD, **trials: list[float | None]) -> pd.DataFrame:
    """The scores of trials t0, t7, ..., one per seed."""
    rows = [
        (int(name[1:]), seed, value)
        for name, values in trials.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["trial", "seed", objective.metric])


def compared(winner: int, **trials: list[float | None]):
    return compare(scores(**trials), LIKELIHOOD, winner, {}, epochs=9, others=11)


@pytest.mark.parametrize(
    ("objective", "trials", "expected"),
    [
        (LIKELIHOOD, {"t0": [1.0, 1.0], "t3": [5.0, 0.0], "t7": [3.0, 3.0]}, 7),  # best mean
        (ERROR, {"t0": [1.0, 1.0], "t3": [5.0, 0.0], "t7": [3.0, 3.0]}, 0),
        (LIKELIHOOD, {"t0": [1.0, 1.0], "t3": [9.0, None]}, 0),  # a failed fit excludes
        (LIKELIHOOD, {"t0": [None, 1.0]}, None),
        (LIKELIHOOD, {"t0": [2.0, 2.0], "t3": [2.0, 2.0]}, 0),  # the baseline of equals
    ],
)
def test_the_winner_has_the_best_mean_over_all_seeds(objective, trials, expected):
    assert best_trial(scores(objective, **trials), objective) == expected


def test_the_interval_is_that_of_a_paired_t_test(rng):
    baseline, gain = rng.normal(0, 5, 6), rng.normal(1, 0.3, 6)
    decision = compared(4, t0=list(baseline), t4=list(baseline + gain))
    expected = stats.ttest_rel(baseline + gain, baseline).confidence_interval(0.95)
    assert (decision.low, decision.high) == pytest.approx((expected.low, expected.high))
    assert decision.difference == pytest.approx(gain.mean())
    assert decision.mean == pytest.approx((baseline + gain).mean())
    assert decision.deviation == pytest.approx((baseline + gain).std(ddof=1))


def test_a_winning_baseline_is_compared_with_the_best_other_trial():
    trials = {"t0": [5.0, 7.0, 6.0], "t3": [1.0] * 3, "t4": [4.5, 6.0, 5.4], "t9": [None, 9.0, 9.0]}
    decision = compared(0, **trials)
    expected = stats.ttest_rel(trials["t0"], trials["t4"]).confidence_interval(0.95)
    assert decision.runner_up == 4
    assert (decision.low, decision.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("winner", "trials", "expected"),
    [
        (4, {"t0": [1.0, 9.0, 5.0], "t4": [2.0, 10.1, 5.9]}, "): significant"),
        (4, {"t0": [1.0, 9.0, 5.0], "t4": [4.0, 8.0, 5.5]}, "): not significant"),
        (
            4,
            {"t0": [1.0, 9.0, 5.0], "t4": [4.0, 8.0, 5.5]},
            "3 fresh seeds of 9 epochs; +0.8333 from the base",
        ),
        (0, {"t0": [5.0, 7.0], "t4": [4.5, 6.0]}, "; +0.75 from the best other, trial 4 (95 % "),
        (
            4,
            {"t0": [1.0], "t4": [2.0]},
            "1 fresh seed of 9 epochs; +1 from the baseline; no interval from one",
        ),
        (4, {"t0": [1.0], "t4": [2.0]}, "trial 4 is the best of 12 settings: "),
        (0, {"t0": [5.0, 7.0], "t4": [4.5, 6.0]}, "is confirmed against 11 other settings: "),
        (0, {"t0": [2.0, 2.0]}, "over 2 fresh seeds of 9 epochs; no other candidate was confirmed"),
        (0, {"t0": [2.0, 2.0], "t4": [None, 1.0]}, "no other candidate was confirmed"),
        (
            4,
            {"t0": [None, 2.0], "t4": [1.0, 1.0]},
            "the baseline failed, so there is no comparison",
        ),
    ],
)
def test_the_summary_states_the_comparison_and_its_significance(winner, trials, expected):
    assert expected in compared(winner, **trials).summary


@pytest.mark.parametrize(
    ("gains", "winner"),
    [
        ([1.0, 1.1, 0.9], 4),  # beyond noise
        ([3.0, 0.1, -0.1], 0),  # the better mean, within noise
        ([-1.0, -1.1, -0.9], 0),
        ([0.1], 4),  # no interval
    ],
)
@pytest.mark.parametrize(("objective", "sign"), [(LIKELIHOOD, 1.0), (ERROR, -1.0)])
def test_the_baseline_stays_unless_another_trial_beats_it_by_more_than_noise(
    objective, sign, gains, winner
):
    baseline = [5.0, 3.0, 9.0][: len(gains)]
    better = [value + sign * gain for value, gain in zip(baseline, gains, strict=True)]
    table = scores(objective, t0=baseline, t4=better)
    decision = decide(table, objective, lambda trial: {"trial": trial}, epochs=9, others=11)
    assert (decision.trial, decision.values, decision.others) == (winner, {"trial": winner}, 11)
    expected = sign * np.mean(gains) * (1 if winner else -1)
    assert decision.difference == pytest.approx(expected)


def confirmation(params, **changes) -> Confirmation:
    """Of a search with 8 trials."""
    config = search_config(
        pruner=NO_PRUNER, confirm={"top": 2, "seeds": [5, 6, 7]} | changes, epochs=4
    )
    search = run(open_search(params, config), 8)
    return Confirmation(search, config.confirm, epochs=9)


def confirm(confirmation: Confirmation, evaluate) -> None:
    confirmation.run(evaluate, StopSignal(), lambda pair: None)


def test_the_baseline_and_the_best_trials_are_confirmed_with_every_seed(params):
    confirmed = confirmation(params)

    def evaluate(pair) -> float:
        noise = np.random.default_rng(pair.values["seed"]).normal(0, 0.01)
        return score(confirmed.values(pair.values["trial"])) + noise

    confirm(confirmed, evaluate)
    table = confirmed.table()
    others = [trial for trial in confirmed.search.complete if trial.number]
    best = [trial.number for trial in sorted(others, key=lambda trial: -trial.value)][:2]
    assert list(table["trial"].unique()) == [0, *best]
    assert table["seed"].tolist() == [5, 6, 7] * 3 and table[METRIC].notna().all()
    assert confirmed.decide().trial == best[0]


def test_an_interrupted_confirmation_continues_with_the_missing_fits(params):
    interrupted, fits = confirmation(params), []

    def evaluate(pair) -> float:
        if len(fits) == 4:
            raise StoppedError("by SIGTERM")
        fits.append(pair.values)
        return 0.0

    with pytest.raises(StoppedError):
        confirm(interrupted, evaluate)
    search = open_search(params, interrupted.search.config)
    continued = Confirmation(search, interrupted.config, 9)
    confirm(continued, lambda pair: fits.append(pair.values) or 0.0)
    pairs = [tuple(sorted(values.items())) for values in fits]
    assert len(pairs) == len(set(pairs)) == 9
    confirm(continued, lambda pair: pytest.fail("no fit is missing"))


def test_more_seeds_or_candidates_keep_the_fits_and_other_epochs_do_not(params):
    first, fits = confirmation(params), []
    confirm(first, lambda pair: 0.0)
    config = search_config(pruner=NO_PRUNER, confirm={"top": 3, "seeds": [5, 6, 7, 8]})
    larger = Confirmation(open_search(params, config), config.confirm, 9)
    confirm(larger, lambda pair: fits.append(pair.values) or -99.0)
    assert len(fits) == 4 * 4 - 9
    other_epochs = Confirmation(larger.search, config.confirm, 10)
    assert other_epochs.table()[METRIC].isna().all()


def test_a_worker_fits_a_pair_of_a_candidate_that_only_another_worker_has(params):
    """After a time limit, workers can start the confirmation before the last trial ends."""
    confirmed, fits = confirmation(params, top=1), []
    candidates = confirmed.candidates()
    other = next(trial for trial in confirmed.search.complete if trial.number not in candidates)
    confirmed.queue.enqueue([{"trial": other.number, "seed": 5}])
    confirm(confirmed, lambda pair: fits.append(confirmed.values(pair.values["trial"])) or 0.0)
    assert fits[0] == confirmed.search.values_of(other) and len(fits) == 1 + 2 * 3


def test_a_trial_that_was_lucky_in_the_search_loses(params):
    confirmed = confirmation(params)
    lucky = next(trial.number for trial in confirmed.search.ranked() if trial.number)
    fresh = {lucky: -100.0, 0: 0.0}
    confirm(confirmed, lambda pair: fresh.get(pair.values["trial"], 1.0))
    decision = confirmed.decide()
    assert decision.trial not in (0, lucky) and decision.difference == 1.0


def test_a_confirmation_in_which_every_candidate_failed_ends_with_the_reasons(params):
    confirmed = confirmation(params, top=1, seeds=[5])

    def evaluate(pair):
        raise DivergedError("loss is not finite at step 3")

    confirm(confirmed, evaluate)
    message = "every candidate failed with some seed: loss is not finite at step 3"
    with pytest.raises(DivergedError, match=message):
        confirmed.decide()


def test_no_fit_of_a_confirmation_is_pruned(params):
    confirmed = confirmation(params, seeds=[5, 6, 7, 8, 9])

    def evaluate(pair) -> float:
        for epoch in range(1, 4):
            pair.report(-100.0 * pair.number, epoch)
        return float(pair.values["trial"])

    confirm(confirmed, evaluate)
    assert len(confirmed.queue.complete) == len(confirmed.pairs()) == 15
    assert (confirmed.table()[METRIC] == confirmed.table()["trial"]).all()
