"""Real cohorts by the README's words: its YAML is valid, and where the files are, it runs; only params.yaml is edited."""

import json
import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from support.repository import Repository
from support.settings import ROOT, SHARED_DATA, TINY

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.evaluation.report.realism import real_portraits
from pipeline.gem.preparation.prepare import write_cohort

README = (ROOT / "README.md").read_text()
PLACES = ("path/to/", "data/tables/")  # what the README names outside the repository, and inside
BLOCKS = {
    Path(re.search(r"source: (\S+)", block)[1]).stem: block
    for block in re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
}
on_this_machine = pytest.mark.skipif(
    not SHARED_DATA.exists(), reason="the real cohorts are not on this machine"
)


def values_of(name: str, folder: Path) -> dict:
    path = folder / "block.yaml"
    path.write_text(BLOCKS[name])
    return yaml_file.read(path).values


def told_parameters(name: str, folder: Path) -> Params:
    """params.yaml, changed as the README tells."""
    values, changes = yaml_file.read(ROOT / "params.yaml").values, values_of(name, folder)
    assert set(changes) == {"data", "splits"} and set(changes["splits"]) <= set(values["splits"])
    return Params.model_validate(
        values | {"data": changes["data"], "splits": values["splits"] | changes["splits"]}
    )


def follow(repository: Repository, name: str) -> None:
    """What the README tells: section data replaced, other keys changed one by one; the file stands where it is."""
    path, values = repository.folder / "params.yaml", values_of(name, repository.folder.parent)
    text, lines = path.read_text().splitlines(keepends=True), yaml_file.read(path).lines
    data = (
        BLOCKS[name]
        .split("\nsplits:")[0]
        .replace(values["data"]["source"], str(SHARED_DATA / f"{name}.h5ad"))
    )
    path.write_text(
        "".join(text[: lines[("data",)] - 1])
        + data
        + "\n\n"
        + "".join(text[lines[("splits",)] - 1 :])
    )
    yaml_file.edit(path, {f"splits.{key}": value for key, value in values["splits"].items()})
    for line in re.findall(r"^printf .* > data/tables/\S+$", README, flags=re.MULTILINE):
        repository.run("bash", "-c", line)


def told(split: str) -> dict[str, dict[str, float]]:
    """The README's table under the name of a real cohort's split: predictor to score to number."""
    table = re.search(rf"^\| {split} \|(.*)\n\|[-|]+\n((?:\|.*\n)+)", README, flags=re.MULTILINE)
    metrics = [cell.strip() for cell in table[1].strip("| ").split("|")]
    rows = [
        [cell.strip(" `") for cell in row.strip("|").split("|")] for row in table[2].splitlines()
    ]
    return {
        row[0]: {metric: float(cell) for metric, cell in zip(metrics, row[1:], strict=True) if cell}
        for row in rows
    }


def same_as_told(scores: dict, split: str) -> None:
    """Every number of the README that no training decides."""
    baselines = {name: row for name, row in told(split).items() if not name.startswith("gem")}
    assert {"no_change", "additive", "ridge"} <= set(baselines)
    for name, row in baselines.items():
        for metric, number in row.items():
            assert scores[name][metric] == pytest.approx(
                number, abs=0.0006 if metric == "mse" else 0.006
            ), (name, metric)


# what the README says


def test_the_readme_walks_through_the_cohorts_that_the_report_compares_with():
    assert set(BLOCKS) == set(real_portraits())


@pytest.mark.parametrize("name", BLOCKS)
def test_the_yaml_of_the_readme_is_valid_and_names_no_place_of_a_machine(name, tmp_path):
    changed = told_parameters(name, tmp_path)
    assert changed.data.source == f"path/to/{name}.h5ad"
    paths = [
        path
        for path in (changed.data.source, changed.data.target_gene, changed.data.gene_list)
        if path
    ]
    assert all(path.startswith(PLACES) for path in paths)


def test_the_readme_changes_nothing_that_stays_as_it_is(tmp_path):
    for name in BLOCKS:
        before, changes = yaml_file.read(ROOT / "params.yaml").values, values_of(name, tmp_path)
        assert not [
            key for key, value in changes["splits"].items() if before["splits"][key] == value
        ]


