"""What tables tell beside the counts: features of labels, and the genes that perturbations hit."""

from pathlib import Path

import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.data.cohort import DECLARED, TARGETS, embedding_file
from pipeline.gem.data.features import FeatureTable, read_table
from pipeline.gem.data.labels import label_texts, labels_of, list_cells
from pipeline.gem.data.sources import Source

TABLES = Path("data/tables")  # where DVC looks for tables beside those in data.source
TARGET_COLUMNS = ("perturbation", "gene_id")


def read_knowledge(source: Source, data: Data) -> tuple[dict[str, FeatureTable], pd.DataFrame]:
    """What tables tell of labels: (features of each embedding, perturbation and gene_id of its target). InputError lists every problem."""
    features, problems = {}, []
    for name, path in data.covariates.embeddings().items():
        try:
            features[name] = FeatureTable.read(path)
        except InputError as error:
            problems += error.problems
    try:
        targets = read_targets(data, source.genes["gene_id"])
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(*problems)
    return features, targets


def read_targets(data: Data, genes: pd.Series) -> pd.DataFrame:
    """perturbation, gene_id; empty where `data.target_gene` is null. InputError where the table is not that."""
    if data.target_gene is None:
        return pd.DataFrame(columns=TARGET_COLUMNS, dtype=str)
    path = Path(data.target_gene)
    if not path.exists():
        raise InputError(f"{path}: absent; data.target_gene names it")
    table = read_table(path)
    absent = [name for name in TARGET_COLUMNS if name not in table]
    if absent:
        raise InputError(
            f"{path}: no column {' or '.join(absent)}; expected {' and '.join(TARGET_COLUMNS)}, found {examples(table.columns)}"
        )
    lists = [
        problem for name in TARGET_COLUMNS for problem in list_cells(table[name], f"{path}: {name}")
    ]
    if lists:
        raise InputError(*lists)
    table = pd.DataFrame({name: label_texts(table[name]) for name in TARGET_COLUMNS}).dropna()
    twice = sorted(table["perturbation"][table["perturbation"].duplicated()].unique())
    problems = (
        [f"{path}: perturbations {examples(twice)} stand twice; expected one target gene each"]
        if twice
        else []
    )
    strange = sorted(set(table["gene_id"]) - set(genes.astype(str)))
    if strange:
        problems.append(
            f"{path}: genes {examples(strange)} are not in {data.source}; expected a gene_id of its genes"
        )
    if problems:
        raise InputError(*problems)
    return table.reset_index(drop=True)


def write_knowledge(
    features: dict[str, FeatureTable],
    targets: pd.DataFrame,
    samples: pd.DataFrame,
    data: Data,
    folder: Path,
) -> list[str]:
    """Writes the tables into the cohort; gives a note where labels of the samples have no features."""
    notes = []
    for name, table in features.items():
        table.write(folder / embedding_file(name))
        bare = {
            label for text in samples[name].dropna().unique() for label in labels_of(text)
        } - set(table.labels)
        bare -= {data.control.value} if data.control else set()
        if bare:
            notes.append(
                f"{name}: no features for {examples(sorted(bare))}: only their identity is known"
            )
    targets.to_parquet(folder / TARGETS, index=False)
    return notes


def targets_of(samples: pd.DataFrame, targets: pd.DataFrame, data: Data) -> set[str]:
    """The genes that perturbations of these samples hit."""
    if data.control is None:
        return set()
    return set(targets["gene_id"][targets["perturbation"].isin(samples[data.control.column])])


def unwatched_tables(data: Data) -> list[str]:
    """A note for each table whose change would go unnoticed: DVC watches data.source and data/tables."""
    named = {
        f"data.covariates: {name}": path for name, path in data.covariates.embeddings().items()
    }
    named |= {"data.target_gene": data.target_gene, "data.gene_list": data.gene_list}
    watched = [Path(data.source).resolve(), TABLES.resolve()]
    return [
        f"{key}: {path} lies neither in data.source nor in {TABLES}: after a change of it run `dvc repro --force prepare`, or move it there"
        for key, path in named.items()
        if path is not None
        and not any(Path(path).resolve().is_relative_to(folder) for folder in watched)
    ]


def declared_in_cohort(data: Data) -> dict:
    """What params.yaml declares of the columns, its tables being the cohort's own: where they came from changes no result."""
    declared = data.model_dump(mode="json", include=set(DECLARED))
    for covariates in declared["covariates"].values():
        for name, covariate in covariates.items():
            if covariate["kind"] == "embedding":
                covariate["table"] = embedding_file(name)
    return declared | {"target_gene": TARGETS if data.target_gene else None}
