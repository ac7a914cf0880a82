"""The definition of a search is validated against params.yaml, with file, line and correction."""

import re

import pytest
from support.searches import KL, LATENT, search_config
from support.settings import ROOT

from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.errors import InputError
from pipeline.gem.search.search_config import read_search_config

SEARCHES = ROOT / "experiments" / "searches"
DEFINITION = """\
description: Which?
space:
  model.latent.technical: {type: integer, low: 8, high: 128, log: true}
  train.kl_weight.technical: {type: float, low: 0.01, high: 4.0, log: true}
baseline: {model: {latent: {technical: 64}}, train: {kl_weight: {technical: 1.0}}}
objective: {metric: predictive_log_likelihood, direction: maximize}
sampler: {name: tpe, seed: 5, startup_trials: 10}
pruner: {name: asha, min_epochs: 2, reduction: 2}
epochs: 18
seeds: [1]
confirm: {top: 2, seeds: [2, 3, 4]}
"""


@pytest.fixture(scope="module")
def current() -> Params:
    return read_params(ROOT / "params.yaml")


@pytest.fixture
def problems(tmp_path, current):
    """A function: the problem lines of DEFINITION after replacements of text."""

    def read(*replacements: tuple[str, str]) -> list[str]:
        text = DEFINITION
        for old, new in replacements:
            assert text.count(old), f"{old!r} is not in the definition"
            text = text.replace(old, new, 1)
        path = tmp_path / "changed.yaml"
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            read_search_config("changed", current, tmp_path)
        for problem in caught.value.problems:
            assert problem.startswith(f"{path}:") and "\n" not in problem
        return list(caught.value.problems)

    return read


@pytest.mark.parametrize("path", sorted(SEARCHES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_search_is_valid(path, current):
    config = read_search_config(path.stem, current, SEARCHES)
    assert set(config.baseline_values) == set(config.space)


def test_an_unknown_search_is_refused_with_the_closest_name(current):
    with pytest.raises(InputError, match=r"laten_kl\.yaml: no such search; did you mean latent_kl"):
        read_search_config("laten_kl", current, SEARCHES)


@pytest.mark.parametrize("name", ["../params", "/etc/passwd", "", "latent_kl.yaml"])
def test_a_path_is_not_the_name_of_a_search(current, name):
    with pytest.raises(InputError, match="is not a name"):
        read_search_config(name, current, SEARCHES)


def test_an_unknown_key_is_refused_with_its_line_and_the_closest_key(problems):
    problem = problems((LATENT, "model.latent.tecnical"))[0]
    expected = f"yaml:3: model.latent.tecnical is not a key of params.yaml; did you mean {LATENT}?"
    assert problem.endswith(expected)


@pytest.mark.parametrize("key", ["tune.trials", "evaluate.seed", "train.epochs", "train.device"])
def test_epochs_and_keys_outside_model_and_train_cannot_be_searched(problems, key):
    assert f"{key} cannot be searched" in problems((LATENT, key))[0]


INTEGER = "type: integer, low: 8, high: 128, log: true"
FLOAT = "type: float, low: 0.01, high: 4.0, log: true"
STEPS = "type: integer, low: 8, high: 128, log: false, step: "
CHOICES = "type: categorical, choices: "


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # ranges
        ("low: 8", "low: 129", f"space.{LATENT}: low (129) must be below high (128)"),
        ("low: 8, high: 128", "low: 64, high: 64", "low (64) must be below high (64)"),
        ("low: 0.01", "low: 0.0", f"space.{KL}: low is 0.0; a log scale needs a positive value"),
        ("low: 8", "low: 4.5", f"{LATENT}.low is 4.5"),
        ("low: 8", "lwo: 8, low: 8", "lwo is unknown; did you mean low?"),
        ("low: 8, ", "", "low is missing"),
        ("high: 4.0", "high: .inf", f"{KL}.high"),
        ("log: true", 'log: "true"', f"{LATENT}.log is 'true'"),
        ("log: true}", "log: true, step: 8}", "a log scale has no steps"),
        (INTEGER, f"{STEPS}7", "steps of 7 from 8 do not reach 128"),
        ("type: integer", "type: int", LATENT),
        # values that params.yaml does not allow
        (FLOAT, "type: float, low: -1.0, high: 4.0, log: false", "-1.0 is not allowed"),
        ("high: 128", "high: 5000", f"space.{LATENT}: 5000 is not allowed by params.yaml"),
        (INTEGER, CHOICES + "[64, x]", f"space.{LATENT}: 'x' is not allowed by params.yaml"),
        # the baseline
        ("technical: 64", "technical: 129", f"{LATENT}: the baseline 129 is outside the space"),
        ("technical: 64", "technical: 3", "the baseline 3 is outside the space"),
        ("technical: 64", "technical: 16.0", "the baseline 16.0 is not allowed by params.yaml"),
        ("technical: 1.0", "technical: true", "the baseline True is outside the space"),
        (INTEGER, CHOICES + "[8, 32]", "the baseline 64 is outside the space"),
        (INTEGER, f"{STEPS}24", "the baseline 64 is outside the space"),
        ("model: {latent: {technical: 64}}, ", "", f"{LATENT} must be in both space and baseline"),
        ("train: {", "train: {free_bits: 0.5, ", "free_bits must be in both space and baseline"),
        # objective, sampler, pruner, seeds
        ("predictive_log_likelihood", "loss", "objective.metric is 'loss'"),
        ("maximize", "up", "objective.direction is 'up'"),
        ("maximize", "minimize", "which would promote the worst model"),
        ("name: tpe", "name: annealing", "sampler.name is 'annealing'; expected 'random', 'grid'"),
        ("name: tpe", "name: random", "sampler.startup_trials is unknown; known: name, seed"),
        ("seed: 5", "sed: 5, seed: 5", "sampler.sed is unknown; did you mean seed?"),
        ("min_epochs: 2", "min_epochs: 18", "pruner: min_epochs (18) must be below epochs (18)"),
        ("epochs: 18", "epochs: 0", "epochs is 0"),
        ("[2, 3, 4]", "[2, 1]", "confirm: 1 is a seed of the trials"),
        ("[2, 3, 4]", "[2, 2]", "confirm.seeds: 2 appears twice"),
        ("seeds: [1]", "seeds: [1, 1]", "seeds: 1 appears twice"),
        # conditions
        (FLOAT, FLOAT + ", when: {a: [64]}", f"{KL}: when: a does not come before it in"),
        (FLOAT, FLOAT + f", when: {{{LATENT}: [999]}}", f"when: {LATENT} is never 999; remove it"),
        # keys
        ("desc", "desciption: x\ndesc", "desciption is unknown; did you mean description?"),
        ("desc", "description: x\ndesc", "duplicate key description"),
    ],
)
def test_an_invalid_definition_is_refused_in_one_line(problems, old, new, expected):
    (problem,) = problems((old, new))
    assert expected in problem


