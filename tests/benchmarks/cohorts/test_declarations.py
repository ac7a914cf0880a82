"""The YAML of a cohort: what is valid, and the message for what is not."""

from pathlib import Path

import pytest
from support.settings import ROOT, SHARED_DATA

from benchmarks.cohorts.declarations import (
    SHIPPED,
    SYNTHETIC,
    at_source,
    cohort_names,
    parse_settings,
    read_task,
    with_settings,
)
from benchmarks.cohorts.folds import draw_folds
from benchmarks.cohorts.rivals import RIVALS
from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.sources import open_source

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
DEFAULTS = read_params(ROOT / "params.yaml")
REAL = [name for name in NAMES if name not in SYNTHETIC]
real_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="no real cohorts here")


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_declaration_is_valid_and_names_no_path(name, tmp_path):
    (tmp_path / f"{name}.h5ad").touch()
    task = read_task(name, tmp_path, DEFAULTS)
    assert task.params.model == DEFAULTS.model and task.params.train == DEFAULTS.train
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert text.startswith("# ") and "source" not in text and "/" not in text


@real_data
def test_every_real_cohort_has_a_shipped_declaration():
    assert set(cohort_names(SHARED_DATA)) == set(NAMES)


@real_data
@pytest.mark.parametrize("name", REAL)
def test_a_shipped_declaration_matches_its_file(name):
    task = read_task(name, SHARED_DATA, DEFAULTS)
    folds = draw_folds(open_source(task.params.data).samples, task.declaration, task.params)
    assert 3 <= len(folds) <= task.declaration.at_most
    assert len({fold.name for fold in folds}) == len(folds)
    for fold in folds:
        assert fold.params(task.params).splits.study == 0


def test_what_a_declaration_does_not_name_is_absent_not_that_of_the_default_cohort(cohorts):
    data = read_task("tiny", cohorts, DEFAULTS).params.data
    absent = (data.target_gene, data.date_column, data.study_column, data.layer, data.gene_list)
    assert absent == (None,) * 5
    assert data.min_gene_samples == DEFAULTS.data.min_gene_samples
    assert set(data.covariates.all()) == {"batch", "donor", "perturbation", "perturbation_time"}


def test_the_yaml_beside_a_file_comes_before_the_shipped_one(cohorts):
    (cohorts / "airway.h5ad").touch()
    text = (cohorts / "tiny.yaml").read_text()
    (cohorts / "airway.yaml").write_text(text.replace("at_most: 2", "at_most: 1"))
    assert read_task("airway", cohorts, DEFAULTS).declaration.at_most == 1


def test_tables_are_found_in_the_folder_of_the_declaration(cohorts):
    path = cohorts / "tiny.yaml"
    path.write_text(path.read_text().replace("data:\n", "data:\n  target_gene: targets.csv\n"))
    with pytest.raises(InputError, match=r"targets\.csv does not exist"):
        read_task("tiny", cohorts, DEFAULTS)
    (cohorts / "targets.csv").write_text("perturbation,gene_id\ndrug A,g01\n")
    task = read_task("tiny", cohorts, DEFAULTS)
    assert Path(task.params.data.target_gene) == cohorts / "targets.csv"
    before = task.identity()
    (cohorts / "targets.csv").write_text("perturbation,gene_id\ndrug A,g02\n")
    assert read_task("tiny", cohorts, DEFAULTS).identity() != before


def test_several_tables_of_a_covariate_are_found_and_identify_the_data(cohorts):
    path = cohorts / "tiny.yaml"
    declared = path.read_text()
    drugs = "perturbation: {kind: embedding, tables: [first.csv, second.csv]}"
    path.write_text(declared.replace("perturbation: {kind: categorical}", drugs))
    with pytest.raises(InputError, match=r"first\.csv does not exist"):
        read_task("tiny", cohorts, DEFAULTS)
    for name in ("first", "second"):
        (cohorts / f"{name}.csv").write_text("label,feature\ndrug A,1\n")
    task = read_task("tiny", cohorts, DEFAULTS)
    paths = tuple(str(cohorts / f"{name}.csv") for name in ("first", "second"))
    assert task.params.data.covariates.embeddings() == {"perturbation": paths}
    before = task.identity()
    (cohorts / "second.csv").write_text("label,feature\ndrug A,2\n")
    assert read_task("tiny", cohorts, DEFAULTS).identity() != before


