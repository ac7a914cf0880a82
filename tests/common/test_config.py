"""params.yaml: every problem at once, with its line; nothing guessed; nothing changed; no stage starts with a broken file."""

import json
import math
import os
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
    flatten,
    read_params,
    set_dotted,
)
from pipeline.gem.common.errors import GemError, InputError

TEXT = (ROOT / "params.yaml").read_text()
# A dictionary of covariates may hold any names: none of them is required by the schema.
REQUIRED = [
    name
    for name in flatten(yaml_file.read(ROOT / "params.yaml").values)
    if not name.startswith("data.covariates.")
]


def line_of(text: str, start: str) -> int:
    return next(
        number
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip().startswith(start)
    )


@pytest.fixture
def problems(tmp_path):
    """The problem lines of params.yaml with the given replacements (patterns) of text."""

    def of(*replacements: tuple[str, str]) -> list[str]:
        text = TEXT
        for old, new in replacements:
            found = len(re.findall(old, text))
            assert found == 1, f"{old!r} stands {found} times in params.yaml"
            text = re.sub(old, new, text)
        path = tmp_path / "params.yaml"
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            read_params(path)
        assert all("\n" not in problem for problem in caught.value.problems)
        return list(caught.value.problems)

    return of


@pytest.fixture(scope="module")
def valid() -> Params:
    return read_params(ROOT / "params.yaml")


def test_the_committed_parameters_are_valid(valid):
    assert isinstance(valid.train.learning_rate, float)  # 2e-3: text to a YAML 1.1 reader
    assert list(valid.data.covariates.all()) == [
        name for group in GROUPS for name in getattr(valid.data.covariates, group)
    ]


def test_all_problems_are_reported_at_once_with_file_line_key_value_and_expectation(
    problems, tmp_path
):
    found = problems(
        (r"  samples: \d+ ", "  samples: 10 "),
        (r"preset: \w+ ", "preset: bulky "),
        (r"  test_random: ", "  test_randm: "),
        (r"  dropout: \S+ ", "  dropout: 1.0 "),
        (r"  epochs: \d+ ", '  epochs: "30" '),
        ("linear_decoder: true", "linear_decoder: on"),
    )
    path = tmp_path / "params.yaml"
    lines = path.read_text()
    wanted = [
        f"{path}:{line_of(lines, 'samples: 10')}: synthesize.samples is 10; expected greater than or equal to 50",
        f"{path}:{line_of(lines, 'preset:')}: synthesize.preset is 'bulky'; expected 'bulk' or 'single_cell'",
        f"{path}:{line_of(lines, 'splits:')}: splits.test_random is missing; add it",
        f"{path}:{line_of(lines, 'test_randm')}: splits.test_randm is unknown; did you mean test_random?",
        f"{path}:{line_of(lines, 'dropout:')}: model.dropout is 1.0; expected less than 1",
        f"{path}:{line_of(lines, 'epochs:')}: train.epochs is '30'; expected a integer",
        f"{path}:{line_of(lines, 'linear_decoder:')}: model.linear_decoder is 'on'; expected a boolean",
    ]
    assert sorted(re.sub("expected an? ", "expected a ", problem) for problem in found) == sorted(
        wanted
    )


def test_every_key_is_required_and_only_the_missing_one_is_reported():
    values = yaml_file.read(ROOT / "params.yaml").values
    for name in REQUIRED:
        broken = deepcopy(values)
        *parents, last = name.split(".")
        holder = broken
        for parent in parents:
            holder = holder[parent]
        del holder[last]
        with pytest.raises(ValidationError) as caught:
            Params.model_validate(broken)
        assert [
            (problem["type"], ".".join(problem["loc"])) for problem in caught.value.errors()
        ] == [("missing", name)]


@pytest.mark.parametrize("section", list(Params.model_fields))
def test_a_missing_section_is_one_problem(problems, section, tmp_path):
    values = yaml_file.read(ROOT / "params.yaml").values
    del values[section]
    path = tmp_path / "params.yaml"
    path.write_text(yaml_file.dump(values))
    with pytest.raises(InputError, match=f"^[^\n]*: {section} is missing; add it$"):
        read_params(path)


