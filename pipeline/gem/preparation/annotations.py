"""Tables beside the counts: features of labels, target genes of perturbations, a gene list."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.data.features import FeatureTable, read_table
from pipeline.gem.data.labels import label_texts, list_cell_problems

TARGET_COLUMNS = ["perturbation", "gene_id"]


@dataclass(frozen=True)
class Annotations:
    """The annotation tables that params.yaml names."""

    features: dict[str, FeatureTable]  # by embedding covariate
    targets: pd.DataFrame  # perturbation, gene_id; empty if data.target_gene is null
    gene_list: list[str] | None  # gene_ids of data.gene_list


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
    known_genes, features = set(genes.astype(str)), {}
    for name, path in data.covariates.embeddings().items():
        with collect_problems(problems):
            features[name] = FeatureTable.read(path)
    with collect_problems(problems):
        targets = _read_targets(data, known_genes)
    with collect_problems(problems):
        gene_list = _read_gene_list(data, known_genes)
    if problems:
        raise InputError(*problems)
    return Annotations(features, targets, gene_list)


def _read_targets(data: Data, known_genes: set[str]) -> pd.DataFrame:
    if data.target_gene is None:
        return pd.DataFrame(columns=TARGET_COLUMNS, dtype=str)
    path = _existing(data.target_gene, "data.target_gene")
    table = _read_labels(path, TARGET_COLUMNS).dropna()
    problems = _unknown_genes(table["gene_id"], known_genes, path, data)
    if duplicates := sorted(table["perturbation"][table["perturbation"].duplicated()].unique()):
        names = examples(duplicates)
        problems.append(f"{path}: duplicate perturbations {names}; expected one target gene each")
    if problems:
        raise InputError(*problems)
    return table.reset_index(drop=True)


def _read_gene_list(data: Data, known_genes: set[str]) -> list[str] | None:
    """A Parquet or CSV table with a column gene_id, or text with one gene_id per line."""
    if data.gene_list is None:
        return None
    path = _existing(data.gene_list, "data.gene_list")
    if path.suffix in (".parquet", ".csv"):
        names = _read_labels(path, ["gene_id"])["gene_id"].dropna().tolist()
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as a list of genes ({error})") from None
        names = [line.strip() for line in lines if line.strip()]
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
    table = read_table(path)
    if absent := [name for name in columns if name not in table]:
        raise InputError(
            f"{path}: no column {' or '.join(absent)}; expected {' and '.join(columns)}, "
            f"found {examples(table.columns)}"
        )
    problems: list[str] = []
    for name in columns:
        problems += list_cell_problems(table[name], f"{path}: {name}")
    if problems:
        raise InputError(*problems)
    return pd.DataFrame({name: label_texts(table[name]) for name in columns})


def _unknown_genes(names, known_genes: set[str], path: Path, data: Data) -> list[str]:
    unknown = sorted(set(names) - known_genes)
    if not unknown:
        return []
    return [
        f"{path}: genes {examples(unknown, 20)} are not in {data.source}; "
        "expected gene_ids of its genes"
    ]
