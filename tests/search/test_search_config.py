"""A study file is checked against params.yaml, and the params tool writes valid values and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.settings import ROOT

from pipeline import configure as tool
from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import Params, flatten, read_params
from pipeline.gem.common.errors import GemError, InputError
from pipeline.gem.search.search_config import read_search_config

TEXT = (ROOT / "experiments" / "searches" / "latent_kl.yaml").read_text()
LATENT, KL = "model.latent.technical", "train.kl_weight.technical"


@pytest.fixture(scope="module")
def current() -> Params:
    return read_params(ROOT / "params.yaml")


@pytest.fixture
def problems(tmp_path, current):
    """The problem lines of latent_kl.yaml with the given replacements (patterns) of text."""

    def of(*replacements: tuple[str, str]) -> list[str]:
        text = TEXT
        for old, new in replacements:
            text, number = re.subn(old, new, text, count=1)
            assert number, f"{old!r} is not in the study"
        (tmp_path / "asked.yaml").write_text(text)
        with pytest.raises(InputError) as caught:
            read_search_config("asked", current, tmp_path)
        assert all(
            problem.startswith(f"{tmp_path / 'asked.yaml'}:") and "\n" not in problem
            for problem in caught.value.problems
        )
        return list(caught.value.problems)

    return of


def one(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


# studies


@pytest.mark.parametrize(
    "study", [path.stem for path in sorted((ROOT / "experiments" / "searches").glob("*.yaml"))]
)
def test_every_committed_study_is_valid(study, current):
    question = read_search_config(study, current, ROOT / "experiments" / "searches")
    assert set(question.baseline_values) == set(question.space)
    assert (
        flatten(current.override(question.baseline_values).model_dump(mode="json")).keys()
        == flatten(current.model_dump(mode="json")).keys()
    )


def test_a_mistyped_study_name_is_refused_with_the_one_that_was_meant(current):
    with pytest.raises(
        InputError, match=r"laten_kl\.yaml: no such study; did you mean latent_kl\?"
    ):
        read_search_config("laten_kl", current, ROOT / "experiments" / "searches")


@pytest.mark.parametrize("name", ["../params", "/etc/passwd", "", "latent_kl.yaml"])
def test_a_study_name_that_is_a_path_is_refused(current, name):
    with pytest.raises(InputError, match="study"):
        read_search_config(name, current, ROOT / "experiments" / "searches")


def test_an_unknown_key_of_the_space_is_refused_with_its_line_and_the_key_that_was_meant(problems):
    found = problems((r"  model\.latent\.technical:  ", "  model.latent.tecnical:  "))
    assert any(
        re.search(
            r"asked\.yaml:5: model\.latent\.tecnical is no key of params\.yaml; did you mean model\.latent\.technical\?",
            problem,
        )
        for problem in found
    )


@pytest.mark.parametrize("key", ["splits.study", "tune.trials", "evaluate.seed", "data.source"])
def test_only_keys_of_model_and_train_can_be_searched(problems, key):
    found = problems((r"  model\.latent\.technical:  ", f"  {key}:  "))
    assert any(
        f"{key} is no key of params.yaml" in problem or f"{key} cannot be searched" in problem
        for problem in found
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            r"technical: 64,",
            "technical: 129,",
            f"space.{LATENT}: the baseline 129 lies outside the space",
        ),
        (
            r"technical: 64,",
            "technical: 3,",
            f"space.{LATENT}: the baseline 3 lies outside the space",
        ),
        (
            r"technical: 64, ",
            "",
            f"{LATENT} must stand in both space and baseline; add it to baseline",
        ),
        (
            r"kl_weight: \{",
            "free_bits: 0.5\n    kl_weight: {",
            "train.free_bits must stand in both space and baseline; add it to space",
        ),
        (
            r"low: 8, high: 128",
            "low: 65, high: 64",
            f"space.{LATENT}: low (65) must be below high (64)",
        ),
        (
            r"low: 8, high: 128",
            "low: 64, high: 64",
            f"space.{LATENT}: low (64) must be below high (64)",
        ),
        (
            r"low: 0\.01, high",
            "low: 0.0, high",
            f"space.{KL}: low is 0.0; a log scale needs a positive one",
        ),
        (
            r"low: 0\.01, high: 4\.0, log: true",
            "low: -1.0, high: 4.0, log: false",
            f"space.{KL}: -1.0 is no value for params.yaml",
        ),
        (
            r"low: 8, high: 128, log: true",
            "low: 0, high: 64, log: false",
            f"space.{LATENT}: 0 is no value for params.yaml",
        ),
        (
            r"low: 8, high: 128",
            "low: 4, high: 5000",
            f"space.{LATENT}: 5000 is no value for params.yaml",
        ),
        (
            r"type: integer, low: 8, high: 128, log: true",
            "type: categorical, choices: [64, x]",
            f"space.{LATENT}: 'x' is no value for params.yaml",
        ),
        (
            r"type: integer, low: 8, high: 128, log: true",
            "type: categorical, choices: [8, 32]",
            f"space.{LATENT}: the baseline 64 lies outside the space",
        ),
        (r"low: 8, high: 128", "low: 4.5, high: 64", f"{LATENT}.low is 4.5"),
        (r"low: 8, high: 128", "low: 4, hihg: 64, high: 64", "hihg is unknown; did you mean high?"),
        (r"low: 8, high: 128", "high: 64", "low is missing"),
        (r"type: integer", "type: int", LATENT),
        (r"log: true", 'log: "true"', f"{LATENT}.log is 'true'"),
        (r"high: 4\.0", "high: .inf", f"{KL}.high"),
        (
            r"technical: 1\.0",
            "technical: true",
            f"space.{KL}: the baseline True lies outside the space",
        ),
        (r"metric: predictive_log_likelihood", "metric: loss", "objective.metric is 'loss'"),
        (r"direction: maximize", "direction: up", "objective.direction is 'up'"),
        (r"epochs: 18 ", "epochs: 0 ", "epochs is 0"),
        (
            r"name: tpe",
            "name: annealing",
            "sampler.name is 'annealing'; expected 'random', 'grid', 'qmc', 'tpe', 'gp', 'cmaes'",
        ),
        (r"name: tpe", "name: random", "sampler.startup_trials is unknown; known: name, seed"),
        (r"seed: 5", "sed: 5, seed: 5", "sampler.sed is unknown; did you mean seed?"),
        (r"question: ", "qestion: x\nquestion: ", "qestion is unknown; did you mean question?"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_in_one_line(problems, old, new, expected):
    assert expected in one(problems((old, new)))


TWO = "objective:\n  - {metric: predictive_log_likelihood, direction: maximize}\n  - {metric: leakage, direction: minimize}\n"
OBJECTIVE, NO_PRUNER = (
    (r"objective:(.|\n)*?direction: maximize\n", TWO),
    (r"pruner: .*", "pruner: {name: none}"),
)
STEPS = (
    r"type: integer, low: 8, high: 128, log: true",
    "type: integer, low: 8, high: 128, log: false, step: 8",
)
CHOICES = [
    (rf"{name}:  +\{{.*\}}\n", f"{name}: {{type: categorical, choices: [{baseline}, {other}]}}\n")
    for name, baseline, other in (
        ("model.latent.technical", 64, 8),
        ("model.latent.biological", 32, 8),
        ("model.latent.perturbation", 96, 8),
        ("train.kl_weight.technical", 1.0, 0.1),
        ("train.kl_weight.biological", 1.0, 0.1),
        ("train.kl_weight.perturbation", 1.0, 0.1),
    )
]


@pytest.mark.parametrize(
    ("replacements", "expected"),
    [
        (
            [OBJECTIVE],
            "pruner: asha compares one number an epoch, and there are 2 objectives; write {name: none}",
        ),
        (
            [
                (r"metric: predictive_log_likelihood", "metric: leakage"),
                (r"direction: maximize", "direction: minimize"),
            ],
            "pruner: leakage is known at the end of a trial only",
        ),
        (
            [OBJECTIVE, NO_PRUNER, (r"name: tpe", "name: cmaes")],
            "sampler: cmaes seeks one objective, and there are 2",
        ),
        (
            [(r"name: tpe", "name: cmaes"), *CHOICES[:5]],
            "sampler: cmaes needs two numeric keys, and the space has 1",
        ),
        (
            [
                (r"name: tpe", "name: cmaes"),
                (r"high: 4\.0, log: true", f"high: 4.0, log: true, when: {{{LATENT}: [64]}}"),
            ],
            f"sampler: cmaes cannot leave a key out, and {KL} has a condition",
        ),
        (
            [(r"sampler: .*", "sampler: {name: grid, seed: 1}")],
            f"sampler: grid needs steps: {KL}, train.kl_weight.biological, train.kl_weight.perturbation has none",
        ),
        (
            [(r"sampler: .*", "sampler: {name: grid, seed: 1}"), *CHOICES[3:]],
            "sampler: the grid has more than 100,000 points",
        ),
        (
            [(r"pruner: .*", "pruner: {name: hyperband, min_epochs: 18, reduction: 3}")],
            "pruner: min_epochs (18) must be below epochs (18)",
        ),
        (
            [(r"seeds: \[2, 3, 4\]", "seeds: [2, 1]")],
            "confirm: seeds: 1 is a seed of the trials, on which the best were chosen",
        ),
        ([(r"\nseeds: \[1\]", "\nseeds: [1, 1]")], "seeds: a seed stands twice"),
        (
            [
                (
                    r"objective:(.|\n)*?direction: maximize\n",
                    TWO.replace(
                        "leakage, direction: minimize",
                        "predictive_log_likelihood, direction: maximize",
                    ),
                ),
                NO_PRUNER,
            ],
            "objective: a metric stands twice",
        ),
        (
            [
                (r"objective:(.|\n)*?direction: maximize\n", TWO.replace("leakage", "leakag")),
                NO_PRUNER,
            ],
            "objective.1.metric is 'leakag'",
        ),
        (
            [
                (
                    r"high: 4\.0, log: true",
                    "high: 4.0, log: true, when: {model.latent.tecnical: [64]}",
                )
            ],
            f"space.{KL}: when: model.latent.tecnical does not stand before it in the space; did you mean model.latent.technical?",
        ),
        (
            [(r"high: 4\.0, log: true", f"high: 4.0, log: true, when: {{{LATENT}: [999]}}")],
            f"space.{KL}: when: {LATENT} is never 999; remove it",
        ),
        ([(r"log: true\}", "log: true, step: 8}")], f"space.{LATENT}: a log scale has no steps"),
        (
            [(STEPS[0], STEPS[1].replace("step: 8", "step: 7"))],
            f"space.{LATENT}: from 8 in steps of 7 one does not come to 128",
        ),
        (
            [(STEPS[0], STEPS[1].replace("step: 8", "step: 24"))],
            f"space.{LATENT}: the baseline 64 lies outside the space",
        ),
    ],
)
def test_what_optuna_cannot_do_or_makes_no_sense_is_refused(problems, replacements, expected):
    assert expected in one(problems(*replacements))


def test_the_points_of_a_space_are_those_that_its_conditions_leave(current):
    question = read_search_config("capacity", current, ROOT / "experiments" / "searches")
    assert question.points() is None, "a learning rate has no end of values"
    choices = {"type": "categorical", "choices": [1, 2]}
    space = {"a": choices, "b": choices | {"when": {"a": [2]}}, "c": choices | {"when": {"b": [1]}}}
    asked = type(question).model_validate(question.model_dump() | {"space": space})
    assert sorted(map(str, asked.points())) == [
        "{'a': 1}",
        "{'a': 2, 'b': 1, 'c': 1}",
        "{'a': 2, 'b': 1, 'c': 2}",
        "{'a': 2, 'b': 2}",
    ]


def test_a_range_of_fractions_for_an_integer_is_refused_at_both_ends(problems):
    found = problems((r"type: integer, low: 8, high: 128", "type: float, low: 4.5, high: 64.0"))
    assert [
        f"space.{LATENT}: {end} is no value for params.yaml" in problem
        for end, problem in zip((4.5, 64.0), found, strict=True)
    ] == [True, True]


def test_a_key_of_the_baseline_is_checked_as_a_value_of_params_yaml(problems):
    """16.0 lies inside the range and is no integer."""
    assert LATENT in one(problems((r"technical: 64,", "technical: 16.0,")))


def test_a_metric_is_sought_in_its_own_direction(problems):
    """Minimising a likelihood, or maximising an error, would promote the worst model."""
    assert "direction" in one(problems((r"direction: maximize", "direction: minimize")))


@pytest.mark.parametrize(
    ("old", "new"), [(r"\Z", "\nspace: {}\n"), (r"question:", "question: a\nquestion:")]
)
def test_a_key_that_stands_twice_is_refused(problems, old, new):
    assert "stands twice" in one(problems((old, new)))


def test_an_empty_space_is_no_question(problems):
    text = r"(?s)space:.*\nbaseline:.*\nobjective:"
    assert "space" in one(problems((text, "space: {}\nbaseline: {}\nobjective:")))


def test_all_problems_of_a_study_are_said_at_once(problems):
    found = problems(
        (r"low: 8, high: 128", "low: 70, high: 64"),
        (r"low: 0\.01", "low: -0.01"),
        (r"biological: \d+, p", "biological: 900, p"),
    )
    assert len(found) == 3 and all(
        name in "\n".join(found) for name in (LATENT, KL, "model.latent.biological")
    )


# the tool


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A working folder with the committed params.yaml and study."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "experiments" / "searches").mkdir(parents=True)
    (tmp_path / "experiments" / "searches" / "latent_kl.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(repository, monkeypatch, capsys):
    """Runs `pipeline.configure` with arguments; its standard output."""

    def with_arguments(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["params", *arguments])
        tool.main()
        return capsys.readouterr().out

    return with_arguments


def test_a_valid_repository_is_checked_in_silence(call):
    assert call() == ""


def test_set_writes_the_value_keeps_the_comment_and_shows_the_difference(call, repository):
    before = (repository / "params.yaml").read_text()
    shown = call("--set", "tune.trials=40", "--set", "train.learning_rate=1e-3")
    after = (repository / "params.yaml").read_text()
    assert after == re.sub(
        r"learning_rate: \S+", "learning_rate: 0.001", re.sub(r"trials: \d+", "trials: 40", before)
    )
    assert [
        line for line in shown.splitlines() if line[0] in "+-" and line[1:4] not in ("++ ", "-- ")
    ] == [
        line
        for old, new in zip(before.splitlines(), after.splitlines(), strict=True)
        if old != new
        for line in (f"-{old}", f"+{new}")
    ]
    assert read_params("params.yaml").tune.trials == 40


def test_set_to_the_present_value_says_so_and_writes_nothing(call, repository):
    stamp = (repository / "params.yaml").stat().st_mtime_ns
    assert call("--set", "tune.trials=4") == "params.yaml says so already\n"
    assert (repository / "params.yaml").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("tune.trials=0", "tune.trials"),
        ("tune.trials=many", "tune.trials"),
        ("tune.trials=4.5", "tune.trials"),
        ("tune.trials=", "tune.trials"),
        ("tune.trial=4", "did you mean tune.trials?"),
        ("tune=4", "tune is unknown"),
        ("tune.trials.more=4", "did you mean tune.trials?"),
        ("tune.trials", "expected KEY=VALUE"),
        ("=4", "unknown"),
        ("train.learning_rate=.inf", "train.learning_rate"),
        ("model.latent.technical=[4]", "model.latent.technical"),
        ("model.dropout={a: 1}", "model.dropout"),
        (
            "synthesize.perturbations_per_study=81",
            "perturbations_per_study (81) is more than perturbations (80)",
        ),
        ("splits.seed=\x07", "splits.seed"),
    ],
)
def test_set_refuses_what_params_yaml_may_not_hold_and_leaves_the_file(
    call, repository, argument, expected
):
    before = (repository / "params.yaml").read_bytes()
    with pytest.raises(GemError, match=re.escape(expected)) as caught:
        call("--set", argument)
    assert all("\n" not in problem for problem in caught.value.problems)
    assert (repository / "params.yaml").read_bytes() == before


def test_set_refuses_all_when_one_of_several_is_refused(call, repository):
    before = (repository / "params.yaml").read_bytes()
    with pytest.raises(InputError):
        call("--set", "tune.trials=40", "--set", "train.epochs=0")
    assert (repository / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("data.control.value=not treated", "data.control.value", "not treated"),
        ("data.control.value=DMSO, 0.1%", "data.control.value", "DMSO, 0.1%"),
        ("data.layer=raw", "data.layer", "raw"),
        ("data.layer='1e3'", "data.layer", "1e3"),
        ("data.date_column=null", "data.date_column", None),
        ("model.additive_technical=false", "model.additive_technical", False),
    ],
)
def test_what_set_accepts_reads_back_as_given(call, repository, argument, name, value):
    call("--set", argument)
    assert read_params("params.yaml").flat()[name] == value


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("train.seeds=[1, 2]", "train.seeds", [1, 2]),
        ("data.context_columns=[]", "data.context_columns", []),
    ],
)
def test_a_list_is_written_as_given_or_refused_by_name_with_the_file_untouched(
    call, repository, argument, name, value
):
    before = (repository / "params.yaml").read_bytes()
    try:
        call("--set", argument)
    except InputError as error:
        assert name in str(error) and (repository / "params.yaml").read_bytes() == before
    else:
        assert read_params("params.yaml").flat()[name] == value


def test_a_budget_is_written_where_the_study_has_it(call, repository):
    (repository / "experiments" / "searches" / "capacity.yaml").write_bytes(
        (ROOT / "experiments" / "searches" / "capacity.yaml").read_bytes()
    )
    study, params = (
        (repository / "experiments" / "searches" / "capacity.yaml").read_text(),
        (repository / "params.yaml").read_text(),
    )
    shown = call("--budget", "capacity=80")
    assert "-trials: 40" in shown and "+trials: 80" in shown
    assert (repository / "experiments" / "searches" / "capacity.yaml").read_text() == study.replace(
        "trials: 40", "trials: 80"
    )
    assert (repository / "params.yaml").read_text() == params
    assert "+  trials: 7" in call("--budget", "latent_kl=7")
    assert read_params("params.yaml").tune.trials == 7
    for wrong in ("capacity=0", "capacity=many", "capacity", "latent_kl=0"):
        with pytest.raises(InputError):
            call("--budget", wrong)


def test_promote_changes_exactly_the_searched_keys(call, repository):
    best = {
        "model": {"latent": {"technical": 5, "biological": 33, "perturbation": 64}},
        "train": {"kl_weight": {"technical": 1e-2, "biological": 0.5, "perturbation": 4.0}},
    }
    (repository / "experiments" / "latent_kl").mkdir()
    (repository / "experiments" / "latent_kl" / "best.yaml").write_text(yaml_file.dump(best))
    before, text = read_params("params.yaml").flat(), (repository / "params.yaml").read_text()
    shown = call("--promote", "latent_kl")
    assert read_params("params.yaml").flat() == before | flatten(best)
    assert [
        line.partition("#")[2] for line in (repository / "params.yaml").read_text().splitlines()
    ] == [line.partition("#")[2] for line in text.splitlines()]
    assert sum(line.startswith("+ ") for line in shown.splitlines()) == 6


def test_promoting_a_study_that_was_not_run_names_the_file_and_the_command(call):
    with pytest.raises(
        InputError,
        match=r"experiments/latent_kl/best\.yaml: absent; `make tune SEARCH=latent_kl` writes it",
    ):
        call("--promote", "latent_kl")


def test_promoting_a_key_that_the_study_did_not_search_is_refused(call, repository):
    (repository / "experiments" / "latent_kl").mkdir()
    (repository / "experiments" / "latent_kl" / "best.yaml").write_text("train: {epochs: 1}\n")
    before = (repository / "params.yaml").read_bytes()
    with pytest.raises(InputError, match=r"train\.epochs"):
        call("--promote", "latent_kl")
    assert (repository / "params.yaml").read_bytes() == before


def test_a_broken_study_and_an_absent_source_are_said_together(call, repository):
    (repository / "experiments" / "searches" / "other.yaml").write_text(
        TEXT.replace("low: 8,", "low: 0,")
    )
    (repository / "params.yaml").write_text(
        (repository / "params.yaml")
        .read_text()
        .replace("source: data/synthetic ", "source: elsewhere.h5ad ")
    )
    with pytest.raises(InputError) as caught:
        call()
    text = "\n".join(caught.value.problems)
    assert (
        "experiments/searches/other.yaml:" in text
        and "data.source: elsewhere.h5ad does not exist" in text
        and len(caught.value.problems) == 4
    )


def test_bad_input_ends_with_2_and_one_line(repository):
    command = [sys.executable, "-m", "pipeline.configure", "--set", "tune.trials=x"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: params.yaml:")
        and done.stderr.count("\n") == 1
        and not done.stdout
    )
