"""Searches: what is asked, what is stored, what is continued. Real SQLite."""

import math
import os
import signal
from collections import Counter

import optuna
import pytest
from support.searches import question, run, score, search

from pipeline.gem.common.errors import DivergedError, StoppedError
from pipeline.gem.search.search import Search
from pipeline.gem.search.trial_queue import Pruned


@pytest.fixture(autouse=True)
def _own_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)


def points(found: Search) -> list[tuple]:
    return [tuple(trial.params.values()) for trial in found.finished]


def test_the_baseline_is_trial_zero(params):
    found = search(params)
    run(found, 3)
    assert found.finished[0].params == {
        "model.latent.technical": 4,
        "train.kl_weight.technical": 1.0,
    }


def test_a_second_call_continues_to_the_budget_neither_over_nor_under(params):
    run(search(params), 4)
    again = search(params)
    assert len(again.finished) == 4
    run(again, 7)
    assert len(search(params).finished) == 7
    run(search(params), 7)
    assert len(search(params).finished) == 7


def test_no_point_is_proposed_twice_after_a_resume(params):
    for budget in (2, 4, 6, 8):
        run(search(params), budget)
    found = points(search(params))
    assert len(set(found)) == len(found) == 8


def test_the_same_seed_gives_the_same_search(params, tmp_path, monkeypatch):
    def searched(folder: str) -> list[tuple]:
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        found = search(params)
        run(found, 6)
        return points(found)

    assert searched("one") == searched("two")


def test_the_search_finds_better_than_its_baseline(params):
    found = search(params)
    run(found, 25)
    best = found.ranked()[0]
    assert best.value > found.finished[0].value + 1
    assert score(type("Asked", (), {"values": found.values_of(best)})) == best.value


def test_another_question_another_cohort_or_another_fixed_parameter_is_another_study(params):
    names = {
        search(params).name,
        search(params, question(epochs=5)).name,
        search(params, data="b" * 64).name,
        search(params.override({"train.learning_rate": 0.123})).name,
    }
    assert len(names) == 4


def test_a_searched_key_of_params_is_no_part_of_the_question(params):
    assert search(params).name == search(params.override({"model.latent.technical": 33})).name


def test_wording_is_no_part_of_the_question(params):
    assert search(params).name == search(params, question(question="Other words?")).name


def test_a_changed_question_says_that_it_starts_anew(params):
    run(search(params), 1)
    changed = search(params, question(epochs=5))
    assert changed.is_new
    assert changed.others == [search(params).name]


def test_pruned_trials_count_and_keep_the_value_they_had(params):
    def evaluate(asked):
        for epoch in range(1, 5):
            asked.report(-100.0 * asked.number, epoch)
        return -100.0 * asked.number

    found = search(params)
    run(found, 6, evaluate)
    table = found.trials_table()
    assert table["state"].tolist()[:2] == ["complete", "complete"]
    assert set(table["state"][2:]) == {"pruned"}
    assert (table["epochs"][2:] == 1).all(), "pruning starts when warmup_epochs are done"
    assert table["value"].tolist() == [-100.0 * number for number in range(6)]
    assert table["wins"].tolist() == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


def test_pruning_looks_like_an_exception_that_passes_through_the_fit(params):
    seen = []

    def evaluate(asked):
        try:
            asked.report(-float(asked.number), 2)
        except Pruned:
            seen.append(asked.number)
            raise
        return -float(asked.number)

    run(search(params), 5, evaluate)
    assert seen


def test_a_diverged_trial_fails_with_its_reason_and_the_search_goes_on(params):
    def evaluate(asked):
        if asked.number == 1:
            raise DivergedError("loss is not finite at step 3")
        return score(asked)

    found = search(params)
    run(found, 4, evaluate)
    assert found.trials_table()["state"].tolist() == ["complete", "failed", "complete", "complete"]


def test_a_search_without_any_usable_trial_ends_with_the_reasons(params):
    def evaluate(asked):
        raise DivergedError(f"broken at step {asked.number}")

    found = run(search(params), 2, evaluate)
    with pytest.raises(
        DivergedError, match="none of 2 trials is usable: broken at step 0; broken at step 1"
    ) as caught:
        found.require_usable()
    assert caught.value.exit_code == 3


