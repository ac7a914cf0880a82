"""The cohort on disk: whole or refused, training blind to the test, every row once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from support.settings import at_source

from pipeline.gem.common import files
from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.common.files import sha256, sha256_of, write_atomically, write_json
from pipeline.gem.data import shards as shards_module
from pipeline.gem.data import sources
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.shards import ShardWriter, read_shard
from pipeline.gem.data.sources import open_source
from pipeline.gem.data.splits import ROLES, TRAIN, VALIDATIONS, role_of
from pipeline.gem.preparation import prepare
from pipeline.gem.preparation.prepare import write_cohort


@pytest.fixture(scope="module")
def original(source_folder) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    """(samples, counts in the order of the samples, genes) of the synthetic source."""
    samples, genes = (
        pd.read_parquet(source_folder / "samples.parquet"),
        pd.read_parquet(source_folder / "genes.parquet"),
    )
    blocks = [
        block
        for path in sorted((source_folder / "counts").glob("*.parquet"))
        for block in read_shard(path, len(genes))
    ]
    names, counts = (
        np.concatenate([names for names, _ in blocks]),
        np.concatenate([counts for _, counts in blocks]),
    )
    order = pd.Series(np.arange(len(names)), index=names)[samples["sample_id"]].to_numpy()
    return samples, counts[order].astype(np.int64), genes


@pytest.fixture
def build(params, source_folder, original, tmp_path):
    """Prepares a cohort from changed samples and counts of the synthetic source."""

    def of(
        samples: pd.DataFrame | None = None,
        counts: np.ndarray | None = None,
        name: str = "built",
        **changes,
    ) -> Cohort:
        samples = original[0] if samples is None else samples
        counts = original[1] if counts is None else counts
        folder = tmp_path / f"{name}-source"
        folder.mkdir()
        samples.to_parquet(folder / "samples.parquet", index=False)
        original[2].to_parquet(folder / "genes.parquet", index=False)
        with ShardWriter(folder / "counts", "counts", np.dtype(np.int64)) as writer:
            writer.write(samples["sample_id"].to_numpy(), counts)
        declared = params.override(at_source(source_folder)).data.model_dump(mode="json")
        data = Data.model_validate(declared | {"source": str(folder)} | changes)
        write_cohort(open_source(data), data, params.splits, tmp_path / name)
        return Cohort(tmp_path / name)

    return of


@pytest.fixture
def copy(cohort, tmp_path) -> Path:
    """A cohort folder that a test may damage."""
    return Path(shutil.copytree(cohort.folder, tmp_path / "copy"))


def rows_of(cohort: Cohort, splits) -> np.ndarray:
    return np.flatnonzero(cohort.samples["split"].isin(list(splits)).to_numpy())


def kept_genes(cohort: Cohort, genes: pd.DataFrame) -> np.ndarray:
    return genes["gene_id"].isin(cohort.genes).to_numpy()


# what is written


def test_counts_are_those_of_the_source_for_every_split_alone_and_together(cohort, original):
    samples, counts, genes = original
    position = pd.Series(np.arange(len(samples)), index=samples["sample_id"])
    every = list(cohort.manifest["splits"])
    for splits in [[split] for split in every] + [every, every[::-1], ["test_random", TRAIN]]:
        expected = counts[position[cohort.rows(splits)["sample_id"]]][:, kept_genes(cohort, genes)]
        assert np.array_equal(cohort.counts(splits), expected)


def test_every_sample_stands_once_in_the_shards_of_its_role(cohort):
    role = cohort.samples.set_index("sample_id")["split"].map(role_of)
    found = []
    for name, shards in cohort.manifest["shards"].items():
        for shard in shards:
            for names, _ in read_shard(cohort.folder / shard["path"], len(cohort.genes)):
                assert set(role[names]) == {name}
                found += list(names)
    assert sorted(found) == sorted(cohort.samples["sample_id"])


def test_rows_of_a_shard_are_shuffled(cohort):
    names = np.concatenate(
        [
            names
            for shard in cohort.manifest["shards"]["train"]
            for names, _ in read_shard(cohort.folder / shard["path"], len(cohort.genes))
        ]
    )
    assert len(names) > 100 and list(names) != sorted(names)


def test_the_same_source_gives_the_same_bytes(cohort, params, source_folder, tmp_path):
    data = params.override(at_source(source_folder)).data
    write_cohort(open_source(data), data, params.splits, tmp_path / "again")
    for path in sorted(path for path in cohort.folder.rglob("*") if path.is_file()):
        assert sha256(path) == sha256(tmp_path / "again" / path.relative_to(cohort.folder)), path


def test_totals_are_over_all_genes_of_the_source(build, original):
    _, counts, genes = original
    silent = counts.copy()
    silent[3:, :5] = 0  # five genes that hardly any sample counts
    built = build(counts=silent)
    assert len(built.genes) <= len(genes) - 5
    assert built.samples["total"].tolist() == silent.sum(axis=1).tolist()
    expected = log_cpm(
        silent[rows_of(built, [TRAIN])][:, kept_genes(built, genes)],
        silent.sum(axis=1)[rows_of(built, [TRAIN])],
    )
    assert np.array_equal(built.expression([TRAIN]), expected)


@pytest.mark.parametrize(
    ("highest", "dtype"),
    [(200, "uint8"), (255, "uint8"), (256, "uint16"), (65536, "uint32"), (2**24, "uint32")],
)
def test_the_integer_type_is_the_smallest_that_holds_every_count(
    build, original, cohort, highest, dtype
):
    counts = original[1] % 200
    counts[rows_of(cohort, [TRAIN])[0], 0] = highest
    built = build(counts=counts)
    assert built.manifest["integer_type"] == {
        "train": dtype,
        "validation": "uint8",
        "test": "uint8",
    }
    assert built.counts(["test_random"]).dtype == "uint8" and built.counts([TRAIN]).dtype == dtype
    assert built.counts([TRAIN])[0].max() == highest


def test_genes_are_chosen_by_training_samples_alone(build, original, cohort):
    counts = original[1].copy()
    training = np.isin(np.arange(len(counts)), rows_of(cohort, [TRAIN]))
    counts[training, 0], counts[~training, 0] = 0, 50  # loud in tests and validations only
    counts[training, 1], counts[~training, 1] = 50, 0  # loud in training only
    built = build(counts=counts)
    names = original[2]["gene_id"]
    assert names[0] not in built.genes and names[1] in built.genes


def test_no_gene_filter_keeps_every_gene(build, original):
    counts = original[1].copy()
    counts[:, 0] = 0
    assert len(build(counts=counts, min_gene_samples=0).genes) == counts.shape[1]


def test_a_cohort_of_chosen_genes_has_totals_over_all_and_says_what_was_left_out(build, cohort):
    built = build(highly_variable=10)
    targets = set(built.targets[built.targets.index.isin(built.samples["perturbation"])])
    assert targets and targets <= set(built.genes), "whom a perturbation hits is scored"
    assert 10 <= len(built.genes) <= 10 + len(targets) and set(built.genes) < set(cohort.genes)
    assert built.samples["total"].tolist() == cohort.samples["total"].tolist()
    both = np.isin(cohort.genes, built.genes)
    assert np.array_equal(built.expression([TRAIN]), cohort.expression([TRAIN])[:, both])
    assert any(
        "not among the 10 whose Pearson residuals vary most" in note
        for note in built.manifest["notes"]
    )


def test_noise_in_place_of_what_training_never_sees_moves_no_chosen_gene(
    build, original, cohort, rng
):
    counts = original[1].copy()
    others = np.setdiff1d(np.arange(len(counts)), rows_of(cohort, [TRAIN]))
    counts[others] = rng.integers(1, 5000, (len(others), counts.shape[1]))
    assert (
        build(counts=counts, name="noisy", highly_variable=10).genes.tolist()
        == build(name="plain", highly_variable=10).genes.tolist()
    )


def test_a_cohort_of_listed_genes_holds_these_and_whom_perturbations_hit(build, cohort, tmp_path):
    hit = set(cohort.targets[cohort.targets.index.isin(cohort.samples["perturbation"])])
    listed = [name for name in cohort.genes if name not in hit][:3]
    (tmp_path / "genes.txt").write_text("\n".join(listed))
    built = build(gene_list=str(tmp_path / "genes.txt"))
    assert set(built.genes) == {*listed, *(hit & set(cohort.genes))}


def test_unknown_genes_of_a_list_are_told_with_everything_else_that_is_wrong(build, tmp_path):
    (tmp_path / "genes.txt").write_text("nobody\nnothing")
    with pytest.raises(InputError, match="genes nobody, nothing are not in") as caught:
        build(gene_list=str(tmp_path / "genes.txt"), date_column="nowhere")
    assert len(caught.value.problems) == 2


def test_missing_values_are_counted(cohort, original):
    assert cohort.manifest["missing"] == {
        name: int(original[0][name].isna().sum()) for name in cohort.declared.covariates.all()
    }


def test_a_source_without_truth_has_an_empty_truth_folder(build, cohort):
    built = build()
    assert (
        (built.folder / "truth").is_dir()
        and not list((built.folder / "truth").iterdir())
        and built.truth_folder is None
    )
    assert cohort.truth_folder is not None


def test_a_stale_truth_does_not_outlive_a_source_without_one(
    build, params, source_folder, tmp_path
):
    data = params.override(at_source(source_folder)).data
    write_cohort(open_source(data), data, params.splits, tmp_path / "built")
    assert build().truth_folder is None


# samples without counts


def test_a_sample_without_counts_is_refused_by_name(build, original):
    counts = original[1].copy()
    counts[[4, 9]] = 0
    with pytest.raises(
        InputError,
        match=f"samples {original[0]['sample_id'][4]}, {original[0]['sample_id'][9]} have no counts at all",
    ):
        build(counts=counts)


def test_samples_without_counts_are_dropped_and_counted_on_request(build, original):
    counts = original[1].copy()
    counts[[4, 9]] = 0
    built = build(counts=counts, empty_samples="drop")
    assert (
        built.manifest["samples"] == len(counts) - 2
        and "2 samples without any count were dropped" in built.manifest["notes"]
    )
    assert not set(original[0]["sample_id"][[4, 9]]) & set(built.samples["sample_id"])
    assert len(built.counts(list(built.manifest["splits"]))) == len(counts) - 2


def test_counts_in_left_out_genes_alone_still_give_a_finite_expression(build, original, cohort):
    counts = original[1].copy()
    row = rows_of(cohort, [TRAIN])[0]
    counts[:, 0] = 0
    counts[row] = 0
    counts[row, 0] = 7
    built = build(counts=counts)
    assert original[2]["gene_id"][0] not in built.genes
    assert not built.expression([TRAIN])[0].any()


# the test stays unseen


def test_training_and_validation_open_no_test_shard(copy):
    for path in (copy / "counts").glob("test-*.parquet"):
        path.unlink()
    opened = Cohort(copy)
    assert len(opened.expression([TRAIN])) == opened.manifest["splits"][TRAIN]
    assert len(opened.expression(["validation"])) == opened.manifest["splits"]["validation"]
    with pytest.raises(IntegrityError, match=r"test-00000\.parquet: absent"):
        opened.expression(["test_random"])


@pytest.mark.parametrize("highest", [5, 1000], ids=["few counts", "more than any other"])
def test_noise_in_place_of_test_samples_moves_nothing_that_training_sees(
    build, original, cohort, rng, highest
):
    counts = original[1] % 200  # one byte each, so that a higher count needs another integer type
    plain = build(counts=counts.copy(), name="plain")
    tests = rows_of(cohort, ROLES["test"])
    counts[tests] = rng.integers(0, highest, (len(tests), counts.shape[1])) + 1
    noisy = build(counts=counts, name="noisy")
    assert not np.array_equal(plain.counts(["test_random"]), noisy.counts(["test_random"]))
    assert noisy.genes.tolist() == plain.genes.tolist()
    for split in (TRAIN, "validation", "validation_combination"):
        assert np.array_equal(noisy.expression([split]), plain.expression([split]))
    assert noisy.train_validation_sha256 == plain.train_validation_sha256


def test_metadata_of_a_test_sample_do_not_move_the_hash_of_what_is_visible(build, original, cohort):
    samples = original[0].copy()
    row = rows_of(cohort, ["test_random"])[0]
    samples.loc[row, "age_years"] = 33.0
    assert (
        build(name="plain").train_validation_sha256
        == build(samples, name="other").train_validation_sha256
    )


@pytest.mark.parametrize("change", ["count", "age_years", "sex", "total"])
@pytest.mark.parametrize("split", [TRAIN, "validation"])
def test_whatever_training_or_a_choice_sees_moves_the_hash_of_what_is_visible(
    build, original, cohort, change, split
):
    samples, counts = original[0].copy(), original[1].copy()
    row = rows_of(cohort, [split])[0]
    # A gene that no cohort keeps still counts in the totals.
    counts[:, 1] = 0
    plain = build(counts=counts.copy(), name="plain")
    if change == "count":
        counts[row, 0] += 1
    elif change == "total":
        counts[row, 1] += 1
    else:
        samples.loc[row, change] = {
            "age_years": 33.25,
            "sex": "male" if samples.loc[row, "sex"] != "male" else "female",
        }[change]
    other = build(samples, counts, name="other")
    assert plain.samples["split"].tolist() == other.samples["split"].tolist()
    assert plain.train_validation_sha256 != other.train_validation_sha256


# integrity


FILES = [
    "samples.parquet",
    "genes.parquet",
    "splits.parquet",
    "counts/train-00000.parquet",
    "counts/validation-00000.parquet",
    "counts/test-00000.parquet",
]


def read_everything(folder: Path) -> None:
    opened = Cohort(folder)
    opened.expression(list(opened.manifest["splits"]))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "absent", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(copy, name, damage):
    path = copy / name
    content = bytearray(path.read_bytes())
    if damage == "absent":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(
            {"flipped": bytes(content), "truncated": path.read_bytes()[:-7], "empty": b""}[damage]
        )
    with pytest.raises(IntegrityError, match=name.replace("/", ".")):
        read_everything(copy)


def test_a_table_that_was_rewritten_is_named(copy):
    samples = pd.read_parquet(copy / "samples.parquet")
    samples.assign(tissue=samples["tissue"].iloc[::-1].to_numpy()).to_parquet(
        copy / "samples.parquet", index=False
    )
    with pytest.raises(IntegrityError, match=r"samples\.parquet"):
        Cohort(copy)


def test_a_cohort_without_a_manifest_is_not_there(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest\.json: absent"):
        Cohort(copy)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"format_version": 99}', '{"format_version": 1}', "\x00"],
)
def test_a_broken_manifest_or_another_format_is_refused_by_name(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        Cohort(copy)


def test_a_manifest_that_points_outside_the_cohort_reads_nothing_there(copy, tmp_path):
    manifest = json.loads((copy / "manifest.json").read_text())
    shard = manifest["shards"]["train"][0]
    shutil.copy(copy / shard["path"], tmp_path / "outside.parquet")
    shard["path"] = "../outside.parquet"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError):
        Cohort(copy).counts([TRAIN])


def test_the_manifest_is_written_last_and_not_at_all_after_a_failure(
    params, source_folder, tmp_path, monkeypatch
):
    data = params.override(at_source(source_folder)).data
    there = []

    def seen(path: Path, value: object) -> None:
        there.extend(
            sorted(str(file.relative_to(path.parent)) for file in path.parent.rglob("*.parquet"))
        )
        raise OSError("No space left on device")

    monkeypatch.setattr(prepare, "write_json", seen)
    with pytest.raises(OSError, match="No space"):
        write_cohort(open_source(data), data, params.splits, tmp_path / "cohort")
    assert set(FILES) <= set(there)
    with pytest.raises(InputError, match="absent"):
        Cohort(tmp_path / "cohort")


def test_a_failure_while_rewriting_leaves_no_cohort_that_reads_as_whole(
    build, params, source_folder, monkeypatch
):
    folder = build().folder
    data = params.override(at_source(source_folder)).data

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_shuffle_into", fail)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(open_source(data), data, params.splits.model_copy(update={"seed": 99}), folder)
    monkeypatch.undo()
    assert not list(folder.parent.glob(".shuffle-*"))
    try:
        opened = Cohort(folder)
        opened.counts(list(opened.manifest["splits"]))
    except (InputError, IntegrityError):
        return
    # Where it still reads, it is the old cohort, whole.
    assert opened.manifest["samples"] == len(opened.samples)


def test_shards_of_an_earlier_cohort_do_not_stay_beside_the_new_ones(
    build, params, source_folder, monkeypatch
):
    folder = build().folder
    shutil.copy(
        folder / "counts" / "train-00000.parquet", folder / "counts" / "train-00007.parquet"
    )
    data = params.override(at_source(source_folder)).data
    manifest = write_cohort(open_source(data), data, params.splits, folder)
    listed = {shard["path"] for shards in manifest["shards"].values() for shard in shards}
    assert {str(path.relative_to(folder)) for path in (folder / "counts").iterdir()} == listed


# shuffling and streaming


@pytest.mark.parametrize("buckets", [2, 7])
def test_shuffling_in_several_buckets_keeps_every_row_once_and_its_counts(
    params, source_folder, cohort, tmp_path, monkeypatch, buckets
):
    rows, genes = cohort.manifest["splits"][TRAIN], len(cohort.genes)
    monkeypatch.setattr(prepare, "SHUFFLE_VALUES", rows * genes // buckets)
    data = params.override(at_source(source_folder)).data
    write_cohort(open_source(data), data, params.splits, tmp_path / "cohort")
    shuffled = Cohort(tmp_path / "cohort")
    every = list(cohort.manifest["splits"])
    assert np.array_equal(shuffled.counts(every), cohort.counts(every))
    names = np.concatenate(
        [
            names
            for shard in shuffled.manifest["shards"]["train"]
            for names, _ in read_shard(shuffled.folder / shard["path"], genes)
        ]
    )
    assert sorted(names) == sorted(cohort.rows([TRAIN])["sample_id"]) and list(names) != sorted(
        names
    )
    assert not list(tmp_path.glob(".shuffle-*"))


def test_a_bucket_that_no_row_falls_into_does_not_matter(
    params, source_folder, cohort, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        prepare, "SHUFFLE_VALUES", 3 * len(cohort.genes)
    )  # about three rows a bucket: some stay empty
    data = params.override(at_source(source_folder)).data
    write_cohort(open_source(data), data, params.splits, tmp_path / "cohort")
    assert np.array_equal(Cohort(tmp_path / "cohort").counts([TRAIN]), cohort.counts([TRAIN]))


def test_small_shards_hold_the_same_rows(params, source_folder, cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_VALUES", 50 * len(cohort.genes))
    monkeypatch.setattr(prepare, "SHUFFLE_VALUES", 50 * len(cohort.genes))
    data = params.override(at_source(source_folder)).data
    write_cohort(open_source(data), data, params.splits, tmp_path / "cohort")
    small = Cohort(tmp_path / "cohort")
    assert len(small.manifest["shards"]["train"]) > 2
    assert np.array_equal(small.counts([TRAIN, *VALIDATIONS]), cohort.counts([TRAIN, *VALIDATIONS]))


def test_an_h5ad_is_read_in_chunks_of_bounded_size(original, params, tmp_path, monkeypatch):
    import anndata

    samples, counts, genes = original
    obs = samples.set_index("sample_id").drop(columns="study_date")
    anndata.AnnData(
        X=counts.astype(np.float32), obs=obs, var=genes.set_index("gene_id")
    ).write_h5ad(tmp_path / "source.h5ad")
    monkeypatch.setattr(sources, "CHUNK_VALUES", 7 * len(genes))
    data = Data.model_validate(
        params.data.model_dump(mode="json")
        | {"source": str(tmp_path / "source.h5ad"), "date_column": None}
    )
    chunks = list(open_source(data).chunks())
    assert max(len(rows) for rows, _ in chunks) == 7
    assert np.concatenate([rows for rows, _ in chunks]).tolist() == list(range(len(samples)))
    assert np.array_equal(np.concatenate([block for _, block in chunks]), counts)


def test_a_shard_is_read_one_row_group_at_a_time(tmp_path):
    with ShardWriter(tmp_path, "x", np.dtype(np.uint8)) as writer:
        writer.write(np.array([f"s{number}" for number in range(2500)]), np.ones((2500, 3)))
    assert pq.ParquetFile(tmp_path / "x-00000.parquet").num_row_groups == 3
    assert [len(names) for names, _ in read_shard(tmp_path / "x-00000.parquet", 3)] == [
        1024,
        1024,
        452,
    ]


def test_a_large_row_group_is_read_in_bounded_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "ROW_GROUP", 10**6)
    with ShardWriter(tmp_path, "x", np.dtype(np.uint8)) as writer:
        writer.write(
            np.array([f"s{number}" for number in range(50)]), np.arange(150).reshape(50, 3)
        )
    monkeypatch.setattr(shards_module, "BATCH_VALUES", 60)
    blocks = list(read_shard(tmp_path / "x-00000.parquet", 3))
    assert pq.ParquetFile(tmp_path / "x-00000.parquet").num_row_groups == 1
    assert [len(names) for names, _ in blocks] == [20, 20, 10]
    assert np.array_equal(
        np.concatenate([counts for _, counts in blocks]), np.arange(150).reshape(50, 3)
    )


def test_a_shard_with_another_number_of_genes_is_refused_with_its_row(tmp_path):
    with ShardWriter(tmp_path, "x", np.dtype(np.uint8)) as writer:
        writer.write(np.array(["a", "b"]), np.ones((2, 3)))
    with pytest.raises(
        IntegrityError,
        match=r"x-00000\.parquet: row 0 has 3 counts; expected one for each of 4 genes",
    ):
        list(read_shard(tmp_path / "x-00000.parquet", 4))


# storage


def test_an_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "deep" / "file.bin"
    for content in (b"long content", b"short", b""):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_an_atomic_write_keeps_the_mode_of_the_file(tmp_path, mode):
    write_atomically(tmp_path / "file", b"old")
    (tmp_path / "file").chmod(mode)
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("failure", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), KeyboardInterrupt()],
    ids=["disk full", "interrupt"],
)
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, failure, error
):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(files.os, failure, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_json_with_a_number_that_is_not_finite_is_refused_and_the_old_file_stays(tmp_path, value):
    write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"a": value})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": 1}


def test_a_hash_of_values_does_not_depend_on_the_order_of_keys_but_on_that_of_lists():
    assert sha256_of({"a": 1, "b": [1, 2]}) == sha256_of({"b": [1, 2], "a": 1})
    assert sha256_of([1, 2]) != sha256_of([2, 1]) and sha256_of("ab", "c") != sha256_of("a", "bc")
