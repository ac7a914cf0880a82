"""From a source to the cohort on disk: validation, splits, totals, chosen genes, shuffled shards, manifest last."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Control, Data, Splits
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.common.files import sha256, sha256_of, write_json
from pipeline.gem.common.progress import Progress
from pipeline.gem.data.cohort import FORMAT_VERSION, TARGETS, embedding_file
from pipeline.gem.data.encoder import clean_samples
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.data.labels import label_texts, list_cells
from pipeline.gem.data.shards import ShardWriter, read_shard
from pipeline.gem.data.sources import Source, check_counts, check_unique
from pipeline.gem.data.splits import ROLES, role_of, sizes, unreadable_dates
from pipeline.gem.preparation.annotations import (
    declared_in_cohort,
    read_knowledge,
    targets_of,
    unwatched_tables,
    write_knowledge,
)
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.gene_selection import read_gene_list, select_genes
from pipeline.gem.preparation.leakage import audit_entities, audit_replicates
from pipeline.gem.preparation.qc import summarise_counts

SHUFFLE_VALUES = 2**27  # counts shuffled in memory at a time: 512 MB
RESERVED = ("total", "split")  # columns that the cohort adds to its samples


def write_cohort(source: Source, data: Data, params: Splits, folder: Path) -> dict:
    """Validates a source and writes the cohort; gives the manifest. InputError or IntegrityError where it cannot."""
    samples, features, targets, listed = validate_tables(source, data)
    split, notes = assign_splits(samples, data, params)
    audit_entities(samples, split, data)
    census = summarise_counts(source, split.map(role_of).to_numpy(), data)
    audit_replicates(samples["sample_id"].to_numpy(), split, census.fingerprints)
    samples.insert(len(samples.columns), "total", census.totals)
    kept = census.totals > 0
    if not kept.all():
        notes.append(_empty_samples(samples["sample_id"][~kept], data))
        audit_entities(samples[kept], split[kept], data)
    genes, notes_on_genes = select_genes(
        source, census, listed, targets_of(samples[kept], targets, data), data
    )
    notes += notes_on_genes + unwatched_tables(data)

    _empty_folder(folder)
    # A type for each role: a loud test sample must not move the bytes that training reads.
    dtypes = {
        role: np.min_scalar_type(int(highest[genes].max()))
        for role, highest in census.highest.items()
    }
    rows_of_role = {
        role: np.flatnonzero(kept & split.isin(ROLES[role]).to_numpy()) for role in ROLES
    }
    shards = write_shards(source, data, genes, rows_of_role, dtypes, params.seed, folder / "counts")
    samples[kept].to_parquet(folder / "samples.parquet", index=False)
    source.genes[genes].to_parquet(folder / "genes.parquet", index=False)
    pd.DataFrame({"sample_id": samples["sample_id"], "split": split})[kept].to_parquet(
        folder / "splits.parquet", index=False
    )
    sizes(samples[kept], split[kept], data).to_csv(folder / "sizes.csv", index=False)
    notes += write_knowledge(features, targets, samples[kept], data, folder)
    _copy_truth(Path(data.source) / "truth", folder / "truth")
    tables = [
        "samples.parquet",
        "genes.parquet",
        "splits.parquet",
        TARGETS,
        *map(embedding_file, features),
    ]
    manifest = {
        "format_version": FORMAT_VERSION,
        "samples": int(kept.sum()),
        "genes": int(genes.sum()),
        "gene_list_sha256": sha256_of(source.genes["gene_id"][genes].tolist()),
        "integer_type": {role: dtype.name for role, dtype in dtypes.items()},
        "declared": declared_in_cohort(data),
        "splits": {
            name: int(number) for name, number in split[kept].value_counts().sort_index().items()
        },
        "missing": {name: int(samples[name][kept].isna().sum()) for name in data.covariates.all()},
        "notes": notes,
        "tables": {name: sha256(folder / name) for name in tables},
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def _empty_folder(folder: Path) -> None:
    """Removes an earlier cohort, its manifest first: what is left of it at any moment does not read as whole."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for name in ("counts", "embeddings"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    folder.mkdir(parents=True, exist_ok=True)


def validate_tables(
    source: Source, data: Data
) -> tuple[pd.DataFrame, dict[str, FeatureTable], pd.DataFrame, list[str] | None]:
    """(samples with cleaned covariates, features of each embedding, targets, listed genes); InputError lists everything wrong at once."""
    where = data.source
    problems = [
        f"{where}: no {what}; expected one at least"
        for what, table in (("samples", source.samples), ("genes", source.genes))
        if not len(table)
    ]
    problems += check_unique(source.samples, "sample_id", f"{where}: samples") + check_unique(
        source.genes, "gene_id", f"{where}: genes"
    )
    problems += [
        f"{where}: a column named {name}; rename it: the cohort writes a column of that name"
        for name in RESERVED
        if name in source.samples
    ]
    problems += _named_column_problems(source.samples, data, where)
    try:
        samples = clean_samples(source.samples, data.covariates, where)
    except InputError as error:
        problems += error.problems
    try:
        features, targets = read_knowledge(source, data)
    except InputError as error:
        problems += error.problems
    try:
        listed = None if data.gene_list is None else read_gene_list(data, source.genes["gene_id"])
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(*problems)
    return samples, features, targets, listed