OBJECTIVE = "{metric: predictive_log_likelihood, direction: maximize}"
TWO_OBJECTIVES = (OBJECTIVE, f"[{OBJECTIVE}, {{metric: latent_leakage, direction: minimize}}]")
LEAKAGE = (OBJECTIVE, "{metric: latent_leakage, direction: minimize}")
NO_PRUNER = ("pruner: {name: asha, min_epochs: 2, reduction: 2}", "pruner: {name: none}")
GRID = ("sampler: {name: tpe, seed: 5, startup_trials: 10}", "sampler: {name: grid, seed: 1}")
CMAES = ("name: tpe", "name: cmaes")


@pytest.mark.parametrize(
    ("replacements", "expected"),
    [
        ([TWO_OBJECTIVES], "pruner: asha needs a single objective, but there are 2"),
        ([LEAKAGE], "pruner: latent_leakage is computed only at the end of a trial"),
        ([TWO_OBJECTIVES, NO_PRUNER, CMAES], "sampler: cmaes needs a single objective"),
        (
            [CMAES, (FLOAT, CHOICES + "[1.0, 2.0]")],
            "cmaes needs two numeric keys, but the space has 1",
        ),
        (
            [CMAES, (FLOAT, FLOAT + f", when: {{{LATENT}: [64]}}")],
            "cmaes does not allow a condition",
        ),
        ([GRID], f"sampler: grid needs steps, but {KL} has none"),
        (
            [GRID, (FLOAT, "type: float, low: 0.0, high: 2.0, step: 0.001, log: false")],
            "sampler: the grid has more than 100,000 points",
        ),
        (
            [(OBJECTIVE, f"[{OBJECTIVE}, {OBJECTIVE}]"), NO_PRUNER],
            "objective: predictive_log_likelihood appears twice",
        ),
        (
            [TWO_OBJECTIVES, ("latent_leakage", "latent_leakag"), NO_PRUNER],
            "objective.1.metric is 'latent_leakag'",
        ),
    ],
)
def test_combinations_that_optuna_does_not_support_are_refused(problems, replacements, expected):
    (problem,) = problems(*replacements)
    assert expected in problem


def test_both_ends_of_a_range_are_checked(problems):
    low, high = problems((INTEGER, "type: float, low: 8.5, high: 65.5, log: true"))
    assert "8.5 is not allowed by params.yaml" in low
    assert "65.5 is not allowed by params.yaml" in high


def test_an_empty_space_is_refused(problems):
    start, end = DEFINITION.index("  model"), DEFINITION.index("objective:")
    lines = problems((DEFINITION[start:end], ""), ("space:\n", "space: {}\nbaseline: {}\n"))
    assert re.search(r"yaml:2: space is \{\}", lines[0]) and len(lines) == 1


def test_all_problems_are_reported_at_once(problems):
    lines = problems(
        ("low: 8", "low: 700"), ("low: 0.01", "low: -0.01"), ("seeds: [1]", "seeds: [2]")
    )
    assert len(lines) == 3


def test_the_points_of_a_space_are_those_that_its_conditions_allow():
    choices = {"type": "categorical", "choices": [1, 2]}
    space = {"a": choices, "b": choices | {"when": {"a": [2]}}, "c": choices | {"when": {"b": [1]}}}
    points = search_config(space=space).points()
    assert sorted(map(str, points)) == [
        "{'a': 1}",
        "{'a': 2, 'b': 1, 'c': 1}",
        "{'a': 2, 'b': 1, 'c': 2}",
        "{'a': 2, 'b': 2}",
    ]
    assert search_config().points() is None, "a continuous range is infinite"
