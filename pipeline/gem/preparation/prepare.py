"""From a source to the cohort on disk: validation, splits, quality control, gene selection, shards.

An earlier cohort stays as it is until the new one is complete.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Control, Data, Splits
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.common.files import folder_replacement, sha256_of, write_json, write_table
from pipeline.gem.data.cleaning import clean_samples
from pipeline.gem.data.cohort import (
    DECLARED,
    FORMAT_VERSION,
    SIZES,
    TARGETS,
    TRUTH,
    StoredFile,
    embedding_files,
    with_checksum,
)
from pipeline.gem.data.labels import (
    SET_KINDS,
    LabelForm,
    label_texts,
    list_cell_problems,
    split_labels,
)
from pipeline.gem.data.sources import Source, check_unique
from pipeline.gem.data.splits import SPLIT_ROLES, TRAIN, date_problems, role_of, split_sizes
from pipeline.gem.data.tables import RESERVED_COLUMNS, reserved_name_problems
from pipeline.gem.preparation.annotations import (
    Annotations,
    collect_problems,
    match_annotations,
    read_annotations,
)
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.gene_selection import select_genes
from pipeline.gem.preparation.label_notes import label_notes, rare_label_notes
from pipeline.gem.preparation.leakage import check_duplicate_samples, check_split_leakage
from pipeline.gem.preparation.qc import summarise_counts
from pipeline.gem.preparation.shuffle import RoleSamples, write_shuffled_shards

TABLES = Path("data/tables")  # where DVC tracks tables beside those in data.source


def write_cohort(source: Source, data: Data, params: Splits, folder: Path) -> dict:
    """Validates a source and writes the cohort; returns the manifest.

    InputError if the source is invalid, IntegrityError if its splits leak.
    """
    data = _canonical(data)
    samples, annotations = _validate_tables(source, data)
    match_annotations(annotations, samples, data)
    split, split_notes = assign_splits(samples, data, params)
    notes = label_notes(source.samples, data) + split_notes
    check_split_leakage(samples, split, data)
    summary = summarise_counts(source, split.map(role_of).to_numpy(), data)
    check_duplicate_samples(samples["sample_id"].to_numpy(), split, summary.fingerprints)
    samples.insert(len(samples.columns), "total", summary.totals)
    kept = summary.totals > 0
    if not kept.all():
        notes.append(_note_empty_samples(samples["sample_id"][~kept], data))
        check_split_leakage(samples[kept], split[kept], data)
    targets = _target_genes(annotations.targets, samples[kept], data)
    genes, gene_notes = select_genes(source, summary, annotations.gene_list, targets, data)
    notes += gene_notes + _note_untracked_tables(data)
    notes += match_annotations(annotations, samples[kept], data, split[kept] == TRAIN)
    notes += rare_label_notes(samples[kept & (split == TRAIN)], data)

    roles = {}
    for role, names in SPLIT_ROLES.items():
        # One integer type per role: large test counts must not change the bytes training reads.
        dtype = np.min_scalar_type(int(summary.gene_maxima[role][genes].max()))
        roles[role] = RoleSamples(np.flatnonzero(kept & split.isin(names).to_numpy()), dtype)
    gene_table, number = source.genes[genes], int(kept.sum())
    manifest = {
        "format_version": FORMAT_VERSION,
        "samples": number,
        "genes": len(gene_table),
        "gene_list_sha256": sha256_of(gene_table["gene_id"].tolist()),
        "integer_type": {role: dtype.name for role, (_, dtype) in roles.items()},
        "declared": _declarations(data),
        "splits": {
            name: int(size) for name, size in split[kept].value_counts().sort_index().items()
        },
        "missing": {name: int(samples[name][kept].isna().sum()) for name in data.covariates.all()},
        "notes": notes,
    }
    with folder_replacement(folder) as temporary:
        shards, order = write_shuffled_shards(
            source, data.source, genes, roles, params.seed, temporary / "counts"
        )
        samples, split = samples.iloc[order], split.iloc[order]
        tables = _write_tables(samples, gene_table, split, annotations, data, temporary)
        write_table(temporary / SIZES, split_sizes(samples, split, data))
        truth = _copy_truth(Path(data.source), temporary)
        for key, names in (("tables", [*tables, SIZES]), ("truth", truth)):
            manifest[key] = {name: StoredFile.of(temporary / name) for name in names}
        manifest = with_checksum(manifest | {"shards": shards})
        write_json(temporary / "manifest.json", manifest)
    return manifest


def _canonical(data: Data) -> Data:
    """With the value of the control as it is in the cohort."""
    if data.control is None:
        return data
    column, value = LabelForm.of(data).control
    return data.model_copy(update={"control": Control(column=column, value=value)})


def _validate_tables(source: Source, data: Data) -> tuple[pd.DataFrame, Annotations]:
    """(samples with cleaned covariates, annotations). InputError lists every problem."""
    where, problems = data.source, []
    for name, table in (("samples", source.samples), ("genes", source.genes)):
        if not len(table):
            problems.append(f"{where}: no {name}; expected at least one")
    problems += check_unique(source.samples, "sample_id", f"{where}: samples")
    problems += check_unique(source.genes, "gene_id", f"{where}: genes")
    problems += reserved_name_problems(data)
    if clash := {*data.columns(), *RESERVED_COLUMNS} & set(source.genes["gene_id"]):
        problems.append(
            f"{where}: {examples(sorted(clash))}: the name of a gene and of a column; rename one"
        )
    samples = LabelForm.of(data).table(source.samples)
    problems += _column_problems(samples, source.columns, data, where)
    with collect_problems(problems):
        samples = clean_samples(samples, data.covariates, where, source.columns)
    with collect_problems(problems):
        annotations = read_annotations(data, source.genes["gene_id"])
    if problems:
        raise InputError(*problems)
    return samples, annotations


def _column_problems(samples: pd.DataFrame, known: list[str], data: Data, where: str) -> list[str]:
    """Problems of the columns that params.yaml names in addition to the covariates."""
    control = data.control
    columns = {f"data.context_columns: {name}": name for name in data.context_columns}
    columns |= {"data.date_column": data.date_column, "data.study_column": data.study_column}
    columns |= {"data.level_column": data.level_column}
    columns |= {"data.control.column": control.column if control else None}
    problems = []
    for key, name in columns.items():
        if name is None:
            continue
        if name not in samples:
            suggestion = did_you_mean(name, known)
            problems.append(f"{where}: {key}: no column {name}{suggestion}")
        elif list_problems := list_cell_problems(samples[name], f"{where}: {name}"):
            if name not in data.covariates.all():  # clean_samples reports the covariates
                problems += list_problems
        elif key == "data.date_column":
            problems += date_problems(samples[name], f"{where}: {name}")
        elif key == "data.control.column":
            labels = label_texts(samples[name])
            if not (labels == control.value).any():
                suggestion = did_you_mean(control.value, labels.dropna().unique())
                problems.append(
                    f"{where}: data.control.value: no sample has {name} = {control.value}"
                    + suggestion
                )
    return problems


def _note_empty_samples(names: pd.Series, data: Data) -> str:
    if data.empty_samples == "refuse":
        raise InputError(
            f"{data.source}: samples {examples(names)} have no counts at all; "
            "remove them, or set data.empty_samples to drop"
        )
    return f"{len(names)} samples without any count were dropped"


def _note_untracked_tables(data: Data) -> list[str]:
    """A note for each table that DVC does not track: it tracks data.source and data/tables."""
    embeddings = data.covariates.embeddings().items()
    tables = [(f"data.covariates: {name}", path) for name, paths in embeddings for path in paths]
    tables += [("data.target_gene", data.target_gene), ("data.gene_list", data.gene_list)]
    tracked = [Path(data.source).resolve(), TABLES.resolve()]
    return [
        f"{key}: {path} is neither in data.source nor in {TABLES}: after a change to it run "
        "`dvc repro --force prepare`, or move it there"
        for key, path in tables
        if path and not any(Path(path).resolve().is_relative_to(folder) for folder in tracked)
    ]


def _target_genes(targets: pd.DataFrame, samples: pd.DataFrame, data: Data) -> set[str]:
    """The target genes of the perturbations of the samples."""
    if data.control is None:
        return set()
    names = set(label_texts(samples[data.control.column]).dropna())
    covariate = data.covariates.all().get(data.control.column)
    if covariate is not None and covariate.kind in SET_KINDS:
        names |= {label for name in names for label in split_labels(name)}
    return set(targets["gene_id"][targets["perturbation"].isin(names)])


def _declarations(data: Data) -> dict:
    """The column declarations of params.yaml, with the cohort's own copies of the tables."""
    declared = data.model_dump(mode="json", include=set(DECLARED))
    files = embedding_files(data.covariates)
    for covariates in declared["covariates"].values():
        for name in covariates.keys() & files:
            covariates[name] |= {"table": files[name], "tables": None}  # joined
    return declared | {"target_gene": TARGETS if data.target_gene else None}


def _write_tables(
    samples: pd.DataFrame,
    genes: pd.DataFrame,
    split: pd.Series,
    annotations: Annotations,
    data: Data,
    folder: Path,
) -> list[str]:
    """Writes the tables of the cohort; returns their paths within it."""
    tables = {
        "samples.parquet": samples,
        "genes.parquet": genes,
        "splits.parquet": pd.DataFrame({"sample_id": samples["sample_id"], "split": split}),
        TARGETS: annotations.targets,
    }
    for name, table in tables.items():
        write_table(folder / name, table)
    files = embedding_files(data.covariates)
    for name, file in files.items():
        annotations.features[name].write(folder / file)
    return [*tables, *files.values()]


def _copy_truth(source: Path, folder: Path) -> list[str]:
    """Copies the files of the simulator's truth, if there are any; returns their names."""
    (folder / "truth").mkdir()
    names = [name for name in TRUTH if (source / name).exists()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names
