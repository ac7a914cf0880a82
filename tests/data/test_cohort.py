"""The cohort on disk: complete or an error, training independent of the test splits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.settings import at_source

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.common.files import sha256
from pipeline.gem.data import shards
from pipeline.gem.data.cohort import Cohort, with_checksum
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.labels import label_texts
from pipeline.gem.data.shards import ShardWriter, read_shard
from pipeline.gem.data.sources import checked_chunks, open_source
from pipeline.gem.data.splits import SPLIT_ROLES, TRAIN, VALIDATIONS, role_of
from pipeline.gem.preparation import prepare, shuffle
from pipeline.gem.preparation.prepare import write_cohort


@pytest.fixture(scope="session")
def data(params, source_folder) -> Data:
    return params.override(at_source(source_folder)).data


@pytest.fixture(scope="session")
def original(data) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    """(samples, counts in the order of the samples, genes) of the synthetic source."""
    source = open_source(data)
    counts = np.empty((len(source.samples), len(source.genes)), dtype=np.int64)
    for rows, block in checked_chunks(source, "source"):
        counts[rows] = block
    return source.samples, counts, source.genes


@pytest.fixture
def build(data, params, original, tmp_path):
    """Prepares a cohort from changed samples and counts of the synthetic source."""

    def prepare_changed(samples=None, counts=None, name: str = "built", **changes) -> Cohort:
        samples = original[0] if samples is None else samples
        counts = original[1] if counts is None else counts
        folder = tmp_path / f"{name}-source"
        folder.mkdir()
        samples.to_parquet(folder / "samples.parquet", index=False)
        original[2].to_parquet(folder / "genes.parquet", index=False)
        with ShardWriter(folder / "counts", "counts", np.dtype(np.int64)) as writer:
            writer.write(samples["sample_id"].to_numpy(), counts)
        values = data.model_dump(mode="json") | {"source": str(folder)} | changes
        changed = Data.model_validate(values)
        write_cohort(open_source(changed), changed, params.splits, tmp_path / name)
        return Cohort(tmp_path / name)

    return prepare_changed


@pytest.fixture
def write(data, params, tmp_path):
    """Prepares the synthetic source as it is."""

    def prepare_source() -> Cohort:
        write_cohort(open_source(data), data, params.splits, tmp_path / "cohort")
        return Cohort(tmp_path / "cohort")

    return prepare_source


@pytest.fixture
def copy(cohort, tmp_path) -> Path:
    """A cohort folder that a test may damage."""
    return Path(shutil.copytree(cohort.folder, tmp_path / "copy"))


def rows_of(cohort: Cohort, splits) -> np.ndarray:
    """Positions in the source, whose samples are in the order of their names."""
    order = np.argsort(cohort.samples["sample_id"].to_numpy(dtype=str))
    return np.flatnonzero(cohort.samples["split"].iloc[order].isin(list(splits)).to_numpy())


def source_order(cohort: Cohort, splits) -> np.ndarray:
    """Positions of the rows of the splits that put them into the order of the source."""
    return np.argsort(cohort.rows(list(splits))["sample_id"].to_numpy(dtype=str))


def totals_of(cohort: Cohort) -> list[int]:
    """In the order of the source."""
    every = list(cohort.manifest["splits"])
    return cohort.samples["total"].iloc[source_order(cohort, every)].tolist()


def kept_genes(cohort: Cohort, genes: pd.DataFrame) -> np.ndarray:
    return genes["gene_id"].isin(cohort.genes).to_numpy()


def names_in_shards(cohort: Cohort, role: str) -> list[str]:
    paths = [cohort.folder / name for name in cohort.manifest["shards"][role]]
    batches = (batch for path in paths for batch in read_shard(path, len(cohort.genes)))
    return [name for names, _ in batches for name in names]


# content


def test_counts_are_those_of_the_source_for_any_splits(cohort, original):
    samples, counts, genes = original
    position = pd.Series(np.arange(len(samples)), index=samples["sample_id"])
    every = list(cohort.manifest["splits"])
    for splits in [[split] for split in every] + [every, every[::-1], ["test_random", TRAIN]]:
        rows = position[cohort.rows(splits)["sample_id"]]
        assert np.array_equal(cohort.counts(splits), counts[rows][:, kept_genes(cohort, genes)])


def test_every_sample_is_once_in_the_shards_of_its_role_in_random_order(cohort):
    roles = cohort.samples.set_index("sample_id")["split"].map(role_of)
    for role in SPLIT_ROLES:
        names, expected = names_in_shards(cohort, role), sorted(roles.index[roles == role])
        assert sorted(names) == expected != names


def test_the_same_source_gives_the_same_bytes(cohort, write):
    again = write()
    for path in sorted(path for path in cohort.folder.rglob("*") if path.is_file()):
        assert sha256(path) == sha256(again.folder / path.relative_to(cohort.folder)), path


def test_totals_are_over_all_genes_of_the_source(build, original):
    _, counts, genes = original
    silent = counts.copy()
    silent[3:, :5] = 0  # five genes without counts in almost all samples
    built = build(counts=silent)
    totals, rows = silent.sum(axis=1), rows_of(built, [TRAIN])
    assert len(built.genes) <= len(genes) - 5
    assert totals_of(built) == totals.tolist()
    expected = log_cpm(silent[rows][:, kept_genes(built, genes)], totals[rows])
    assert np.array_equal(built.expression([TRAIN])[source_order(built, [TRAIN])], expected)


@pytest.mark.parametrize(
    ("highest", "dtype"),
    [(200, "uint8"), (255, "uint8"), (256, "uint16"), (65536, "uint32"), (2**24, "uint32")],
)
def test_the_integer_type_is_the_smallest_that_holds_every_count_of_a_role(
    build, original, cohort, highest, dtype
):
    counts = original[1] % 200
    counts[rows_of(cohort, [TRAIN])[0], 0] = highest
    built = build(counts=counts)
    expected = {"train": dtype, "validation": "uint8", "test": "uint8"}
    assert built.manifest["integer_type"] == expected
    assert built.counts(["test_random"]).dtype == "uint8" and built.counts([TRAIN]).dtype == dtype
    assert built.counts([TRAIN])[source_order(built, [TRAIN])[0]].max() == highest


def test_genes_are_filtered_by_training_samples_alone(build, original, cohort):
    counts = original[1].copy()
    training = np.isin(np.arange(len(counts)), rows_of(cohort, [TRAIN]))
    counts[training, 0], counts[~training, 0] = 0, 50
    counts[training, 1], counts[~training, 1] = 50, 0
    genes, (first, second) = build(counts=counts).genes, original[2]["gene_id"][:2]
    assert first not in genes and second in genes


def test_without_a_filter_every_gene_is_kept(build, original):
    counts = original[1].copy()
    counts[:, 0] = 0
    assert len(build(counts=counts, min_gene_samples=0).genes) == counts.shape[1]


def test_highly_variable_genes_include_targets_and_leave_totals_and_log_cpm(build, cohort):
    built = build(highly_variable=10)
    targets = set(built.targets[built.targets.index.isin(built.samples["perturbation"])])
    assert targets and targets <= set(built.genes) < set(cohort.genes)
    assert 10 <= len(built.genes) <= 10 + len(targets)
    assert built.samples["total"].tolist() == cohort.samples["total"].tolist()
    both = np.isin(cohort.genes, built.genes)
    assert np.array_equal(built.expression([TRAIN]), cohort.expression([TRAIN])[:, both])
    note = "not among the 10 with the highest variance of Pearson residuals"
    assert any(note in message for message in built.manifest["notes"])


def test_highly_variable_genes_depend_on_training_samples_alone(build, original, cohort, rng):
    counts = original[1].copy()
    others = np.setdiff1d(np.arange(len(counts)), rows_of(cohort, [TRAIN]))
    counts[others] = rng.integers(1, 5000, (len(others), counts.shape[1]))
    noisy = build(counts=counts, name="noisy", highly_variable=10)
    assert noisy.genes.tolist() == build(name="plain", highly_variable=10).genes.tolist()


def test_a_gene_list_is_kept_with_the_targets(build, cohort, tmp_path):
    targets = set(cohort.targets[cohort.targets.index.isin(cohort.samples["perturbation"])])
    listed = [name for name in cohort.genes if name not in targets][:3]
    (tmp_path / "genes.txt").write_text("\n".join(listed))
    built = build(gene_list=str(tmp_path / "genes.txt"))
    assert set(built.genes) == {*listed, *(targets & set(cohort.genes))}


def test_unknown_genes_of_a_list_are_reported_with_all_other_problems(build, tmp_path):
    (tmp_path / "genes.txt").write_text("nobody\nnothing")
    with pytest.raises(InputError, match="genes nobody, nothing are not in") as caught:
        build(gene_list=str(tmp_path / "genes.txt"), date_column="nowhere")
    assert len(caught.value.problems) == 2


def test_missing_values_are_counted(cohort, original):
    names = cohort.declared.covariates.all()
    expected = {name: int(original[0][name].isna().sum()) for name in names}
    assert cohort.manifest["missing"] == expected


def test_the_truth_is_that_of_the_source_or_empty(write, build, cohort, tmp_path):
    assert cohort.truth_folder is not None
    write()
    built = build(name="cohort")  # over a cohort with a truth
    assert built.folder == tmp_path / "cohort" and built.truth_folder is None
    assert not list((built.folder / "truth").iterdir())


# samples without counts


def test_samples_without_counts_are_errors_or_dropped(build, original):
    counts, empty = original[1].copy(), original[0]["sample_id"][[4, 9]].tolist()
    counts[[4, 9]] = 0
    with pytest.raises(InputError, match=f"samples {', '.join(empty)} have no counts at all"):
        build(counts=counts, name="refused")
    built = build(counts=counts, empty_samples="drop")
    assert built.manifest["samples"] == len(counts) - 2
    assert "2 samples without any count were dropped" in built.manifest["notes"]
    assert not set(empty) & set(built.samples["sample_id"])
    assert len(built.counts(list(built.manifest["splits"]))) == len(counts) - 2


def test_a_sample_with_counts_in_removed_genes_alone_has_zero_log_cpm(build, original, cohort):
    counts, row = original[1].copy(), rows_of(cohort, [TRAIN])[0]
    counts[:, 0] = 0
    counts[row] = 0
    counts[row, 0] = 7
    built = build(counts=counts)
    assert original[2]["gene_id"][0] not in built.genes
    assert not built.expression([TRAIN])[source_order(built, [TRAIN])[0]].any()


# the sealed test split


def test_training_and_validation_open_no_test_shard(copy):
    for path in (copy / "counts").glob("test-*.parquet"):
        path.unlink()
    opened = Cohort(copy)
    for split in (TRAIN, "validation"):
        assert len(opened.expression([split])) == opened.manifest["splits"][split]
    with pytest.raises(IntegrityError, match=r"test-00000\.parquet: absent"):
        opened.expression(["test_random"])


@pytest.mark.parametrize("highest", [5, 1000], ids=["low counts", "highest counts"])
def test_noise_in_place_of_test_samples_changes_nothing_in_training(
    build, original, cohort, rng, highest
):
    counts = original[1] % 200  # one byte each: a higher count needs another integer type
    plain = build(counts=counts.copy(), name="plain")
    tests = rows_of(cohort, SPLIT_ROLES["test"])
    counts[tests] = rng.integers(0, highest, (len(tests), counts.shape[1])) + 1
    noisy = build(counts=counts, name="noisy")
    assert not np.array_equal(plain.counts(["test_random"]), noisy.counts(["test_random"]))
    assert noisy.genes.tolist() == plain.genes.tolist()
    for split in (TRAIN, "validation", "validation_combination"):
        assert np.array_equal(noisy.expression([split]), plain.expression([split]))
    assert noisy.train_validation_sha256 == plain.train_validation_sha256


def test_metadata_of_a_test_sample_do_not_change_the_training_hash(build, original, cohort):
    samples = original[0].copy()
    samples.loc[rows_of(cohort, ["test_random"])[0], "age_years"] = 33.0
    plain, other = build(name="plain"), build(samples, name="other")
    assert plain.train_validation_sha256 == other.train_validation_sha256


@pytest.mark.parametrize("change", ["count", "age_years", "sex", "total"])
@pytest.mark.parametrize("split", [TRAIN, "validation"])
def test_any_change_of_training_or_validation_changes_the_training_hash(
    build, original, cohort, change, split
):
    samples, counts = original[0].copy(), original[1].copy()
    row = rows_of(cohort, [split])[0]
    counts[:, 1] = 0  # a gene that the cohort does not keep counts in the totals
    plain = build(counts=counts.copy(), name="plain")
    match change:
        case "count":
            counts[row, 0] += 1
        case "total":
            counts[row, 1] += 1
        case "age_years":
            samples.loc[row, change] = 33.25
        case "sex":
            samples.loc[row, change] = "female" if samples.loc[row, "sex"] == "male" else "male"
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


@pytest.mark.parametrize("damage", ["flipped", "truncated", "absent", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_an_error_with_its_path(copy, name, damage):
    path = copy / name
    content = bytearray(path.read_bytes())
    match damage:
        case "flipped":
            content[len(content) // 2] ^= 1
        case "truncated":
            content = content[:-7]
        case "empty":
            content = b""
    path.write_bytes(content)
    if damage == "absent":
        path.unlink()
    with pytest.raises(IntegrityError, match=name.replace("/", ".")):
        opened = Cohort(copy)
        opened.expression(list(opened.manifest["splits"]))


def test_a_cohort_without_a_manifest_is_absent(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest\.json: absent"):
        Cohort(copy)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"format_version": 99}', '{"format_version": 3}', "\x00"],
)
def test_an_invalid_manifest_or_another_format_is_an_error(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        Cohort(copy)


def test_a_manifest_cannot_name_a_file_outside_of_the_cohort(copy, tmp_path):
    manifest = json.loads((copy / "manifest.json").read_text())
    shards = manifest["shards"]["train"]
    name, shard = shards.popitem()
    shutil.copy(copy / name, tmp_path / "outside.parquet")
    shards["../outside.parquet"] = shard
    (copy / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    with pytest.raises(IntegrityError, match="shards"):
        Cohort(copy)


def test_the_manifest_is_written_last_and_not_after_a_failure(write, tmp_path, monkeypatch):
    written = []

    def fail(path: Path, _) -> None:
        written.extend(str(file.relative_to(path.parent)) for file in path.parent.rglob("*.*"))
        raise OSError("No space left on device")

    monkeypatch.setattr(prepare, "write_json", fail)
    with pytest.raises(OSError, match="No space"):
        write()
    assert set(FILES) <= set(written)
    with pytest.raises(InputError, match="absent"):
        Cohort(tmp_path / "cohort")


def test_a_failure_while_rewriting_leaves_the_earlier_cohort(data, params, write, monkeypatch):
    folder = write().folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other_splits = params.splits.model_copy(update={"seed": 99})

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shuffle, "_write_shuffled", fail)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(open_source(data), data, other_splits, folder)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not list(folder.parent.glob(".*"))


def test_shards_of_an_earlier_cohort_are_removed(write):
    folder = write().folder
    shutil.copy(folder / "counts/train-00000.parquet", folder / "counts/train-00007.parquet")
    listed = [name for shards in write().manifest["shards"].values() for name in shards]
    paths = (folder / "counts").iterdir()
    assert sorted(str(path.relative_to(folder)) for path in paths) == sorted(listed)


# shuffling


@pytest.mark.parametrize("rows", [3, 70, 200], ids=["some buckets empty", "several", "few"])
def test_shuffling_in_buckets_keeps_every_row_and_its_counts(write, cohort, monkeypatch, rows):
    monkeypatch.setattr(shuffle, "SHUFFLE_VALUES", rows * len(cohort.genes))
    monkeypatch.setattr(shards, "SHARD_VALUES", 50 * len(cohort.genes))
    shuffled = write()
    every = list(cohort.manifest["splits"])
    for splits in (every, list(VALIDATIONS)):
        both = (built.counts(splits)[source_order(built, splits)] for built in (shuffled, cohort))
        assert np.array_equal(*both)
    assert len(shuffled.manifest["shards"]["train"]) > 1
    names = names_in_shards(shuffled, "train")
    assert names == shuffled.rows([TRAIN])["sample_id"].tolist() != sorted(names)
    assert sorted(names) == sorted(cohort.rows([TRAIN])["sample_id"])


def test_text_is_held_as_categories_with_the_values_of_the_file(cohort):
    """At a million samples the objects of text columns would outweigh all other tables."""
    written = pd.read_parquet(cohort.folder / "samples.parquet")
    text = [name for name in written.select_dtypes(object) if name != "sample_id"]
    assert {"study", "tissue", "perturbation"} <= set(text)
    assert all(isinstance(cohort.samples[name].dtype, pd.CategoricalDtype) for name in text)
    for name in text:
        assert label_texts(cohort.samples[name]).tolist() == label_texts(written[name]).tolist()