def _named_column_problems(samples: pd.DataFrame, data: Data, where: str) -> list[str]:
    """What is wrong with the columns that params.yaml names beside the covariates."""
    named = {f"data.context_columns: {name}": name for name in data.context_columns}
    named |= {"data.date_column": data.date_column, "data.study_column": data.study_column}
    named |= {"data.control.column": data.control.column if data.control else None}
    problems = []
    for key, name in named.items():
        if name is None:
            continue
        if name not in samples:
            problems.append(
                f"{where}: {key}: no column {name}{did_you_mean(name, samples.columns)}"
            )
        elif lists := list_cells(samples[name], f"{where}: {name}"):
            problems += (
                [] if name in data.covariates.all() else lists
            )  # clean_samples tells those of covariates
        elif key == "data.date_column":
            problems += unreadable_dates(samples[name], f"{where}: {name}")
        elif key == "data.control.column":
            problems += _control_problems(label_texts(samples[name]), data.control, where)
    return problems


def _control_problems(labels: pd.Series, control: Control, where: str) -> list[str]:
    if (labels == control.value).any():
        return []
    known = labels.dropna().unique()
    return [
        f"{where}: data.control.value: no sample has {control.column} = {control.value}{did_you_mean(control.value, known)}"
    ]


def _empty_samples(names: pd.Series, data: Data) -> str:
    if data.empty_samples == "refuse":
        raise InputError(
            f"{data.source}: samples {examples(names)} have no counts at all; remove them, or set data.empty_samples to drop"
        )
    return f"{len(names)} samples without any count were dropped"


def write_shards(
    source: Source,
    data: Data,
    genes: np.ndarray,
    rows_of_role: dict[str, np.ndarray],
    dtypes: dict[str, np.dtype],
    seed: int,
    folder: Path,
) -> dict[str, list[dict]]:
    """Counts of each role in shuffled order, in memory of one bucket: rows go to random buckets, then each is shuffled."""
    rng = np.random.default_rng(seed)
    width = int(genes.sum())
    bucket_of, buckets = np.full(len(source.samples), -1), []
    for role, rows in rows_of_role.items():
        number = -(-len(rows) * width // SHUFFLE_VALUES)
        bucket_of[rows] = len(buckets) + rng.integers(0, max(number, 1), len(rows))
        buckets += [role] * number
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".shuffle-") as scratch:
        writers = [
            ShardWriter(Path(scratch) / str(index), "bucket", dtypes[role])
            for index, role in enumerate(buckets)
        ]
        _fill_buckets(source, data, genes, bucket_of, writers)
        shards: dict[str, list[dict]] = {}
        for role in rows_of_role:
            with ShardWriter(folder, role, dtypes[role]) as final:
                for writer, owner in zip(writers, buckets, strict=True):
                    if owner == role and writer.paths:  # chance may leave a bucket empty
                        _shuffle_into(final, writer.paths, width, rng)
            shards[role] = [
                {
                    "path": f"counts/{path.name}",
                    "bytes": path.stat().st_size,
                    "sha256": sha256(path),
                }
                for path in final.paths
            ]
    return shards


def _fill_buckets(
    source: Source, data: Data, genes: np.ndarray, bucket_of: np.ndarray, writers: list[ShardWriter]
) -> None:
    samples, names = source.samples["sample_id"].to_numpy(), source.genes["gene_id"].to_numpy()
    progress = Progress("prepare: writing", len(samples), "samples")
    for rows, stored in source.chunks():
        counts = check_counts(stored, samples[rows], names, data.source, source.advice)[:, genes]
        for bucket in np.unique(bucket_of[rows[bucket_of[rows] >= 0]]):
            inside = bucket_of[rows] == bucket
            writers[bucket].write(samples[rows[inside]], counts[inside])
        progress.advance(len(rows))
    for writer in writers:
        writer.close()


def _shuffle_into(
    final: ShardWriter, paths: list[Path], width: int, rng: np.random.Generator
) -> None:
    pieces = [piece for path in paths for piece in read_shard(path, width)]
    names = np.concatenate([piece[0] for piece in pieces])
    counts = np.concatenate([piece[1] for piece in pieces])
    order = rng.permutation(len(names))
    final.write(names[order], counts[order])


def _copy_truth(source: Path, target: Path) -> None:
    """A cohort without a known truth has an empty folder, so that both kinds have the same files."""
    if target.exists():
        shutil.rmtree(target)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.mkdir()