def test_the_parent_run_is_made_once_and_again_only_where_the_store_lost_it(params):
    assert search(params).parent_run(lambda run: True, lambda: "abc") == "abc"
    assert search(params).parent_run(lambda run: True, lambda: "def") == "abc"
    assert search(params).parent_run(lambda run: False, lambda: "def") == "def"


# points


SMALL = {
    "model.blocks": {"type": "integer", "low": 0, "high": 2, "log": False},
    "model.linear_decoder": {"type": "categorical", "choices": [True, False]},
}
SMALL_BASELINE = {"model": {"blocks": 0, "linear_decoder": True}}


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "tpe", "seed": 1, "startup_trials": 2},
        {"name": "random", "seed": 1},
        {"name": "grid", "seed": 1},
        {"name": "qmc", "seed": 1},
    ],
)
def test_a_small_space_is_searched_to_its_last_point_without_repeating_one(params, sampler):
    asked = question(space=SMALL, baseline=SMALL_BASELINE, sampler=sampler)
    found = search(params, asked)
    assert found.budget(40) == 6
    for budget in (2, 5, 40):
        run(search(params, asked), budget, lambda asked: float(asked.values["model.blocks"]))
    assert sorted(points(found)) == [
        (blocks, linear) for blocks in (0, 1, 2) for linear in (False, True)
    ]


@pytest.mark.parametrize(("name", "trials"), [("tpe", 20), ("gp", 16), ("cmaes", 30)])
def test_samplers_that_learn_propose_better_points_than_they_started_with(params, name, trials):
    asked = question(
        sampler={"name": name, "seed": 2, "startup_trials": 6}, pruner={"name": "none"}
    )
    found = run(search(params, asked), trials, lambda asked: max(score(asked), -10.0))
    values = [trial.value for trial in found.finished]
    print(values)
    assert sum(values[-5:]) / 5 > sum(values[1:7]) / 6
    assert len(set(points(found))) == trials


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_samplers_that_do_not_learn_cover_the_space_and_go_on_where_they_stopped(params, sampler):
    asked = question(sampler={"name": sampler, "seed": 3}, pruner={"name": "none"})
    for budget in (3, 9, 17):
        found = run(search(params, asked), budget)
    weights = [
        math.log(trial.params["train.kl_weight.technical"] / 0.01) / math.log(400)
        for trial in found.finished[1:]
    ]
    assert len(set(weights)) == 16
    quarters = Counter(int(4 * weight) for weight in weights)
    assert set(quarters) == {0, 1, 2, 3}
    if sampler == "qmc":
        assert max(quarters.values()) - min(quarters.values()) <= 2, (
            "a low-discrepancy sequence, not continued at another place"
        )


def test_a_key_is_asked_only_where_its_condition_holds_and_keeps_the_baselines_value_elsewhere(
    params,
):
    space = {
        "model.blocks": {"type": "integer", "low": 0, "high": 2, "log": False},
        "model.dropout": {
            "type": "float",
            "low": 0.0,
            "high": 0.5,
            "log": False,
            "when": {"model.blocks": [1, 2]},
        },
    }
    asked = question(space=space, baseline={"model": {"blocks": 0, "dropout": 0.25}})
    found = run(
        search(params, asked), 16, lambda asked: -abs(asked.values.get("model.dropout", 1.0) - 0.1)
    )
    assert {len(trial.params) for trial in found.finished} == {1, 2}
    for trial in found.finished:
        assert ("model.dropout" in trial.params) == (trial.params["model.blocks"] > 0)
    assert sum(trial.params == {"model.blocks": 0} for trial in found.finished) == 1
    assert found.values_of(found.finished[0]) == {"model.blocks": 0, "model.dropout": 0.25}
    assert found.trials_table()["model.dropout"].isna().sum() == 1


