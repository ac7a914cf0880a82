"""Who wins after fresh seeds, and by more than noise or not: the statistics, and the study of pairs. Real SQLite."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support.searches import question, run, score, search

from pipeline.gem.common.errors import DivergedError, StoppedError
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.confirmation import Confirmation, best_mean, compare
from pipeline.gem.search.trial_queue import RunningTrial

METRIC = "predictive_log_likelihood"


@pytest.fixture(autouse=True)
def _own_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)


def table(**scores: list[float]) -> pd.DataFrame:
    """Columns t0, t7, ...: scores of a trial, a seed each."""
    return pd.DataFrame(
        [
            {"trial": int(name[1:]), "seed": seed, METRIC: value}
            for name, values in scores.items()
            for seed, value in enumerate(values)
        ]
    )


# the decision


def test_the_winner_is_the_best_mean_not_the_best_seed():
    scores = table(t0=[1.0, 1.0], t3=[5.0, 0.0], t7=[3.0, 3.0])
    assert best_mean(scores, METRIC, "maximize") == 7
    assert best_mean(scores, METRIC, "minimize") == 0


def test_a_candidate_that_failed_with_one_seed_cannot_win():
    assert best_mean(table(t0=[1.0, 1.0], t3=[9.0, None]), METRIC, "maximize") == 0
    assert best_mean(table(t0=[None, 1.0]), METRIC, "maximize") is None


def test_of_equals_the_baseline_wins():
    assert best_mean(table(t0=[2.0, 2.0], t3=[2.0, 2.0]), METRIC, "maximize") == 0


def test_the_interval_is_that_of_a_paired_t_test(rng):
    baseline, other = rng.normal(0, 5, 6), rng.normal(1, 0.3, 6)
    decision = compare(
        table(t0=list(baseline), t4=list(baseline + other)), METRIC, "maximize", 4, {}
    )
    expected = stats.ttest_rel(baseline + other, baseline).confidence_interval(0.95)
    assert (decision.low, decision.high) == pytest.approx((expected.low, expected.high))
    assert decision.difference == pytest.approx(other.mean())
    assert decision.mean == pytest.approx((baseline + other).mean())
    assert decision.deviation == pytest.approx((baseline + other).std(ddof=1))


def test_a_difference_that_every_seed_shows_is_more_than_noise_and_one_that_seeds_disagree_about_is_not():
    clear = compare(table(t0=[1.0, 9.0, 5.0], t4=[2.0, 10.1, 5.9]), METRIC, "maximize", 4, {})
    assert clear.verdict.endswith(": more than noise")
    unclear = compare(table(t0=[1.0, 9.0, 5.0], t4=[4.0, 8.0, 5.5]), METRIC, "maximize", 4, {})
    assert unclear.verdict.endswith(": within noise")
    assert "over 3 fresh seeds; +0.8333 from the baseline" in unclear.verdict


def test_a_baseline_that_wins_is_compared_with_the_best_other():
    found = table(t0=[5.0, 7.0, 6.0], t3=[1.0, 1.0, 1.0], t4=[4.5, 6.0, 5.4], t9=[None, 9.0, 9.0])
    decision = compare(found, METRIC, "maximize", 0, {})
    expected = stats.ttest_rel([5.0, 7.0, 6.0], [4.5, 6.0, 5.4]).confidence_interval(0.95)
    assert decision.rival == 4 and (decision.low, decision.high) == pytest.approx(
        (expected.low, expected.high)
    )
    assert (
        "trial 0, the baseline: " in decision.verdict
        and "; +0.7 from the best other, trial 4 (95 % interval " in decision.verdict
    )
    assert compare(found, METRIC, "minimize", 0, {}).rival == 3


def test_one_seed_claims_nothing():
    decision = compare(table(t0=[1.0], t4=[2.0]), METRIC, "maximize", 4, {})
    assert decision.low is None and decision.deviation is None
    assert (
        "one seed cannot tell a difference from noise: ask for more trials, or for more seeds in `confirm`"
        in decision.verdict
    )


def test_a_baseline_that_wins_or_failed_is_said():
    assert compare(table(t0=[2.0, 2.0]), METRIC, "maximize", 0, {}).verdict.endswith(
        "over 2 fresh seeds; nothing else was confirmed"
    )
    assert compare(
        table(t0=[2.0, 2.0], t4=[None, 1.0]), METRIC, "maximize", 0, {}
    ).verdict.endswith("nothing else was confirmed")
    assert compare(
        table(t0=[None, 2.0], t4=[1.0, 1.0]), METRIC, "maximize", 4, {}
    ).verdict.endswith("the baseline failed: nothing to compare with")


# the pairs


def confirmation(params, **changes) -> Confirmation:
    asked = question(pruner={"name": "none"}, confirm={"top": 2, "seeds": [5, 6, 7]} | changes)
    return Confirmation(run(search(params, asked), 8), asked.confirm, epochs=9)


def confirm(found: Confirmation, evaluate) -> None:
    found.run(evaluate, StopSignal(), lambda trial: None, lambda run: None)


def noisy(found: Confirmation):
    def evaluate(asked: RunningTrial) -> float:
        values = found.candidates()[asked.values["trial"]]
        noise = np.random.default_rng(asked.values["seed"]).normal(0, 0.01)
        return score(type("Asked", (), {"values": values})) + noise

    return evaluate


def test_the_baseline_and_the_best_are_confirmed_with_every_seed(params):
    found = confirmation(params)
    confirm(found, noisy(found))
    result = found.table()
    best = [
        trial.number
        for trial in sorted(found.search.complete, key=lambda trial: -trial.value)
        if trial.number
    ][:2]
    assert list(dict.fromkeys(result["trial"])) == [0, *best]
    assert result["seed"].tolist() == [5, 6, 7] * 3 and result[METRIC].notna().all()
    assert found.decide().trial == best[0]


def test_a_confirmation_told_to_stop_goes_on_with_the_pairs_that_are_owed(params):
    found, done = confirmation(params), []

    def stop(asked: RunningTrial) -> float:
        if len(done) == 4:
            raise StoppedError("by SIGTERM")
        done.append(asked.values)
        return 0.0

    with pytest.raises(StoppedError):
        confirm(found, stop)
    again = Confirmation(search(params, found.search.question), found.how, 9)
    confirm(again, lambda asked: done.append(asked.values) or 0.0)
    pairs = [tuple(sorted(values.items())) for values in done]
    assert len(pairs) == len(set(pairs)) == 9
    confirm(again, lambda asked: pytest.fail("nothing is owed"))


def test_more_seeds_or_candidates_add_pairs_and_keep_those_that_are_there(params):
    found = confirmation(params)
    confirm(found, noisy(found))
    asked = question(pruner={"name": "none"}, confirm={"top": 3, "seeds": [5, 6, 7, 8]})
    more = Confirmation(search(params, asked), asked.confirm, 9)
    assert more.search.name == found.search.name, "who is confirmed is no part of the question"
    done = []
    confirm(more, lambda asked: done.append(asked.values) or -99.0)
    assert len(done) == 4 * 4 - 9
    other_epochs = Confirmation(more.search, asked.confirm, 10)
    assert other_epochs.table()[METRIC].isna().all(), "other epochs are other fits"


def test_the_winner_of_luck_loses_to_a_better_mean(params):
    """The best trial of a search was the luckiest; fresh seeds tell."""
    found = confirmation(params)
    lucky = next(trial.number for trial in found.search.ranked() if trial.number)
    confirm(
        found,
        lambda asked: (
            -100.0 if asked.values["trial"] == lucky else 0.0 if asked.values["trial"] == 0 else 1.0
        ),
    )
    decision = found.decide()
    assert decision.trial not in (0, lucky) and decision.difference == 1.0


def test_when_no_candidate_is_confirmed_the_reasons_are_said(params):
    found = confirmation(params, top=1, seeds=[5])

    def diverge(asked: RunningTrial) -> float:
        raise DivergedError("loss is not finite at step 3")

    confirm(found, diverge)
    with pytest.raises(
        DivergedError,
        match="no candidate was confirmed with every seed: loss is not finite at step 3",
    ):
        found.decide()


def test_a_look_around_is_confirmed_cheaply_and_a_search_with_every_seed(params):
    asked = question(
        pruner={"name": "none"}, confirm={"top": 2, "seeds": [5, 6, 7], "from_trials": 8}
    )
    searched = run(search(params, asked), 8)
    few, enough = (
        Confirmation(searched, asked.confirmation(trials), epochs=9) for trials in (7, 8)
    )
    assert (len(few.candidates()), few.how.seeds, few.epochs) == (2, (5,), -(-asked.epochs // 2))
    assert (len(enough.candidates()), enough.how.seeds, enough.epochs) == (3, (5, 6, 7), 9)
    assert few.claims.name != enough.claims.name, "fits of other lengths are not mixed"


def test_nothing_is_pruned_however_many_are_confirmed_and_however_badly_they_begin(params):
    found = confirmation(params, seeds=[5, 6, 7, 8, 9])

    def worse_and_worse(asked):
        for epoch in range(1, 4):
            asked.report(-100.0 * asked.number, epoch)
        return float(asked.values["trial"])

    confirm(found, worse_and_worse)
    assert len(found.claims.complete) == len(found.pairs()) == 15
    assert (found.table()["predictive_log_likelihood"] == found.table()["trial"]).all()
