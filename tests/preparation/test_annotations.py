"""What tables tell beside the counts: into the cohort whole, or refused in words; and out of it again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.settings import at_source

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.model.gem import TargetGenes
from pipeline.gem.preparation.prepare import write_cohort

TABLE = Path("embeddings") / "perturbation.parquet"


@pytest.fixture
def source(source_folder, tmp_path) -> Path:
    """A source that a test may change."""
    return Path(shutil.copytree(source_folder, tmp_path / "source"))


@pytest.fixture
def prepare(params, tmp_path):
    def of(source: Path, name: str = "cohort", **changes) -> Cohort:
        data = Data.model_validate(
            params.override(at_source(source)).data.model_dump(mode="json") | changes
        )
        write_cohort(open_source(data), data, params.splits, tmp_path / name)
        return Cohort(tmp_path / name)

    return of


def change(path: Path, how) -> None:
    how(pd.read_parquet(path)).to_parquet(path, index=False)


def plain_covariates(params) -> dict:
    return params.data.covariates.identities().model_dump(mode="json")


# what a cohort knows


def test_a_cohort_has_the_features_and_targets_of_its_source(cohort, source_folder):
    table, targets = (
        pd.read_parquet(source_folder / TABLE),
        pd.read_parquet(source_folder / "targets.parquet"),
    )
    features = cohort.features["perturbation"]
    assert list(features.labels) == table["perturbation"].tolist()
    np.testing.assert_allclose(
        features.values, table.drop(columns="perturbation").to_numpy(), rtol=1e-6
    )
    assert (
        cohort.targets.to_dict()
        == dict(zip(targets["perturbation"], targets["gene_id"], strict=True))
        != {}
    )


def test_the_target_of_a_sample_is_a_position_among_the_genes_of_the_cohort(cohort):
    positions = TargetGenes.of(cohort)(cohort.samples)
    hit = positions >= 0
    assert hit.any() and (cohort.samples["perturbation"][~hit] == "control").any()
    assert (
        cohort.genes[positions[hit]].tolist()
        == cohort.targets[cohort.samples["perturbation"][hit]].tolist()
    )
    assert not set(cohort.samples["perturbation"][~hit]) & set(
        cohort.targets.index[cohort.targets.isin(cohort.genes)]
    )


def test_a_target_whose_gene_was_left_out_has_no_position(prepare, source, cohort):
    name = cohort.targets.index[0]
    gene = pd.read_parquet(source / "genes.parquet")["gene_id"].iloc[0]
    change(
        source / "targets.parquet",
        lambda table: pd.DataFrame({"perturbation": [name], "gene_id": [gene]}),
    )
    kept = prepare(source)
    (position,) = set(TargetGenes.of(kept)(kept.samples[kept.samples["perturbation"] == name]))
    assert position == (list(kept.genes).index(gene) if gene in kept.genes else -1)


def test_a_cohort_without_tables_is_a_cohort(prepare, source, params):
    shutil.rmtree(source / "embeddings")
    (source / "targets.parquet").unlink()
    plain = prepare(source, covariates=plain_covariates(params), target_gene=None)
    assert (
        plain.features == {} and plain.targets.empty and not (plain.folder / "embeddings").exists()
    )
    assert (TargetGenes.of(plain)(plain.samples) == -1).all()
    nothing = prepare(
        source, "nothing", covariates=plain_covariates(params), target_gene=None, control=None
    )
    assert (TargetGenes.of(nothing)(nothing.samples) == -1).all()


def test_where_the_tables_came_from_does_not_matter(prepare, source, cohort):
    elsewhere = prepare(source)
    assert (
        elsewhere.manifest == cohort.manifest
        and elsewhere.train_validation_sha256 == cohort.train_validation_sha256
    )
    assert (
        elsewhere.declared.covariates.embeddings() == {"perturbation": TABLE.as_posix()}
        and elsewhere.declared.target_gene == "targets.parquet"
    )


def test_labels_without_features_are_told_and_the_control_needs_none(prepare, source, cohort):
    assert not [note for note in cohort.manifest["notes"] if "features" in note]
    bare = pd.read_parquet(source / TABLE)["perturbation"].iloc[0]
    change(source / TABLE, lambda table: table.iloc[1:])
    assert (
        f"perturbation: no features for {bare}: only their identity is known"
        in prepare(source).manifest["notes"]
    )


# what is refused


def refused(prepare, source, **changes) -> list[str]:
    with pytest.raises(InputError) as caught:
        prepare(source, **changes)
    assert not (source.parent / "cohort" / "manifest.json").exists()
    assert all("\n" not in problem for problem in caught.value.problems)
    return list(caught.value.problems)


def test_every_problem_of_every_table_is_said_at_once(prepare, source):
    change(source / TABLE, lambda table: table.assign(feature_1="text"))
    change(source / "targets.parquet", lambda table: table.assign(gene_id="NOGENE"))
    change(source / "samples.parquet", lambda table: table.assign(age_years="old"))
    found = refused(prepare, source)
    assert len(found) == 3
    assert "age_years: 'old' is not a number" in found[0]
    assert "perturbation.parquet: feature feature_1 holds" in found[1]
    assert "targets.parquet: genes NOGENE are not in" in found[2]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "absent; data.target_gene names it"),
        (lambda path: path.write_bytes(b"gene"), "not a Parquet table"),
        (
            lambda path: change(path, lambda t: t.rename(columns={"gene_id": "gene"})),
            "no column gene_id; expected perturbation and gene_id, found pert",
        ),
        (
            lambda path: change(path, lambda t: pd.concat([t, t.iloc[:1]])),
            "stand twice; expected one target gene each",
        ),
        (
            lambda path: change(path, lambda t: t.assign(gene_id=[["x"]] * len(t))),
            "gene_id: more than one value in a cell",
        ),
    ],
    ids=["absent", "no parquet", "no column", "twice", "lists"],
)
def test_a_bad_table_of_targets_is_one_line(prepare, source, damage, said):
    damage(source / "targets.parquet")
    (problem,) = refused(prepare, source)
    assert problem.startswith(f"{source / 'targets.parquet'}: ") and said in problem


def test_a_target_without_a_gene_is_no_target(prepare, source, cohort):
    change(
        source / "targets.parquet",
        lambda table: table.assign(gene_id=table["gene_id"].where(table.index > 0)),
    )
    assert len(prepare(source).targets) == len(cohort.targets) - 1


def test_an_absent_table_of_an_embedding_is_one_line(prepare, source):
    (source / TABLE).unlink()
    assert refused(prepare, source) == [
        f"{source / TABLE}: absent; data.covariates names it as the table of an embedding"
    ]


# integrity


@pytest.mark.parametrize("name", ["embeddings/perturbation.parquet", "targets.parquet"])
def test_a_changed_table_of_the_cohort_is_refused(cohort, tmp_path, name):
    copy = Path(shutil.copytree(cohort.folder, tmp_path / "copy"))
    change(copy / name, lambda table: table.iloc[::-1])
    with pytest.raises(IntegrityError, match=f"{name}: its sha256 is not the manifest's") as caught:
        Cohort(copy)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "name", ["embeddings/perturbation.parquet", "targets.parquet", "samples.parquet"]
)
def test_a_table_that_the_manifest_does_not_list_is_not_read(cohort, tmp_path, name):
    copy = Path(shutil.copytree(cohort.folder, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["tables"][name]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=rf"manifest\.json: tables: {name}"):
        Cohort(copy)


def test_a_table_outside_the_cohort_is_refused(cohort, tmp_path):
    copy = Path(shutil.copytree(cohort.folder, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tables"]["embeddings/../../outside.parquet"] = "0"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="tables"):
        Cohort(copy)


# identity


@pytest.mark.parametrize("name", [TABLE.as_posix(), "targets.parquet"])
def test_what_tables_tell_moves_the_hash_of_what_is_visible(prepare, source, cohort, name):
    if name == "targets.parquet":
        change(source / name, lambda table: table.iloc[1:])
    else:
        change(source / name, lambda table: table.assign(feature_1=table["feature_1"] + 1))
    assert prepare(source).train_validation_sha256 != cohort.train_validation_sha256


# sizes and replicates


def test_the_sizes_of_the_splits_lie_beside_them(cohort):
    sizes = pd.read_csv(cohort.folder / "sizes.csv")
    assert dict(zip(sizes["split"], sizes["samples"], strict=True)) == cohort.manifest["splits"]
    assert sizes["controls"].sum() == (cohort.samples["perturbation"] == "control").sum()
    assert (sizes.loc[sizes["split"] == "test_perturbation", "perturbations"] == 1).all()


def test_one_sample_under_two_names_on_both_sides_fails_the_stage(prepare, source, cohort):
    from pipeline.gem.data.shards import ShardWriter, read_shard

    genes = pd.read_parquet(source / "genes.parquet")
    (path,) = (source / "counts").glob("*.parquet")
    names, counts = (
        np.concatenate(parts) for parts in zip(*read_shard(path, len(genes)), strict=True)
    )
    one, other = (cohort.rows([split])["sample_id"].iloc[0] for split in ("train", "test_random"))
    counts = counts.copy()
    counts[names == other] = counts[names == one]
    with ShardWriter(source / "counts", "counts", np.dtype(np.uint32)) as writer:
        writer.write(names, counts)
    with pytest.raises(IntegrityError, match="the same counts under two names") as caught:
        prepare(source)
    assert f"{one} (train)" in str(caught.value) and f"{other} (test_random)" in str(caught.value)
    assert not (source.parent / "cohort" / "manifest.json").exists()


def test_a_table_that_no_one_watches_is_said_and_one_beside_the_counts_is_not(
    prepare, params, source, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert not [note for note in prepare(source).manifest["notes"] if "data/tables" in note]
    (tmp_path / "data/tables").mkdir(parents=True)
    for place in ("data/tables", "elsewhere"):
        moved = (
            Path(shutil.copytree(source / "embeddings", tmp_path / place, dirs_exist_ok=True))
            / "perturbation.parquet"
        )
        covariates = params.data.covariates.model_dump(mode="json")
        covariates["perturbation"]["perturbation"]["table"] = str(moved)
        notes = [
            note
            for note in prepare(source, place.replace("/", "-"), covariates=covariates).manifest[
                "notes"
            ]
            if "data/tables" in note
        ]
        assert [note.split(": ")[1] for note in notes] == (
            ["perturbation"] if place == "elsewhere" else []
        )


def test_tables_of_csv_say_the_same_as_those_of_parquet(prepare, cohort, params, source):
    for path in (source / TABLE, source / "targets.parquet"):
        pd.read_parquet(path).to_csv(path.with_suffix(".csv"), index=False)
    covariates = params.data.covariates.model_dump(mode="json")
    covariates["perturbation"]["perturbation"]["table"] = str((source / TABLE).with_suffix(".csv"))
    built = prepare(source, covariates=covariates, target_gene=str(source / "targets.csv"))
    assert built.targets.to_dict() == cohort.targets.to_dict()
    assert built.features["perturbation"].labels == cohort.features["perturbation"].labels
    np.testing.assert_array_equal(
        built.features["perturbation"].values, cohort.features["perturbation"].values
    )
