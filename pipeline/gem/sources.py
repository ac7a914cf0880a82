"""Where raw counts come from: a folder of Parquet files or an AnnData .h5ad, read in chunks and checked.

A source has `samples` (one row a sample, sample_id first), `genes` (gene_id first) and `chunks()`. Where data.sample_id
names another column of samples, that one is sample_id, and a column of that name is left out.
Nothing is written beside the input.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.gem.config import Data
from pipeline.gem.errors import InputError, did_you_mean, examples
from pipeline.gem.shards import read_shard

MAX_COUNT = 2**24        # the largest integer that float32 holds exactly with all smaller ones
CHUNK_VALUES = 2**23     # counts read at a time


class Source(Protocol):
    samples: pd.DataFrame
    genes: pd.DataFrame

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row positions in `samples` (B,), counts (B, G) as stored) until every sample has come once."""


def open_source(data: Data) -> Source:
    """The source named in params.yaml. InputError where it is absent or lacks a part."""
    path = Path(data.source)
    if not path.exists():
        raise InputError(f"data.source: {path} does not exist; give a folder of Parquet files or an .h5ad file")
    if path.is_dir():
        return ParquetSource(path, data)
    if path.suffix == ".h5ad":
        return H5adSource(path, data)
    raise InputError(f"data.source: {path} is neither a folder nor an .h5ad file")


class ParquetSource:
    """samples.parquet, genes.parquet and counts/*.parquet."""

    def __init__(self, folder: Path, data: Data):
        absent = [name for name in ("samples.parquet", "genes.parquet", "counts") if not (folder / name).exists()]
        if absent:
            raise InputError(*(f"{folder / name}: absent; a source folder holds samples.parquet, genes.parquet and counts/*.parquet" for name in absent))
        self.folder = folder
        self.samples = _read_table(folder / "samples.parquet", data.sample_id or "sample_id", "sample_id")
        self.genes = _read_table(folder / "genes.parquet", "gene_id", "gene_id")

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        position = pd.Series(np.arange(len(self.samples)), index=self.samples["sample_id"])
        seen = np.zeros(len(self.samples), dtype=bool)
        for path in sorted((self.folder / "counts").glob("*.parquet")):
            for names, counts in read_shard(path, len(self.genes)):
                rows = position.reindex(names)
                if rows.isna().any():
                    raise InputError(f"{path}: samples {examples(rows.index[rows.isna()])} are not in {self.folder / 'samples.parquet'}")
                rows = rows.to_numpy(dtype=np.int64)
                twice = np.unique(rows[seen[rows] | pd.Series(rows).duplicated().to_numpy()])
                if len(twice):
                    raise InputError(f"{path}: samples {examples(self.samples['sample_id'].iloc[twice])} have counts twice")
                seen[rows] = True
                yield rows, counts
        if not seen.all():
            raise InputError(f"{self.folder / 'counts'}: no counts for samples {examples(self.samples['sample_id'][~seen])}")


class H5adSource:
    """An AnnData file: raw counts in X or in a layer, obs as samples, var as genes."""

    def __init__(self, path: Path, data: Data):
        import anndata  # late: it takes a second to import and only this source needs it

        self.layer = data.layer
        try:
            with warnings.catch_warnings():
                # Names that stand twice are refused later, by name, with everything else that is wrong.
                warnings.filterwarnings("ignore", message=".*names are not unique", category=UserWarning)
                self._data = anndata.read_h5ad(path, backed="r")
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as AnnData ({error})") from None
        obs, var = self._data.obs, self._data.var
        self._check_matrix(path)
        if data.sample_id is not None and data.sample_id not in obs:
            raise InputError(f"{path}: data.sample_id: no column {data.sample_id} in obs{did_you_mean(data.sample_id, obs.columns)}; null takes the obs index")
        names = obs.index.to_series() if data.sample_id is None else obs[data.sample_id]
        self.samples = _named(obs.drop(columns=data.sample_id or []), names, "sample_id", f"{path}: obs")
        self.genes = _named(var, var.index.to_series(), "gene_id", f"{path}: var")

    def _check_matrix(self, path: Path) -> None:
        """InputError where the declared matrix is not in the file."""
        layers = f"data.layer can be {examples(self._data.layers) or 'null'}"
        if self.layer is not None and self.layer not in self._data.layers:
            raise InputError(f"{path}: no layer {self.layer!r}; {layers}")
        try:
            absent = self.layer is None and self._data.X is None
        except KeyError:  # how a backed file says that it has no X
            absent = True
        if absent:
            raise InputError(f"{path}: no X, and data.layer is null; {layers}")

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        matrix = self._data.X if self.layer is None else self._data.layers[self.layer]
        rows = max(1, CHUNK_VALUES // max(1, len(self.genes)))
        for start in range(0, len(self.samples), rows):
            block = matrix[start : start + rows]
            yield np.arange(start, start + block.shape[0]), block.toarray() if hasattr(block, "toarray") else np.asarray(block)


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
    return [f"{where}: {key} {examples(twice)} stands more than once; names must be unique"] if len(twice) else []


def check_counts(counts: np.ndarray, samples: np.ndarray, genes: np.ndarray, where: str) -> np.ndarray:
    """(B, G) int64 of whole, non-negative counts up to 2^24; InputError names sample, gene and value of the first bad one."""

    def first(bad: np.ndarray, what: str) -> InputError:
        row, column = (int(index[0]) for index in np.nonzero(bad))
        return InputError(f"{where}: sample {samples[row]}, gene {genes[column]}: {what.format(counts[row, column])}")

    if counts.dtype.kind == "f":
        if not np.isfinite(counts).all():
            raise first(~np.isfinite(counts), "count {} is not finite; expected whole numbers from 0 to 2^24")
        if (counts != np.floor(counts)).any():
            normalised = counts.max() < 50
            hint = "looks log-normalised: point data.layer at the raw counts" if normalised else "expected raw counts, whole numbers"
            raise first(counts != np.floor(counts), "count {} is fractional; " + hint)
    elif counts.dtype.kind not in "iub":
        raise InputError(f"{where}: counts of type {counts.dtype}; expected whole numbers")
    if counts.size and counts.min() < 0:
        raise first(counts < 0, "count {} is negative; expected raw counts")
    if counts.size and counts.max() > MAX_COUNT:
        raise first(counts > MAX_COUNT, "count {} is above 2^24 = 16777216; is it a sum over samples?")
    return counts.astype(np.int64)
