"""The tutorials on real cohorts: their YAML is valid, and runs where the files exist."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from support.repository import Repository
from support.settings import ROOT, SHARED_DATA, TINY

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.evaluation.catalogue import SHARED_CONTROLS
from pipeline.gem.evaluation.report.summary import SHARED_NOTE
from pipeline.gem.preparation.prepare import write_cohort

TUTORIALS = {
    Path(re.search(r"source: (\S+)", page.read_text())[1]).stem: page.read_text()
    for page in sorted((ROOT / "docs" / "tutorials").glob("*.md"))
}
real_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="no real cohorts here")


def settings(name: str, folder: Path) -> dict:
    """The sections `data` and `splits` of a tutorial's YAML block."""
    path = folder / "block.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", TUTORIALS[name], flags=re.DOTALL)[1])
    return yaml_file.read(path).values


def tutorial_params(name: str, folder: Path) -> Params:
    """params.yaml with the changes of a tutorial."""
    values, changes = yaml_file.read(ROOT / "params.yaml").values, settings(name, folder)
    assert set(changes) == {"data", "splits"} and set(changes["splits"]) <= set(values["splits"])
    splits = values["splits"] | changes["splits"]
    return Params.model_validate(values | {"data": changes["data"], "splits": splits})


def follow(repository: Repository, name: str) -> None:
    """Edits params.yaml as the tutorial says, with the path of the cohort here."""
    path, values = repository.folder / "params.yaml", settings(name, repository.folder.parent)
    text, lines = path.read_text().splitlines(keepends=True), yaml_file.read(path).lines
    block = re.search(r"```yaml\n(.*?)\nsplits:", TUTORIALS[name], flags=re.DOTALL)[1]
    data = block.replace(values["data"]["source"], str(SHARED_DATA / f"{name}.h5ad"))
    before, after = text[: lines[("data",)] - 1], text[lines[("splits",)] - 1 :]
    path.write_text("".join(before) + data + "\n\n" + "".join(after))
    yaml_file.edit(path, {f"splits.{key}": value for key, value in values["splits"].items()})
    for line in re.findall(r"^printf .* > data/tables/\S+$", TUTORIALS[name], flags=re.MULTILINE):
        repository.run("bash", "-c", line)


def run_stages(repository: Repository) -> str:
    """Output of all stages from `prepare` on."""
    stages = (["prepare"], ["train"], ["tune", "--search", "latent_kl"], ["evaluate"])
    return "".join(repository.stage(f"pipeline.{verb}", *options) for verb, *options in stages)


def table_of(name: str) -> dict[str, dict[str, float]]:
    """The results table of a tutorial: predictor to metric to number."""
    header, rows = re.search(
        r"^\| \w+, `\w+` \|(.*)\n\|[-|]+\n((?:\|.*\n)+)", TUTORIALS[name], flags=re.MULTILINE
    ).groups()
    metrics = [cell.strip() for cell in header.strip("| ").split("|")]
    table = {}
    for line in rows.splitlines():
        predictor, *cells = (cell.strip(" `") for cell in line.strip("|").split("|"))
        table[predictor] = {m: float(cell) for m, cell in zip(metrics, cells, strict=True) if cell}
    return table


def assert_baselines_as_in(name: str, scores: dict) -> None:
    """Every number of the tutorial that does not depend on a training."""
    baselines = {key: row for key, row in table_of(name).items() if not key.startswith("gem")}
    assert {"no_change", "additive", "ridge"} <= set(baselines)
    for predictor, row in baselines.items():
        for metric, number in row.items():
            tolerance = 0.0006 if metric == "mse" else 0.006
            assert scores[predictor][metric] == pytest.approx(number, abs=tolerance), predictor


@pytest.mark.parametrize("name", TUTORIALS)
def test_the_yaml_of_a_tutorial_is_valid_and_names_no_path_of_a_machine(name, tmp_path):
    data = tutorial_params(name, tmp_path).data
    assert data.source == f"path/to/{name}.h5ad"
    for path in filter(None, (data.target_gene, data.gene_list)):
        assert path.startswith("data/tables/")


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_changes_only_keys_whose_value_differs(name, tmp_path):
    before = yaml_file.read(ROOT / "params.yaml").values["splits"]
    changes = settings(name, tmp_path)["splits"]
    assert not [key for key, value in changes.items() if before[key] == value]


@real_data
def test_the_yeast_cohort_runs_through_every_stage(tmp_path):
    repository = Repository(tmp_path / "repository", TINY | {"tune.trials": 1, "train.epochs": 8})
    follow(repository, "yeast_snf2")
    run_stages(repository)
    manifest = json.loads((repository.folder / "data/cohort/manifest.json").read_text())
    assert manifest["samples"] == 96 and 6000 < manifest["genes"] < 7126
    assert set(manifest["splits"]) == {"train", "validation", "test_random", "test_control"}
    (absent,) = [note for note in manifest["notes"] if note.startswith("test_combination")]
    assert "is absent: a share of" in absent and "of 1 pairs" in absent
    scores = json.loads((repository.folder / "experiments/evaluation/metrics.json").read_text())
    assert set(scores) == {"test_random"}
    random = scores["test_random"]
    # Without a known truth there is no ideal predictor.
    assert "oracle_metadata" not in random and random["gem"]["skill"] is None
    assert random["gem"]["mse"] > 0 and random["gem"]["target_bias"] is not None
    # The effect of snf2 is strong, and its replicates are many.
    assert random["ridge"]["delta_pearson"] > 0.5
    assert_baselines_as_in("yeast_snf2", random)


