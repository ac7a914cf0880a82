"""Reference samples: raw counts from a user's file or frame, matched to the model's genes by name.

A file is a source folder, an .h5ad, a Parquet table with a column of lists beside
NAME.genes.parquet (as predictions are written), or a Parquet table with a column per gene.

R samples, B samples of a chunk, G genes of the model, F genes of the file.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.shards import read_shard
from pipeline.gem.data.sources import (
    ParquetSource,
    Source,
    check_unique,
    checked_chunks,
    read_names,
)
from pipeline.gem.data.storage.parquet import read_parquet
from pipeline.gem.data.storage.reading import CHUNK_VALUES, RESTORE, file_errors
from pipeline.gem.data.tables import COHORT_COLUMNS, identifier_series
from pipeline.gem.model.gem import TrainedGEM

logger = logging.getLogger(__name__)


class ReferenceFile:
    """Reference samples as log-CPM in the gene order of the model, read in chunks."""

    def __init__(self, source: Source, gem: TrainedGEM, where: str):
        """InputError lists all problems with the names of samples and genes."""
        self.source, self.where = source, where
        self.names = source.samples["sample_id"].to_numpy(dtype=object)  # (R,) text
        problems = [] if len(self.names) else [f"{where}: no samples"]
        problems += check_unique(source.samples, "sample_id", where)
        problems += check_unique(source.genes, "gene_id", where)
        if problems:
            raise InputError(*problems)
        file_genes = source.genes["gene_id"].to_numpy(dtype=object)
        self.positions = match_genes(gem.genes, file_genes, where)

    @classmethod
    def open(cls, path: Path | str, gem: TrainedGEM, layer: str | None = None) -> "ReferenceFile":
        """`layer` of an .h5ad, X if None. InputError if the file cannot be used."""
        path = Path(path)
        if not path.exists():
            raise InputError(
                f"{path}: absent; a reference is a source folder, an .h5ad or a .parquet table "
                "of raw counts"
            )
        if path.suffix.lower() not in ("", ".h5ad", ".parquet"):
            raise InputError(f"{path}: neither a folder nor .h5ad nor .parquet")
        if path.is_dir():
            source = ParquetSource(path)
        elif path.suffix.lower() == ".h5ad":
            # HDF5 and anndata take a second to import, and only this source needs them.
            from pipeline.gem.data.storage.h5ad import H5adSource

            source = H5adSource(path, layer, layer_option="--layer")
        else:
            source = _table_source(path, gem)
        return cls(source, gem, str(path))

    @classmethod
    def of_frame(cls, counts: pd.DataFrame, gem: TrainedGEM) -> "ReferenceFile":
        """Raw counts (R, F) with a column per gene; the index names the samples."""
        return cls(WideTable(counts), gem, "counts")

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows (B,), log-CPM (B, G)), with totals over all F genes of the file.

        InputError for counts that are not valid and for samples without counts.
        """
        for rows, counts in checked_chunks(self.source, self.where):
            totals = counts.sum(axis=1)
            if (totals == 0).any():
                names = examples(self.names[rows][totals == 0])
                raise InputError(f"{self.where}: samples {names} have no counts")
            yield rows, log_cpm(counts[:, self.positions], totals)

    def index(self, rows: np.ndarray) -> pd.Index:
        return pd.Index(self.names[rows], name="sample_id")

    def read(self) -> np.ndarray:
        """(R, G) float32 log-CPM of all samples."""
        expression = np.empty((len(self.names), len(self.positions)), dtype=np.float32)
        for rows, block in self.chunks():
            expression[rows] = block
        return expression


def match_genes(genes: np.ndarray, file_genes: np.ndarray, where: str) -> np.ndarray:
    """(G,) position of each gene of the model among the genes of a file. InputError if one is
    absent: no value stands for "not measured", and zero means "not expressed"."""
    positions = pd.Index(file_genes).get_indexer(genes)
    missing = genes[positions < 0]
    surplus = file_genes[~np.isin(file_genes.astype(str), genes.astype(str))]
    names = ", ".join(map(str, surplus[:5]))
    if len(missing):
        problem = (
            f"{where}: {len(missing):,} of the model's {len(genes):,} genes are missing: "
            f"{', '.join(map(str, missing[:5]))}"
        )
        unknown = f"; {len(surplus):,} unknown to the model: {names}" if len(surplus) else ""
        raise InputError(problem + unknown)
    if len(surplus):
        logger.warning(
            "%s: %s genes are unknown to the model; they count in the totals only: %s",
            where,
            f"{len(surplus):,}",
            names,
        )
    if (np.diff(positions) < 0).any():
        logger.warning("%s: genes are in another order than the model's; matched by name", where)
    return positions


def genes_file(path: Path) -> Path:
    """The table of the genes of a table with lists: OUT.genes.parquet beside OUT.parquet."""
    return path.with_suffix(".genes.parquet")


def _table_source(path: Path, gem: TrainedGEM) -> Source:
    if "counts" in read_parquet(path, ())[1]:
        return ListTable(path)
    with file_errors(path):
        table = read_parquet(path)[0].to_pandas()
    if "sample_id" in table:
        table = table.set_index("sample_id")
    excluded = {*gem.metadata.names, *COHORT_COLUMNS}
    numeric = [name for name in table if pd.api.types.is_numeric_dtype(table[name])]
    return WideTable(table[[name for name in numeric if name not in excluded]])


class WideTable:
    """A source in memory: a row per sample, a column per gene, samples named by the index."""

    advice = "give raw counts"

    def __init__(self, counts: pd.DataFrame):
        self.counts, self.columns = counts, []
        self.samples = pd.DataFrame({"sample_id": identifier_series(counts.index)})
        self.genes = pd.DataFrame({"gene_id": identifier_series(counts.columns)})

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = max(1, CHUNK_VALUES // max(1, len(self.genes)))
        for start in range(0, len(self.samples), step):
            block = self.counts.iloc[start : start + step].to_numpy()
            yield np.arange(start, start + len(block)), block


class ListTable:
    """A source in a Parquet table of (sample_id, counts), with its genes in NAME.genes.parquet."""

    advice = "give raw counts"

    def __init__(self, path: Path):
        genes = genes_file(path)
        if not genes.exists():
            raise InputError(f"{genes}: absent; it names the genes of the lists in {path.name}")
        self.path = path
        self.genes, _ = read_names(genes, "gene_id")
        self.samples, self.columns = read_names(path, "sample_id")

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for names, counts in read_shard(self.path, len(self.genes), RESTORE, InputError):
            yield np.arange(start, start + len(names)), counts
            start += len(names)
