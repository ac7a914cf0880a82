"""The prepared cohort: its annotation tables, declarations, notes, sizes and integrity."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.data.cohort import Cohort, with_checksum
from pipeline.gem.data.labels import LabelForm
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
    assert positions.shape == (len(cohort.samples), 1)
    positions = positions[:, 0]
    has_target = positions >= 0
    assert has_target.any() and (perturbations[~has_target] == "control").any()
    expected = cohort.targets[perturbations[has_target]].tolist()
    assert cohort.genes[positions[has_target]].tolist() == expected
    targeted = cohort.targets.index[cohort.targets.isin(cohort.genes)]
    assert not set(perturbations[~has_target]) & set(targeted)


def test_a_table_with_none_of_the_labels_is_refused_before_counts_are_read(prepare, source):
    for name in (TABLE, "targets.parquet"):
        edit(source / name, lambda table: table.assign(perturbation=table["perturbation"] + "x"))
    with pytest.raises(InputError) as caught:
        prepare(source)
    features, targets = caught.value.problems
    # The middle of a long path is left out.
    assert re.match(r"/.*/perturbation\.parquet: none of", features)
    assert re.match(r"/.*/targets\.parquet: none of", targets)
    assert "is among the 8 of perturbation (" in features


def test_targets_that_match_in_part_are_noted_with_numbers(prepare, source):
    number = len(pd.read_parquet(source / "targets.parquet"))
    edit(
        source / "targets.parquet",
        lambda table: pd.concat([table, table.head(1).assign(perturbation="other")]),
    )
    note = f"data.target_gene: no sample has perturbation other (1 of {number + 1})"
    assert note in prepare(source).manifest["notes"]


@pytest.mark.parametrize("name", ["tissue", "study_date", "low", "sample_id"])
def test_a_gene_with_the_name_of_a_column_is_refused(prepare, source, name):
    edit(source / "genes.parquet", lambda table: table.replace(table["gene_id"][0], name))
    with pytest.raises(InputError, match=f"{name}: the name of a gene and of a column"):
        prepare(source, target_gene=None)


def test_labels_and_names_of_csv_tables_are_texts(prepare, source, params):
    """Labels and genes that look like numbers: in the samples, the features and the targets."""
    samples = pd.read_parquet(source / "samples.parquet")
    labels = samples["perturbation"].unique()
    texts = ["00123", "2.10", "1e5", "1.0", "NA", "nan", "True", "0x1F", "007"]
    rename = dict(zip(labels[labels != "control"], texts, strict=False))
    genes = pd.read_parquet(source / "genes.parquet")
    name_of = {gene: f"{row:03d}" for row, gene in enumerate(genes["gene_id"])}
    genes.replace({"gene_id": name_of}).to_parquet(source / "genes.parquet")
    samples.replace({"perturbation": rename}).to_parquet(source / "samples.parquet")
    for name in ("embeddings/perturbation", "targets"):
        table = pd.read_parquet(source / f"{name}.parquet")
        table.replace({"perturbation": rename, "gene_id": name_of}).to_csv(
            source / f"{name}.csv", index=False
        )
    covariates = identities(params)
    path = str(source / "embeddings" / "perturbation.csv")
    covariates["perturbation"]["perturbation"] = {"kind": "embedding", "table": path}
    cohort = prepare(source, covariates=covariates, target_gene=str(source / "targets.csv"))
    assert set(cohort.features["perturbation"].labels) == set(rename.values())
    assert set(cohort.samples["perturbation"]) == {"control", *rename.values()}
    assert set(cohort.targets) <= set(name_of.values()) and len(cohort.targets)
    assert not [note for note in cohort.manifest["notes"] if "features" in note]


def test_a_perturbation_may_have_several_targets_and_a_set_has_those_of_its_labels(
    prepare, params, source
):
    """Of a set in the table its own; a target that no other filter keeps is kept."""
    targets = pd.read_parquet(source / "targets.parquet")
    first, second, third = targets["perturbation"].iloc[:3]
    genes = pd.read_parquet(source / "genes.parquet")["gene_id"].iloc[:5].tolist()
    rows = [
        *((first, genes[0]), (first, genes[1]), (second, genes[1]), (second, genes[2])),
        (f"{third}|{first}", genes[3]),
    ]
    pd.DataFrame(rows, columns=["perturbation", "gene_id"]).to_parquet(source / "targets.parquet")
    names = {"both": f"{second}|{first}", "own": f"{first}|{third}", "new": f"{second}|{third}"}
    singles = ["control", first, second, third]

    def with_sets(samples: pd.DataFrame) -> pd.DataFrame:
        return samples.assign(perturbation=np.resize([*singles, *names.values()], len(samples)))

    edit(source / "samples.parquet", with_sets)
    kinds = identities(params)
    for kind, sets in (("multilabel", True), ("categorical", False)):
        kinds["perturbation"]["perturbation"] = {"kind": kind}
        cohort = prepare(source, kind, covariates=kinds, highly_variable=1)
        queries = [*singles, *names.values(), None, "never"]
        query = LabelForm.of(cohort.declared).table(pd.DataFrame({"perturbation": queries}))
        positions = TargetGenes.from_cohort(cohort).positions(query)
        found = [[cohort.genes[gene] for gene in row if gene >= 0] for row in positions]
        of_first, of_second, none = genes[:2], genes[1:3], []
        expected = [none, of_first, of_second, none]
        expected += [genes[:3], [genes[3]], of_second] if sets else [none, none, none]
        assert list(map(set, found)) == list(map(set, [*expected, none, none]))
        assert all(len(set(own)) == len(own) for own in found)


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
    assert moved.declared.covariates.embeddings() == {"perturbation": ("embeddings/0.parquet",)}
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


def test_features_of_two_tables_stand_side_by_side(prepare, params, source, cohort):
    """The same features in two tables, of which one lacks a label: zeros, and a note."""
    table = pd.read_parquet(source / TABLE)
    absent = table["perturbation"].iloc[2]
    first, second = source / "first.csv", source / "second.csv"
    table[["perturbation", "feature_1"]].to_csv(first, index=False)
    rest = table.drop(columns="feature_1").iloc[::-1]
    rest[rest["perturbation"] != absent].to_csv(second, index=False)
    covariates = params.data.covariates.model_dump(mode="json")
    paths = {"kind": "embedding", "tables": [str(first), str(second)]}
    covariates["perturbation"]["perturbation"] = paths
    joined = prepare(source, covariates=covariates)
    features = cohort.features["perturbation"]
    expected = pd.DataFrame(features.values.copy(), features.labels)
    expected.loc[absent, 1:] = 0
    found = joined.features["perturbation"]
    pd.testing.assert_frame_equal(
        pd.DataFrame(found.values, found.labels).loc[expected.index], expected
    )
    notes = [note for note in joined.manifest["notes"] if "zeros" in note]
    text = f"perturbation: no row in second.csv for {absent} (1 of 8 labels): zeros instead of"
    assert len(notes) == 1 and notes[0].startswith(text)
    assert joined.declared.covariates.embeddings() == {"perturbation": ("embeddings/0.parquet",)}


def test_each_of_several_tables_must_match(prepare, params, source):
    other = source / "other.csv"
    pd.DataFrame({"label": ["x"], "feature": [1.0]}).to_csv(other, index=False)
    covariates = params.data.covariates.model_dump(mode="json")
    paths = {"kind": "embedding", "tables": [str(source / TABLE), str(other)]}
    covariates["perturbation"]["perturbation"] = paths
    with pytest.raises(InputError, match=r"other\.csv: none of its 1 labels \(x\) is among"):
        prepare(source, covariates=covariates)


def test_labels_without_features_are_noted_and_the_control_needs_none(prepare, source, cohort):
    assert not [note for note in cohort.manifest["notes"] if "features" in note]
    held_out = cohort.rows(["test_perturbation"])["perturbation"].iloc[0]
    label = next(name for name in cohort.features["perturbation"].labels if name != held_out)
    both = ", ".join(sorted((label, held_out)))
    edit(source / TABLE, lambda table: table[~table["perturbation"].isin((label, held_out))])
    notes = prepare(source).manifest["notes"]
    message = "perturbation: no features for {} (2 of 8 labels): only their identity is encoded"
    assert message.format(both) in notes
    message = "perturbation: {} are held out of training and have no features: predictions treat"
    assert [note for note in notes if note.startswith(message.format(held_out))]


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
    (copy / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    with pytest.raises(IntegrityError, match=rf"tables.*{name or ''}"):
        Cohort(copy)
