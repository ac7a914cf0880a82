"""params.yaml: every problem at once with its line, no type conversion, no mutation."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from copy import deepcopy

import pytest
from pydantic import ValidationError
from support.settings import ROOT

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import (
    GROUPS,
    Covariates,
    Params,
    Splits,
    read_params,
)
from pipeline.gem.common.errors import GemError, InputError
from pipeline.gem.common.yaml_file import flatten, set_dotted

TEXT = (ROOT / "params.yaml").read_text()


def line_of(text: str, start: str) -> int:
    lines = (line.strip() for line in text.splitlines())
    return next(number for number, line in enumerate(lines, start=1) if line.startswith(start))


@pytest.fixture
def problems(tmp_path):
    """The messages for params.yaml after replacements of patterns in its text."""

    def messages(*replacements: tuple[str, str]) -> list[str]:
        text = TEXT
        for pattern, new in replacements:
            text, number = re.subn(pattern, new, text)
            assert number == 1, f"{pattern!r} occurs {number} times in params.yaml"
        path = tmp_path / "params.yaml"
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            read_params(path)
        assert all("\n" not in problem for problem in caught.value.problems)
        return list(caught.value.problems)

    return messages


@pytest.fixture(scope="module")
def valid() -> Params:
    return read_params(ROOT / "params.yaml")


def test_the_committed_parameters_are_valid(valid):
    assert isinstance(valid.train.learning_rate, float)  # 2e-3: text to a YAML 1.1 reader
    names = [name for group in GROUPS for name in getattr(valid.data.covariates, group)]
    assert list(valid.data.covariates.all()) == names


def test_all_problems_are_reported_at_once_with_file_line_key_value_and_expectation(
    problems, tmp_path
):
    messages = problems(
        (r"  samples: \d+ ", "  samples: 10 "),
        (r"preset: \w+ ", "preset: bulky "),
        (r"  test_random: ", "  test_randm: "),
        (r"  dropout: \S+ ", "  dropout: 1.0 "),
        (r"  epochs: \d+ ", '  epochs: "30" '),
        ("linear_decoder: true", "linear_decoder: on"),
    )
    text = (tmp_path / "params.yaml").read_text()
    expected = {
        "samples: 10": "synthesize.samples is 10; expected greater than or equal to 50",
        "preset:": "synthesize.preset is 'bulky'; expected 'bulk' or 'single_cell'",
        "splits:": "splits.test_random is missing; add it",
        "test_randm": "splits.test_randm is unknown; did you mean test_random?",
        "dropout:": "model.dropout is 1.0; expected less than 1",
        "epochs:": "train.epochs is '30'; expected an integer",
        "linear_decoder:": "model.linear_decoder is 'on'; expected a boolean",
    }
    path = tmp_path / "params.yaml"
    assert sorted(messages) == sorted(
        f"{path}:{line_of(text, start)}: {message}" for start, message in expected.items()
    )


def test_every_key_is_required_and_only_the_missing_one_is_reported():
    values = yaml_file.read(ROOT / "params.yaml").values
    for name in flatten(values):
        if name.startswith("data.covariates."):  # any names: the schema requires none of them
            continue
        broken = deepcopy(values)
        *parents, last = name.split(".")
        section = broken
        for parent in parents:
            section = section[parent]
        del section[last]
        with pytest.raises(ValidationError) as caught:
            Params.model_validate(broken)
        (problem,) = caught.value.errors()
        assert (problem["type"], ".".join(problem["loc"])) == ("missing", name)


def test_an_empty_file_lacks_every_section(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("")
    with pytest.raises(InputError) as caught:
        read_params(path)
    assert list(caught.value.problems) == [
        f"{path}:1: {section} is missing; add it" for section in Params.model_fields
    ]


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "train.epochs": [True, "8", 8.0, 8.5, None, [8]],
        "train.learning_rate": [True, "0.1", math.inf, math.nan],
        "train.kl_weight.technical": [math.inf],
        "train.gradient_clip": [math.inf],
        "train.seeds": [[], [True], ["1"], [1.0], [-1], 1, [2**32]],
        "train.device": ["gpu"],
        "model.linear_decoder": [1, "true"],
        "model.latent.technical": [0, 4097],
        "data.source": [3, None],
        "data.context_columns": ["tissue", [1]],
        "data.control": ["control"],
        "data.control.value": [0],
        "data.covariates.technical.study.kind": ["category"],
        "data.covariates.biological.age_years.scale": ["ln"],
        "splits.study": [0.51, -0.01],
        "evaluate.search": ["../elsewhere", ""],
        "tracking.experiment": [""],
    }.items(),
)
def test_no_type_is_converted_and_every_range_is_checked(valid, name, values):
    for value in values:
        with pytest.raises(ValidationError):
            valid.override({name: value})


@pytest.mark.parametrize(
    "name", ["train.learning_rate", "model.min_variance", "train.kl_weight.biological"]
)
def test_a_whole_number_is_valid_for_a_float(valid, name):
    assert valid.override({name: 1}).flat()[name] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda params: setattr(params, "train", None),
        lambda params: setattr(params.train, "epochs", 3),
        lambda params: setattr(params.train.kl_weight, "technical", 3.0),
    ],
)
def test_parameters_are_immutable(valid, change):
    with pytest.raises(ValidationError, match="frozen"):
        change(valid)


def test_parameters_reach_another_process(valid):
    assert pickle.loads(pickle.dumps(valid)) == valid


def test_an_override_returns_new_parameters(valid):
    changes = {"train.epochs": 3, "model.latent.technical": 5}
    other = valid.override(changes)
    assert valid == read_params(ROOT / "params.yaml") == valid.override({})
    assert other.flat() == valid.flat() | changes


@pytest.mark.parametrize(
    "name",
    [
        "train.epoch",
        "trian.epochs",
        "new",
        "train.kl_weight.technical.deeper",
        "train.epochs.deeper",
    ],
)
def test_an_override_of_an_unknown_key_is_an_error(valid, name):
    with pytest.raises((ValidationError, GemError)):
        valid.override({name: 3})


def test_flat_parameters_have_the_names_of_the_file(valid):
    assert set(valid.flat()) == set(flatten(yaml_file.read(ROOT / "params.yaml").values))
    assert set(valid.flat("train")) == {name for name in valid.flat() if name.startswith("train.")}


def test_flatten_and_set_dotted_are_inverse():
    nested = {"a": {"b": 1, "c": {"d": [1, 2], "e": None}}, "f": {}}
    assert flatten(nested) == {"a.b": 1, "a.c.d": [1, 2], "a.c.e": None, "f": {}}
    assert set_dotted({}, flatten(nested)) == nested


@pytest.mark.parametrize(
    ("replacements", "message"),
    [
        (
            [
                (r"perturbations_per_study: \d+ ", "perturbations_per_study: 61 "),
                (r"  perturbations: \d+ ", "  perturbations: 60 "),
            ],
            "synthesize: perturbations_per_study (61) is more than perturbations (60)",
        ),
        (
            [(r"contexts_per_study: \d+ ", "contexts_per_study: 13 ")],
            "contexts_per_study (13) is more than the number of contexts (12)",
        ),
        (
            [("linear_decoder: true", "linear_decoder: false")],
            "model: additive_technical needs the linear decoder: set linear_decoder to true",
        ),
        (
            [("      platform: {kind: categorical}", "      tissue: {kind: categorical}")],
            "data.covariates: tissue is declared in more than one group",
        ),
    ],
)
def test_values_that_contradict_each_other_are_one_problem(problems, replacements, message):
    (problem,) = problems(*replacements)
    assert message in problem


AGE = "age_years: {kind: numeric, scale: linear}"
CONTROL = "control: {column: perturbation, value: control}"
CONTEXT = "context_columns: [tissue, cell_type]"
TABLE = "data/synthetic/embeddings/perturbation.parquet"
PERTURBATION = f"perturbation: {{kind: embedding, table: {TABLE}}}"
AGE_KEY = "data.covariates.biological.age_years"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (AGE, "age_years: {kind: numerical, scale: linear}", f"{AGE_KEY}.kind is 'numerical'; "),
        (AGE, "age_years: {kind: numeric}", f"{AGE_KEY}.scale is missing"),
        (
            AGE,
            "age_years: {kind: numeric, sacle: linear, scale: log}",
            f"{AGE_KEY}.sacle is unknown; did you mean scale?",
        ),
        (AGE, "age_years: {}", AGE_KEY),
        (AGE, "age_years: numeric", AGE_KEY),
        (
            CONTROL,
            "control: {column: perturbation, valu: control, value: x}",
            "data.control.valu is unknown; did you mean value?",
        ),
        (
            CONTEXT,
            "context_columns: [tissue, 3]",
            "data.context_columns.1 is 3; expected text",
        ),
        (
            PERTURBATION,
            "perturbation: {kind: embedding}",
            "data.covariates.perturbation.perturbation: expected table: PATH, or tables: [PATH, ",
        ),
        (
            PERTURBATION,
            "perturbation: {kind: embedding, table: a.csv, tables: [b.csv]}",
            "data.covariates.perturbation.perturbation: expected table: PATH, or tables: [PATH, ",
        ),
        (
            PERTURBATION,
            "perturbation: {kind: embedding, tables: [a.csv, a.csv]}",
            "data.covariates.perturbation.perturbation.tables: 'a.csv' appears twice",
        ),
        (CONTEXT, "context_columns: tissue", "data.context_columns is 'tissue'; expected a list"),
    ],
)
def test_a_problem_inside_a_declaration_has_its_key_in_the_file(problems, old, new, message):
    (problem,) = problems((re.escape(old), new))
    assert f"params.yaml:{line_of(TEXT, old[:20])}: {message}" in problem


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.7", "splits.combination is 0.7; expected less than or equal to 0.5"),
        ("some", "splits.combination is 'some'; expected a number"),
        ("{tissue: lung}", "splits.combination is {'tissue': 'lung'}; expected a number"),
        ("[{}]", "splits.combination.0 is {}"),
        ("[lung]", "splits.combination.0 is 'lung'; expected a mapping"),
        (
            "[{tissue: lung}, {tissue: 3}]",
            "splits.combination.1.tissue is 3; expected text",
        ),
    ],
)
def test_held_out_pairs_are_a_share_or_mappings_of_text(problems, value, message):
    (problem,) = problems((r"  combination: \S+ ", f"  combination: {value} "))
    assert f"params.yaml:{line_of(TEXT, 'combination:')}: {message}" in problem


def test_held_out_pairs_are_kept_as_written(valid):
    pairs = [{"tissue": "lung", "perturbation": "drug"}, {"tissue": "liver"}]
    changed = valid.override({"splits.combination": pairs})
    assert changed.flat() == valid.flat() | {"splits.combination": pairs}


def test_a_group_may_have_no_covariates():
    assert Covariates.model_validate({group: {} for group in GROUPS}).all() == {}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_share_is_between_zero_and_one_half(valid, share):
    names = [f"splits.{name}" for name in Splits.model_fields if name != "seed"]
    assert valid.override(dict.fromkeys(names, share)).splits.study == share


STAGES = [
    ["synthesize"],
    ["prepare"],
    ["configure"],
    ["train"],
    ["tune", "--search", "latent_kl"],
    ["evaluate"],
]

# All in one process, as `python -m` runs each: torch and mlflow are imported once.
RUN_EACH = """
import json, pathlib, runpy, sys