CONDITIONAL = {
    "model.observation": {
        "type": "categorical",
        "choices": ["normal", "multinomial", "negative_binomial"],
    },
    "model.blocks": {"type": "integer", "low": 0, "high": 3, "log": False},
    "model.min_variance": {
        "type": "float",
        "low": 0.001,
        "high": 0.1,
        "log": True,
        "when": {"model.observation": ["normal"]},
    },
    "model.dropout": {
        "type": "float",
        "low": 0.0,
        "high": 0.5,
        "step": 0.125,
        "log": False,
        "when": {"model.blocks": [2, 3]},
    },
    "model.expansion": {
        "type": "integer",
        "low": 1,
        "high": 8,
        "log": True,
        "when": {"model.blocks": [2, 3], "model.observation": ["normal", "multinomial"]},
    },
}
CONDITIONAL_BASELINE = {
    "model": {
        "observation": "normal",
        "blocks": 1,
        "min_variance": 0.01,
        "dropout": 0.25,
        "expansion": 2,
    }
}


def is_legal(value, space: dict) -> bool:
    if space["type"] == "categorical":
        return value in space["choices"]
    inside = space["low"] <= value <= space["high"] and (
        space["type"] == "float" or isinstance(value, int)
    )
    return inside and ("step" not in space or ((value - space["low"]) / space["step"]).is_integer())


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc"])
def test_with_conditions_on_two_levels_only_legal_points_are_proposed_after_every_resume(
    params, sampler
):
    """Each asks all the keys whose conditions hold, and no other; those a sampler cannot relate are drawn independently."""
    startup = {"startup_trials": 4} if sampler in ("tpe", "gp") else {}
    asked = question(
        space=CONDITIONAL,
        baseline=CONDITIONAL_BASELINE,
        sampler={"name": sampler, "seed": 1} | startup,
        pruner={"name": "none"},
    )

    def evaluate(one) -> float:
        return (
            one.values.get("model.dropout", -1.0)
            + one.values.get("model.expansion", 0)
            - one.values["model.blocks"]
        )

    for budget in (7, 15):
        found = run(search(params, asked), budget, evaluate)
    shapes = set()
    for trial in found.finished:
        expected = [
            name
            for name, space in CONDITIONAL.items()
            if all(
                trial.params.get(other) in allowed
                for other, allowed in space.get("when", {}).items()
            )
        ]
        assert list(trial.params) == expected
        assert all(is_legal(value, CONDITIONAL[name]) for name, value in trial.params.items()), (
            trial.params
        )
        shapes.add(tuple(expected))
    assert (
        found.counts()["complete"] == 15
        and len({str(trial.params) for trial in found.finished}) == 15
    )
    assert len(shapes) >= 3, "conditions held, and did not"


def test_cmaes_proposes_legal_points_of_a_space_with_a_choice_steps_and_whole_numbers(params):
    space = {
        name: {key: value for key, value in one.items() if key != "when"}
        for name, one in CONDITIONAL.items()
    }
    asked = question(
        space=space,
        baseline=CONDITIONAL_BASELINE,
        sampler={"name": "cmaes", "seed": 1, "startup_trials": 4},
        pruner={"name": "none"},
    )
    for budget in (8, 20):
        found = run(
            search(params, asked),
            budget,
            lambda one: one.values["model.dropout"] - one.values["model.blocks"],
        )
    assert all(list(trial.params) == list(space) for trial in found.finished)
    assert all(
        is_legal(value, space[name])
        for trial in found.finished
        for name, value in trial.params.items()
    )
    assert {trial.params["model.observation"] for trial in found.finished} == set(
        space["model.observation"]["choices"]
    )


@pytest.mark.parametrize(
    "pruner",
    [
        {"name": "median", "startup_trials": 2, "warmup_epochs": 1},
        {"name": "asha", "min_epochs": 1, "reduction": 2},
        {"name": "hyperband", "min_epochs": 1, "reduction": 2},
    ],
)
def test_every_pruner_stops_hopeless_trials_and_the_epochs_it_spared_are_counted(params, pruner):
    def evaluate(asked):
        for epoch in range(1, 5):
            asked.report(-float(asked.number), epoch)
        return -float(asked.number)

    found = run(search(params, question(pruner=pruner)), 14, evaluate)
    spent, spared = found.epochs()
    assert found.counts()["pruned"] > 0
    assert spent + spared == 14 * 4 and spared > 0
    assert spent == sum(len(trial.intermediate_values) for trial in found.finished)


