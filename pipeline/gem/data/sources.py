"""Where raw counts come from: a folder of Parquet files or an AnnData .h5ad, read in chunks and checked.

A source has `samples` (one row a sample, sample_id first), `genes` (gene_id first) and `chunks()`. Where data.sample_id
names another column of samples, that one is sample_id, and a column of that name is left out.
Nothing is written beside the input.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.shards import read_shard

MAX_COUNT = 2**24  # the largest integer that float32 holds exactly with all smaller ones
CHUNK_VALUES = 2**23  # counts read at a time
RAW = ".raw"  # data.layer of AnnData's .raw; a layer that is called raw is just raw


class Source(Protocol):
    samples: pd.DataFrame
    genes: pd.DataFrame
    advice: str  # where raw counts may be, should these be none

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row positions in `samples` (B,), counts (B, G) as stored) until every sample has come once."""


def open_source(data: Data) -> Source:
    """The source named in params.yaml. InputError where it is absent or lacks a part."""
    path = Path(data.source)
    if not path.exists():
        raise InputError(
            f"data.source: {path} does not exist; give a folder of Parquet files or an .h5ad file"
        )
    if path.is_dir():
        return ParquetSource(path, data)
    if path.suffix == ".h5ad":
        return H5adSource(path, data)
    raise InputError(f"data.source: {path} is neither a folder nor an .h5ad file")


class ParquetSource:
    """samples.parquet, genes.parquet and counts/*.parquet."""

    def __init__(self, folder: Path, data: Data):
        absent = [
            name
            for name in ("samples.parquet", "genes.parquet", "counts")
            if not (folder / name).exists()
        ]
        if absent:
            raise InputError(
                *(
                    f"{folder / name}: absent; a source folder holds samples.parquet, genes.parquet and counts/*.parquet"
                    for name in absent
                )
            )
        self.folder = folder
        self.advice = f"write the raw counts into {folder / 'counts'}"
        self.samples = _read_table(
            folder / "samples.parquet", data.sample_id or "sample_id", "sample_id"
        )
        self.genes = _read_table(folder / "genes.parquet", "gene_id", "gene_id")

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        position = pd.Series(np.arange(len(self.samples)), index=self.samples["sample_id"])
        seen = np.zeros(len(self.samples), dtype=bool)
        for path in sorted((self.folder / "counts").glob("*.parquet")):
            for names, counts in read_shard(path, len(self.genes)):
                rows = position.reindex(names)
                if rows.isna().any():
                    raise InputError(
                        f"{path}: samples {examples(rows.index[rows.isna()])} are not in {self.folder / 'samples.parquet'}"
                    )
                rows = rows.to_numpy(dtype=np.int64)
                twice = np.unique(rows[seen[rows] | pd.Series(rows).duplicated().to_numpy()])
                if len(twice):
                    raise InputError(
                        f"{path}: samples {examples(self.samples['sample_id'].iloc[twice])} have counts twice"
                    )
                seen[rows] = True
                yield rows, counts
        if not seen.all():
            raise InputError(
                f"{self.folder / 'counts'}: no counts for samples {examples(self.samples['sample_id'][~seen])}"
            )


