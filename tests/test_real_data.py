"""Real cohorts, where their folder exists: only params.yaml is edited."""

import json

import pytest
from conftest import SHARED_DATA, TINY
from repository import Repository

from pipeline.gem import yamlfile

pytestmark = pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real cohorts are not on this machine")

SECTION = """\
data:
  source: {source}
  layer: null
  sample_id: null
  covariates:
    technical: {{study: {{kind: categorical}}}}
    biological: {{{biological}: {{kind: categorical}}}}
    perturbation:
      perturbation: {{kind: categorical}}
{more}
  context_columns: [{biological}]
  control: {{column: perturbation, value: control}}
  target_gene: null
  date_column: null
  study_column: study
  min_gene_samples: 5
  empty_samples: refuse
"""
YEAST = SECTION.format(source=SHARED_DATA / "yeast_snf2.h5ad", biological="organism_strain", more="      perturbation_type: {kind: categorical}")
AIRWAY = SECTION.format(
    source=SHARED_DATA / "airway.h5ad",
    biological="cell_line",
    more="      perturbation_dose: {kind: numeric, scale: log}\n      perturbation_time: {kind: numeric, scale: log}",
)


def with_data(repository: Repository, section: str) -> None:
    path = repository.folder / "params.yaml"
    text = path.read_text()
    lines = yamlfile.read(path).lines
    start, end = lines[("data",)] - 1, lines[("splits",)] - 1
    rows = text.splitlines(keepends=True)
    path.write_text("".join(rows[:start]) + section + "\n" + "".join(rows[end:]))


def test_the_yeast_cohort_runs_through_every_stage(tmp_path):
    changes = TINY | {"tune.trials": 1, "train.epochs": 8}
    repository = Repository(tmp_path / "repository", changes)
    with_data(repository, YEAST)
    repository.dvc("repro")
    manifest = json.loads((repository.folder / "data/cohort/manifest.json").read_text())
    assert manifest["samples"] == 96
    assert 6000 < manifest["genes"] < 7126
    assert any("test_combination is absent" in note for note in manifest["notes"])
    scores = json.loads((repository.folder / "experiments/evaluation/metrics.json").read_text())
    assert set(scores) == {"test_random"}
    random = scores["test_random"]
    assert "oracle_metadata" not in random
    assert random["gem"]["skill"] is None, "without a known truth there is no ideal predictor"
    assert random["ridge"]["mse"] < random["training_mean"]["mse"]
    assert random["ridge"]["delta_pearson"] > 0.5, "the effect of snf2 is strong and its replicates are many"


def test_the_airway_cohort_of_eight_samples_is_legal(tmp_path):
    """Four donors, one perturbation: no validation split, so that nothing is chosen, and every stage says so."""
    repository = Repository(tmp_path / "repository", TINY | {"tune.trials": 2})
    with_data(repository, AIRWAY)
    repository.python("pipeline.params")
    said = repository.dvc("repro").stdout
    assert "validation is absent" in said
    assert "no validation split: all 6 epochs are trained" in said
    assert "nothing is searched, the baseline is the answer" in said
    manifest = json.loads((repository.folder / "data/cohort/manifest.json").read_text())
    assert manifest["samples"] == 8
    assert manifest["missing"]["perturbation_dose"] == 4
    scores = json.loads((repository.folder / "experiments/evaluation/metrics.json").read_text())
    assert set(scores) <= {"test_random", "test_combination"}
    assert all(predictors["gem"]["mse"] > 0 for predictors in scores.values())