def test_several_objectives_give_the_front_and_the_first_chooses_on_it(params):
    objective = [
        {"metric": "predictive_log_likelihood", "direction": "maximize"},
        {"metric": "leakage", "direction": "minimize"},
    ]
    asked = question(objective=objective, pruner={"name": "none"})
    found = run(
        search(params, asked),
        12,
        lambda asked: [score(asked), float(asked.values["model.latent.technical"])],
    )
    table = found.trials_table()
    assert list(table.columns[:6]) == [
        "trial",
        "state",
        "predictive_log_likelihood",
        "leakage",
        "epochs",
        "front",
    ]
    for _, row in table.iterrows():
        beaten = (
            (table["predictive_log_likelihood"] >= row["predictive_log_likelihood"])
            & (table["leakage"] <= row["leakage"])
            & (
                (table["predictive_log_likelihood"] > row["predictive_log_likelihood"])
                | (table["leakage"] < row["leakage"])
            )
        ).any()
        assert row["front"] == (not beaten)
    assert found.ranked()[0].values[0] == table["predictive_log_likelihood"].max()
    assert set(found.importance_table()["objective"]) == {"predictive_log_likelihood", "leakage"}


# interruptions


def test_a_trial_handed_back_is_run_again_with_the_same_parameters_and_counted_once(params):
    tried = []

    def evaluate(asked):
        tried.append((asked.number, asked.values))
        if asked.number == 2:
            raise StoppedError("by SIGTERM")
        return score(asked)

    with pytest.raises(StoppedError):
        run(search(params), 5, evaluate)
    assert len(search(params).finished) == 2
    found = run(search(params), 5, evaluate)
    assert len(found.finished) == 5 and found.counts() == {"complete": 5, "pruned": 0, "failed": 0}
    assert tried[3] == (3, tried[2][1]), "first the trial that was handed back"
    assert [trial.number for trial in found.finished] == [0, 1, 3, 4, 5]
    assert len(set(points(found))) == 5


def test_an_interrupted_search_proposes_what_an_uninterrupted_one_does_until_it_learns_from_other_numbers(
    params, tmp_path, monkeypatch
):
    whole = points(run(search(params), 3))
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    for budget in (1, 2, 3):
        found = run(search(params), budget)
    assert points(found) == whole


def test_a_worker_that_dies_in_the_middle_loses_nothing_and_its_run_is_closed(params, tmp_path):
    """kill -9: the child stands for a worker."""
    child = os.fork()
    if child == 0:

        def evaluate(asked):
            if asked.number == 1:
                asked.note_run("its-run")
                (tmp_path / "values").write_text(str(sorted(asked.values.items())))
                os.kill(os.getpid(), signal.SIGKILL)
            return score(asked)

        run(search(params), 4, evaluate)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    lost = []
    found = search(params)
    assert [trial.state for trial in found.claims.live] == [
        optuna.trial.TrialState.COMPLETE,
        optuna.trial.TrialState.RUNNING,
    ]
    run(found, 4, on_lost=lost.append)
    assert lost == ["its-run"]
    assert len(found.finished) == 4 and found.counts()["complete"] == 4
    assert str(sorted(found.finished[1].params.items())) == (tmp_path / "values").read_text()
    assert list((tmp_path / ".gem" / "workers").iterdir()) == []


def test_a_worker_of_another_machine_is_given_up_by_its_heartbeat(params, tmp_path, monkeypatch):
    monkeypatch.setenv("GEM_HEARTBEAT_SECONDS", "1")
    found = search(params)
    with pytest.warns(UserWarning, match="Heartbeat"):
        trial = found.claims.study.ask()
    trial.set_user_attr("worker", "of-another-machine")
    found.storage.storage.record_heartbeat(trial._trial_id)
    run(found, 2)
    assert len(found.finished) == 2 and found.finished[0].number > 0


def test_a_point_that_kills_every_worker_is_given_up(params):
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                run(search(params), 1, lambda asked: os.kill(os.getpid(), signal.SIGKILL))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = run(search(params), 1)
    assert found.counts() == {"complete": 0, "pruned": 0, "failed": 1}
    assert found.claims.reasons() == ["its worker died 4 times"]


def test_after_the_deadline_no_trial_starts(params):
    assert run(search(params), 5, deadline=0.0).finished == []