def test_the_identity_depends_on_settings_and_data_but_not_on_the_place(cohorts, tmp_path):
    first = read_task("tiny", cohorts, DEFAULTS).identity()
    moved = cohorts.rename(tmp_path / "elsewhere")
    assert read_task("tiny", moved, DEFAULTS).identity() == first
    assert read_task("tiny", moved, DEFAULTS, folds=1).identity() == first
    changed = with_settings(DEFAULTS, {"train.epochs": 3})
    assert read_task("tiny", moved, changed).identity() != first
    (moved / "tiny.h5ad").write_bytes((moved / "tiny.h5ad").read_bytes() + b"0")
    assert read_task("tiny", moved, DEFAULTS).identity() != first


MISTAKES = {
    "hold_out: pairs": ("hold_out: pears", "tiny.yaml:10: hold_out is 'pears'"),
    "at_most: 2": ("at_mots: 2", "tiny.yaml:11: at_mots is unknown; did you mean at_most?"),
    "kind: numeric": ("kind: number", "tiny.yaml:7: covariates.perturbation.perturbation_time"),
    "  control: {column: perturbation, value: control}\n": ("", "data.control: missing"),
    "{column: perturbation, value: control}": ("null", "hold_out: pairs needs data.control"),
    "data:\n": ("synthesize: {samples: 100}\ndata:\n", "either data or synthesize"),
    "pairs\n": ("studies\n", "hold_out: studies needs data.study_column"),
    "pairs\nat": (
        "levels\nat",
        "expected column, whose values are held out, with hold_out: levels",
    ),
    "at_most": ("column: donor\nat_most", "expected column, whose values are held out, with hold_"),
    "pairs\nat_": ("levels\ncolumn: perturbation\nat_", "perturbation names the control"),
}


@pytest.mark.parametrize("before", MISTAKES)
def test_a_mistake_is_one_line_with_the_file(cohorts, before):
    after, message = MISTAKES[before]
    path = cohorts / "tiny.yaml"
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(InputError) as caught:
        read_task("tiny", cohorts, DEFAULTS)
    (problem,) = caught.value.problems
    assert str(path) in problem and message in problem and "\n" not in problem


def test_an_unknown_cohort_and_an_absent_declaration_are_named(cohorts):
    (cohorts / "new.h5ad").touch()
    assert cohort_names(cohorts) == ["new", "tiny", *SYNTHETIC]
    with pytest.raises(InputError, match="no cohort tinny; did you mean tiny"):
        read_task("tinny", cohorts, DEFAULTS)
    with pytest.raises(InputError, match=r"new\.yaml: absent; it declares covariates"):
        read_task("new", cohorts, DEFAULTS)
    with pytest.raises(InputError, match="no such folder"):
        cohort_names(cohorts / "absent")


def test_settings_of_the_command_line_are_values_of_yaml():
    changes = parse_settings(["train.epochs=3", "train.seeds=[1, 2]", "data.layer=null"])
    assert changes == {"train.epochs": 3, "train.seeds": [1, 2], "data.layer": None}
    for texts, message in (
        (["train.epochs"], "expected KEY=VALUE"),
        (["train.epochs=1", "train.epochs=2"], "appears twice"),
    ):
        with pytest.raises(InputError, match=message):
            parse_settings(texts)
    for changes, message in (
        ({"train.epoch": 3}, "train.epoch"),
        ({"train.epochs": 0}, "train.epochs.*greater than or equal to 1"),
        ({"train.epochs.x": 0}, "train.epochs.x is unknown"),
    ):
        with pytest.raises(InputError, match=message):
            with_settings(DEFAULTS, changes)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_tables_of_a_simulated_cohort_move_with_its_source(name, tmp_path):
    params = at_source(read_task(name, tmp_path, DEFAULTS).params, tmp_path / "source")
    assert params.synthesize.samples < DEFAULTS.synthesize.samples
    assert Path(params.data.source) == tmp_path / "source"
    assert Path(params.data.target_gene) == tmp_path / "source" / "targets.parquet"
    ((table,),) = params.data.covariates.embeddings().values()
    assert Path(table) == tmp_path / "source" / "embeddings" / "perturbation.parquet"


def test_the_declaration_of_the_documentation_is_valid(cohorts):
    text = (ROOT / "docs" / "real_cohorts.md").read_text()
    (cohorts / "tiny.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    task = read_task("tiny", cohorts, DEFAULTS)
    assert task.declaration.hold_out == "conditions"
    for key in type(task.declaration).model_fields:
        assert f"| `{key}` |" in text
    for name in (*NAMES, *RIVALS):
        assert f"`{name}`" in text
