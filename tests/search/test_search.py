"""A search: what identifies it, its baseline, its budget, its tables."""

import pytest
from support.searches import KL, LATENT, NO_PRUNER, open_search, points, run, score, search_config

from pipeline.gem.common.errors import DivergedError


def report_and_return(value: float, trial, epochs: int = 4) -> float:
    """Reports a constant value after every epoch."""
    for epoch in range(1, epochs + 1):
        trial.report(value, epoch)
    return value


def test_the_baseline_is_trial_zero(params):
    search = run(open_search(params), 3)
    assert search.finished[0].params == {LATENT: 4, KL: 1.0}


def test_later_calls_continue_to_the_exact_budget_without_repeating_a_point(params):
    for budget in (2, 4, 4, 7):
        search = run(open_search(params), budget)
        assert len(search.finished) == budget
    assert len(set(points(search))) == 7


def test_the_same_seed_gives_the_same_search(params, tmp_path, monkeypatch):
    def proposed_points(folder: str) -> list[tuple]:
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        return points(run(open_search(params), 6))

    assert proposed_points("first") == proposed_points("second")


@pytest.mark.slow
def test_startup_trials_do_not_depend_on_interruptions(params, tmp_path, monkeypatch):
    uninterrupted = points(run(open_search(params), 3))
    (tmp_path / "interrupted").mkdir()
    monkeypatch.chdir(tmp_path / "interrupted")
    for budget in (1, 2, 3):
        search = run(open_search(params), budget)
    assert points(search) == uninterrupted


def test_the_search_improves_on_its_baseline(params):
    search = run(open_search(params), 25)
    best = search.ranked()[0]
    assert best.value > search.finished[0].value + 1
    assert score(search.values_of(best)) == best.value


def test_another_definition_cohort_or_fixed_parameter_is_another_search(params):
    names = {
        open_search(params).name,
        open_search(params, search_config(epochs=5)).name,
        open_search(params, data="b" * 64).name,
        open_search(params.override({"train.learning_rate": 0.123})).name,
    }
    assert len(names) == 4


def test_searched_keys_of_params_and_the_description_do_not_identify_a_search(params):
    """So a promotion, which changes the searched keys, does not start another search."""
    name = open_search(params).name
    assert name == open_search(params.override({LATENT: 33, KL: 0.5})).name
    assert name == open_search(params, search_config(description="Other words?")).name


def test_a_changed_definition_replaces_another_search(params):
    assert not run(open_search(params), 1).replaces_another
    assert not open_search(params).replaces_another
    assert open_search(params, search_config(epochs=5)).replaces_another


def test_pruned_trials_count_with_their_last_value(params):
    search = run(
        open_search(params), 6, lambda trial: report_and_return(-100.0 * trial.number, trial)
    )
    table = search.trials_table()
    assert table["state"].tolist() == ["complete", "complete", *4 * ["pruned"]]
    assert (table["epochs"][2:] == 1).all(), "pruning starts after warmup_epochs"
    assert table["value"].tolist() == [-100.0 * number for number in range(6)]
    assert table["win_rate"].tolist() == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


@pytest.mark.parametrize(
    "pruner",
    [
        {"name": "median", "startup_trials": 2, "warmup_epochs": 1},
        {"name": "asha", "min_epochs": 1, "reduction": 2},
        {"name": "hyperband", "min_epochs": 1, "reduction": 2},
    ],
    ids=lambda pruner: pruner["name"],
)
def test_every_pruner_stops_bad_trials_and_the_saved_epochs_are_counted(params, pruner):
    search = run(
        open_search(params, search_config(pruner=pruner)),
        14,
        lambda trial: report_and_return(-float(trial.number), trial),
    )
    trained, saved = search.epochs()
    assert search.counts()["pruned"] > 0
    assert trained + saved == 14 * 4 and saved > 0
    assert trained == sum(len(trial.intermediate_values) for trial in search.finished)


def test_a_diverged_trial_fails_and_the_search_continues(params):
    def evaluate(trial):
        if trial.number == 1:
            raise DivergedError("loss is not finite at step 3")
        return score(trial.values)

    states = run(open_search(params), 4, evaluate).trials_table()["state"]
    assert states.tolist() == ["complete", "failed", "complete", "complete"]


def test_a_search_without_a_complete_trial_ends_with_the_reasons(params):
    def evaluate(trial):
        raise DivergedError(f"broken at step {trial.number}")

    search = run(open_search(params), 2, evaluate)
    message = "none of 2 trials is usable: broken at step 0; broken at step 1"
    with pytest.raises(DivergedError, match=message) as caught:
        search.require_usable()
    assert caught.value.exit_code == 3


def test_with_several_objectives_the_first_chooses_among_the_pareto_optimal_trials(params):
    objective = [
        {"metric": "predictive_log_likelihood", "direction": "maximize"},
        {"metric": "latent_leakage", "direction": "minimize"},
    ]
    search = run(
        open_search(params, search_config(objective=objective, pruner=NO_PRUNER)),
        12,
        lambda trial: [score(trial.values), float(trial.values[LATENT])],
    )
    table = search.trials_table()
    names = ["predictive_log_likelihood", "latent_leakage"]
    assert list(table.columns[:6]) == ["trial", "state", *names, "epochs", "pareto_optimal"]
    for _, row in table.iterrows():
        gain = table[names[0]] - row[names[0]]
        saving = row[names[1]] - table[names[1]]
        dominated = ((gain >= 0) & (saving >= 0) & ((gain > 0) | (saving > 0))).any()
        assert row["pareto_optimal"] == (not dominated)
    assert search.ranked()[0].values[0] == table[names[0]].max()
    assert set(search.importance_table()["objective"]) == set(names)