def test_an_empty_file_lacks_every_section(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("")
    with pytest.raises(InputError) as caught:
        read_params(path)
    assert [problem.split(": ")[1].split()[0] for problem in caught.value.problems] == list(
        Params.model_fields
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.epochs", True),
        ("train.epochs", "8"),
        ("train.epochs", 8.0),
        ("train.epochs", 8.5),
        ("train.epochs", None),
        ("train.epochs", [8]),
        ("train.learning_rate", True),
        ("train.learning_rate", "0.1"),
        ("train.learning_rate", math.inf),
        ("train.learning_rate", math.nan),
        ("train.kl_weight.technical", math.inf),
        ("train.gradient_clip", math.inf),
        ("train.seeds", []),
        ("train.seeds", [True]),
        ("train.seeds", ["1"]),
        ("train.seeds", [1.0]),
        ("train.seeds", [-1]),
        ("train.seeds", 1),
        ("train.seeds", [2**32]),
        ("train.device", "gpu"),
        ("model.linear_decoder", 1),
        ("model.linear_decoder", "true"),
        ("model.latent.technical", 0),
        ("model.latent.technical", 4097),
        ("data.source", 3),
        ("data.source", None),
        ("data.context_columns", "tissue"),
        ("data.context_columns", [1]),
        ("data.control", "control"),
        ("data.control.value", 0),
        ("data.covariates.technical.study.kind", "category"),
        ("data.covariates.biological.age_years.scale", "ln"),
        ("splits.study", 0.51),
        ("splits.study", -0.01),
        ("evaluate.search", "../elsewhere"),
        ("evaluate.search", ""),
        ("tracking.experiment", ""),
    ],
)
def test_no_type_is_guessed_and_no_range_is_left(valid, name, value):
    with pytest.raises(ValidationError):
        valid.override({name: value})


@pytest.mark.parametrize(
    "name", ["train.learning_rate", "model.min_variance", "train.kl_weight.biological"]
)
def test_a_whole_number_is_fine_where_a_number_is_wanted(valid, name):
    assert valid.override({name: 1}).flat()[name] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p, "train", None),
        lambda p: setattr(p.train, "epochs", 3),
        lambda p: setattr(p.train.kl_weight, "technical", 3.0),
    ],
)
def test_parameters_never_change(valid, change):
    with pytest.raises(ValidationError, match="frozen"):
        change(valid)


def test_an_override_gives_new_parameters_and_leaves_the_old_ones(valid):
    other = valid.override(
        {"train.epochs": 3, "model.latent.technical": 5}
    )  # not those of params.yaml
    assert (other.train.epochs, other.model.latent.technical) == (3, 5)
    assert valid == read_params(ROOT / "params.yaml")
    assert {name for name, value in other.flat().items() if value != valid.flat()[name]} == {
        "train.epochs",
        "model.latent.technical",
    }


def test_an_override_with_nothing_gives_equal_parameters(valid):
    assert valid.override({}) == valid


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
def test_an_override_of_an_unknown_key_is_refused(valid, name):
    with pytest.raises((ValidationError, GemError)):
        valid.override({name: 3})


def test_flat_parameters_are_named_as_in_the_file(valid):
    assert set(valid.flat()) == set(flatten(yaml_file.read(ROOT / "params.yaml").values))
    assert set(valid.flat("train")) == {name for name in valid.flat() if name.startswith("train.")}


def test_flatten_and_set_dotted_are_inverse():
    nested = {"a": {"b": 1, "c": {"d": [1, 2], "e": None}}, "f": {}}
    assert flatten(nested) == {"a.b": 1, "a.c.d": [1, 2], "a.c.e": None, "f": {}}
    assert set_dotted({}, flatten(nested)) == nested


# more than one key


def test_perturbations_of_a_study_fit_into_the_perturbations(problems):
    found = problems(
        (r"perturbations_per_study: \d+ ", "perturbations_per_study: 61 "),
        (r"  perturbations: \d+ ", "  perturbations: 60 "),
    )
    assert (
        len(found) == 1
        and "synthesize: perturbations_per_study (61) is more than perturbations (60)" in found[0]
    )


def test_additive_technical_latents_need_the_linear_path(problems):
    found = problems((r"linear_decoder: true", "linear_decoder: false"))
    assert (
        len(found) == 1
        and "model: additive_technical decodes by the linear path: set linear_decoder to true"
        in found[0]
    )


def test_contexts_of_a_study_fit_into_the_contexts(problems):
    found = problems((r"contexts_per_study: \d+ ", "contexts_per_study: 13 "))
    assert (
        len(found) == 1
        and "contexts_per_study (13) is more than there are contexts (12)" in found[0]
    )