class H5adSource:
    """An AnnData file: raw counts in X, in a layer or in .raw, obs as samples, var (of .raw its own) as genes.

    Only obs and var are held in memory; counts are read in chunks, however they are stored.
    """

    def __init__(self, path: Path, data: Data):
        import h5py  # late, as anndata below: they take a second to import and only this source needs them

        self.path, self.layer = path, data.layer
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise InputError(f"{path}: cannot be read as AnnData ({error})") from None
        self._matrix, genes = self._find_matrix()
        obs, var = self._table("obs"), self._table(genes)
        if data.sample_id is not None and data.sample_id not in obs:
            raise InputError(
                f"{path}: data.sample_id: no column {data.sample_id} in obs{did_you_mean(data.sample_id, obs.columns)}; null takes the obs index"
            )
        names = obs.index.to_series() if data.sample_id is None else obs[data.sample_id]
        self.samples = _named(
            obs.drop(columns=data.sample_id or []), names, "sample_id", f"{path}: obs"
        )
        self.genes = _named(var, var.index.to_series(), "gene_id", f"{path}: {genes}")
        shape = (len(obs), len(var))
        if tuple(self._matrix.shape) != shape:
            raise InputError(
                f"{path}: counts of shape {tuple(self._matrix.shape)}; expected samples x genes, {shape}"
            )
        others = [name for name in self._layers() if name != (self.layer or "null")]
        self.advice = (
            f"point data.layer at the raw counts: {examples(others)}"
            if others
            else "this file holds no other matrix; take one of raw counts"
        )

    def _layers(self) -> list[str]:
        """What data.layer can be."""
        return (
            ["null"] * ("X" in self._file)
            + list(self._file.get("layers", ()))
            + [RAW] * ("raw" in self._file)
        )

    def _find_matrix(self) -> tuple:
        """(the declared matrix, still on disk; the table of its genes). InputError where the file has none."""
        import anndata

        key, genes = {None: ("X", "var"), RAW: ("raw/X", "raw/var")}.get(
            self.layer, (f"layers/{self.layer}", "var")
        )
        if self.layer == RAW and f"layers/{RAW}" in self._file:
            raise InputError(
                f"{self.path}: data.layer: {RAW} names a layer and the .raw of this file; rename the layer"
            )
        if key not in self._file:
            absent = {None: "no X, and data.layer is null", RAW: "no .raw"}.get(
                self.layer, f"no layer {self.layer!r}"
            )
            raise InputError(
                f"{self.path}: {absent}; data.layer can be {examples(self._layers()) or 'nothing: the file holds no counts'}"
            )
        stored = self._file[key]
        try:
            return (anndata.io.sparse_dataset(stored) if hasattr(stored, "keys") else stored), genes
        except ValueError as error:
            raise InputError(
                f"{self.path}: {key} cannot be read as a sparse matrix ({error})"
            ) from None

    def _table(self, key: str) -> pd.DataFrame:
        """obs or var. InputError where the file has none."""
        import anndata

        try:
            table = anndata.io.read_elem(self._file[key])
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.path}: cannot be read as AnnData ({next(iter(str(error).splitlines()), key)})"
            ) from None
        if not isinstance(table, pd.DataFrame):
            raise InputError(
                f"{self.path}: {key} is stored in an old form; read the file with anndata and write it again"
            )
        return table

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows = max(1, CHUNK_VALUES // max(1, len(self.genes)))
        for start in range(0, len(self.samples), rows):
            stop = min(start + rows, len(self.samples))
            yield np.arange(start, stop), self._block(start, stop)

    def _block(self, start: int, stop: int) -> np.ndarray:
        """(B, G) counts of some rows. A matrix stored by genes is read some genes at a time: its rows are all over the file."""
        by_genes = getattr(self._matrix, "format", None) == "csc"
        width = max(1, CHUNK_VALUES // len(self.samples) if by_genes else len(self.genes))
        parts = [
            self._matrix[start:stop, first : first + width]
            for first in range(0, max(1, len(self.genes)), width)
        ]
        return np.concatenate(
            [part.toarray() if hasattr(part, "toarray") else np.asarray(part) for part in parts],
            axis=1,
        )


def _read_table(path: Path, column: str, key: str) -> pd.DataFrame:
    try:
        table = pq.read_table(path).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if column not in table:
        raise InputError(f"{path}: no column {column}{did_you_mean(column, table.columns)}")
    return _named(table.drop(columns=column), table[column], key, str(path))


def _named(table: pd.DataFrame, names: pd.Series, key: str, where: str) -> pd.DataFrame:
    """The table with its rows' names, as text, in a first column `key`. InputError where a name is missing."""
    missing = np.flatnonzero(names.isna().to_numpy())
    if len(missing):
        raise InputError(f"{where}: {key} is missing in rows {examples(missing)}; name every row")
    named = table.drop(columns=key, errors="ignore").reset_index(drop=True)
    named.insert(0, key, names.astype(str).to_numpy(dtype=object))
    return named


def check_unique(table: pd.DataFrame, key: str, where: str) -> list[str]:
    """A problem line if names stand twice."""
    twice = table[key][table[key].duplicated()].unique()
    return (
        [f"{where}: {key} {examples(twice)} stands more than once; names must be unique"]
        if len(twice)
        else []
    )


def check_counts(
    counts: np.ndarray, samples: np.ndarray, genes: np.ndarray, where: str, advice: str
) -> np.ndarray:
    """(B, G) int64 of whole, non-negative counts up to 2^24; InputError names sample, gene, value and `advice` of the first bad one."""

    def first(bad: np.ndarray, what: str) -> InputError:
        row, column = (int(index[0]) for index in np.nonzero(bad))
        return InputError(
            f"{where}: sample {samples[row]}, gene {genes[column]}: count {counts[row, column]} {what}"
        )

    if counts.dtype.kind == "f":
        if not np.isfinite(counts).all():
            raise first(
                ~np.isfinite(counts),
                f"is not finite; expected whole numbers from 0 to 2^24; {advice}",
            )
        fractional = counts != np.floor(counts)
        if fractional.any():
            looks = (
                "looks log-normalised"
                if counts.max() < 50
                else "expected raw counts, whole numbers (estimates of salmon or RSEM: round them)"
            )
            raise first(fractional, f"is fractional; {looks}: {advice}")
    elif counts.dtype.kind not in "iub":
        raise InputError(
            f"{where}: counts of type {counts.dtype}; expected whole numbers; {advice}"
        )
    if counts.size and counts.min() < 0:
        raise first(counts < 0, f"is negative; expected raw counts: {advice}")
    if counts.size and counts.max() > MAX_COUNT:
        raise first(counts > MAX_COUNT, "is above 2^24 = 16777216; is it a sum over samples?")
    return counts.astype(np.int64)