def report_text(folder: Path) -> str:
    return (folder / "experiments/evaluation/report.html").read_text()


@real_data
def test_the_airway_cohort_of_eight_samples_is_evaluated_on_a_real_combination(tmp_path):
    """Four donors, one perturbation: no validation split, which every stage reports."""
    repository = Repository(tmp_path / "repository", TINY | {"tune.trials": 2})
    follow(repository, "airway")
    repository.stage("pipeline.configure")
    output = run_stages(repository)
    for reason in (
        "validation is absent: a share of 0.0",
        "validation_combination is absent: the list of pairs is empty",
        "test_control is absent: 4 controls are too few",
        "no validation split",
        "skipping the search",
    ):
        assert reason in output
    folder = repository.folder
    manifest = json.loads((folder / "data/cohort/manifest.json").read_text())
    assert manifest["splits"] == {"train": 7, "test_combination": 1}
    assert manifest["missing"]["perturbation_dose"] == 4
    splits = pd.read_parquet(folder / "data/cohort/splits.parquet").set_index("sample_id")["split"]
    assert splits[splits == "test_combination"].index.tolist() == ["SRR1039509"]
    scores = json.loads((folder / "experiments/evaluation/metrics.json").read_text())
    assert set(scores) == {"test_combination"}
    held_out = scores["test_combination"]
    assert held_out["gem"]["mse"] > 0 and held_out["gem_reference"]["mse"] > 0
    # The donors share the effect.
    assert (
        max(held_out[name]["mse"] for name in ("additive", "ridge")) < held_out["no_change"]["mse"]
    )
    # The one control of the donor stands on both sides of a change, which the tables say.
    assert held_out["additive"]["delta_pearson"] > 0.5
    assert held_out["additive"]["de_direction"] is None
    metrics = pd.read_csv(folder / "experiments/evaluation/metrics.csv")
    scored = metrics[(metrics["metric"] == "delta_pearson") & metrics["value"].notna()]
    assert len(scored) > 5 and scored["reason"].str.contains(SHARED_CONTROLS, regex=False).all()
    assert SHARED_NOTE in report_text(folder)
    assert_baselines_as_in("airway", held_out)
    assert held_out["additive"]["delta_pearson_biased"] == 1
    conditions = pd.read_csv(folder / "experiments/evaluation/conditions.csv")
    assert conditions["biased"].all()
    assert set(conditions["condition"]) == {"N61311 / dexamethasone / 1 uM / 18 hours"}
    report = report_text(folder)
    for name in ("no_change", "additive", "ridge", "gem_reference", "N61311"):
        assert name in report


MISTAKES = [
    (
        {"splits.combination": [{"cell_line": "N61131", "perturbation": "dexamethasone"}]},
        "no sample has cell_line = N61131; did you mean N61311?",
    ),
    ({"splits.combination": [{"perturbation": "dexamethasone"}]}, "perturbation dexamethasone"),
    ({"data.layer": ".raw"}, "no .raw; data.layer can be null"),
    ({"data.layer": "counts"}, "no layer 'counts'; data.layer can be null"),
    ({"data.control.value": "untreated"}, "known: control, dexamethasone"),
    ({"data.context_columns": ["cell_lines"]}, "no column cell_lines; did you mean cell_line?"),
    ({"data.min_gene_total": 10**9}, "lower data.min_gene_total"),
    ({"data.gene_list": "genes.txt"}, "genes.txt: genes ENSG00000000003.15 are not in"),
]


@real_data
@pytest.mark.parametrize(
    ("changes", "expected"), MISTAKES, ids=[next(iter(c)) for c, _ in MISTAKES]
)
def test_a_mistake_with_the_airway_cohort_is_one_line(tmp_path, monkeypatch, changes, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "genes.txt").write_text("ENSG00000000003.15\nENSG00000000419\n")
    source = {"data.source": str(SHARED_DATA / "airway.h5ad")}
    params = tutorial_params("airway", tmp_path).override(source | changes)
    with pytest.raises(InputError) as caught:
        write_cohort(open_source(params.data), params.data, params.splits, tmp_path / "cohort")
    assert len(caught.value.problems) == 1 and expected in caught.value.problems[0]


@real_data
@pytest.mark.parametrize("number", [100, 1000])
def test_the_target_gene_is_kept_beside_the_variable_genes_of_the_yeast_cohort(tmp_path, number):
    (tmp_path / "targets.csv").write_text("perturbation,gene_id\nsnf2,YOR290C\n")
    changes = {
        "data.source": str(SHARED_DATA / "yeast_snf2.h5ad"),
        "data.target_gene": str(tmp_path / "targets.csv"),
        "data.highly_variable": number,
    }
    params = tutorial_params("yeast_snf2", tmp_path).override(changes)
    write_cohort(open_source(params.data), params.data, params.splits, tmp_path / "cohort")
    cohort = Cohort(tmp_path / "cohort")
    assert "YOR290C" in cohort.genes and len(cohort.genes) in (number, number + 1)