def test_a_covariate_stands_in_one_group(problems):
    found = problems(("      platform: {kind: categorical}", "      tissue: {kind: categorical}"))
    assert (
        len(found) == 1 and "data.covariates: tissue is declared in more than one group" in found[0]
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "age_years: {kind: numeric, scale: linear}",
            "age_years: {kind: numerical, scale: linear}",
            "data.covariates.biological.age_years",
        ),
        (
            "age_years: {kind: numeric, scale: linear}",
            "age_years: {kind: numeric}",
            "data.covariates.biological.age_years.scale is missing",
        ),
        (
            "age_years: {kind: numeric, scale: linear}",
            "age_years: {kind: numeric, sacle: linear, scale: log}",
            "age_years.sacle is unknown; did you mean scale?",
        ),
        (
            "age_years: {kind: numeric, scale: linear}",
            "age_years: {}",
            "data.covariates.biological.age_years",
        ),
        (
            "age_years: {kind: numeric, scale: linear}",
            "age_years: numeric",
            "data.covariates.biological.age_years",
        ),
        (
            "control: {column: perturbation, value: control}",
            "control: {column: perturbation, valu: control, value: x}",
            "data.control.valu is unknown; did you mean value?",
        ),
        (
            "context_columns: [tissue, cell_type]",
            "context_columns: [tissue, 3]",
            "data.context_columns.1 is 3",
        ),
    ],
)
def test_a_problem_inside_a_declaration_is_named_by_its_key_in_the_file(
    problems, old, new, expected
):
    found = problems((re.escape(old), new))
    assert len(found) == 1 and expected in found[0]
    assert re.match(rf".*params\.yaml:{line_of(TEXT, old[:12])}: ", found[0]), found


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0.7", "splits.combination is 0.7; expected less than or equal to 0.5"),
        ("some", "splits.combination is 'some'; expected a number"),
        ("{tissue: lung}", "splits.combination is {'tissue': 'lung'}; expected a number"),
        ("[{}]", "splits.combination.0 is {}"),
        ("[lung]", "splits.combination.0 is 'lung'; expected a dictionary"),
        ("[{tissue: lung}, {tissue: 3}]", "splits.combination.1.tissue is 3; expected a string"),
    ],
)
def test_pairs_are_a_share_or_named_by_texts_and_a_mistake_is_one_line(problems, value, expected):
    found = problems((r"  combination: \S+ ", f"  combination: {value} "))
    assert (
        len(found) == 1 and f"params.yaml:{line_of(TEXT, 'combination:')}: {expected}" in found[0]
    ), found


def test_named_pairs_are_kept_as_they_are_written(valid):
    pairs = [{"tissue": "lung", "perturbation": "drug"}, {"tissue": "liver"}]
    changed = valid.override({"splits.combination": pairs})
    assert (
        changed.flat()["splits.combination"] == pairs
        and changed.splits.validation_combination == valid.splits.validation_combination
    )


@pytest.mark.parametrize("name", ["technical", "biological", "perturbation"])
def test_a_group_without_covariates_is_allowed(name):
    assert Covariates.model_validate({group: {} for group in GROUPS}).all() == {}


def test_a_share_may_be_none_or_half_at_most(valid):
    shares = [name for name in Splits.model_fields if name != "seed"]
    assert valid.override({f"splits.{name}": 0.0 for name in shares}).splits.study == 0
    assert valid.override({f"splits.{name}": 0.5 for name in shares}).splits.study == 0.5


def test_a_sample_id_of_null_means_the_obs_index_as_the_comment_says(valid):
    assert "null: the obs index" in TEXT
    assert valid.override({"data.sample_id": None}).data.sample_id is None


# the stages

STAGES = [
    ["synthesize"],
    ["prepare"],
    ["configure"],
    ["train"],
    ["tune", "--search", "latent_kl"],
    ["evaluate"],
]

# All of them in one process, as `python -m` runs each: torch and mlflow take seconds to import, once.
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


def test_every_stage_with_broken_or_absent_parameters_ends_with_2_and_one_line_before_it_reads_or_writes(
    tmp_path,
):
    # The folder holds nothing else: a stage that looked at its data first would miss that.
    (tmp_path / "params.yaml").write_text(re.sub(r"  epochs: \d+ ", "  epochs: 0 ", TEXT))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, json.dumps(STAGES)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    problem = f"error: params.yaml:{line_of(TEXT, 'epochs:')}: train.epochs is 0; expected greater than or equal to 1"
    said = done.stderr.splitlines()
    assert said[:-3] == [
        line for stage in STAGES for line in (f"stage {stage[0]}", problem, "exit 2")
    ]
    assert (
        said[-3] == "without parameters"
        and said[-2].startswith("error: params.yaml: cannot be read")
        and said[-1] == "exit 2"
    )
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())
