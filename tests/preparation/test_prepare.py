"""The prepared cohort: its annotation tables, declarations, notes, sizes and integrity."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.shards import ShardWriter, read_shard
from pipeline.gem.model.query import TargetGenes

TABLE = Path("embeddings") / "perturbation.parquet"


def edit(path: Path, change) -> None:
    change(pd.read_parquet(path)).to_parquet(path, index=False)


def identities(params) -> dict:
    """The covariates without feature tables."""
    return params.data.covariates.identities().model_dump(mode="json")


# annotation tables


def test_a_cohort_has_the_features_and_targets_of_its_source(cohort, source_folder):
    table = pd.read_parquet(source_folder / TABLE)
    targets = pd.read_parquet(source_folder / "targets.parquet")
    features = cohort.features["perturbation"]
    assert list(features.labels) == table["perturbation"].tolist()
    values = table.drop(columns="perturbation").to_numpy()
    np.testing.assert_allclose(features.values, values, rtol=1e-6)
    expected = dict(zip(targets["perturbation"], targets["gene_id"], strict=True))
    assert cohort.targets.to_dict() == expected != {}


def test_the_target_of_a_sample_is_the_position_of_its_gene_in_the_cohort(cohort):
    positions, perturbations = (
        TargetGenes.from_cohort(cohort).positions(cohort.samples),
        cohort.samples["perturbation"],
    )
    has_target = positions >= 0
    assert has_target.any() and (perturbations[~has_target] == "control").any()
    expected = cohort.targets[perturbations[has_target]].tolist()
    assert cohort.genes[positions[has_target]].tolist() == expected
    targeted = cohort.targets.index[cohort.targets.isin(cohort.genes)]
    assert not set(perturbations[~has_target]) & set(targeted)


def test_a_target_gene_outside_the_cohort_has_no_position(prepare, source):
    genes, few = pd.read_parquet(source / "genes.parquet")["gene_id"], 10_000
    excluded = sorted(set(genes) - set(prepare(source, "before", min_gene_total=few).genes))
    edit(source / "targets.parquet", lambda table: table.assign(gene_id=excluded[0]))
    cohort = prepare(source, min_gene_total=few)
    assert len(cohort.targets)
    assert (TargetGenes.from_cohort(cohort).positions(cohort.samples) == -1).all()


@pytest.mark.parametrize("changes", [{}, {"control": None}], ids=["control", "no control"])
def test_a_cohort_may_have_no_annotation_tables(prepare, source, params, changes):
    shutil.rmtree(source / "embeddings")
    (source / "targets.parquet").unlink()
    cohort = prepare(source, covariates=identities(params), target_gene=None, **changes)
    assert cohort.features == {} and cohort.targets.empty
    assert not (cohort.folder / "embeddings").exists()
    assert (TargetGenes.from_cohort(cohort).positions(cohort.samples) == -1).all()


def test_the_cohort_does_not_depend_on_the_location_of_its_source(prepare, source, cohort):
    moved = prepare(source)
    assert moved.manifest == cohort.manifest
    assert moved.train_validation_sha256 == cohort.train_validation_sha256
    assert moved.declared.covariates.embeddings() == {"perturbation": "embeddings/0.parquet"}
    assert moved.declared.target_gene == "targets.parquet"


@pytest.mark.parametrize("name", [TABLE.as_posix(), "targets.parquet"])
def test_annotation_tables_are_part_of_the_hash_of_visible_data(prepare, source, cohort, name):
    if name == "targets.parquet":
        edit(source / name, lambda table: table.iloc[1:])
    else:
        edit(source / name, lambda table: table.assign(feature_1=table["feature_1"] + 1))
    assert prepare(source).train_validation_sha256 != cohort.train_validation_sha256


# problems and notes


def test_problems_of_samples_and_tables_are_reported_at_once(prepare, source, tmp_path):
    edit(source / TABLE, lambda table: table.assign(feature_1="text"))
    edit(source / "samples.parquet", lambda table: table.assign(age_years="old"))
    with pytest.raises(InputError) as caught:
        prepare(source)
    first, second = caught.value.problems
    assert "age_years: 'old' is not a number" in first
    assert "perturbation.parquet: feature feature_1 holds" in second
    assert not (tmp_path / "cohort" / "manifest.json").exists()


def test_labels_without_features_are_noted_and_the_control_needs_none(prepare, source, cohort):
    assert not [note for note in cohort.manifest["notes"] if "features" in note]
    label = pd.read_parquet(source / TABLE)["perturbation"].iloc[0]
    edit(source / TABLE, lambda table: table.iloc[1:])
    share = "1 of 8 labels"
    note = f"perturbation: no features for {label} ({share}): only their identity is encoded"
    assert note in prepare(source).manifest["notes"]


@pytest.mark.parametrize(
    ("folder", "is_tracked"), [(None, True), ("data/tables", True), ("elsewhere", False)]
)
def test_tables_that_dvc_does_not_track_are_noted(
    prepare, params, source, tmp_path, monkeypatch, folder, is_tracked
):
    monkeypatch.chdir(tmp_path)
    changes = {}
    if folder:
        shutil.copytree(source / "embeddings", tmp_path / folder)
        covariates = params.data.covariates.model_dump(mode="json")
        table = str(tmp_path / folder / "perturbation.parquet")
        covariates["perturbation"]["perturbation"]["table"] = table
        changes = {"covariates": covariates}
    notes = [note for note in prepare(source, **changes).manifest["notes"] if "data/tables" in note]
    assert [note.split(": ")[1] for note in notes] == ([] if is_tracked else ["perturbation"])


def test_samples_of_different_splits_with_equal_counts_fail_the_stage(
    prepare, source, cohort, tmp_path
):
    genes = pd.read_parquet(source / "genes.parquet")
    (path,) = (source / "counts").glob("*.parquet")
    batches = zip(*read_shard(path, len(genes)), strict=True)
    names, counts = (np.concatenate(batch) for batch in batches)
    train, test = (cohort.rows([split])["sample_id"].iloc[0] for split in ("train", "test_random"))
    counts[names == test] = counts[names == train]
    with ShardWriter(source / "counts", "counts", np.dtype(np.uint32)) as writer:
        writer.write(names, counts)
    with pytest.raises(IntegrityError, match=rf"{train} \(train\)") as caught:
        prepare(source)
    assert "have equal counts" in str(caught.value) and f"{test} (test_random)" in str(caught.value)
    assert not (tmp_path / "cohort" / "manifest.json").exists()


def test_sizes_of_the_splits_are_written(cohort):
    sizes = pd.read_csv(cohort.folder / "sizes.csv")
    assert dict(zip(sizes["split"], sizes["samples"], strict=True)) == cohort.manifest["splits"]
    assert sizes["controls"].sum() == (cohort.samples["perturbation"] == "control").sum()
    assert (sizes.loc[sizes["split"] == "test_perturbation", "perturbations"] == 1).all()


# integrity


@pytest.fixture
def copy(cohort, tmp_path) -> Path:
    """A copy of the tiny cohort."""
    return Path(shutil.copytree(cohort.folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["embeddings/0.parquet", "targets.parquet"])
def test_a_changed_table_of_the_cohort_is_refused(copy, name):
    edit(copy / name, lambda table: table.iloc[::-1])
    with pytest.raises(IntegrityError, match=f"{name}: ") as caught:
        Cohort(copy)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "name", ["embeddings/0.parquet", "targets.parquet", "samples.parquet", None]
)
def test_a_table_missing_from_the_manifest_or_outside_the_cohort_is_refused(copy, name):
    manifest = json.loads((copy / "manifest.json").read_text())
    if name:
        del manifest["tables"][name]
    else:
        manifest["tables"]["embeddings/../../outside.parquet"] = "0"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=rf"tables.*{name or ''}"):
        Cohort(copy)
