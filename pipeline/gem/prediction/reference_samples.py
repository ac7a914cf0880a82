"""Reference samples: raw counts that a person brings, matched to the model's genes by name.

R samples, G genes of the model, F genes of the file. A source folder, an .h5ad, a Parquet table of lists beside its
X.genes.parquet (as predictions are written), or a Parquet table or a frame with a column per gene.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.gem.common.errors import InputError, IntegrityError, examples
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.shards import read_shard
from pipeline.gem.data.sources import (
    CHUNK_VALUES,
    H5adSource,
    ParquetSource,
    check_counts,
    check_unique,
)
from pipeline.gem.model.gem import TrainedGEM

NOT_GENES = ("sample_id", "total", "split")  # numeric columns of a wide table that are none


@dataclass(frozen=True)
class _Named:
    """What a source needs to know of a file beside its path."""

    layer: str | None
    sample_id: None = None


@dataclass(frozen=True)
class ReferenceSamples:
    """Samples as the encoder takes them."""

    names: np.ndarray  # (R,) text
    expression: np.ndarray  # (R, G) float32 log-CPM


class ReferenceFile:
    """Reference samples, opened: names, notes, and blocks of expression in the model's order of genes."""

    def __init__(self, source, gem: TrainedGEM, where: str):
        """InputError lists everything that is wrong with names of samples and genes."""
        self.source, self.where = source, where
        self.names = source.samples["sample_id"].to_numpy(dtype=object)
        problems = [] if len(self.names) else [f"{where}: no samples"]
        problems += check_unique(source.samples, "sample_id", where) + check_unique(
            source.genes, "gene_id", where
        )
        if problems:
            raise InputError(*problems)
        self.file_genes = source.genes["gene_id"].to_numpy(dtype=object)
        self.positions, self.notes = match_genes(gem.genes, self.file_genes, where)

    @classmethod
    def open(cls, path: Path | str, gem: TrainedGEM, layer: str | None = None) -> "ReferenceFile":
        path = Path(path)
        if not path.exists():
            raise InputError(
                f"{path}: absent; a reference is a source folder, an .h5ad or a .parquet table of raw counts"
            )
        if path.suffix not in ("", ".h5ad", ".parquet"):
            raise InputError(f"{path}: neither a folder nor .h5ad nor .parquet")
        try:
            if path.is_dir():
                return cls(ParquetSource(path, _Named(layer)), gem, str(path))
            if path.suffix == ".h5ad":
                return cls(H5adSource(path, _Named(layer)), gem, str(path))
            return cls(_table_source(path, gem), gem, str(path))
        except InputError as error:
            # The same source as of `prepare`, which names the keys of params.yaml.
            raise InputError(
                *(
                    problem.replace("data.layer", "--layer").replace("data.source: ", "")
                    for problem in error.problems
                )
            ) from None

    @classmethod
    def of_frame(cls, counts: pd.DataFrame, gem: TrainedGEM) -> "ReferenceFile":
        """Raw counts (R, F), a column per gene, samples named by the index."""
        return cls(
            _Wide(counts.index.astype(str), counts.columns.astype(str), counts), gem, "counts"
        )

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows (B,), log-CPM (B, G)), by totals over all genes of the file. InputError for bad or empty samples."""
        for rows, stored in self.source.chunks():
            counts = check_counts(
                stored,
                self.names[rows],
                self.file_genes,
                self.where,
                self.source.advice.replace("data.layer", "--layer"),
            )
            totals = counts.sum(axis=1)
            if (totals == 0).any():
                raise InputError(
                    f"{self.where}: samples {examples(self.names[rows][totals == 0])} have no counts"
                )
            yield rows, log_cpm(counts[:, self.positions], totals)

    def read(self, wanted: frozenset[str] | None = None) -> ReferenceSamples:
        """The samples of these names, or all."""
        chosen = np.array([wanted is None or name in wanted for name in self.names], dtype=bool)
        place = np.cumsum(chosen) - 1
        expression = np.empty((int(chosen.sum()), len(self.positions)), dtype=np.float32)
        for rows, block in self.chunks():
            expression[place[rows[chosen[rows]]]] = block[chosen[rows]]
        return ReferenceSamples(self.names[chosen], expression)


def match_genes(genes: np.ndarray, found: np.ndarray, where: str) -> tuple[np.ndarray, list[str]]:
    """((G,) position of each of the model's genes among those found, notes). InputError where one is missing.

    A gene that was not measured has no honest value: zero would be read as "not expressed".
    """
    positions = pd.Index(found).get_indexer(genes)
    missing, surplus = genes[positions < 0], found[~np.isin(found.astype(str), genes.astype(str))]
    if len(missing):
        strange = (
            f"; {len(surplus):,} that the model does not know: {examples(surplus)}"
            if len(surplus)
            else ""
        )
        raise InputError(
            f"{where}: {len(missing):,} of the model's {len(genes):,} genes are missing: {', '.join(map(str, missing[:5]))}{strange}"
        )
    notes = []
    if len(surplus):
        notes.append(
            f"{where}: {len(surplus):,} genes are unknown to the model and count in the totals only: {', '.join(map(str, surplus[:5]))}"
        )
    if (np.diff(positions) < 0).any():
        notes.append(f"{where}: genes in another order than the model's; matched by name")
    return positions, notes


def _table_source(path: Path, gem: TrainedGEM) -> "_Wide | _Lists":
    try:
        schema = pq.read_schema(path)
        if "counts" in schema.names:
            return _Lists(path)
        wide = pq.read_table(path).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: cannot be read ({next(iter(str(error).splitlines()), type(error).__name__)})"
        ) from None
    if "sample_id" in wide:
        wide = wide.set_index("sample_id")
    columns = [
        name
        for name in wide
        if pd.api.types.is_numeric_dtype(wide[name])
        and name not in (*gem.metadata.names, *NOT_GENES)
    ]
    return _Wide(wide.index.astype(str), pd.Index(map(str, columns)), wide[columns])


class _Wide:
    """A frame with a column per gene."""

    advice = "give raw counts"

    def __init__(self, names: pd.Index, genes: pd.Index, counts: pd.DataFrame):
        self.samples, self.genes, self._counts = (
            pd.DataFrame({"sample_id": names}),
            pd.DataFrame({"gene_id": genes}),
            counts,
        )

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows = max(1, CHUNK_VALUES // max(1, len(self.genes)))
        for start in range(0, len(self.samples), rows):
            block = self._counts.iloc[start : start + rows].to_numpy()
            yield np.arange(start, start + len(block)), block


class _Lists:
    """A table of (sample_id, counts) with its genes in X.genes.parquet; every row with a name."""

    advice = "give raw counts"

    def __init__(self, path: Path):
        beside = genes_file(path)
        if not beside.exists():
            raise InputError(f"{beside}: absent; it names the genes of the lists in {path.name}")
        self.path, self.genes = path, pd.read_parquet(beside)
        if "gene_id" not in self.genes:
            raise InputError(f"{beside}: no column gene_id")
        if "sample_id" not in pq.read_schema(path).names:
            raise InputError(f"{path}: no column sample_id")
        self.samples = pd.DataFrame(
            {"sample_id": pd.read_parquet(path, columns=["sample_id"])["sample_id"].astype(str)}
        )

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        try:
            for names, counts in read_shard(self.path, len(self.genes)):
                yield np.arange(start, start + len(names)), counts
                start += len(names)
        except IntegrityError as error:
            raise InputError(*error.problems) from None


def genes_file(path: Path) -> Path:
    """Where the genes of a table of lists stand: OUT.genes.parquet beside OUT.parquet."""
    return path.with_suffix(".genes.parquet")