def test_the_lines_that_make_an_h5ad_make_one(tmp_path, monkeypatch, rng):
    code = re.search(r"```python\n(import anndata.*?)```", README, flags=re.DOTALL)[1]
    counts = pd.DataFrame(
        rng.poisson(5, (4, 3)), index=[f"s{number}" for number in range(4)], columns=["a", "b", "c"]
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    counts.to_csv("counts.csv")
    pd.DataFrame({"line": list("wxyz")}, index=counts.index[::-1]).to_csv("samples.csv")
    exec(compile(code, "README.md", "exec"), {})
    made = anndata.read_h5ad(next((tmp_path / "path/to").glob("*.h5ad")))
    assert (
        np.array_equal(made.X, counts)
        and made.obs["line"].tolist() == list("zyxw")
        and made.var_names.tolist() == ["a", "b", "c"]
    )


# and where the files are


@on_this_machine
def test_the_yeast_cohort_runs_through_every_stage(tmp_path):
    repository = Repository(tmp_path / "repository", TINY | {"tune.trials": 1, "train.epochs": 8})
    follow(repository, "yeast_snf2")
    for stage in ("prepare", "train", "tune", "evaluate"):
        repository.stage(
            f"pipeline.{stage}", *(("--search", "latent_kl") if stage == "tune" else ())
        )
    manifest = json.loads((repository.folder / "data/cohort/manifest.json").read_text())
    assert manifest["samples"] == 96 and 6000 < manifest["genes"] < 7126
    assert set(manifest["splits"]) == {"train", "validation", "test_random", "test_control"}
    assert any(
        note.startswith("test_combination is absent: of 1 pairs") for note in manifest["notes"]
    )
    scores = json.loads((repository.folder / "experiments/evaluation/metrics.json").read_text())
    assert set(scores) == {"test_random"}
    random = scores["test_random"]
    assert "oracle_metadata" not in random and random["gem"]["skill"] is None, (
        "without a known truth there is no ideal predictor"
    )
    assert random["gem"]["mse"] > 0 and random["gem"]["target_bias"] is not None
    assert random["ridge"]["delta_pearson"] > 0.5, (
        "the effect of snf2 is strong and its replicates are many"
    )
    same_as_told(random, "yeast, `test_random`")


@on_this_machine
def test_the_airway_cohort_of_eight_samples_is_compared_on_a_real_combination(tmp_path):
    """Four donors, one perturbation: no validation split, so that nothing is chosen, and every stage says so."""
    repository = Repository(tmp_path / "repository", TINY | {"tune.trials": 2})
    follow(repository, "airway")
    repository.stage("pipeline.configure")
    said = repository.dvc("repro").stdout
    for reason in (
        "validation is absent: a share of 0.0",
        "validation_combination is absent: no pair is named",
        "test_control is absent: 4 controls are too few",
    ):
        assert reason in said
    assert "no validation split: all epochs are trained" in said
    assert "nothing is searched, the baseline is the answer" in said
    manifest = json.loads((repository.folder / "data/cohort/manifest.json").read_text())
    assert (
        manifest["splits"] == {"train": 7, "test_combination": 1}
        and manifest["missing"]["perturbation_dose"] == 4
    )
    rows = pd.read_parquet(repository.folder / "data/cohort/splits.parquet").set_index("sample_id")[
        "split"
    ]
    assert rows[rows == "test_combination"].index.tolist() == ["SRR1039509"]
    scores = json.loads((repository.folder / "experiments/evaluation/metrics.json").read_text())
    assert set(scores) == {"test_combination"}
    held_out = scores["test_combination"]
    assert held_out["gem"]["mse"] > 0 and held_out["gem_reference"]["mse"] > 0
    assert (
        max(held_out["additive"]["mse"], held_out["ridge"]["mse"]) < held_out["no_change"]["mse"]
    ), "the effect is shared by the donors"
    assert held_out["additive"]["delta_pearson"] is None, (
        "one control of a donor cannot stand on both sides of a change"
    )
    same_as_told(held_out, "airway, `test_combination`")
    assert set(
        pd.read_csv(repository.folder / "experiments/evaluation/conditions.csv")["condition"]
    ) == {"N61311 / dexamethasone / 1 uM / 18 hours"}
    report = (repository.folder / "experiments/evaluation/report.html").read_text()
    assert all(
        name in report for name in ("no_change", "additive", "ridge", "gem_reference", "N61311")
    )


@on_this_machine
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"splits.combination": [{"cell_line": "N61131", "perturbation": "dexamethasone"}]},
            "no sample has cell_line = N61131; did you mean N61311?",
        ),
        (
            {"splits.combination": [{"perturbation": "dexamethasone"}]},
            "training sees no other context of the perturbation dexamethasone",
        ),
        ({"data.layer": ".raw"}, "no .raw; data.layer can be null"),
        ({"data.layer": "counts"}, "no layer 'counts'; data.layer can be null"),
        (
            {"data.control.value": "untreated"},
            "no sample has perturbation = untreated; known: control, dexamethasone",
        ),
        (
            {"data.context_columns": ["cell_lines"]},
            "data.context_columns: cell_lines: no column cell_lines; did you mean cell_line?",
        ),
        ({"data.min_gene_total": 10**9}, "lower data.min_gene_total"),
        ({"data.gene_list": "genes.txt"}, "genes.txt: genes ENSG00000000003.15 are not in"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_with_the_airway_cohort_is_one_line(tmp_path, monkeypatch, changes, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "genes.txt").write_text("ENSG00000000003.15\nENSG00000000419\n")
    params = told_parameters("airway", tmp_path).override(
        {"data.source": str(SHARED_DATA / "airway.h5ad")} | changes
    )
    with pytest.raises(InputError) as caught:
        write_cohort(open_source(params.data), params.data, params.splits, tmp_path / "cohort")
    assert len(caught.value.problems) == 1 and expected in caught.value.problems[0]


@on_this_machine
@pytest.mark.parametrize("number", [100, 1000])
def test_variable_genes_of_the_yeast_cohort_stand_beside_the_one_that_is_knocked_out(
    tmp_path, number
):
    (tmp_path / "targets.csv").write_text("perturbation,gene_id\nsnf2,YOR290C\n")
    changes = {
        "data.source": str(SHARED_DATA / "yeast_snf2.h5ad"),
        "data.target_gene": str(tmp_path / "targets.csv"),
        "data.highly_variable": number,
    }
    params = told_parameters("yeast_snf2", tmp_path).override(changes)
    write_cohort(open_source(params.data), params.data, params.splits, tmp_path / "cohort")
    cohort = Cohort(tmp_path / "cohort")
    assert "YOR290C" in cohort.genes and len(cohort.genes) in (number, number + 1)
    assert any(
        f"not among the {number} whose Pearson residuals vary most" in note
        for note in cohort.manifest["notes"]
    )