def run(stage, title):
    sys.argv = stage
    print(title, file=sys.stderr)
    try:
        runpy.run_module(f"pipeline.{stage[0]}", run_name="__main__")
    except SystemExit as end:
        print(f"exit {end.code}", file=sys.stderr)

for stage in json.loads(sys.argv[1]):
    run(stage, f"stage {stage[0]}")
pathlib.Path("params.yaml").unlink()
run(["prepare"], "without parameters")
"""


@pytest.mark.integration
def test_every_stage_checks_the_parameters_before_it_reads_or_writes(tmp_path):
    # The folder holds nothing else: a stage that looked at its data first would report that.
    (tmp_path / "params.yaml").write_text(re.sub(r"  epochs: \d+ ", "  epochs: 0 ", TEXT))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUN_EACH, json.dumps(STAGES)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    problem = (
        f"error: params.yaml:{line_of(TEXT, 'epochs:')}: "
        "train.epochs is 0; expected greater than or equal to 1"
    )
    *broken, title, absent, code = done.stderr.splitlines()
    assert broken == [line for stage in STAGES for line in (f"stage {stage[0]}", problem, "exit 2")]
    assert (title, code) == ("without parameters", "exit 2")
    assert absent.startswith("error: params.yaml: cannot be read")
    assert done.stdout == "" and not list(tmp_path.iterdir())
