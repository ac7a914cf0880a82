"""Tables beside the counts: features of labels, target genes of perturbations, a gene list."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.data.labels import LabelForm, label_texts, list_cell_problems, split_labels
from pipeline.gem.data.tables import identifier_series, is_table, read_columns, read_lines

TARGET_COLUMNS = ["perturbation", "gene_id"]


@dataclass(frozen=True)
class Annotations:
    """The annotation tables that params.yaml names."""

    tables: dict[str, dict[str, FeatureTable]]  # by embedding covariate and path
    targets: pd.DataFrame  # perturbation, gene_id; empty if data.target_gene is null
    gene_list: list[str] | None  # gene_ids of data.gene_list

    @cached_property
    def features(self) -> dict[str, FeatureTable]:
        """By embedding covariate, those of all its tables."""
        return {name: FeatureTable.joined([*each.values()]) for name, each in self.tables.items()}


@contextmanager
def collect_problems(problems: list[str]) -> Iterator[None]:
    """Adds the problems of an InputError to the list, instead of raising it."""
    try:
        yield
    except InputError as error:
        problems += error.problems


def read_annotations(data: Data, genes: pd.Series) -> Annotations:
    """Reads all tables; `genes` are the gene_ids of the source. InputError lists every problem."""
    problems: list[str] = []
    known_genes, tables = set(genes.astype(str)), {}
    for name, paths in data.covariates.embeddings().items():
        with collect_problems(problems):
            tables[name] = {path: FeatureTable.read(path) for path in paths}
    with collect_problems(problems):
        targets = _read_targets(data, known_genes)
    with collect_problems(problems):
        gene_list = _read_gene_list(data, known_genes)
    if problems:
        raise InputError(*problems)
    return Annotations(tables, targets, gene_list)


def match_annotations(
    annotations: Annotations, samples: pd.DataFrame, data: Data, training: pd.Series | None = None
) -> list[str]:
    """Notes on the tables that match the labels of the samples in part.

    `training` says which samples are in the training split, once it is known. InputError for a
    table that matches none: its labels are written differently.
    """
    notes, problems = [], []
    control = {data.control.value} if data.control else set()
    for name, tables in annotations.tables.items():
        labels = _labels(samples[name]) - control
        table = set(annotations.features[name].labels)
        if missing := labels - table:
            share = f"{len(missing)} of {len(labels)} labels"
            notes.append(
                f"{name}: no features for {examples(sorted(missing))} ({share}): "
                "only their identity is encoded"
            )
        trained = labels if training is None else _labels(samples[name][training])
        if held_out := missing - trained:
            notes.append(
                f"{name}: {examples(sorted(held_out))} are held out of training and have no "
                "features: predictions treat them as missing"
            )
        for path, own in tables.items():
            if labels and not labels & (known := set(own.labels)):
                problems.append(_no_match(path, known, name, labels))
            if absent := (labels & table) - set(own.labels):
                notes.append(
                    f"{name}: no row in {Path(path).name} for {examples(sorted(absent))} "
                    f"({len(absent)} of {len(labels)} labels): zeros instead of its features"
                )
    targets = set(annotations.targets["perturbation"])
    if targets and data.control is None:
        notes.append("data.target_gene is not used: data.control is null")
    elif targets:
        name = data.control.column
        labels = _labels(samples[name]) | set(label_texts(samples[name]).dropna())
        if unmatched := targets - labels:
            share = f"{len(unmatched)} of {len(targets)}"
            notes.append(
                f"data.target_gene: no sample has {name} {examples(sorted(unmatched))} ({share})"
            )
        if not targets & labels:
            problems.append(_no_match(data.target_gene, targets, name, labels - control))
    if problems:
        raise InputError(*problems)
    return notes


def _labels(column: pd.Series) -> set[str]:
    return {label for text in label_texts(column).dropna().unique() for label in split_labels(text)}


def _no_match(path: str, table: set[str], name: str, labels: set[str]) -> str:
    return (
        f"{path}: none of its {len(table)} labels ({examples(sorted(table), 3)}) is among the "
        f"{len(labels)} of {name} ({examples(sorted(labels), 3)}); write them alike"
    )


def _read_targets(data: Data, known_genes: set[str]) -> pd.DataFrame:
    if data.target_gene is None:
        return pd.DataFrame(columns=TARGET_COLUMNS, dtype=str)
    path = _existing(data.target_gene, "data.target_gene")
    table = _read_labels(path, TARGET_COLUMNS).dropna()
    if data.control is not None:
        texts = partial(LabelForm.of(data).text, data.control.column)
        table["perturbation"] = table["perturbation"].map(texts)
        table = table.dropna()
    problems = _unknown_genes(table["gene_id"], known_genes, path, data)
    if problems:
        raise InputError(*problems)
    return table.drop_duplicates(ignore_index=True)


def _read_gene_list(data: Data, known_genes: set[str]) -> list[str] | None:
    """A table with a column gene_id, or text with one gene_id per line."""
    if data.gene_list is None:
        return None
    path = _existing(data.gene_list, "data.gene_list")
    if is_table(path):
        names = _read_labels(path, ["gene_id"])["gene_id"].dropna().tolist()
    else:
        names = read_lines(path)
    problems = _unknown_genes(names, known_genes, path, data)
    if not names:
        problems.append(f"{path}: no gene; list at least one, or set data.gene_list to null")
    if problems:
        raise InputError(*problems)
    return names


def _existing(path: str, key: str) -> Path:
    if not Path(path).exists():
        raise InputError(f"{path}: absent; {key} names it")
    return Path(path)


def _read_labels(path: Path, columns: list[str]) -> pd.DataFrame:
    """These columns of a table, as texts."""
    table, names = read_columns(path, columns)
    if absent := [name for name in columns if name not in names]:
        raise InputError(
            f"{path}: no column {' or '.join(absent)}; expected {' and '.join(columns)}, "
            f"found {examples(names)}"
        )
    problems: list[str] = []
    for name in columns:
        problems += list_cell_problems(table[name], f"{path}: {name}")
    if problems:
        raise InputError(*problems)
    texts = {"gene_id": identifier_series}
    return pd.DataFrame({name: texts.get(name, label_texts)(table[name]) for name in columns})


def _unknown_genes(names, known_genes: set[str], path: Path, data: Data) -> list[str]:
    names = set(names)
    unknown = sorted(names - known_genes)
    if not unknown:
        return []
    return [
        f"{path}: genes {examples(unknown)} are not in {data.source} "
        f"({len(unknown)} of {len(names)}); its genes are {examples(sorted(known_genes), 3)}"
    ]
