"""Samplers propose allowed points, each once, and continue where an earlier call stopped."""

import math
from collections import Counter

import pytest
from support.searches import KL, NO_PRUNER, open_search, points, run, score, search_config

from pipeline.gem.search.samplers import suggest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["tpe", "random", "grid", "qmc"])
def test_a_finite_space_is_exhausted_without_a_repeated_point(params, name):
    sampler = {"name": name, "seed": 1} | ({"startup_trials": 2} if name == "tpe" else {})
    config = search_config(
        space={
            "model.blocks": {"type": "integer", "low": 0, "high": 2, "log": False},
            "model.linear_decoder": {"type": "categorical", "choices": [True, False]},
        },
        baseline={"model": {"blocks": 0, "linear_decoder": True}},
        sampler=sampler,
    )
    for budget in (2, 5, 40):
        search = open_search(params, config)
        assert search.budget(budget) == min(budget, 6)
        run(search, budget, lambda trial: float(trial.values["model.blocks"]))
    grid = [(blocks, linear) for blocks in (0, 1, 2) for linear in (False, True)]
    assert sorted(points(search)) == grid


@pytest.mark.parametrize(("name", "trials"), [("tpe", 20), ("gp", 16), ("cmaes", 30)])
def test_adaptive_samplers_improve_on_their_startup_trials(params, name, trials):
    sampler = {"name": name, "seed": 2, "startup_trials": 6}
    config = search_config(sampler=sampler, pruner=NO_PRUNER)
    search = run(open_search(params, config), trials, lambda trial: max(score(trial.values), -10.0))
    values = [trial.value for trial in search.finished]
    assert sum(values[-5:]) / 5 > sum(values[1:7]) / 6
    assert len(set(points(search))) == trials


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes"])
def test_startup_trials_are_those_of_a_sequence_in_any_order(params, tmp_path, monkeypatch, name):
    """As several workers finish them: none of the others is finished when a trial starts."""
    found = []
    for sampler in ({"name": name, "seed": 3, "startup_trials": 6}, {"name": "qmc", "seed": 3}):
        (tmp_path / sampler["name"]).mkdir()
        monkeypatch.chdir(tmp_path / sampler["name"])
        search = open_search(params, search_config(sampler=sampler, pruner=NO_PRUNER))
        trials = [search.queue.study.ask() for _ in range(7)]
        found.append([suggest(trial, search.config) for trial in trials])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["random", "qmc"])
def test_other_samplers_cover_the_space_across_calls(params, name):
    config = search_config(sampler={"name": name, "seed": 3}, pruner=NO_PRUNER)
    for budget in (3, 9, 17):
        search = run(open_search(params, config), budget)
    weights = [math.log(trial.params[KL] / 0.01) / math.log(400) for trial in search.finished[1:]]
    assert len(set(weights)) == 16
    quarters = Counter(int(4 * weight) for weight in weights)
    assert set(quarters) == {0, 1, 2, 3}
    if name == "qmc":
        assert max(quarters.values()) - min(quarters.values()) <= 2, "one continued sequence"


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
UNCONDITIONAL = {
    name: {key: value for key, value in space.items() if key != "when"}
    for name, space in CONDITIONAL.items()
}
BASELINE = {
    "model": {
        "observation": "normal",
        "blocks": 1,
        "min_variance": 0.01,
        "dropout": 0.25,
        "expansion": 2,
    }
}


def is_allowed(value, space: dict) -> bool:
    if space["type"] == "categorical":
        return value in space["choices"]
    if space["type"] == "integer" and not isinstance(value, int):
        return False
    on_grid = "step" not in space or ((value - space["low"]) / space["step"]).is_integer()
    return space["low"] <= value <= space["high"] and on_grid


@pytest.mark.parametrize(
    ("name", "space", "trials"),
    [
        ("tpe", CONDITIONAL, 15),
        ("gp", CONDITIONAL, 15),
        ("random", CONDITIONAL, 15),
        ("qmc", CONDITIONAL, 15),
        ("cmaes", UNCONDITIONAL, 20),
    ],
)
def test_samplers_propose_exactly_the_active_keys_with_allowed_values(params, name, space, trials):
    startup = {} if name in ("random", "qmc") else {"startup_trials": 4}
    config = search_config(
        space=space,
        baseline=BASELINE,
        sampler={"name": name, "seed": 1} | startup,
        pruner=NO_PRUNER,
    )

    def evaluate(trial) -> float:
        values = trial.values
        dropout, expansion = values.get("model.dropout", -1.0), values.get("model.expansion", 0)
        return dropout + expansion - values["model.blocks"]

    for budget in (7, trials):
        search = run(open_search(params, config), budget, evaluate)
    for trial in search.finished:
        active = [
            key
            for key, definition in space.items()
            if all(
                trial.params.get(other) in allowed
                for other, allowed in definition.get("when", {}).items()
            )
        ]
        assert list(trial.params) == active
        assert all(is_allowed(value, space[key]) for key, value in trial.params.items())
    assert search.counts()["complete"] == len(set(points(search))) == trials
    if space is CONDITIONAL:
        assert len({tuple(trial.params) for trial in search.finished}) >= 3, "conditions vary"


def test_an_inactive_key_has_the_value_of_the_baseline(params):
    space = {key: CONDITIONAL[key] for key in ("model.blocks", "model.dropout")}
    config = search_config(space=space, baseline={"model": {"blocks": 0, "dropout": 0.25}})
    search = run(
        open_search(params, config), 8, lambda trial: -trial.values.get("model.dropout", 1.0)
    )
    assert search.values_of(search.finished[0]) == {"model.blocks": 0, "model.dropout": 0.25}
    missing = search.trials_table()["model.dropout"].isna()
    assert missing.tolist() == [trial.params["model.blocks"] < 2 for trial in search.finished]
